"""Visual Context Window Extension (2409.20018): slower positions and fewer tokens for longer videos, without training.

Both parts are from the paper's text [read there; no code of it was seen]:

Positions. What a video model can reach is the number of vision tokens that it was trained with, less than the language
model's window. So YaRN's rule by parts is applied with the visual length: s = target / trained, a pair of entries that
turns r times within `trained` positions keeps its speed where r > beta, is slowed by s where r < alpha, and is blended
in between. alpha = 1, beta = 32. YaRN also sharpens the attention for a longer window; this paper writes of the
speeds alone: the other is not built.

Progressive pooling. Frames come in groups of K; the first of a group is pooled with a small stride, the others with a
large one. K = 4, strides 2 and 8: of 27×27 patches 196 and 16 tokens, 244 per group where 784 would be. The text calls
strides 2 and 4 the best, its table and its defaults are 2 and 8; we take the latter.

Ours: a cell is the mean of the patches that it really holds, also at the edge (the paper's pooling is the bilinear one
of LLaVA-OneVision; for the large stride we could not check); the CLS token stays; a window that need not grow is left
as it is.
"""

import torch
from torch import Tensor

from mod.real.rope import ScaledRope
from mod.related.base import Reducer, Seen, VisionTokens, merged
from mod.related.pooling import pooling_weights


def visual_rope(base: float, trained: int, target: int, low: float = 1.0, high: float = 32.0) -> ScaledRope:
    """A rope of this base for `target` vision tokens where `trained` were the most in training.

    `ScaledRope` has the rule already, under Llama's names: low is the paper's alpha, high its beta, factor its s, and
    context the length within which turns are counted, here `trained`. Giving the language model's window instead is
    YaRN as it was, the paper's comparison. Fix `target` before a stream begins: keys that a cache holds already turned
    keep the speed that they were turned with.

    In a short window no pair turns 32 times (in 200 positions not even the fastest), so that none would be left alone;
    choose low and high, for instance 0.5 and 4, by the window.
    """
    if not 0 <= low < high or trained < 1:
        raise ValueError(f"expected 0 <= low < high and trained >= 1, got low {low}, high {high}, trained {trained}")
    return ScaledRope(base, max(1.0, target / trained), low, high, trained)


def pooled(side: int, stride: int) -> Tensor:
    """(1 + ceil(side / stride)², 1 + side²) weights: the CLS token, and the mean of each cell."""
    return torch.block_diag(torch.ones(1, 1), pooling_weights(side, stride))


class ProgressivePooling(Reducer):
    """The CLS token and means of patches: of small cells in the first of every `group` frames, of large ones in others.

    What a frame's tokens say depends on that frame alone, how many they are on its number in its stream; so a stream
    has to be given from its first frame on. That number is known when the frame comes: the system runs online.
    """

    scope = "prefix"
    line = "Visual Context Window: one frame in four pooled by 2×2, the others by 8×8"

    def __init__(self, group: int = 4, first: int = 2, others: int = 8):
        super().__init__()
        if not (group >= 1 and 1 <= first <= others):
            raise ValueError(f"expected group >= 1 and 1 <= first <= others, got {group}, {first}, {others}")
        self.group, self.first, self.others = group, first, others

    def most(self, tokens: int) -> int:
        side = round((tokens - 1) ** 0.5)
        return 1 + (-(-side // self.first)) ** 2

    def forward(self, seen: Seen) -> VisionTokens:
        fine, coarse = (pooled(seen.side, stride).to(seen.tokens) for stride in (self.first, self.others))
        leads = seen.numbers % self.group == 0

        few = torch.zeros_like(fine)  # the coarse weights, padded to as many tokens as the fine ones are
        few[: len(coarse)] = coarse
        merge = torch.where(leads[:, None, None], fine, few)
        valid = merge.ne(0).any(-1)
        place = merge.ne(0).int().argmax(-1)
        return merged(seen.tokens, merge, valid, place)
