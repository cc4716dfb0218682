"""The streaming memory: keys and values, another number of them in every layer.

A token that skips a layer leaves nothing there, so after t frames and s text tokens layer l holds kept[l] * t + s
entries, and one length for all layers cannot be right. Each entry carries its own position (for the mask) and frame
(for whoever drops frames later). The stream owns its cache; the model never holds one, so many streams share a model.

Read next: decoder.py
"""

import torch
from torch import Tensor

from mod.block import PAD
from mod.config import ModelConfig, UserError


class LayerCache:
    """Preallocated keys and values of one layer for B streams; rows may have different lengths.

    k, v (B, G, capacity, E); pos, frame (B, capacity); length (B,). Empty slots stand at position PAD: never visible.
    """

    def __init__(
        self, rows: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.k = torch.zeros(rows, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.pos = torch.full((rows, capacity), PAD, dtype=torch.long, device=device)
        self.frame = torch.full((rows, capacity), -1, dtype=torch.long, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    @property
    def capacity(self) -> int:
        return self.pos.shape[1]

    def append(self, k: Tensor, v: Tensor, pos: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the real tokens among k, v (B, G, T, E) at pos (B, T); return all (k, v, pos) up to the longest row.

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
        rows, columns = real.nonzero(as_tuple=True)
        slots = slots[rows, columns]
        self.k[rows, :, slots] = k[rows, :, columns].to(self.k.dtype)  # under autocast they come in another precision
        self.v[rows, :, slots] = v[rows, :, columns].to(self.v.dtype)
        self.pos[rows, slots], self.frame[rows, slots] = pos[rows, columns], frame[rows, columns]
        self.length = length
        return self.k[:, :, :longest], self.v[:, :, :longest], self.pos[:, :longest]

    def rewind(self, length: Tensor) -> None:
        """Forget every entry from `length` (B,) on, as if it had never been appended."""
        forgotten = torch.arange(self.capacity, device=self.pos.device) >= length[:, None]
        self.pos[forgotten], self.frame[forgotten] = PAD, -1
        self.length = length.clone()


class KVCache:
    """One LayerCache per decoder layer, with room for `frames` frames and `text` text tokens."""

    def __init__(
        self, config: ModelConfig, rows: int = 1, *, frames: int, text: int, dtype=torch.float32, device="cpu"
    ):
        self.config = config
        self.layers = [
            LayerCache(rows, config.kv_heads, kept * frames + text, config.head_dim, dtype, device)
            for kept in config.kept
        ]

    def lengths(self, row: int = 0) -> list[int]:
        """Entries held in each layer by one stream."""
        return [int(layer.length[row]) for layer in self.layers]

    def bytes(self, row: int = 0) -> int:
        """Bytes of the keys and values that one stream holds (what is in use, not what is preallocated)."""
        entry = 2 * self.config.kv_heads * self.config.head_dim * self.layers[0].k.element_size()
        return sum(self.lengths(row)) * entry

    def require(self, frames: int, text: list[int]) -> None:
        """Raise UserError, before anything is stored, unless each row has room for `frames` frames, text[row] words."""
        more = torch.tensor(text, device=self.layers[0].length.device)
        for number, (layer, kept) in enumerate(zip(self.layers, self.config.kept, strict=True)):
            needed = int((layer.length + kept * frames + more).max())
            if needed > layer.capacity:
                raise UserError(
                    f"the cache is full: layer {number} would hold {needed} entries, it has room for {layer.capacity}; "
                    "open the stream with more frames or text"
                )

    def mark(self) -> list[Tensor]:
        """Where every layer stands now; `rewind(mark)` comes back to it."""
        return [layer.length.clone() for layer in self.layers]

    def rewind(self, mark: list[Tensor]) -> None:
        for layer, length in zip(self.layers, mark, strict=True):
            layer.rewind(length)
