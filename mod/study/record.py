"""What happened in a live stream, frame by frame: what the page, the pictures and the terminal draw from."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Line:
    """Something said: by the "user" (a question) or the "assistant" (a narration or an answer).

    text   what was said; "" when the assistant kept silent though something should have been said
    truth  what should have been said; "" for silence, None where nobody knows
    """

    role: str
    text: str
    truth: str | None = None

    @property
    def wrong(self) -> bool:
        return self.truth is not None and self.text != self.truth


@dataclass
class Moment:
    """One frame of a stream and all that was said until the next.

    frame, time  number from 0, and seconds of stream time
    picture      (3, side, side) in [-1, 1]
    kept         of every routed layer: (N,) bool, the frame's tokens that went through it; token 0 is the CLS
    scores       of every routed layer: (N,) float, what its router gave them
    said         lines in order; a rightly silent frame has none
    entries      cache entries of every layer, when all has been said
    held         frames and text tokens that the cache still stands for
    flops        of the decoder's layers since the stream began, cumulative: this model, and full computation of the same
    seconds      of the clock for the frame and everything said after it
    """

    frame: int
    time: float
    picture: np.ndarray
    kept: dict[int, np.ndarray] = field(default_factory=dict)
    scores: dict[int, np.ndarray] = field(default_factory=dict)
    said: list[Line] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    held: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    seconds: float = 0.0
