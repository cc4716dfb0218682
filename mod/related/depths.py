"""Other mixtures of depths: MoD for language models, p-MoD and gamma-MoD, each around the core's dense block.

Every block here is a MoDBlock with another rule, and takes its place in a decoder (`replace`). Side by side:

                router                        weight of a kept token         skipped    the best of         text
    VideoLLM-MoD  linear, one per layer       score * update                 unchanged  each frame          always runs
    SequenceMoD   linear, one per layer       score * update                 unchanged  the whole sequence  competes too
    PMoD          linear, zero at first       w * MLP update, w = 1 + a tanh *w         all vision tokens   always runs
    GammaMoD      one for all layers, 2-way   p * MLP update, p = softmax    unchanged  the whole sequence  always runs

In all four a skipped token leaves no key and no value in that layer. That p-MoD and gamma-MoD do so was checked in
their code, that MoD does in secondary sources only.

Choosing among a whole sequence looks at the future: what the first frame keeps depends on the last. Two ways out are
here: MoD's predictor and, ours, p-MoD's choice made within each frame. A block that can also choose by each token alone
does so whenever it is not training, so that streaming and evaluation choose alike. Of equal scores the earlier token
wins [ours; p-MoD's zero router makes all scores equal at first].

How many tokens such a layer keeps only the data knows, so a stream needs a `CountingCache`.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mod.config import keep_count
from mod.decoder import Decoder, MoDBlock
from mod.layers import PAD, Block
from mod.layout import Plan
from mod.related.ragged import is_vision, shorten
from mod.router import top_k


class Depth(NamedTuple):
    """What one layer decided, as its block's `trace` collects it: kept (B, T) bool and scores (B, T)."""

    kept: Tensor
    scores: Tensor


