"""LayerExpert: which vision tokens of a frame go through a layer, and with what weight (paper, section 3.2).

    score = w . x                        for each vision token x of the frame
    kept  = the k = ceil(r * n) best of that frame's n tokens
    mu    = score or 2 * sigmoid(score)  it scales the kept token's own update, or how loudly others read it

The decision to notice: the choice is made inside each frame, never across frames. A later frame cannot change an
earlier choice, so streaming and training choose alike.

The choice itself has no gradient: a router learns from mu alone, so the gate decides what it can learn. A gate is named
after what mu is, and after what mu scales:

    score-    mu is the score, as in the paper
    sigmoid-  mu is 2 * sigmoid(score): positive, and 1 at score zero, where the gate itself changes nothing
    -update   mu scales the kept token's own update, as in the paper
    -value    mu also scales the token's value in this layer's attention
    -read     mu scales that value alone

What "-value" and "-read" add: text tokens *read* the kept vision tokens, as keys and values. Where mu scales the update
alone, how loudly a token is read in this layer does not depend on mu, so the loss cannot tell the router that it was
worth reading here. In the last layer nothing reads what a vision token writes to itself: there the gradient is exactly
zero, unless that token itself predicts. With "-value" and "-read" being read carries gradient. With "-read" it alone
does: what the layer does to the kept token itself teaches the router nothing, but for that token's reading of itself.

Read next: decoder.py
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mod.config import ModelConfig, keep_count, require


def top_k(scores: Tensor, k: int, kept_before: Tensor | None = None) -> Tensor:
    """The k largest of each row's scores (F, N), as rising indices (F, k). Of equal scores the earlier token wins.
    With `kept_before` (F, N) tokens that earlier layers kept least often come first, whatever their scores."""
    # torch.topk breaks ties arbitrarily; a stable sort does not.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    if kept_before is not None:
        order = order.gather(1, kept_before.gather(1, order).sort(dim=-1, stable=True).indices)
    return order[:, :k].sort(dim=-1).values


class Router(nn.Module):
    """Chooses `kept` = ceil(keep_ratio * N) tokens of every frame. Subclasses say how tokens are scored.

    To try a router of your own, subclass this, implement `score`, and add it to `ROUTERS`. A router with parameters
    also needs `weight`, or inherits it from LayerExpert: mu has a gradient, the choice itself has none.
    """

    def __init__(self, dim: int, frame_tokens: int, keep_ratio: float, layer: int, gate: str = "sigmoid-value"):
        super().__init__()
        self.frame_tokens, self.layer, self.gate = frame_tokens, layer, gate
        self.kept, self.keep_last, self.take_turns = keep_count(keep_ratio, frame_tokens), False, 0

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """tokens (F, N, D), pos (F, N) -> scores (F, N); may depend on its own frame only. `pos` is for choices by
        position, see mod/related/chance.py."""
        raise NotImplementedError

    def weight(self, scores: Tensor) -> Tensor:
        """mu of each token, (F, N) -> (F, N). One, unless the scores are learned."""
        return torch.ones_like(scores)

    def kept_before(self, earlier: Sequence[Tensor]) -> Tensor | None:
        """How many of the last `take_turns` routed layers kept each token, (F, N); `earlier`: what all routed layers
        before this one kept, (F, N) bool each, in order. None if there is nothing to look back at."""
        last = earlier[-self.take_turns :] if self.take_turns else []
        return sum(kept.int() for kept in last) if last else None

    def forward(
        self, tokens: Tensor, pos: Tensor, kept_before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (F, N, D), pos (F, N) -> the k chosen tokens of each frame as rising indices (F, k), their mu (F, k),
        and all scores (F, N). `kept_before` (F, N): see `top_k`."""
        ranked = scores = self.score(tokens, pos)
        if self.keep_last:
            ranked = F.pad(scores[:, :-1], (0, 1), value=torch.inf)
            if kept_before is not None:  # zero times, or infinity would not put it first
                kept_before = F.pad(kept_before[:, :-1], (0, 1))
        chosen = top_k(ranked, self.kept, kept_before)
        return chosen, self.weight(scores).gather(1, chosen), scores.detach()


class LayerExpert(Router):
    """The paper's router: one linear score per token, one w per layer."""

    def __init__(self, dim: int, frame_tokens: int, keep_ratio: float, layer: int, gate: str = "sigmoid-value"):
        super().__init__(dim, frame_tokens, keep_ratio, layer, gate)
        self.w = nn.Linear(dim, 1, bias=False)

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        # Scores stay in the weights' precision under autocast: bfloat16 would make many of them equal.
        if torch.is_autocast_enabled(tokens.device.type):
            with torch.autocast(tokens.device.type, enabled=False):
                return self.score(tokens, pos)
        w = self.w.weight
        return F.linear(tokens.to(w.dtype), w).squeeze(-1)

    def weight(self, scores: Tensor) -> Tensor:
        # DEVIATION: the paper's weight is the score itself.
        return 2 * torch.sigmoid(scores) if self.gate.startswith("sigmoid") else scores


ROUTERS: dict[str, type[Router]] = {"learned": LayerExpert}  # mod/related/chance.py adds others, or you do


def new_router(config: ModelConfig, layer: int) -> Router:
    """The router that the configuration asks for in this layer, with weights as its class draws them."""
    if config.select not in ROUTERS:
        import mod.related.chance  # noqa: F401 (adds its routers)
    require(config.select in ROUTERS,
            f"select got {config.select!r}, expected {' or '.join(ROUTERS)}; add others to ROUTERS")
    router = ROUTERS[config.select](config.dim, config.frame_tokens, config.keep_ratios[layer], layer, config.gate)
    router.keep_last, router.take_turns = config.keep_last, config.take_turns
    return router
