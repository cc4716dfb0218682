"""What actions take on a machine: seconds, side by side, so that a busy machine slows all alike; and peak memory."""

import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mod.config import ModelConfig, UserError, require
from mod.decoder import Decoder
from mod.layout import TEXT, Plan, make_plan

LEAST = 0.05  # seconds that an action is repeated for in each turn
# FLOPs per second of dense bfloat16 products with float32 sums, from NVIDIA's data sheets; the first name that fits.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}


class Machine:
    """Where and how things run. `backend`: what torch.compile compiles with. `folder`: of the checkpoint whose weights
    are measured, if there is one."""

    folder: Path | None = None

    def __init__(self, device: str = "cpu", dtype: str = "float32", compile: bool = False, backend: str = "inductor"):
        require(device != "cuda" or torch.cuda.is_available(),
                "device got cuda, but no CUDA GPU is here; pass --device cpu")
        require(device != "cpu" or dtype == "float32",
                f"dtype got {dtype} on a CPU, expected float32; pass --device cuda for bfloat16")
        self.device, self.dtype, self.compile, self.backend = device, getattr(torch, dtype), compile, backend

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()} CPU"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def number_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def peak_flops(self) -> float | None:
        """FLOPs per second that this card can do at most; None where we do not know."""
        if self.device != "cuda" or self.dtype != torch.bfloat16:
            return None
        return next((flops for name, flops in PEAK_FLOPS.items() if name in self.name), None)

    def build(self, config: ModelConfig) -> Decoder:
        torch.manual_seed(0)
        with torch.device(self.device):  # a wide decoder takes long to make on a CPU
            decoder = Decoder(config).to(self.dtype)
        if self.compile:
            torch.compiler.reset()  # the code of decoders that have had their turn counts towards a limit
            decoder.compile(backend=self.backend)
        return decoder

    def stream(self, config: ModelConfig, rows: int, frames: int, text: int) -> tuple[Tensor, Plan]:
        """Random tokens x (B, T, D), and their plan: all frames, then all text."""
        vision = frames * config.frame_tokens
        x = torch.randn(rows, vision + text, config.dim, device=self.device, dtype=self.dtype)
        frame = np.concatenate((np.arange(vision) // config.frame_tokens, np.full(text, TEXT)))
        plan = make_plan(np.tile(frame, (rows, 1)), [0] * rows, config.frame_tokens, config.keep_counts)
        return x, plan.to(self.device)

    def clock(self, action) -> float:
        """Seconds that action() takes. On a CPU with one thread it is processor time, which a busy machine does not
        lengthen."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.process_time if self.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        started = now()
        action()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return now() - started

    def peak(self, action) -> int:
        """Bytes that action() takes at most, over what is there before it. For a CPU that is read from /proc, so it
        raises UserError where there is none, that is, not on Linux."""
        if self.device == "cuda":
            rest = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            action()
            return torch.cuda.max_memory_allocated() - rest
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            rest = peak_resident()
            action()
            return peak_resident() - rest
        except OSError as error:
            raise UserError(f"peak memory is read from /proc, got {error}; pass --no-memory, or use Linux") from error


def peak_resident() -> int:
    """Bytes of memory that this process had at most since its peak was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def side_by_side(machine: Machine, actions: dict, turns: int, bar: tqdm, undo: dict | None = None) -> dict:
    """Seconds of every action in every turn, the actions alternating; a first turn, not counted, warms up.

    In a turn a short action is repeated, and the mean counts: in a stream a model's last frame has left its weights and
    code in the processor's caches, not another model's. What `undo` holds for an action is done after it, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            seconds = []
            while not seconds or sum(seconds) < LEAST:
                seconds.append(machine.clock(action))
                if undo:
                    undo[name]()
            if turn:
                times[name].append(statistics.mean(seconds))
        bar.update()
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the turns of one's time as a share of the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
