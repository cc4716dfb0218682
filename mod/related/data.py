"""A harder synthetic stream: the core's, with more to see and more to be asked.

Six things can be added. With all of them at 0 the clips are the core's, bit for bit.

    drift     sprites step aside silently, so that only the latest frame tells where a sprite is now
    sparks    small coloured squares flash up in a single frame; nobody speaks of them, but they are asked for later
    ahead     a question is asked before the first frame, and the user reminds of it ("well ?") after the last
    landmark  a white ring that never moves; a question asks on which side of it the sprite stands
    wide      a clip's frames are twice as wide as high
    crowd     many sprites in every frame, and questions about any of them: see crowd.py

Where clips can be wide, all of them have the shape of the wide ones, so that they can be joined: a square frame ends in
columns of nan. `pictures` takes these off, `squeeze` makes squares of all frames. Nothing outside this folder knows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from mod.config import Config, DataConfig, ModelConfig, check, require
from mod.data import (
    CELLS,
    COLOURS,
    LABEL_SIZES,
    NOTHING,
    SHAPES,
    SPLITS,
    TRAIL,
    WORDS,
    Clip,
    Scene,
    Source,
    Sprite,
    draw,
    happenings,
    patch_of,
    synthetic,
    with_noise,
)
from mod.layout import Say
from mod.related.crowd import CROWD_LABEL_SIZES, MOST, NAME_WORDS, CrowdScene

SPARKS = {"orange": (1.0, 0.5, 0.0), "purple": (0.5, 0.1, 0.75), "lime": (0.65, 1.0, 0.3), "brown": (0.5, 0.25, 0.0)}
# The core's words come first, so that their ids stay.
HARDER_WORDS = (*WORDS, *SPARKS, "which", "spark", "none", "side", "of", "ring", "its", "neither", "well", "leader")
SPARK = 5  # side of a spark, pixels
SPARK_QUESTION = "which spark ?"
LANDMARK_QUESTION = "which side of the ring is it ?"
REMINDER = "well ?"  # after the last frame, when a question was asked before the first
LANDMARK_LABEL, SPARK_LABEL = len(LABEL_SIZES), -1  # columns of the patch labels; sparks are the last, if any


@dataclass(frozen=True)
class HarderData(DataConfig):
    """The synthetic stream, with what makes it harder."""

    drift: float = 0.0  # chance that a sprite steps aside in a frame, unspoken
    sparks: float = 0.0  # chance that a small spark flashes up in a frame, unspoken
    ahead: float = 0.0  # chance that a question is asked before the first frame, and answered after the last
    landmark: float = 0.0  # chance that a clip has a landmark: a question then asks on which side of it the sprite is
    wide: float = 0.0  # chance that a clip's frames are twice as wide as high
    crowd: int = 0  # sprites in every frame of a crowd; 0: no crowd
    shapes: int = 0  # shapes of a crowd, so that a leader is one of fewer; 0: as few shapes as the crowd needs
    asks: int = 4  # questions after a frame of a crowd
    looks: float = 0.0  # share of a crowd's questions that need two look-ups
    later: float = 0.0  # share of a crowd's questions about its first frame
    echo: bool = True  # answers about a crowd repeat the name of whom they are about

    def __post_init__(self):
        shares = ("drift", "sparks", "ahead", "landmark", "wide", "looks", "later")
        check(self, {"asks": 1}, shares)
        super().__post_init__()
        require(self.crowd <= MOST, f"crowd must be at most {MOST}, got {self.crowd}")
        require(self.shapes <= len(SHAPES), f"shapes must be at most {len(SHAPES)}, got {self.shapes}")
        names = self.shapes * len(COLOURS) if self.shapes else MOST
        require(self.crowd <= names, f"crowd got {self.crowd}, but of {self.shapes} shapes there are {names} names")
        alone = not (self.drift or self.sparks or self.landmark or self.wide)
        require(not self.crowd or alone, f"crowd got {self.crowd}, which goes without drift, sparks, landmark and wide")


def words_of(data: HarderData) -> tuple[str, ...]:
    """What is said of these streams."""
    return HARDER_WORDS + (NAME_WORDS if data.crowd else ())


def label_sizes(data: HarderData) -> tuple[int, ...]:
    """The core's labels of a patch; where there are landmarks: is it in this patch? Last, the colour of a spark. A
    crowd has labels of its own."""
    if data.crowd:
        return CROWD_LABEL_SIZES
    return LABEL_SIZES + ((2,) if data.landmark else ()) + (1 + len(SPARKS),)


def pictures(pixels: Tensor) -> list[Tensor]:
    """Frames (F, 3, height, width) as one picture each, without the columns of nan."""
    if pixels.shape[-1] == pixels.shape[-2]:
        return list(pixels)
    widths = pixels[:, 0, 0].isnan().logical_not().sum(-1).tolist()
    return [picture[..., :width] for picture, width in zip(pixels, widths, strict=True)]


def squeeze(pixels: Tensor) -> Tensor:
    """Frames of any shape as squares, (F, 3, height, width) -> (F, 3, height, height). A width that is no multiple of
    the height stays as it is."""
    height, width = pixels.shape[-2:]
    if width == height or width % height:
        return pixels
    return torch.stack([reduce(one, "c h (w k) -> c h w", "mean", w=height) for one in pictures(pixels)])


def padded(frames: np.ndarray, data: HarderData) -> np.ndarray:
    """Frames (F, 3, height, width) in the one shape that all clips of this data have."""
    height, width = frames.shape[-2:]
    if not data.wide or width == 2 * height:
        return frames
    return np.pad(frames, ((0, 0), (0, 0), (0, 0), (0, 2 * height - width)), constant_values=np.nan)


class HarderScene(Scene):
    """A scene that may be wide, may have a landmark, drifting sprites and sparks. A wide one's cells are twice as wide
    as high; what is drawn into them is not."""

    def __init__(self, rng: np.random.Generator, config: HarderData):
        super().__init__(rng, config)
        self.wide = bool(config.wide) and rng.random() < config.wide
        self.landmark: tuple[int, int] | None = None  # cell
        if config.landmark and rng.random() < config.landmark:
            self.landmark = tuple(rng.integers(0, CELLS, 2))
        self.spark: tuple[str, int, int] | None = None  # colour and cell, in the one frame in which it shows
        self.last_spark = ""  # colour

    @property
    def taken(self) -> set[tuple[int, int]]:
        return super().taken | {self.landmark} if self.landmark else super().taken

    def place(self, sprite: Sprite) -> None:
        if not self.wide:
            return super().place(sprite)
        # As in the core, but there is more room to the side: the second jitter is in eighths of a cell's height.
        cells = ((row, column) for row in range(CELLS) for column in range(CELLS))
        free = [cell for cell in cells if cell[0] != sprite.row and cell not in self.taken]
        sprite.row, sprite.column = free[self.rng.integers(len(free))]
        sprite.jitter = tuple(self.rng.integers(0, (2, 10), 2))

    def step(self) -> str | None:
        narration = super().step()
        self.drift(busy=self.topic if narration else None)
        self.spark = None
        self.flash()
        return narration

    def drift(self, busy: Sprite | None) -> None:
        """Let sprites, except the one that something just happened to, step one cell aside; nobody speaks of it."""
        for sprite in self.sprites:
            if self.config.drift and sprite is not busy and self.rng.random() < self.config.drift:
                beside = [c for c in (sprite.column - 1, sprite.column + 1) if 0 <= c < CELLS]
                free = [column for column in beside if (sprite.row, column) not in self.taken]
                if free:
                    sprite.column = free[self.rng.integers(len(free))]

    def flash(self) -> None:
        """Let a spark show, perhaps, in a cell without sprite or trail."""
        if self.config.sparks and self.rng.random() < self.config.sparks:
            taken = self.taken | {sprite.trail for sprite in self.sprites}
            free = [(row, column) for row in range(CELLS) for column in range(CELLS) if (row, column) not in taken]
            self.last_spark = list(SPARKS)[self.rng.integers(len(SPARKS))]
            self.spark = (self.last_spark, *free[self.rng.integers(len(free))])

    def truth(self) -> dict[str, str]:
        it, answers = self.topic, super().truth()
        if self.landmark and it in self.sprites:
            apart = it.column - self.landmark[1]
            answers[LANDMARK_QUESTION] = "its left" if apart < 0 else "its right" if apart else "neither side"
        if self.config.sparks:
            answers[SPARK_QUESTION] = f"spark {self.last_spark}" if self.last_spark else "none"
        return answers

    def background(self, side: int) -> np.ndarray:
        """(3, side, side), or of a wide scene (3, side, 2 * side)."""
        if not self.wide:
            return super().background(side)
        coarse = self.rng.uniform(0.25, 0.6, (6, 6))
        down, along = np.linspace(0, 4.999, side), np.linspace(0, 4.999, 2 * side)
        low, part = down.astype(int), down % 1
        rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
        low, part = along.astype(int), along % 1
        texture = rows[:, low] * (1 - part) + rows[:, low + 1] * part
        frame = np.repeat(texture[None], 3, axis=0).astype(np.float32)
        for _ in range(self.config.distractors):
            top, left = self.rng.integers(0, (side - side // CELLS, 2 * side - side // CELLS), 2)
            draw(frame, SHAPES[self.rng.integers(4)], [self.rng.uniform(0.05, 0.95)] * 3, top, left)
        return frame

    def paint(self, frame: np.ndarray) -> None:
        """Draw landmark, trails, sprites and spark, each above those before, into frame (3, height, width)."""
        cell, wide = frame.shape[-2] // CELLS, frame.shape[-1] // CELLS
        if self.landmark:
            top, left = cell * self.landmark[0], wide * self.landmark[1] + (wide - cell) // 2
            draw(frame, "disc", (1.0, 1.0, 1.0), top, left)
            hole = (cell - 1) // 3
            frame[:, top + hole : top + cell - 1 - hole, left + hole : left + cell - 1 - hole] = 0.0
        for sprite in self.sprites:
            if sprite.trail:
                top, left = cell * sprite.trail[0], wide * sprite.trail[1]
                draw(frame, sprite.shape, COLOURS[sprite.colour], top, left, opacity=TRAIL)
        for sprite in self.sprites:
            aside = min(sprite.jitter[1] * cell // 8, wide - cell + 1) if self.wide else sprite.jitter[1]
            top, left = sprite.row * cell + sprite.jitter[0], sprite.column * wide + aside
            draw(frame, sprite.shape, COLOURS[sprite.colour], top, left)
        if self.spark:
            colour, row, column = self.spark
            size = min(SPARK, cell)
            top, left = cell * row + (cell - size) // 2, wide * column + (wide - size) // 2
            frame[:, top : top + size, left : left + size] = np.asarray(SPARKS[colour])[:, None, None]

    def patch_labels(self, side: int, patch: int) -> np.ndarray:
        """(P, 6 or 7), see `label_sizes`. Patches are those of the frame squeezed to a square."""
        core, sizes, across = super().patch_labels(side, patch), label_sizes(self.config), side // patch
        labels = np.zeros((across, across, len(sizes)), np.int64)
        labels[..., : core.shape[1]] = core.reshape(across, across, -1)
        if self.landmark:
            labels[patch_of(self.landmark, side, patch)][LANDMARK_LABEL] = 1
        if self.spark:
            colour, *cell = self.spark
            labels[patch_of(cell, side, patch)][SPARK_LABEL] = 1 + list(SPARKS).index(colour)
        return labels.reshape(across * across, -1)


def scene(rng: np.random.Generator, data: HarderData) -> Scene:
    return (CrowdScene if data.crowd else HarderScene)(rng, data)


def make_clip(
    data: HarderData, model: ModelConfig, split: str, seed: int, index: int, frames: int | None = None
) -> Clip:
    """Clip number `index` of a split. Split, seed and index alone decide it, and splits never share a clip."""
    rng = np.random.default_rng([SPLITS[split], seed, index])
    seen = islice(happenings(scene(rng, data), model), frames or data.frames)
    pictures, turns, labels, truth = zip(*seen, strict=True)
    said = list(chain(*turns))
    if data.ahead and rng.random() < data.ahead:
        worth = [question for question, answer in truth[-1].items() if answer not in NOTHING]
        if worth:
            asked, last = worth[rng.integers(len(worth))], len(pictures) - 1
            end = [Say(last, "user", REMINDER), Say(last, "assistant", truth[-1][asked])]
            said = [Say(-1, "user", asked), *said, *end]
    video = padded(with_noise(np.stack(pictures), data.noise, rng), data)
    return Clip(video, said, np.stack(labels), list(truth))


def endless(data: HarderData, model: ModelConfig, split: str, seed: int) -> Iterator[Clip]:
    """One stream that never ends, as clips of a single frame each; frames are numbered from 0 on."""
    rng = np.random.default_rng([SPLITS[split], seed, 0, 1])  # no clip has four numbers
    for picture, said, labels, truth in happenings(scene(rng, data), model):
        yield Clip(padded(with_noise(picture, data.noise, rng)[None], data), said, labels[None], [truth])


def harder(config: Config) -> Source:
    """The clips of a run on harder streams. Raises UserError when its model cannot read or show them."""
    source, sizes = synthetic(config, words_of(config.data), make_clip, endless), label_sizes(config.data)

    def warm_up(step: int) -> list[Clip]:
        """Squeezed: the encoder itself takes squares."""
        return [replace(clip, frames=squeeze(torch.from_numpy(clip.frames))) for clip in source.warm_up(step)]

    # A summary overlooks what is small: only patches need to know of sparks, so the CLS token has one label less. Of a
    # crowd it can say nothing, so there it stays as it was drawn.
    known = 0 if config.data.crowd else len(sizes) - 1
    return replace(source, warm_up=warm_up, label_sizes=sizes, summary_labels=known)
