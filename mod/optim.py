"""Muon for the weight matrices of linear layers, and the learning-rate schedule. AdamW, for the rest, is torch's own.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, so that every direction
of the matrix learns at the same speed. Everything here is float32: torch.optim.Muon works in bfloat16, which some CPUs
cannot multiply. DEVIATION: the paper trains with AdamW alone, as `--optimizer adamw` does.

Read next: run.py
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients that push small singular values up fast, chosen by Muon's authors


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices to x (M, rows, columns), nearly: singular values end between 0.7 and 1.2."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


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


def make_optimizers(named: dict[str, nn.Parameter], kind: str, lr: float, adam_lr: float,
                    router_rate: float = 1.0, vit_lr: float = 0.0) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of linear layers; AdamW for embeddings, norms, biases, patches and low-rank changes;
    AdamW at `router_rate` times the others' rate for routers, and at `vit_lr`, where that is not zero, for all of the
    vision encoder."""
    groups: dict[str, list[nn.Parameter]] = {"adam": [], "router": [], "vision": [], "muon": []}
    for name, parameter in named.items():
        special = any(part in name for part in ("embed", "router", "position", "decoder.head", "lora_"))
        matrix = kind == "muon" and parameter.ndim == 2 and name.endswith("weight") and not special
        kind_of = "muon" if matrix else "router" if "router" in name else "adam"
        groups["vision" if vit_lr and name.startswith("vit.") else kind_of].append(parameter)
    rates = {"adam": adam_lr, "router": adam_lr * router_rate, "vision": vit_lr}
    rated = [{"params": groups[group], "lr": rate} for group, rate in rates.items()]
    optimizers = [torch.optim.AdamW([g for g in rated if g["params"]], betas=(0.9, 0.95), weight_decay=0.0)]
    if groups["muon"]:
        optimizers.append(Muon(groups["muon"], lr=lr))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate at a step: linear warm-up, then a cosine from 1 to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_step(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Step at `factor` times the peak learning rate, then forget the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
