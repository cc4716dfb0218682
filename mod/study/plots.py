"""Pictures of a run and of a stream. Colours are told apart by colour-blind readers (Okabe and Ito's palette).

    python -m mod.study.plots                          # of runs/tiny, into its folder; under a minute on a CPU core
    python -m mod.study.plots --checkpoint runs/mine --out pictures --frames 1000

draws, from any run, how it learned (curve.png), what its layers keep (keeps.png), how its routers score (scores.png),
what it costs (cost.png) and how long a frame takes (latency.png). The last four are drawn by looks.py.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from einops import rearrange
from matplotlib.figure import Figure  # not pyplot: no global state, no window, any machine
from matplotlib.patches import Rectangle

from mod.checkpoint import to_json, write_text
from mod.config import ModelConfig, UserError
from mod.decoder import Routing
from mod.flags import Parser, run_script

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
LAYERS = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"))  # of the routed layers, in turn


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a temporary name, then rename."""
    temporary = path.with_name(path.stem + ".tmp" + path.suffix)
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, path)


def publish(path: Path, results: dict, text: str, plot: Callable[[dict, Path], None]) -> None:
    """Write a study's results beside each other: as JSON, as Markdown, and drawn; then print the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".json"), to_json(results, indent=1) + "\n")
    write_text(path.with_suffix(".md"), text)
    plot(results, path.with_suffix(".png"))
    print(f"{text}\nwrote {path}.json, .md and .png")


def read_log(folder: Path) -> list[dict]:
    """The entries of a run's log. Raises UserError when it is missing or damaged."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing, so nobody knows how this run learned; put it back or train again")
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(entry, dict) and "kind" in entry for entry in entries):
            raise ValueError("a line is no entry")
        return entries
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy or train again") from error


def plot_curve(folder: Path) -> None:
    """curve.png of a run, from its log."""
    save(curve(folder), folder / "curve.png")


def curve(folder: Path) -> Figure:
    """Losses, validation accuracies and what the routers keep, step by step, from the run's log."""
    entries = read_log(folder)
    model = ModelConfig(**json.loads((folder / "config.json").read_text())["model"])
    train = [entry for entry in entries if entry["kind"] == "train"]
    evals = [entry for entry in entries if entry["kind"] == "eval"]
    figure = Figure(figsize=(14, 4), layout="constrained")
    loss, accuracy, recall = figure.subplots(1, 3)
    for key, label, colour, dashes in (
        ("lm", "text (LM loss)", BLUE, "-"),
        ("stream", "speak or stay silent (streaming loss)", ORANGE, "--"),
    ):
        loss.plot([e["step"] for e in train], [e[key] for e in train], dashes, color=colour, marker=".", label=label)
    loss.set(title="Training loss", xlabel="step", ylabel="cross-entropy per label (nats)", yscale="log")
    names = (("narration_exact", "narrations right", BLUE, "o"), ("question_accuracy", "answers right", GREEN, "s"),
             ("speak_accuracy", "speaks when it should", VERMILION, "^"),
             ("silence_accuracy", "silent when it should", PURPLE, "v"))  # fmt: skip
    for key, label, colour, marker in names:
        accuracy.plot([e["step"] for e in evals], [e[key] for e in evals], color=colour, marker=marker, label=label)
    accuracy.set(title="Validation, teacher-forced", xlabel="step", ylabel="share right", ylim=(-0.02, 1.05))
    for number, layer in enumerate(evals[-1]["recall"] if evals and train else ()):
        points, (colour, dashes) = [e for e in train if layer in e["recall"]], LAYERS[number % len(LAYERS)]
        recall.plot([e["step"] for e in points], [e["recall"][layer] for e in points], dashes, color=colour,
                    marker=".", label=f"layer {layer}")  # fmt: skip
        chance = model.kept[int(layer)] / model.frame_tokens
        recall.axhline(chance, color="grey", linestyle="--", label="chance" if number == 0 else None)
    recall.set(title="Sprite patches that the routers keep", xlabel="step", ylabel="share kept", ylim=(-0.02, 1.05))
    loss.set_visible(bool(train))  # an untrained run has none
    recall.set_visible(recall.has_data())  # in real videos nobody knows where to look, and a dense model keeps all
    for axis in (loss, accuracy, recall):
        axis.grid(alpha=0.3)
        if axis.get_visible() and axis.has_data():
            axis.legend(fontsize=8)
    return figure


