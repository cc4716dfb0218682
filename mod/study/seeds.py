"""Does it hold on every seed? Train the default, full computation and the other gates on several seeds: one table.

    python -m mod.study.seeds                  # 5 seeds of each variant, two at a time; half an hour on two cores
    python -m mod.study.seeds --seeds 1        # one seed

Finished runs are kept in runs/seeds and never repeated; a run that was cut off goes on where it stopped. Writes
results/seeds.json and results/seeds.md.
"""

import sys
from pathlib import Path

import pandas as pd

from mod.config import Config
from mod.evaluate import cost_ratios
from mod.run import to_json, write_text
from mod.study.common import command, markdown
from mod.study.costs import average_text
from mod.study.sweep import Flags, Variant, collect, configure, sweep
from mod.study.tables import MEASURES
from mod.train import synthetic

BASE = Config()
VARIANTS = {
    "default": Variant("MoD (the default, gate sigmoid-value)"),
    "full": Variant("full computation", {"layers": "none"}),
    "score-update": Variant("MoD, gate score-update (the paper's)", {"gate": "score-update"}),
    "sigmoid-update": Variant("MoD, gate sigmoid-update", {"gate": "sigmoid-update"}),
    "score-value": Variant("MoD, gate score-value", {"gate": "score-value"}),
}
COLUMNS = ("narration", "questions", "speak", "silence", "free-running narration")
EARLY = 60  # step at which the routers' early recall is read off the log
RUNS, RESULTS = Path("runs/seeds"), Path("results")


def entry(run: dict, costs: dict[str, float]) -> dict:
    """What seeds.json holds of a run: its metrics, what its variant costs, and its early recall."""
    early = next(point["recall"] for point in run["curve"] if "lm" in point and point["step"] >= EARLY)
    metrics = {name: run[name] for name in run if name not in ("config", "routers", "start", "kinds", "curve")}
    return metrics | costs | {"recall_early": early}


def cell(values: pd.Series) -> str:
    """The worst of some seeds; with their mean and standard deviation when there are several."""
    spread = f" ({values.mean():.3f} ± {values.std():.3f})" if len(values) > 1 else ""
    return f"{values.min():.3f}{spread}"


def ranges(recalls: list[dict[str, float]]) -> str:
    """For every routed layer the least and the most of some seeds."""
    layers = pd.DataFrame(recalls)
    return ", ".join(f"{layers[layer].min():.2f} to {layers[layer].max():.2f}" for layer in layers) or "-"


def table(results: dict[str, list[dict]]) -> str:
    """Worst seed, mean and standard deviation of every column, as a Markdown table."""
    steps, seeds = {(run["steps"], len(runs)) for runs in results.values() for run in runs}.pop()
    measured = pd.DataFrame([{"": title} | {column: MEASURES[column](run) for column in COLUMNS}
                             for title, runs in results.items() for run in runs])
    rows = measured.groupby("", sort=False).agg(cell)
    for column, key in ((f"recall at step {EARLY}", "recall_early"), ("recall at the end", "recall")):
        rows[column] = [ranges([run[key] for run in runs]) for runs in results.values()]
    for column, key in (("decoder FLOPs", "flop_ratio"), ("KV cache", "kv_ratio")):
        rows[column] = [f"{runs[0][key]:.2f}" for runs in results.values()]
    return (f"Worst of {seeds} seeds (mean ± standard deviation) after {steps} steps, on unseen clips; the variants of "
            f"a seed share its vision encoder:\n\n{markdown(rows)}")


def run(flags: Flags) -> int:
    sweep(RUNS, RUNS, BASE, VARIANTS, list(VARIANTS), flags.seeds, flags.jobs)
    source, results = synthetic(BASE), {}
    text = average_text(source.validation(64), source.words)
    for name, runs in collect(RUNS, BASE, VARIANTS, flags.seeds).items():
        costs = cost_ratios(configure(BASE, VARIANTS[name], 0).model, BASE.data.frames, text)
        results[VARIANTS[name].title] = [entry(run, costs) for run in runs.values()]
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "seeds.json", to_json(results, indent=1) + "\n")
    shown = table(results)
    write_text(RESULTS / "seeds.md", shown)
    print(shown)
    return 0


main = command("mod.study.seeds", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
