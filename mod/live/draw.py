"""A moment of a stream in the terminal: the frame, and beside it what each routed layer keeps of it.

A character shows two pixels, one above the other: "▀" in the upper one's colour on a ground of the lower one's. Where
there are no colours, brightness becomes a character, and [ ] stand around what is kept.

Read next: picture.py
"""

import math
import os
import shutil
import sys
from textwrap import wrap

import numpy as np
from einops import rearrange, reduce

from mod.config import ModelConfig
from mod.live.record import Moment

GAP = 2  # columns between pictures
LEAST, MOST = 16, 48  # columns of a picture: smaller ones wrap instead, larger ones would fill the screen
CAPTION = 24  # columns that a caption gets at least, where they are there
DARK = 0.25  # brightness of a skipped patch
RAMP = np.array(list(".:-=+*#%@"))  # from dark to bright
RESET = "\x1b[0m"


def shrink(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Average blocks of rows x columns pixels of a picture (h, w, 3); the last pixels count again to fill theirs."""
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % rows), (0, -width % columns), (0, 0)), mode="edge")
    return reduce(padded, "(h i) (w j) c -> h w c", "mean", i=rows, j=columns)


def patch_of(size: int, grid: int) -> np.ndarray:
    """Which of `grid` patches in a row each of `size` pixels belongs to."""
    return ((np.arange(size) + 0.5) * grid / size).astype(int)


def in_colour(picture: np.ndarray, kept: np.ndarray) -> list[str]:
    """Lines of half blocks; what is not kept is dark. picture (h, w, 3), 0 to 1; kept (grid, grid) bool."""
    bright = kept[np.ix_(*(patch_of(size, len(kept)) for size in picture.shape[:2]))]
    seen = (255 * np.where(bright[..., None], picture, DARK * picture)).round().clip(0, 255).astype(int)
    upper = [["\x1b[38;2;{};{};{}m".format(*pixel) for pixel in row] for row in seen[::2]]
    lower = [["\x1b[48;2;{};{};{}m".format(*pixel) for pixel in row] for row in seen[1::2]]
    lower += [[""] * len(row) for row in upper[len(lower) :]]  # below an odd height is the terminal's own ground
    return ["".join(a + b + "▀" for a, b in zip(*rows, strict=True)) + RESET for rows in zip(upper, lower, strict=True)]


def in_characters(picture: np.ndarray, kept: np.ndarray) -> list[str]:
    """Lines of characters by brightness; what is not kept is blank, and each kept patch stands between [ and ]."""
    # A character is about twice as high as wide. The largest channel: a colour is brighter than a grey of its mean.
    grey = reduce(shrink(picture, 2, 1), "h w c -> h w", "max")
    grey = (grey - grey.min()) / max(grey.max() - grey.min(), 1e-6)
    row, column = (patch_of(size, len(kept)) for size in grey.shape)
    bright = kept[np.ix_(row, column)]
    drawn = np.where(bright, RAMP[(grey * (len(RAMP) - 1)).round().astype(int)], " ")
    if not kept.all() and grey.shape[1] >= 3 * len(kept):  # a narrower patch would be nothing but brackets
        for mark, edge in (("[", np.diff(column, prepend=-1) > 0), ("]", np.diff(column, append=len(kept)) > 0)):
            drawn[bright & edge] = mark
    return ["".join(line) for line in drawn]


def drawing(moment: Moment, config: ModelConfig, width: int = 100, colour: bool = True) -> str:
    """The frame and beside it one copy for each routed layer, skipped patches dark; lines of at most `width` columns.

    Pictures are scaled down by whole factors until all stand side by side; what would be too small then is wrapped.
    """
    width, side, grid = max(1, width), moment.picture.shape[-1], config.grid
    captions, masks = ["frame"], [np.ones((grid, grid), bool)]
    for layer, kept in sorted(moment.kept.items()):
        captions.append(f"layer {layer} keeps {int(kept.sum())} of {len(kept)}{' (CLS too)' if kept[0] else ''}")
        masks.append(rearrange(kept[1:], "(h w) -> h w", h=grid))
    room = (width + GAP) // len(masks) - GAP  # of each picture when all stand side by side
    for factor in range(1, side + 1):
        small = math.ceil(side / factor)
        cell = min(width, max(small, min(max(map(len, captions)), max(room, CAPTION))))
        in_a_row = (width + GAP) // (cell + GAP)
        if small <= min(width, MOST) and (in_a_row >= len(masks) or math.ceil(side / (factor + 1)) < LEAST):
            break
    picture = shrink(rearrange((moment.picture + 1) / 2, "c h w -> h w c"), factor, factor)
    lines = []
    for first in range(0, len(masks), in_a_row):
        wrapped = [wrap(caption, cell) for caption in captions[first : first + in_a_row]]
        for number in range(max(map(len, wrapped))):
            line = [(words[number] if number < len(words) else "").ljust(cell) for words in wrapped]
            lines.append((" " * GAP).join(line).rstrip())
        drawn = [(in_colour if colour else in_characters)(picture, kept) for kept in masks[first : first + in_a_row]]
        fill = " " * (cell + GAP - small)  # by hand, as escapes take no columns
        lines += [fill.join(parts).rstrip() for parts in zip(*drawn, strict=True)]
    return "\n".join(lines) + (RESET if colour else "")


def terminal(moment: Moment, config: ModelConfig) -> str:
    """The frame and what was kept of it, as wide as the terminal; without colours where these are not wanted, or where
    half blocks cannot be shown."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ or "FORCE_COLOR" in os.environ
    try:
        "▀".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        colour = False
    return drawing(moment, config, shutil.get_terminal_size((100, 24)).columns, colour=colour)
