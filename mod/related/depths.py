"""Other mixtures of depths: MoD for language models, p-MoD and gamma-MoD, each around the dense block of `mod.block`.

Every block here takes MoDBlock's place in a decoder (`replace`) and has its signature. Side by side:

                router                        weight of a kept token         skipped    the best of         text
    VideoLLM-MoD  linear, one a layer         score * update                 unchanged  each frame          always runs
    SequenceMoD   linear, one a layer         score * update                 unchanged  the whole sequence  competes too
    PMoD          linear, zero at first       w * MLP update, w = 1 + a tanh *w         all vision tokens   always runs
    GammaMoD      one for all layers, 2-way   p * MLP update, p = softmax    unchanged  the whole sequence  always runs

In all four a skipped token leaves no key and no value in that layer. That p-MoD and gamma-MoD do so was checked in
their code, that MoD does in secondary sources only.

Choosing among a whole sequence looks at the future: what the first frame keeps depends on the last. Two ways out are
here, MoD's predictor and, ours, p-MoD's choice made within each frame. Of equal scores the earlier token wins [ours;
p-MoD's zero router makes all scores equal at first].

A stream's cache needs room for whole frames where a threshold and not a count decides: make it from a config without
routed layers. Memory is taken only as it fills.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mod.block import PAD, Block
from mod.config import kept_per_frame
from mod.decoder import Decoder, MoDBlock
from mod.router import ROUTER_STD, top_k_mask


class Depth(NamedTuple):
    """What one layer decided, as its block's `trace` collects it: kept (B, T) bool and scores (B, T)."""

    kept: Tensor
    scores: Tensor


class Short(NamedTuple):
    """The kept tokens of each row in their order, K of them, filled up where a row keeps fewer.

    row (B, 1) and index (B, K) say where they stood, real (B, K) which are no filling; h (B, K, D), pos (B, K) original
    positions with PAD for the filling, frame (B, K).
    """

    row: Tensor
    index: Tensor
    real: Tensor
    h: Tensor
    pos: Tensor
    frame: Tensor


def gather(x: Tensor, pos: Tensor, frame: Tensor, keep: Tensor) -> Short:
    """The tokens of x (B, T, D), at pos (B, T), of frames (B, T), that keep (B, T) says and that are no padding."""
    keep = keep & (pos < PAD)
    # A stable sort leaves the kept tokens in order of time, which attention relies on.
    index = keep.logical_not().int().argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
    row = torch.arange(len(x), device=x.device)[:, None]
    real = keep[row, index]
    return Short(row, index, real, x[row, index], pos[row, index].where(real, PAD), frame[row, index])


def scatter(x: Tensor, short: Short, new: Tensor) -> Tensor:
    """x (B, T, D) with new (B, K, D) in the place of the kept tokens; the rest bit for bit as it was."""
    y = x.clone()
    y[short.row, short.index] = torch.where(short.real[..., None], new, x[short.row, short.index])
    return y


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


def refuse_second_part(frame: Tensor, past) -> None:
    """A choice among all vision tokens of a sample cannot be made in parts: ValueError when more frames come."""
    if (frame >= 0).any() and ((past.frame >= 0) & (past.pos < PAD)).any():
        raise ValueError("the choice is among all vision tokens of a sample: feed its frames in one chunk")


