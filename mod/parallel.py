"""Several processes, one training run. `torchrun --nproc-per-node N train_tiny.py ...` starts them; alone, nothing here
does anything.

Every process takes its share of each batch, gradients are averaged by PyTorch's own engines, and the first process
alone writes. Two ways to hold the weights: a copy in every process (DDP), or split over them (FSDP2).

Read next: checkpoint.py
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 is the one that writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(device: torch.device) -> torch.device:
    """Meet the other processes that torchrun started, if it did; returns this one's own device."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # One process may encode an hour of video while the others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def meet() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def total(numbers: list[float], device: torch.device) -> list[float]:
    """Sums over all processes, number by number."""
    if world() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def spread(model: nn.Module, layers: list[nn.Module], split: bool) -> nn.Module:
    """A model whose gradients are averaged over all processes: copied, or `split` layer by layer."""
    if world() == 1:
        return model
    if not split:
        return DistributedDataParallel(model)
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


@contextmanager
def together(spread_model: nn.Module):
    """While this lasts, parts of a split model can be called on their own; without it only the whole can."""
    split = isinstance(spread_model, FSDPModule)
    if split:
        spread_model.unshard()
    yield
    if split:
        spread_model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` split and placed as `other` is."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return tensor.to(other.device)
