"""Learned queries: however many patches a frame has, a fixed number of queries reads them and is handed on instead.

Q-Former (BLIP-2, 2301.12597) and the Perceiver Resampler (Flamingo, 2204.14198) differ in how the queries read:

    qformer    queries look at each other, then, in every second block from the first on, at the patches: two attentions
    perceiver  one attention in which the keys are the patches and the queries themselves, in every block

Checked in code: of Q-Former in LAVIS, the authors' own: norms after each sum, a norm on the queries before the first
block, queries drawn with deviation 0.02, cross-attention in blocks 0, 2, 4, ..., a linear map at the end; 32 queries of
width 768 there. Of the Resampler in OpenFlamingo (which took it from lucidrains), not in Flamingo's own code: norms
before, queries drawn with deviation 1, hidden width 4 times the width, a norm at the end; 64 queries, 6 blocks of 8
heads of 64 there. In a secondary source only: BLIP-2's two stages of training, which are not built, and its results.

Ours: queries read one frame (the Resampler adds an embedding per frame and reads all of a clip) and its patches, not
the CLS token, which is itself such a summary; width and heads as the caller says, head width = width / heads; no biases
in the attention, of which the one on keys would change nothing, where BERT, from which Q-Former starts, has them; GELU
in its tanh form; no dropout; the text that Q-Former's queries may look at is left out. Not verified: anything in the
text of the two papers.

Learned queries need much data: with one token per image Q-Former retains 57.2% of what all tokens reach, the mean of
the patches 64.1% (table 1 of VoCo-LLaMA, 2406.12275). A small run should not be expected to show them at their best.
"""

import torch
from einops import repeat
from torch import Tensor, nn

from mod.layers import Attention, Block
from mod.related.base import Reducer, Seen, VisionTokens
from mod.vit import MLP

MODES = ("qformer", "perceiver")


class QFormerBlock(nn.Module):
    """BERT's order, a norm after each sum: z = LN(z + self(z)), z = LN(z + cross(z, patches)), z = LN(z + MLP(z)).

    It is not mod.layers.Block, whose norms come first.
    """

    def __init__(self, width: int, heads: int, cross: bool):
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.cross = Attention(width, heads) if cross else None
        self.norm_cross = nn.LayerNorm(width) if cross else None
        self.mlp, self.norm2 = MLP(width, 4 * width), nn.LayerNorm(width)

    def forward(self, z: Tensor, patches: Tensor) -> Tensor:
        """Queries (F, q, D), patches (F, P, D) -> (F, q, D)."""
        z = self.norm1(z + self.attention(z))
        if self.cross is not None:
            z = self.norm_cross(z + self.cross(z, context=patches))
        return self.norm2(z + self.mlp(z))


class PerceiverBlock(nn.Module):
    """z += Attention(LN(z) -> [LN(patches); LN(z)]), z += MLP(LN(z)): the usual block with other keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_patches = nn.LayerNorm(width)
        norms = (nn.LayerNorm(width) for _ in range(2))
        self.block = Block(Attention(width, heads), MLP(width, 4 * width), *norms)

    def forward(self, z: Tensor, patches: Tensor) -> Tensor:
        """Queries (F, q, D), patches (F, P, D) -> (F, q, D)."""
        # The block norms what asks by norm1; the same queries among the keys get the same norm.
        keys = torch.cat((self.norm_patches(patches), self.block.norm1(z)), dim=1)
        return self.block(z, context=keys)


class QueryResampler(Reducer):
    """`queries` tokens per frame, whatever N is; each is a nonlinear mix of the patches, so there is no `merge`.

    Without positions of their own (the vision encoder has put some into the patches) the queries do not notice the
    order of the patches. None of them stands anywhere in the frame: their places are spread evenly over it [ours].
    """

    scope = "frame"

    def __init__(self, queries: int, width: int, depth: int = 2, heads: int = 4, mode: str = "qformer"):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if queries < 1 or depth < 1 or width % heads:
            raise ValueError(f"need a query, a block and heads that divide the width: {queries=}, {depth=}, {width=}")
        former = mode == "qformer"
        self.line = "learned queries read each other, then the patches"
        if not former:
            self.line = "learned queries read the patches and each other at once"
        self.queries = nn.Parameter(torch.randn(queries, width) * (0.02 if former else 1.0))
        # The norm on Q-Former's queries is what lets ones so quiet be heard in the first sum.
        self.first = nn.LayerNorm(width) if former else nn.Identity()
        self.blocks = nn.ModuleList(
            QFormerBlock(width, heads, cross=index % 2 == 0) if former else PerceiverBlock(width, heads)
            for index in range(depth)
        )
        self.last = nn.Linear(width, width) if former else nn.LayerNorm(width)

    def most(self, tokens: int) -> int:
        return len(self.queries)

    def forward(self, seen: Seen) -> VisionTokens:
        frames, number, _ = seen.tokens.shape
        z = self.first(repeat(self.queries, "q d -> f q d", f=frames))
        for block in self.blocks:
            z = block(z, seen.patches)
        x = self.last(z)
        # Query i of q at token floor(i N / q): rising, with repeats only where there are more queries than tokens.
        place = torch.arange(len(self.queries), device=x.device) * number // len(self.queries)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return VisionTokens(x, valid, place.expand(frames, -1))
