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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from mod.config import Config, require
from mod.data import clip_batch
from mod.live.costs import dense
from mod.related.world import WORLD
from mod.run import to_json, write_text
from mod.study import routers
from mod.study.ablate_report import plot_places, plot_quality, plot_recall, report
from mod.study.common import command
from mod.study.costs import average_text, decoder_flops, kv_bytes
from mod.study.machine import Machine, ratio, side_by_side
from mod.study.sweep import TrialFlags, Variant, collect, configure, quick, read_off, sweep
from mod.study.tables import MEASURES, TABLES, VARIANTS, Table

BASE = WORLD.presets["study"]


@dataclass(frozen=True)
class Flags(TrialFlags):
    table: Literal["1", "2", "3", "4", "5"] = "1"  # which table


def costs(base: Config, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Decoder FLOPs and KV cache of every variant on an average stream, as a share of the base's full computation."""
    _, source = WORLD.build(base, torch.device("cpu"))
    stream, full = (base.data.frames, average_text(source.validation(64), source.words)), dense(base.model)
    shares = {}
    for name in names:
        config = configure(base, VARIANTS[name], 0).model
        if VARIANTS[name].routers == "oracle":
            config = replace(config, select="random")  # no scores to compute
        shares[name] = {"flops": decoder_flops(config, *stream) / decoder_flops(full, *stream),
                        "kv": kv_bytes(config, *stream) / kv_bytes(full, *stream)}
    return shares


def training_step(base: Config, variant: Variant) -> Callable[[], None]:
    """A function that runs connector and decoder forward, loss and backward once; the frozen encoder and the optimizer,
    alike for all, are left out."""
    config = configure(base, variant, 0)
    model, source = WORLD.build(config, torch.device("cpu"))
    if variant.routers:
        routers.equip(model, variant.routers)
    batch = clip_batch(source.words, source.training(0), config.model)
    with torch.no_grad():
        batch = batch._replace(pixels=model.vit(batch.pixels))

    def step() -> None:
        text, stream = model(batch)
        ((text + stream) / sum(batch.counts)).backward()

    return step


def step_times(base: Config, names: Sequence[str], turns: int = 7) -> dict[str, float]:
    """Time of a training step as a share of full computation's, side by side."""
    steps = {name: training_step(base, VARIANTS[name]) for name in dict.fromkeys(["full", *names])}
    with tqdm(total=turns + 1, desc="step times", unit="turn", disable=None) as bar:
        times = side_by_side(Machine(), steps, turns, bar)
    return {name: ratio(times, name, "full") for name in names}


def all_step_times(base: Config, clock: Path, rows: Sequence[str]) -> dict[str, float]:
    """Step times of these rows, from the file `clock`. One that lacks some is written anew, with every variant in it,
    because only times taken side by side compare."""
    times = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else {}
    if not set(rows) <= set(times):
        times = step_times(base, [name for table in TABLES.values() if table.with_costs for name in table.rows])
        write_text(clock, to_json(times, indent=1) + "\n")
    return {name: times[name] for name in rows}


def summary(table: Table, base: Config, variants: dict[str, Variant], results: dict, clock: Path) -> dict:
    """What the file of a table holds: `results` (variant -> seed -> metrics) column by column, and the costs."""
    rows = list(results)
    settings = configure(base, variants[rows[0]], 0).train
    return {
        "steps": settings.steps,
        "clips": settings.eval_clips,
        "costs": costs(base, rows) if table.with_costs else {},
        "times": all_step_times(base, clock, rows) if table.with_costs else {},
        "values": read_off(results, MEASURES),
    }


def run(flags: Flags) -> int:
    number, base, variants, seeds = int(flags.table), BASE, VARIANTS, flags.seeds
    table, runs, out = TABLES[number], Path("runs/study"), Path("results")
    if flags.quick:
        base, variants = quick(base), {name: replace(one, train={}) for name, one in VARIANTS.items()}
        runs, out, seeds = Path("runs/study-quick"), Path("runs/study-quick"), min(seeds, 2)
    out.mkdir(parents=True, exist_ok=True)
    if not flags.report:
        sweep(runs, out / "study", base, variants, table.rows, seeds, flags.jobs)
    results = collect(out / "study", base, {name: variants[name] for name in table.rows}, seeds)
    results = {name: found for name, found in results.items() if found}
    require(results, f"no finished run of this table in {out / 'study'}; train first, without --report")
    path = out / f"table{number}.json"
    write_text(path, to_json(summary(table, base, variants, results, out / "step-times.json"), indent=1) + "\n")
    data = json.loads(path.read_text(encoding="utf-8"))  # what is reported is what is in the file
    text = report(number, data)
    write_text(path.with_suffix(".md"), text)
    picture = path.with_suffix(".png")
    if number == 4:
        plot_recall(results, picture)
    elif number == 5:
        plot_places(data, picture)
    else:
        plot_quality(table, data, picture)
    print(text)
    if flags.quick:
        print("a few steps teach nothing: the numbers above only show that everything runs")
    print(f"wrote {out}/table{number}.md, .json and .png")
    return 0


main = command("mod.study.ablate", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
