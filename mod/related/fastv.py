"""FastV (2403.06764): after K layers, the vision tokens that the last token looked at least are dropped for good.

Layers 0 to K - 1 run on everything. The attention of layer K - 1, mean over its heads, from the last real token of a
row to the vision tokens, is their score. The ceil((1 - R) * V) best of the V go through the layers that follow, at
their original positions; the others are gone: the sets are nested, where in VideoLLM-MoD a token that skips one layer
may be back in the next. Nothing is trained.

Checked in the authors' code: the row of the last token, the mean over heads, in-place dropping with original
positions, a second form that only hides the dropped tokens' columns (`masked=True`: the same for those that stay, and
no faster), defaults K = 2 and R = 0.5. By a secondary source the paper describes the score as the attention that a
token receives on average: `score="received"`. Over which queries is unverified; here the real tokens that can see it.
Ours: several frames and ragged rows; rounding up; that a dropped token's output is the state in which it left.

With R = 1 this is the EarlyExit baseline, by a definition from memory: vision tokens go through the first K layers.

In a stream FastV must know the question before it drops: asked again, it cannot bring a token back, so frames and
question come in one chunk, and text alone after it.
"""

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from mod.config import keep_count
from mod.decoder import Decoder
from mod.layers import PAD, Attention, rotate
from mod.layout import Plan
from mod.related.depths import Depth, best
from mod.related.ragged import is_vision, run_layers, shorten


def attention_weights(attention: Attention, x: Tensor, turn: Tensor, query: Tensor) -> Tensor:
    """How much the tokens number query (B, Q) look at each token: x (B, T, D), normed, and turn (B, T, 2, E) ->
    (B, H, Q, T).

    What `Attention.forward` computes without a past, but does not hand out.
    """
    q = attention.q_norm(rearrange(attention.q(x), "b t (h e) -> b h t e", e=attention.head_dim))
    k = attention.k_norm(rearrange(attention.k(x), "b s (g e) -> b g s e", e=attention.head_dim))
    q, k = rotate(q, turn), rotate(k, turn)
    k = repeat(k, "b g s e -> b (g r) s e", r=q.shape[1] // k.shape[1])
    row = torch.arange(len(x), device=x.device)[:, None]
    q = rearrange(q[row, :, query], "b q h e -> b h q e")
    logits = einsum(q, k, "b h q e, b h s e -> b h q s") / attention.head_dim**0.5
    # Rows run forwards in time with padding on the right, so the number of a token says who is earlier.
    later = torch.arange(x.shape[1], device=x.device) > rearrange(query, "b q -> b 1 q 1")
    return logits.masked_fill(later, -torch.inf).softmax(-1)


class FastV(nn.Module):
    """A decoder whose vision tokens are thinned out once, before layer `after` (K); same signature as `Decoder`.

    after (K) from 1 to the decoder's depth, drop (R) from 0 to 1, score "last" or "received". All layers are dense.
    """

    def __init__(self, decoder: Decoder, after: int = 2, drop: float = 0.5, score: str = "last", masked: bool = False):
        super().__init__()
        if not (1 <= after <= len(decoder.layers) and 0 <= drop <= 1):
            message = f"after must be in 1..{len(decoder.layers)} and drop in 0..1, got {after} and {drop}"
            raise ValueError(message)
        if score not in ("last", "received"):
            raise ValueError(f"score must be last or received, got {score!r}")
        self.decoder, self.after, self.drop, self.score, self.masked = decoder, after, drop, score, masked

    @property
    def embed(self) -> nn.Embedding:
        return self.decoder.embed

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def scores(self, x: Tensor, turn: Tensor, pos: Tensor, asks: Tensor | None = None) -> Tensor:
        """Of each token that enters layer K - 1: x (B, T, D), turn (B, T, 2, E), pos (B, T) -> (B, T). `asks` (B,) is
        the token of each row that looks, in place of the last one: in training the answer stands behind it."""
        block, real = self.decoder.layers[self.after - 1], pos < PAD
        normed = block.norm1(x)
        if self.score == "last":
            last = (real.sum(1, keepdim=True) - 1).clamp(min=0) if asks is None else asks[:, None]
            return attention_weights(block.attention, normed, turn, last).mean(1)[:, 0]
        query = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        weights = attention_weights(block.attention, normed, turn, query).mean(1) * real[:, :, None]
        seen_by = real.flip(1).cumsum(1).flip(1)  # a token's readers: the real tokens from itself on
        return weights.sum(1) / seen_by.clamp(min=1)

    def choose(self, x: Tensor, turn: Tensor, plan: Plan, asks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which tokens go on, (B, T) bool, and the scores (B, T); text always does."""
        real, vision = plan.pos < PAD, is_vision(plan)
        scores = self.scores(x, turn, plan.pos, asks).detach()
        count = torch.tensor([keep_count(1 - self.drop, n) for n in vision.sum(1).tolist()], device=x.device)
        return best(scores, vision, count) | (real & ~vision), scores

    def forward(
        self, x: Tensor, plan: Plan, cache=None, trace: list[Depth] | None = None, asks: Tensor | None = None
    ) -> Tensor:
        """Token vectors (B, T, D) -> hidden states (B, T, D); asks as in `scores`. The cache is a CountingCache.

        Raises ValueError when frames come in a second chunk, or when `masked` is given a cache.
        """
        vision, pos, before = len(plan.vision) > 0, plan.pos, self.after - 1
        if cache is not None and self.masked:
            raise ValueError("the masked form hides tokens in one pass; it has no cache")
        if cache is not None and vision and any(layer.longest for layer in cache.layers):
            raise ValueError("FastV drops once: feed all frames and the question in the first chunk")
        pasts = [None] * len(self.layers) if cache is None else cache.layers
        turn = self.decoder.rope.turn(pos, self.decoder.config.head_dim, x.dtype)
        for layer, past in zip(self.layers[:before], pasts, strict=False):
            x = layer(x, turn, pos, past=past)
        # Text alone has nothing to drop.
        keep, scores = self.choose(x, turn, plan, asks) if vision else (pos < PAD, None)
        x = self.layers[before](x, turn, pos, past=pasts[before])
        if trace is not None:
            trace.append(Depth(keep, scores))
        if self.masked:
            x = run_layers(self.decoder, x, turn, pos, mask=hidden_from_others(keep), first=self.after)
        elif self.after < len(self.layers) and keep.any():
            short = shorten(keep, pos)
            h = run_layers(self.decoder, short.take(x), short.take(turn), short.pos, cache, first=self.after)
            x = short.put(x, h)
        return self.decoder.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.decoder.logits(hidden)


def hidden_from_others(keep: Tensor) -> Tensor:
    """Who sees whom, (B, T, T) bool, when tokens that keep (B, T) does not name are seen by themselves alone."""
    token = torch.arange(keep.shape[1], device=keep.device)
    before, itself = token[None, :] <= token[:, None], token[None, :] == token[:, None]
    return before & (keep[:, None, :] | itself)
