"""The paper's tables, small: train every variant with equal steps and data over seeds, and write what comes out.

    python -m mod.study.ablate --table 1             # methods: full computation, early exit, skipping, MoD, pooling
    python -m mod.study.ablate --table 2             # which layers are routed
    python -m mod.study.ablate --table 3             # how tokens are chosen, and how many are kept
    python -m mod.study.ablate --table 4             # ours: what makes the router learn
    python -m mod.study.ablate --table 5             # ours: where that stops holding
    python -m mod.study.ablate --table 1 --quick     # two seeds of a few steps each, to see that it works
    python -m mod.study.ablate --table 1 --report    # train nothing: write the table from the runs that are finished

What a finished run measured is kept in results/study, shared between the tables, and never measured again. Writes
results/tableN.md, .json and .png; with --quick into runs/study-quick, because a few steps say nothing about the method.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import ttest_rel
from tqdm import tqdm

from mod.checkpoint import to_json, write_text
from mod.config import PRESETS, Config, UserError
from mod.data import clip_batch, vocabulary
from mod.flags import Parser, run_script
from mod.study import routers
from mod.study.costs import average_text, decoder_flops, dense, kv_bytes
from mod.study.plots import BLUE, GREEN, ORANGE, PURPLE, VERMILION, save
from mod.study.sweep import Variant, collect, configure, sweep
from mod.train import step_clips, validation_clips
from mod.videollm import VideoLLM, stream_loss

# Table 5: the two gates elsewhere, in short runs, since recall is decided early.
SHORT = {"steps": 80, "eval_clips": 64, "eval_every": 0}
PLACES = {
    "here": Variant("the setting of the other tables"),
    "r-0.1": Variant("r = 0.1", {"keep_ratio": 0.1}),
    "r-0.5": Variant("r = 0.5", {"keep_ratio": 0.5}),
    "depth-2": Variant("2 layers", {"depth": 2}),
    "depth-8": Variant("8 layers", {"depth": 8}),
    "tokens-50": Variant("1 + 7×7 tokens a frame", {"image_size": 56, "grid": 7}, train={"batch_size": 8}),
    "sprites-3": Variant("3 sprites", data={"sprites": 3}),
    "pretrained": Variant("a trained dense decoder", start="full"),
}


def placed(place: Variant, gate: str) -> Variant:
    """A place of table 5 with one of the two gates."""
    model, train = {**place.model, "gate": gate}, {**SHORT, **place.train}
    return replace(place, title=f"{place.title}: {gate} gate", model=model, train=train)


VARIANTS = {
    "mod": Variant("MoD: interleaved, learned, r = 0.2, value gate"),
    "full": Variant("full computation", {"layers": "none"}),
    "exit-2": Variant("early exit after 2 of 4 layers", {"layers": "keep:1,1,0,0"}),
    "exit-1": Variant("early exit after 1 of 4 layers", {"layers": "keep:1,0,0,0"}),
    "skip": Variant("skipping every other layer", {"layers": "keep:1,0,1,0"}),
    "pool": Variant("fewer tokens: 1 + 2×2 by pooling", {"layers": "none", "grid": 2}),
    "all": Variant("all layers, learned, value gate", {"layers": "all"}),
    "all-deep": Variant("all deep layers (2, 3)", {"layers": "all-deep"}),
    "interleaved-deep": Variant("interleaved deep (3)", {"layers": "interleaved-deep"}),
    "random": Variant("interleaved, random", {"select": "random"}),
    "uniform": Variant("interleaved, uniform", {"select": "uniform"}),
    "all-random": Variant("all layers, random", {"layers": "all", "select": "random"}),
    "all-uniform": Variant("all layers, uniform", {"layers": "all", "select": "uniform"}),
    "r-0.1": Variant("interleaved, learned, r = 0.1", {"keep_ratio": 0.1}),
    "r-0.5": Variant("interleaved, learned, r = 0.5", {"keep_ratio": 0.5}),
    "update": Variant("interleaved, the paper's gate", {"gate": "update"}),
    "taught": Variant("interleaved, the paper's gate and an auxiliary target", {"gate": "update"}, "taught"),
    "oracle": Variant("interleaved, oracle: keeps sprites and sparks", {}, "oracle"),
    "all-update": Variant("all layers, the paper's gate", {"layers": "all", "gate": "update"}),
    "all-oracle": Variant("all layers, oracle: keeps sprites and sparks", {"layers": "all"}, "oracle"),
} | {f"{name}-{gate}": placed(place, gate) for name, place in PLACES.items() for gate in ("value", "update")}

COLUMNS = ("LM-PPL", "TimeDiff (s)", "Fluency", "LM-Correctness", "narration", "free-running narration", "speak",
           "silence", "now", "past", "spark", "steps to quality")  # fmt: skip
JUDGED = ("narration", "free-running narration", "speak", "silence", "now", "past", "spark")


@dataclass(frozen=True)
class Table:
    """Rows are names of variants; `claims` are orderings (better, worse, who says so), judged on all of `judged`."""

    title: str
    rows: tuple[str, ...]
    claims: tuple[tuple[str, str, str], ...]
    judged: tuple[str, ...] = JUDGED
    columns: tuple[str, ...] = COLUMNS
    with_costs: bool = True


TABLES = {
    1: Table(
        "Methods",
        ("full", "exit-2", "exit-1", "skip", "pool", "mod"),
        (
            ("mod", "full", "paper: comparable"),
            ("mod", "exit-2", "paper: drops dramatically"),
            ("mod", "exit-1", "paper: drops dramatically"),
            ("mod", "skip", "paper"),
            ("mod", "pool", "paper"),
        ),
    ),
    2: Table(
        "Which layers are routed",
        ("full", "all", "all-deep", "mod", "interleaved-deep"),
        (
            ("mod", "all", "paper: interleaved is the best trade-off"),
            ("mod", "all-deep", "paper: interleaved is the best trade-off"),
            ("interleaved-deep", "mod", "paper: more computation, hardly better"),
        ),
    ),
    3: Table(
        "How tokens are chosen, and how many are kept",
        ("full", "random", "uniform", "r-0.1", "mod", "r-0.5", "all-random", "all-uniform", "all"),
        (
            ("mod", "random", "paper"),
            ("mod", "uniform", "paper"),
            ("all", "all-random", "the paper's, with no dense layer to help"),
            ("all", "all-uniform", "the paper's, with no dense layer to help"),
            ("mod", "r-0.1", "more tokens, more seen"),
            ("r-0.5", "mod", "more tokens, more seen"),
        ),
    ),
    4: Table(
        "What makes the router learn",
        ("update", "mod", "taught", "random", "uniform", "oracle",
         "all-update", "all", "all-random", "all-uniform", "all-oracle"),
        (
            ("mod", "update", "ours: being read must carry gradient"),
            ("taught", "update", "ours: so must any other lesson"),
            ("oracle", "mod", "ours: nothing beats knowing"),
            ("update", "random", "is the paper's gate better than a lot?"),
            ("all", "all-update", "ours, with no dense layer to help"),
            ("all-oracle", "all", "ours, with no dense layer to help"),
            ("all-update", "all-random", "with no dense layer to help"),
        ),
        ("recall", *JUDGED),
        (*COLUMNS, "recall"),
    ),
    5: Table(
        "Where the value gate stops helping the router",
        tuple(f"{place}-{gate}" for place in PLACES for gate in ("value", "update")),
        tuple((f"{place}-value", f"{place}-update", "ours") for place in PLACES),
        ("recall", "narration"),
        ("recall", "narration", "questions"),
        with_costs=False,
    ),
}  # fmt: skip
MEASURES: dict[str, Callable[[dict], float]] = {  # how a column is read off the result of a run
    "narration": lambda run: run["narration_exact"],
    "free-running narration": lambda run: run["free_running"]["narration_exact"],
    "speak": lambda run: run["speak_accuracy"],
    "silence": lambda run: run["silence_accuracy"],
    "questions": lambda run: run["question_accuracy"],
    "now": lambda run: run["kinds"]["now"],
    "past": lambda run: run["kinds"]["past"],
    "spark": lambda run: run["kinds"]["spark"],
    "LM-PPL": lambda run: run["lm_ppl"],
    "TimeDiff (s)": lambda run: run["time_diff"],
    "Fluency": lambda run: run["fluency"],
    "LM-Correctness": lambda run: run["lm_correctness"],
    "steps to quality": lambda run: steps_to(run, GOOD),
    "recall": lambda run: recall(run),
}
GOOD = 0.2  # the fixed quality: LM loss, nats per text label; training clips are never repeated, so they are unseen


QUICK = {"steps": 10, "batch_size": 4, "vit_steps": 20, "eval_every": 0, "eval_clips": 8}


def quick(base: Config) -> Config:
    """The study in a few steps of small batches: shows that everything works, says nothing about the method."""
    return replace(base, train=replace(base.train, **QUICK))


def steps_to(run: dict, quality: float) -> float:
    """The first logged step at which the LM loss, mean of two logged steps, was as low as this; nan if never."""
    points = [point for point in run["curve"] if "lm" in point]
    for before, point in zip(points, points[1:], strict=False):
        if (before["lm"] + point["lm"]) / 2 <= quality:
            return point["step"]
    return math.nan


def recall(run: dict) -> float:
    """Share of sprite patches kept, mean over the routed layers and over the logged steps of the whole training."""
    points = [statistics.mean(point["recall"].values()) for point in run["curve"] if point.get("recall")]
    return statistics.mean(points) if points else math.nan


def costs(base: Config, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Decoder FLOPs and KV cache of every variant on an average stream, as a share of full computation."""
    frames, text = base.data.frames, average_text(validation_clips(base, 64))
    full = dense(base.model)
    shares = {}
    for name in names:
        variant = VARIANTS[name]
        config = replace(base.model, **variant.model)
        if variant.routers == "oracle":
            config = replace(config, select="random")  # no scores to compute
        shares[name] = {
            "flops": decoder_flops(config, frames, text) / decoder_flops(full, frames, text),
            "kv": kv_bytes(config, frames, text) / kv_bytes(full, frames, text),
        }
    return shares


