"""LoRA (Hu et al., 2021): train a low-rank change of each linear layer instead of the layer.

    y = W x + (alpha / rank) * B A x         A (rank, in) random, B (out, rank) zero: at step 0 nothing changes

The base paper's setting is rank 128, alpha 256, on every linear layer of the language model; connector and routers are
trained in full. What is trained is all that a run saves; the rest stays in the checkpoint's own files.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mod.config import UserError
from mod.decoder import Decoder
from mod.router import Router


class LoRA(nn.Module):
    """A frozen linear layer and its low-rank change."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        weight = base.weight
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.before: tuple[nn.Parameter, ...] = ()  # the weight as it was, while the change is merged into it

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.before else y + self.scale * ((x @ self.lora_a.mT) @ self.lora_b.mT)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the change into the weight: the forward pass then costs what it did without LoRA."""
        if not self.before:
            self.before = (self.base.weight,)  # kept, not overwritten: an embedding may be tied to it
            change = self.scale * (self.lora_b @ self.lora_a)
            changed = self.base.weight + change.to(self.base.weight.dtype)
            self.base.weight = nn.Parameter(changed, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take it out again, bit for bit."""
        if self.before:
            (self.base.weight,), self.before = self.before, ()


def add_lora(decoder: Decoder, rank: int, alpha: float) -> None:
    """Freeze a decoder except its routers, and give every linear layer, the output layer included, a change to train.

    Raises UserError for a rank that is not positive or that no layer has room for.
    """
    parents = [(module, name, child) for module in decoder.modules() for name, child in module.named_children()
               if isinstance(child, nn.Linear) and not isinstance(module, Router)]
    smallest = min(min(child.weight.shape) for _, _, child in parents)
    if not 1 <= rank <= smallest:
        raise UserError(f"--lora-rank got {rank}, expected 1 to {smallest}, the smallest side of a linear layer")
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(".router." in name)
    for module, name, child in parents:
        setattr(module, name, LoRA(child, rank, alpha))


def changes(model: nn.Module) -> Iterator[tuple[str, LoRA]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRA))
