"""A stream with a clock: frames and questions come with their times, happen in order, and survive a crash.

Frame k of a source stands at k / fps seconds. Things happen one after the other in the order of their times; at the
same time the frame comes first, then the questions as they were asked. Nothing is interrupted: a question that comes
while the model speaks waits until it has finished, and so does the next frame. A question asked at time s therefore
stands after the last frame at or before s and after what was said about it, exactly where `layout.lay_out` puts it.

Several streams run through the model together, as a batch whenever things of a kind stand at the same time.

Read next: saved.py
"""

import heapq
import time as clocks
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from mod.layout import Vocabulary, assistant_ids, user_ids
from mod.live.settings import StreamConfig
from mod.live.window import WindowCache, open_cache
from mod.stream import Stream
from mod.videollm import VideoLLM

FRAME, QUESTION = 0, 1  # at the same time a frame comes before a question


class LiveStream(Stream):
    """A Stream that forgets, and keeps quiet for a while after a narration, as its settings say.

    quiet  per row, for how many frames more nothing is narrated
    """

    def __init__(self, model: VideoLLM, words: Vocabulary, rows: int = 1, *, settings: StreamConfig,
                 max_words: int = 12, trace: list | None = None):
        super().__init__(model, words, rows, threshold=settings.threshold, max_words=max_words,
                         cache=open_cache(model, settings, rows), trace=trace)
        self.settings, self.quiet = settings, [0] * rows

    def narrate(self, pixels: Tensor, rows: Sequence[bool] | None = None) -> list[str | None]:
        """As `Stream.narrate`; after a narration, `refractory` frames are not narrated, whatever the model wants."""
        wants, speaks = self.wants_to_speak(self.see(pixels, rows)), [False] * self.rows
        for row, sees in enumerate(rows or [True] * self.rows):
            if sees:
                speaks[row] = wants[row] and not self.quiet[row]
                self.quiet[row] = self.settings.refractory if speaks[row] else max(0, self.quiet[row] - 1)
        return self.respond(speaks)

    def held(self, row: int = 0) -> tuple[int, int]:
        """Frames and text tokens that the cache still stands for."""
        if isinstance(self.cache, WindowCache):
            return self.cache.held(row)
        return self.seen[row], self.position[row] - self.seen[row] * self.model.config.frame_tokens


class Paced:
    """Pictures with their numbers, in real time: number k not before k / fps seconds after the first.

    on_late  what happens when the reader is slower: "wait" hands over every picture, however late; "skip" leaves out
             those in whose place a later one is due already; "off" does not look at the clock
    late, skipped, lag  pictures handed over later than the next one was due, pictures left out, the largest delay in s
    slept    seconds spent waiting for a picture's time

    Times count from the first picture, so that nothing drifts. `first` is the number that the pictures begin with.
    """

    def __init__(self, pictures: Iterable[np.ndarray], fps: Fraction, on_late: str = "off", first: int = 0,
                 clock=clocks.monotonic, sleep=clocks.sleep):
        self.pictures, self.fps, self.on_late, self.first = pictures, fps, on_late, first
        self.clock, self.sleep = clock, sleep
        self.late, self.skipped, self.lag, self.slept = 0, 0, 0.0, 0.0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        began, overdue = None, None  # overdue: the latest picture that is being left out, unless it is the last of all
        for number, picture in enumerate(self.pictures, self.first):
            if self.on_late == "off":
                yield number, picture
                continue
            now = self.clock()
            began = now if began is None else began
            delay = now - began - float((number - self.first) / self.fps)
            if delay < 0:
                self.sleep(-delay)
                self.slept -= delay
            if self.on_late == "skip":
                self.skipped += overdue is not None
                overdue = (number, picture) if delay * self.fps >= 1 else None
                if overdue:
                    continue
            self._count(delay)
            yield number, picture
        if overdue:
            self._count(delay)
            yield overdue

    def _count(self, delay: float) -> None:
        """Note that a picture is handed over so many seconds after its time."""
        self.late += delay * self.fps >= 1
        self.lag = max(self.lag, delay)


@dataclass(frozen=True)
class Happened:
    """What has happened in one stream: a frame, or a question, and what the model said then (None: nothing).

    refused  there was no room for the question
    told     the user only told the model something: nothing is said then
    """

    row: int
    time: Fraction
    number: int  # of the frame; of a question, that of the last frame before it, -1 for none
    picture: np.ndarray | None
    question: str | None
    reply: str | None
    refused: bool = False
    told: bool = False