def step_times(base: Config, names: Sequence[str], turns: int = 7) -> dict[str, float]:
    """Time of a training step as a share of full computation's, side by side: connector and decoder forward, loss,
    backward; the frozen encoder and the optimizer, alike for all, are left out."""
    words, steps = vocabulary(), {}
    for name in dict.fromkeys(["full", *names]):
        config = replace(base, model=replace(base.model, **VARIANTS[name].model))
        torch.manual_seed(0)
        kind = VARIANTS[name].routers
        model = routers.build(config.model, kind) if kind else VideoLLM(config.model)
        batch = clip_batch(words, step_clips(config, 0), config.model.frame_tokens)
        with torch.no_grad():
            features = model.vit(batch.pixels)

        def step(model=model, batch=batch, features=features) -> None:
            hidden = model(batch.ids, batch.frame, batch.pos, model.connector(features))
            stream_loss(model, hidden, batch)[0].backward()

        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(turns + 1), desc="step times", unit="turn", disable=None):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return {
        name: statistics.median(a / b for a, b in zip(times[name][1:], times["full"][1:], strict=True))
        for name in names
    }


def mean_error(known: list[float]) -> tuple[float, float]:
    """Mean and standard error; no error of a single value."""
    return statistics.mean(known), statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0


def mean_and_error(numbers: list[float | None]) -> str:
    """mean ± standard error; with the number of runs that count when some have no value."""
    known = [number for number in numbers if number is not None]
    if not known:
        return "-"
    mean, error = mean_error(known)
    digits = 0 if max(known) > 10 else 3  # steps, or shares
    text = f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(known) > 1 else "")
    return text if len(known) == len(numbers) else f"{text} ({len(known)} of {len(numbers)})"


