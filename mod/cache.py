"""The streaming memory: keys and values, a different number of them in each layer.

A token that skips a layer leaves nothing there, so after t frames and s text tokens a layer that keeps k of a frame
holds k * t + s entries, and one length for all layers cannot be right. Lengths are plain arithmetic, so they live on
the host; each entry carries its own position, from which the mask is made. The stream owns its cache; the model never
holds one, so many streams share a model. This cache grows and never forgets.

Read next: videollm.py
"""

import torch
from einops import rearrange
from torch import Tensor

from mod.config import ModelConfig
from mod.layers import PAD
from mod.layout import Plan, to_device

FIRST = 256  # slots that a layer begins with; it grows as it fills


class LayerCache:
    """Keys and values of one layer that keeps `kept` tokens of a frame, for B streams.

    k, v (B, G, slots, E), pos (B, slots); row b's entries are its first lengths[b], in the order in which they came.
    The other slots stand at position PAD, where nobody sees them; the last one takes what is written for padding.
    """

    def __init__(self, kept: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.kept, self.lengths, self.longest = kept, [0] * rows, 0
        self.k = torch.zeros(rows, kv_heads, FIRST, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.pos = torch.full((rows, FIRST), PAD, device=device)
        self.row = torch.arange(rows, device=device)[:, None]
        self.slots = self.row  # (B, K) where the coming tokens go; `KVCache.begin` says

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k, v (B, G, K, E) at pos (B, K). Returns all keys and values up to the longest row, (B, G, S, E), and
        which of them the new tokens see, (B, K, S) bool."""
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)  # under autocast they come in another precision
        if len(pos) == 1:  # one stream, as usual: this is the quicker way on a CPU
            slots = self.slots[0]
            self.k.index_copy_(2, slots, k)
            self.v.index_copy_(2, slots, v)
            self.pos.index_copy_(1, slots, pos)
        else:
            self.k[self.row, :, self.slots] = rearrange(k, "b g t e -> b t g e")
            self.v[self.row, :, self.slots] = rearrange(v, "b g t e -> b t g e")
            self.pos[self.row, self.slots] = pos
        sees = self.pos[:, None, : self.longest] <= pos[:, :, None]
        return self.k[:, :, : self.longest], self.v[:, :, : self.longest], sees

    @torch.inference_mode(False)  # otherwise tensors made here could only be modified in inference mode
    def grow(self, slots: int) -> None:
        """Have at least this many slots. Doubling makes growing rare."""
        have = self.pos.shape[1]
        if slots > have:
            more = max(slots, 2 * have) - have
            self.k, self.v = (torch.cat((x, x.new_zeros(*x.shape[:2], more, x.shape[3])), 2) for x in (self.k, self.v))
            # Without the last slot, where padding went.
            self.pos = torch.cat((self.pos[:, :-1], self.pos.new_full((len(self.pos), more + 1), PAD)), 1)

    def rewind(self, lengths: list[int]) -> None:
        """Forget every entry from lengths[b] on, as if it had never been appended."""
        self.lengths, self.longest = list(lengths), max(2, *lengths)
        for row, length in enumerate(lengths):
            self.pos[row, length:] = PAD


class KVCache:
    """One LayerCache per decoder layer."""

    def __init__(self, config: ModelConfig, rows: int = 1, dtype: torch.dtype = torch.float32, device="cpu"):
        self.config = config
        size = rows, config.kv_heads, config.head_dim, dtype, device
        self.layers = [LayerCache(kept, *size) for kept in config.keep_counts]
        self.places = torch.zeros(rows, 0)  # (B, T) where the coming tokens stand, as RoPE counts

    def begin(self, plan: Plan) -> None:
        """The tokens of `plan` come next: count them, have room for them, and say where they go."""
        slots: dict[int, Tensor] = {}  # layers with the same k have the same lengths, hence the same slots
        for layer in self.layers:
            before, counts = layer.lengths, plan.counts[layer.kept]
            layer.lengths = [length + count for length, count in zip(before, counts, strict=True)]
            layer.longest = max(2, *layer.lengths)  # one key alone would be compiled as a case of its own
            layer.grow(layer.longest + 1)
            if layer.kept not in slots:
                nobody, most = layer.pos.shape[1] - 1, max(counts)
                own = [[*range(at, at + new), *[nobody] * (most - new)] for at, new in zip(before, counts, strict=True)]
                slots[layer.kept] = torch.tensor(own)
        slots = to_device(slots, plan.pos.device)
        for layer in self.layers:
            layer.slots = slots[layer.kept]
        self.places = plan.pos  # a window counts anew instead, see mod/live/window.py

    def entries(self, row: int = 0) -> list[int]:
        """Entries held in each layer by one stream."""
        return [layer.lengths[row] for layer in self.layers]

    def mark(self) -> list[list[int]]:
        """Where every layer stands now; `rewind(mark)` comes back to it."""
        return [layer.lengths for layer in self.layers]

    def rewind(self, mark: list[list[int]]) -> None:
        for layer, lengths in zip(self.layers, mark, strict=True):
            layer.rewind(lengths)
