"""Train variants of the model over seeds, resumably: finished runs are never repeated, cut-off ones go on.

A run trains in a folder of its own. What it measured becomes one small file, RESULTS/NAME-SEED.json, with the
configuration in it. That file says that a run is finished, and it is all that the tables need.

All runs of a seed and of the same data see the same clips in the same order, through the same frozen vision encoder,
which is warmed up once per seed; who begins with another run has its encoder. Each run is a process of its own with one
thread: two at a time are faster than one with two threads.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from mod.config import Config, ModelConfig, UserError, check, require
from mod.data import Clip, Source
from mod.evaluate import teacher_forced
from mod.related.narrowing import narrowed
from mod.run import config_from, find_world, load_weights, read_tensors, run_script, to_json, write_tensors, write_text
from mod.study import routers
from mod.study.costs import decoder_flops
from mod.train import train, warm_up_vit
from mod.videollm import VideoLLM

# How a question begins: its kind. An answer after the last frame may be to a question asked before the first.
QUESTIONS = {"where is the leader": "leader", "where is": "now",
             "where did": "past", "which spark": "spark", "which side": "side", "well ?": "ahead"}


@dataclass(frozen=True)
class Variant:
    """One row of a table: how its configuration differs from the study's, who routes ("once" or "shared", see
    mod/study/routers.py, or as the configuration says), and, for a pretrained decoder, which variant's trained weights
    it begins with. With `probed` its result says more, see mod/study/needle.py."""

    title: str
    model: dict = field(default_factory=dict)
    routers: str = ""
    data: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    start: str = ""
    probed: bool = False


@dataclass(frozen=True)
class Flags:
    """What every study asks for."""

    seeds: int = 5  # seeds 0 to this minus 1
    jobs: int = 2  # runs at a time, one core each

    def __post_init__(self):
        check(self, {"seeds": 1, "jobs": 1})


@dataclass(frozen=True)
class TrialFlags(Flags):
    """And what a long one asks for besides."""

    quick: bool = False  # two seeds of a few steps each, in a folder apart, to see that it works
    report: bool = False  # train nothing: write the table from the runs that are finished


@dataclass(frozen=True)
class Job:
    """One run: its folder, the file of its result, and all that makes the run what it is. `start` is the weights of a
    dense run to begin with."""

    out: Path
    file: Path
    config: Config
    routers: str = ""
    start: Path | None = None
    probed: bool = False

    @property
    def about(self) -> dict:
        """The identity of the run, which its result begins with."""
        config = {"world": self.config.world} | asdict(self.config)
        return {"config": config, "routers": self.routers, "start": self.start.parent.name if self.start else ""}


def configure(base: Config, variant: Variant, seed: int) -> Config:
    return replace(base, model=replace(base.model, **variant.model), data=replace(base.data, **variant.data),
                   train=replace(base.train, **variant.train, seed=seed))


def job_of(runs: Path, results: Path, base: Config, variants: dict[str, Variant], name: str, seed: int) -> Job:
    variant = variants[name]
    start = runs / f"{variant.start}-{seed}" / "model.safetensors" if variant.start else None
    return Job(runs / f"{name}-{seed}", results / f"{name}-{seed}.json", configure(base, variant, seed),
               variant.routers, start, variant.probed)


def encoder(config: Config, folder: Path) -> Path:
    """The file of a frozen vision encoder, warmed up if it is not there yet. The variants of a seed share it, unless
    they differ in what it sees or in its own sizes."""
    own = {name: value for name, value in asdict(config.model).items() if name.startswith(("vit", "image", "patch"))}
    key = json.dumps([own, asdict(config.data), config.train.vit_steps, config.train.seed])
    path = folder / f"encoder-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.is_file():
        _, source = find_world(config.world).build(config, torch.device("cpu"))
        torch.manual_seed(config.train.seed)
        vit = VideoLLM(replace(ModelConfig(), **own)).vit  # the decoder of the default, whatever the variant's is
        # Always with two threads: another number adds up in another order, and ends with another encoder.
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        warm_up_vit(vit, source, config.train)
        torch.set_num_threads(threads)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, dict(vit.named_parameters()))
    return path


def untrained(config: Config, kind: str) -> tuple[VideoLLM, Source]:
    """The model of a run, with routers of this kind if they are not the method's own, and its streams."""
    model, source = find_world(config.world).build(config, torch.device("cpu"))
    if kind:
        routers.equip(model, kind)
    return model, source