class Live:
    """The rows of a LiveStream, each with a source of frames and a queue of questions.

    sources  per row, an iterator of (number, picture), numbers rising; such as `Paced`
    fps      per row, frames per second
    question_room  tokens that questions and their answers may take up, of those that are remembered, where memory is
             bounded; a question that does not fit is refused, and the stream goes on. None: any number
    """

    def __init__(self, stream: LiveStream, sources: Sequence[Iterable[tuple[int, np.ndarray]]], fps: Sequence[Fraction],
                 question_room: int | None = None):
        if not len(sources) == len(fps) == stream.rows:
            raise ValueError(f"got {len(sources)} sources and {len(fps)} rates for {stream.rows} streams")
        self.question_room = question_room
        self.stream, self.sources, self.fps = stream, [iter(source) for source in sources], list(fps)
        self.coming: list[tuple[int, np.ndarray] | None] = [None] * stream.rows  # a frame that has been read ahead
        self.ended = [False] * stream.rows
        self.last = [-1] * stream.rows  # number of the last frame that was seen
        self.questions: list[list[tuple[Fraction, int, str, bool]]] = [[] for _ in sources]  # True: to be answered
        self.asked = 0  # questions so far
        # Of every remembered answer: how many frames had been seen then, and its tokens with those of its question.
        self.answered: list[list[tuple[int, int]]] = [[] for _ in sources]
        self.kept: dict = {}  # for the caller, saved with the rest

    def ask(self, row: int, time: Fraction, text: str, answered: bool = True) -> None:
        """Put a question into a row's queue, or something that the model is only told and does not answer at once, such
        as what to look out for. One whose time has passed already is next."""
        heapq.heappush(self.questions[row], (Fraction(time), self.asked, text, answered))
        self.asked += 1

    def _next(self, row: int) -> tuple[Fraction, int] | None:
        """Time and kind of what comes next in a row, as far as is known before its next frame has been read."""
        number = self.coming[row][0] if self.coming[row] else self.last[row] + 1
        frame = number / self.fps[row]
        question = self.questions[row][0][0] if self.questions[row] else None
        if self.ended[row] and self.coming[row] is None:  # the last frame is shown until `frame`
            return (question, QUESTION) if question is not None and question < frame else None
        return (question, QUESTION) if question is not None and question < frame else (frame, FRAME)

    def step(self) -> list[Happened]:
        """Let the next thing happen, in every stream in which it stands at this time. Empty when all is over."""
        while nexts := {row: due for row in range(self.stream.rows) if (due := self._next(row))}:
            time, kind = min(nexts.values())
            rows = [row for row, due in nexts.items() if due == (time, kind)]
            if kind == QUESTION:
                return self._answer(rows)
            for row in rows:
                if self.coming[row] is None:
                    self.coming[row] = next(self.sources[row], None)
                    self.ended[row] = self.coming[row] is None
            if all(self._next(row) == (time, kind) for row in rows):  # or frames were left out, or there is none
                return self._look(rows)
        return []

    def _look(self, rows: list[int]) -> list[Happened]:
        numbers, pictures = zip(*(self.coming[row] for row in rows), strict=True)
        some = [row in rows for row in range(self.stream.rows)]
        replies = self.stream.narrate(torch.stack([torch.as_tensor(picture) for picture in pictures]), some)
        for row, number in zip(rows, numbers, strict=True):
            self.coming[row], self.last[row] = None, number
        return [Happened(row, number / self.fps[row], number, picture, None, replies[row])
                for row, number, picture in zip(rows, numbers, pictures, strict=True)]

    def _fits(self, row: int, text: str, answered: bool) -> bool:
        """Is there room for this question and the longest answer, if any, beside those that are remembered?"""
        if self.question_room is None:
            return True
        rule, seen = self.stream.settings, self.stream.seen[row]
        self.answered[row] = [(frames, tokens) for frames, tokens in self.answered[row]
                              if not rule.window or frames <= rule.sinks or frames > seen - rule.window]
        longest = len(user_ids(self.stream.words, text))
        if answered:
            longest += self.stream.max_words + len(assistant_ids(self.stream.words, ""))
        return sum(tokens for _, tokens in self.answered[row]) + longest <= self.question_room

    def _answer(self, rows: list[int]) -> list[Happened]:
        asked = {row: self.questions[row][0] for row in rows}
        fits = {row for row in rows if self._fits(row, *asked[row][2:])}
        before = list(self.stream.position)
        self.stream.hear([asked[row][2] if row in fits else None for row in range(self.stream.rows)])
        replies = self.stream.respond([row in fits and asked[row][3] for row in range(self.stream.rows)])
        for row in rows:
            heapq.heappop(self.questions[row])
            if row in fits and self.question_room is not None:
                self.answered[row].append((self.stream.seen[row], self.stream.position[row] - before[row]))
        return [Happened(row, asked[row][0], self.last[row], None, asked[row][2], replies[row], row not in fits,
                         told=not asked[row][3]) for row in rows]
