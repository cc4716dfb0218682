"""Pictures of a run. Colours are those that colour-blind readers can tell apart (Okabe and Ito's palette).

    python -m mod.study.plots                          # of runs/tiny, into its folder; under a minute on a CPU core
    python -m mod.study.plots --checkpoint runs/mine --out pictures --frames 1000

draws, from any run, how it learned (curve.png), what its layers keep (keeps.png), how its routers score (scores.png),
what it costs (cost.png) and how long a frame takes (latency.png). The last four are drawn by looks.py.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no global state, no window, any machine

from mod.config import UserError, require
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.run import Parser, pick_device, read_config, run_script
from mod.study.common import LAYERS, PURPLE
from mod.study.looks import Look


def read_log(folder: Path) -> list[dict]:
    """The entries of a run's log. Raises UserError when it is missing or damaged."""
    path = folder / "log.jsonl"
    require(path.is_file(), f"{path} is missing, so nobody knows how this run learned; put it back or train again")
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(entry, dict) and "kind" in entry for entry in entries):
            raise ValueError("a line is no entry")
        return entries
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy or train again") from error


def curve(folder: Path) -> Figure:
    """Losses, validation accuracies and what the routers keep, step by step, from the run's log. Raises UserError when
    the log is missing or damaged."""
    try:
        return drawn(folder)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        told = f"{folder / 'log.jsonl'} has an entry of an unexpected kind ({error}); restore it or train again"
        raise UserError(told) from error


def drawn(folder: Path) -> Figure:
    entries, model = read_log(folder), read_config(folder).model
    train = [entry for entry in entries if entry["kind"] == "train"]
    evals = [entry for entry in entries if entry["kind"] == "eval"]
    figure = Figure(figsize=(14, 4), layout="constrained")
    loss, accuracy, recall = figure.subplots(1, 3)
    for key, label, colour, dashes in (("lm", "text (LM loss)", BLUE, "-"),
                                       ("stream", "speak or stay silent (streaming loss)", ORANGE, "--")):
        loss.plot([e["step"] for e in train], [e[key] for e in train], dashes, color=colour, marker=".", label=label)
    loss.set(title="Training loss", xlabel="step", ylabel="cross-entropy per label (nats)", yscale="log")
    names = (("narration_exact", "narrations right", BLUE, "o"), ("question_accuracy", "answers right", GREEN, "s"),
             ("speak_accuracy", "speaks when it should", VERMILION, "^"),
             ("silence_accuracy", "silent when it should", PURPLE, "v"))
    for key, label, colour, marker in names:
        accuracy.plot([e["step"] for e in evals], [e[key] for e in evals], color=colour, marker=marker, label=label)
    accuracy.set(title="Validation, teacher-forced", xlabel="step", ylabel="share right", ylim=(-0.02, 1.05))
    for number, layer in enumerate(evals[-1]["recall"] if evals and train else ()):
        points, (colour, dashes) = [e for e in train if layer in e["recall"]], LAYERS[number % len(LAYERS)]
        recall.plot([e["step"] for e in points], [e["recall"][layer] for e in points], dashes, color=colour,
                    marker=".", label=f"layer {layer}")
        chance = model.keep_counts[int(layer)] / model.frame_tokens
        recall.axhline(chance, color="grey", linestyle="--", label="chance" if number == 0 else None)
    recall.set(title="Sprite patches that the routers keep", xlabel="step", ylabel="share kept", ylim=(-0.02, 1.05))
    loss.set_visible(bool(train))  # an untrained run has none
    recall.set_visible(recall.has_data())  # in real videos nobody knows where to look, and a dense model keeps all
    for axis in (loss, accuracy, recall):
        axis.grid(alpha=0.3)
        if axis.get_visible() and axis.has_data():
            axis.legend(fontsize=8)
    return figure


def run(arguments) -> int:
    folder, out = arguments.checkpoint, arguments.out or arguments.checkpoint
    require(arguments.frames >= 1, f"--frames got {arguments.frames}, expected at least 1; ask for more")
    device = pick_device(arguments.device, arguments.dtype)
    look = Look.at_run(folder, device, arguments.dtype)
    figures = {"curve": curve(folder)}  # first, as it says at once when the log is damaged
    out.mkdir(parents=True, exist_ok=True)
    print(f"5 figures of {folder}: {len(look.clips)} clips are looked at, then {arguments.frames} frames are streamed, "
          f"on {device}", flush=True)
    figures |= look.figures(read_log(folder), arguments.frames)
    for name, figure in figures.items():
        save(figure, out / f"{name}.png")
        print(f"wrote {out / name}.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.plots", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("runs/tiny"), help="folder of a trained run (default: %(default)s)")
    add("--out", type=Path, help="folder of the pictures; the run's if not given")
    add("--frames", type=int, default=300, help="length of the stream whose frames are timed (default: %(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run (default: %(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return run_script(lambda: run(arguments), "mod.study.plots")


if __name__ == "__main__":
    sys.exit(main())
