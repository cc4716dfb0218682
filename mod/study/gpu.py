"""What only a GPU can tell, in one go: its tests, what waits for it, and times in bfloat16, as written and compiled.

    python -m mod.study.gpu                         # at most eight minutes on one GPU; writes results/gpu.json and .md
    python -m mod.study.gpu --device cpu --quick    # a rehearsal with tiny sizes

Each part has a process and a time limit of its own. A part that fails or takes too long says so in the results, and the
others go on. The files are written again after every part.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mod.config import Config, ModelConfig, UserError, require
from mod.data import clip_batch
from mod.run import Parser, run_script, to_json, write_text
from mod.stream import Stream
from mod.study import bench_report
from mod.study.bench import LONG, SIZES, Size, llama_like, measure
from mod.study.machine import Machine
from mod.train import build

# Eight of its 32 layers, so that MoD, full computation and their gradients fit beside each other.
PAPER = Size("the paper's width, 8 layers",
             llama_like(dim=4096, depth=8, heads=32, kv_heads=8, head_dim=128, ffn_hidden=14336),
             frames=20, rows=1, contexts=LONG, turns=5)
PAPER_GIB = 30  # of memory that it takes
SMALL = Size("tiny",
             ModelConfig(image_size=16, grid=2, dim=24, depth=2, heads=2, kv_heads=1, head_dim=12, ffn_hidden=40),
             frames=2, rows=1, contexts=(20, 40), turns=1)


@dataclass(frozen=True)
class Trial:
    """Where to run, and whether it is only a rehearsal."""

    device: str
    quick: bool

    def machine(self, compile: bool) -> Machine:
        gpu = self.device == "cuda"
        return Machine(self.device, "bfloat16" if gpu else "float32", compile, "inductor" if gpu else "eager")

    def bench(self, compile: bool) -> dict:
        large = replace(SIZES[-1], contexts=LONG, turns=5)
        sizes = [large] if compile else [replace(SIZES[0], turns=5), large]  # compiling takes its time
        return measure(self.machine(compile), [SMALL] if self.quick else sizes, memory=self.device == "cuda")

    def width(self, compile: bool) -> dict:
        if self.device == "cuda" and not self.quick:
            free = torch.cuda.mem_get_info()[0] / 2**30
            require(free >= PAPER_GIB, f"got {free:.0f} GiB of free memory, expected {PAPER_GIB}; use a larger GPU")
        return measure(self.machine(compile), [SMALL if self.quick else PAPER], memory=self.device == "cuda")

    def tests(self) -> dict:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_gpu.py"]
        limit = PARTS["tests"][1] - 10  # before this process is ended, or pytest would go on alone
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        return {"last line": done.stdout.strip().splitlines()[-1], "code": done.returncode}

    def waits(self) -> dict[str, str]:
        """What makes the host wait for the device in a training step, a streamed frame and a streamed word."""
        config = Config()
        model, source = build(config, torch.device(self.device))
        clips = source.training(0)
        batch = clip_batch(source.words, clips, config.model).to(self.device)
        stream, frame = Stream(model, source.words), torch.as_tensor(clips[0].frames[:1])
        if self.device == "cuda":
            frame = frame.pin_memory()
        actions: dict[str, Callable] = {
            "training, forward": lambda: model(batch),
            "training, forward and backward": lambda: sum(model(batch)).backward(),
            "a streamed frame": lambda: stream.see(frame),
            "a streamed word": lambda: stream.feed([[source.words.eos]]),
        }
        return {name: self.watched(action) for name, action in actions.items()}

    def watched(self, action: Callable) -> str:
        """"nothing", or what CUDA says of the first thing that waits. The first call is not watched: it sets up."""
        action()
        if self.device != "cuda":
            return "nothing"
        torch.cuda.set_sync_debug_mode("error")
        try:
            action()
            return "nothing"
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")


# By name: title, time limit in seconds, what it does. The limits add up to eight minutes.
PARTS: dict[str, tuple[str, int, Callable[[Trial], dict]]] = {
    "tests": ("Tests", 100, Trial.tests),
    "waits": ("What waits for the device", 25, Trial.waits),
    "bench": ("As written", 65, lambda trial: trial.bench(False)),
    "compiled": ("Compiled", 130, lambda trial: trial.bench(True)),
    "width": ("The paper's width, as written", 50, lambda trial: trial.width(False)),
    "width compiled": ("The paper's width, compiled", 110, lambda trial: trial.width(True)),
}


def apart(part: str, trial: Trial) -> dict:
    """A part in a process of its own; {"failed": why} when nothing came of it."""
    limit = PARTS[part][1]
    command = [sys.executable, "-m", "mod.study.gpu", "--part", part, "--device", trial.device]
    command += ["--quick"] if trial.quick else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": said[-1]}


def report(results: dict) -> str:
    """The results as Markdown."""
    lines = [f"# {results['device']}", ""]
    for part, found in results["parts"].items():
        lines += [f"## {PARTS[part][0]}", ""]
        if "failed" in found:
            lines.append(f"Nothing was measured: {found['failed']}.")
        elif part == "tests":
            lines.append(f"`pytest tests/test_gpu.py`: {found['last line']}.")
        elif part == "waits":
            lines += [f"- {action}: {what}" for action, what in found.items()]
        else:
            lines.append(bench_report.report(found).rstrip())
        lines.append("")
    return "\n".join(lines)


def run(arguments) -> int:
    trial = Trial(arguments.device, arguments.quick)
    if arguments.part:
        print(to_json(PARTS[arguments.part][2](trial)))
        return 0
    results: dict = {"device": trial.machine(False).name, "parts": {}}
    print(f"{len(PARTS)} parts on {results['device']}, at most {sum(part[1] for part in PARTS.values()) // 60} minutes")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        results["parts"][part] = apart(part, trial)
        failed = results["parts"][part].get("failed")
        print(f"{part}: {f'failed, {failed}' if failed else 'done'}", flush=True)
        write_text(arguments.out / "gpu.json", to_json(results, indent=1) + "\n")
        write_text(arguments.out / "gpu.md", report(results))
    print(f"\n{report(results)}\nwrote {arguments.out / 'gpu'}.json and .md")
    if all("failed" in found for found in results["parts"].values()):
        raise UserError("no part worked; see above why")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu is a rehearsal (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help="do only this, here, and print what was found as JSON")
    arguments = parser.parse_args(argv)
    return run_script(lambda: run(arguments), "mod.study.gpu")


if __name__ == "__main__":
    sys.exit(main())
