"""Free Video-LLM (2410.10441): the question chooses frames, and in them the region that keeps its detail.

Three paths, from the authors' code [checked there alone; of the paper only the abstract was read, so its formulas and
accuracies are unverified]:

    slow    the k frames most like the question, by the cosine of its vector and the frame's, in the order of time
    middle  frames at even distances: frame number floor(T * i / k)
    fast    all frames, each as an adaptive average pool of coarse×coarse cells

The patches of the first two go through a maximum over horizontal pairs, and only a box of that grid stays: the best
int(share * cells) cells by the cosine with the question give its centre, `share` its size. Training-free. The defaults
are those of the 7B and 34B configurations in the code, on 50 frames of 24×24 patches: 8 * 231 + 50 * 16 = 2648 tokens.

Ours:
  - The code compares the vectors of a CLIP. Here is none, so the question's vector is compared with the frame's CLS
    token and with its pooled patches, and whoever makes the vector has to make it comparable with them.
  - The CLS token of every frame stays. The code has none.
  - A frame's tokens stand together at its time, in raster order by the first patch that each stands for. The code lays
    the three paths one after another, and repeats the region of a frame that is on both of the first two.
  - The grid need not divide: the last cell of a row holds the patches that are left, where the code drops the last
    token of an odd number. A frame of fewer than coarse×coarse patches is not pooled to more than it has.
  - The best of equals is the earliest. A region has at least one cell.

Two things in the code are not copied. It takes the pooled grid of 24 rows and 12 columns for one of 12 rows and 24
columns, so that its box is two interleaved half-boxes; here it is the true grid, in which the box has as many tokens,
21×11 for 11×21. And it cuts off the fraction of the centre, which moves a box of even size by up to a cell; here the
centre is rounded.

Not online: the question must be there before the frames, and a new question needs all patches of all frames again.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mod.related.base import Reducer, Seen, VisionTokens, chosen


def select_frames(query: Tensor, frames: Tensor, k: int) -> Tensor:
    """The min(k, T) of frames (T, D) that are most like query (D,) by cosine, as rising numbers."""
    alike = F.cosine_similarity(query, frames, dim=-1)
    return alike.argsort(descending=True, stable=True)[:k].sort().values


def spread_frames(number: int, k: int) -> Tensor:
    """min(k, T) of T = number frames at even distances from the first one on, as rising numbers."""
    return torch.arange(min(k, number)) * number // max(1, min(k, number))


def box_size(rows: int, columns: int, share: float) -> tuple[int, int]:
    """Height and width of a box of about `share` of the cells, as wide for its height as the grid is."""
    return max(1, round(rows * math.sqrt(share))), max(1, round(columns * math.sqrt(share)))


def roi_box(score: Tensor, share: float) -> tuple[int, int, int, int]:
    """top, bottom, left, right (bottom and right are the first outside) of the region of interest in score (h, w).

    Its centre is the mean of the best cells, which need not be good itself: of two spots far apart it is the middle.
    """
    rows, columns = score.shape
    best = score.flatten().argsort(descending=True, stable=True)[: max(1, int(share * rows * columns))]
    ends = []
    for where, length, size in zip(
        (best // columns, best % columns), (rows, columns), box_size(rows, columns, share), strict=True
    ):
        # The mean, rounded, a half up; in integers, so exact.
        centre = (2 * int(where.sum()) + len(best)) // (2 * len(best))
        start = min(max(centre - size // 2, 0), length - size)  # moved until the box is inside
        ends += [start, start + size]
    return tuple(ends)


def coarse_weights(side: int, coarse: int) -> Tensor:
    """(coarse², side²) weights of the adaptive average pool, whose cells may overlap by a row or column of patches."""
    if coarse == 0:
        return torch.zeros(0, side * side)
    each = rearrange(torch.eye(side * side), "n (h w) -> n h w", h=side)
    return rearrange(F.adaptive_avg_pool2d(each, coarse), "n a b -> (a b) n")


class PromptGuided(Reducer):
    """The CLS token, coarse² averages, and in chosen frames the region of interest of the patches.

    pool is over how many neighbours in a row the maximum is taken; with 1 the system is linear and says by which
    weights. slow = middle = 0 leaves the averages alone, coarse = 0 leaves them out.
    """

    scope = "query"
    line = "frames and regions that the question chooses, an average pool of all others"

    def __init__(self, slow: int = 3, middle: int = 5, share: float = 0.8, coarse: int = 4, pool: int = 2):
        super().__init__()
        self.slow, self.middle, self.share, self.coarse, self.pool = slow, middle, share, coarse, pool

    def most(self, tokens: int) -> int:
        side = round((tokens - 1) ** 0.5)
        detailed = self.slow > 0 or self.middle > 0
        region = math.prod(box_size(side, -(-side // self.pool), self.share)) if detailed else 0
        return 1 + min(self.coarse, side) ** 2 + region

    def detailed(self, seen: Seen) -> list[int]:
        """The frames that keep a region, of every stream its own."""
        frames = []
        for row in seen.rows.unique().tolist():
            mine = (seen.rows == row).nonzero()[:, 0].cpu()
            by_question = select_frames(seen.query[row], seen.tokens[mine, 0], self.slow).cpu()
            by_time = spread_frames(len(mine), self.middle)
            frames += mine[torch.cat((by_question, by_time)).unique()].tolist()
        return frames

    def forward(self, seen: Seen) -> VisionTokens:
        if seen.query is None:
            raise ValueError(
                "Free Video-LLM chooses frames and regions by a question, but there is none: give Seen.query"
            )
        frames, side, patches = len(seen.tokens), seen.side, seen.patches
        coarse = coarse_weights(side, min(self.coarse, side)).to(patches)
        fine = F.max_pool2d(rearrange(patches, "f (h w) d -> f d h w", h=side), (1, self.pool), ceil_mode=True)
        fine = rearrange(fine, "f d h w -> f h w d")

        score = F.cosine_similarity(rearrange(seen.query[seen.rows], "f d -> f 1 1 d"), fine, dim=-1)
        region = torch.zeros_like(score, dtype=torch.bool)
        for frame in self.detailed(seen):
            top, bottom, left, right = roi_box(score[frame], self.share)
            region[frame, top:bottom, left:right] = True

        # All that a frame could hand on, with the token at which each stands; then what it does hand on.
        offered = torch.cat((seen.tokens[:, :1], coarse @ patches, rearrange(fine, "f h w d -> f (h w) d")), dim=1)
        number = torch.arange(1, side * side + 1, device=patches.device)
        first = rearrange(rearrange(number, "(h w) -> h w", h=side)[:, :: self.pool], "h w -> (h w)")
        place = torch.cat((number.new_zeros(1), number[coarse.ne(0).int().argmax(1)], first))
        always = region.new_ones(frames, 1 + len(coarse))
        keep = torch.cat((always, rearrange(region, "f h w -> f (h w)")), dim=1)
        order = place.argsort(stable=True)  # at one place the average comes before the detail
        out = chosen(offered[:, order], keep[:, order])
        merge = None  # a maximum is no weighted sum; over one patch it is
        if self.pool == 1:
            patch = torch.eye(side * side).to(patches)
            weights = torch.block_diag(patches.new_ones(1, 1), torch.cat((coarse, patch)))
            merge = out.merge @ weights[order]
        return VisionTokens(out.x, out.valid, place[order][out.place], merge)
