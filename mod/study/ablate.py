"""The paper's tables, with one sprite: every variant trained with equal steps and data over seeds, and what comes out.

    python -m mod.study.ablate --table 1             # methods: full computation, early exit, skipping, MoD, pooling
    python -m mod.study.ablate --table 2             # which layers are routed
    python -m mod.study.ablate --table 3             # how tokens are chosen, and how many are kept
    python -m mod.study.ablate --table 1 --quick     # two seeds of a few steps each, to see that it works
    python -m mod.study.ablate --table 1 --report    # train nothing: write the table from the runs that are finished

What a finished run measured is kept in results/study, shared between the tables, and never measured again. Writes
results/tableN.md, .json and .png; with --quick into runs/study-quick, because a few steps say nothing about the method.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from matplotlib.figure import Figure

from mod.config import Config
from mod.live.costs import dense
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.related.world import WORLD
from mod.study.common import PURPLE, command, markdown, publish
from mod.study.costs import average_text, decoder_flops, kv_bytes
from mod.study.statistics import judge, mean_error, means, number_of_seeds
from mod.study.sweep import TrialFlags, configure, read_off, trained
from mod.study.tables import COLUMNS, GOOD, JUDGED, MEASURES, TABLES, VARIANTS, Table

BASE = WORLD.presets["study"]


@dataclass(frozen=True)
class Flags(TrialFlags):
    table: Literal["1", "2", "3"] = "1"  # which table


def costs(base: Config, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Decoder FLOPs and KV cache of every variant on an average stream, as a share of the base's full computation."""
    _, source = WORLD.build(base, torch.device("cpu"))
    stream, full = (base.data.frames, average_text(source.validation(64), source.words)), dense(base.model)
    shares = {}
    for name in names:
        config = configure(base, VARIANTS[name], 0).model
        shares[name] = {"flops": decoder_flops(config, *stream) / decoder_flops(full, *stream),
                        "kv": kv_bytes(config, *stream) / kv_bytes(full, *stream)}
    return shares


def report(number: int, data: dict) -> str:
    """The table in Markdown, from what is in its JSON file; variants without a finished run are named and left out."""
    table = TABLES[number]
    values = {name: data["values"][name] for name in table.rows if name in data["values"]}
    rows = means(values, {name: f"`{name}` {VARIANTS[name].title}" for name in values}, COLUMNS)
    rows["FLOPs"] = [f"{data['costs'][name]['flops']:.2f}" for name in values]
    rows["seeds"] = [str(len(found["narration"])) for found in values.values()]
    claims = [claim for claim in table.claims if claim[0] in values and claim[1] in values]
    gaps = {f"`{better}` > `{worse}`": {"who says so": source} | {
                measure: judge(values[better][measure], values[worse][measure]) for measure in JUDGED}
            for better, worse, source in claims}
    orderings = pd.DataFrame.from_dict(gaps, orient="index").rename_axis("ordering")
    tests, waiting = len(claims) * len(JUDGED), [name for name in table.rows if name not in values]
    parts = [
        f"**Table {number}. {table.title}.** Mean ± standard error over {number_of_seeds(values)} seeds, "
        f"{data['steps']} steps each, on {data['clips']} validation clips. FLOPs: of the decoder, as a share of full "
        f"computation; steps to quality: to an LM loss of {GOOD} nats.\n",
        markdown(rows),
        f"Orderings: difference, seed by seed (p of a paired t-test); bold where p < 0.05, as chance alone makes about "
        f"{0.05 * tests:.2g} of these {tests}; not bold is not a proof of equality:\n",
        markdown(orderings),
    ]
    return "\n".join([*parts, f"Not run yet: {', '.join(waiting)}.\n"] if waiting else parts)


def plot_quality(table: Table, data: dict, path: Path) -> None:
    """Quality against cost, mean and standard error over seeds."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    colours = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, "grey"]
    for axis, measure in zip(figure.subplots(1, 3), ("free-running narration", "silence", "spark"), strict=True):
        for place, name in enumerate(name for name in table.rows if name in data["values"]):
            mean, error = mean_error(data["values"][name][measure])
            aside = 0.008 * (place % 3 - 1)  # so that variants of equal cost do not hide each other
            axis.errorbar(data["costs"][name]["flops"] + aside, mean, error, capsize=3, label=name, linestyle="none",
                          marker="os^vD*XP<>h"[place % 11], color=colours[place % 6])
        axis.set(title=measure, xlabel="decoder FLOPs (share of full computation)",
                 ylabel="share right, mean ± standard error over seeds")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{table.title} (variants of equal cost are drawn side by side)")
    save(figure, path)


def run(flags: Flags) -> int:
    number = int(flags.table)
    table = TABLES[number]
    out, base, found = trained("study", flags, BASE, {name: VARIANTS[name] for name in table.rows})
    results = {"steps": base.train.steps, "clips": base.train.eval_clips, "costs": costs(base, list(found)),
               "values": read_off(found, MEASURES)}
    publish(out.with_name(f"table{number}"), results, report(number, results), partial(plot_quality, table))
    if flags.quick:
        print("a few steps teach nothing: the numbers above only show that everything runs")
    return 0


main = command("mod.study.ablate", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
