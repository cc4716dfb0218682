"""What does the gate do? What mu is (the score, or twice its sigmoid) and what it scales (the token's own update alone,
or its value in this layer's attention too), varied one at a time.

    python -m mod.study.gates              # 5 seeds of each gate in each setting, two at a time
    python -m mod.study.gates --quick      # two seeds of a few steps each, to see that it works
    python -m mod.study.gates --report     # train nothing: write the table from the runs that are finished

The primary measure is `quality`, the share of questions that are answered right. Two effects are judged in each
setting, as was written down before the runs: the sigmoid's, averaged over what mu scales, and the value's, averaged
over what mu is. Holm's correction is over all settings that are finished, for quality and for recall apart.

mod/study/seeds.py compares these gates in the default setting, and mod/study/crowd.py in a crowd. Finished runs are
kept in results/gates and are never repeated. Writes results/gates.json, .md and .png.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mod.live.picture import BLUE, VERMILION, save
from mod.related.world import WORLD
from mod.study.common import command, markdown, publish
from mod.study.statistics import Values, compare, mean_error, means, number_of_seeds
from mod.study.sweep import TrialFlags, Variant, read_off, trained
from mod.study.tables import MEASURES as COLUMNS

BASE = WORLD.presets["study"]
# What mu is, and what it scales.
GATES = {gate: tuple(gate.split("-")) for gate in ("score-update", "sigmoid-update", "score-value", "sigmoid-value")}
SETTINGS = {
    "interleaved": Variant("layers 1 and 3"),
    "all": Variant("all layers", {"layers": "all"}),
    "pretrained": Variant("a trained decoder, layers 1 and 3", start="full", train={"steps": 80}),
}
VARIANTS = {"full": Variant("full computation: the trained decoder", {"layers": "none"})} | {
    f"{name}-{gate}": replace(setting, title=f"{setting.title}: {gate}", model=setting.model | {"gate": gate})
    for name, setting in SETTINGS.items() for gate in GATES
}
MEASURES = {"quality": COLUMNS["questions"], "recall": COLUMNS["recall"]} | {
    column: COLUMNS[column] for column in ("narration", "silence", "free-running narration")}


def effects(values: dict, measure: str) -> Iterator[tuple[str, tuple[Values, Values]]]:
    """In each setting that has all four gates: the two halves of the gates that differ in one factor, averaged over
    the other, seed by seed."""
    for name, setting in SETTINGS.items():
        cells = {gate: values[f"{name}-{gate}"][measure] for gate in GATES if f"{name}-{gate}" in values}
        seeds = [seed for seed in next(iter(cells.values()), {}) if all(seed in cell for cell in cells.values())]
        if len(cells) < len(GATES) or len(seeds) < 3:
            continue
        for factor, changed, base in ((0, "sigmoid", "score"), (1, "value", "update")):
            halves = ({seed: float(np.mean([cells[gate][seed] for gate, levels in GATES.items()
                                            if levels[factor] == level])) for seed in seeds}
                      for level in (changed, base))
            yield f"{setting.title}: {changed} − {base}", tuple(halves)


def report(data: dict) -> str:
    values = data["values"]
    rows = means(values, {name: VARIANTS[name].title for name in values}, list(MEASURES))
    rows["seeds"] = [str(len(found["quality"])) for found in values.values()]
    parts = [f"Mean ± standard error over {number_of_seeds(values)} seeds after {data['steps']} steps, or "
             f"{data['short']} more of a trained decoder, on {data['clips']} validation clips. Quality: questions "
             "answered right. Recall: sprite patches kept, mean over the routed layers and the whole training.\n",
             markdown(rows)]
    for measure in ("quality", "recall"):
        family = dict(effects(values, measure))
        if family:
            parts += [f"One factor, averaged over the other, seed by seed, in {measure} (intervals alone, p by Holm's "
                      "method); the rows above say whether it is the same with both:\n", markdown(compare(family))]
    return "\n".join(parts)


def plot(data: dict, path: Path) -> None:
    """Quality and recall of each gate, setting by setting."""
    figure, values = Figure(figsize=(11, 3.6), layout="constrained"), data["values"]
    shifts = np.linspace(-0.24, 0.24, len(GATES))
    shown = {"quality": "questions answered right", "recall": "sprite patches kept"}
    for axis, measure in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        for shift, (gate, (mu, scales)) in zip(shifts, GATES.items(), strict=True):
            look = {"marker": "o" if mu == "score" else "s", "color": VERMILION if scales == "update" else BLUE}
            axis.plot([], [], linestyle="none", label=gate, **look)
            for row, setting in enumerate(SETTINGS):
                if f"{setting}-{gate}" not in values:
                    continue
                mean, error = mean_error(values[f"{setting}-{gate}"][measure])
                axis.errorbar(mean, row + shift, xerr=error, capsize=3, **look)
        axis.set_yticks(range(len(SETTINGS)), [setting.title for setting in SETTINGS.values()])
        axis.set(title=shown[measure], xlabel="share, mean ± standard error over seeds", xlim=(-0.02, 1.05))
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path)


def run(flags: TrialFlags) -> int:
    out, base, found = trained("gates", flags, BASE, VARIANTS)
    steps = base.train.steps
    short = steps if flags.quick else SETTINGS["pretrained"].train["steps"]
    results = {"steps": steps, "short": short, "clips": base.train.eval_clips, "values": read_off(found, MEASURES)}
    publish(out, results, report(results), plot)
    return 0


main = command("mod.study.gates", __doc__, TrialFlags, run)

if __name__ == "__main__":
    sys.exit(main())
