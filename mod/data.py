"""The synthetic video stream: small, made from a seed on the fly, and hard enough that vision is needed.

A coloured sprite appears, moves, turns another colour, leaves, on a textured background with grey distractors and
noise; in the one frame in which it moves it leaves a trail, as a camera's exposure would. Each change is narrated,
nothing is said while nothing happens. On which *side* of the frame the sprite is, is never narrated, so a question
about it (now, or where it first appeared) cannot be answered from what was said before: chance is one in five.

Harder, on request: several sprites ("it" is then the one last spoken of, the others are asked for by name); drift,
silent steps to the side, so that only the latest frame tells where a sprite is now; and sparks, small coloured squares
that flash up in a single frame, are never spoken of, and are asked for later; a landmark, a white ring that never
moves, of which is asked on which side the sprite stands; wide frames; and questions asked before the first frame, of
which the user reminds ("well ?") after the last.

Read next: metrics.py
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count, islice

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from mod.config import DataConfig, ModelConfig
from mod.layout import Batch, Layout, Say, Vocabulary, collate, lay_out

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.15, 0.25, 0.95), "yellow": (0.95, 0.9, 0.1),
           "pink": (0.95, 0.3, 0.85), "cyan": (0.1, 0.9, 0.9)}  # fmt: skip
SPARKS = {"orange": (1.0, 0.5, 0.0), "purple": (0.5, 0.1, 0.75), "lime": (0.65, 1.0, 0.3), "brown": (0.5, 0.25, 0.0)}
SHAPES = ("square", "disc", "triangle", "cross")
HEIGHTS = ("top", "upper", "middle", "lower", "bottom")
SIDES = ("far-left", "left", "centre", "right", "far-right")
EVENTS = {"moves": 0.4, "turns": 0.35, "leaves": 0.25}  # what happens to a sprite that is there, and how often
WORDS = (
    *(*COLOURS, *SHAPES, *HEIGHTS, *SIDES, "appears", *EVENTS),
    *("nowhere", "now", "first", "where", "is", "did", "it", "the", "appear", "?"),
    *(*SPARKS, "which", "spark", "none"),
    *("side", "of", "ring", "its", "neither", "well"),
)
NOTHING = ("nowhere", "none")
SPLITS = {"train": 0, "validation": 1, "test": 2, "warm-up": 3}
CELLS = 5  # a sprite stands in one of 5x5 cells of the frame: a row is a height, a column a side
TRAIL = 0.5  # opacity of the motion blur that a sprite leaves where it was, in the one frame in which it moves
SPARK = 5  # side of a spark, pixels
# Values of a patch's labels: colour, shape, height and side of a sprite, is there a trail, colour of a spark; 0 for no.
LABEL_SIZES = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(HEIGHTS), 1 + len(SIDES), 2, 1 + len(SPARKS))
SPARK_LABEL = 5
LANDMARK = "which side of the ring is it ?"
REMINDER = "well ?"  # after the last frame, when a question was asked before the first


def label_sizes(config: DataConfig) -> tuple[int, ...]:
    """LABEL_SIZES, and where there are landmarks one more: is it in this patch?"""
    return LABEL_SIZES + ((2,) if config.landmark else ())


def vocabulary() -> Vocabulary:
    return Vocabulary(WORDS)


@dataclass(eq=False)
class Sprite:
    colour: str
    shape: str
    row: int  # cell
    column: int
    jitter: tuple[int, int]  # pixels from the cell's corner; in wide frames the second is in eighths of its height
    first: str = ""  # side on which it appeared
    trail: tuple[int, int] | None = None  # the cell that it has just left

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def height(self) -> str:
        return HEIGHTS[self.row]

    @property
    def side(self) -> str:
        return SIDES[self.column]


@dataclass
class Clip:
    """One stream: what is seen, what is said, and the truth that nobody says.

    frames        (F, 3, side, side) float32 in [-1, 1], of wide clips (F, 3, side, 2 * side); of real videos perhaps
                  their features, see `VideoLLM.see`
    said          narrations, questions and answers, in order
    patch_labels  (F, P, 6 or 7) colour, shape, height, side of the sprite whose centre is in the patch, from 1, 0 for
                  none; 1 where a trail is; the colour of a spark; where clips have landmarks, 1 where it is. Patches
                  are those of the frame squeezed to a square. None for real videos
    truth         after each frame: every question that makes sense then, and its answer
    """

    frames: np.ndarray | torch.Tensor
    said: list[Say]
    patch_labels: np.ndarray | None = None
    truth: list[dict[str, str]] = field(default_factory=list)


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


def draw(frame: np.ndarray, shape: str, colour, top: int, left: int, opacity: float = 1.0) -> None:
    """Paint a shape, a pixel smaller than a cell, into frame (3, side, side), values and opacity 0 to 1, in place."""
    side = frame.shape[-2] // CELLS - 1
    there, mask = frame[:, top : top + side, left : left + side], shape_mask(shape, side)
    there[:, mask] = opacity * np.asarray(colour)[:, None] + (1 - opacity) * there[:, mask]


def background(rng: np.random.Generator, side: int, distractors: int, width: int | None = None) -> np.ndarray:
    """(3, side, width) in 0 to 1, width = side if not given: soft grey texture and grey shapes that never move."""
    width, coarse = width or side, rng.uniform(0.25, 0.6, (6, 6))
    down, along = np.linspace(0, 4.999, side), np.linspace(0, 4.999, width)
    low, part = down.astype(int), down % 1
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    low, part = along.astype(int), along % 1
    texture = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    frame = np.repeat(texture[None], 3, axis=0).astype(np.float32)
    room = side - side // CELLS if width == side else (side - side // CELLS, width - side // CELLS)
    for _ in range(distractors):
        top, left = rng.integers(0, room, 2)
        draw(frame, SHAPES[rng.integers(4)], [rng.uniform(0.05, 0.95)] * 3, top, left)
    return frame


class Scene:
    """The sprites of a stream and what happens to them."""

    def __init__(self, rng: np.random.Generator, config: DataConfig):
        self.rng, self.config = rng, config
        self.wide = bool(config.wide) and rng.random() < config.wide
        self.landmark: tuple[int, int] | None = None  # cell
        if config.landmark and rng.random() < config.landmark:
            self.landmark = tuple(rng.integers(0, CELLS, 2))
        self.sprites: list[Sprite] = []
        self.topic: Sprite | None = None  # "it": the sprite last spoken of, which may have left
        self.spark: tuple[str, int, int] | None = None  # colour and cell, in the one frame in which it shows
        self.last_spark = ""  # colour

    @property
    def taken(self) -> set[tuple[int, int]]:
        """Cells in which a sprite is, or the landmark."""
        cells = {(sprite.row, sprite.column) for sprite in self.sprites}
        return cells | {self.landmark} if self.landmark else cells

    def place(self, sprite: Sprite) -> None:
        """Put a sprite somewhere else: at another height than before, in a cell that no other sprite is in."""
        free = [
            (row, column)
            for row in range(CELLS)
            for column in range(CELLS)
            if row != sprite.row and (row, column) not in self.taken
        ]
        sprite.row, sprite.column = free[self.rng.integers(len(free))]
        sprite.jitter = tuple(self.rng.integers(0, (2, 10) if self.wide else 2, 2))

    def name(self, shape: str | None = None) -> tuple[str, str]:
        """A colour and a shape that no sprite bears together."""
        taken = {sprite.name for sprite in self.sprites}
        free = [(c, s) for c in COLOURS for s in ([shape] if shape else SHAPES) if f"{c} {s}" not in taken]
        return free[self.rng.integers(len(free))]

    def happen(self) -> str:
        """Let one thing happen; returns its narration."""
        if not self.sprites or (len(self.sprites) < self.config.sprites and self.rng.random() < 0.5):
            sprite = Sprite(*self.name(), row=-1, column=-1, jitter=(0, 0))
            self.place(sprite)
            sprite.first = sprite.side
            self.sprites.append(sprite)
            self.topic = sprite
            return f"{sprite.name} appears {sprite.height}"
        sprite = self.topic = self.sprites[self.rng.integers(len(self.sprites))]
        before, kind = sprite.name, self.rng.choice(list(EVENTS), p=list(EVENTS.values()))
        if kind == "turns":
            sprite.colour, _ = self.name(sprite.shape)
            return f"{before} turns {sprite.colour}"
        if kind == "moves":
            sprite.trail = (sprite.row, sprite.column)
            self.place(sprite)
            return f"{before} moves {sprite.height}"
        self.sprites.remove(sprite)
        return f"{before} leaves"

    def settle(self) -> None:
        """A frame has passed: trails and sparks fade."""
        self.spark = None
        for sprite in self.sprites:
            sprite.trail = None

    def flash(self) -> None:
        """Let a spark show, perhaps, in a cell without sprite or trail."""
        if self.config.sparks and self.rng.random() < self.config.sparks:
            taken = self.taken | {sprite.trail for sprite in self.sprites}
            free = [(row, column) for row in range(CELLS) for column in range(CELLS) if (row, column) not in taken]
            self.last_spark = list(SPARKS)[self.rng.integers(len(SPARKS))]
            self.spark = (self.last_spark, *free[self.rng.integers(len(free))])

    def drift(self, busy: Sprite | None) -> None:
        """Let sprites, except the one that something just happened to, step one cell aside; nobody speaks of it."""
        for sprite in self.sprites:
            if self.config.drift and sprite is not busy and self.rng.random() < self.config.drift:
                beside = [c for c in (sprite.column - 1, sprite.column + 1) if 0 <= c < CELLS]
                free = [column for column in beside if (sprite.row, column) not in self.taken]
                if free:
                    sprite.column = free[self.rng.integers(len(free))]

    def truth(self) -> dict[str, str]:
        """Every question that can be asked at this moment, with its answer: where things are, and where they were."""
        it = self.topic
        answers = {
            "where is it ?": f"now {it.side}" if it in self.sprites else "nowhere",
            "where did it appear ?": f"first {it.first}" if it else "nowhere",
        }
        for sprite in self.sprites:
            if sprite is not it:
                answers[f"where is the {sprite.name} ?"] = f"now {sprite.side}"
                answers[f"where did the {sprite.name} appear ?"] = f"first {sprite.first}"
        if self.landmark and it in self.sprites:
            apart = it.column - self.landmark[1]
            answers[LANDMARK] = "its left" if apart < 0 else "its right" if apart else "neither side"
        if self.config.sparks:
            answers["which spark ?"] = f"spark {self.last_spark}" if self.last_spark else "none"
        return answers

    def paint(self, frame: np.ndarray) -> None:
        """Draw landmark, sprites and spark into frame (3, height, width), in place, trails below sprites. A cell of a
        wide frame is twice as wide as high, what is drawn into it is not."""
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
        """(P, 6 or 7) see Clip; for a frame of `side` pixels in patches of `patch` pixels."""
        labels = np.zeros((side // patch, side // patch, len(label_sizes(self.config))), np.int64)

        def place(cell: tuple[int, int]) -> tuple[int, int]:
            """The patch that holds a cell's centre."""
            return tuple(min((c * (side // CELLS) + side // CELLS // 2) // patch, side // patch - 1) for c in cell)

        for sprite in self.sprites:
            what = list(COLOURS).index(sprite.colour), SHAPES.index(sprite.shape)
            labels[place((sprite.row, sprite.column))][:4] = [1 + value for value in (*what, sprite.row, sprite.column)]
            if sprite.trail:
                labels[place(sprite.trail)][4] = 1
        if self.spark:
            colour, row, column = self.spark
            labels[place((row, column))][SPARK_LABEL] = 1 + list(SPARKS).index(colour)
        if self.landmark:
            labels[place(self.landmark)][-1] = 1
        return rearrange(labels, "h w c -> (h w) c")


def happenings(
    rng: np.random.Generator, config: DataConfig, model: ModelConfig, scene: Scene | None = None
) -> Iterator[tuple[np.ndarray, list[Say], np.ndarray, dict[str, str]]]:
    """A stream without end: of each frame its picture (3, height, width) in 0 to 1 without noise, what is said after
    it, its patch labels and its truth (see Clip). A frame's memory is its own: nothing is kept but the scene."""
    scene, side, answered = scene or Scene(rng, config), model.image_size, {}
    still = background(rng, side, config.distractors, 2 * side if scene.wide else side)
    for t in count():
        said, picture = [], still.copy()
        scene.settle()
        if happens := rng.random() < config.event_rate:
            said.append(Say(t, "assistant", scene.happen()))
        scene.drift(busy=scene.topic if happens else None)
        scene.flash()
        scene.paint(picture)
        labels, truth = scene.patch_labels(model.image_size, model.patch_size), scene.truth()
        # What can be read off earlier words measures little: never ask for a repeated answer, rarely for nothing.
        fresh = {question: answer for question, answer in truth.items() if answered.get(question) != answer}
        worth = [question for question, answer in fresh.items() if answer not in NOTHING or rng.random() < 0.2]
        if worth and rng.random() < config.question_rate:
            asked = worth[rng.integers(len(worth))]
            answered[asked] = truth[asked]
            said += [Say(t, "user", asked), Say(t, "assistant", truth[asked])]
        yield picture, said, labels, truth


def with_noise(picture: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Pictures in 0 to 1 -> with noise, in [-1, 1]."""
    return np.clip(picture + noise * rng.standard_normal(picture.shape, np.float32), 0, 1) * 2 - 1


def make_clip(
    config: DataConfig, model: ModelConfig, split: str, seed: int, index: int, frames: int | None = None
) -> Clip:
    """Clip number `index` of a split. Split, seed and index alone decide it, and splits never share a clip."""
    rng = np.random.default_rng([SPLITS[split], seed, index])
    frames = list(islice(happenings(rng, config, model), frames or config.frames))
    pictures, turns, labels, truth = zip(*frames, strict=True)
    said = list(chain(*turns))
    if config.ahead and rng.random() < config.ahead:
        worth = [question for question, answer in truth[-1].items() if answer not in NOTHING]
        if worth:
            asked, last = worth[rng.integers(len(worth))], len(frames) - 1
            said = [
                Say(-1, "user", asked),
                *said,
                Say(last, "user", REMINDER),
                Say(last, "assistant", truth[-1][asked]),
            ]
    video = with_noise(np.stack(pictures), config.noise, rng)
    return Clip(video, said, np.stack(labels), list(truth))


def endless(config: DataConfig, model: ModelConfig, split: str, seed: int) -> Iterator[Clip]:
    """One stream that never ends, as clips of a single frame each; frames are numbered from 0 on."""
    rng = np.random.default_rng([SPLITS[split], seed, 0, 1])  # no clip has four numbers
    for picture, said, labels, truth in happenings(rng, config, model):
        yield Clip(with_noise(picture, config.noise, rng)[None], said, labels[None], [truth])


def clip_layout(words: Vocabulary, clip: Clip, frame_tokens: int) -> Layout:
    return lay_out(words, len(clip.frames), frame_tokens, clip.said)


def join_frames(frames: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
    """Some frames (F, 3, height, width) after others; where some are wider, the others end in columns of nan, see
    `vit.squeeze`."""
    frames = [torch.as_tensor(some) for some in frames]
    widest = max(some.shape[-1] for some in frames)
    if any(some.shape[-1] != widest for some in frames):
        frames = [F.pad(some, (0, widest - some.shape[-1]), value=torch.nan) for some in frames]
    return torch.cat(frames)


def clip_pixels(clips: Sequence[Clip]) -> torch.Tensor:
    """Frames of all clips, in order, (F, 3, height, width), see `join_frames`."""
    return join_frames([clip.frames for clip in clips])


def clip_batch(words: Vocabulary, clips: Sequence[Clip], frame_tokens: int) -> Batch:
    """Clips, which may differ in length, as one padded batch."""
    return collate([clip_layout(words, clip, frame_tokens) for clip in clips], clip_pixels(clips))
