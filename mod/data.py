"""The synthetic video stream: small, made from a seed on the fly, and hard enough that vision is needed.

A coloured sprite appears, moves, turns another colour, leaves, on a textured background with grey distractors and
noise; in the one frame in which it moves it leaves a trail, as a camera's exposure would. Each change is narrated,
nothing is said while nothing happens. On which *side* of the frame the sprite is, is never narrated, so a question
about it (now, or where it first appeared) cannot be answered from the narrations: there are five sides.

With several sprites "it" is the one last spoken of; the others are asked for by name.

Read next: stream.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, count, islice

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mod.config import Config, DataConfig, ModelConfig, require
from mod.decoder import Routing
from mod.layout import Batch, Say, Vocabulary, collate, lay_out

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.15, 0.25, 0.95), "yellow": (0.95, 0.9, 0.1),
           "pink": (0.95, 0.3, 0.85), "cyan": (0.1, 0.9, 0.9)}
SHAPES = ("square", "disc", "triangle", "cross")
HEIGHTS = ("top", "upper", "middle", "lower", "bottom")
SIDES = ("far-left", "left", "centre", "right", "far-right")
EVENTS = {"moves": 0.4, "turns": 0.35, "leaves": 0.25}  # what happens to a sprite that is there, and how often
WORDS = (*COLOURS, *SHAPES, *HEIGHTS, *SIDES, "appears", *EVENTS,
         "nowhere", "now", "first", "where", "is", "did", "it", "the", "appear", "?")
NOTHING = ("nowhere", "none")  # answers that say little
SPLITS = {"train": 0, "validation": 1, "test": 2, "warm-up": 3}
CELLS = 5  # a sprite stands in one of 5x5 cells of the frame: a row is a height, a column a side
TRAIL = 0.5  # opacity of the motion blur that a sprite leaves where it was, in the one frame in which it moves
# How many values each label of a patch has: colour, shape, height and side of a sprite, is there a trail; 0 for none.
LABEL_SIZES = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(HEIGHTS), 1 + len(SIDES), 2)
WARM_UP_CLIPS, WARM_UP_FRAMES = 32, 2  # a batch of the vision encoder's warm-up: clips, and frames of each


@dataclass(eq=False)
class Sprite:
    colour: str
    shape: str
    row: int  # cell
    column: int
    jitter: tuple[int, int]  # pixels from the cell's corner
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

    frames        (F, 3, side, side) float32 in [-1, 1]; of real videos perhaps their features, see `VideoLLM.see`
    said          narrations, questions and answers, in order
    patch_labels  (F, P, 5) colour, shape, height, side of the sprite whose centre is in the patch, from 1, 0 for none;
                  1 where a trail is. None for real videos
    truth         after each frame: every question that makes sense then, and its answer
    """

    frames: np.ndarray | Tensor
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


