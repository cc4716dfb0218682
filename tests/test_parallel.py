"""Two processes (gloo, on the CPU) train what one does: the same losses, one writer, resumable on another number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mod.train as module
import train_tiny
from mod.run import read_tensors

ROOT = Path(__file__).parents[1]
RUN = ["--steps", "20", "--batch-size", "4", "--vit-steps", "4", "--frames", "3", "--eval-clips", "4", "--eval-every", "10",
       "--save-every", "10", "--log-every", "5", "--optimizer", "adamw", "--device", "cpu"]


def torchrun(*arguments, script: str = "train_tiny.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").open()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train_tiny.main([*RUN, "--out", str(out)]) == 0
    return out


def assert_same_training(one: Path, two: Path) -> None:
    first, second = log(one), log(two)
    assert [(entry["kind"], entry["step"]) for entry in first] == [(entry["kind"], entry["step"]) for entry in second]
    for before, after in zip(first, second, strict=True):
        for key in ("loss", "lm", "stream", "gnorm", "lm_ppl"):
            if key in before:
                assert after[key] == pytest.approx(before[key], rel=2e-3), (before["step"], key)
    weights = [read_tensors(out / "model.safetensors")[0] for out in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("more", [[], ["--fsdp", "--accumulate", "2"]], ids=["copied", "split-in-parts"])
def test_two_processes_train_what_one_does(alone, tmp_path, more):
    done = torchrun(*RUN, *more, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_training(alone, tmp_path / "run")
    assert done.stdout.count("wrote") == 1 and done.stdout.count("teacher-forced") == 1, "the first process alone speaks"
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_resumed_on_another_number_of_processes(alone, tmp_path, monkeypatch):
    """One process is cut off after step 12, two go on from step 10, with split weights: the run is that of one."""
    out, before = tmp_path / "run", module.train_step

    def cut_off(*parts):
        if parts[-2] == 12:
            raise KeyboardInterrupt
        return before(*parts)

    monkeypatch.setattr(module, "train_step", cut_off)
    assert train_tiny.main([*RUN, "--out", str(out)]) == 130
    done = torchrun("--resume", "--fsdp", "--out", str(out))
    assert done.returncode == 0 and "resumed at step 10" in done.stdout, done.stderr[-2000:]
    assert_same_training(alone, out)


def test_split_is_split(tmp_path):
    """With --fsdp every parameter is in pieces, of which each process holds one."""
    script = tmp_path / "split.py"
    script.write_text("""
from torch.distributed.tensor import DTensor
from mod.config import ModelConfig, TrainConfig
from mod.parallel import Processes
from mod.videollm import VideoLLM
engine = Processes(TrainConfig(device="cpu"))
model = VideoLLM(ModelConfig())
engine.wrap(model, split=True)
assert engine.world == 2 and all(isinstance(p, DTensor) for p in model.parameters())
weight = model.decoder.layers[0].mlp.up.weight
assert 2 * weight.to_local().numel() == weight.numel() == engine.whole(weight).numel()
assert engine.total([1.0, float(engine.rank)]) == [2.0, 1.0]
""")
    done = torchrun(script=str(script))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_mistake_is_told_and_nothing_is_written(tmp_path):
    done = torchrun(*RUN, "--batch-size", "1", "--out", str(tmp_path / "run"))
    assert done.returncode != 0 and "1 clips cannot be shared by 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