def best(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """True at the count (B,) largest of each row's scores (B, T) at which `among` (B, T) is True."""
    order = scores.detach().masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # of each token, in that order
    return (rank < count[:, None]) & among


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in the precision of its weights, also under autocast: bfloat16 would make many scores equal."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype))


def replace(decoder: Decoder, layers: Iterable[int], make: Callable[[Block, int], nn.Module]) -> None:
    """Put make(dense block, layer) in the place of the decoder's `layers`; routed layers give up their dense block."""
    for number in layers:
        layer = decoder.layers[number]
        decoder.layers[number] = make(layer.block if isinstance(layer, MoDBlock) else layer, number)


class SequenceMoD(MoDBlock):
    """Mixture-of-Depths for language models (2404.02258): the best C tokens of the whole sequence, text included.

        r_i = w . x_i      x_i <- x_i + r_i * f(X)_i  for the C largest r_i,      x_i <- x_i  for the others

    f is the block's update on the kept tokens alone, at their own positions.

    From the paper by secondary sources: the choice by r, C as a share of the sequence (12.5%, every second layer), the
    two ways to sample. That r itself is the weight: from memory and a secondary source. Ours: C = ceil(c * S) of a
    row's S real tokens; the predictor's size, one hidden layer.

    The choice is not causal. Outside training, and with a `past`, a token therefore goes through iff
    sigmoid(predictor(x)) > 0.5, whoever else comes; its weight stays r. The predictor learns the choice from x without
    sending a gradient into it: `auxiliary` is its loss after each pass in training, to be added to the model's. (The
    other remedy, the same loss on r itself, is not built: it changes what r learns.)

    Not copied: one unofficial implementation weighs the block's output, residual included, instead of its update.
    """

    def __init__(self, block: Block, dim: int, capacity: float = 0.125, hidden: int = 32):
        super().__init__(block, nn.Linear(dim, 1, bias=False))
        self.capacity = capacity
        nn.init.normal_(self.router.weight, std=0.02)
        self.predictor = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.auxiliary: Tensor | None = None

    def score(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T)."""
        return rearrange(linear(self.router, x), "b t 1 -> b t")

    def predict(self, x: Tensor) -> Tensor:
        """Logit of being chosen, of each token by itself, (B, T, D) -> (B, T)."""
        return rearrange(linear(self.predictor, x.detach()), "b t 1 -> b t")

    def choose(self, x: Tensor, pos: Tensor, scores: Tensor) -> Tensor:
        """The ceil(capacity * S) best of each row's S real tokens, (B, T) bool."""
        real = pos < PAD
        count = torch.tensor([keep_count(self.capacity, n) for n in real.sum(1).tolist()], device=x.device)
        return best(scores, real, count)

    def forward(self, x: Tensor, turn: Tensor, plan: Plan, past=None, trace: list[Depth] | None = None) -> Tensor:
        """x (B, T, D), turn (B, T, 2, E) -> (B, T, D)."""
        pos, scores, self.auxiliary = plan.pos, self.score(x), None
        real = pos < PAD
        if past is None and self.training:
            keep, logits = self.choose(x, pos, scores), self.predict(x)
            self.auxiliary = F.binary_cross_entropy_with_logits(logits[real], keep[real].to(logits.dtype))
        else:
            keep = real & (torch.sigmoid(self.predict(x)) > 0.5)
        if trace is not None:
            trace.append(Depth(keep, scores.detach()))
        if not keep.any():
            return x
        short = shorten(keep, pos)
        h, weight = short.take(x), short.take(scores).to(x.dtype)
        update = self.block.update(h, short.take(turn), short.pos, past=past)
        return short.put(x, h + weight[..., None] * update)


def decayed_ratios(depth: int, high: float = 0.85, low: float = 0.15) -> list[float]:
    """p-MoD's share of vision tokens for each layer: a half cosine from 1 to 0, 1 where above `high`, at least `low`.

    A share of 1 means a dense layer. Checked in the authors' code; the mean over 32 layers is the 54% of keys and
    values that they report.
    """
    ratios = [math.cos(math.pi * layer / max(1, depth - 1)) / 2 + 0.5 for layer in range(depth)]
    return [1.0 if ratio > high else max(low, ratio) for ratio in ratios]


class PMoD(MoDBlock):
    """p-MoD (2412.04449): a router that is harmless at first, and a weight on kept and skipped tokens alike.

        w = 1 + alpha * tanh(r),  r = Linear(h), weight and bias zero at first, so w = 1
        kept      u = h + attention(norm h);  h <- u + w * MLP(norm u)
        skipped   h <- w * h                  so the router hears from all vision tokens, not only from kept ones
        text      h <- h + f(h)

    Checked in the authors' code: all of the above, alpha = 0.2, trunc(ratio * vision tokens) of a sample kept,
    original positions, `decayed_ratios` over the layers. Unverified: that text carries no w.

    Ours: `per_frame=True` keeps the best ceil(ratio * N) of each frame's N instead. The paper's choice among all vision
    tokens of a sample lets a later frame change what an earlier one keeps, so its frames must come in the first chunk;
    per frame the layer is causal and streams. Also ours: the trunc forgives float noise.
    """

    def __init__(self, block: Block, dim: int, ratio: float, *, alpha: float = 0.2, per_frame: bool = False):
        super().__init__(block, nn.Linear(dim, 1))
        self.ratio, self.alpha, self.per_frame = ratio, alpha, per_frame
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def choose(self, scores: Tensor, plan: Plan) -> Tensor:
        """scores (B, T) -> (B, T) bool. Text always runs."""
        real, vision = plan.pos < PAD, is_vision(plan)
        if not self.per_frame:
            count = (vision.sum(1) * self.ratio + 1e-9).long()  # trunc, but 0.29 * 100 is 29
            return best(scores, vision, count) | (real & ~vision)
        tokens = plan.vision.shape[1]
        chosen = top_k(scores.detach().flatten()[plan.vision], keep_count(self.ratio, tokens))
        keep = real & ~vision
        return keep.flatten().index_fill(0, plan.vision.gather(1, chosen).flatten(), True).view_as(keep)

    def forward(self, x: Tensor, turn: Tensor, plan: Plan, past=None, trace: list[Depth] | None = None) -> Tensor:
        """x (B, T, D), turn (B, T, 2, E) -> (B, T, D). Raises ValueError when frames come after the first chunk, unless
        the choice is made per frame."""
        if past is not None and not self.per_frame and len(plan.vision) and past.longest:
            raise ValueError("the choice is among all vision tokens of a sample: feed its frames in the first chunk")
        scores = rearrange(linear(self.router, x), "b t 1 -> b t")
        keep = self.choose(scores, plan)
        if trace is not None:
            trace.append(Depth(keep, scores.detach()))
        weight = torch.where(is_vision(plan), 1 + self.alpha * torch.tanh(scores), 1.0).to(x.dtype)[..., None]
        weighed = x * weight  # what becomes of skipped tokens; text times one is text
        if not keep.any():
            return weighed
        short = shorten(keep, plan.pos)
        h = short.take(x)
        u = h + self.block.attention(self.block.norm1(h), short.take(turn), short.pos, past=past)
        return short.put(weighed, u + short.take(weight) * self.block.mlp(self.block.norm2(u)))


class GammaMoD(MoDBlock):
    """gamma-MoD (2410.13859): one router for all routed layers; the layers are those whose attention has a low rank.

        p = softmax(router(norm1 h))[1]
        kept      u = h + attention(norm1 h);  h <- u + p * MLP(norm2 u)
        skipped   h <- h

    Kept are the ceil(S - skip * V) best of a row's S tokens, V of them vision, by p; text is forced in. Give the same
    `router` (`gamma_router`) to every layer. `auxiliary` is 0.01 * cross entropy of the router's logits and the choice,
    after each pass in training.

    Checked in the authors' code: the formulas, the count with skip = 0.5, the auxiliary loss, and at inference no
    count: tokens with p > `threshold` = 0.005 are kept, as here outside training and with a `past`. Unverified: which
    norm comes before the router (here the block's first), the router's bias, that text is forced in at inference, too
    (here it is).

    DEVIATION: kept tokens keep their original positions; the authors number them anew from 0. Rotated keys of one layer
    then keep the same distances in all, and a cache has one position for a token. All text is forced in, also what
    stands before the frames; by exclusion from the competition, where the authors add 1 to its score.

    Not copied: a length of the image fixed at 2880 and one count for all rows of a batch (here each row has its own,
    and is what it is alone); a decoding step that drops a whole layer when p < 0.5, which one of two variants has.
    `Block.recompute` has no effect.
    """

    def __init__(self, block: Block, router: nn.Linear, skip: float = 0.5, threshold: float = 0.005):
        super().__init__(block, router)
        self.skip, self.threshold = skip, threshold
        self.auxiliary: Tensor | None = None

    def choose(self, p: Tensor, plan: Plan) -> Tensor:
        """p (B, T) -> (B, T) bool."""
        real, vision = plan.pos < PAD, is_vision(plan)
        count = torch.ceil(vision.sum(1) * (1.0 - self.skip) - 1e-6).long()  # text comes on top of it
        return best(p, vision, count) | (real & ~vision)

    def forward(self, x: Tensor, turn: Tensor, plan: Plan, past=None, trace: list[Depth] | None = None) -> Tensor:
        """x (B, T, D), turn (B, T, 2, E) -> (B, T, D)."""
        real, normed = plan.pos < PAD, self.block.norm1(x)
        logits = linear(self.router, normed)
        p, self.auxiliary = logits.softmax(-1)[..., 1], None
        if past is None and self.training:
            keep = self.choose(p, plan)
            self.auxiliary = 0.01 * F.cross_entropy(logits[real], keep[real].long())
        else:
            keep = real & ((p > self.threshold) | ~is_vision(plan))
        if trace is not None:
            trace.append(Depth(keep, p.detach()))
        if not keep.any():
            return x
        short = shorten(keep, plan.pos)
        u = short.take(x) + self.block.attention(short.take(normed), short.take(turn), short.pos, past=past)
        weight = short.take(p).to(x.dtype)[..., None]
        return short.put(x, u + weight * self.block.mlp(self.block.norm2(u)))


def gamma_router(dim: int) -> nn.Linear:
    """The router that gamma-MoD's layers share: a logit for skipping and one for being kept."""
    router = nn.Linear(dim, 2)
    nn.init.normal_(router.weight, std=0.02)
    nn.init.zeros_(router.bias)
    return router


def _strictly_before(weights: Tensor) -> Tensor:
    """Attention weights (..., T, T) to earlier tokens alone, in float64."""
    return weights.double().tril(diagonal=-1)


def attention_rank(weights: Tensor, rtol: float = 1e-6) -> float:
    """gamma-MoD's ARank of a layer, attention weights (B, H, T, T): rank without the diagonal, mean over B and H.

    Checked in the authors' code: causal, the diagonal set to zero, mean over heads. The mean over samples is from
    memory. Ours: float64 and the tolerance, a share of the largest singular value. At most T - 1; all attention on the
    first token has rank 1, even attention the full T - 1: low does not mean even. `fastv.attention_weights` makes them.
    """
    return torch.linalg.matrix_rank(_strictly_before(weights), rtol=rtol).double().mean().item()


def effective_rank(weights: Tensor) -> float:
    """exp(entropy) of the singular values' shares, of the same matrices [ours]: short rows saturate the plain rank."""
    values = torch.linalg.svdvals(_strictly_before(weights))
    share = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    rank = torch.special.entr(share).sum(-1).exp()
    return rank.where(values.sum(-1) > 0, 0).mean().item()


def place_routed(ranks: list[float], number: int) -> list[int]:
    """The `number` layers of lowest rank, in order; of equal ones the earlier.

    The authors' released setting is simpler, all layers but the first three and the last.
    """
    return sorted(sorted(range(len(ranks)), key=lambda layer: ranks[layer])[:number])
