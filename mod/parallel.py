"""Several processes, one training run: `torchrun --nproc-per-node N train_tiny.py ...` starts them.

Every process takes its share of each batch, gradients are averaged by PyTorch's own engines, and the first process
alone writes. There are two ways to hold the weights: copied to every process (DDP), or split over them (FSDP2).
"""

import atexit
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mod.config import TrainConfig, require
from mod.run import pick_device
from mod.train import Engine
from mod.videollm import VideoLLM

PATIENCE = timedelta(hours=12)  # one process may encode an hour of video while the others wait


class Processes(Engine):
    """One of the processes that torchrun has started, on a device of its own. The first one, rank 0, writes and speaks.

    Raises UserError when the device that the settings ask for is not there, or there are more processes than GPUs.
    """

    def __init__(self, settings: TrainConfig):
        self.device = pick_device(settings.device, settings.dtype)
        cuda = self.device.type == "cuda"
        if cuda:
            number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            require(number < there, f"got process {number} on a machine with {there} GPUs; start at most one for each")
            self.device = torch.device("cuda", number)
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)

    def wrap(self, model: VideoLLM, split: bool) -> nn.Module:
        """A model whose gradients are averaged over all processes: copied, or `split` layer by layer."""
        if not split:
            return DistributedDataParallel(model)
        for layer in model.decoder.layers:
            fully_shard(layer)
        return fully_shard(model)

    def total(self, numbers: list[float]) -> list[float]:
        """Sums over all processes, number by number. They are on the host, so no device is waited for."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be split; every process must ask."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def like(self, tensor: Tensor, other: Tensor) -> Tensor:
        """`tensor` split and placed as `other` is."""
        if isinstance(other, DTensor):
            return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
        return super().like(tensor, other)

    @contextmanager
    def together(self, wrapped: nn.Module):
        """While this lasts, parts of a split model can be called on their own; without it only the whole can."""
        split = isinstance(wrapped, FSDPModule)
        if split:
            wrapped.unshard()
        yield
        if split:
            wrapped.reshard()
