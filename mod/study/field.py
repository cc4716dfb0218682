"""The field side by side: every system of mod/related trained with equal steps, data and seeds, and what comes out.

`python -m mod.study.ablate --table field` calls this. What a run measured is one file in results/field; the table,
results/field.md, .json and .png, is made from those files, and from times taken side by side on the machine it runs on.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from mod.checkpoint import load_weights, read_tensors, to_json, write_text
from mod.config import Config, ModelConfig, UserError
from mod.data import clip_batch, clip_pixels, make_clip, vocabulary
from mod.related import methods
from mod.related.methods import METHODS
from mod.stream import Stream
from mod.study.ablate_report import judge, mean_and_error, mean_error
from mod.study.machine import Machine, ratio, side_by_side
from mod.study.needle import DEPTHS, LENGTHS, LONG
from mod.study.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, publish, save
from mod.study.sweep import Variant, collect, sweep
from mod.train import step_clips
from mod.videollm import VideoLLM, stream_loss

ENTRY = 2 * 4  # bytes of a key and a value in float32, for each of their numbers
TURNS = 5  # of a side by side comparison
WATCHED = 24  # frames that a stream has seen when the latency of the next one is taken


def variants(base: Config) -> dict[str, Variant]:
    """A variant for every method: what it changes in the configuration."""
    plain = asdict(base.model)
    changes = {name: asdict(methods.configure(base.model, name)) for name in METHODS}
    return {
        name: Variant(METHODS[name].title, {k: v for k, v in change.items() if v != plain[k]}, probed=True)
        for name, change in changes.items()
    }


def mean_of(*parts: float | None) -> float | None:
    return statistics.mean(parts) if all(part is not None for part in parts) else None


def needle(run: dict, frames: int) -> float:
    """Share of needles found in haystacks of so many frames, over all depths."""
    return statistics.mean(run["needle"][str(frames)].values())


def quality(run: dict) -> float | None:
    """One number for the picture: mean of narrations, questions about the present and the past, and timing."""
    return mean_of(*(MEASURES[name](run) for name in ("narration", "present", "past", "timing")))


# How a column is read off the result of a run; shares of what is right.
MEASURES: dict[str, Callable[[dict], float | None]] = {
    "quality": quality,
    "narration": lambda run: run["narration_exact"],
    "present": lambda run: mean_of(run["kinds"]["now"], run["kinds"]["side"]),
    "past": lambda run: mean_of(run["kinds"]["past"], run["kinds"]["spark"]),
    "timing": lambda run: mean_of(run["speak_accuracy"], run["silence_accuracy"]),
    "streamed": lambda run: run["free_running"]["narration_exact"] if "free_running" in run else None,
    "now": lambda run: run["kinds"]["now"],
    "side": lambda run: run["kinds"]["side"],
    "appeared": lambda run: run["kinds"]["past"],
    "spark": lambda run: run["kinds"]["spark"],
    "ahead": lambda run: run["kinds"]["ahead"],
    "square": lambda run: run["square"]["narration_exact"],
    "wide": lambda run: run["wide"]["narration_exact"],
    "longer": lambda run: run["long"]["narration_exact"],
    "longer, questions": lambda run: run["long"]["question_accuracy"],
    **{f"needle in {frames}": (lambda run, frames=frames: needle(run, frames)) for frames in LENGTHS},
    "tokens": lambda run: run["costs"]["tokens"],
    "flops": lambda run: run["costs"]["flops"],
    "live flops": lambda run: run["costs"]["streamed"],
    "kv": lambda run: run["costs"]["entries"],
}
FIRST = ("quality", "narration", "present", "past", "timing", "streamed")
SECOND = ("now", "side", "appeared", "spark", "ahead", "square", "wide", "longer", "longer, questions",
          *(f"needle in {frames}" for frames in LENGTHS))  # fmt: skip
JUDGED = ("quality", "narration", "present", "past", "timing")


def training_step(base: Config, name: str, runs: Path) -> Callable[[], None]:
    """A function that runs a method forward, loss and backward once, from pixels on, the encoder frozen."""
    model = built(base.model, name, runs).train()
    model.vit.requires_grad_(False)
    batch = clip_batch(vocabulary(), step_clips(base, 0), model.config.frame_tokens)

    def step() -> None:
        hidden = model(batch.ids, batch.frame, batch.pos, model.see(batch.pixels))
        stream_loss(model, hidden, batch)[0].backward()

    return step


def built(model: ModelConfig, name: str, runs: Path | None = None) -> VideoLLM:
    """A method's model, with the weights of its first run where that is there: how much many methods keep depends on
    what they have learnt."""
    torch.manual_seed(0)
    made = methods.build(methods.configure(model, name)).eval()
    if runs and (path := runs / f"{name}-0" / "model.safetensors").is_file():
        load_weights(made, read_tensors(path)[0], path)
    return made


def next_frame(base: Config, name: str, runs: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """A function that lets a stream, which has seen WATCHED frames, see one more, and one that takes it back."""
    model = built(base.model, name, runs)
    stream = Stream(model, vocabulary(), frames=WATCHED + 1, text=10)
    pixels = clip_pixels([make_clip(base.data, base.model, "test", 3, 0, WATCHED + 1)])
    for picture in pixels[:-1]:
        stream.see(picture[None])
    mark = stream.state()
    before = json.loads(json.dumps(mark[1]))

    def back() -> None:
        stream.restore(mark[0], json.loads(json.dumps(before)))

    return lambda: stream.see(pixels[-1:]), back


def clock(base: Config, names: Sequence[str], runs: Path) -> dict[str, dict[str, float]]:
    """Time of a training step, and of one more frame of a stream, as a share of full computation's, side by side."""
    online = [name for name in names if built(base.model, name).online]
    steps = {name: training_step(base, name, runs) for name in dict.fromkeys(["full", *names])}
    frames = {name: next_frame(base, name, runs) for name in dict.fromkeys(["full", *online])}
    seeing, undo = ({name: pair[i] for name, pair in frames.items()} for i in (0, 1))
    with tqdm(total=5 * TURNS + 2, desc="times, side by side", unit="turn", disable=None) as bar:
        training = side_by_side(Machine(), steps, TURNS, bar)
        latency = side_by_side(Machine(), seeing, 4 * TURNS, bar, undo)
    return {
        "step": {name: ratio(training, name, "full") for name in names},
        "frame": {name: ratio(latency, name, "full") for name in online},
    }


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Of name -> (cost, quality) those to which no other is better in one and at least as good in the other, cheapest
    first."""

    def beaten(name: str) -> bool:
        cost, good = points[name]
        return any(c <= cost and g >= good and (c, g) != (cost, good) for c, g in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def summary(base: Config, results: dict, clock_file: Path, runs: Path) -> dict:
    """What results/field.json holds: `results` (method -> seed -> metrics) column by column, and times."""
    rows = list(results)
    times = json.loads(clock_file.read_text(encoding="utf-8")) if clock_file.is_file() else {}
    if not set(rows) <= set(times.get("step", ())):
        times = clock(base, rows, runs)
        write_text(clock_file, to_json(times, indent=1) + "\n")
    return {
        "steps": base.train.steps, "batch": base.train.batch_size, "clips": base.train.eval_clips,
        "frames": base.data.frames, "entry_bytes": ENTRY * base.model.kv_heads * base.model.head_dim,
        "online": {name: bool(built(base.model, name).online) for name in rows},
        "times": times,
        "values": {
            name: {measure: {seed: read(run) for seed, run in found.items()} for measure, read in MEASURES.items()}
            for name, found in results.items()
        },
    }  # fmt: skip


def cost(data: dict, name: str, measure: str) -> float:
    """Mean over seeds of a cost: FLOPs as a share of full computation's, bytes of the cache a frame."""
    mean = statistics.mean(data["values"][name][measure].values())
    if "flops" in measure:
        return mean / statistics.mean(data["values"]["full"][measure].values())
    return mean * data["entry_bytes"] if measure == "kv" else mean


