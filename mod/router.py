"""LayerExpert: which vision tokens of a frame go through a layer, and with what weight (paper, section 3.2).

    score = w . x                        for each vision token x of the frame
    kept  = the ceil(r * n) best of that frame's n tokens
    mu    = score                        gate "update": the paper's, mu scales the kept token's own update
    mu    = 2 * sigmoid(score)           gate "value": mu also scales the token's value in this layer's attention

Two decisions to notice. The choice is made inside each frame, never across frames: a later frame cannot change an
earlier choice, so streaming and training choose alike. And the gate decides what the router can *learn*: see below.

Why a second gate. A layer is useful to the text because text tokens *read* the kept vision tokens, as keys and values.
The paper's mu scales only what the kept token writes to itself; how loudly it is read in this layer does not depend on
mu, so the loss cannot tell the router that a token was worth reading. (In the last layer nothing reads a vision
token's output at all: there the gradient is exactly zero, unless that token itself predicts.) With the value gate,
being read carries gradient. 2 * sigmoid is one at score zero: a router with small weights hardly disturbs a decoder.

Read next: window.py
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from mod.config import kept_per_frame

ROUTER_STD = 0.02  # of a new router's weights


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """True at the k largest scores of each row, (F, N) -> (F, N) bool. Of equal scores the earlier token wins."""
    # torch.topk breaks ties arbitrarily; a stable sort does not.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


class Router(nn.Module):
    """Chooses kept_per_frame(keep_ratio, N) tokens of every frame. Subclasses say how tokens are scored.

    To try a router of your own, subclass this, implement `score`, and add it to `ROUTERS`. One with weights also needs
    `weight`, or inherits it from LayerExpert: the choice has no gradient, mu has.
    """

    def __init__(self, dim: int, frame_tokens: int, keep_ratio: float, layer: int, gate: str = "value"):
        super().__init__()
        self.frame_tokens, self.layer, self.gate = frame_tokens, layer, gate
        self.kept = kept_per_frame(keep_ratio, frame_tokens)

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """tokens (F, N, D), pos (F, N) -> scores (F, N); may depend on its own frame only."""
        raise NotImplementedError

    def weight(self, scores: Tensor) -> Tensor:
        """mu of each token, (F, N) -> (F, N). One, unless the scores are learned."""
        return torch.ones_like(scores)

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), pos (B, T), frame (B, T) with -1 for text -> keep (B, T) bool, mu (B, T), scores (F, N).

        Text is always kept, with weight one. Raises ValueError when a frame is not whole.
        """
        vision = frame >= 0
        # A frame's N tokens stand together, so reading the vision tokens row by row yields the frames of all streams,
        # however long each stream is and however many frames it has.
        tokens = x[vision]
        if tokens.shape[0] % self.frame_tokens:
            message = f"got {tokens.shape[0]} vision tokens, expected whole frames of {self.frame_tokens}"
            raise ValueError(f"{message}; never split a frame")
        tokens = rearrange(tokens, "(f n) d -> f n d", n=self.frame_tokens)
        scores = self.score(tokens, rearrange(pos[vision], "(f n) -> f n", n=self.frame_tokens))
        keep, mu = torch.ones_like(vision), torch.ones_like(x[..., 0])
        keep[vision] = rearrange(top_k_mask(scores.detach(), self.kept), "f n -> (f n)")
        mu[vision] = rearrange(self.weight(scores), "f n -> (f n)").to(mu.dtype)
        return keep, mu, scores.detach()


class LayerExpert(Router):
    """The paper's router: one linear score a token, one w a layer."""

    def __init__(self, dim: int, frame_tokens: int, keep_ratio: float, layer: int, gate: str = "value"):
        super().__init__(dim, frame_tokens, keep_ratio, layer, gate)
        self.w = nn.Linear(dim, 1, bias=False)

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        # Scores stay in the weights' precision under autocast: bfloat16 would make many of them equal.
        with torch.autocast(tokens.device.type, enabled=False):
            return rearrange(self.w(tokens.to(self.w.weight.dtype)), "f n 1 -> f n")

    def weight(self, scores: Tensor) -> Tensor:
        if self.gate == "update":
            return scores
        # DEVIATION: the paper's weight is the score itself (gate "update").
        return 2 * torch.sigmoid(scores)


class RandomRouter(Router):
    """Tokens drawn by lot (paper, Table 3).

    DEVIATION: the lot is a hash of layer and position, no dice, so that streaming draws what training drew.
    """

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        # An integer hash (multiply, fold the high bits down, twice): looks random, costs nothing, needs no state.
        mixed = (pos.long() * 0x9E3779B1 + (self.layer + 1) * 0x85EBCA77) & 0xFFFFFFFF
        for _ in range(2):
            mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
        return ((mixed ^ (mixed >> 13)) >> 8).to(torch.float32)  # 24 bits, which float32 holds exactly


class UniformRouter(Router):
    """Every (n/k)-th token of the frame (paper, Table 3)."""

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        n, index = self.frame_tokens, torch.arange(self.frame_tokens, device=tokens.device)
        # floor((i+1)k/n) > floor(ik/n) is true for exactly k of n, evenly spread.
        spread = ((index + 1) * self.kept).div(n, rounding_mode="floor") > (index * self.kept).div(
            n, rounding_mode="floor"
        )
        return spread.to(tokens.dtype).expand(tokens.shape[0], n)


ROUTERS = {"learned": LayerExpert, "random": RandomRouter, "uniform": UniformRouter}
