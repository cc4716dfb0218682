"""Rotary positions that reach further than they were trained for, as Llama 3.1 scales them."""

import math

import torch
from torch import Tensor

from mod.layers import Rope


class ScaledRope(Rope):
    """A pair of entries that turns less than `low` times within `context` positions is slowed by `factor`, one that
    turns more than `high` times is left alone, and in between the two are blended. Factor 1 is plain RoPE."""

    def __init__(self, base: float, factor: float = 1.0, low: float = 1.0, high: float = 4.0, context: int = 8192):
        super().__init__(base)
        self.factor, self.low, self.high, self.context = factor, low, high, context

    def frequency(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Radians per position, (E/2,), for heads of width E = size."""
        plain = super().frequency(size, device, dtype)
        if self.factor == 1:
            return plain
        turns = self.context * plain / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return kept * plain + (1 - kept) * plain / self.factor
