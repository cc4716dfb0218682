"""Who keeps whom? How the layers of MoD divide a crowd among themselves, seed by seed.

    python -m mod.study.division                      # of the runs that mod.study.crowd has finished
    python -m mod.study.division --variant drop       # of another variant

A layer's row of the picture says how often it keeps the sprites of each name. Below is how each layer's share of kept
sprites came about in training. Reads results/crowd and the weights in runs/crowd; writes results/division.json, .md
and .png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from mod.config import require
from mod.data import SHAPES, Source
from mod.evaluate import teacher_forced
from mod.live.picture import save
from mod.related.crowd import NAME_WORDS
from mod.study.common import LAYERS, command, markdown, publish
from mod.study.crowd import VARIANTS
from mod.study.sweep import finished
from mod.videollm import VideoLLM

SHOWN = 5  # seeds in the picture, at most
DIVIDED = [name for name, variant in VARIANTS.items() if variant.model["layers"] == "all"]  # every layer is routed


@dataclass(frozen=True)
class Flags:
    variant: str = "mod-all"  # whose runs
    runs: Path = Path("runs/crowd")  # folder of the runs, with their weights
    results: Path = Path("results/crowd")  # folder of their results
    out: Path = Path("results/division")  # what is written, without its ending
    clips: int = 64  # validation clips that are looked at

    def __post_init__(self):
        require(self.clips >= 1, f"clips must be at least 1, got {self.clips}")
        require(self.variant in DIVIDED, f"variant got {self.variant!r}, expected one of {', '.join(DIVIDED)}")


def divide(result: dict, model: VideoLLM, source: Source, number: int) -> dict:
    """Of one run: the share of the sprites of each name that each layer keeps, and that any layer keeps. Of trails,
    which tell that somebody has moved, the share that any layer keeps. On so many validation clips."""
    clips, depth, trace = source.validation(number), model.config.depth, []
    teacher_forced(model, source.words, clips, trace=trace)
    labels = np.concatenate([clip.patch_labels for clip in clips])
    patches = np.stack([torch.cat([one.kept for one in trace if one.layer == layer]).numpy()[:, 1:]
                        for layer in range(depth)], axis=-1)  # (frames, patches, layers), kept or not
    sprite, trail = labels[..., 0] > 0, labels[..., 4] > 0
    name = (labels[sprite][:, 0] - 1) * len(SHAPES) + labels[sprite][:, 1] - 1
    kept = patches[sprite]  # (sprites seen, layers)
    by_name = np.zeros((len(NAME_WORDS), depth))  # zero, too, for one who never appears
    np.add.at(by_name, name, kept)
    by_name /= np.maximum(1, np.bincount(name, minlength=len(NAME_WORDS)))[:, None]
    return {"by name": by_name.tolist(),
            "layers": kept.mean(0).tolist(), "any": float(kept.any(-1).mean()), "right": result["question_accuracy"],
            "trails": float(patches[trail].any(-1).mean()), "narrated": result["narration_exact"],
            "curve": [[point["step"], [*point["recall"].values()]] for point in result["curve"] if "recall" in point]}


def report(data: dict) -> str:
    rows = {seed: {f"layer {layer}": f"{share:.2f}" for layer, share in enumerate(found["layers"])}
            | {"some layer": f"{found['any']:.2f}", "questions right": f"{found['right']:.3f}",
               "trails in some layer": f"{found['trails']:.2f}", "narrations right": f"{found['narrated']:.3f}"}
            for seed, found in data["seeds"].items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "seed"
    return (f"`{data['variant']}`: the share of sprites that each layer keeps, and that at least one of them keeps, on "
            f"{data['clips']} validation clips. A trail is left where a sprite has just moved away.\n\n"
            f"{markdown(table)}")


def plot(data: dict, path: Path) -> None:
    """Above who is kept by which layer, a panel per seed; below the layers' shares over training."""
    shown = dict(list(data["seeds"].items())[:SHOWN])
    figure = Figure(figsize=(2.3 * len(shown) + 2.2, 8), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False, gridspec_kw={"height_ratios": (2.4, 1)}, sharey="row")
    for (seed, found), (above, below) in zip(shown.items(), axes.T, strict=True):
        picture = above.imshow(found["by name"], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        above.set(title=f"seed {seed}: {found['right']:.3f} right", xlabel="layer",
                  xticks=range(len(found["layers"])), yticks=range(len(NAME_WORDS)), yticklabels=NAME_WORDS)
        above.tick_params(labelsize=8)
        steps, shares = zip(*found["curve"], strict=True)
        for layer, share in enumerate(zip(*shares, strict=True)):
            colour, dashes = LAYERS[layer % len(LAYERS)]
            below.plot(steps, share, color=colour, linestyle=dashes, label=f"layer {layer}")
        below.set(xlabel="training step", ylim=(0, 1.05))
        below.grid(alpha=0.3)
    axes[1, 0].set_ylabel("sprites kept (share)")
    axes[1, -1].legend(fontsize=8, ncols=2, loc="center right")
    figure.colorbar(picture, ax=axes[0, -1], label="share of its appearances in which a sprite is kept")
    figure.suptitle(f"Who keeps whom: {VARIANTS[data['variant']].title}")
    save(figure, path)


def run(flags: Flags) -> int:
    seeds = {seed: divide(result, model, source, flags.clips)
             for seed, result, model, source in finished(flags.runs, flags.results, flags.variant)}
    require(seeds, f"no finished run of {flags.variant} in {flags.results} and {flags.runs}; run mod.study.crowd first")
    data = {"variant": flags.variant, "clips": flags.clips, "seeds": seeds}
    publish(flags.out, data, report(data), plot)
    return 0


main = command("mod.study.division", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