def finished(runs: Path, results: Path, name: str) -> Iterator[tuple[str, dict, VideoLLM, Source]]:
    """The runs of a variant that are finished and whose weights are here: seed, what it measured, model and streams."""
    for file in sorted(results.glob(f"{name}-[0-9]*.json")):
        weights = runs / file.stem / "model.safetensors"
        if weights.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            model, source = untrained(config_from(result["config"]), result["routers"])
            load_weights(model.weights(), read_tensors(weights)[0], weights)
            yield file.stem.removeprefix(f"{name}-"), result, model.eval(), source


def build(job: Job) -> tuple[VideoLLM, Source]:
    """The model of a run, with a warmed-up encoder or, when the run starts from a dense one, all of its weights but the
    routers'."""
    model, source = untrained(job.config, job.routers)
    if job.start:
        # A layer may be routed in one run and not in the other: its weights are then one name deeper.
        own = {name.replace(".block.", "."): weight for name, weight in model.weights().items()}
        trained = {name.replace(".block.", "."): weight for name, weight in read_tensors(job.start)[0].items()}
        load_weights(own, {name: (own if ".router." in name else trained)[name] for name in own}, job.start)
    else:
        file = encoder(job.config, job.out.parent)
        load_weights(dict(model.vit.named_parameters()), read_tensors(file)[0], file)
    return model, source


def mean_decoder_flops(config: Config, frames: int, text: float) -> float:
    """As `decoder_flops`, mean over the steps of a run, whose routed layers may begin dense and narrow down."""
    steps = config.train.steps
    return sum(decoder_flops(narrowed(config, step).model, frames, text) for step in range(steps)) / steps


def quick(base: Config) -> Config:
    """A study in a few steps of small batches: shows that everything works, says nothing about the method."""
    return replace(base, train=replace(base.train, steps=10, batch_size=4, vit_steps=20, eval_every=0, eval_clips=8))


def answers_by_kind(model: VideoLLM, source: Source, clips: Sequence[Clip]) -> dict[str, float]:
    """Share of right answers for every kind of question, teacher-forced."""
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTIONS.values()}

    def kind(question: str) -> str:
        return next(kind for opening, kind in QUESTIONS.items() if question.startswith(opening))

    for turns, clip in zip(teacher_forced(model, source.words, clips)[0], clips, strict=True):
        asked = [say.text for say in clip.said if say.role == "user" and say.frame >= 0]
        for question, turn in zip(asked, [turn for turn in turns if turn.kind == "answer"], strict=True):
            right[kind(question)].append(turn.exact)
    return {kind: sum(flags) / len(flags) for kind, flags in right.items() if flags}


def same(path: Path, about: dict) -> bool:
    """Is the file there? Raises UserError when it is that of another run. A setting that did not exist when it was
    written has its default."""
    if not path.is_file():
        return False
    held = json.loads(path.read_text(encoding="utf-8"))
    alike = config_from(held["config"]) == config_from(about["config"])
    require(alike and all(held[key] == about[key] for key in ("routers", "start")),
            f"{path} is of a run with other settings than today's; move it and its run's folder away")
    return True


def curve(out: Path) -> Iterator[dict]:
    """Points of a run's log, rounded: LM loss and recall of a step's clips, which are never repeated, and narrations
    right on validation clips."""
    for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "train":
            recall = {layer: round(value, 3) for layer, value in entry["recall"].items()}
            yield {"step": entry["step"], "lm": round(entry["lm"], 4), "recall": recall}
        elif entry["kind"] == "eval":
            yield {"step": entry["step"], "narration": round(entry["narration_exact"], 4),
                   "questions": round(entry["question_accuracy"], 4)}


def weights_of_start(job: Job) -> dict[str, str]:
    """A digest of the weights that the run starts with, empty if it starts with none. Raises UserError when the results
    have a run whose start had the same name and other weights, or the run itself began with others before it was cut
    off: another machine trains another decoder, and runs that are compared seed by seed must share theirs."""
    if not job.start:
        return {}
    mine = hashlib.sha256(job.start.read_bytes()).hexdigest()[:12]
    for file in (job.out / "identity.json", *sorted(job.file.parent.glob(f"*-{job.config.train.seed}.json"))):
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"start": ""}
        require(held["start"] != job.start.parent.name or held.get("weights of start", mine) == mine,
                f"{file} is of a run that started with other weights than today's {job.start}; move it away, with all "
                "that started as it did, to train them anew")
    return {"weights of start": mine}


