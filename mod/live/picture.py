"""A stream as one picture, and what all pictures here share: how they are saved, and colours that colour-blind readers
can tell apart (Okabe and Ito's palette).

Read next: page.py
"""

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from einops import rearrange
from matplotlib.figure import Figure  # not pyplot: no global state, no window, any machine
from matplotlib.patches import Rectangle

from mod.config import ModelConfig
from mod.live.record import Moment

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SHADE = 0.25  # brightness of a skipped patch


def save(figure: Figure, path: Path, **options) -> None:
    """Write a figure to a temporary name, then rename. `options`: what else `savefig` should know."""
    temporary = path.with_name(path.stem[-50:] + ".tmp" + path.suffix)
    figure.savefig(temporary, dpi=130, **options)
    os.replace(temporary, path)


def caption(moment: Moment) -> str:
    """What was said at a frame: its narration, a word per line, then questions and answers."""
    narration = [line.text for line in moment.said[:1] if line.role == "assistant"]
    talk = [f"{'Q' if line.role == 'user' else 'A'}: {line.text}" for line in moment.said[len(narration) :]]
    return "\n".join([narration[0].replace(" ", "\n") if narration else "", *talk])


def draw_stream(moments: Sequence[Moment], config: ModelConfig) -> Figure:
    """The frames of a stream in a row, with what was said below. Between, for each routed layer, the same frames with
    skipped patches darkened."""
    layers = sorted({layer for moment in moments for layer in moment.kept})
    rows, columns = 1 + len(layers), len(moments)
    figure = Figure(figsize=(1.5 * columns + 0.6, 1.7 * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for t, moment in enumerate(moments):
        picture = rearrange((moment.picture + 1) / 2, "c h w -> h w c")
        axes[0, t].imshow(picture)
        axes[0, t].set_title(f"{moment.time:g} s", fontsize=9)
        edge = np.linspace(0, len(picture), config.grid + 1).round().astype(int)
        for row, layer in enumerate(layers, start=1):
            mask = rearrange(moment.kept[layer][1:], "(h w) -> h w", h=config.grid)
            bright = np.repeat(np.repeat(mask, np.diff(edge), axis=0), np.diff(edge), axis=1)[..., None]
            axes[row, t].imshow(np.where(bright, picture, SHADE * picture))
            for y, x in zip(*mask.nonzero(), strict=True):
                (left, right), (top, bottom) = edge[x : x + 2], edge[y : y + 2]
                axes[row, t].add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False,
                                                 edgecolor=ORANGE, linewidth=1.2))
        axes[-1, t].set_xlabel(caption(moment), fontsize=7)
        for axis in axes[:, t]:
            axis.set(xticks=[], yticks=[])
    for axis, label in zip(axes[:, 0], ["what it sees", *(f"layer {layer} keeps" for layer in layers)], strict=True):
        axis.set_ylabel(label, fontsize=9)
    explained = (": framed patches go through the routed layer (the CLS token, not drawn, may be one of the kept), "
                 "dark ones skip it; below, what was said")
    title = "A stream, frame by frame" + (explained if layers else "") if columns > 4 else "A stream"
    figure.suptitle(fill(title, int(13 * figure.get_figwidth())), fontsize=10)  # thirteen letters are an inch
    return figure
