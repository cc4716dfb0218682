"""How does one layer look twice? Where the heads of finished runs look when a sprite's leader is asked for.

    python -m mod.study.heads                        # of the runs that mod.study.crowd has finished
    python -m mod.study.heads --only skip,mod-all    # of some variants

In "leader of red-disc left" the word "red-disc" predicts the side of the red disc's leader, whom a badge on the red
disc names. Two looks, one after the other, take two layers. But one head may look at the red disc, and another one of
the same layer at all sprites of its shape, so that later layers choose among them. A bar tells which it is: how a
head's attention to sprites is shared out. Reads results/crowd and the weights in runs/crowd; writes results/heads.json,
.md and .png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from mod.config import require
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.study.attention import followed, shares
from mod.study.common import command, markdown, publish
from mod.study.crowd import VARIANTS
from mod.study.sweep import finished

GROUPS = {"the sprite that is named": BLUE, "its leader": VERMILION, "others of their shape": ORANGE,
          "other sprites": GREEN}
SHOWN = 5  # seeds in the picture, at most


@dataclass(frozen=True)
class Flags:
    only: str = "mod-all,exit,skip"  # of these variants, names with commas between
    runs: Path = Path("runs/crowd")  # folder of the runs, with their weights
    results: Path = Path("results/crowd")  # folder of their results
    out: Path = Path("results/heads")  # what is written, without its ending
    clips: int = 24  # validation clips that are looked at

    def __post_init__(self):
        require(self.clips >= 1, f"clips must be at least 1, got {self.clips}")
        for name in self.only.split(","):
            require(name in VARIANTS, f"only got {name!r}, expected names among {', '.join(VARIANTS)}")


def most(attention: list, group: int) -> tuple[int, int]:
    """The layer and the head that look at a group most."""
    places = [(layer, head) for layer, groups in enumerate(attention) for head in range(len(groups[group]))]
    return max(places, key=lambda place: attention[place[0]][group][place[1]])


def report(data: dict) -> str:
    rows = {}
    for name, found in data["heads"].items():
        for seed, run in found.items():
            one, two = most(run["attention"], 0), most(run["attention"], 1)
            rows[f"`{name}`, seed {seed}"] = {
                "two looks right": f"{run['right']:.3f}",
                "at who is named": f"{run['attention'][one[0]][0][one[1]]:.2f} (layer {one[0]})",
                "at its leader": f"{run['attention'][two[0]][1][two[1]]:.2f} (layer {two[0]})",
                "this head at others of their shape": f"{run['attention'][two[0]][2][two[1]]:.2f}"}
    return ("Attention of an answer's word when a leader is asked for: of the head that looks most at who is named, "
            f"and of the one that looks most at its leader. {data['clips']} validation clips.\n\n"
            f"{markdown(pd.DataFrame.from_dict(rows, orient='index'))}")


def plot(data: dict, path: Path) -> None:
    """A panel per run: a bar per head, top to bottom as the layers run."""
    columns = min(SHOWN, max(len(found) for found in data["heads"].values()))
    figure = Figure(figsize=(3.4 * columns + 1, 2.7 * len(data["heads"]) + 1), layout="constrained")
    axes = figure.subplots(len(data["heads"]), columns, squeeze=False, sharex=True)
    for row, (name, found) in zip(axes, data["heads"].items(), strict=True):
        for axis, (seed, run) in zip(row, found.items(), strict=False):
            attention = run["attention"]
            names = [f"{layer}.{head}" for layer, groups in enumerate(attention) for head in range(len(groups[0]))]
            left = [0.0] * len(names)
            for group, (title, colour) in enumerate(GROUPS.items()):
                widths = [share for groups in attention for share in groups[group]]
                axis.barh(names, widths, left=left, color=colour, label=title)
                left = [one + width for one, width in zip(left, widths, strict=True)]
            axis.set(title=f"{name}, seed {seed}: {run['right']:.2f} of two looks right", xlim=(0, 1))
            axis.title.set_fontsize(9)
            axis.tick_params(labelsize=6)
            axis.invert_yaxis()
        for axis in row[len(found):]:
            axis.set_visible(False)
        row[0].set_ylabel("layer.head")
    for axis in axes[-1]:
        axis.set_xlabel("attention (share)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(GROUPS))
    figure.suptitle("Where heads look when a sprite's leader is asked for")
    save(figure, path)


def run(flags: Flags) -> int:
    heads: dict[str, dict] = {}
    for name in flags.only.split(","):
        for seed, result, model, source in finished(flags.runs, flags.results, name):
            paid = shares(model, source.words, source.validation(flags.clips), followed)  # (layers, groups, heads)
            heads.setdefault(name, {})[seed] = {"attention": paid.tolist(), "right": result["kinds"]["leader"]}
    require(heads, f"no finished run of {flags.only} in {flags.results} and {flags.runs}; run mod.study.crowd first")
    data = {"clips": flags.clips, "heads": heads}
    publish(flags.out, data, report(data), plot)
    return 0


main = command("mod.study.heads", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