class Scene:
    """The sprites of a stream and what happens to them."""

    def __init__(self, rng: np.random.Generator, config: DataConfig):
        self.rng, self.config = rng, config
        self.sprites: list[Sprite] = []
        self.topic: Sprite | None = None  # "it": the sprite last spoken of, which may have left
        self.answered: dict[str, str] = {}  # what users asked, and were last told

    @property
    def taken(self) -> set[tuple[int, int]]:
        """Cells in which something stands."""
        return {(sprite.row, sprite.column) for sprite in self.sprites}

    def place(self, sprite: Sprite) -> None:
        """Put a sprite somewhere else: at another height than before, in a cell that no other sprite is in."""
        cells = ((row, column) for row in range(CELLS) for column in range(CELLS))
        free = [cell for cell in cells if cell[0] != sprite.row and cell not in self.taken]
        sprite.row, sprite.column = free[self.rng.integers(len(free))]
        sprite.jitter = tuple(self.rng.integers(0, 2, 2))

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

    def step(self) -> str | None:
        """A frame passes: trails fade, and perhaps something happens. Returns its narration."""
        for sprite in self.sprites:
            sprite.trail = None
        return self.happen() if self.rng.random() < self.config.event_rate else None

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
        return answers

    def asked(self, truth: dict[str, str]) -> list[str]:
        """What the user asks after this frame, of the questions that `truth` answers."""
        # An answer that was given before can be read off the words: do not ask for it again, and seldom for nothing.
        fresh = {question: answer for question, answer in truth.items() if self.answered.get(question) != answer}
        worth = [question for question, answer in fresh.items() if answer not in NOTHING or self.rng.random() < 0.2]
        if not worth or self.rng.random() >= self.config.question_rate:
            return []
        question = worth[self.rng.integers(len(worth))]
        self.answered[question] = truth[question]
        return [question]

    def background(self, side: int) -> np.ndarray:
        """(3, side, side) in 0 to 1: soft grey texture and grey shapes that never move."""
        coarse, at = self.rng.uniform(0.25, 0.6, (6, 6)), np.linspace(0, 4.999, side)
        low, part = at.astype(int), at % 1
        rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
        texture = rows[:, low] * (1 - part) + rows[:, low + 1] * part
        frame = np.repeat(texture[None], 3, axis=0).astype(np.float32)
        for _ in range(self.config.distractors):
            top, left = self.rng.integers(0, side - side // CELLS, 2)
            draw(frame, SHAPES[self.rng.integers(4)], [self.rng.uniform(0.05, 0.95)] * 3, top, left)
        return frame

    def paint(self, frame: np.ndarray) -> None:
        """Draw trails, and sprites above them, into frame (3, side, side), in place."""
        cell = frame.shape[-2] // CELLS
        for sprite in self.sprites:
            if sprite.trail:
                top, left = cell * sprite.trail[0], cell * sprite.trail[1]
                draw(frame, sprite.shape, COLOURS[sprite.colour], top, left, opacity=TRAIL)
        for sprite in self.sprites:
            top, left = sprite.row * cell + sprite.jitter[0], sprite.column * cell + sprite.jitter[1]
            draw(frame, sprite.shape, COLOURS[sprite.colour], top, left)

    def patch_labels(self, side: int, patch: int) -> np.ndarray:
        """(P, 5), see Clip; for a frame of `side` pixels in patches of `patch` pixels."""
        labels = np.zeros((side // patch, side // patch, len(LABEL_SIZES)), np.int64)
        for sprite in self.sprites:
            what = list(COLOURS).index(sprite.colour), SHAPES.index(sprite.shape), sprite.row, sprite.column
            labels[patch_of((sprite.row, sprite.column), side, patch)][:4] = [1 + value for value in what]
            if sprite.trail:
                labels[patch_of(sprite.trail, side, patch)][4] = 1
        return rearrange(labels, "h w c -> (h w) c")


def patch_of(cell: tuple[int, int], side: int, patch: int) -> tuple[int, int]:
    """The row and column of the patch that holds a cell's centre."""
    return tuple(min((c * (side // CELLS) + side // CELLS // 2) // patch, side // patch - 1) for c in cell)


def happenings(scene: Scene, model: ModelConfig) -> Iterator[tuple[np.ndarray, list[Say], np.ndarray, dict[str, str]]]:
    """A stream without end: of each frame its picture in 0 to 1 without noise, what is said after it, its patch labels
    and its truth (see Clip). A frame's memory is its own: nothing is kept but the scene."""
    still = scene.background(model.image_size)
    for t in count():
        narration, picture = scene.step(), still.copy()
        said = [Say(t, "assistant", narration)] if narration else []
        scene.paint(picture)
        labels, truth = scene.patch_labels(model.image_size, model.patch_size), scene.truth()
        for question in scene.asked(truth):
            said += [Say(t, "user", question), Say(t, "assistant", truth[question])]
        yield picture, said, labels, truth


def with_noise(picture: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Pictures in 0 to 1 -> with noise, in [-1, 1]."""
    return np.clip(picture + noise * rng.standard_normal(picture.shape, np.float32), 0, 1) * 2 - 1


def make_clip(
    config: DataConfig, model: ModelConfig, split: str, seed: int, index: int, frames: int | None = None
) -> Clip:
    """Clip number `index` of a split. Split, seed and index alone decide it, and splits never share a clip."""
    rng = np.random.default_rng([SPLITS[split], seed, index])
    shown = islice(happenings(Scene(rng, config), model), frames or config.frames)
    pictures, said, labels, truth = zip(*shown, strict=True)
    return Clip(with_noise(np.stack(pictures), config.noise, rng), list(chain(*said)), np.stack(labels), list(truth))


def endless(config: DataConfig, model: ModelConfig, split: str, seed: int) -> Iterator[Clip]:
    """One stream that never ends, as clips of a single frame each; frames are numbered from 0 on."""
    rng = np.random.default_rng([SPLITS[split], seed, 0, 1])  # no clip has four numbers
    for picture, said, labels, truth in happenings(Scene(rng, config), model):
        yield Clip(with_noise(picture, config.noise, rng)[None], said, labels[None], [truth])


def clip_pixels(clips: Sequence[Clip]) -> Tensor:
    """Frames of all clips, in order."""
    return torch.cat([torch.as_tensor(clip.frames) for clip in clips])


def clip_batch(words: Vocabulary, clips: Sequence[Clip], model: ModelConfig) -> Batch:
    """Clips, which may differ in length, as one padded batch."""
    layouts = [lay_out(words, len(clip.frames), model.frame_tokens, clip.said) for clip in clips]
    return collate(layouts, clip_pixels(clips), model.frame_tokens, model.keep_counts)


def recall(grid: int, trace: Sequence[Routing], clips: Sequence[Clip]) -> dict[str, float]:
    """Per routed layer, the share of sprite patches that it keeps; keeping by chance scores k / N.

    `trace` holds what the layers decided on these clips, in order. Nothing where no clip shows a sprite.
    """
    sprite = torch.cat([torch.from_numpy(clip.patch_labels[..., 0]) for clip in clips])
    side = int(sprite.shape[1] ** 0.5)
    frame, patch = sprite.nonzero(as_tuple=True)
    # The patch's place in the pooled grid; token 0 is the CLS.
    token = 1 + (patch // side) * grid // side * grid + (patch % side) * grid // side
    found = {}
    for layer in sorted({routing.layer for routing in trace} if len(frame) else ()):
        kept = torch.cat([routing.kept for routing in trace if routing.layer == layer]).cpu()
        found[str(layer)] = kept[frame, token].float().mean().item()
    return found


@dataclass(frozen=True)
class Source:
    """Where clips come from, the words in which their conversations are written, and what is known about them."""

    words: Vocabulary
    training: Callable[[int], list[Clip]]  # step -> its clips; nothing but the step decides which
    validation: Callable[[int], list[Clip]]  # a number -> at most this many clips
    live: Callable[[int], Iterator[Clip]] | None = None  # a seed -> an endless stream, frame by frame
    probe: Callable[[Sequence[Routing], Sequence[Clip]], dict[str, float]] = lambda trace, clips: {}  # routers' recall
    warm_up: Callable[[int], list[Clip]] | None = None  # step -> clips whose patch labels teach a new vision encoder
    warmed: Callable = lambda model: None  # called once, after the warm-up
    label_sizes: tuple[int, ...] = LABEL_SIZES
    summary_labels: int = len(LABEL_SIZES)  # how many of these labels, from the first, the CLS token learns too


def synthetic(
    config: Config, said: Sequence[str] = WORDS, make: Callable = make_clip, stream: Callable = endless
) -> Source:
    """The clips of a run on synthetic streams, whose words are `said`, as `make` and `stream` make them.

    Raises UserError when its model cannot read or show them.
    """
    data, model, train, words = config.data, config.model, config.train, Vocabulary(said)
    require(len(words) <= model.vocab_size,
            f"vocab_size must be at least {len(words)}, the words of the stream, got {model.vocab_size}")
    require(model.image_size >= 4 * CELLS,
            f"image_size must be at least {4 * CELLS} to show a sprite, got {model.image_size}")

    def training(step: int) -> list[Clip]:
        # Numbers of different steps never meet. (The factor `frames` is not needed, but decides which clips they are.)
        first = step * train.batch_size * data.frames
        return [make(data, model, "train", train.seed, first + i) for i in range(train.batch_size)]

    def validation(number: int) -> list[Clip]:
        return [make(data, model, "validation", 0, index) for index in range(number)]

    def warm_up(step: int) -> list[Clip]:
        busy, first = replace(data, event_rate=0.9), step * WARM_UP_CLIPS
        return [make(busy, model, "warm-up", train.seed, first + i, WARM_UP_FRAMES) for i in range(WARM_UP_CLIPS)]

    live = partial(stream, replace(data, question_rate=0.0), model, "test")  # the user of a live stream asks
    return Source(words, training, validation, live, partial(recall, model.grid), warm_up)
