"""The field side by side: every system of mod/related trained with equal steps, data and seeds, and what comes out.

    python -m mod.study.field               # three seeds of every system, two runs at a time
    python -m mod.study.field --quick       # two seeds of a few steps each, to see that it works
    python -m mod.study.field --report      # train nothing: write the table from the runs that are finished

What a run measured is one file in results/field. The table, results/field.md, .json and .png, is made from those files,
and from times taken side by side on the machine it runs on.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from mod.config import Config, require
from mod.data import Source, clip_batch, clip_pixels
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.related import methods
from mod.related.data import make_clip
from mod.related.methods import METHODS
from mod.related.world import WORLD
from mod.run import load_weights, read_tensors, to_json, write_text
from mod.stream import Stream
from mod.study.common import PURPLE, SKY, command, markdown, publish
from mod.study.machine import Machine, ratio, side_by_side
from mod.study.needle import DEPTHS, LENGTHS, LONG
from mod.study.statistics import judge, mean_error, means, number_of_seeds
from mod.study.sweep import TrialFlags, Variant, collect, quick, read_off, sweep
from mod.videollm import VideoLLM

BASE = WORLD.presets["field"]
ENTRY = 2 * 4  # bytes of a key and a value in float32, for each of their numbers
TURNS = 5  # of a side by side comparison
WATCHED = 24  # frames that a stream has seen when the latency of the next one is taken


@dataclass(frozen=True)
class Flags(TrialFlags):
    seeds: int = 3  # seeds 0 to this minus 1


def variant_of(base: Config, name: str, cheap: bool = False) -> Variant:
    """A method as a variant: what it changes in the configuration."""
    plain, model = asdict(base.model), asdict(methods.configure(replace(base.model, cheap=cheap), name))
    title = METHODS[name].title + (f": {METHODS[name].cheap}" if cheap else "")
    return Variant(title, {field: value for field, value in model.items() if value != plain[field]}, probed=True)


def variants(base: Config) -> dict[str, Variant]:
    """A variant for every method."""
    return {name: variant_of(base, name) for name in METHODS}


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
          *(f"needle in {frames}" for frames in LENGTHS))
JUDGED = ("quality", "narration", "present", "past", "timing")


def built(base: Config, name: str, runs: Path | None = None) -> tuple[VideoLLM, Source]:
    """A method's model, with the weights of its first run where that is there: how much many methods keep depends on
    what they have learnt."""
    config = replace(base, model=methods.configure(base.model, name), train=replace(base.train, seed=0))
    model, source = WORLD.build(config, torch.device("cpu"))
    if runs and (path := runs / f"{name}-0" / "model.safetensors").is_file():
        load_weights(model.weights(), read_tensors(path)[0], path)
    return model.eval(), source


def training_step(base: Config, name: str, runs: Path) -> Callable[[], None]:
    """A function that runs a method forward, loss and backward once, from pixels on, the encoder frozen."""
    model, source = built(base, name, runs)
    model.train().vit.requires_grad_(False)
    batch = clip_batch(source.words, source.training(0), model.config)

    def step() -> None:
        text, stream = model(batch)
        ((text + stream) / sum(batch.counts)).backward()

    return step


def next_frame(base: Config, name: str, runs: Path) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """A function that lets a stream, which has seen WATCHED frames, see one more, and one that takes it back."""
    model, source = built(base, name, runs)
    stream = Stream(model, source.words)
    pixels = clip_pixels([make_clip(base.data, base.model, "test", 3, 0, WATCHED + 1)])
    for picture in pixels[:-1]:
        stream.see(picture[None])
    mark, seen, position = stream.cache.mark(), list(stream.seen), list(stream.position)

    def back() -> None:
        stream.cache.rewind(mark)
        stream.seen, stream.position = list(seen), list(position)

    return lambda: stream.see(pixels[-1:]), back


def clock(base: Config, names: Sequence[str], runs: Path) -> dict[str, dict[str, float]]:
    """Time of a training step, and of one more frame of a stream, as a share of full computation's, side by side."""
    online = [name for name in names if built(base, name)[0].online]
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
        "online": {name: bool(built(base, name)[0].online) for name in rows},
        "times": times,
        "values": read_off(results, MEASURES),
    }


def cost(data: dict, name: str, measure: str) -> float:
    """Mean over seeds of a cost: FLOPs as a share of full computation's, bytes of the cache per frame."""
    mean = statistics.mean(data["values"][name][measure].values())
    if "flops" in measure:
        return mean / statistics.mean(data["values"]["full"][measure].values())
    return mean * data["entry_bytes"] if measure == "kv" else mean


