"""What actions take on a machine: seconds, side by side, so that a busy machine slows all alike; and peak memory."""

import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mod.config import ModelConfig, UserError
from mod.decoder import Decoder


class Machine:
    """Where and how things run."""

    def __init__(self, device: str = "cpu", dtype: str = "float32", compile: bool = False):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device got cuda, but no CUDA GPU is here; pass --device cpu")
        if device == "cpu" and dtype != "float32":
            raise UserError(f"dtype got {dtype} on a CPU, expected float32; pass --device cuda for bfloat16")
        self.device, self.dtype, self.compile = device, getattr(torch, dtype), compile

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()} CPU"

    @property
    def number_bytes(self) -> int:
        return self.dtype.itemsize

    def build(self, config: ModelConfig) -> Decoder:
        torch.manual_seed(0)
        decoder = Decoder(config).to(self.device, self.dtype)
        if self.compile:
            decoder.compile(dynamic=True)
        return decoder

    def stream(self, config: ModelConfig, rows: int, frames: int, text: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random tokens x (B, T, D), pos and frame (B, T): all frames, then all text."""
        vision = frames * config.frame_tokens
        x = torch.randn(rows, vision + text, config.dim, device=self.device, dtype=self.dtype)
        frame = torch.arange(vision, device=self.device) // config.frame_tokens
        frame = torch.cat((frame, frame.new_full((text,), -1))).expand(rows, -1)
        return x, torch.arange(vision + text, device=self.device).expand(rows, -1), frame

    def clock(self, action) -> float:
        """Seconds that action() takes."""
        finish = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        finish()
        started = time.perf_counter()
        action()
        finish()
        return time.perf_counter() - started

    def work(self, action) -> float:
        """Seconds of work that action() takes: on a CPU its processor time, which a busy machine does not lengthen."""
        if self.device == "cuda":
            return self.clock(action)
        started = time.process_time()
        action()
        return time.process_time() - started

    def peak(self, action) -> int:
        """Bytes that action() takes at most, over what is there before it."""
        if self.device == "cuda":
            rest = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            action()
            return torch.cuda.max_memory_allocated() - rest
        rest = memory("VmRSS", forget_peak=True)
        action()
        return memory("VmHWM") - rest


def memory(which: str, forget_peak: bool = False) -> int:
    """Bytes of this process that are in memory now ("VmRSS") or were at most ("VmHWM", since the peak was forgotten).

    Raises UserError where there is no /proc, that is, not on Linux.
    """
    try:
        if forget_peak:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise UserError(f"peak memory is read from /proc, which is Linux only ({error}); pass --no-memory") from error
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which + ":"))


def side_by_side(machine: Machine, actions: dict, turns: int, bar: tqdm, undo: dict | None = None) -> dict:
    """Seconds of every action in every turn, the actions alternating; a first turn, not counted, warms up. What
    `undo` holds for an action is done after it, untimed."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            seconds = machine.clock(action)
            if undo:
                undo[name]()
            if turn:
                times[name].append(seconds)
        bar.update()
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the turns of one's time as a share of the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
