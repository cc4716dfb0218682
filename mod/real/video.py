"""Frames of a real video, by time: from a file, from standard input, from a camera.

Frame k of a video sampled at `fps` stands at time k / fps and shows the last picture whose time, counted from the first
picture's, is not later. Times are fractions, so nothing drifts, at no rate and after no number of hours; pictures are
repeated where the video is slower than `fps` and left out where it is faster. What cannot be decoded is skipped and
counted. One picture at a time is in memory.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np
from einops import rearrange

from mod.config import UserError

Picture = TypeVar("Picture")
CAMERAS = {"linux": ("v4l2", "/dev/video"), "darwin": ("avfoundation", ""), "win32": ("dshow", "video=")}
COARSEST = Fraction(1, 1000)  # s; Matroska's tick, to which it rounds; AVI's is a whole picture, but exact
LOST = 100  # packets in a row that cannot be read: the rest is lost


def import_av():
    """PyAV, which only this file needs. Raises UserError when it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError("got no PyAV, expected it for reading and writing videos; do: pip install av") from None
    return av


def showings(pictures: Iterable[tuple[Picture, Fraction, Fraction]], fps: Fraction) -> Iterator[tuple[Picture, int]]:
    """Each picture with the number of sampled frames that show it, which may be 0.

    pictures: (picture, time, length) in seconds, times from 0 and never falling. The last one is shown at the times
    k / fps before its own end, so that a video of n pictures sampled at its own rate has n frames; one frame at least.
    """
    done, last, end = 0, [], Fraction(0)
    for picture, at, length in pictures:
        until = math.ceil(at * fps)  # the number of frames that stand before `at`
        if last:
            yield last[0], until - done
            done = until
        last, end = [picture], at + length
    if last:
        yield last[0], max(math.ceil(end * fps), done, 1) - done


def open_source(source: str):
    """An open PyAV container: a file's, "-" for standard input, /dev/video0 or camera:NAME. Raises UserError."""
    av = import_av()
    try:
        if source == "-":
            return av.open("pipe:0")
        if source.startswith(("camera:", "/dev/video")):
            kind, prefix = CAMERAS.get(sys.platform, CAMERAS["linux"])
            return av.open(prefix + source.removeprefix("camera:").removeprefix(prefix), format=kind)
        return av.open(str(Path(source).absolute()))  # absolute, or 12:30.mp4 would be the protocol "12"
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "pipe Matroska or MPEG-TS, which need no seeking" if source == "-" else "check the name or convert it"
        raise UserError(f"got {source} ({reason}), expected a video that PyAV can open; {hint}") from error


class Video:
    """The frames of a video, one after the other, (3, size, size) float32 in [-1, 1], frame k at time k / fps.

    The longer side of a picture is scaled to `size` (bicubic), the rest is black; it appears as a player would show it,
    turned by its metadata and with square pixels. Closes its source at the end of a `with`.

    skipped       packets and pictures that could not be decoded so far
    about_frames  how many frames there will be, as far as the source knows its length, or None

    Raises UserError: at once for a source that is missing or no video, at the first frame when nothing can be decoded.
    """

    def __init__(self, source: str, fps: float | Fraction, size: int):
        if not (0 < fps < math.inf and size >= 1):
            raise UserError(
                f"got {fps} frames per second of {size} pixels, expected more than 0 of both; pass another --fps"
            )
        self.fps = Fraction(str(fps))  # 29.97 itself, not the nearest binary number
        self.source, self.size, self.skipped = str(source), size, 0
        self.container = open_source(self.source)
        # A song's cover is a video stream, too, and any text is a "tty" film.
        cover = import_av().stream.Disposition.attached_pic
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams or self.container.format.name == "tty":
            raise UserError(f"got {source}, which has no video stream, expected a video; name another file")
        self.stream = streams[0]
        known, whole = self.stream.duration, self.container.duration
        length = known * self.stream.time_base if known else Fraction(whole, 10**6) if whole else None
        self.about_frames = length and max(1, math.ceil(length * self.fps))
        self.frames = self._frames()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames  # always the same one: a video is read once

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_) -> None:
        self.frames.close()
        self.container.close()

    def _frames(self) -> Iterator[np.ndarray]:
        decoded = False
        for picture, times in showings(self._timed(), self.fps):
            decoded = True
            pixels = self._pixels(picture) if times else None
            for _ in range(times):
                yield pixels.copy()  # the reader may write into its frame
        if not decoded:
            what = f"got {self.source}, but no picture could be decoded ({self.skipped} skipped)"
            raise UserError(f"{what}, expected a video with pictures; check it in a player or name another file")

    def _timed(self) -> Iterator[tuple[object, Fraction, Fraction]]:
        """(picture, time, length) in seconds, times from 0 and never falling.

        Containers round times to their tick: each picture counts from half a tick before, and ends as much earlier.
        """
        rate, tick = self.stream.guessed_rate, self.stream.time_base
        slack = min(tick, COARSEST) / 2
        zero, now, length = None, Fraction(0), 1 / rate if rate else Fraction(0)
        for picture in self._decoded():
            given = None if picture.pts is None else picture.pts * tick
            if zero is None:
                zero = given or Fraction(0)
            else:
                known = given is not None and given - zero >= now  # an earlier time is another recording's
                before, now = now, given - zero if known else now + length
                length = now - before
            length = picture.duration * tick or length
            yield picture, now - slack, length - 2 * slack

    def _decoded(self) -> Iterator:
        """Pictures in order of time, without those that are damaged."""
        failures = 0
        while failures < LOST:
            try:
                for packet in self.container.demux(self.stream):
                    failures = 0
                    yield from self._decode(packet)
                return
            except BlockingIOError:  # a camera that has no new picture yet
                time.sleep(0.005)
            except import_av().FFmpegError:
                self.skipped, failures = self.skipped + 1, failures + 1
        yield from self._decode(None)

    def _decode(self, packet) -> list:
        """The pictures that a packet completes; None for all that the decoder still holds."""
        try:
            pictures = self.stream.decode(packet)
        except import_av().FFmpegError:
            self.skipped += 1
            return []
        good = [picture for picture in pictures if not picture.is_corrupt]
        self.skipped += len(pictures) - len(good)
        return good

    def _pixels(self, picture) -> np.ndarray:
        """A decoded picture as (3, size, size) float32 in [-1, 1]."""
        sides = picture.height, picture.width * (self.stream.sample_aspect_ratio or 1)
        height, width = (max(1, round(self.size * side / max(sides))) for side in sides)
        shown = picture.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
        shown = np.rot90(shown, round(picture.rotation / 90))  # both count counterclockwise
        top, left = ((self.size - side) // 2 for side in shown.shape[:2])
        square = np.zeros((self.size, self.size, 3), np.uint8)
        square[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return (rearrange(square, "h w c -> c h w").astype(np.float32, order="C") / 255 - 0.5) / 0.5