def train_here(job: Job) -> None:
    """Train one run in this process, and write its result."""
    config, note, start = job.config, job.out / "identity.json", weights_of_start(job)
    if not same(note, job.about):
        require(not (job.out / "state.safetensors").exists(),
                f"{job.out} holds a run that is not known; move it away and start again")
        job.out.mkdir(parents=True, exist_ok=True)
        write_text(note, to_json(job.about | start) + "\n")
    model, source = build(job)
    ready = replace(config, train=replace(config.train, vit_steps=0))
    metrics = train(ready, job.out, model, source, resume=True, validate=find_world(config.world).validate)
    if metrics is None:
        raise KeyboardInterrupt
    if same(job.file, job.about):
        return  # a run that was repeated for others to start from leaves its result as it is
    metrics["kinds"] = answers_by_kind(model, source, source.validation(config.train.eval_clips))
    if job.probed:
        from mod.study.needle import probes  # with everything of the field
        metrics |= probes(model, source, config)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    result = {**job.about, **start, **metrics, "curve": list(curve(job.out))}
    write_text(job.file, to_json(result) + "\n")


def train_apart(job: Job) -> None:
    """`train_here` in a process of its own, with one thread. Raises UserError, or RuntimeError, when it fails."""
    told = job.about | {"start": str(job.start or ""), "out": str(job.out), "file": str(job.file), "probed": job.probed}
    command = [sys.executable, "-m", "mod.study.sweep", json.dumps(told)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(f"the run in {job.out} ended with {done.returncode}: {done.stderr[-500:]}")


def sweep(runs: Path, results: Path, base: Config, variants: dict[str, Variant], names: Sequence[str], seeds: int,
          jobs: int) -> None:
    """Train what is not there yet of the named variants, seed by seed, with an estimate of the time left. Before them
    the encoders, so that no two runs make the same one, and the runs that others start from."""

    def job(name: str, seed: int) -> Job:
        return job_of(runs, results, base, variants, name, seed)

    asked = [(name, seed) for seed in range(seeds) for name in names]
    todo = [one for one in asked if not same(job(*one).file, job(*one).about)]
    batches = [todo]
    while starts := dict.fromkeys((variants[name].start, seed) for name, seed in batches[0] if variants[name].start):
        first = [start for start in starts if not (job(*start).out / "model.safetensors").is_file()]
        batches = [first, *([one for one in batch if one not in first] for batch in batches)]
    number = sum(map(len, batches))
    print(f"{len(names)} variants x {seeds} seeds; {number} runs still to train, {jobs} at a time", flush=True)
    for one in chain(*batches):
        if not job(*one).start:
            encoder(job(*one).config, runs)
    began, done = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=number, unit="run", disable=None) as bar:
        for batch in batches:
            waiting = [pool.submit(train_apart, job(*each)) for each in batch]
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
    for name in variants:
        for seed in range(seeds):
            job = job_of(Path(), results, base, variants, name, seed)
            if same(job.file, job.about):
                found[name][str(seed)] = json.loads(job.file.read_text(encoding="utf-8"))
    return found


def trained(name: str, flags: TrialFlags, base: Config, variants: dict[str, Variant],
            names: Sequence[str] | None = None) -> tuple[Path, Config, dict[str, dict[str, dict]]]:
    """Do what the flags of the study `name` ask for: train what is not there yet, of all variants or of `names`, unless
    it is to report alone. Returns the folder of results, the configuration that the runs differ from, and what is
    finished: variant -> seed -> metrics. Raises UserError when nothing is."""
    runs, results, seeds = Path("runs") / name, Path("results") / name, flags.seeds
    if flags.quick:
        runs, base, seeds = Path("runs") / f"{name}-quick", quick(base), min(seeds, 2)
        results, variants = runs / name, {each: replace(one, train={}) for each, one in variants.items()}
    if not flags.report:
        sweep(runs, results, base, variants, list(variants) if names is None else names, seeds, flags.jobs)
    found = {each: some for each, some in collect(results, base, variants, seeds).items() if some}
    require(found, f"no finished run in {results}; train first, without --report")
    return results, base, found


def chosen(only: str, variants: dict[str, Variant]) -> list[str]:
    """The variants that a flag asks for, names with commas between; all if it is empty. Raises UserError for others."""
    names = only.split(",") if only else list(variants)
    for name in names:
        require(name in variants, f"only got {name!r}, expected names among {', '.join(variants)}")
    return names


def read_off(results: dict[str, dict[str, dict]], measures: dict[str, Callable]) -> dict[str, dict[str, dict]]:
    """`results` (variant -> seed -> metrics) column by column: variant -> measure -> seed -> value."""
    return {name: {measure: {seed: read(run) for seed, run in found.items()} for measure, read in measures.items()}
            for name, found in results.items()}


def main() -> int:
    """What `train_apart` calls: the one argument is a job as JSON."""
    told = json.loads(sys.argv[1])
    paths = {name: Path(told[name]) if told[name] else None for name in ("out", "file", "start")}
    train_here(Job(config=config_from(told["config"]), routers=told["routers"], probed=told["probed"], **paths))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, "mod.study.sweep"))
