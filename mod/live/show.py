"""A live stream shown as it happens: a line for each thing said, beside the truth where it is known, and a summary.

Read next: draw.py
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from mod.data import Clip, Source
from mod.live.costs import dense, held_bytes, layer_tokens
from mod.live.live import Happened, LiveStream, Paced
from mod.live.record import NOTHING, REFUSED


class Synthetic:
    """The pictures of a synthetic stream, which remembers the truth about the latest of them."""

    def __init__(self, source: Source, seed: int, frames: int):
        self.clips = islice(source.live(seed), frames)
        self.truths: dict[int, Clip] = {}

    def __iter__(self) -> Iterator[np.ndarray]:
        for number, clip in enumerate(self.clips):
            self.truths[number] = clip
            self.truths.pop(number - 2, None)  # a frame may be read ahead while the one before is asked about
            yield clip.frames[0]

    def truth(self, happened: Happened) -> str | None:
        """What should have been said ("": nothing), None where nobody knows, or where nothing is to be said."""
        clip = self.truths.get(happened.number)
        if happened.question is None:
            return clip.said[0].text if clip.said else ""
        return clip.truth[0].get(happened.question) if clip and not happened.told else None


class Printer:
    """Prints what happens, for people or for programs, and counts what was right, where the truth is known."""

    def __init__(self, stream: LiveStream, as_json: bool, knows_truth: bool):
        self.stream, self.as_json, self.knows_truth = stream, as_json, knows_truth
        self.right = {"narrations": [0, 0], "silent frames": [0, 0], "answers": [0, 0]}  # right, counted
        if not as_json:
            print(f"{self._label('')}{'frame':>5} {'time':>8}   {'said':<34} {'truth' if knows_truth else ''}".rstrip())

    def _label(self, row: int | str) -> str:
        return f"{row:<3}" if self.stream.rows > 1 else ""

    def show(self, happened: Happened, truth: str | None, replied: int) -> None:
        """One thing that has happened; `replied`: tokens of the reply."""
        said, right = happened.reply or "", truth is None or (happened.reply or "") == truth
        if truth is not None and not happened.refused:
            kind = "answers" if happened.question else "narrations" if truth else "silent frames"
            self.right[kind] = [self.right[kind][0] + right, self.right[kind][1] + 1]
        if self.as_json:
            entries = self.stream.cache.entries(happened.row)
            if happened.question:
                self._json(happened, "user", happened.question, [number - replied for number in entries])
            role = "refused" if happened.refused else "silence" if happened.reply is None else "assistant"
            if happened.refused or not happened.told:
                self._json(happened, role, said, entries)
            return
        label, when = self._label(happened.row), f"{happened.number:>5} {float(happened.time):>6.2f} s"
        if happened.question:
            when = " " * len(when)
            print(f"{label}{when}   user: {happened.question}", flush=True)
            if happened.told and not happened.refused:
                return
        known = "" if not self.knows_truth else "?" if truth is None else truth or "."
        shown = "." if happened.reply is None else said or NOTHING
        if happened.refused:
            shown, known, right = REFUSED, "", True
        print(f"{label}{when}   {shown:<34} {known}{'' if right else '   <- differs'}".rstrip(), flush=True)

    def _json(self, happened: Happened, role: str, text: str, entries: list[int]) -> None:
        row = {"stream": happened.row} if self.stream.rows > 1 else {}
        entry = {"frame": happened.number, "time": float(happened.time), "role": role}
        print(json.dumps(row | entry | {"text": text, "cache_entries": entries}), flush=True)

    def summary(self, frames: int, seconds: float, paced: Sequence[Paced]) -> None:
        """What it came to: rights, speed over so many frames, delays, and the cache against full computation."""
        stream, config = self.stream, self.stream.model.config
        if any(one.on_late != "off" for one in paced):
            late, skipped = sum(one.late for one in paced), sum(one.skipped for one in paced)
            lag = max(one.lag for one in paced)
            clock = f"clock: {late} frames later than the next was due, {skipped} skipped, at most {lag:.2f} s behind"
            print(clock, file=sys.stderr)
        if self.as_json or not frames:
            return
        print()
        if self.knows_truth:
            scores = (f"{right} of {counted} {name}" for name, (right, counted) in self.right.items() if counted)
            print(f"right: {', '.join(scores)}")
        print(f"speed: {frames / seconds:.0f} frames per second on {stream.device}, answers to questions not counted")
        rows, full = range(stream.rows), dense(config)  # of several streams the sums
        held = (sum(numbers) for numbers in zip(*map(stream.held, rows), strict=True))
        entries = [sum(layer) for layer in zip(*map(stream.cache.entries, rows), strict=True)]
        whole, used = layer_tokens(full, *held), sum(held_bytes(stream.cache, row) for row in rows)
        where = f"layers 0 to {config.depth - 1}" + (f" of {stream.rows} streams" if stream.rows > 1 else "")
        print(f"cache: {' '.join(map(str, entries))} entries in {where}, {used:,} bytes")
        bytes_of_full = used * sum(whole) // sum(entries)  # an entry of the same size
        print(f" full: {' '.join(map(str, whole))} entries with full computation, {bytes_of_full:,} bytes")
