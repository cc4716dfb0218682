"""The paper's tables, small: train every variant with equal steps and data over seeds, and write what comes out.

    python -m mod.study.ablate --table 1             # methods: full computation, early exit, skipping, MoD, pooling
    python -m mod.study.ablate --table 2             # which layers are routed
    python -m mod.study.ablate --table 3             # how tokens are chosen, and how many are kept
    python -m mod.study.ablate --table 4             # ours: what makes the router learn
    python -m mod.study.ablate --table 5             # ours: where that stops holding
    python -m mod.study.ablate --table field         # every system of the field (mod/study/field.py), three seeds
    python -m mod.study.ablate --table 1 --quick     # two seeds of a few steps each, to see that it works
    python -m mod.study.ablate --table 1 --report    # train nothing: write the table from the runs that are finished

What a finished run measured is kept in results/study, shared between the tables, and never measured again. Writes
results/tableN.md, .json and .png; with --quick into runs/study-quick, because a few steps say nothing about the method.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from mod.checkpoint import to_json, write_text
from mod.config import PRESETS, Config, UserError
from mod.data import clip_batch, vocabulary
from mod.flags import Parser, run_script
from mod.study import field, routers
from mod.study.ablate_report import plot_places, plot_quality, plot_recall, report
from mod.study.costs import average_text, ratios
from mod.study.machine import Machine, ratio, side_by_side
from mod.study.sweep import Variant, collect, configure, sweep
from mod.study.tables import MEASURES, TABLES, VARIANTS, Table
from mod.train import step_clips, validation_clips
from mod.videollm import VideoLLM, stream_loss

SEEDS, FIELD_SEEDS = 5, 3


def quick(base: Config) -> Config:
    """The study in a few steps of small batches: shows that everything works, says nothing about the method."""
    few = {"steps": 10, "batch_size": 4, "vit_steps": 20, "eval_every": 0, "eval_clips": 8}
    return replace(base, train=replace(base.train, **few))


def costs(base: Config, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Decoder FLOPs and KV cache of every variant on an average stream, as a share of the base's full computation."""
    frames, text, shares = base.data.frames, average_text(validation_clips(base, 64)), {}
    for name in names:
        config = replace(base.model, **VARIANTS[name].model)
        if VARIANTS[name].routers == "oracle":
            config = replace(config, select="random")  # no scores to compute
        share = ratios(config, frames, text, base.model)
        shares[name] = {"flops": share["flop_ratio"], "kv": share["kv_ratio"]}
    return shares


def training_step(base: Config, variant: Variant) -> Callable[[], None]:
    """A function that runs connector and decoder forward, loss and backward once; the frozen encoder and the optimizer,
    alike for all, are left out."""
    config = replace(base, model=replace(base.model, **variant.model))
    torch.manual_seed(0)
    model = routers.build(config.model, variant.routers) if variant.routers else VideoLLM(config.model)
    batch = clip_batch(vocabulary(), step_clips(config, 0), config.model.frame_tokens)
    with torch.no_grad():
        features = model.vit(batch.pixels)

    def step() -> None:
        hidden = model(batch.ids, batch.frame, batch.pos, model.connector(features))
        stream_loss(model, hidden, batch)[0].backward()

    return step


def step_times(base: Config, names: Sequence[str], turns: int = 7) -> dict[str, float]:
    """Time of a training step as a share of full computation's, side by side."""
    steps = {name: training_step(base, VARIANTS[name]) for name in dict.fromkeys(["full", *names])}
    with tqdm(total=turns + 1, desc="step times", unit="turn", disable=None) as bar:
        times = side_by_side(Machine(), steps, turns, bar)
    return {name: ratio(times, name, "full") for name in names}


def all_step_times(base: Config, clock: Path, rows: Sequence[str]) -> dict[str, float]:
    """Step times of these rows, from the file `clock`; one that lacks some is written anew, with every variant in it,
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
        "values": {
            name: {measure: {seed: read(run) for seed, run in found.items()} for measure, read in MEASURES.items()}
            for name, found in results.items()
        },
    }


def run(arguments) -> int:
    seeds = arguments.seeds if arguments.seeds is not None else FIELD_SEEDS if arguments.table == "field" else SEEDS
    if seeds < 1 or arguments.jobs < 1:
        raise UserError(f"seeds and jobs must be at least 1, got {seeds} and {arguments.jobs}")
    if arguments.table == "field":
        base, runs, out = PRESETS["field"], Path("runs/field"), Path("results")
        if arguments.quick:
            base, runs, out, seeds = quick(base), Path("runs/field-quick"), Path("runs/field-quick"), min(seeds, 2)
        field.run(base, runs, out, seeds, arguments.jobs, arguments.report)
        return 0
    number = int(arguments.table)
    table, base, variants = TABLES[number], PRESETS["study"], VARIANTS
    runs, out = Path("runs/study"), Path("results")
    if arguments.quick:
        base, variants = quick(base), {name: replace(one, train={}) for name, one in VARIANTS.items()}
        runs, out, seeds = Path("runs/study-quick"), Path("runs/study-quick"), min(seeds, 2)
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        sweep(runs, out / "study", base, variants, table.rows, seeds, arguments.jobs)
    results = collect(out / "study", base, {name: variants[name] for name in table.rows}, seeds)
    results = {name: found for name, found in results.items() if found}
    if not results:
        raise UserError(f"no finished run of this table in {out / 'study'}; train first, without --report")
    data = summary(table, base, variants, results, out / "step-times.json")
    path = out / f"table{number}.json"
    write_text(path, to_json(data, indent=1) + "\n")
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
    if arguments.quick:
        print("a few steps teach nothing: the numbers above only show that everything runs")
    print(f"wrote {out}/table{number}.md, .json and .png")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.ablate", description=__doc__.split("\n")[0])
    parser.add_argument("--table", choices=[*map(str, sorted(TABLES)), "field"], required=True, help="which table")
    parser.add_argument("--seeds", type=int, help=f"seeds 0 to this minus 1 (default: {SEEDS}, of field {FIELD_SEEDS})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps, into runs/study-quick")
    parser.add_argument("--report", action="store_true", help="train nothing, write the table from finished runs")
    return run_script(run, parser.parse_args(argv), "mod.study.ablate")


if __name__ == "__main__":
    sys.exit(main())
