"""Train variants of the model over seeds, resumably: finished runs are never repeated, cut-off ones are continued.

A run trains in a folder of its own; what it measured becomes one small file, RESULTS/NAME-SEED.json, with the
configuration in it. That file is what says that a run is finished, and it is all that the tables need.

All runs of a seed see the same clips in the same order, through the same frozen vision encoder, warmed up once a seed.
Each run is a process of its own with one thread: two at a time are faster than one with two threads.

    python -m mod.study.sweep OUT RESULT --config '{...}'     # one run; mod.study.ablate calls this
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from mod.checkpoint import config_from, load_weights, read_tensors, to_json, weights, write_tensors, write_text
from mod.config import Config, ModelConfig, UserError
from mod.data import Clip, vocabulary
from mod.evaluate import teacher_forced
from mod.flags import Parser, run_script
from mod.related import methods
from mod.study import routers
from mod.study.needle import probes
from mod.train import train, validation_clips, warm_up_vit
from mod.videollm import VideoLLM

# How a question begins: its kind. An answer after the last frame may be to a question asked before the first.
QUESTIONS = {"where is": "now", "where did": "past", "which spark": "spark", "which side": "side", "well ?": "ahead"}


@dataclass(frozen=True)
class Variant:
    """One row of a table: how its configuration differs from the study's, who routes ("oracle", "taught", or as the
    configuration says), and, for a pretrained decoder, which variant's trained weights it begins with. With `probed`
    its result says more, see mod/study/needle.py."""

    title: str
    model: dict = field(default_factory=dict)
    routers: str = ""
    data: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    start: str = ""
    probed: bool = False


def configure(base: Config, variant: Variant, seed: int) -> Config:
    return Config(
        model=replace(base.model, **variant.model),
        data=replace(base.data, **variant.data),
        train=replace(base.train, **variant.train, seed=seed),
    )


def encoder(config: Config, folder: Path) -> Path:
    """The file of a frozen vision encoder, warmed up if it is not there yet. Variants of a seed share it unless they
    differ in what it sees or in its own sizes."""
    own = {name: value for name, value in asdict(config.model).items() if name.startswith(("vit", "image", "patch"))}
    key = json.dumps([own, asdict(config.data), config.train.vit_steps, config.train.seed])
    path = folder / f"encoder-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.is_file():
        torch.manual_seed(config.train.seed)
        vit = VideoLLM(replace(ModelConfig(), **own)).vit  # the decoder of the default, whatever the variant's is
        # Always with two threads: another number adds up in another order, and ends with another encoder.
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        warm_up_vit(vit, config)
        torch.set_num_threads(threads)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, dict(vit.named_parameters()))
    return path


def build(model_config: ModelConfig, encoder_file: Path, kind: str, start: Path | None = None) -> VideoLLM:
    """A model with a trained encoder and, when `start` is given, all weights but the routers' from that dense run."""
    model = routers.build(model_config, kind) if kind else methods.build(model_config)
    if start:
        trained, own = read_tensors(start)[0], weights(model)
        new = {name: own[name] for name in own if ".router." in name}
        load_weights(
            model, new | {name: trained[name.replace(".block.", ".")] for name in own if name not in new}, start
        )
    load_weights(model.vit, read_tensors(encoder_file)[0], encoder_file)
    return model


def answers_by_kind(model: VideoLLM, clips: Sequence[Clip]) -> dict[str, float]:
    """Share of right answers for every kind of question, teacher-forced."""
    words, right = vocabulary(), {kind: [] for kind in QUESTIONS.values()}
    for turns, clip in zip(teacher_forced(model, words, clips)[0], clips, strict=True):
        asked = [say.text for say in clip.said if say.role == "user" and say.frame >= 0]
        for question, turn in zip(asked, [turn for turn in turns if turn.kind == "answer"], strict=True):
            right[QUESTIONS[" ".join(question.split()[:2])]].append(turn.exact)
    return {kind: sum(flags) / len(flags) for kind, flags in right.items() if flags}


def identity(config: Config, kind: str = "", start: str = "") -> dict:
    """All that makes a run what it is; `start` names the run that it begins with."""
    return {"config": asdict(config), "routers": kind, "start": start}


def wanted(base: Config, variant: Variant, seed: int) -> dict:
    """The identity of a variant's run."""
    return identity(configure(base, variant, seed), variant.routers, variant.start and f"{variant.start}-{seed}")


def same(path: Path, about: dict) -> bool:
    """Is the file there? Raises UserError when it is that of another run. A setting that did not exist when it was
    written has its default."""
    if not path.is_file():
        return False
    held = json.loads(path.read_text(encoding="utf-8"))
    if config_from(held["config"]) != config_from(about["config"]) or any(
        held[key] != about[key] for key in ("routers", "start")
    ):
        raise UserError(f"{path} is of a run with other settings than today's; move it and its run's folder away")
    return True


