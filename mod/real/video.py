"""Frames of a real video, by time: from a file, from standard input, from a camera.

Frame k of a video sampled at `fps` stands at time k / fps and shows the last picture whose time is not later. Time is a
player's, as README.md says. Times are fractions, so nothing drifts, at no rate and after no number of hours; pictures
are repeated where the video is slower than `fps` and left out where it is faster. What cannot be decoded is skipped
and counted. One picture at a time is in memory.
"""

import io
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from heapq import heappop, heappush
from pathlib import Path
from typing import TypeVar

import numpy as np
from einops import rearrange

from mod.config import UserError, require
from mod.real.recordings import in_file, in_pipe

Picture = TypeVar("Picture")
CAMERAS = {"linux": ("v4l2", "/dev/video"), "darwin": ("avfoundation", ""), "win32": ("dshow", "video=")}
COARSEST = Fraction(1, 1000)  # s; Matroska's tick, to which it rounds; AVI's is a whole picture, but exact
LOST = 100  # packets in a row that cannot be read: the rest is lost
UNTIMED = ("avi", "asf")  # containers that number packets as they are decoded, and do not say when pictures are shown
# Seconds between two pictures that are no pause but a clock set anew: in transport streams and their like, and in
# containers whose clocks do not jump, where it is damage. FFmpeg's own limits.
JUMP, DAMAGE = Fraction(10), Fraction(30 * 3600)
BACK = Fraction(1)  # seconds that a clock goes back when it is set anew; less is disorder
PIPE_THIS = "pipe Matroska or MPEG-TS, which need no seeking"
LISTS = ("concat", "dash", "hls", "imf", "sdp", "webm_dash_manifest")  # formats that only name other files


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


def is_camera(source: str) -> bool:
    return source.startswith(("camera:", "/dev/video"))


def recordings(source: str) -> Iterator:
    """What a source consists of, for `open_source`: None for the whole of it, else one recording after the other."""
    if source == "-":
        yield from in_pipe(sys.stdin.buffer)
    elif Path(source).is_fifo():  # what a shell makes of <(...)
        with Path(source).open("rb") as pipe:
            yield from in_pipe(pipe)
    elif is_camera(source):
        yield None
    else:
        with closing(in_file(Path(source))) as sections:
            yield next(sections, None)
            yield from sections


def open_source(source: str, recording=None):
    """An open PyAV container: a file's, that of a recording within it or within standard input ("-"), /dev/video0's or
    camera:NAME's. Raises UserError."""
    av = import_av()
    try:
        if source == "-" or recording is not None:
            return av.open(io.BytesIO() if recording is None else recording)
        if is_camera(source):
            kind, prefix = CAMERAS.get(sys.platform, CAMERAS["linux"])
            return av.open(prefix + source.removeprefix("camera:").removeprefix(prefix), format=kind)
        return av.open(str(Path(source).absolute()))  # absolute, or 12:30.mp4 would be the protocol "12"
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = PIPE_THIS if source == "-" else "check the name or convert it"
        raise UserError(f"got {source} ({reason}), expected a video that PyAV can open; {hint}") from error


