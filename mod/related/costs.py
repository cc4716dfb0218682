"""What a method costs, counted on real clips: there would be as many formulas as methods.

tests/test_methods.py holds the counts of MoD and full computation against the formulas of mod/study/costs.py, and the
cache entries of every method that streams against the tensors of a real stream.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod.cache import KVCache
from mod.data import Clip, clip_batch
from mod.layers import PAD
from mod.layout import Batch, Plan, Vocabulary, make_plan
from mod.related.models import FieldVideoLLM
from mod.related.ragged import frame_of, is_vision
from mod.vit import ViT


class Flops:
    """Counts the FLOPs of what runs within it. On a CPU torch's counter sees attention only when it is written as
    products."""

    def __enter__(self) -> "Flops":
        self.stack, self.counter = ExitStack(), FlopCounterMode(display=False)
        self.stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        self.stack.enter_context(self.counter)
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    @property
    def number(self) -> int:
        return self.counter.get_total_flops()


def encoder_flops(vit: ViT) -> int:
    """FLOPs of the vision encoder for one frame."""
    side = vit.config.image_size
    with Flops() as flops:
        vit(vit.position.new_zeros(1, 3, side, side))
    return flops.number


@torch.no_grad()
def counted(model: FieldVideoLLM, words: Vocabulary, clips: Sequence[Clip]) -> dict[str, float]:
    """Means over clips; the output layer and elementwise work are left out.

    flops     of one offline pass over a clip, everything from pixels on
    encoder   of these, what the vision encoder takes
    tokens    vision tokens of a frame that enter the decoder
    entries   keys (and as many values) that a frame leaves in the cache, over all layers
    text      the same of the text of a clip
    streamed  FLOPs of the clip as a live stream, frame by frame; None where that is impossible
    """
    sums, frames = {"flops": 0, "encoder": 0, "tokens": 0, "entries": 0, "text": 0, "streamed": 0}, 0
    training, learns = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)  # or torch's counter could not follow modules that are given parameters
    device, one_frame = model.decoder.embed.weight.device, encoder_flops(model.vit)
    vision = torch.zeros(0, dtype=torch.bool, device=device)  # of the clip at hand: is the token a frame's?

    def parts(pos) -> tuple[int, int]:
        """How many tokens at these positions are a frame's, and how many are text."""
        real = vision[pos[pos < PAD]]
        return int(real.sum()), int((~real).sum())

    def encoding(vit, inputs, _) -> None:
        sums["encoder"] += len(inputs[0]) * one_frame

    def entering(layer, inputs) -> None:
        where = inputs[2]
        sums["tokens"] += parts(where.pos if isinstance(where, Plan) else where)[0]

    def cached(attention, inputs) -> None:
        of_frames, text = parts(inputs[2])
        sums["entries"] += of_frames
        sums["text"] += text

    with ExitStack() as hooks:
        hooks.callback(model.vit.register_forward_hook(encoding).remove)
        hooks.callback(model.decoder.layers[0].register_forward_pre_hook(entering).remove)
        for layer in () if model.online else model.decoder.layers:
            hooks.callback(getattr(layer, "block", layer).attention.register_forward_pre_hook(cached).remove)
        for clip in clips:
            batch = clip_batch(words, [clip], model.config).to(device)
            vision = is_vision(batch.plan)[0]
            with Flops() as flops:
                model.hidden(batch.ids, model.see(batch.pixels), batch.plan)
            sums["flops"] += flops.number
            frames += len(clip.frames)
    if model.online:  # then what stays is what a stream has left
        sums |= {"entries": 0, "text": 0}
        for clip in clips:
            batch = clip_batch(words, [clip], model.config).to(device)
            vision = is_vision(batch.plan)[0]
            with Flops() as flops:
                cache = streamed(model, batch)
            sums["streamed"] += flops.number
            for layer in cache.layers:
                of_frames, text = parts(layer.pos[0, : layer.lengths[0]])
                sums["entries"], sums["text"] = sums["entries"] + of_frames, sums["text"] + text
    model.train(training)
    for parameter in learns:
        parameter.requires_grad_(True)
    share = {name: value / len(clips) for name, value in sums.items()}
    share |= {name: sums[name] / frames for name in ("tokens", "entries")}
    return share | ({} if model.online else {"streamed": None})


def streamed(model: FieldVideoLLM, batch: Batch) -> KVCache:
    """Feed one stream as it would come live, each frame with the text after it; returns what it leaves."""
    frame, seen, config, cache = frame_of(batch.plan)[0].tolist(), 0, model.config, model.new_cache()
    cuts = [0, *[t for t, f in enumerate(frame) if f >= 0 and frame[t - 1] != f], len(frame)]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part, new = slice(start, stop), frame[start] >= 0
        own = torch.tensor([frame[part]]).numpy()
        plan = make_plan(own, [start], config.frame_tokens, config.keep_counts).to(batch.ids.device)
        vision = model.see(batch.pixels[seen : seen + 1]) if new else None
        model.hidden(batch.ids[:, part], vision, plan, cache)
        seen += new
    return cache


def frame_bytes(model: FieldVideoLLM, counts: dict[str, float]) -> float:
    """Bytes of keys and values that a frame leaves, in float32."""
    return counts["entries"] * 2 * model.config.kv_heads * model.config.head_dim * 4