def write_result(file: Path, out: Path, about: dict, metrics: dict) -> None:
    """The file of a finished run: what it was, metrics, and curves from its log."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, to_json({**about, **metrics, "curve": list(curve(out))}) + "\n")


def curve(out: Path) -> Iterator[dict]:
    """Points of a run's log, rounded: LM loss and recall of a step's clips, which are never repeated, and narrations
    right on validation clips."""
    for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "train":
            recall = {layer: round(value, 3) for layer, value in entry["recall"].items()}
            yield {"step": entry["step"], "lm": round(entry["lm"], 4), "recall": recall}
        elif entry["kind"] == "eval":
            yield {"step": entry["step"], "narration": round(entry["narration_exact"], 4)}


def train_here(
    out: Path, file: Path, config: Config, kind: str = "", start: Path | None = None, probed: bool = False
) -> None:
    """Train one run in folder `out` in this process, and write its result to `file`."""
    about, note = identity(config, kind, start.parent.name if start else ""), out / "identity.json"
    if not same(note, about):
        if (out / "state.safetensors").exists():
            raise UserError(f"{out} holds a run that is not known; move it away and start again")
        out.mkdir(parents=True, exist_ok=True)
        write_text(note, to_json(about) + "\n")
    make = partial(build, encoder_file=encoder(config, out.parent), kind=kind, start=start)
    ready = replace(config, train=replace(config.train, vit_steps=0))
    model, metrics = train(ready, out, resume=True, build=make)
    if metrics is None:
        raise KeyboardInterrupt
    clips = validation_clips(config, config.train.eval_clips)
    if not same(file, about):  # a run that was repeated for others to start from leaves its result as it is
        write_result(
            file,
            out,
            about,
            {**metrics, "kinds": answers_by_kind(model, clips), **(probes(model, config) if probed else {})},
        )


def train_apart(
    out: Path, file: Path, config: Config, kind: str = "", start: Path | None = None, probed: bool = False
) -> None:
    """`train_here` in a process of its own, with one thread. Raises UserError, or RuntimeError, when it fails."""
    command = [sys.executable, "-m", "mod.study.sweep", str(out), str(file), "--config", json.dumps(asdict(config))]
    command += ["--routers", kind, *(["--start", str(start)] if start else []), *(["--probed"] * probed)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")


def sweep(
    runs: Path, results: Path, base: Config, variants: dict[str, Variant], names: Sequence[str], seeds: int, jobs: int
) -> None:
    """Train what is not there yet of the named variants, seed by seed, with an estimate of the time left; before them
    the encoders, so that no two runs make the same one, and the runs that others start from."""

    def job(name: str, seed: int) -> tuple:
        variant = variants[name]
        start = runs / f"{variant.start}-{seed}" / "model.safetensors" if variant.start else None
        out, file = runs / f"{name}-{seed}", results / f"{name}-{seed}.json"
        return out, file, configure(base, variant, seed), variant.routers, start, variant.probed

    asked = [(name, seed) for seed in range(seeds) for name in names]
    todo = [(name, seed) for name, seed in asked if not same(job(name, seed)[1], wanted(base, variants[name], seed))]
    starts = dict.fromkeys((variants[name].start, seed) for name, seed in todo if variants[name].start)
    first = [start for start in starts if not (job(*start)[0] / "model.safetensors").is_file()]
    todo = [one for one in todo if one not in first]
    number = len(first) + len(todo)
    print(f"{len(names)} variants x {seeds} seeds; {number} runs still to train, {jobs} at a time", flush=True)
    for one in [*first, *todo]:
        encoder(job(*one)[2], runs)
    began, done = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=number, unit="run", disable=None) as bar:
        for batch in (first, todo):
            waiting = [pool.submit(train_apart, *job(*each)) for each in batch]
            try:
                for one in as_completed(waiting):
                    one.result()
                    done += 1
                    bar.update()
                    left = (time.monotonic() - began) / done * (number - done)
                    tqdm.write(f"{done} of {number} runs, about {left / 60:.0f} minutes left")
            except BaseException:  # a run failed, or Ctrl-C: start no other; those that run end or are interrupted too
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def collect(results: Path, base: Config, variants: dict[str, Variant], seeds: int) -> dict[str, dict[str, dict]]:
    """What finished runs measured: variant -> seed -> metrics."""
    found: dict[str, dict[str, dict]] = {name: {} for name in variants}
    for name, variant in variants.items():
        for seed in range(seeds):
            file = results / f"{name}-{seed}.json"
            if same(file, wanted(base, variant, seed)):
                found[name][str(seed)] = json.loads(file.read_text(encoding="utf-8"))
    return found


def run(arguments) -> int:
    config = config_from(json.loads(arguments.config))
    train_here(arguments.out, arguments.result, config, arguments.routers, arguments.start, arguments.probed)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("result", type=Path, help="file of its result")
    parser.add_argument("--config", required=True, help="the whole configuration as JSON")
    parser.add_argument("--start", type=Path, help="weights of a dense run to begin with")
    parser.add_argument("--routers", choices=("", "oracle", "taught"), default="", help="routers of a study's own")
    parser.add_argument("--probed", action="store_true", help="measure longer clips and needles as well")
    return run_script(run, parser.parse_args(argv), "mod.study.sweep")


if __name__ == "__main__":
    sys.exit(main())
