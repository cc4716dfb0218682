"""What happened in a live stream, frame by frame: what the page, the pictures and the terminal draw from.

Read next: show.py
"""

from dataclasses import dataclass, field

import numpy as np
from einops import reduce

from mod.decoder import Routing
from mod.layout import user_ids
from mod.live.costs import chunk_flops, dense
from mod.live.live import Happened, LiveStream

NOTHING = "(nothing)"  # stands for a response of no words, which is not the same as silence
REFUSED = "(no memory for another question)"


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
    picture      (3, side, side) in [-1, 1], squeezed where the frame is wider
    kept         of every routed layer: (N,) bool, the frame's tokens that went through it; token 0 is the CLS
    scores       of every routed layer: (N,) float, what its router gave them
    said         lines in order; a frame that is rightly silent has none
    entries      cache entries of every layer, when all has been said
    held         frames and text tokens that the cache still stands for
    flops        of the decoder's layers so far, cumulative: this model's, and full computation's of the same stream
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


def as_square(picture: np.ndarray) -> np.ndarray:
    """A picture (3, height, width), which may end in columns of nan, as the encoder of squares saw it."""
    picture = picture[..., ~np.isnan(picture[0, 0])]
    height, width = picture.shape[-2:]
    if width == height or width % height:
        return picture
    return reduce(picture, "c h (w k) -> c h w", "mean", w=height)


class Recorder:
    """Turns what happens in one row of a live stream into Moments, one per frame; what is said before the first frame
    belongs to its moment.

    `trace` is the list that the stream's routed layers write into; it says whose decisions they are only if the stream
    has a single row.
    """

    def __init__(self, stream: LiveStream, row: int, trace: list[Routing] | None):
        self.stream, self.row, self.trace = stream, row, trace
        config = stream.model.config
        self.early: list[Line] = []  # said before the first frame
        self.models, self.flops = (config, dense(config)), [0, 0]
        self.position = stream.position[row]

    def _count(self, frames: int, chunks: list[int]) -> None:
        """Add the FLOPs of so many new frames, then of chunks of text of these lengths."""
        held_frames, held_text = self.stream.held(self.row)
        text = held_text - sum(chunks)
        for number, model in enumerate(self.models):
            self.flops[number] += chunk_flops(model, frames, 0, held_frames, text) if frames else 0
            for end in range(1, len(chunks) + 1):
                after = text + sum(chunks[:end])
                self.flops[number] += chunk_flops(model, 0, chunks[end - 1], held_frames, after)

    def note(self, happened: Happened, truth: str | None, before: Moment | None, seconds: float) -> list[Moment]:
        """A new moment for a frame; none for a question, which is added to the moment `before`, or to the first.

        truth  what should have been said ("": nothing), None where nobody knows
        """
        fed, self.position = self.stream.position[self.row] - self.position, self.stream.position[self.row]
        if happened.question is None:
            self._count(1, [1] * (fed - self.stream.model.config.frame_tokens))  # a reply is fed word by word
            moment = Moment(happened.number, float(happened.time), as_square(np.asarray(happened.picture)))
            moment.said, self.early = self.early, []
            if self.trace is not None:
                for routing in self.trace:  # of the frame alone: the words after it are text and are never routed
                    moment.kept[routing.layer] = routing.kept[0].cpu().numpy()
                    moment.scores[routing.layer] = routing.scores[0].float().cpu().numpy()
                self.trace.clear()
        else:
            # Nothing was fed if the question was refused.
            asked = min(fed, len(user_ids(self.stream.words, happened.question)))
            self._count(0, [asked] + [1] * (fed - asked))
            moment = before or Moment(-1, 0.0, None, said=self.early)
            moment.said.append(Line("user", happened.question))
        said = "" if happened.reply is None else happened.reply or NOTHING
        said = REFUSED if happened.refused else said
        if said or truth or (happened.question is not None and not happened.told):
            moment.said.append(Line("assistant", said, truth))
        moment.entries, moment.held = self.stream.cache.entries(self.row), self.stream.held(self.row)
        moment.flops, moment.seconds = tuple(self.flops), moment.seconds + seconds
        return [moment] if happened.question is None else []
