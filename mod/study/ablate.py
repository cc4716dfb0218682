"""The paper's tables, small: train every variant with equal steps and data over seeds, and write what comes out.

    python -m mod.study.ablate --table 1             # methods: full computation, early exit, skipping, MoD, pooling
    python -m mod.study.ablate --table 2             # which layers are routed
    python -m mod.study.ablate --table 3             # how tokens are chosen, and how many are kept
    python -m mod.study.ablate --table 4             # ours: what makes the router learn
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
from collections.abc import Callable
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
from mod.study.costs import average_text, decoder_flops, dense, kv_bytes
from mod.study.plots import BLUE, GREEN, ORANGE, PURPLE, VERMILION, save
from mod.study.sweep import Variant, collect, sweep
from mod.train import step_clips, validation_clips
from mod.videollm import VideoLLM, stream_loss

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
}


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper (or our reading of it) states: `better` has the higher `measure` than `worse`."""

    better: str
    worse: str
    measure: str
    source: str


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[str, ...]
    claims: tuple[Claim, ...]


TABLES = {
    1: Table(
        "Methods",
        ("full", "exit-2", "exit-1", "skip", "pool", "mod"),
        (
            Claim("mod", "exit-2", "narration", "paper, Table 1"),
            Claim("mod", "exit-1", "narration", "paper, Table 1"),
            Claim("mod", "skip", "narration", "paper, Table 1"),
            Claim("mod", "pool", "narration", "paper, Table 1"),
            Claim("mod", "pool", "questions", "paper, Table 1"),
            Claim("mod", "full", "narration", "paper, Table 1: comparable"),
            Claim("mod", "full", "questions", "paper, Table 1: comparable"),
        ),
    ),
    2: Table(
        "Which layers are routed",
        ("full", "all", "all-deep", "mod", "interleaved-deep"),
        (
            Claim("mod", "all", "narration", "paper, Table 2"),
            Claim("mod", "all", "questions", "paper, Table 2"),
            Claim("mod", "all-deep", "narration", "paper, Table 2"),
            Claim("interleaved-deep", "mod", "narration", "fewer layers are routed"),
        ),
    ),
    3: Table(
        "How tokens are chosen, and how many are kept",
        ("full", "random", "uniform", "r-0.1", "mod", "r-0.5", "all-random", "all-uniform", "all"),
        (
            Claim("mod", "random", "narration", "paper, Table 3"),
            Claim("mod", "uniform", "narration", "paper, Table 3"),
            Claim("all", "all-random", "narration", "paper, Table 3, in all layers"),
            Claim("all", "all-random", "questions", "paper, Table 3, in all layers"),
            Claim("all", "all-uniform", "narration", "paper, Table 3, in all layers"),
            Claim("all", "all-uniform", "questions", "paper, Table 3, in all layers"),
            Claim("mod", "r-0.1", "narration", "more tokens"),
            Claim("r-0.5", "mod", "narration", "more tokens"),
        ),
    ),
    4: Table(
        "What makes the router learn",
        ("update", "mod", "taught", "random", "uniform", "oracle",
         "all-update", "all", "all-random", "all-uniform", "all-oracle"),
        (
            Claim("mod", "update", "recall", "ours"),
            Claim("taught", "update", "recall", "ours"),
            Claim("mod", "update", "narration", "ours"),
            Claim("mod", "update", "questions", "ours"),
            Claim("all", "all-update", "recall", "ours"),
            Claim("all", "all-update", "narration", "ours"),
            Claim("all", "all-update", "questions", "ours"),
            Claim("oracle", "mod", "narration", "ours"),
            Claim("all-oracle", "all", "narration", "ours"),
        ),
    ),
}  # fmt: skip
MEASURES: dict[str, Callable[[dict], float]] = {  # how a column is read off the result of a run
    "narration": lambda run: run["narration_exact"],
    "free-running narration": lambda run: run["free_running"]["narration_exact"],
    "speak": lambda run: run["speak_accuracy"],
    "questions": lambda run: run["question_accuracy"],
    "now": lambda run: run["kinds"]["now"],
    "past": lambda run: run["kinds"]["past"],
    "spark": lambda run: run["kinds"]["spark"],
    "LM-PPL": lambda run: run["lm_ppl"],
    "TimeDiff (s)": lambda run: run["time_diff"],
    "Fluency": lambda run: run["fluency"],
    "steps to quality": lambda run: steps_to(run, GOOD),
    "recall": lambda run: recall(run),
}
GOOD = 0.2  # the fixed quality: LM loss, nats per text label; training clips are never repeated, so they are unseen