def plot_stream(
    path: Path, frames: np.ndarray, trace: list[Routing], captions: list[str], times: list[float], config: ModelConfig
) -> None:
    """The frames of a stream in a row; below, for each routed layer, the same frames with skipped patches darkened.

    frames (F, 3, side, side) in [-1, 1]; trace holds one Routing per frame and routed layer; one caption a frame.
    """
    layers = sorted({routing.layer for routing in trace})
    kept = {layer: np.concatenate([r.kept.cpu().numpy() for r in trace if r.layer == layer]) for layer in layers}
    pictures = rearrange((frames + 1) / 2, "f c h w -> f h w c")
    figure = Figure(figsize=(1.5 * len(frames) + 0.6, 1.7 * (1 + len(layers)) + 1.0), layout="constrained")
    axes = figure.subplots(1 + len(layers), len(frames), squeeze=False)
    side = pictures.shape[1]
    for t, picture in enumerate(pictures):
        axes[0, t].imshow(picture)
        axes[0, t].set_title(f"{times[t]:g} s", fontsize=9)
        for row, layer in enumerate(layers, start=1):
            mask = rearrange(kept[layer][t, 1:], "(h w) -> h w", h=config.grid)
            edge = np.linspace(0, side, config.grid + 1).round().astype(int)
            shade = np.repeat(np.repeat(mask, np.diff(edge), axis=0), np.diff(edge), axis=1)[..., None]
            axes[row, t].imshow(np.where(shade, picture, 0.25 * picture))
            for y, x in zip(*mask.nonzero(), strict=True):
                (left, right), (top, bottom) = edge[x : x + 2], edge[y : y + 2]
                axes[row, t].add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False,
                                                 edgecolor=ORANGE, linewidth=1.2))  # fmt: skip
        axes[-1, t].set_xlabel(captions[t], fontsize=7)
        for row in range(1 + len(layers)):
            axes[row, t].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("what it sees", fontsize=9)
    for row, layer in enumerate(layers, start=1):
        axes[row, 0].set_ylabel(f"layer {layer} keeps", fontsize=9)
    explained = (
        ": framed patches go through the routed layer (the CLS token, not drawn, may be one of the kept), dark ones "
        "skip it; below, what was said"
    )
    title = "A stream, frame by frame" if len(frames) > 4 else "A stream"
    figure.suptitle(title + (explained if layers and len(frames) > 4 else ""), fontsize=10)
    save(figure, path)


def run(arguments) -> int:
    # Only here: the scripts import this module for one picture, and looks.py imports it.
    from mod.study.looks import Look
    from mod.train import pick_device

    folder, out = arguments.checkpoint, arguments.out or arguments.checkpoint
    if arguments.frames < 1:
        raise UserError(f"--frames got {arguments.frames}, expected at least 1; ask for more")
    device = pick_device(arguments.device, arguments.dtype)
    look = Look.at_run(folder, device, arguments.dtype)
    figures = {"curve": curve(folder)}  # first, as it says at once when the log is damaged
    out.mkdir(parents=True, exist_ok=True)
    seconds = look.estimate_seconds(arguments.frames)
    print(f"5 figures of {folder}: {len(look.clips)} clips are looked at, then {arguments.frames} frames streamed; "
          f"about {seconds:.0f} s on {device}", flush=True)  # fmt: skip
    figures |= look.figures(read_log(folder), arguments.frames)
    for name, figure in figures.items():
        save(figure, out / f"{name}.png")
        print(f"wrote {out / name}.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="mod.study.plots",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/tiny"), help="folder of a trained run")
    parser.add_argument("--out", type=Path, help="folder of the pictures; the run's if not given")
    parser.add_argument("--frames", type=int, default=300, help="length of the stream whose frames are timed")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the weights")
    return run_script(run, parser.parse_args(argv), "mod.study.plots")


if __name__ == "__main__":
    sys.exit(main())
