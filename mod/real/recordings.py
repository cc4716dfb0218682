"""Several Matroska recordings one after the other in one file or pipe, as `cat a.mkv b.mkv` makes them.

FFmpeg's reader loses all but the first two. A recording says how long it is, so the next one is found without a
search; one that does not say (it was written as a stream) goes to the end. Other containers need nothing of this:
transport and program streams are read through, and an mp4 has one table, which ends with its own recording.
"""

import io
from collections.abc import Iterator
from pathlib import Path

EBML, SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")  # what a recording and its contents begin with
HEAD = 4096  # bytes in which a recording says how long it is


def number_at(head: bytes, at: int) -> tuple[int | None, int]:
    """A number of variable length and where it ends; None for one that is left open. IndexError beyond the end."""
    length = 9 - head[at].bit_length()
    digits = head[at : at + length]
    if length > 8 or len(digits) < length:
        raise IndexError
    value = int.from_bytes(digits) & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), at + length


def length_of(head: bytes) -> int | None:
    """Bytes of the Matroska recording that begins with `head`; None if it is none, or does not say."""
    at = 0
    try:
        while head.startswith(EBML) and at < len(head):
            _, after = number_at(head, at)
            size, start = number_at(head, after)
            if size is None:
                return None
            if head[at:after] == SEGMENT:
                return start + size
            at = start + size
    except IndexError:
        pass
    return None


class Section:
    """Part of an open file, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def read(self, size: int) -> bytes:
        self.file.seek(self.start + self.at)
        some = self.file.read(max(0, min(size, self.length - self.at)))
        self.at += len(some)
        return some

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at


class Piped:
    """The next `length` bytes of a pipe, all that come if None, as a file that cannot be wound back."""

    def __init__(self, pipe: io.BufferedReader, head: bytes, length: int | None):
        self.pipe, self.head, self.left = pipe, head, length

    def read(self, size: int) -> bytes:
        size = size if self.left is None else min(size, self.left)
        # read1: what is there now; a slow camera's pictures are not held back until many have come.
        some, self.head = (self.head[:size], self.head[size:]) if self.head else (self.pipe.read1(size), b"")
        self.left = None if self.left is None else self.left - len(some)
        return some


def in_file(path: Path) -> Iterator[Section]:
    """The recordings of a file, one after the other; none where there is one alone, or no Matroska. Their number is
    not known before: a file of nothing but beginnings could hold a great many."""
    try:
        file = path.open("rb") if path.is_file() else io.BytesIO()  # of a pipe, nothing must be taken
    except OSError:
        return  # whoever opens it says why
    with file:
        start, length = 0, length_of(file.read(HEAD))
        while length:
            file.seek(start + length)
            following = length_of(file.read(HEAD))
            if start or following:
                yield Section(file, start, length)
            start, length = start + length, following


def in_pipe(pipe: io.BufferedReader) -> Iterator[Piped]:
    """The recordings of a pipe, one after the other; each is read to its end before the next is asked for."""
    head = b""
    while head := head or pipe.read(len(EBML)):
        while EBML.startswith(head[: len(EBML)]) and length_of(head) is None and len(head) < HEAD:
            if not (more := pipe.read1(HEAD - len(head))):
                break
            head += more
        length = length_of(head)
        piped = Piped(pipe, head[:length], length)
        yield piped
        while piped.read(1 << 16):
            pass
        head = b"" if length is None else head[length:]
