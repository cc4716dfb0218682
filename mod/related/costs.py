"""What a method costs, counted on real clips: formulas would be as many as there are methods.

tests/test_methods.py holds the counts of MoD and full computation against the formulas of mod.study.costs, and the
cache entries of every method that streams against the tensors of a real stream.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod.block import PAD
from mod.data import Clip, clip_batch
from mod.layout import Vocabulary
from mod.related.models import Compressed
from mod.related.voco import owner
from mod.study.costs import forward_flops
from mod.videollm import VideoLLM


def counted(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip]) -> dict[str, float]:
    """Means over clips of an offline pass, output layer left out.

    flops    of a clip, everything from pixels on
    encoder  of these, what the vision encoder takes
    tokens   vision tokens of a frame that enter the decoder
    entries  keys (and as many values) that a frame leaves in the cache, over all layers
    text     the same of the text of a clip
    """
    sums, frames = {"flops": 0, "encoder": 0, "tokens": 0, "entries": 0, "text": 0}, 0
    compressed = isinstance(model, Compressed)

    def encoding(vit, inputs, _) -> None:
        sums["encoder"] += len(inputs[0]) * forward_flops(model.config, 1, 0)["vit"]

    def entering(decoder, inputs) -> None:
        _, pos, frame = inputs[:3]
        sums["tokens"] += int(((pos < PAD) & (owner(frame) >= 0)).sum())

    def cached(attention, inputs) -> None:
        _, pos, frame = inputs[:3]
        vision = (frame <= -2) if compressed else (frame >= 0)  # what VoCo has compressed leaves the cache
        sums["entries"] += int(((pos < PAD) & vision).sum())
        sums["text"] += int(((pos < PAD) & (owner(frame) < 0)).sum())

    training = model.training
    model.eval()
    with ExitStack() as hooks:
        hooks.callback(model.vit.register_forward_hook(encoding).remove)
        hooks.callback(model.decoder.register_forward_pre_hook(entering).remove)
        for layer in model.decoder.layers:
            attention = getattr(layer, "block", layer).attention
            hooks.callback(attention.register_forward_pre_hook(cached).remove)
        for clip in clips:
            batch = clip_batch(words, [clip], model.config.frame_tokens)
            # With gradients: without them torch's counter cannot follow modules that are given parameters. On a CPU it
            # sees attention only when that is written as products.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                seen = model.see(batch.pixels)
                model(batch.ids, batch.frame, batch.pos, seen)
            sums["flops"] += counter.get_total_flops()
            frames += len(clip.frames)
    model.train(training)
    share = {name: value / len(clips) for name, value in sums.items()}
    return share | {name: sums[name] / frames for name in ("tokens", "entries")}


def frame_bytes(model: VideoLLM, counts: dict[str, float]) -> float:
    """Bytes of keys and values that a frame leaves, in float32."""
    return counts["entries"] * 2 * model.config.kv_heads * model.config.head_dim * 4