def points(data: dict, measure: str) -> dict[str, tuple[float, float]]:
    """Method -> (cost, quality), for those that see."""
    return {name: (cost(data, name, measure), statistics.mean(found["quality"].values()))
            for name, found in data["values"].items() if name != "no-vision"}


def online_front(data: dict, measure: str) -> list[str]:
    """The front of what runs online: quality that was reached by looking ahead does not compare."""
    return front({name: point for name, point in points(data, measure).items() if data["online"][name]})


def fronts(data: dict) -> list[str]:
    """What a report says of the Pareto fronts."""
    return ["On the Pareto front of what runs online, from cheap to dear:\n",
            *(f"- quality against {what}: {', '.join(f'`{name}`' for name in online_front(data, measure))}"
              for measure, what in (("flops", "FLOPs"), ("kv", "KV bytes")))]


def report(data: dict) -> str:
    """results/field.md."""
    values, online, times = data["values"], data["online"], data["times"]
    first = means(values, {name: f"`{name}` {METHODS[name].title}" for name in values}, FIRST)
    first["tokens"] = [f"{cost(data, name, 'tokens'):.1f}" for name in values]
    first["FLOPs"] = [f"{cost(data, name, 'flops'):.2f}" for name in values]
    first["live"] = [f"{cost(data, name, 'live flops'):.2f}" if online[name] else "-" for name in values]
    first["KV"] = [f"{cost(data, name, 'kv'):,.0f}" for name in values]
    first["step"] = [f"{times['step'][name]:.2f}" for name in values]
    first["frame"] = [f"{times['frame'][name]:.2f}" if online[name] else "-" for name in values]
    first["online"] = ["yes" if online[name] else "no" for name in values]
    gaps = {f"`{name}`": {measure: judge(values["mod"][measure], values[name][measure]) for measure in JUDGED}
            for name in values if name != "mod" and "mod" in values}
    tests, seeds = len(JUDGED) * (len(values) - 1), number_of_seeds(values)
    return "\n".join([
        f"**The field side by side.** Mean ± standard error over {seeds} seeds, {data['steps']} steps of "
        f"{data['batch']} clips of {data['frames']} frames each, on {data['clips']} validation clips; shares of what "
        "is right. *Present*: where the sprite is now, on which side of the landmark. *Past*: where it appeared, which "
        "spark flashed last. *Timing*: mean of frames rightly spoken at and rightly silent. *Quality*: mean of these "
        "four columns; the true conversation is the context, and what cannot run online has seen the whole clip. "
        "*Streamed*: narrations right at the right frame, live, the model hearing only itself. Tokens: of a frame, "
        "into the decoder. FLOPs: of one pass over a clip, encoder included, output layer and elementwise work (as "
        "clustering) not; *live*: of the clip frame by frame. KV: bytes a frame leaves. Step, frame: time of a "
        "training step and of one more frame of a stream. FLOPs and times: full computation is 1.\n",
        markdown(first),
        *fronts(data),
        "\nApart: *side* of the landmark, *spark*, questions asked *ahead* of the frames (in most clips the same was "
        "asked and answered meanwhile: half is reading), narration on *square* and *wide* frames, narration and "
        f"questions on *longer* clips of {LONG} frames, and the needle in a haystack (V-NIAH) of so many frames, mean "
        f"over {len(DEPTHS)} depths. What guessing achieves is in the row `no-vision`; of a needle's four colours a "
        "quarter:\n",
        markdown(means(values, {name: f"`{name}`" for name in values}, SECOND)),
        "Against VideoLLM-MoD, seed by seed: difference (p of a paired t-test); bold where p < 0.05, as chance alone "
        f"makes about {0.05 * tests:.0f} of these {tests}; so few seeds tell little apart:\n",
        markdown(pd.DataFrame.from_dict(gaps, orient="index").rename_axis("`mod` minus")),
    ])


FAMILIES = {  # colour and marker of each family: told apart without colour, too
    "skip": (BLUE, "o", ("mod", "layer-skip", "sequence-mod", "p-mod", "p-mod-frame", "gamma-mod")),
    "drop on the way": (SKY, "P", ("early-exit", "fastv")),
    "drop before": (ORANGE, "^", ("vts", "vts-stream")),
    "merge or pool": (GREEN, "s", ("longva", "progressive", "setok", "free-video", "prumerge", "prumerge-plus")),
    "resample": (PURPLE, "D", ("q-former", "perceiver")),
    "compress": (VERMILION, "v", ("voco",)),
    "all tokens": ("black", "*", ("full", "visual-rope", "adaptvision")),
}
MOD = "mod", "mod-all"  # drawn larger


Families = dict[str, tuple[str, str, tuple[str, ...]]]


