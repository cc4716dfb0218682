"""LLaVA-PruMerge and PruMerge+ (2403.15388): patches that the summary looks at, each with its like folded into it.

1. Of each frame those patches are selected whose attention from the CLS token is an outlier: above the third quartile
   by more than 1.5 times the distance between the quartiles. Busy frames keep more, plain ones fewer.
2. PruMerge+ adds every g-th patch in raster order, g = ⌊⌊P/m⌋ / 3⌋ for m outliers among P patches: about four times as
   many tokens, spread over the frame.
3. To each selected patch are added its k nearest others by the cosine of their keys, weighted by their attention.
4. One more token at the end, the tail: the sum of all patches that were not selected, weighted alike.

From the paper: CLS attention, outliers, merging by similar keys, the steps' order (its figure); it needs no training.
Checked only in the authors' code: the rule's numbers, k = 32 of 576 patches (16 in training), that other selected
patches may be among the neighbours, that weights are the attention itself and not normalised, the tail, and g. There
attention and keys are the last layer's, over the full width, and the tokens the layer's before it.
Only from secondary sources: 5.5% of the tokens on average. No result of the paper has been reproduced here.

Ours: the CLS token stays as the first (LLaVA has none); selected tokens stand in raster order (there, in that of
attention); a `floor`, for where no attention stands out nothing is selected; a g of at least 1; ties go to the earlier
patch; a tail that would stand for nothing is left out; `normalise`, which makes every token a mean; attention is that
of `Seen`, which sums to one over the patches. Smaller grids keep very few tokens: of 25 patches with random attention
two on average. That is the rule.

Not copied from the authors' code: one outlier ratio for a whole batch, so that an image's tokens depend on the others;
a grid that ends one patch early and layer numbers written into the code; in training a fixed ratio for PruMerge+, whose
sampled and selected patches may coincide and then come twice, while others are lost to the tail.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mod.related.base import Reducer, Seen, VisionTokens, chosen, merged


def outliers(attention: Tensor) -> Tensor:
    """How many of each row of (F, P) lie above Q3 + 1.5 (Q3 - Q1), (F,). They are the row's largest."""
    low, high = attention.float().quantile(torch.tensor([0.25, 0.75], device=attention.device), dim=1)
    fence = high + 1.5 * (high - low)
    return (attention.float() > fence[:, None]).sum(1)


def grid_step(patches: int, number):
    """PruMerge+ adds every so many-th patch, where `number` (an int or a tensor of them) are outliers."""
    step = patches // (number + (number == 0)) // 3
    return step + (step == 0)  # without: more than a third are outliers, all are added


def neighbours(keys: Tensor, k: int) -> Tensor:
    """(F, P, P) bool from keys (F, P, E): row i marks the k other patches whose keys are most like i's by cosine."""
    patches = keys.shape[1]
    k = min(k, patches - 1)
    keys = F.normalize(keys.float(), dim=-1)
    cosine = keys @ rearrange(keys, "f p e -> f e p")
    cosine = cosine.masked_fill(torch.eye(patches, dtype=torch.bool, device=keys.device), -torch.inf)
    nearest = cosine.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(cosine, dtype=torch.bool).scatter(-1, nearest, True)


class PruMerge(Reducer):
    """The CLS token, the selected patches with their neighbours folded in, and the tail.

    k neighbours for each selected patch; `plus` adds patches on a grid; `normalise` divides weights by their sum; at
    least `floor` patches are selected; `tail` is whether the last token is made. With k = 0 and no tail it selects.
    """

    scope = "frame"
    looks = True
    line = "patches that the CLS token looks at, others like them folded in"

    def __init__(self, k: int = 8, plus: bool = False, normalise: bool = False, floor: int = 1, tail: bool = True):
        super().__init__()
        self.k, self.plus, self.normalise, self.floor, self.tail = k, plus, normalise, floor, tail

    def most(self, tokens: int) -> int:
        patches = tokens - 1
        above = -(-(patches - 1) // 4)  # so many at most can lie above the third quartile
        floor = min(self.floor, patches)
        numbers = range(floor, max(floor, above) + 1)
        kept = max(m + self.plus * -(-patches // grid_step(patches, m)) for m in numbers)
        return 1 + min(patches, kept + self.tail)  # where all are kept there is no tail

    def select(self, attention: Tensor) -> Tensor:
        """(F, P) bool, the patches that become tokens."""
        patches = attention.shape[1]
        number = outliers(attention).clamp(min=min(self.floor, patches))[:, None]
        rank = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        selected = rank < number
        if self.plus:
            selected |= torch.arange(patches, device=attention.device) % grid_step(patches, number) == 0
        return selected

    def forward(self, seen: Seen) -> VisionTokens:
        frames, number, _ = seen.tokens.shape
        attention, selected = seen.attention.float(), self.select(seen.attention)
        looked = rearrange(attention, "f p -> f 1 p")
        rest = (attention * ~selected)[:, None]
        if self.normalise:  # patches that nobody looks at at all still have a mean
            rest = rest.clamp(min=torch.finfo(rest.dtype).tiny) * ~selected[:, None]

        # A row for every token that there could be: the CLS, each patch, the tail. Those that there are move left.
        rows = attention.new_zeros(frames, number + 1, number)
        rows[:, 0, 0] = 1
        rows[:, 1:-1, 1:] = torch.eye(number - 1, device=rows.device)
        if self.k:
            rows[:, 1:-1, 1:] += looked * neighbours(seen.keys, self.k)
        rows[:, -1:, 1:] = rest
        if self.normalise:
            rows = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        cls, tail = torch.ones_like(selected[:, :1]), ~selected.all(1, keepdim=True) & self.tail
        kept = chosen(rows.to(seen.tokens.dtype), torch.cat((cls, selected, tail), dim=1))
        # A selected patch stands where it stood; the tail, which comes last, at the end of the frame.
        return merged(seen.tokens, kept.x, kept.valid, kept.place.clamp(max=number - 1))