class SequenceMoD(nn.Module):
    """Mixture-of-Depths for language models (2404.02258): the best C tokens of the whole sequence, text included.

        r_i = w . x_i      x_i <- x_i + r_i * f(X)_i  for the C largest r_i,      x_i <- x_i  for the others

    f is the block's update on the kept tokens alone, at their own positions.

    From the paper by secondary sources: the choice by r, C as a share of the sequence (12.5%, every second layer), the
    two ways to sample. That r itself is the weight: from memory and a secondary source. Ours: C = ceil(c * S) of a
    row's S real tokens; the predictor's size, one hidden layer; that `past`, not a switch, says that tokens come in
    time.

    The choice is not causal. With a `past`, therefore, a token goes through iff sigmoid(predictor(x)) > 0.5, whoever
    else comes; its weight stays r. The predictor learns the choice from x without sending a gradient into it:
    `auxiliary` is its loss after each pass without `past`, to be added to the model's. (The other remedy, the same loss
    on r itself, is not built: it changes what r learns.)

    Not copied: one unofficial implementation weighs the block's output, residual included, instead of its update.
    """

    def __init__(self, block: Block, dim: int, capacity: float = 0.125, hidden: int = 32):
        super().__init__()
        self.block, self.capacity = block, capacity
        self.router = nn.Linear(dim, 1, bias=False)
        nn.init.normal_(self.router.weight, std=ROUTER_STD)
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
        count = torch.tensor([kept_per_frame(self.capacity, n) for n in real.sum(1).tolist()], device=x.device)
        return best(scores, real, count)

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor, past=None, trace: list[Depth] | None = None) -> Tensor:
        """x (B, T, D), pos (B, T), frame (B, T) -> (B, T, D)."""
        scores, real, self.auxiliary = self.score(x), pos < PAD, None
        if past is None:
            keep, logits = self.choose(x, pos, scores), self.predict(x)
            self.auxiliary = F.binary_cross_entropy_with_logits(logits[real], keep[real].to(logits.dtype))
        else:
            keep = real & (torch.sigmoid(self.predict(x)) > 0.5)
        if trace is not None:
            trace.append(Depth(keep, scores.detach()))
        if not keep.any():
            return x
        short = gather(x, pos, frame, keep)
        weight = scores[short.row, short.index].to(x.dtype)
        update = self.block.update(short.h, short.pos, short.frame, past=past)
        return scatter(x, short, short.h + weight[..., None] * update)


def decayed_ratios(depth: int, high: float = 0.85, low: float = 0.15) -> list[float]:
    """p-MoD's share of vision tokens for each layer: a half cosine from 1 to 0, 1 where above `high`, at least `low`.

    A share of 1 means a dense layer. Checked in the authors' code; the mean over 32 layers is the 54% of keys and
    values that they report.
    """
    ratios = [math.cos(math.pi * layer / max(1, depth - 1)) / 2 + 0.5 for layer in range(depth)]
    return [1.0 if ratio > high else max(low, ratio) for ratio in ratios]


class PMoD(nn.Module):
    """p-MoD (2412.04449): a router that is harmless at first, and a weight on kept and skipped tokens alike.

        w = 1 + alpha * tanh(r),  r = Linear(h), weight and bias zero at first, so w = 1
        kept      u = h + attention(norm h);  h <- u + w * MLP(norm u)
        skipped   h <- w * h                  so the router hears from all vision tokens, not only from kept ones
        text      h <- h + f(h)

    Checked in the authors' code: all of the above, alpha = 0.2, trunc(ratio * vision tokens) of a sample kept,
    original positions, `decayed_ratios` over the layers. Unverified: that text carries no w.

    Ours: `per_frame=True` keeps the best ceil(ratio * N) of each frame's N instead. The paper's choice among all vision
    tokens of a sample lets a later frame change what an earlier one keeps, so its frames must come in one chunk; per
    frame the layer is causal and streams. Also ours: the trunc forgives float noise. `Block.recompute` has no effect.
    """

    def __init__(
        self, block: Block, dim: int, ratio: float, frame_tokens: int, *, alpha: float = 0.2, per_frame: bool = False
    ):
        super().__init__()
        self.block, self.ratio, self.frame_tokens = block, ratio, frame_tokens
        self.alpha, self.per_frame = alpha, per_frame
        self.router = nn.Linear(dim, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def choose(self, scores: Tensor, pos: Tensor, frame: Tensor) -> Tensor:
        """scores, pos, frame (B, T) -> (B, T) bool. Text always runs."""
        real = pos < PAD
        vision = real & (frame >= 0)
        if not self.per_frame:
            count = (vision.sum(1) * self.ratio + 1e-9).long()  # trunc, but 0.29 * 100 is 29
            return best(scores, vision, count) | (real & ~vision)
        if int(vision.sum()) % self.frame_tokens:
            raise ValueError(
                f"got {int(vision.sum())} vision tokens, expected whole frames of {self.frame_tokens}; "
                "never split a frame"
            )
        frames = rearrange(scores[vision].detach(), "(f n) -> f n", n=self.frame_tokens)
        keep = real.clone()
        keep[vision] = rearrange(top_k_mask(frames, kept_per_frame(self.ratio, self.frame_tokens)), "f n -> (f n)")
        return keep

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor, past=None, trace: list[Depth] | None = None) -> Tensor:
        """x (B, T, D), pos (B, T), frame (B, T) -> (B, T, D). Raises ValueError when a second chunk of frames comes,
        unless the choice is made per frame."""
        if past is not None and not self.per_frame:
            refuse_second_part(frame, past)
        scores = rearrange(linear(self.router, x), "b t 1 -> b t")
        keep = self.choose(scores, pos, frame)
        if trace is not None:
            trace.append(Depth(keep, scores.detach()))
        vision = (frame >= 0) & (pos < PAD)
        weight = torch.where(vision, 1 + self.alpha * torch.tanh(scores), 1.0).to(x.dtype)[..., None]
        weighed = x * weight  # what becomes of skipped tokens; text times one is text
        if not keep.any():
            return weighed
        short = gather(x, pos, frame, keep)
        u = short.h + self.block.attention(self.block.norm1(short.h), short.pos, short.frame, past=past)
        return scatter(weighed, short, u + weight[short.row, short.index] * self.block.mlp(self.block.norm2(u)))


