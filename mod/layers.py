"""Attention and the transformer block: one of each, shared by the vision encoder and the decoder.

The decision to notice: a block exposes `update`, what it *adds* to its input. The dense block returns `x + update(x)`;
the MoD block (decoder.py) gathers some tokens, asks the same block for the same update and scales it.

Read next: vit.py
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# A padded token stands at the end of time: no real query is late enough to see it, so no other mask is needed.
PAD = 2**62


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (as Llama does), scaled by a learned weight."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Rope:
    """Rotary position embedding: how fast each pair of entries turns, and the rotation of each token."""

    def __init__(self, base: float = 10000.0):
        self.base = base

    def frequency(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Radians per position, base^(-2i/E) for pair i, (E/2,), for heads of width E = size."""
        return self.base ** -(torch.arange(0, size, 2, device=device, dtype=dtype) / size)

    def turn(self, pos: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """How `rotate` turns tokens at pos (B, T): cosines and sines for heads of width E = size, (B, T, 2, E)."""
        # After hours of a stream float32 cannot tell neighbours' angles apart: take them modulo 2 pi in float64 first.
        exact = torch.float32 if pos.device.type == "mps" else torch.float64
        angle = pos.to(exact)[..., None] * self.frequency(size, pos.device, exact)
        angle = angle.remainder(2 * math.pi).to(torch.float64 if dtype == torch.float64 else torch.float32)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding in the half-rotation layout: entry i turns with entry i + E/2, by pos * frequency[i].

    x (B, H, T, E), turn (B, T, 2, E) from `Rope.turn` -> (B, H, T, E). The score of a query at position p and a key at
    position s then depends on p - s alone, so tokens that skip a layer leave gaps but never move the others.
    """
    cos, sin = turn[:, None].unbind(3)  # (B, 1, T, E) each, the same for all heads
    # (first, second) -> (first * cos - second * sin, second * cos + first * sin); rolling by E/2 swaps the halves.
    wide = x.to(turn.dtype)
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values.

    Without `turn` every query sees every key (vision). With `turn` queries and keys are rotated and a query sees the
    keys that are not after it (language), those of `past` included. A `mask` says otherwise.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
                 qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False, norm_eps: float = 1e-5):
        super().__init__()
        self.head_dim = head_dim or dim // heads
        kv_heads = kv_heads or heads
        self.grouped = kv_heads != heads
        self.q = nn.Linear(dim, heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=out_bias)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, turn: Tensor | None = None, pos: Tensor | None = None, *, past=None,
                mask: Tensor | None = None, context: Tensor | None = None, value_gate: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        turn  (B, T, 2, E) rotation of each token; rows run forwards in time, padding on the right
        pos   (B, T) position of each token, which `past` stores
        past  a LayerCache: the new keys and values are appended to it, and all that it holds is attended to
        mask  (B or 1, T, S) bool, which keys a query sees, in place of the rule; for methods in mod/related
        context  (B, S, D) keys and values come from here instead of x (the vision encoder's pooling head)
        value_gate  (B, T) factor on each token's value, i.e. on how loudly it is read
        """
        source = x if context is None else context
        # The norms want whole rows in memory, so they come before the heads move to the front.
        q = self.q_norm(rearrange(self.q(x), "b t (h e) -> b t h e", e=self.head_dim)).transpose(1, 2)
        k = self.k_norm(rearrange(self.k(source), "b s (g e) -> b s g e", e=self.head_dim)).transpose(1, 2)
        v = rearrange(self.v(source), "b s (g e) -> b g s e", e=self.head_dim)
        if value_gate is not None:
            v = v * value_gate[:, None, :, None].to(v.dtype)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)

        # Square and in order of time: the mask "not after me" is the lower triangle, which SDPA need not be given.
        # With a past it is not square, and is_causal would align it wrongly: the past makes a mask from positions.
        causal = turn is not None and past is None and mask is None
        if past is not None:
            k, v, sees = past.append(k, v, pos)
            mask = sees if mask is None else mask
        if mask is not None:
            mask = mask[:, None]  # the same for all heads
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.grouped)
        return self.out(rearrange(mixed, "b h t e -> b t (h e)"))


class Block(nn.Module):
    """Pre-norm transformer block: x + update(x), update(x) = a + MLP(norm(x + a)), a = Attention(norm(x))."""

    def __init__(self, attention: Attention, mlp: nn.Module, norm1: nn.Module, norm2: nn.Module):
        super().__init__()
        self.norm1, self.attention = norm1, attention
        self.norm2, self.mlp = norm2, mlp

    def update(self, x: Tensor, *where, **attend) -> Tensor:
        """Everything the block adds to x, (B, T, D) -> (B, T, D). The rest goes to `Attention.forward`."""
        attended = self.attention(self.norm1(x), *where, **attend)
        return attended + self.mlp(self.norm2(x + attended))

    def forward(self, x: Tensor, *where, **attend) -> Tensor:
        return x + self.update(x, *where, **attend)
