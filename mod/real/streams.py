"""Conversations about videos from a file: one JSON object per line, times in seconds.

{"video": "clips/a.mp4", "conversation": [{"time": 3.2, "role": "assistant", "content": "a red disc appears"}]}

The video's path is relative to the file's folder, and stays in it. A video nobody talks about has the conversation [].
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mod.config import UserError
from mod.layout import Say

ROLES = ("user", "assistant")
LATE = 1.0  # s; how far beyond the last frame a turn may stand: annotations end with the video, frames before it


@dataclass(frozen=True)
class Turn:
    """Something said `time` seconds into a video."""

    time: float
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A video and what is said while it runs, in order of time."""

    video: Path
    turns: tuple[Turn, ...]


def read_streams(path: Path) -> list[Conversation]:
    """Every line of a streams.jsonl. Raises UserError that names the first wrong line, counted from 1, and why."""
    conversations = []
    try:
        # Line by line: the whole file is never in memory. Other ends of lines may stand inside of strings.
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    conversations.append(read_line(line, path, number))
    except FileNotFoundError:
        raise UserError(f"got no file {path}, expected one JSON object per line; check the name") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"got {path} ({error}), expected a text file in UTF-8; name another file") from error
    if not conversations:
        raise UserError(f"got {path} without a line, expected one JSON object per line; write at least one")
    return conversations


def read_line(line: str, path: Path, number: int) -> Conversation:
    try:
        return read_conversation(line, path.parent)
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from None


def read_conversation(line: str, folder: Path) -> Conversation:
    """One line, checked. Raises UserError that says what is wrong, but not where."""
    try:
        parts = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"got no JSON ({error}), expected one object on one line; correct it") from None
    check_keys(parts, {"video": str, "conversation": list}, "the line")
    turns = []
    for number, entry in enumerate(parts["conversation"]):
        name = f"turn {number}"
        check_keys(entry, {"time": (int, float), "role": str, "content": str}, name)
        if not 0 <= entry["time"] < 1e12:  # which no NaN is, nor a whole number too large for a float
            raise UserError(f"{name}: got the time {entry['time']}, expected finite seconds from 0; correct it")
        if turns and entry["time"] < turns[-1].time:
            raise UserError(f"{name}: got the time {entry['time']} after {turns[-1].time}, expected order; sort them")
        if entry["role"] not in ROLES:
            raise UserError(f"{name}: got the role {entry['role']!r}, expected {' or '.join(ROLES)}; correct it")
        if not entry["content"].strip():
            raise UserError(f"{name}: got empty content, expected some words; write them or remove the turn")
        turns.append(Turn(float(entry["time"]), entry["role"], entry["content"]))
    name, said = Path(parts["video"]), [turn.content for turn in turns]
    if not all(map(encodable, [parts["video"], *said])):
        raise UserError("got text with half a character or a zero in it, expected text; correct it")
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"got the video {parts['video']!r}, expected one in the file's folder or below; put it there")
    video = folder / name
    try:
        there = video.is_file()
    except OSError:  # such as a name that no file can have
        there = False
    if not there:
        raise UserError(f"got no file {video}, expected the video there; correct the path or put the video there")
    return Conversation(video, tuple(turns))


def encodable(text: str) -> bool:
    """Can it be written in UTF-8, and be part of a file's name? JSON can say what no text holds."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def check_keys(parts, kinds: dict, name: str) -> None:
    """Raises UserError unless `parts` is a JSON object with exactly these keys and kinds of values."""
    if not isinstance(parts, dict) or set(parts) != set(kinds):
        got = sorted(parts) if isinstance(parts, dict) else type(parts).__name__
        raise UserError(f"{name}: got {got}, expected an object with the keys {', '.join(kinds)}; correct it")
    for key, kind in kinds.items():
        if not isinstance(parts[key], kind) or isinstance(parts[key], bool):
            expected = {str: "text", list: "a list"}.get(kind, "a number")
            raise UserError(f"{name}: got {parts[key]!r} as {key}, expected {expected}; correct it")


def placed(conversation: Conversation, fps: float, frames: float) -> list[Say]:
    """The turns by frame: one at time t is said after the last of `frames` frames that stands at t or before. What the
    assistant says twice in a row after the same frame is joined. frames: infinite where nobody has counted them yet.

    Raises UserError for a turn that stands more than a second beyond the last frame.
    """
    said = []
    for turn in conversation.turns:
        frame, last = math.floor(turn.time * fps + 1e-9), (frames - 1) / fps
        if frame >= frames and turn.time > last + LATE:
            what = f"{conversation.video}: got {turn.content!r} at {turn.time:g} s, but its last frame is at {last:g} s"
            raise UserError(f"{what}, expected no later than a second after; correct the time or the video")
        say = Say(min(frame, frames - 1), turn.role, turn.content)
        if said and say.role == "assistant" and (said[-1].frame, said[-1].role) == (say.frame, "assistant"):
            say = Say(say.frame, say.role, f"{said.pop().text} {say.text}")  # the model speaks once after a frame
        said.append(say)
    return said


def pieces(said: Sequence[Say], frames: int, longest: int) -> list[tuple[int, int, list[Say]]]:
    """A stream of `frames` frames in pieces of at most `longest`: (first frame, number of frames, what is said).

    The turns of a piece count their frames from its first. Turns of one frame stay together and in order.
    """
    if longest < 1:
        raise UserError(f"got pieces of at most {longest} frames, expected at least 1; ask for longer pieces")
    cut = []
    for first in range(0, frames, longest):
        length = min(longest, frames - first)
        own = [Say(say.frame - first, say.role, say.text) for say in said if first <= say.frame < first + length]
        cut.append((first, length, own))
    return cut