class Video:
    """The frames of a video, one after the other, (3, size, size) float32 in [-1, 1], frame k at time k / fps.

    The longer side of a picture is scaled to `size` (bicubic), the rest is black; it appears as a player would show it,
    turned and mirrored by its metadata and with square pixels. Of several picture tracks it is the default one. Closes
    its source at the end of a `with`.

    skipped       packets and pictures that could not be decoded so far
    jumps         times so far that the clock was set anew, and time went on where it was
    about_frames  how many frames there will be, as far as the source's header knows, or None

    Raises UserError: at once for a source that is missing or no video, at the first frame when nothing can be decoded.
    """

    def __init__(self, source: str, fps: float | Fraction, size: int):
        if not (0 < fps < math.inf and size >= 1):
            raise UserError(
                f"got {fps} frames per second of {size} pixels, expected more than 0 of both; pass another --fps"
            )
        self.fps = Fraction(str(fps))  # 29.97 itself, not the nearest binary number
        self.source, self.size, self.skipped, self.jumps = str(source), size, 0, 0
        self.recordings = recordings(self.source)
        self._open(next(self.recordings, None))
        known, whole = self.stream.duration, self.container.duration
        length = known * self.stream.time_base if known else Fraction(whole, 10**6) if whole else None
        self.about_frames = length and max(1, math.ceil(length * self.fps))
        # Time begins with the earliest track, be it sound; before 0 there is only sound that is to be thrown away.
        begins = None if is_camera(self.source) else self.container.start_time
        self.zero = None if begins is None else max(Fraction(0), Fraction(begins, 10**6))
        self.frames = self._frames()

    def _open(self, recording) -> None:
        """Open a recording of the source and find its pictures. Raises UserError."""
        self.container = open_source(self.source, recording)
        kind = self.container.format.name
        require(kind not in LISTS,
                f"got {self.source}, a list of other files ({kind}), expected a video; name the video itself")
        # A song's cover is a video stream, too, and any text is a "tty" film.
        cover, default = (getattr(import_av().stream.Disposition, name) for name in ("attached_pic", "default"))
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams or kind == "tty":
            raise UserError(f"got {self.source}, which has no video stream, expected a video; name another file")
        self.stream = next((stream for stream in streams if stream.disposition & default), streams[0])
        leaps = self.container.format.flags & import_av().format.Flags.ts_discont.value
        self.limit = JUMP if leaps else DAMAGE
        # Times of packets whose pictures have not come yet, and how many more they are than the decoder reorders.
        self.untimed, self.waiting, self.held = kind in UNTIMED, [], None
        self.still = None  # in ticks, the end of the packets that say nothing but that the picture stays

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames  # always the same one: a video is read once

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_) -> None:
        self.frames.close()
        self.container.close()
        self.recordings.close()

    def remarks(self) -> list[str]:
        """What a viewer should know of the source, when it has been read: a sentence each."""
        damaged = [f"skipped {self.skipped} damaged packets or pictures"] if self.skipped else []
        times = "once" if self.jumps == 1 else f"{self.jumps} times"
        jumped = [f"its clock was set anew {times}; time went on where it was"]
        return damaged + (jumped if self.jumps else [])

    def _frames(self) -> Iterator[np.ndarray]:
        decoded = False
        for (picture, aspect), times in showings(self._timed(), self.fps):
            decoded = True
            pixels = self._pixels(picture, aspect) if times else None
            for _ in range(times):
                yield pixels.copy()  # the reader may write into its frame
        if not decoded:
            what = f"got {self.source}, but no picture could be decoded ({self.skipped} packets skipped)"
            # An .mp4 often has its index at its end, which a pipe brings too late.
            hint = PIPE_THIS if self.source == "-" else "check it in a player or name another file"
            raise UserError(f"{what}, expected a video with pictures; {hint}")

    def _timed(self) -> Iterator[tuple[tuple, Fraction, Fraction]]:
        """((picture, how wide its pixels are), time, length) in seconds of a player's time, never falling.

        Containers round times to their tick: each picture counts from half a tick before, and ends as much earlier.
        """
        now, length, shown = None, Fraction(0), None
        for picture, stamp in self._decoded():
            tick, rate = self.stream.time_base, self.stream.guessed_rate
            slack = min(tick, COARSEST) / 2
            given = None if stamp is None else stamp * tick
            if now is None:
                self.zero = (given or Fraction(0)) if self.zero is None else self.zero
                now = max(Fraction(0), self._at(given, Fraction(0), Fraction(0)))
                length = 1 / rate if rate else Fraction(0)
            else:
                before, now = now, self._at(given, now, length)
                length = now - before
            length = picture.duration * tick or length
            length = length if length <= self.limit else Fraction(0)
            shown = picture, self.stream.sample_aspect_ratio or 1
            yield shown, now - slack, length - 2 * slack
        if shown and self.still is not None:
            stays = self.still * tick - self.zero - now
            if length < stays <= self.limit:
                yield shown, now - slack, stays - 2 * slack

    def _at(self, given: Fraction | None, now: Fraction, length: Fraction) -> Fraction:
        """When a picture is shown that the container gives this time, after one at `now` that lasts so long."""
        at = now + length if given is None else given - self.zero
        if at - now - length > self.limit or now - at > BACK:  # a clock set anew, or another recording's
            self.jumps += 1
            self.zero, at = self.zero + at - now - length, now + length
        return at if at >= now else now + length

    def _decoded(self) -> Iterator:
        """Pictures in order of time, with the times that the container gives, in ticks; without damaged ones."""
        while True:
            failures = 0
            while failures < LOST:
                try:
                    for packet in self.container.demux(self.stream):
                        failures = 0
                        yield from self._decode(packet)
                    break
                except BlockingIOError:  # a camera that has no new picture yet
                    time.sleep(0.005)
                except import_av().FFmpegError:
                    self.skipped, failures = self.skipped + 1, failures + 1
            else:
                yield from self._decode(None)
            recording = next(self.recordings, None)
            if recording is None:
                return
            try:
                self._open(recording)  # the one before is closed when its last picture has been shown
            except UserError:  # the rest is no video
                return

    def _decode(self, packet) -> list[tuple[object, int | None]]:
        """The pictures that a packet completes, and their times; None for all that the decoder still holds."""
        due = None if packet is None else packet.dts
        if due is not None and not packet.size:  # the picture before stays
            self.still = due + (packet.duration or 0)
            return []
        self.still = self.still if packet is None else None  # a picture has come since
        if self.untimed and due is not None:
            heappush(self.waiting, due)
        try:
            pictures = self.stream.decode(packet)
        except import_av().FFmpegError:
            self.skipped += 1
            pictures = []
        stamps = [picture.pts for picture in pictures]
        if self.untimed:
            # Packets are numbered as they are decoded: the picture shown first has the first of these numbers. What the
            # decoder has neither given nor can hold back is lost.
            stamps = [heappop(self.waiting) if self.waiting else None for _ in pictures]
            reordered = self.stream.codec_context.has_b_frames
            if pictures and self.held is None:
                self.held = len(self.waiting) - reordered
            while packet is not None and self.held is not None and len(self.waiting) > self.held + reordered:
                heappop(self.waiting)
        good = [pair for pair in zip(pictures, stamps, strict=True) if not pair[0].is_corrupt]
        self.skipped += len(pictures) - len(good)
        return good

    def _pixels(self, picture, aspect: Fraction) -> np.ndarray:
        """A decoded picture as (3, size, size) float32 in [-1, 1]."""
        sides = picture.height, picture.width * aspect
        height, width = (max(1, round(self.size * side / max(sides))) for side in sides)
        shown = picture.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
        shown = oriented(shown, picture)
        top, left = ((self.size - side) // 2 for side in shown.shape[:2])
        square = np.zeros((self.size, self.size, 3), np.uint8)
        square[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return (rearrange(square, "h w c -> c h w").astype(np.float32, order="C") / 255 - 0.5) / 0.5


def oriented(shown: np.ndarray, picture) -> np.ndarray:
    """Pixels (h, w, 3) as the picture's display matrix says, in the nearest of the eight orientations.

    The matrix moves points: (x, y), y down, to (ax + cy, bx + dy).
    """
    matrix = picture.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return shown
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # width becomes height
        shown, a, d = rearrange(shown, "h w c -> w h c"), c, b
    return shown[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
