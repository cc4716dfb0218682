"""The streaming memory: keys and values, another number of them in every layer.

A token that skips a layer leaves nothing there, so after t frames and s text tokens layer l holds kept[l] * t + s
entries, and one length for all layers cannot be right. Each entry carries its own position, from which the mask is made
and by which a forgotten frame is found in every layer, and its frame. The stream owns its cache; the model never holds
one, so many streams share a model.

Read next: decoder.py
"""

import torch
from einops import rearrange
from torch import Tensor

from mod.block import PAD, Rope, rotate
from mod.config import ModelConfig, StreamConfig, UserError
from mod.window import Window

FIRST = 256  # slots that a layer begins with; it grows as it fills


class LayerCache:
    """Keys and values of one layer for B streams; rows may have different lengths.

    k, v (B, G, slots, E); pos, frame (B, slots); length (B,). A row's entries stand in the order in which they came;
    empty slots stand at position PAD: never visible.
    """

    def __init__(
        self, rows: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device,
        window: Window | None = None,
    ):  # fmt: skip
        self.capacity, self.window = capacity, window
        slots = min(capacity, FIRST)
        # Keys that will be turned again and again are kept in float32 at least: half precision would round every time.
        turned = window is not None and window.config.contiguous
        wide = torch.promote_types(dtype, torch.float32) if turned else dtype
        self.k = torch.zeros(rows, kv_heads, slots, head_dim, dtype=wide, device=device)
        self.v = torch.zeros(rows, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.pos = torch.full((rows, slots), PAD, dtype=torch.long, device=device)
        self.frame = torch.full((rows, slots), -1, dtype=torch.long, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    def places(self, pos: Tensor) -> Tensor:
        """Where tokens at pos (B, T) stand, as RoPE counts."""
        return self.window.places(pos) if self.window else pos

    def append(self, k: Tensor, v: Tensor, pos: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the real tokens among k, v (B, G, T, E) at pos (B, T).

        Returns all (k, v) up to the longest row, (B, G, S, E), and which of them the tokens see, (B, 1, T, S).
        Raises UserError, with nothing stored, when a row would exceed the capacity.
        """
        real = pos < PAD
        slots = self.length[:, None] + real.cumsum(1) - 1
        length = self.length + real.sum(1)
        longest = int(length.max())
        if longest > self.capacity:
            raise UserError(
                f"the cache is full: {longest} entries needed, room for {self.capacity}; open the stream with more"
            )
        self.grow(longest)
        rows, columns = real.nonzero(as_tuple=True)
        slots = slots[rows, columns]
        self.k[rows, :, slots] = k[rows, :, columns].to(self.k.dtype)  # under autocast they come in another precision
        self.v[rows, :, slots] = v[rows, :, columns].to(self.v.dtype)
        self.pos[rows, slots], self.frame[rows, slots] = pos[rows, columns], frame[rows, columns]
        self.length = length
        k_pos, k_frame = self.pos[:, :longest], self.frame[:, :longest]
        sees = rearrange(k_pos, "b s -> b 1 s") <= rearrange(pos, "b t -> b t 1")
        if self.window and (hidden := self.window.hidden(pos, k_pos, k_frame)) is not None:
            sees = sees & ~hidden | (pos == PAD)[:, :, None]  # padding sees something, or its softmax would be nan
        return self.k[:, :, :longest].to(self.v.dtype), self.v[:, :, :longest], rearrange(sees, "b t s -> b 1 t s")

    @torch.inference_mode(False)  # or what is made here could be changed in inference mode alone
    def grow(self, slots: int) -> None:
        """Have at least so many slots, never more than the capacity. Doubling makes growing rare."""
        have = self.pos.shape[1]
        if slots <= have:
            return
        more = min(self.capacity, max(slots, 2 * have)) - have
        self.k, self.v = (torch.cat((x, x.new_zeros(*x.shape[:2], more, x.shape[3])), dim=2) for x in (self.k, self.v))
        self.pos = torch.cat((self.pos, self.pos.new_full((len(self.pos), more), PAD)), dim=1)
        self.frame = torch.cat((self.frame, self.frame.new_full((len(self.frame), more), -1)), dim=1)

    def within(self, start: Tensor, stop: Tensor) -> Tensor:
        """Which slots hold an entry at start <= position < stop, both (B,): (B, slots) bool."""
        return (self.pos >= start[:, None]) & (self.pos < stop[:, None])

    def forget(self, start: Tensor, stop: Tensor, rope: Rope | None) -> None:
        """Drop the entries at start <= position < stop, both (B,), and close ranks. With a `rope`, turn the keys behind
        them back by stop - start positions."""
        gone = self.within(start, stop)
        used = int(self.length.max())
        # A stable sort puts what stays first, in its order; rows that drop less than others keep empty slots between.
        order = gone[:, :used].int().argsort(dim=1, stable=True)
        row = torch.arange(len(order), device=order.device)[:, None]
        k, v, self.length = self.k[row, :, order], self.v[row, :, order], self.length - gone.sum(1)
        k, v = (rearrange(x, "b s g e -> b g s e") for x in (k, v))
        self.pos[:, :used] = self.pos[:, :used].masked_fill(gone[:, :used], PAD)[row, order]
        self.frame[:, :used] = self.frame[row, order]
        if rope is not None:
            behind = (self.pos[:, :used] >= stop[:, None]) & (self.pos[:, :used] < PAD)
            k = rotate(k, behind * (start - stop)[:, None], rope)
        self.k[:, :, :used], self.v[:, :, :used] = k, v

    def rewind(self, length: Tensor) -> None:
        """Forget every entry from `length` (B,) on, as if it had never been appended."""
        forgotten = torch.arange(self.pos.shape[1], device=self.pos.device) >= length[:, None]
        self.pos[forgotten], self.frame[forgotten] = PAD, -1
        self.length = length.clone()


class KVCache:
    """One LayerCache per decoder layer, with room for `frames` frames and `text` text tokens at a time. Memory is taken
    as it fills. `stream` says what is forgotten; by default nothing is."""

    def __init__(
        self, config: ModelConfig, rows: int = 1, *, frames: int, text: int, stream: StreamConfig | None = None,
        dtype=torch.float32, device="cpu",
    ):  # fmt: skip
        self.config = config
        self.window = Window(stream, rows, config.frame_tokens) if stream and stream.window else None
        self.layers = [
            LayerCache(rows, config.kv_heads, kept * frames + text, config.head_dim, dtype, device, self.window)
            for kept in config.kept
        ]

    def lengths(self, row: int = 0) -> list[int]:
        """Entries held in each layer by one stream."""
        return [int(layer.length[row]) for layer in self.layers]

    def bytes(self, row: int = 0) -> int:
        """Bytes of the keys and values that one stream holds (what is in use, not what is allocated)."""
        number_bytes = self.layers[0].k.element_size() + self.layers[0].v.element_size()
        return sum(self.lengths(row)) * self.config.kv_heads * self.config.head_dim * number_bytes

    def make_room(self, pos: Tensor, frame: Tensor) -> None:
        """Tokens at pos (B, T), of frames (B, T), are about to come: forget what none of them can see.

        Raises UserError, before anything is lost, when they do not fit nevertheless.
        """
        real = pos < PAD
        vision = (real & (frame >= 0)).sum(1)
        text, frames = real.sum(1) - vision, -(-vision // self.config.frame_tokens)
        before, spans = self.window.state() if self.window else {}, []
        try:
            if self.window:
                spans = [(start.to(pos.device), stop.to(pos.device)) for start, stop in self.window.arrive(pos, frame)]
            self.require(frames, text, spans)
        except ValueError:
            if self.window:
                self.window.restore(before)
            raise
        rope = Rope.of(self.config) if self.window and self.window.config.contiguous else None
        for start, stop in spans:
            for layer in self.layers:
                layer.forget(start, stop, rope)

    def require(self, frames: Tensor | int, text: Tensor, leaving: list[tuple[Tensor, Tensor]] = ()) -> None:
        """Raise UserError unless each row has room for so many frames and text tokens (B,), after `leaving`'s spans."""
        for number, (layer, kept) in enumerate(zip(self.layers, self.config.kept, strict=True)):
            held = layer.length - sum(layer.within(*span).sum(1) for span in leaving)
            needed = int((held + kept * frames + text).max())
            if needed > layer.capacity:
                raise UserError(
                    f"the cache is full: layer {number} would hold {needed} entries, it has room for {layer.capacity}; "
                    "open the stream with more frames or text, or with a window"
                )

    def state(self) -> dict[str, Tensor]:
        """Everything that is stored, by name; what was forgotten, and still lies in empty slots, left out."""
        tensors = {}
        for number, layer in enumerate(self.layers):
            used = int(layer.length.max())
            empty = rearrange(layer.pos[:, :used] == PAD, "b s -> b 1 s 1")
            for name in ("k", "v"):
                tensors[f"{number}.{name}"] = getattr(layer, name)[:, :, :used].masked_fill(empty, 0)
            tensors |= {f"{number}.{name}": getattr(layer, name)[:, :used].clone() for name in ("pos", "frame")}
            tensors[f"{number}.length"] = layer.length.clone()
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave. Raises UserError, with nothing changed, when it is another model's, or more than
        there is room for."""
        saved = []
        for number, layer in enumerate(self.layers):
            held = {name: tensors.get(f"{number}.{name}") for name in ("k", "v", "pos", "frame", "length")}
            k, used = held["k"], 0 if held["pos"] is None else held["pos"].shape[-1]
            fits = (
                all(tensor is not None for tensor in held.values())
                and k.shape[:2] == layer.k.shape[:2]
                and k.shape[3:] == layer.k.shape[3:]
            )
            if not fits or k.dtype != layer.k.dtype:
                raise UserError("the saved stream is of another model or number of streams; name another file")
            if used > layer.capacity:
                raise UserError(
                    f"the saved stream holds {used} entries, room for {layer.capacity}; ask for more frames"
                )
            saved.append((held, used))
        for layer, (held, used) in zip(self.layers, saved, strict=True):
            layer.grow(used)
            layer.pos.fill_(PAD)
            layer.frame.fill_(-1)
            layer.k[:, :, :used], layer.v[:, :, :used] = held["k"].to(layer.k.device), held["v"].to(layer.k.device)
            layer.pos[:, :used], layer.frame[:, :used] = (
                held["pos"].to(layer.k.device),
                held["frame"].to(layer.k.device),
            )
            layer.length = held["length"].to(layer.k.device)

    def mark(self) -> list[Tensor]:
        """Where every layer stands now; `rewind(mark)` comes back to it, unless frames have been forgotten since."""
        return [layer.length.clone() for layer in self.layers]

    def rewind(self, mark: list[Tensor]) -> None:
        for layer, length in zip(self.layers, mark, strict=True):
            layer.rewind(length)
