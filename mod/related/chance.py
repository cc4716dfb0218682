"""Choices that look at no token: by chance, and evenly spread. The paper compares its own with them (Table 3).

Importing this file adds them to `ROUTERS`, as `--select random` and `--select uniform` do. A router of your own is
added in the same way.
"""

import torch
from torch import Tensor

from mod.router import ROUTERS, Router


class RandomRouter(Router):
    """Tokens drawn by chance.

    DEVIATION: the draw is a hash of layer and position, no dice, so that streaming draws what training drew.
    """

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        # An integer hash (multiply, fold the high bits down, twice): looks random, costs nothing, needs no state.
        mixed = (pos.long() * 0x9E3779B1 + (self.layer + 1) * 0x85EBCA77) & 0xFFFFFFFF
        for _ in range(2):
            mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
        return ((mixed ^ (mixed >> 13)) >> 8).to(torch.float32)  # 24 bits, which float32 holds exactly


class UniformRouter(Router):
    """Every (n/k)-th token of the frame."""

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        i = torch.arange(self.frame_tokens, device=tokens.device)
        # floor((i+1)k/n) > floor(ik/n) is true for exactly k of n, evenly spread.
        before, after = ((j * self.kept).div(self.frame_tokens, rounding_mode="floor") for j in (i, i + 1))
        return (after > before).to(tokens.dtype).expand(tokens.shape[0], self.frame_tokens)


ROUTERS |= {"random": RandomRouter, "uniform": UniformRouter}
