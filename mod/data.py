"""The synthetic video stream: small, made from a seed on the fly, and hard enough that vision is needed.

A coloured sprite appears, moves, turns another colour, leaves, on a textured background with grey distractors and
noise. Each change is narrated, nothing is said while nothing happens. *Where* the sprite is, is never narrated, so
a question about it (now, or where it first appeared) cannot be answered from what was said before.

Read next: metrics.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from einops import rearrange

from mod.config import DataConfig, ModelConfig
from mod.layout import Batch, Layout, Say, Vocabulary, collate, lay_out

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.15, 0.25, 0.95), "yellow": (0.95, 0.9, 0.1),
           "pink": (0.95, 0.3, 0.85), "cyan": (0.1, 0.9, 0.9)}  # fmt: skip
SHAPES = ("square", "disc", "triangle", "cross")
REGIONS = ("top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right")
WORDS = (*COLOURS, *SHAPES, *REGIONS, "appears", "moves", "turns", "leaves", "nowhere", "now", "first", "where", "is", "did", "it", "the", "appear", "?")  # fmt: skip
LABEL_SIZES = (
    1 + len(COLOURS),
    1 + len(SHAPES),
    1 + len(REGIONS),
)  # values of a patch's labels, 0 for "nothing here"
SPLITS = {"train": 0, "validation": 1, "test": 2, "warm-up": 3}
CELLS = 5  # a sprite stands in one of 5x5 cells of the frame
BAND = (
    0,
    0,
    1,
    2,
    2,
)  # a row of cells is in the top, middle or bottom band; columns likewise; two bands name a region


def vocabulary() -> Vocabulary:
    return Vocabulary(WORDS)


@dataclass(eq=False)
class Sprite:
    colour: str
    shape: str
    row: int  # cell
    column: int
    jitter: tuple[int, int]  # pixels, 0 or 1
    first: str = ""  # region where it appeared

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def region(self) -> str:
        return REGIONS[3 * BAND[self.row] + BAND[self.column]]


@dataclass
class Clip:
    """One stream: what is seen, what is said, and the truth that nobody says.

    frames        (F, 3, side, side) float32 in [-1, 1]
    said          narrations, questions and answers, in order
    patch_labels  (F, P, 3) colour, shape and region of the sprite whose centre is in the patch, counted from 1; 0 for none
    truth         after each frame: every question that makes sense then, and its answer
    """

    frames: np.ndarray
    said: list[Say]
    patch_labels: np.ndarray
    truth: list[dict[str, str]]


@cache
def shape_mask(shape: str, side: int) -> np.ndarray:
    """(side, side) bool."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    r = (side - 1) / 2
    return {
        "square": (abs(x) <= r) & (abs(y) <= r),
        "disc": x**2 + y**2 <= (r + 0.3) ** 2,
        "triangle": abs(x) <= (y + r) / 2 + 0.3,
        "cross": (abs(x) <= r / 3) | (abs(y) <= r / 3),
    }[shape]


def draw(frame: np.ndarray, shape: str, colour, top: int, left: int) -> None:
    """Paint a shape, a pixel smaller than a cell, into frame (3, side, side) with values 0 to 1, in place."""
    side = frame.shape[-1] // CELLS - 1
    frame[:, top : top + side, left : left + side][:, shape_mask(shape, side)] = np.asarray(colour)[:, None]