def online_front(data: dict, measure: str) -> list[str]:
    """The front of what runs online: quality that was reached by looking ahead does not compare."""
    return front({name: point for name, point in points(data, measure).items() if data["online"][name]})


def points(data: dict, measure: str) -> dict[str, tuple[float, float]]:
    """Method -> (cost, quality), for those that see."""
    values = data["values"]
    return {
        name: (cost(data, name, measure), statistics.mean(values[name]["quality"].values()))
        for name in values
        if name != "no-vision"
    }


def cells(data: dict, name: str, columns: Sequence[str]) -> list[str]:
    return [mean_and_error(list(data["values"][name][column].values())) for column in columns]


def report(data: dict) -> str:
    """results/field.md."""
    values = data["values"]
    seeds = {len(found["narration"]) for found in values.values()}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    lines = [
        f"**The field side by side.** Mean ± standard error over {count} seeds, {data['steps']} steps of "
        f"{data['batch']} clips of {data['frames']} frames each, on {data['clips']} validation clips; shares of what "
        "is right. *Present*: where the sprite is now, on which side of the landmark. *Past*: where it appeared, which "
        "spark flashed last. *Timing*: mean of frames rightly spoken at and rightly silent. *Quality*: mean of these "
        "four columns; the true conversation is the context, and what cannot run online has seen the whole clip. "
        "*Streamed*: narrations right at the right frame, live, the model hearing only itself. Tokens: of a frame, "
        "into the decoder. FLOPs: of one pass over a clip, encoder included, output layer and elementwise work (as "
        "clustering) not; *live*: of the clip frame by frame. KV: bytes a frame leaves. Step, frame: time of a "
        "training step and of one more frame of a stream. FLOPs and times: full computation is 1.",
        "",
        "| | " + " | ".join(FIRST) + " | tokens | FLOPs | live | KV | step | frame | online |",
        "|---" * (len(FIRST) + 8) + "|",
    ]
    for name in values:
        online = data["online"][name]
        latency = f"{data['times']['frame'][name]:.2f}" if online else "-"
        live = f"{cost(data, name, 'live flops'):.2f}" if online else "-"
        row = [f"`{name}` {METHODS[name].title}", *cells(data, name, FIRST), f"{cost(data, name, 'tokens'):.1f}",
               f"{cost(data, name, 'flops'):.2f}", live, f"{cost(data, name, 'kv'):,.0f}",
               f"{data['times']['step'][name]:.2f}", latency, "yes" if online else "no"]  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "On the Pareto front of what runs online, from cheap to dear:", ""]
    for measure, what in (("flops", "FLOPs"), ("kv", "KV bytes")):
        lines.append(f"- quality against {what}: {', '.join(f'`{name}`' for name in online_front(data, measure))}")
    lines += ["", "Apart: *side* of the landmark, *spark*, questions asked *ahead* of the frames (in most clips the "
              "same was asked and answered meanwhile: half is reading), narration on *square* and *wide* frames, "
              f"narration and questions on *longer* clips of {LONG} frames, and the needle in a haystack (V-NIAH) of "
              f"so many frames, mean over {len(DEPTHS)} depths. What guessing achieves is in the row `no-vision`; of a "
              "needle's four colours a quarter:", "",
              "| | " + " | ".join(SECOND) + " |", "|---" * (len(SECOND) + 1) + "|"]  # fmt: skip
    lines += [f"| `{name}` | {' | '.join(cells(data, name, SECOND))} |" for name in values]
    tests = len(JUDGED) * (len(values) - 1)
    lines += ["", "Against VideoLLM-MoD, seed by seed: difference (p of a paired t-test); bold where p < 0.05, as "
              f"chance alone makes about {0.05 * tests:.0f} of these {tests}; so few seeds tell little apart:", "",
              "| `mod` minus | " + " | ".join(JUDGED) + " |", "|---" * (len(JUDGED) + 1) + "|"]  # fmt: skip
    for name in values:
        if name != "mod" and "mod" in values:
            gaps = [judge(values["mod"][measure], values[name][measure]) for measure in JUDGED]
            lines.append(f"| `{name}` | {' | '.join(gaps)} |")
    return "\n".join(lines) + "\n"


