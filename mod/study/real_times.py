"""What MoD saves in a real language model: training step, peak memory, KV cache, latency of one more frame; each beside
full computation in turns, and full computation beside transformers' own model of the same weights.

    python -m mod.study.real --llm FOLDER --times      # on a machine with nothing else to do

A CPU's times are those of the processor, of one thread. Everything loads the checkpoint's own weights; frames are
random vectors, the same for all, since what is in them does not matter to a clock.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from tqdm import tqdm

from mod.config import ModelConfig, UserError, check, require
from mod.data import clip_batch
from mod.real.config import RealModel, RealRun
from mod.real.llm import load_llm
from mod.real.world import WORLD
from mod.study.bench import Size, bench_streaming, bench_training
from mod.study.common import markdown
from mod.study.costs import activation_bytes, decoder_flops
from mod.study.machine import Machine, ratio, side_by_side

FRAMES = 20  # of the clip of a timed training step: long enough for vision to dominate
CONTEXTS = {"cpu": (1000, 2000, 4000, 8000), "cuda": (1000, 4000, 16000, 32000)}  # tokens of full computation
TURNS = 5


@dataclass(frozen=True)
class TimesFlags:
    """What the study asks for, and its timing."""

    llm: str = ""  # folder or hub name of the language model
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 on a CUDA GPU
    threads: int = 1  # threads of a CPU
    quick: bool = False  # a few steps and short contexts, in a folder apart, to see that it works
    peak: Literal["", "full", "mod-value"] = ""  # print only the peak memory of this one's training step, in bytes

    def __post_init__(self):
        check(self, {"threads": 1})


class Loaded(Machine):
    """A machine whose decoders, and transformers' models, are those of a checkpoint."""

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(device, dtype)
        self.folder, self.rope = folder, {}

    def build(self, config: ModelConfig) -> torch.nn.Module:
        sizes = RealModel(**asdict(config) | self.rope).fit()
        return load_llm(self.folder, sizes, self.dtype, torch.device(self.device))


def machine_of(flags: TimesFlags, config: RealRun) -> Loaded:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if flags.device == "auto" else flags.device
    machine = Loaded(Path(config.real.llm), device, flags.dtype)
    machine.rope = {name: value for name, value in asdict(config.model).items() if name.startswith("rope_")}
    return machine


def training_step(config: RealRun, device: str, frames: int):
    """A function that runs forward, loss and backward of one clip once, as in the preset's training: low-rank changes,
    routers and connector learn, the rest is frozen."""
    config = replace(config, data=replace(config.data, frames=frames))
    model, source = WORLD.build(config, torch.device(device))
    model.vit.requires_grad_(False)
    batch = clip_batch(source.words, source.validation(1), config.model).to(device)

    def step() -> None:
        with torch.autocast(device, getattr(torch, config.train.dtype), config.train.dtype != "float32"):
            text, stream = model(batch)
        (text + stream).backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def pair(config: RealRun) -> dict[str, RealRun]:
    return {"mod-value": config, "full": replace(config, model=replace(config.model, layers="none"))}


def peak_bytes(flags: TimesFlags, config: RealRun, name: str) -> int:
    """Peak memory of a training step over what is there before it. On a CPU, in a process of its own."""
    machine = machine_of(flags, config)
    if machine.device == "cpu" and not flags.peak:
        command = [sys.executable, "-m", "mod.study.real", "--llm", flags.llm, "--peak", name]
        done = subprocess.run(command + (["--quick"] if flags.quick else []), capture_output=True, text=True)
        require(not done.returncode, (done.stderr.strip().splitlines() or ["no answer"])[-1])
        return int(done.stdout.split()[-1])
    step = training_step(pair(config)[name], machine.device, 4 if flags.quick else FRAMES)
    training_step(pair(config)[name], machine.device, 1)()  # libraries allocate on first use
    return machine.peak(step)


def times(flags: TimesFlags, config: RealRun) -> dict:
    """All that is measured, as numbers and ratios; see `times_report`."""
    torch.set_num_threads(flags.threads)
    machine, frames = machine_of(flags, config), 4 if flags.quick else FRAMES
    contexts, turns = CONTEXTS[machine.device], TURNS
    if flags.quick:
        contexts, turns = (400,), 1
    runs = pair(config)
    size = Size("checkpoint", ModelConfig(**{name: value for name, value in asdict(config.model).items()
                                             if not name.startswith("rope_") or name == "rope_base"}),
                frames=frames, rows=1, contexts=contexts, turns=turns)
    if find_spec("transformers") is None:
        raise UserError("transformers is not installed, which this is measured beside; pip install transformers")
    with tqdm(unit="turn", disable=None) as bar:
        steps = {name: training_step(run, machine.device, frames) for name, run in runs.items()}
        taken = side_by_side(machine, steps, turns, bar)
        del steps
        text = 20 * frames
        flops = {name: decoder_flops(run.model, frames, text) for name, run in runs.items()}
        saved = {name: activation_bytes(run.model, frames, text, machine.number_bytes) for name, run in runs.items()}
        lora = {"frames": frames, "seconds": {name: sorted(values)[len(values) // 2] for name, values in taken.items()},
                "time_ratio": ratio(taken, "mod-value", "full"), "flop_ratio": flops["mod-value"] / flops["full"]}
        peaks = {name: peak_bytes(flags, config, name) for name in runs}
        memory = {"peak_bytes": peaks, "peak_ratio": peaks["mod-value"] / peaks["full"],
                  "saved_ratio": saved["mod-value"] / saved["full"]}
        whole = bench_training(machine, size, bar)
        points = bench_streaming(machine, size, bar)
    return {"device": machine.name, "gpu": machine.device != "cpu", "dtype": machine.dtype_name,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "training": lora, "memory": memory,
            "all_weights": whole, "points": points}


def times_report(found: dict) -> str:
    training, memory, whole = found["training"], found["memory"], found["all_weights"]
    rows = {}
    for point in found["points"]:
        frame, held = point["frame"], point["kv_bytes"]
        absolute = {name: f"{1000 * frame['seconds'][theirs]:.0f} ms" for name, theirs in
                    (("full", "full"), ("MoD", "mod"), ("transformers", "transformers"))}
        rows[f"{point['context']:,}"] = (absolute if found["gpu"] else {}) | {
            "MoD / full": f"{frame['time_ratio']:.2f}", "FLOPs": f"{frame['flop_ratio']:.2f}",
            "bytes read": f"{frame['read_ratio']:.2f}", "KV cache": f"{held['mod'] / held['full']:.2f}",
            "transformers / full": f"{frame['transformers_to_full']:.2f}",
            "transformers / MoD": f"{frame['transformers_to_mod']:.2f}"}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("context (tokens)")
    share, ours = training["time_ratio"], whole["ours_to_transformers"]
    told = (f"Time on {found['device']}, {found['dtype']}, {found['threads']} threads, measured in turns. A training "
            f"step of one clip of {training['frames']} frames takes {share:.2f} of full computation's time "
            f"({training['flop_ratio']:.2f} of its decoder FLOPs); its peak memory is {memory['peak_ratio']:.2f} of "
            f"full computation's (formula for saved activations {memory['saved_ratio']:.2f}). With all weights "
            f"trained, our dense model's step takes {ours:.2f} of the time of transformers' own.\n")
    return "\n".join([told, "One more frame of a stream:\n", markdown(table)])