def background(rng: np.random.Generator, side: int, distractors: int) -> np.ndarray:
    """(3, side, side) in 0 to 1: soft grey texture and grey shapes that never move."""
    coarse = rng.uniform(0.25, 0.6, (6, 6))
    at = np.linspace(0, 4.999, side)
    low, part = at.astype(int), at % 1
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    texture = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    frame = np.repeat(texture[None], 3, axis=0).astype(np.float32)
    for _ in range(distractors):
        top, left = rng.integers(0, side - side // CELLS, 2)
        draw(frame, SHAPES[rng.integers(4)], [rng.uniform(0.05, 0.95)] * 3, top, left)
    return frame


class Scene:
    """The sprites of a stream and what happens to them."""

    def __init__(self, rng: np.random.Generator, config: DataConfig):
        self.rng, self.config = rng, config
        self.sprites: list[Sprite] = []
        self.last: Sprite | None = None  # the sprite that left last

    def place(self, sprite: Sprite) -> None:
        """Put a sprite into a region where no sprite is, anywhere inside it."""
        taken = {other.region for other in self.sprites}
        region = self.rng.choice([number for number, name in enumerate(REGIONS) if name not in taken])
        sprite.row, sprite.column = (
            int(self.rng.choice([c for c in range(CELLS) if BAND[c] == band])) for band in divmod(region, 3)
        )
        sprite.jitter = tuple(self.rng.integers(0, 2, 2))

    def name(self, shape: str | None = None) -> tuple[str, str]:
        """A colour and a shape that no sprite bears together."""
        taken = {sprite.name for sprite in self.sprites}
        free = [(c, s) for c in COLOURS for s in ([shape] if shape else SHAPES) if f"{c} {s}" not in taken]
        return free[self.rng.integers(len(free))]

    def happen(self) -> str:
        """Let one thing happen; returns its narration."""
        if not self.sprites or (len(self.sprites) < self.config.sprites and self.rng.random() < 0.5):
            sprite = Sprite(*self.name(), row=0, column=0, jitter=(0, 0))
            self.place(sprite)
            sprite.first = sprite.region
            self.sprites.append(sprite)
            return f"{sprite.name} appears"
        sprite = self.sprites[self.rng.integers(len(self.sprites))]
        before, kind = sprite.name, self.rng.choice(["moves", "turns", "leaves"], p=[0.6, 0.2, 0.2])
        if kind == "turns":
            sprite.colour, _ = self.name(sprite.shape)
            return f"{before} turns {sprite.colour}"
        if kind == "moves":
            self.place(sprite)
        else:
            self.sprites.remove(sprite)
            self.last = sprite
        return f"{before} {kind}"

    def truth(self) -> dict[str, str]:
        """Every question that can be asked at this moment, with its answer: where things are, and where they were."""
        if self.config.sprites == 1:
            here = self.sprites[0] if self.sprites else None
            seen = here or self.last
            return {
                "where is it ?": f"now {here.region}" if here else "nowhere",
                "where did it appear ?": f"first {seen.first}" if seen else "nowhere",
            }
        now = {f"where is the {sprite.name} ?": f"now {sprite.region}" for sprite in self.sprites}
        return now | {f"where did the {sprite.name} appear ?": f"first {sprite.first}" for sprite in self.sprites}

    def paint(self, frame: np.ndarray) -> None:
        """Draw the sprites into frame (3, side, side), in place."""
        cell = frame.shape[-1] // CELLS
        for sprite in self.sprites:
            top, left = sprite.row * cell + sprite.jitter[0], sprite.column * cell + sprite.jitter[1]
            draw(frame, sprite.shape, COLOURS[sprite.colour], top, left)

    def patch_labels(self, side: int, patch: int) -> np.ndarray:
        """(P, 3) see Clip; for a frame of `side` pixels in patches of `patch` pixels."""
        labels = np.zeros((side // patch, side // patch, len(LABEL_SIZES)), np.int64)
        cell = side // CELLS
        for sprite in self.sprites:
            row, column = ((c * cell + cell // 2) // patch for c in (sprite.row, sprite.column))
            labels[row, column] = [
                list(COLOURS).index(sprite.colour),
                SHAPES.index(sprite.shape),
                REGIONS.index(sprite.region),
            ]
            labels[row, column] += 1
        return rearrange(labels, "h w c -> (h w) c")


def make_clip(
    config: DataConfig, model: ModelConfig, split: str, seed: int, index: int, frames: int | None = None
) -> Clip:
    """Clip number `index` of a split. Split, seed and index alone decide it, and splits never share a clip."""
    rng = np.random.default_rng([SPLITS[split], seed, index])
    frames, side = frames or config.frames, model.image_size
    scene, still = Scene(rng, config), background(rng, side, config.distractors)
    video = np.repeat(still[None], frames, axis=0)
    labels, said, truth = [], [], []
    for t in range(frames):
        if rng.random() < config.event_rate:
            said.append(Say(t, "assistant", scene.happen()))
        scene.paint(video[t])
        labels.append(scene.patch_labels(side, model.patch_size))
        truth.append(scene.truth())
        # "nowhere" can be read off the narrations: ask for it rarely, or question accuracy would measure little.
        worth = [question for question, answer in truth[t].items() if answer != "nowhere" or rng.random() < 0.2]
        if worth and rng.random() < config.question_rate:
            asked = worth[rng.integers(len(worth))]
            said += [Say(t, "user", asked), Say(t, "assistant", truth[t][asked])]
    video += config.noise * rng.standard_normal(video.shape, np.float32)
    return Clip(np.clip(video, 0, 1) * 2 - 1, said, np.stack(labels), truth)


def clip_layout(words: Vocabulary, clip: Clip, frame_tokens: int) -> Layout:
    return lay_out(words, len(clip.frames), frame_tokens, clip.said)


def clip_batch(words: Vocabulary, clips: Sequence[Clip], frame_tokens: int) -> Batch:
    """Clips, which may differ in length, as one padded batch."""
    pixels = torch.cat([torch.from_numpy(clip.frames) for clip in clips])
    return collate([clip_layout(words, clip, frame_tokens) for clip in clips], pixels)