class GammaMoD(nn.Module):
    """gamma-MoD (2410.13859): one router for all routed layers; the layers are those whose attention has a low rank.

        p = softmax(router(norm1 h))[1]
        kept      u = h + attention(norm1 h);  h <- u + p * MLP(norm2 u)
        skipped   h <- h

    Kept are the ceil(S - skip * V) best of a row's S tokens, V of them vision, by p; text is forced in. Give the same
    `router` (`gamma_router`) to every layer. `auxiliary` is 0.01 * cross entropy of the router's logits and the choice,
    after each pass without `past`.

    Checked in the authors' code: the formulas, the count with skip = 0.5, the auxiliary loss, and at inference no
    count: tokens with p > `threshold` = 0.005 are kept, as here with a `past`. Unverified: which norm comes before the
    router (here the block's first), the router's bias, that text is forced in at inference, too (here it is).

    DEVIATION: kept tokens keep their original positions; the authors number them anew from 0. Rotated keys of one layer
    then keep the same distances in all, and a cache has one position for a token. All text is forced in, also what
    stands before the frames; by exclusion from the competition, where the authors add 1 to its score.

    Not copied: a length of the image fixed at 2880 and one count for all rows of a batch (here each row has its own,
    and is what it is alone); a decoding step that drops a whole layer when p < 0.5, which one of two variants has.
    `Block.recompute` has no effect.
    """

    def __init__(self, block: Block, router: nn.Linear, skip: float = 0.5, threshold: float = 0.005):
        super().__init__()
        self.block, self.router, self.skip, self.threshold = block, router, skip, threshold
        self.auxiliary: Tensor | None = None

    def choose(self, p: Tensor, pos: Tensor, frame: Tensor) -> Tensor:
        """p, pos, frame (B, T) -> (B, T) bool."""
        real = pos < PAD
        vision = real & (frame >= 0)
        count = torch.ceil(vision.sum(1) * (1.0 - self.skip) - 1e-6).long()  # text comes on top of it
        return best(p, vision, count) | (real & ~vision)

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor, past=None, trace: list[Depth] | None = None) -> Tensor:
        """x (B, T, D), pos (B, T), frame (B, T) -> (B, T, D)."""
        real = pos < PAD
        normed = self.block.norm1(x)
        logits = linear(self.router, normed)
        p, self.auxiliary = logits.softmax(-1)[..., 1], None
        if past is None:
            keep = self.choose(p, pos, frame)
            self.auxiliary = 0.01 * F.cross_entropy(logits[real], keep[real].long())
        else:
            keep = real & ((p > self.threshold) | (frame < 0))
        if trace is not None:
            trace.append(Depth(keep, p.detach()))
        if not keep.any():
            return x
        short = gather(x, pos, frame, keep)
        u = short.h + self.block.attention(normed[short.row, short.index], short.pos, short.frame, past=past)
        weight = p[short.row, short.index].to(x.dtype)[..., None]
        return scatter(x, short, u + weight * self.block.mlp(self.block.norm2(u)))


def gamma_router(dim: int) -> nn.Linear:
    """The router that gamma-MoD's layers share: a logit for skipping and one for being kept."""
    router = nn.Linear(dim, 2)
    nn.init.normal_(router.weight, std=ROUTER_STD)
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
