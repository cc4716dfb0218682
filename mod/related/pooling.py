"""Pooling: every k×k patches become their mean. LongVA's UniRes encoding (2406.16852) does it with k = 2.

In UniRes an image is cut into tiles, each is encoded, pooled and laid in a row, and a video frame is one tile: so an
image of a×b tiles and a video of a·b frames are the same thing to the decoder [checked in the authors' code]. Here the
part that concerns video is built: the pooling. The CLS token, which UniRes does not have, stays [ours].
"""

import torch
from einops import rearrange
from torch import Tensor

from mod.related.base import Reducer, Seen, VisionTokens, merged


def pooling_weights(side: int, k: int) -> Tensor:
    """(cells, side*side) weights of the mean over each k×k cell of a grid; cells at the edge may hold fewer patches."""
    cells = -(-side // k)
    line = torch.arange(side) // k
    cell = rearrange(line, "h -> h 1") * cells + rearrange(line, "w -> 1 w")
    inside = rearrange(cell, "h w -> 1 (h w)") == torch.arange(cells * cells)[:, None]
    return inside / inside.sum(1, keepdim=True)


class UniRes(Reducer):
    """The CLS token, and ceil(side / k)² means of k×k patches."""

    scope = "frame"
    line = "LongVA's UniRes: the mean of every 2×2 patches"

    def __init__(self, k: int = 2):
        super().__init__()
        self.k = k

    def most(self, tokens: int) -> int:
        side = round((tokens - 1) ** 0.5)
        return 1 + (-(-side // self.k)) ** 2

    def forward(self, seen: Seen) -> VisionTokens:
        frames, number, _ = seen.tokens.shape
        pool = pooling_weights(seen.side, self.k).to(seen.tokens)
        merge = seen.tokens.new_zeros(1 + len(pool), number)
        merge[0, 0] = 1
        merge[1:, 1:] = pool
        place = merge.ne(0).int().argmax(1)
        valid = torch.ones(frames, len(merge), dtype=torch.bool, device=merge.device)
        return merged(seen.tokens, merge.expand(frames, -1, -1), valid, place.expand(frames, -1))
