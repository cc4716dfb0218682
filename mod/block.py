"""Attention and the transformer block: one of each, shared by the vision encoder and the decoder.

The decision to notice: a block exposes `update`, what it *adds* to its input. The dense block returns `x + update(x)`;
the MoD block (decoder.py) gathers some tokens, asks the same block for the same update and scales it.

Read next: vit.py
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mod.config import ModelConfig

# A padded token stands at the end of time: no real query is late enough to see it, so no other mask is needed.
PAD = 2**62


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (as Llama does), scaled by a learned weight."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Rope(NamedTuple):
    """How fast each pair of entries turns: by base^(-2i/E) a position; Llama 3.1 slows the slow ones down further.

    A pair that turns less than `low` times within `context` positions is slowed by `factor`, one that turns more than
    `high` times is left alone, and in between the two are blended. Factor 1 is plain RoPE.
    """

    base: float = 10000.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    @classmethod
    def of(cls, config: ModelConfig) -> "Rope":
        return cls(config.rope_base, config.rope_factor, config.rope_low, config.rope_high, config.rope_context)

    def frequency(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Radians a position, (E/2,), for heads of width E = size."""
        plain = self.base ** -(torch.arange(0, size, 2, device=device, dtype=dtype) / size)
        if self.factor == 1:
            return plain
        turns = self.context * plain / (2 * math.pi)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return keep * plain + (1 - keep) * plain / self.factor


def rotate(x: Tensor, pos: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding in the half-rotation layout: entry i turns with entry i + E/2, by pos * frequency[i].

    x (B, H, T, E), pos (B, T) -> (B, H, T, E). The score of a query at position p and a key at position s then
    depends on p - s alone, so tokens that skip a layer leave gaps but never move the others.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # After hours of a stream float32 could not tell the angles of neighbours apart: whole turns go first, in float64.
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    angle = rearrange(pos.to(exact), "b t -> b 1 t 1") * rope.frequency(x.shape[-1], x.device, exact)
    angle = angle.remainder(2 * math.pi).to(wide)
    cos, sin = angle.cos(), angle.sin()
    # (first, second) -> (first * cos - second * sin, second * cos + first * sin); rolling by E/2 swaps the halves.
    turned, swapped = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    x_wide = x.to(wide)
    return (x_wide * turned + x_wide.roll(x.shape[-1] // 2, dims=-1) * swapped).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values.

    Without positions every query sees every key (vision). With positions queries and keys are rotated and a query
    sees the keys whose position is not after its own (language), those of `past` included.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
                 qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False, rope: Rope | None = None,
                 norm_eps: float = 1e-5):  # fmt: skip
        super().__init__()
        self.head_dim = head_dim or dim // heads
        self.rope = rope or Rope()
        kv_heads = kv_heads or heads
        self.q = nn.Linear(dim, heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=out_bias)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, pos: Tensor | None = None, frame: Tensor | None = None, *,
                context: Tensor | None = None, past=None, value_gate: Tensor | None = None) -> Tensor:  # fmt: skip
        """x (B, T, D) -> (B, T, D).

        pos    (B, T) position of each token in its stream; rows run forwards in time, padding (PAD) on the right
        frame  (B, T) frame of each vision token, -1 for text; only noted down in the cache
        context (B, S, D) keys and values come from here instead of x (the vision encoder's pooling head)
        past   a LayerCache: the new keys and values are appended to it, and what of it is not forgotten is attended to
        value_gate (B, T) factor on each token's value, i.e. on how loudly it is read
        """
        source = x if context is None else context
        q = self.q_norm(rearrange(self.q(x), "b t (h e) -> b h t e", e=self.head_dim))
        k = self.k_norm(rearrange(self.k(source), "b s (g e) -> b g s e", e=self.head_dim))
        v = rearrange(self.v(source), "b s (g e) -> b g s e", e=self.head_dim)
        if value_gate is not None:
            v = v * rearrange(value_gate, "b s -> b 1 s 1").to(v.dtype)
        if pos is not None:
            place = pos if past is None else past.places(pos)
            q, k = rotate(q, place, self.rope), rotate(k, place, self.rope)

        # Square and in order of time: the mask k_pos <= q_pos is the lower triangle, which SDPA need not be given.
        # With a past it is not square, and is_causal would align it wrongly: the past makes a mask from positions.
        causal, mask = pos is not None and past is None, None
        if past is not None:
            k, v, mask = past.append(k, v, pos, frame)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.out(rearrange(mixed, "b h t e -> b t (h e)"))


class Block(nn.Module):
    """Pre-norm transformer block: x + update(x), update(x) = a + MLP(norm(x + a)), a = Attention(norm(x))."""

    def __init__(self, attention: Attention, mlp: nn.Module, norm1: nn.Module, norm2: nn.Module):
        super().__init__()
        self.norm1, self.attention = norm1, attention
        self.norm2, self.mlp = norm2, mlp
        self.recompute = False  # activation checkpointing: keep the input alone, compute again on the way back

    def update(self, x: Tensor, pos: Tensor | None = None, frame: Tensor | None = None, **attend) -> Tensor:
        """Everything the block adds to x, (B, T, D) -> (B, T, D). Keywords go to `Attention.forward`."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._update, x, pos, frame, use_reentrant=False, **attend)
        return self._update(x, pos, frame, **attend)

    def _update(self, x: Tensor, pos: Tensor | None, frame: Tensor | None, **attend) -> Tensor:
        attended = self.attention(self.norm1(x), pos, frame, **attend)
        return attended + self.mlp(self.norm2(x + attended))

    def forward(self, x: Tensor, pos: Tensor | None = None, frame: Tensor | None = None, **attend) -> Tensor:
        return x + self.update(x, pos, frame, **attend)
