"""What an endless stream forgets: which of its earlier tokens a token can still see.

    window 0                everything is kept
    window W                what comes before the first frame (<bos>, a question), the first frames ("sinks": attention
                            leans on them when it looks for nothing) and the last W frames, each with the text after it
    window W, forget vision the same, but the text stays: the dialogue is remembered, old pictures are not

The rule is about tokens of the *stream*, so it is the same in every layer, although layers hold different tokens: the
token at position p sees the token at s iff s <= p and s is not forgotten for p. A frame is forgotten as a whole, with
the first token of the frame that pushes it out, and never comes back. What is forgotten is dropped from the cache.

Positions. "absolute": tokens keep the position they came with, which grows forever. "contiguous": a token stands where
it would if what it can no longer see had never been. When a frame goes, the keys behind it are turned back by as many
positions as it took. Rotations add up, so the turn is exact and nothing is computed again, and no token ever stands
further than what is remembered is long. RoPE sees distances only: the one thing that changes is how far away <bos>,
the sinks and text that stayed seem to be.

Read next: live.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mod.cache import KVCache, LayerCache
from mod.config import ModelConfig, require
from mod.layers import PAD, Rope, rotate
from mod.layout import Plan, to_device
from mod.live.settings import StreamConfig
from mod.videollm import VideoLLM


@dataclass
class Segment:
    """Part of a stream: a frame and the text after it. The first of a stream is the text before its first frame.

    entries  how many entries it has in each layer; not known before the next segment begins
    """

    vision: bool
    text: int = 0  # tokens
    entries: tuple[int, ...] = ()


class TurnedLayer(LayerCache):
    """Keeps keys in float32 at least: keys that are turned again and again in half precision are rounded every time."""

    def __init__(self, *size):
        super().__init__(*size)
        self.k = self.k.to(torch.promote_types(self.k.dtype, torch.float32))

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, sees = super().append(k, v, pos)
        return keys.to(values.dtype), values, sees


class WindowCache(KVCache):
    """A KVCache that forgets. What leaves is known before the tokens are, so nothing here waits for the device.

    segments  per row, what is remembered, in order
    starts    per row, where the last segment begins in each layer
    gone      per row, how many tokens of the stream have been forgotten

    Frames come at the beginning of a chunk, at most one per row; text may follow. A Stream feeds them so.
    """

    def __init__(self, config: ModelConfig, rows: int = 1, dtype: torch.dtype = torch.float32, device="cpu", *,
                 settings: StreamConfig, rope: Rope):
        super().__init__(config, rows, dtype, device)
        self.settings, self.rope = settings, rope
        if settings.contiguous and torch.promote_types(dtype, torch.float32) != dtype:
            size = rows, config.kv_heads, config.head_dim, dtype, device
            self.layers = [over(type(layer), TurnedLayer)(layer.kept, *size) for layer in self.layers]
        self.segments = [[Segment(vision=False)] for _ in range(rows)]
        self.starts = [[0] * len(self.layers) for _ in range(rows)]
        self.gone = [0] * rows

    def begin(self, plan: Plan) -> None:
        """The tokens of `plan` come next: a frame pushes out the oldest one where the window is full.

        Raises ValueError when a row of a chunk with frames has not exactly one.
        """
        size, counts = self.config.frame_tokens, plan.counts[self.config.frame_tokens]
        coming = sum(count > 0 for count in counts) if len(plan.vision) else 0
        if len(plan.vision) != coming:
            raise ValueError(f"got {len(plan.vision)} frames in {coming} rows of a chunk, expected one in each; feed a "
                             "frame in a chunk of its own")
        for row, count in enumerate(counts):
            if coming and count:
                self._open(row)
            self.segments[row][-1].text += max(0, count - size) if coming else count
        super().begin(plan)
        if self.settings.contiguous and any(self.gone):
            gone = to_device(torch.tensor(self.gone)[:, None], plan.pos.device)
            self.places = plan.pos - gone

    def _open(self, row: int) -> None:
        """A frame comes: its segment begins, and another may leave."""
        now, segments = self.entries(row), self.segments[row]
        segments[-1].entries = tuple(end - start for start, end in zip(self.starts[row], now, strict=True))
        segments.append(Segment(vision=True))
        self.starts[row] = now
        seen = [number for number, segment in enumerate(segments) if segment.vision][self.settings.sinks :]
        if len(seen) > self.settings.window:
            self._forget(row, seen[0])

    def _forget(self, row: int, number: int) -> None:
        """Drop a segment's frame, and its text if that goes too; turn the keys behind it back into the gap."""
        before, leaving = self.segments[row][:number], self.segments[row].pop(number)
        stays = 0 if self.settings.forgets_text else leaving.text
        shift = self.config.frame_tokens + leaving.text - stays
        keys = self.layers[0].k
        back = torch.full((1, 1), -shift, device=keys.device)
        turn = self.rope.turn(back, self.config.head_dim, keys.dtype) if self.settings.contiguous else None
        for i, layer in enumerate(self.layers):
            start = sum(segment.entries[i] for segment in before)
            stop, end = start + leaving.entries[i] - stays, layer.lengths[row]
            length = end - (stop - start)
            k, own = layer.k[row : row + 1, :, stop:end], slice(start, length)
            layer.k[row : row + 1, :, own] = k.clone() if turn is None else rotate(k, turn)
            layer.v[row, :, own] = layer.v[row, :, stop:end].clone()
            layer.pos[row, own] = layer.pos[row, stop:end].clone()
            layer.pos[row, length:end] = PAD
            layer.lengths = [length if other == row else n for other, n in enumerate(layer.lengths)]
            self.starts[row][i] -= stop - start
        self.gone[row] += shift
        if stays:  # as if it had been said one frame earlier
            before[-1].text += stays
            before[-1].entries = tuple(entries + stays for entries in before[-1].entries)

    def held(self, row: int = 0) -> tuple[int, int]:
        """Frames and text tokens that one stream remembers."""
        segments = self.segments[row]
        return sum(segment.vision for segment in segments), sum(segment.text for segment in segments)

    def mark(self) -> tuple:
        """As `KVCache.mark`. A rewind comes back to it unless a frame has come since."""
        return super().mark(), [segments[-1].text for segments in self.segments]

    def rewind(self, mark: tuple) -> None:
        lengths, texts = mark
        super().rewind(lengths)
        for segments, text in zip(self.segments, texts, strict=True):
            segments[-1].text = text

    def state(self) -> dict:
        """What it knows about its entries, as plain lists."""
        segments = [[[segment.vision, segment.text, list(segment.entries)] for segment in row] for row in self.segments]
        return {"segments": segments, "starts": [list(row) for row in self.starts], "gone": list(self.gone)}

    def restore(self, state: dict) -> None:
        self.segments = [[Segment(vision, text, tuple(entries)) for vision, text, entries in row]
                         for row in state["segments"]]
        self.starts, self.gone = [list(row) for row in state["starts"]], list(state["gone"])


def over(kind: type, own: type) -> type:
    """A class that does as `own` does, on top of what `kind` does; both extend the same class of the core."""
    return own if issubclass(own, kind) else type(own.__name__ + kind.__name__, (own, kind), {})


def open_cache(model: VideoLLM, settings: StreamConfig, rows: int = 1) -> KVCache:
    """An empty memory for a stream of so many rows, which forgets as `settings` say: the model's own kind of cache,
    with a window if there is to be one. Raises UserError where that kind cannot forget frames; its attribute
    `no_window` says why."""
    cache = model.new_cache(rows)
    if not settings.window:
        return cache
    kind, weight = type(cache), model.decoder.embed.weight
    reason = getattr(kind, "no_window", "")
    require(not reason, f"a window got {settings.window} frames, but {reason}; leave it out")
    size = model.config, rows, weight.dtype, weight.device
    return over(kind, WindowCache)(*size, settings=settings, rope=model.decoder.rope)
