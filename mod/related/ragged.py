"""Rows of tokens whose number only the data knows: gather and scatter, and a cache that counts what comes.

The core's plan knows every shape before the model runs. In the methods of this folder, how many tokens of a frame go on
may depend on what the frame shows. They gather what goes on into short rows, at the tokens' own positions, run the same
layers on them, and scatter the result back.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mod.cache import KVCache, LayerCache
from mod.config import ModelConfig
from mod.decoder import Decoder
from mod.layers import PAD
from mod.layout import Plan


def is_vision(plan: Plan) -> Tensor:
    """(B, T) bool."""
    nothing = torch.zeros_like(plan.pos, dtype=torch.bool)
    return nothing.flatten().index_fill(0, plan.vision.flatten(), True).view_as(nothing)


def rows_of(plan: Plan) -> Tensor:
    """(F,) the row of each frame, rising."""
    return plan.vision[:, 0] // max(1, plan.pos.shape[1])


def numbers_of(plan: Plan, before: list[int] | None = None) -> Tensor:
    """(F,) the number of each frame in its stream, of which row b has had before[b] frames."""
    row = rows_of(plan)
    number = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    return number if before is None else number + torch.tensor(before, device=row.device)[row]


def frame_of(plan: Plan, before: list[int] | None = None) -> Tensor:
    """(B, T) the number of each token's frame in its stream, -1 for text and padding."""
    frame = torch.full_like(plan.pos, -1).flatten()
    number = rearrange(numbers_of(plan, before), "f -> f 1").expand_as(plan.vision)
    return frame.index_copy(0, plan.vision.flatten(), number.flatten()).view_as(plan.pos)


class Short(NamedTuple):
    """The kept tokens of each row in their order, K of them, filled up where a row keeps fewer."""

    row: Tensor  # (B, 1)
    index: Tensor  # (B, K) where they stood
    real: Tensor  # (B, K) bool, which are no filling
    pos: Tensor  # (B, K) original positions, PAD for the filling

    def take(self, values: Tensor) -> Tensor:
        """Of values (B, T, ...) those of the kept tokens, (B, K, ...)."""
        return values[self.row, self.index]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x (B, T, D) with new (B, K, D) in the place of the kept tokens; the rest bit for bit as it was."""
        y = x.clone()
        y[self.row, self.index] = torch.where(self.real[..., None], new, self.take(x))
        return y


def shorten(keep: Tensor, pos: Tensor) -> Short:
    """The short rows of the tokens that keep (B, T) says and that are no padding."""
    keep = keep & (pos < PAD)
    # A stable sort leaves the kept tokens in order of time, which attention relies on.
    index = keep.logical_not().int().argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
    row = torch.arange(len(pos), device=pos.device)[:, None]
    real = keep[row, index]
    return Short(row, index, real, pos[row, index].where(real, PAD))


def run_layers(
    decoder: Decoder, x: Tensor, turn: Tensor, pos: Tensor, cache=None, mask: Tensor | None = None, first: int = 0
) -> Tensor:
    """The decoder's layers from `first` on, all dense, with rotations or a mask of one's own: x (B, T, D),
    turn (B, T, 2, E), mask (B, T, S) bool -> (B, T, D), not yet normed."""
    for number, layer in enumerate(decoder.layers[first:], first):
        x = layer(x, turn, pos, past=cache.layers[number] if cache is not None else None, mask=mask)
    return x


class CountingLayer(LayerCache):
    """A LayerCache that counts what comes when it comes. Filling stands at PAD, on the right of each row."""

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, before = (pos < PAD).sum(1), torch.tensor(self.lengths, device=pos.device)
        self.lengths = (before + count).tolist()
        self.longest = max(self.lengths)
        self.grow(self.longest + 1)
        step, nobody = torch.arange(pos.shape[1], device=pos.device), self.pos.shape[1] - 1
        self.slots = torch.where(step < count[:, None], before[:, None] + step, nobody)
        return super().append(k, v, pos)


class CountingCache(KVCache):
    """A KVCache whose layers count what comes when it comes, and that knows how many frames each row has had."""

    layer = CountingLayer

    def __init__(self, config: ModelConfig, rows: int = 1, dtype: torch.dtype = torch.float32, device="cpu"):
        super().__init__(config, rows, dtype, device)
        size = rows, config.kv_heads, config.head_dim, dtype, device
        self.layers = [self.layer(kept, *size) for kept in config.keep_counts]
        self.frames = [0] * rows

    def begin(self, plan: Plan) -> None:
        """The tokens of `plan` come next; how many of them each layer stores, it finds out itself."""
        self.places = plan.pos

    def saw(self, plan: Plan) -> None:
        """The frames of `plan` have come."""
        for row in rows_of(plan).tolist():
            self.frames[row] += 1

    def more(self) -> dict[str, Tensor]:
        """What a saved stream must know beside keys and values."""
        return {"frames": torch.tensor(self.frames)}

    def restore_more(self, tensors: dict[str, Tensor]) -> None:
        self.frames = tensors["frames"].tolist()

    def mark(self) -> tuple:
        return super().mark(), list(self.frames)

    def rewind(self, mark: tuple) -> None:
        lengths, frames = mark
        super().rewind(lengths)
        self.frames = list(frames)
