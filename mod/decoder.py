"""The language decoder, Llama type, and the MoD block that wraps its dense block.

RMSNorm, RoPE, grouped-query attention, SwiGLU; optional QK-norm (Qwen3), q/k/v bias (Qwen2) and tied embeddings, so
that real checkpoints fit. Positions are an explicit argument all the way down.

Read next: cache.py
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mod.config import ModelConfig
from mod.layers import PAD, Attention, Block, RMSNorm, Rope
from mod.layout import Plan
from mod.router import Router, new_router


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def dense_block(config: ModelConfig) -> Block:
    attention = Attention(config.dim, config.heads, config.kv_heads, config.head_dim, qkv_bias=config.qkv_bias,
                          qk_norm=config.qk_norm, norm_eps=config.norm_eps)
    mlp = SwiGLU(config.dim, config.ffn_hidden)
    return Block(attention, mlp, RMSNorm(config.dim, config.norm_eps), RMSNorm(config.dim, config.norm_eps))


class Routing(NamedTuple):
    """What one routed layer decided: kept (F, N) bool and scores (F, N), for every frame of the batch in order."""

    layer: int
    kept: Tensor
    scores: Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x (B, T, ...) at flat indices (R, C) -> (R, C, ...)."""
    return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])


# --- MoD starts here --------------------------------------------------------------------------------------------------
class MoDBlock(nn.Module):
    """A dense block that only text and the router's choice of vision tokens go through (paper, section 3.2).

        kept token    h <- h + mu * f(h)     f = the dense block's update on [text + kept vision tokens]
        skipped       h <- h                 bit for bit; it leaves no key and no value in this layer
        text          h <- h + f(h)          never scored, scaled or skipped

    With a "-value" gate mu enters f as well: in its attention the kept token's value is scaled by mu. With a "-read"
    gate it does that alone, and h <- h + f(h).

    Compute is really skipped: gather the short rows, run the dense block on them, scatter the result back. The plan
    knows their shapes; the router only fills in which k tokens of each frame stand in that frame's slots.
    """

    def __init__(self, block: Block, router: Router):
        super().__init__()
        self.block, self.router = block, router

    def forward(self, x: Tensor, turn: Tensor, plan: Plan, past=None, trace: list[Routing] | None = None) -> Tensor:
        """x (B, T, D), turn (B, T, 2, E) -> (B, T, D); inside, K tokens of each row. `trace` collects the decisions."""
        if len(plan.vision) == 0:
            return self.block(x, turn, plan.pos, past=past)
        # A streamed frame: every row is one frame and nothing else. Its kept tokens are the short row, without slots.
        router, alone = self.router, plan.vision.shape == x.shape[:2]
        frames = (x, plan.pos) if alone else (take(x, plan.vision), take(plan.pos, plan.vision))
        chosen, weight, scores = router(*frames, router.kept_before([earlier.kept for earlier in trace or ()]))
        if trace is not None:
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
            trace.append(Routing(router.layer, kept, scores))
        route = plan.routes[router.kept]
        if route.index.numel() == 0:
            return x  # frames alone, in a layer that keeps none of their tokens

        # Gather. Each frame's slots get the indices of its chosen tokens, in order of time, which attention relies on.
        index, mu = plan.vision.gather(1, chosen), weight.to(x.dtype)
        if not alone:
            slots = route.slots.flatten()
            index = route.index.flatten().scatter(0, slots, index.flatten()).view_as(route.index)
            mu = route.real.flatten().to(x.dtype).scatter(0, slots, mu.flatten()).view_as(route.real)
        pos = None
        if past is not None:  # original positions, never renumbered
            pos = plan.pos.gather(1, chosen) if alone else take(plan.pos, index).where(route.real, PAD)
        # DEVIATION: in the paper mu scales nothing but the update.
        value_gate = None if router.gate.endswith("update") else mu
        update = self.block.update(take(x, index), take(turn, index), pos, past=past, value_gate=value_gate)

        # Scatter. A slot that is not real has weight 0: it adds nothing, whichever token it points at.
        if router.gate.endswith("read"):
            mu = torch.ones_like(mu) if alone else route.real.to(x.dtype)
        update = (mu[..., None] * update).to(x.dtype).flatten(0, 1)
        return x.flatten(0, 1).scatter_add(0, index.view(-1, 1).expand_as(update), update).view_as(x)


# --- MoD ends here ----------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Embedding, blocks (dense where the keep ratio is 1, MoD elsewhere), final norm, output layer.

    Raises UserError when the configuration selects a router that is not there.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.rope = config, Rope(config.rope_base)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList()
        for layer, ratio in enumerate(config.keep_ratios):
            block = dense_block(config)
            self.layers.append(block if ratio == 1 else MoDBlock(block, new_router(config, layer)))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def compile(self, **options) -> None:
        """torch.compile it: one graph for batches and chunks of all sizes."""
        # Otherwise sizes that are equal at the first call are assumed to be equal for ever.
        torch.fx.experimental._config.use_duck_shape = False
        # Training, evaluation, frames, text and rows of one each have a graph of their own.
        torch._dynamo.config.recompile_limit = 64
        super().compile(**{"fullgraph": True, "dynamic": True} | options)

    def forward(self, x: Tensor, plan: Plan, cache=None, trace: list[Routing] | None = None) -> Tensor:
        """Token vectors (B, T, D) -> hidden states (B, T, D), ready for `logits`.

        cache  a KVCache, told of this plan by `begin`, that the new tokens are appended to
        trace  an empty list that collects what the routed layers decided
        """
        if self.config.take_turns and trace is None:
            trace = []  # a layer reads there what those before it have kept
        turn = self.rope.turn(plan.pos if cache is None else cache.places, self.config.head_dim, x.dtype)
        for number, layer in enumerate(self.layers):
            past = cache.layers[number] if cache is not None else None
            if isinstance(layer, MoDBlock):
                x = layer(x, turn, plan, past=past, trace=trace)
            else:
                x = layer(x, turn, plan.pos, past=past)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """How likely each word is next: hidden states (..., D) -> logits (..., V)."""
        return self.head(hidden)
