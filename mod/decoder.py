"""The language decoder, Llama type, and the MoD block that wraps its dense block.

RMSNorm, RoPE, grouped-query attention, SwiGLU; optional QK-norm (Qwen3), q/k/v bias (Qwen2) and tied embeddings, so
that real checkpoints fit. Positions are an explicit argument all the way down.

Read next: layout.py
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mod.block import PAD, Attention, Block, RMSNorm, Rope
from mod.config import ModelConfig, UserError
from mod.router import ROUTERS, Router


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
                          qk_norm=config.qk_norm, rope=Rope.of(config), norm_eps=config.norm_eps)  # fmt: skip
    mlp = SwiGLU(config.dim, config.ffn_hidden)
    return Block(attention, mlp, RMSNorm(config.dim, config.norm_eps), RMSNorm(config.dim, config.norm_eps))


class Routing(NamedTuple):
    """What one routed layer decided: kept (F, N) bool and scores (F, N), for every frame of the batch in order."""

    layer: int
    kept: Tensor
    scores: Tensor


# --- MoD starts here --------------------------------------------------------------------------------------------------
def new_router(config: ModelConfig, layer: int) -> Router:
    """The router that the configuration asks for in this layer, with weights as its class draws them."""
    return ROUTERS[config.select](config.dim, config.frame_tokens, config.keep[layer], layer, config.gate)


class MoDBlock(nn.Module):
    """A dense block that only text and the router's choice of vision tokens go through (paper, section 3.2).

        kept token    h <- h + mu * f(h)     f = the dense block's update on [text + kept vision tokens]
        skipped       h <- h                 bit for bit; it leaves no key and no value in this layer
        text          h <- h + f(h)          never scored, scaled or skipped

    With the value gate mu enters f as well: in its attention the kept token's value is scaled by mu.

    Compute is really skipped: gather the short sequence, run the dense block on it, scatter the result back.
    """

    def __init__(self, block: Block, router: Router):
        super().__init__()
        self.block, self.router = block, router

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor, past=None, trace: list[Routing] | None = None) -> Tensor:
        """x (B, T, D), pos (B, T), frame (B, T) -> (B, T, D); inside, K tokens of each row. See `Attention.forward`."""
        keep, mu, scores = self.router(x, pos, frame)
        if trace is not None:
            kept = rearrange(keep[frame >= 0], "(f n) -> f n", n=self.router.frame_tokens)
            trace.append(Routing(self.router.layer, kept, scores))

        # Gather. A stable sort puts the kept tokens first and in their original order; rows that keep fewer than the
        # longest are filled up with tokens that are not real here: they stand at PAD, so no real token sees them.
        keep = keep & (pos < PAD)
        length = int(keep.sum(1).max())  # K
        if length == 0:
            return x  # frames alone, in a layer that keeps none of their tokens
        index = keep.logical_not().int().argsort(dim=1, stable=True)[:, :length]
        row = torch.arange(len(x), device=x.device)[:, None]
        real = keep[row, index]
        h, mu = x[row, index], mu[row, index]

        loudness = mu if self.router.gate == "value" else None
        place = pos[row, index].where(real, PAD)  # original positions, never renumbered
        update = self.block.update(h, place, frame[row, index], past=past, value_gate=loudness)

        # Scatter. index holds each token at most once, so no write meets another.
        y = x.clone()
        y[row, index] = torch.where(real[..., None], h + mu[..., None] * update, h)
        return y


# --- MoD ends here ----------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Embedding, blocks (dense where keep is 1, MoD elsewhere), final norm, output layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        if config.select not in ROUTERS:
            raise UserError(f"select got {config.select!r}, expected {' or '.join(ROUTERS)}; add others to ROUTERS")
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList()
        for layer, ratio in enumerate(config.keep):
            block = dense_block(config)
            if ratio < 1:
                block = MoDBlock(block, new_router(config, layer))
            self.layers.append(block)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor, cache=None, trace: list[Routing] | None = None) -> Tensor:
        """Token vectors (B, T, D) -> hidden states (B, T, D), ready for `logits`.

        pos (B, T) positions, frame (B, T) frame of each vision token or -1, cache a KVCache that the new tokens are
        appended to, trace a list that collects what the routed layers decided. Raises UserError, with nothing stored,
        when the cache is full.
        """
        if cache is not None:
            cache.make_room(pos, frame)
        for number, layer in enumerate(self.layers):
            past = cache.layers[number] if cache is not None else None
            if isinstance(layer, MoDBlock):
                x = layer(x, pos, frame, past=past, trace=trace)
            else:
                x = layer(x, pos, frame, past=past)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """How likely each word is next: hidden states (..., D) -> logits (..., V)."""
        return self.head(hidden)