FAMILIES = {  # colour and marker of each family: told apart without colour, too
    "skip": (BLUE, "o", ("mod", "layer-skip", "sequence-mod", "p-mod", "p-mod-frame", "gamma-mod")),
    "drop on the way": (SKY, "P", ("early-exit", "fastv")),
    "drop before": (ORANGE, "^", ("vts", "vts-stream", "prumerge", "prumerge-plus")),
    "merge or pool": (GREEN, "s", ("longva", "progressive", "setok", "free-video")),
    "resample": (PURPLE, "D", ("q-former", "perceiver")),
    "compress": (VERMILION, "v", ("voco",)),
    "all tokens": ("black", "*", ("full", "visual-rope", "adaptvision")),
}


def draw_points(axis, data: dict, measure: str) -> None:
    """Every method's quality against one of its costs, by number, with the Pareto front."""
    placed = points(data, measure)
    ends = [placed[name] for name in online_front(data, measure)]
    axis.step(*zip(*ends, strict=True), where="post", color="grey", linewidth=1, linestyle="--", zorder=0)
    numbers = {name: number for number, name in enumerate(placed, start=1)}
    for colour, marker, names in FAMILIES.values():
        for name in (name for name in names if name in placed):
            _, error = mean_error(list(data["values"][name]["quality"].values()))
            axis.errorbar(*placed[name], error, color=colour, marker=marker, markersize=10 if name == "mod" else 6,
                          markerfacecolor=colour if data["online"][name] else "white", capsize=2, elinewidth=0.8,
                          linestyle="none")  # fmt: skip
            axis.annotate(str(numbers[name]), placed[name], textcoords="offset points", xytext=(6, 5), fontsize=9,
                          color=colour, weight="bold" if name == "mod" else "normal")  # fmt: skip
    if measure == "kv":
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(ticks := (5000, 10000, 20000, 50000), [f"{tick:,}" for tick in ticks])
    axis.grid(alpha=0.3)


