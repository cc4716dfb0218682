"""The field in a crowd: every system of mod/related with one look a question, as its paper has it and at MoD's cost.

    python -m mod.study.crowd_field                      # three seeds of each, two runs at a time
    python -m mod.study.crowd_field --only full,fastv    # two of them
    python -m mod.study.crowd_field --quick              # two seeds of a few steps each, to see that it works
    python -m mod.study.crowd_field --report             # train nothing: write the table from finished runs

All are trained from scratch on the preset `crowd`, for as many steps and on the same clips. Some of the runs are those
of table C of mod/study/crowd.py; the others stand beside them in results/crowd. A name that ends in "-cheap" is a
method set to about the cost of MoD in all layers, as `--cheap` sets it. Visual Context Window's positions are left out:
clips are no longer than those of training, where they are those of full computation. Writes results/crowd-field.json,
.md and .png.
"""

import sys
from dataclasses import dataclass
from functools import partial

from mod.config import require
from mod.related.costs import counted
from mod.related.methods import METHODS
from mod.study import crowd, field
from mod.study.common import command, markdown, publish
from mod.study.needle import APART, LIVE, live_clip
from mod.study.statistics import means, number_of_seeds
from mod.study.sweep import TrialFlags, chosen, configure, read_off, trained, untrained

OURS = {"mod": False, "full": False, "early-exit": True, "layer-skip": True}  # cheap or not, they are in table C
BESIDE = {"skip": ("mod-all", "random-all", "uniform-all", "skip"), "drop on the way": ("exit",),
          "drop before": ("drop",)}  # table C's, by family


NAMES = "mod-all", "mod", "full", "random-all", "uniform-all", "drop", "exit", "skip"  # of table C
VARIANTS = {name: crowd.VARIANTS[f"one-{name}"] for name in NAMES}
for name, method in METHODS.items():
    if name == "visual-rope":
        continue
    for cheap in (False, True) if method.cheap else (False,):
        if OURS.get(name) != cheap:
            VARIANTS[name + "-cheap" * cheap] = crowd.one_look(field.variant_of(crowd.PRESET, name, cheap))
FAMILIES = {family: (colour, marker, (*names, *(f"{name}-cheap" for name in names), *BESIDE.get(family, ())))
            for family, (colour, marker, names) in field.FAMILIES.items()}
MEASURES = {name: crowd.MEASURES[name] for name in ("quality", "narration", "silence")} | {
    "flops": lambda run: run["costs"]["flops"] - run["costs"]["encoder"],
    "kv": lambda run: run["costs"]["entries"],
}


@dataclass(frozen=True)
class Flags(TrialFlags):
    seeds: int = 3  # seeds 0 to this minus 1
    only: str = ""  # train these alone, names with commas between; the table has all that are finished

    def __post_init__(self):
        super().__post_init__()
        chosen(self.only, VARIANTS)


def with_costs(found: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """Runs of table C have not counted what they cost, and their weights would change nothing about it."""
    for name, runs in found.items():
        if not all("costs" in run for run in runs.values()):
            config = configure(crowd.BASE, VARIANTS[name], 0)
            model, source = untrained(config, VARIANTS[name].routers)
            costs = counted(model, source.words, [live_clip(config)])
            found[name] = {seed: {"costs": costs} | run for seed, run in runs.items()}
    return found


def ceiling(name: str) -> float | None:
    """What a method reaches by counting, see mod/study/crowd.py, where its layers alone decide what is seen."""
    config = configure(crowd.BASE, VARIANTS[name], 0)
    layers = config.model.method in ("mod", "full", "early-exit", "layer-skip")
    return crowd.ceiling(config.model, VARIANTS[name].routers == "once", config.data) if layers else None


def report(data: dict) -> str:
    """results/crowd-field.md."""
    values = data["values"]
    rows = {name: f"`{name}` {VARIANTS[name].title}" for name in values}
    table = means(values, rows, ("quality", "narration", "silence"))
    reached = (data["ceilings"][name] for name in values)
    table.insert(1, "by counting", [f"{share:.2f}" if share else "-" for share in reached])
    table["FLOPs"] = [f"{field.cost(data, name, 'flops'):.2f}" for name in values]
    table["KV"] = [f"{field.cost(data, name, 'kv'):,.0f}" for name in values]
    table["online"] = ["yes" if data["online"][name] else "no" for name in values]
    return "\n".join([
        f"**The field in a crowd, one look a question.** Mean ± standard error over {number_of_seeds(values)} seeds, "
        f"{data['steps']} steps from scratch, on {data['clips']} validation clips. Quality: questions answered right. "
        f"FLOPs: of the decoder, in a stream of {LIVE} frames with a question every {APART} frames, as a share of full "
        "computation. KV: bytes that a frame leaves there.\n",
        markdown(table),
        *field.fronts(data),
        "",
        crowd.against(values, "mod-all", [name for name in values if name != "mod-all"]),
    ])


def run(flags: Flags) -> int:
    every = {f"one-{name}": variant for name, variant in VARIANTS.items()}
    asked = [f"one-{name}" for name in chosen(flags.only, VARIANTS)]
    out, base, found = trained("crowd", flags, crowd.BASE, every, asked)
    found = with_costs({name.removeprefix("one-"): runs for name, runs in found.items()})
    require("full" in found, f"no finished run of full computation in {out}; train first, without --report")
    models = {name: untrained(configure(base, VARIANTS[name], 0), VARIANTS[name].routers)[0] for name in found}
    steps = next(iter(found["full"].values()))["config"]["train"]["steps"]
    data = {"steps": steps, "clips": base.train.eval_clips,
            "entry_bytes": field.ENTRY * base.model.kv_heads * base.model.head_dim,
            "online": {name: bool(model.online) for name, model in models.items()},
            "ceilings": {name: ceiling(name) for name in found}, "values": read_off(found, MEASURES)}
    title = "The field in a crowd, one look a question. Grey: what is reached by counting"
    publish(out.with_name("crowd-field"), data, report(data),
            partial(field.plot, families=FAMILIES, title=title, flops="decoder FLOPs of a live stream"))
    return 0


main = command("mod.study.crowd_field", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