def quick(base: Config) -> Config:
    """The study in a few steps of small batches: shows that everything works, says nothing about the method."""
    train = replace(base.train, steps=10, batch_size=4, vit_steps=20, eval_every=0, eval_clips=8)
    return replace(base, train=train)


def steps_to(run: dict, quality: float) -> float:
    """The first logged step at which the LM loss was as low as this; nan if never (it needs more steps)."""
    good = [point["step"] for point in run["curve"] if point.get("lm", math.inf) <= quality]
    return good[0] if good else math.nan


def recall(run: dict) -> float:
    """Share of sprite patches kept, mean over the routed layers and over the logged steps of the whole training."""
    points = [statistics.mean(point["recall"].values()) for point in run["curve"] if point.get("recall")]
    return statistics.mean(points) if points else math.nan


def costs(base: Config) -> dict[str, dict[str, float]]:
    """Decoder FLOPs and KV cache of every variant on an average stream, as a share of full computation."""
    frames, text = base.data.frames, average_text(validation_clips(base, 64))
    full = dense(base.model)
    shares = {}
    for name, variant in VARIANTS.items():
        config = replace(base.model, **variant.model)
        if variant.routers == "oracle":
            config = replace(config, select="random")  # no scores to compute
        shares[name] = {
            "flops": decoder_flops(config, frames, text) / decoder_flops(full, frames, text),
            "kv": kv_bytes(config, frames, text) / kv_bytes(full, frames, text),
        }
    return shares


def step_times(base: Config, names: list[str], turns: int = 7) -> dict[str, float]:
    """Time of a training step (decoder forward, loss, backward) as a share of full computation's, side by side."""
    words, steps = vocabulary(), {}
    for name in dict.fromkeys(["full", *names]):
        config = replace(base, model=replace(base.model, **VARIANTS[name].model))
        torch.manual_seed(0)
        model = VideoLLM(config.model)
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


def mean_and_error(numbers: list[float | None]) -> str:
    """mean ± standard error; with the number of runs that count when some have no value."""
    known = [number for number in numbers if number is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known) / math.sqrt(len(known)):.3f}" if len(known) > 1 else ""
    text = f"{statistics.mean(known):.3f}{spread}"
    if max(known) > 10:  # steps, not shares
        text = f"{statistics.mean(known):.0f}" + (
            f" ± {statistics.stdev(known) / math.sqrt(len(known)):.0f}" if len(known) > 1 else ""
        )
    return text if len(known) == len(numbers) else f"{text} ({len(known)} of {len(numbers)})"


def judge(values: dict, claim: Claim) -> str:
    """One line: the ordering claimed, what was measured, and whether it can be told from chance (paired t-test).

    values: variant -> measure -> seed -> value; None, in a file, stands for nan.
    """
    one, other = values[claim.better][claim.measure], values[claim.worse][claim.measure]
    seeds = sorted(set(one) & set(other))
    seeds = [seed for seed in seeds if one[seed] is not None and other[seed] is not None]
    gaps = [one[seed] - other[seed] for seed in seeds]
    start = f"| {claim.better} > {claim.worse} | {claim.measure} | {claim.source} |"
    if len(gaps) < 2:
        return f"{start} - | - | not enough runs |"
    p = float(ttest_rel([one[s] for s in seeds], [other[s] for s in seeds]).pvalue) if any(gaps) else 1.0
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    verdict = "not told from chance" if not p < 0.05 else "seen" if mean > 0 else "**the other way round**"
    return f"{start} {mean:+.3f} ± {error:.3f} | {p:.3f} | {verdict} |"


