"""What a method costs, counted on real clips: formulas would be as many as there are methods.

tests/test_methods.py holds the counts of MoD and full computation against the formulas of mod.study.costs, and the
cache entries of every method that streams against the tensors of a real stream.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod.block import PAD
from mod.cache import KVCache
from mod.data import Clip, clip_batch
from mod.layout import Batch, Vocabulary
from mod.related.voco import owner
from mod.study.costs import forward_flops
from mod.videollm import VideoLLM


def counted(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip]) -> dict[str, float]:
    """Means over clips; the output layer and elementwise work are left out.

    flops     of one offline pass over a clip, everything from pixels on
    encoder   of these, what the vision encoder takes
    tokens    vision tokens of a frame that enter the decoder
    entries   keys (and as many values) that a frame leaves in the cache, over all layers
    text      the same of the text of a clip
    streamed  FLOPs of the clip as a live stream, frame by frame; None where that is impossible
    """
    sums, frames = {"flops": 0, "encoder": 0, "tokens": 0, "entries": 0, "text": 0, "streamed": 0}, 0

    def encoding(vit, inputs, _) -> None:
        sums["encoder"] += len(inputs[0]) * forward_flops(model.config, 1, 0)["vit"]

    def entering(decoder, inputs) -> None:
        _, pos, frame = inputs[:3]
        sums["tokens"] += int(((pos < PAD) & (owner(frame) >= 0)).sum())

    def cached(attention, inputs) -> None:
        _, pos, frame = inputs[:3]
        sums["entries"] += int(((pos < PAD) & (owner(frame) >= 0)).sum())
        sums["text"] += int(((pos < PAD) & (owner(frame) < 0)).sum())

    training, learns = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)  # or torch's counter could not follow modules that are given parameters
    with ExitStack() as hooks:
        hooks.callback(model.vit.register_forward_hook(encoding).remove)
        hooks.callback(model.decoder.register_forward_pre_hook(entering).remove)
        for layer in model.decoder.layers:
            attention = getattr(layer, "block", layer).attention
            hooks.callback(attention.register_forward_pre_hook(cached).remove)
        for clip in clips:
            batch = clip_batch(words, [clip], model.config.frame_tokens)
            # On a CPU torch's counter sees attention only when that is written as products.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                seen = model.see(batch.pixels)
                model(batch.ids, batch.frame, batch.pos, seen)
            sums["flops"] += counter.get_total_flops()
            frames += len(clip.frames)
    if model.online:  # then what stays is what a stream has left
        sums |= {"entries": 0, "text": 0}
        for clip in clips:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                cache = streamed(model, clip_batch(words, [clip], model.config.frame_tokens))
            sums["streamed"] += counter.get_total_flops()
            text = sum(int((layer.frame[0, : layer.length[0]] == -1).sum()) for layer in cache.layers)
            sums["text"], sums["entries"] = sums["text"] + text, sums["entries"] + sum(cache.lengths()) - text
    model.train(training)
    for parameter in learns:
        parameter.requires_grad_(True)
    share = {name: value / len(clips) for name, value in sums.items()}
    share |= {name: sums[name] / frames for name in ("tokens", "entries")}
    return share | ({} if model.online else {"streamed": None})


def streamed(model: VideoLLM, batch: Batch) -> KVCache:
    """Feed one stream as it would come live, each frame with the text after it; returns what it leaves."""
    frame, seen = batch.frame[0].tolist(), 0
    cuts = [0, *[t for t, f in enumerate(frame) if f >= 0 and frame[t - 1] != f], len(frame)]
    cache = model.open_cache(1, len(batch.pixels), len(frame))
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part, new = slice(start, stop), 1 if frame[start] >= 0 else 0
        vision = model.see(batch.pixels[seen : seen + 1]) if new else batch.pixels.new_zeros(0, 1, model.config.dim)
        model(batch.ids[:, part], batch.frame[:, part], batch.pos[:, part], vision, cache=cache)
        seen += new
    return cache


def frame_bytes(model: VideoLLM, counts: dict[str, float]) -> float:
    """Bytes of keys and values that a frame leaves, in float32."""
    return counts["entries"] * 2 * model.config.kv_heads * model.config.head_dim * 4