def judge(one: dict[str, float | None], other: dict[str, float | None]) -> str:
    """The difference of two variants in one measure, seed by seed: mean ± standard error (p of a paired t-test); bold
    when p is below 0.05, and then "reversed" when it is negative. Both map a seed to its value, or to None. No p is
    given for fewer than three seeds, nor when all differ alike, as at a ceiling."""
    seeds = [seed for seed in sorted(set(one) & set(other)) if one[seed] is not None and other[seed] is not None]
    gaps = [one[seed] - other[seed] for seed in seeds]
    if len(gaps) < 2:
        return "-"
    mean, error = mean_error(gaps)
    text = f"{mean:+.3f} ± {error:.3f}"
    if len(gaps) < 3 or error < 1e-9:
        return text
    p = float(ttest_rel([one[s] for s in seeds], [other[s] for s in seeds]).pvalue)
    return f"**{text} (p {p:.3f}{', reversed' if mean < 0 else ''})**" if p < 0.05 else f"{text} (p {p:.2f})"


def report(number: int, data: dict) -> str:
    """The table in Markdown, from what is in its JSON file; variants without a finished run are named and left out."""
    table, values = TABLES[number], data["values"]
    rows = [name for name in table.rows if name in values]
    seeds = {len(values[name]["narration"]) for name in rows}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    costs_too = " | FLOPs | KV cache | step time" if table.with_costs else ""
    legend = "; costs as a share of full computation" if table.with_costs else ""
    legend += f"; quality: an LM loss of {GOOD} nats" if "steps to quality" in table.columns else ""
    if "recall" in table.columns:
        legend += "; recall: sprite patches kept, mean over routed layers and training"
    lines = [
        f"**Table {number}. {table.title}.** Mean ± standard error over {count} seeds, {data['steps']} steps each, on "
        f"{data['clips']} validation clips{legend}.",
        "",
        "| | " + " | ".join(table.columns) + costs_too + " | seeds |",
        "|---" * (len(table.columns) + 2 + 3 * table.with_costs) + "|",
    ]
    for name in rows:
        cells = [mean_and_error(list(values[name][measure].values())) for measure in table.columns]
        if table.with_costs:
            cost = data["costs"][name]
            cells += [f"{cost['flops']:.2f}", f"{cost['kv']:.2f}", f"{data['times'][name]:.2f}"]
        lines.append(
            f"| `{name}` {VARIANTS[name].title} | " + " | ".join(cells) + f" | {len(values[name]['narration'])} |"
        )
    claims = [claim for claim in table.claims if claim[0] in values and claim[1] in values]
    tests = len(claims) * len(table.judged)
    lines += ["", "Orderings: difference, seed by seed (p of a paired t-test); bold where p < 0.05, as chance alone "
              f"makes about {0.05 * tests:.2g} of these {tests}; not bold is not a proof of equality:", "",
              "| ordering | who says so | " + " | ".join(table.judged) + " |",
              "|---" * (len(table.judged) + 2) + "|"]  # fmt: skip
    for better, worse, source in claims:
        gaps = [judge(values[better][measure], values[worse][measure]) for measure in table.judged]
        lines.append(f"| `{better}` > `{worse}` | {source} | " + " | ".join(gaps) + " |")
    if waiting := [name for name in table.rows if name not in values]:
        lines += ["", f"Not run yet: {', '.join(waiting)}."]
    return "\n".join(lines) + "\n"