def draw_points(axis, data: dict, measure: str, families: Families) -> None:
    """Every method's quality against one of its costs, with what it could reach where that is told, and the Pareto
    front."""
    placed = points(data, measure)
    ends = [placed[name] for name in online_front(data, measure)]
    axis.step(*zip(*ends, strict=True), where="post", color="grey", linewidth=1, linestyle="--", zorder=0)
    for colour, marker, names in families.values():
        for name in (name for name in names if name in placed):
            _, error = mean_error(data["values"][name]["quality"])
            if ceiling := data.get("ceilings", {}).get(name):
                axis.plot(placed[name][0], ceiling, marker="_", markersize=12, color="grey", zorder=0)
            axis.errorbar(*placed[name], error, color=colour, marker=marker, markersize=10 if name in MOD else 6,
                          markerfacecolor=colour if data["online"][name] else "white", capsize=2, elinewidth=0.8,
                          linestyle="none")
    if measure == "kv":
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(ticks := (5000, 10000, 20000, 50000), [f"{tick:,}" for tick in ticks])
    axis.grid(alpha=0.3)


def write_numbers(axis, data: dict, measure: str, families: Families, low: float, high: float) -> None:
    """Each method's number near its point, where it covers no other number and no point: those whose quality is in
    [low, high). The figure must have been laid out. Distances are in points, of which an inch has 72."""
    placed, scale = points(data, measure), 72 / axis.figure.dpi
    colours = {name: colour for colour, _, names in families.values() for name in names}
    taken = [scale * axis.transData.transform(point) for point in placed.values()]
    for number, (name, point) in enumerate(placed.items(), start=1):
        if not low <= point[1] < high:
            continue
        here = scale * axis.transData.transform(point)
        # Beside the point, as the error bars stand above and below it.
        ways = [(far * side * 12, far * up) for far in (1, 1.7, 2.5) for up in (6, -6, 14, -14) for side in (1, -1)]
        free = next((way for way in ways if all(abs(here[0] + way[0] - x) > 11 or abs(here[1] + way[1] - y) > 9
                                                for x, y in taken)), ways[0])
        taken.append(here + free)
        axis.annotate(str(number), point, free, textcoords="offset points", ha="center", va="center", fontsize=9,
                      color=colours[name], weight="bold" if name in MOD else "normal",
                      arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey"} if math.hypot(*free) > 16 else None)


def plot(data: dict, path: Path, families: Families = FAMILIES, title: str = "The field side by side: the same model, "
         "data, steps and seeds. Quality: mean of narration, present, past and timing",
         flops: str = "FLOPs of a clip, encoder included") -> None:
    """The picture: quality against FLOPs and against KV bytes, with error bars over seeds and the Pareto fronts; below,
    the upper part once more, larger."""
    figure, values = Figure(figsize=(15, 10.5), layout="constrained"), data["values"]
    grid = figure.subplots(2, 2)
    costs = {"flops": f"{flops} (share of full computation)", "kv": "keys and values that a frame leaves (bytes)"}
    for column, (measure, label) in enumerate(costs.items()):
        for row in (0, 1):
            axis = grid[row, column]
            draw_points(axis, data, measure, families)
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
    for family, (colour, marker, names) in families.items():
        for name in (name for name in names if name in placed):
            face = colour if data["online"][name] else "white"
            entries.append(Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="none",
                                  label=f"{placed.index(name) + 1} {name} ({family})"))
    entries.append(Line2D([], [], color="grey", linestyle="--", label="Pareto front (online)"))
    figure.legend(handles=entries, loc="outside right center", fontsize=9, title="hollow: cannot run online")
    figure.suptitle(title)
    figure.draw_without_rendering()  # which puts everything in its place
    for column, measure in enumerate(costs):
        whole, near = grid[:, column]
        write_numbers(whole, data, measure, families, 0, near.get_ylim()[0])
        write_numbers(near, data, measure, families, *near.get_ylim())
    save(figure, path)


def run(flags: Flags) -> int:
    base, runs, out, seeds = BASE, Path("runs/field"), Path("results"), flags.seeds
    if flags.quick:
        base, runs, out, seeds = quick(base), Path("runs/field-quick"), Path("runs/field-quick"), min(seeds, 2)
    every = variants(base)
    if not flags.report:
        sweep(runs, out / "field", base, every, list(every), seeds, flags.jobs)
    results = {name: found for name, found in collect(out / "field", base, every, seeds).items() if found}
    require("full" in results, f"no finished run of full computation in {out / 'field'}; train first, without --report")
    data = json.loads(to_json(summary(base, results, out / "field-times.json", runs)))
    publish(out / "field", data, report(data), plot)
    return 0


main = command("mod.study.field", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
