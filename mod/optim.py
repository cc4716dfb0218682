"""Muon for the weight matrices of linear layers, and the learning-rate schedule. AdamW, for the rest, is torch's own.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, so that every direction
of the matrix learns at the same speed. Everything here is float32: torch.optim.Muon works in bfloat16, which some CPUs
cannot multiply. DEVIATION: the paper trains with AdamW alone, as `--optimizer adamw` does.

Read next: parallel.py
"""

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

# Coefficients of the quintic iteration, chosen by its authors to push small singular values up fast.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """(M, R, C) -> (M, R, C) with all singular values near one: Newton-Schulz iteration, several matrices at once."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = rearrange(matrices, "m r c -> m c r") if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return rearrange(x, "m c r -> m r c") if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; for matrices only. lr is the size of a step in units of a matrix's singular values."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for shape, params in same_shape.items():
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                # Nesterov: look ahead along the momentum.
                ahead = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                size = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, turn in zip(params, orthogonalize(ahead), strict=True):
                    p.add_(turn, alpha=-group["lr"] * size)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate at a step: linear warm-up, then a cosine from 1 to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