def plot_quality(table: Table, data: dict, path: Path) -> None:
    """Tables 1 to 3: quality against cost, mean and standard error over seeds."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    colours = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, "grey"]
    for axis, measure in zip(figure.subplots(1, 3), ("free-running narration", "silence", "spark"), strict=True):
        for place, name in enumerate(name for name in table.rows if name in data["values"]):
            mean, error = mean_error(list(data["values"][name][measure].values()))
            aside = 0.008 * (place % 3 - 1)  # so that variants of equal cost do not hide each other
            axis.errorbar(data["costs"][name]["flops"] + aside, mean, error, capsize=3, label=name, linestyle="none",
                          marker="os^vD*XP<>h"[place % 11], color=colours[place % 6])  # fmt: skip
        axis.set(title=measure, xlabel="decoder FLOPs (share of full computation)",
                 ylabel="share right, mean ± standard error over seeds")  # fmt: skip
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{table.title} (variants of equal cost are drawn side by side)")
    save(figure, path)


def plot_recall(results: dict, path: Path) -> None:
    """Table 4: the routers' recall over training, mean and range over seeds."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    styles = {"update": VERMILION, "mod": BLUE, "taught": GREEN, "random": "grey", "uniform": PURPLE, "oracle": ORANGE}
    for axis, everywhere in zip(figure.subplots(1, 2), (False, True), strict=True):
        for name, colour in styles.items():
            key = {"mod": "all"}.get(name, f"all-{name}") if everywhere else name
            if key not in results:
                continue  # not run yet, or no auxiliary target without a dense layer
            curves = [
                {point["step"]: statistics.mean(point["recall"].values()) for point in run["curve"] if "lm" in point}
                for run in results[key].values()
            ]
            steps = sorted(set.intersection(*(set(one) for one in curves)))
            columns = [[one[step] for one in curves] for step in steps]
            axis.plot(steps, list(map(statistics.mean, columns)), color=colour, label=f"{key} ({len(curves)} seeds)")
            axis.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.12)
        axis.set(title=f"Routers in {'all layers' if everywhere else 'layers 1 and 3'}: mean and range over seeds",
                 xlabel="training step", ylabel="sprite patches kept (share)", ylim=(-0.02, 1.05))  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


