"""When a question is asked of a live stream, and what: from the words of --ask and --tell."""

from dataclasses import dataclass
from fractions import Fraction

from mod.config import UserError, require
from mod.layout import Vocabulary


class Told(str):
    """What --tell was given, in the list of --ask: the two happen in the order in which they were given."""


@dataclass(frozen=True)
class Question:
    time: Fraction  # seconds
    text: str


def parse_ask(ask: str, frames: float, fps: Fraction, words: Vocabulary) -> Question:
    """ "6:where is it ?" is after frame 6, "2.5s:..." after the last frame that came by 2.5 seconds, "start:..." before
    the first. `frames`: how many there will be. Raises UserError when nobody could ask that then."""
    when, colon, text = ask.partition(":")
    when, text = when.strip(), text.strip()
    if isinstance(words, Vocabulary):
        text = " ".join(text.lower().replace("?", " ? ").split())
    expected = 'expected WHEN:WORDS such as "6:where is it ?" (frame), "2.5s:where is it ?" (seconds) or "start:..."'
    try:
        seconds = when.removesuffix("s") if when != "start" else "-1"
        moment = Fraction(seconds) if seconds != when else int(when) / fps
    except (ValueError, OverflowError, ZeroDivisionError):
        raise UserError(f"--ask got {ask!r}, {expected}") from None
    require(bool(colon and text), f"--ask got {ask!r}, {expected}")
    if when != "start" and not 0 <= moment * fps < frames:
        there = f"frames 0 to {frames - 1} (0 to {float((frames - 1) / fps):g} s)"
        raise UserError(f"--ask got {ask!r}, but the stream has {there}; name one of them, or pass more --frames")
    words.encode(text)
    return Question(moment, text)


def parse_told(ask: str, frames: float, fps: Fraction, words: Vocabulary) -> tuple[Question, bool]:
    """A question, or what the model is only told, and whether it is to be answered. Raises UserError as `parse_ask`."""
    answered = not isinstance(ask, Told)
    try:
        return parse_ask(str(ask), frames, fps, words), answered
    except UserError as error:
        raise error if answered else UserError(str(error).replace("--ask", "--tell", 1)) from None