def plot(data: dict, path: Path) -> None:
    """The picture: quality against FLOPs and against KV bytes, with error bars over seeds and the Pareto fronts; below,
    the upper part once more, larger."""
    figure, values = Figure(figsize=(15, 10.5), layout="constrained"), data["values"]
    grid = figure.subplots(2, 2)
    costs = {"flops": "FLOPs of a clip, encoder included (share of full computation)",
             "kv": "keys and values that a frame leaves (bytes)"}  # fmt: skip
    for column, (measure, label) in enumerate(costs.items()):
        for row in (0, 1):
            axis = grid[row, column]
            draw_points(axis, data, measure)
            axis.set(xlabel=label, ylabel="quality (share right, ± standard error over seeds)")
        whole, near = grid[:, column]
        whole.set_title(f"Quality against {'FLOPs' if measure == 'flops' else 'KV cache'}")
        near.set_title("The upper part, larger")
        best = [good for _, good in points(data, measure).values()]
        near.set_ylim(statistics.median(best) - 0.06, max(best) + 0.025)
        if "no-vision" in values:
            blind = statistics.mean(values["no-vision"]["quality"].values())
            whole.axhline(blind, color="grey", linestyle=":")
            whole.text(0.02, blind + 0.01, "no vision", transform=whole.get_yaxis_transform(), fontsize=9)
    placed, entries = list(points(data, "flops")), []
    for family, (colour, marker, names) in FAMILIES.items():
        for name in (name for name in names if name in placed):
            face = colour if data["online"][name] else "white"
            entries.append(Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="none",
                                  label=f"{placed.index(name) + 1} {name} ({family})"))  # fmt: skip
    entries.append(Line2D([], [], color="grey", linestyle="--", label="Pareto front (online)"))
    figure.legend(handles=entries, loc="outside right center", fontsize=9, title="hollow: cannot run online")
    figure.suptitle("The field side by side: the same model, data, steps and seeds. "
                    "Quality: mean of narration, present, past and timing")  # fmt: skip
    save(figure, path)


def run(base: Config, runs: Path, out: Path, seeds: int, jobs: int, report_only: bool) -> None:
    """Train what is missing, then write field.md, .json and .png into `out`."""
    every = variants(base)
    if not report_only:
        sweep(runs, out / "field", base, every, list(every), seeds, jobs)
    results = {name: found for name, found in collect(out / "field", base, every, seeds).items() if found}
    if "full" not in results:
        raise UserError(f"no finished run of full computation in {out / 'field'}; train first, without --report")
    data = json.loads(to_json(summary(base, results, out / "field-times.json", runs)))
    publish(out / "field", data, report(data), plot)