def plot_places(data: dict, path: Path) -> None:
    """Table 5: recall with the two gates, place by place."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    for shift, gate, colour, marker in ((-0.12, "value", BLUE, "o"), (0.12, "update", VERMILION, "s")):
        for row, place in enumerate(PLACES):
            if f"{place}-{gate}" not in data["values"]:
                continue
            mean, error = mean_error(list(data["values"][f"{place}-{gate}"]["recall"].values()))
            axis.errorbar(mean, row + shift, xerr=error, capsize=3, color=colour, marker=marker,
                          label=f"{gate} gate" if row == 0 else None)  # fmt: skip
    axis.set_yticks(range(len(PLACES)), [place.title for place in PLACES.values()])
    axis.invert_yaxis()
    axis.set(title="What the routers keep, mean over routed layers and training; mean ± standard error over seeds",
             xlabel="sprite patches kept (share)", xlim=(-0.02, 1.05))  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


def run(arguments) -> int:
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise UserError(f"seeds and jobs must be at least 1, got {arguments.seeds} and {arguments.jobs}")
    table, base = TABLES[arguments.table], PRESETS["study"]
    runs, out, seeds = Path("runs/study"), Path("results"), arguments.seeds
    if arguments.quick:
        base, runs, out, seeds = quick(base), Path("runs/study-quick"), Path("runs/study-quick"), min(seeds, 2)
    out.mkdir(parents=True, exist_ok=True)
    variants = {name: replace(one, train={}) if arguments.quick else one for name, one in VARIANTS.items()}
    if not arguments.report:
        sweep(runs, out / "study", base, variants, table.rows, seeds, arguments.jobs)
    results = collect(out / "study", base, {name: variants[name] for name in table.rows}, seeds)
    results = {name: found for name, found in results.items() if found}
    if not results:
        raise UserError(f"no finished run of this table in {out / 'study'}; train first, without --report")
    rows = list(results)
    path, clock = out / f"table{arguments.table}.json", out / "step-times.json"  # all variants, side by side, once
    times = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else {}
    if table.with_costs and not set(rows) <= set(times):
        times = step_times(base, [name for one in TABLES.values() if one.with_costs for name in one.rows])
        write_text(clock, to_json(times, indent=1) + "\n")
    configured = configure(base, variants[rows[0]], 0)
    data = {
        "steps": configured.train.steps,
        "clips": configured.train.eval_clips,
        "costs": costs(base, rows) if table.with_costs else {},
        "times": {name: times[name] for name in rows} if table.with_costs else {},
        "values": {
            name: {measure: {seed: read(run) for seed, run in found.items()} for measure, read in MEASURES.items()}
            for name, found in results.items()
        },
    }
    write_text(path, to_json(data, indent=1) + "\n")
    data = json.loads(path.read_text(encoding="utf-8"))  # what is reported is what is in the file
    write_text(out / f"table{arguments.table}.md", report(arguments.table, data))
    picture = out / f"table{arguments.table}.png"
    if arguments.table == 4:
        plot_recall(results, picture)
    elif arguments.table == 5:
        plot_places(data, picture)
    else:
        plot_quality(table, data, picture)
    print(report(arguments.table, data))
    if arguments.quick:
        print("a few steps teach nothing: the numbers above only show that everything runs")
    print(f"wrote {out}/table{arguments.table}.md, .json and .png")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.ablate", description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=int, choices=sorted(TABLES), required=True, help="which table")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this minus 1 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps, into runs/study-quick")
    parser.add_argument("--report", action="store_true", help="train nothing, write the table from finished runs")
    return run_script(run, parser.parse_args(argv), "mod.study.ablate")


if __name__ == "__main__":
    sys.exit(main())
