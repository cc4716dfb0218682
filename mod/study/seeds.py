"""Does it hold on every seed? Train the default and what it is compared with on several seeds, and write one table.

    python -m mod.study.seeds                  # 5 seeds of each variant, two at a time; about an hour on two cores
    python -m mod.study.seeds --seeds 1        # one seed

Finished runs are kept in runs/seeds and never repeated; a run that was cut off is resumed. Writes results/seeds.json
and results/seeds.md, which is the README's table.
"""

import statistics
import sys
from pathlib import Path

from mod.checkpoint import to_json, write_text
from mod.config import PRESETS, UserError
from mod.flags import Parser, run_script
from mod.study.costs import average_text, ratios
from mod.study.sweep import Variant, collect, configure, sweep
from mod.study.tables import MEASURES
from mod.train import validation_clips

VARIANTS = {
    "value": Variant("MoD, value gate (the default)"),
    "full": Variant("full computation", {"layers": "none"}),
    "update": Variant("MoD, update gate (the paper's)", {"gate": "update"}),
}
COLUMNS = ("narration", "questions", "speak", "silence", "free-running narration")
EARLY = 60  # step at which the routers' early recall is read off the log
RUNS, RESULTS = Path("runs/seeds"), Path("results")


def entry(run: dict, costs: dict[str, float]) -> dict:
    """What seeds.json holds of a run: its metrics, what its variant costs, and its early recall."""
    early = next(point["recall"] for point in run["curve"] if "lm" in point and point["step"] >= EARLY)
    metrics = {name: run[name] for name in run if name not in ("config", "routers", "start", "kinds", "curve")}
    return metrics | costs | {"recall_early": early, "shared_encoder": True}


def table(results: dict[str, list[dict]]) -> str:
    """Worst seed, mean and standard deviation of every column, as a Markdown table."""
    first = next(iter(results.values()))
    # Runs of a file that does not say so warmed up a vision encoder each.
    shared = "; the variants of a seed share its vision encoder" if "shared_encoder" in first[0] else ""
    lines = [f"Worst of {len(first)} seeds (mean ± standard deviation) after {first[0]['steps']} steps, on unseen "
             f"clips{shared}:", "",
             f"| | {' | '.join(COLUMNS)} | recall at step {EARLY} | recall at the end | decoder FLOPs | KV cache |",
             "|---" * (len(COLUMNS) + 5) + "|"]  # fmt: skip
    for title, runs in results.items():
        cells = []
        for column in COLUMNS:
            values = [MEASURES[column](run) for run in runs]
            spread = f" ({statistics.mean(values):.3f} ± {statistics.stdev(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{min(values):.3f}{spread}")
        for key in ("recall_early", "recall"):
            recalls = [[run[key][layer] for run in runs] for layer in runs[0][key]]
            cells.append(", ".join(f"{min(values):.2f} to {max(values):.2f}" for values in recalls) or "-")
        cells += [f"{runs[0]['flop_ratio']:.2f}", f"{runs[0]['kv_ratio']:.2f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(arguments) -> int:
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise UserError(f"seeds and jobs must be at least 1, got {arguments.seeds} and {arguments.jobs}")
    base, results = PRESETS["tiny"], {}
    sweep(RUNS, RUNS, base, VARIANTS, list(VARIANTS), arguments.seeds, arguments.jobs)
    text = average_text(validation_clips(base, 64))
    for name, runs in collect(RUNS, base, VARIANTS, arguments.seeds).items():
        costs = ratios(configure(base, VARIANTS[name], 0).model, base.data.frames, text)
        results[VARIANTS[name].title] = [entry(run, costs) for run in runs.values()]
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "seeds.json", to_json(results, indent=1) + "\n")
    shown = table(results)
    write_text(RESULTS / "seeds.md", shown)
    print(shown)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.seeds", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this minus 1 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: %(default)s)")
    return run_script(run, parser.parse_args(argv), "mod.study.seeds")


if __name__ == "__main__":
    sys.exit(main())
