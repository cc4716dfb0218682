"""What do layers look at while they learn? Attention to the sprite that is asked for, by layer, over training.

    python -m mod.study.first_look                # 2 seeds of each of 4 patterns, two runs at a time
    python -m mod.study.first_look --steps 200    # shorter runs, in results of their own
    python -m mod.study.first_look --report       # train nothing: draw the runs that are finished

The crowd of one look ("where is the red-disc ?", "red-disc left"), from scratch, routed from the first step on: so the
pattern of routed layers decides what can be learned first. The word "red-disc" of an answer predicts the side, so it
must look at the patch that shows the red disc. Its attention to this patch is a share of all its attention, of the
head in which it is largest in the mean over questions. Finished runs are kept in results/first_look. Writes
results/first_look.json, .md and .png.
"""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from mod.config import check, require
from mod.data import Source
from mod.live.picture import save
from mod.related.world import RelatedRun
from mod.related.world import validate as usual
from mod.run import to_json, write_text
from mod.study.attention import asked, shares
from mod.study.common import LAYERS, command, markdown, publish
from mod.study.crowd import PRESET
from mod.study.sweep import Flags as SweepFlags
from mod.study.sweep import Job, Variant, build, collect, encoder, job_of, same
from mod.train import train
from mod.videollm import VideoLLM

VARIANTS = {
    "full": Variant("full computation", {"layers": "none"}),
    "odd": Variant("layers 1 and 3 routed", {"layers": "1,3"}),
    "even": Variant("layers 0 and 2 routed", {"layers": "0,2"}),
    "all": Variant("all layers routed", {"layers": "all"}),
}
CLIPS = 16  # whose questions are looked at


@dataclass(frozen=True)
class Flags(SweepFlags):
    seeds: int = 2  # seeds 0 to this minus 1
    steps: int = 600  # of each run
    every: int = 25  # steps between two looks
    report: bool = False  # train nothing: draw the runs that are finished

    def __post_init__(self):
        super().__post_init__()
        check(self, {"steps": 1, "every": 1})


def looking(model: VideoLLM, config: RelatedRun, source: Source, number: int, free: bool = False) -> dict:
    """As a run of the preset validates, and where its layers look."""
    metrics = usual(model, config, source, number, free)
    model.eval()
    paid = shares(model, source.words, source.validation(CLIPS), asked)  # (layers, one group, heads)
    metrics["attention"] = paid[:, 0].amax(1).tolist()
    model.train()
    return metrics


def train_and_look(job: Job) -> None:
    """One run, in a process of its own, and silently: two bars at a time would be a mess."""
    model, source = build(job)
    ready = replace(job.config, train=replace(job.config.train, vit_steps=0))
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        metrics = train(ready, job.out, model, source, resume=True, validate=looking)
    if metrics is None:
        raise KeyboardInterrupt
    entries = map(json.loads, (job.out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    curve = [{"step": entry["step"], "questions": entry["question_accuracy"], "attention": entry["attention"]}
             for entry in entries if entry["kind"] == "eval"]
    job.file.parent.mkdir(parents=True, exist_ok=True)
    write_text(job.file, to_json(job.about | {"curve": curve}) + "\n")


def report(data: dict) -> str:
    rows = {}
    for name, found in data["curves"].items():
        for seed, curve in found.items():
            good = next((str(point["step"]) for point in curve if point["questions"] >= 0.9), "-")
            last = curve[-1]
            rows[f"`{name}` {VARIANTS[name].title}, seed {seed}"] = {
                f"layer {layer}": f"{share:.2f}" for layer, share in enumerate(last["attention"])} | {
                "questions right": f"{last['questions']:.3f}", "steps to 0.9": good}
    return (f"After {data['steps']} steps: attention of an answer's word to the sprite that it names, by layer, "
            f"and questions of one look that are answered right.\n\n"
            f"{markdown(pd.DataFrame.from_dict(rows, orient='index'))}")


def plot(data: dict, path: Path) -> None:
    """A row per seed and a panel per pattern: attention by layer, and what is answered, over training."""
    seeds = sorted({seed for found in data["curves"].values() for seed in found})
    figure = Figure(figsize=(3.1 * len(data["curves"]) + 0.6, 2.8 * len(seeds) + 0.8), layout="constrained")
    axes = figure.subplots(len(seeds), len(data["curves"]), squeeze=False, sharex=True, sharey=True)
    for column, (name, found) in zip(axes.T, data["curves"].items(), strict=True):
        for seed, axis in zip(seeds, column, strict=True):
            curve = found.get(seed, [])
            steps = [point["step"] for point in curve]
            for layer, (colour, dashes) in zip(range(PRESET.model.depth), LAYERS, strict=False):
                axis.plot(steps, [point["attention"][layer] for point in curve], color=colour, linestyle=dashes,
                          label=f"layer {layer}")
            axis.plot(steps, [point["questions"] for point in curve], color="black", lw=1, label="questions right")
            axis.set(title=f"{VARIANTS[name].title}, seed {seed}", ylim=(0, 1.02))
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.3)
        column[-1].set_xlabel("training step")
    for row in axes:
        row[0].set_ylabel("share")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle("Attention of an answer's word to the sprite that it names (colours), and questions right (black)")
    save(figure, path)


def run(flags: Flags) -> int:
    settings = replace(PRESET.train, steps=flags.steps, dense_steps=0, narrow_steps=0, eval_every=flags.every)
    base, usual_length = replace(PRESET, train=settings), flags.steps == Flags.steps
    name = "first_look" if usual_length else f"first_look-{flags.steps}"
    out = Path("results") / name if usual_length else Path("runs") / name / "results"
    jobs = [job_of(Path("runs") / name, out, base, VARIANTS, each, seed)
            for seed in range(flags.seeds) for each in VARIANTS]
    todo = [] if flags.report else [job for job in jobs if not same(job.file, job.about)]
    for job in todo:
        encoder(job.config, job.out.parent)  # before, so that no two runs make the same one
    with ProcessPoolExecutor(flags.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for _ in tqdm(pool.map(train_and_look, todo), total=len(todo), unit="run", disable=None):
            pass
    found = collect(out, base, VARIANTS, flags.seeds)
    curves = {each: {seed: run["curve"] for seed, run in some.items()} for each, some in found.items() if some}
    require(curves, f"no finished run in {out}; train first, without --report")
    data = {"steps": flags.steps, "curves": curves}
    publish(out, data, report(data), plot)
    return 0


main = command("mod.study.first_look", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
