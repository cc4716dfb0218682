"""What do layers look at while they learn? Attention to the sprite that is asked for, by layer, over training.

    python -m mod.study.first_look                # 4 patterns, 2 seeds each, one run after the other: half an hour
    python -m mod.study.first_look --steps 200    # shorter runs, in results of their own
    python -m mod.study.first_look --report       # train nothing: draw the runs that are finished

The crowd of one look ("where is the red-disc ?", "red-disc left"), from scratch, routed from the first step on: so the
pattern of routed layers decides what can be learned first. The word "red-disc" of an answer predicts the side, so it
must look at the patch that shows the red disc. Its attention to this patch is a share of all its attention, of the
head in which it is largest in the mean over questions. Finished runs are kept in results/first_look. Writes
results/first_look.json, .md and .png.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mod.config import check, require
from mod.data import SHAPES, Clip, Source, clip_batch
from mod.layout import NO_LABEL, TEXT, Vocabulary, lay_out
from mod.live.picture import save
from mod.related.crowd import NAME_WORDS
from mod.related.world import RelatedRun
from mod.related.world import validate as usual
from mod.run import to_json, write_text
from mod.study.common import LAYERS, command, markdown, publish
from mod.study.crowd import PRESET
from mod.study.sweep import Job, Variant, build, job_of, same
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
class Flags:
    seeds: int = 2  # seeds 0 to this minus 1
    steps: int = 600  # of each run
    every: int = 25  # steps between two looks
    report: bool = False  # train nothing: draw the runs that are finished

    def __post_init__(self):
        check(self, {"seeds": 1, "steps": 1, "every": 1})


def asked(words: Vocabulary, clip: Clip, frame_tokens: int) -> Iterator[tuple[int, int]]:
    """Of each answer "<assistant> red-disc left": the positions of "red-disc" and of the patch that shows it."""
    layout = lay_out(words, len(clip.frames), frame_tokens, clip.said)
    names = {words.ids[name]: number for number, name in enumerate(NAME_WORDS)}
    labels = clip.patch_labels  # colour and shape from 1
    shown = (labels[..., 0] - 1) * len(SHAPES) + labels[..., 1] - 1
    for at, (before, token) in enumerate(zip(layout.ids, layout.ids[1:], strict=False), start=1):
        if before == words.assistant and layout.frame[at] == TEXT and layout.labels[at] != NO_LABEL and token in names:
            frame = max(layout.frame[:at])
            [where] = np.flatnonzero((shown[frame] == names[token]) & (labels[frame][:, 0] > 0))
            yield at, layout.frame.index(frame) + 1 + int(where)  # behind the frame's CLS token


@contextmanager
def watched() -> Iterator[list[Tensor]]:
    """While this lasts, the causal attention of each layer that runs is collected, (B, H, K, K)."""
    seen: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def watching(q: Tensor, k: Tensor, v: Tensor, *args, is_causal: bool = False, **options) -> Tensor:
        if is_causal:
            groups = q.shape[1] // k.shape[1]
            scores = q @ k.repeat_interleave(groups, 1).mT / q.shape[-1] ** 0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            seen.append(scores.masked_fill(later, -torch.inf).softmax(-1))
        return attend(q, k, v, *args, is_causal=is_causal, **options)

    with patch.object(F, "scaled_dot_product_attention", watching):
        yield seen


@torch.inference_mode()
def attention_to_the_asked(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip]) -> list[float]:
    """Of each layer: the share of its attention that the word of an answer pays to the patch that shows whom it names,
    in the head with the largest, mean over questions. A patch that the layer skips gets none."""
    config, trace = model.config, []
    batch = clip_batch(words, clips, config)
    with watched() as weights:
        model.predict(batch, trace)
    kept = {routing.layer: routing.kept for routing in trace}
    shares = []
    for layer, attention in enumerate(weights):
        found, first = [], 0
        for row, clip in enumerate(clips):
            enters = torch.ones(batch.ids.shape[1], dtype=torch.bool)
            if layer in kept:
                vision = batch.plan.vision[first : first + len(clip.frames)] - row * batch.ids.shape[1]
                enters[vision] = kept[layer][first : first + len(clip.frames)]
            first += len(clip.frames)
            places = enters.cumsum(0) - 1  # in the short row, which keeps the order of time
            found += [attention[row, :, places[word], places[sprite]] * enters[sprite]
                      for word, sprite in asked(words, clip, config.frame_tokens)]
        shares.append(torch.stack(found).mean(0).max().item())
    return shares


def looking(model: VideoLLM, config: RelatedRun, source: Source, number: int, free: bool = False) -> dict:
    """As a run of the preset validates, and where its layers look."""
    metrics = usual(model, config, source, number, free)
    model.eval()
    metrics["attention"] = attention_to_the_asked(model, source.words, source.validation(CLIPS))
    model.train()
    return metrics


def train_and_look(job: Job) -> None:
    model, source = build(job)
    ready = replace(job.config, train=replace(job.config.train, vit_steps=0))
    if train(ready, job.out, model, source, resume=True, validate=looking) is None:
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
    out, curves = Path("results") / name if usual_length else Path("runs") / name / "results", {}
    for seed in range(flags.seeds):
        for each in VARIANTS:
            job = job_of(Path("runs") / name, out, base, VARIANTS, each, seed)
            if not flags.report and not same(job.file, job.about):
                train_and_look(job)
            if same(job.file, job.about):
                curves.setdefault(each, {})[str(seed)] = json.loads(job.file.read_text(encoding="utf-8"))["curve"]
    require(curves, f"no finished run in {out}; train first, without --report")
    data = {"steps": flags.steps, "curves": curves}
    publish(out, data, report(data), plot)
    return 0


main = command("mod.study.first_look", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