def report(number: int, data: dict) -> str:
    """The table in Markdown, from what is in its JSON file."""
    table, values = TABLES[number], data["values"]
    seeds = {len(values[name]["narration"]) for name in table.rows}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    measures = [measure for measure in MEASURES if measure != "recall" or number == 4]
    lines = [
        f"**Table {number}. {table.title}.** Mean ± standard error over {count} seeds, {data['steps']} steps each, on "
        f"{data['clips']} unseen clips; costs as a share of full computation; quality: an LM loss of {GOOD} nats.",
        "",
        "| | " + " | ".join(measures) + " | FLOPs | KV cache | step time | seeds |",
        "|---" * (len(measures) + 5) + "|",
    ]
    for name in table.rows:
        cells = [mean_and_error(list(values[name][measure].values())) for measure in measures]
        cost = data["costs"][name]
        cells += [f"{cost['flops']:.2f}", f"{cost['kv']:.2f}", f"{data['times'][name]:.2f}"]
        lines.append(
            f"| `{name}` {VARIANTS[name].title} | " + " | ".join(cells) + f" | {len(values[name]['narration'])} |"
        )
    lines += ["", "Orderings, seed by seed (paired t-test; p below 0.05 counts as told from chance):", "",
              "| ordering | measure | who says so | difference | p | verdict |", "|---|---|---|---|---|---|",
              *(judge(values, claim) for claim in table.claims)]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(number: int, data: dict, results: dict, path: Path) -> None:
    """Quality against cost with error bars; for table 4, recall over training in place of it."""
    table = TABLES[number]
    rows = [name for name in table.rows if results[name]]
    if number == 4:
        figure = Figure(figsize=(13, 4.6), layout="constrained")
        styles = {"update": VERMILION, "mod": BLUE, "taught": GREEN, "random": "grey", "uniform": PURPLE,
                  "oracle": ORANGE}  # fmt: skip
        places = (("", "layers 1 and 3"), ("all-", "all layers"))
        for axis, (prefix, where) in zip(figure.subplots(1, 2), places, strict=True):
            for name, colour in styles.items():
                key = prefix + name if prefix + name != "all-mod" else "all"
                if key not in rows:
                    continue
                curves = [
                    {p["step"]: statistics.mean(p["recall"].values()) for p in run["curve"] if p.get("recall")}
                    for run in results[key].values()
                ]
                steps = sorted(set.intersection(*(set(one) for one in curves)))
                middle = [statistics.mean(one[step] for one in curves) for step in steps]
                low, high = ([pick(one[step] for one in curves) for step in steps] for pick in (min, max))
                axis.plot(steps, middle, color=colour, label=f"{key} ({len(curves)} seeds)")
                axis.fill_between(steps, low, high, color=colour, alpha=0.12)
            axis.set(title=f"Routers in {where}: mean and range over seeds", xlabel="training step",
                     ylabel="sprite patches kept (share)", ylim=(-0.02, 1.05))  # fmt: skip
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    else:
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        colours = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, "grey"]
        for axis, measure in zip(figure.subplots(1, 2), ("narration", "questions"), strict=True):
            for place, name in enumerate(rows):
                known = list(data["values"][name][measure].values())
                error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0
                axis.errorbar(data["costs"][name]["flops"], statistics.mean(known), error, capsize=3, label=name,
                              marker="os^vD*XP<>h"[place % 11], color=colours[place % 6])  # fmt: skip
            axis.set(title=f"{table.title}: {measure}", xlabel="decoder FLOPs (share of full computation)",
                     ylabel="share right, mean ± standard error over seeds")  # fmt: skip
            axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path)


def run(arguments) -> int:
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise UserError(f"seeds and jobs must be at least 1, got {arguments.seeds} and {arguments.jobs}")
    table, base = TABLES[arguments.table], PRESETS["study"]
    runs, out, seeds = Path("runs/study"), Path("results"), arguments.seeds
    if arguments.quick:
        base, runs, out, seeds = quick(base), Path("runs/study-quick"), Path("runs/study-quick"), min(seeds, 2)
    out.mkdir(parents=True, exist_ok=True)
    variants = {name: VARIANTS[name] for name in table.rows}
    if not arguments.report:
        sweep(runs, out / "study", base, variants, seeds, arguments.jobs)
    results = collect(out / "study", base, variants, seeds)
    missing = [name for name, found in results.items() if not found]
    if missing:
        raise UserError(f"no finished run of {', '.join(missing)} in {out / 'study'}; train first, without --report")
    kept, path = {}, out / f"table{arguments.table}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))["times"]
    if set(table.rows) - set(kept):
        kept = step_times(base, list(table.rows))
    data = {
        "steps": base.train.steps,
        "clips": base.train.eval_clips,
        "costs": {name: share for name, share in costs(base).items() if name in table.rows},
        "times": {name: kept[name] for name in table.rows},
        "values": {
            name: {measure: {seed: read(run) for seed, run in found.items()} for measure, read in MEASURES.items()}
            for name, found in results.items()
        },
    }
    write_text(path, to_json(data, indent=1) + "\n")
    data = json.loads(path.read_text(encoding="utf-8"))  # what is reported is what is in the file
    write_text(out / f"table{arguments.table}.md", report(arguments.table, data))
    plot(arguments.table, data, results, out / f"table{arguments.table}.png")
    print(report(arguments.table, data))
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
