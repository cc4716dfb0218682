"""AdaptVision (2408.16986): a picture is cut into as many tiles as its size and its shape need.

From the authors' code [and the figure of the architecture; of the paper's text only the abstract was read]:

  1. The longer side gets ceil(side / tile) tiles, at most `most`; the shorter side is scaled by the same factor, to
     whole pixels, and gets as many tiles as it then needs. The picture is resized to exactly that many tiles, which
     stretches the shorter side by less than one tile.
  2. The whole, squeezed into one tile, and every tile go through the vision encoder. The whole keeps all its tokens; of
     a tile, every `group` = 4 consecutive tokens in raster order are concatenated and projected to one.
  3. The sequence is an index token and the whole, then for every tile, row by row, its index token and its tokens. A
     picture of one tile goes both ways too.

With tiles of 336×336 pixels, 576 tokens and most = 3 that is 722 tokens for one tile and 1882 for nine. We verified
none of the results that the paper reports.

Ours: bilinear resizing with antialiasing (the code has Lanczos); the whole is the mean over the pixels that fall
together, which is the same for any number of tiles; one encoder can serve the whole and the tiles, where the code has
two copies; the index tokens are a table of the module, where the code adds words to the vocabulary; the encoder's
summary (CLS), which the authors do not use, is not given to this module.

This is no `Reducer`. A Reducer makes of the one grid of a frame fewer tokens, and says for each at which token of that
grid it stands and by which weights it is their sum. Here the tokens come from other pixels, in several runs of the
encoder, and there are more of them: neither a place in one grid nor such weights exist. In a video all frames have
the same size and so the same number of tokens, each from its own pixels alone: it runs online.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn


def grid_for(height: int, width: int, tile: int, most: int) -> tuple[int, int]:
    """(rows, columns) of tiles of tile×tile pixels for a picture, at most `most` per side."""
    longer, shorter = max(height, width), min(height, width)
    along = min(-(-longer // tile), most)
    scaled = max(1, along * tile * shorter // longer)  # the shorter side in whole pixels, now that the longer one fits
    across = -(-scaled // tile)  # not more than along, for shorter <= longer
    return (along, across) if height >= width else (across, along)


def partition(picture: Tensor, tile: int, most: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(3, H, W) floats -> the whole (3, tile, tile), tiles by rows (rows*columns, 3, tile, tile), (rows, columns)."""
    rows, columns = grid_for(*picture.shape[1:], tile, most)
    size = (rows * tile, columns * tile)
    resized = F.interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    whole = reduce(resized, "c (h r) (w k) -> c h w", "mean", r=rows, k=columns)
    return whole, rearrange(resized, "c (r h) (k w) -> (r k) c h w", r=rows, k=columns), (rows, columns)


class TileTokens(nn.Module):
    """The tokens of the whole and of the tiles as one sequence. Each of them has N tokens; `group` must divide N.

    Where `group` divides the side of the grid too, the tokens that are joined are neighbours in a row; otherwise some
    groups reach over the end of one. For a 5×5 grid group = 5.
    """

    def __init__(self, dim: int, group: int = 4, most: int = 3):
        super().__init__()
        self.group, self.most = group, most
        self.mark_embed = nn.Embedding(1 + most * most, dim)  # the whole, and each place that a tile can have
        self.join = nn.Linear(group * dim, dim)

    def marks(self, rows: int, columns: int) -> Tensor:
        """(rows*columns,) numbers of the tiles' index tokens, row by row. A place has its own, whatever the grid is."""
        row = rearrange(torch.arange(rows, device=self.mark_embed.weight.device), "r -> r 1")
        column = rearrange(torch.arange(columns, device=self.mark_embed.weight.device), "k -> 1 k")
        return rearrange(1 + row * self.most + column, "r k -> (r k)")

    def count(self, tokens: int, rows: int, columns: int) -> int:
        """How many come out for N = tokens of the whole and of each tile."""
        return 1 + tokens + rows * columns * (1 + tokens // self.group)

    def forward(self, whole: Tensor, tiles: Tensor, grid: tuple[int, int]) -> Tensor:
        """whole (F, N, D), tiles (F, rows*columns, N, D), grid (rows, columns) -> (F, count(N, rows, columns), D)."""
        frames, number = whole.shape[:2]
        if number % self.group:
            raise ValueError(f"{number} tokens of a tile cannot be joined in groups of {self.group}; choose a divisor")
        if max(grid) > self.most or tiles.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"got {tiles.shape[1]} tiles for a grid of {grid}, at most {self.most} per side")
        joined = self.join(rearrange(tiles, "f t (n g) d -> f t n (g d)", g=self.group))
        mark = repeat(self.mark_embed(self.marks(*grid)), "t d -> f t 1 d", f=frames)
        local = rearrange(torch.cat((mark, joined), dim=2), "f t n d -> f (t n) d")
        return torch.cat((repeat(self.mark_embed.weight[:1], "1 d -> f 1 d", f=frames), whole, local), dim=1)
