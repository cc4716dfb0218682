"""A crowd: more sprites in every frame than any routed layer keeps tokens, and questions about any of them.

Between two frames everybody is put into a cell by chance, silently, so that what is new in a frame says nothing about
what matters. Sometimes one of them leaves a trail where it was. That is narrated: its name, and then the side on which
it is now, "moves red-disc left". Nobody asks about it then. How hard it is, is told by numbers:

    crowd   sprites in a frame
    shapes  how many shapes there are; with more, fewer sprites share one, and a leader is guessed more easily
    asks    questions after a frame, each about another sprite
    looks   share of questions that need two look-ups: "where is the leader of the red-disc ?"
    echo    do answers repeat the name?
    later   share of questions about the first frame: "where did the red-disc appear ?"
    ahead   chance that one question is asked before the first frame, and answered after the last (see data.py)

An answer repeats the name ("red-disc left"), so that the token that predicts the side knows whom to look for. Without
`echo` it is "now left": then that token must fetch the name from the question before it can look. A dense first layer
may settle on another way instead: look at the frame, and guess the side with the most sprites.

A sprite's *leader* is the sprite of its own shape that has the colour of its badge, a small square in its middle.
"""

import math
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from mod.data import CELLS, COLOURS, LABEL_SIZES, SHAPES, Scene, Sprite, patch_of

BADGE = 3  # side of a badge, pixels
# Columns of the patch labels: the colour of a badge; of whom a trail is, which tells who has moved.
BADGE_LABEL, TRAIL_LABELS = len(LABEL_SIZES), slice(len(LABEL_SIZES) + 1, len(LABEL_SIZES) + 3)
CROWD_LABEL_SIZES = (*LABEL_SIZES, 1 + len(COLOURS), 1 + len(COLOURS), 1 + len(SHAPES))
NAMES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
NAME_WORDS = tuple(f"{colour}-{shape}" for colour, shape in NAMES)
MOST = CELLS * CELLS - 5  # sprites of a frame, at most


@dataclass(eq=False)
class Member(Sprite):
    """A sprite whose name is one word: finding it is one look, with no words to be put together before."""

    leader: "Member | None" = None  # None for the only one of its shape

    @property
    def name(self) -> str:
        return f"{self.colour}-{self.shape}"


class CrowdScene(Scene):
    """`config.crowd` sprites, all of which are there from the first frame on and in every frame."""

    def step(self) -> str | None:
        rng, cells = self.rng, [divmod(cell, CELLS) for cell in range(CELLS * CELLS)]
        mover = None
        if not self.sprites:
            shapes = rng.permutation(SHAPES)[: self.config.shapes or math.ceil(self.config.crowd / len(COLOURS))]
            names = [name for name in NAMES if name[1] in shapes]
            self.sprites = [Member(*names[number], row=-1, column=-1, jitter=(0, 0))
                            for number in rng.permutation(len(names))[: self.config.crowd]]
            for shape in SHAPES:
                same = [sprite for sprite in self.sprites if sprite.shape == shape]
                for sprite, leader in zip(same, same[1:] + same[:1], strict=True):
                    sprite.leader = leader if leader is not sprite else None
        elif rng.random() < self.config.event_rate:
            mover = self.topic = self.sprites[rng.integers(len(self.sprites))]
            cells.remove((mover.row, mover.column))  # where its trail is seen
        for sprite, cell in zip(self.sprites, rng.permutation(len(cells)), strict=False):
            sprite.trail = (sprite.row, sprite.column) if sprite is mover else None
            sprite.row, sprite.column = cells[cell]
            sprite.jitter = tuple(rng.integers(0, 2, 2))
            sprite.first = sprite.first or sprite.side
        return f"moves {mover.name} {mover.side}" if mover else None

    def truth(self) -> dict[str, str]:
        answers, echo = {}, self.config.echo
        for sprite in self.sprites:
            answers[f"where is the {sprite.name} ?"] = f"{sprite.name if echo else 'now'} {sprite.side}"
            answers[f"where did the {sprite.name} appear ?"] = f"first {sprite.name} {sprite.first}"
            if leader := sprite.leader:
                answers[f"where is the leader of the {sprite.name} ?"] = f"leader of {sprite.name} {leader.side}"
        return answers

    def asked(self, truth: dict[str, str]) -> list[str]:
        rng, questions = self.rng, []
        if rng.random() >= self.config.question_rate:
            return questions
        silent = [sprite for sprite in self.sprites if not sprite.trail]  # where the mover is has just been said
        for number in rng.permutation(len(silent))[: self.config.asks]:
            name, (two, past) = silent[number].name, rng.random(2)
            question = f"where did the {name} appear ?" if past < self.config.later else f"where is the {name} ?"
            leader = f"where is the leader of the {name} ?"
            questions.append(leader if two < self.config.looks and leader in truth else question)
        return questions

    def paint(self, frame: np.ndarray) -> None:
        super().paint(frame)
        cell = frame.shape[-2] // CELLS
        for sprite in self.sprites:
            if leader := sprite.leader:
                top, left = (cell * at + jitter + (cell - 1 - BADGE) // 2 for at, jitter in
                             zip((sprite.row, sprite.column), sprite.jitter, strict=True))
                frame[:, top : top + BADGE, left : left + BADGE] = np.asarray(COLOURS[leader.colour])[:, None, None]

    def patch_labels(self, side: int, patch: int) -> np.ndarray:
        """(P, 8), the core's, the colour of a badge, colour and shape of a trail; from 1, 0 for none."""
        across = side // patch
        labels = np.zeros((across, across, len(CROWD_LABEL_SIZES)), np.int64)
        labels[..., :BADGE_LABEL] = rearrange(super().patch_labels(side, patch), "(h w) c -> h w c", h=across)
        for sprite in self.sprites:
            if leader := sprite.leader:
                here = patch_of((sprite.row, sprite.column), side, patch)
                labels[here][BADGE_LABEL] = 1 + list(COLOURS).index(leader.colour)
            if sprite.trail:
                what = list(COLOURS).index(sprite.colour), SHAPES.index(sprite.shape)
                labels[patch_of(sprite.trail, side, patch)][TRAIL_LABELS] = [1 + value for value in what]
        return rearrange(labels, "h w c -> (h w) c")
