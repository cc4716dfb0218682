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
    the first. `frames`: how many there will be. Raises UserError when nobody could ask, or tell, that then."""
    flag = "--tell" if isinstance(ask, Told) else "--ask"
    when, colon, text = ask.partition(":")
    when, text = when.strip(), words.typed(text.strip())
    expected = 'expected WHEN:WORDS such as "6:where is it ?" (frame), "2.5s:where is it ?" (seconds) or "start:..."'
    try:
        seconds = when.removesuffix("s") if when != "start" else "-1"
        moment = Fraction(seconds) if seconds != when else int(when) / fps
    except (ValueError, OverflowError, ZeroDivisionError):
        raise UserError(f"{flag} got {ask!r}, {expected}") from None
    require(bool(colon and text), f"{flag} got {ask!r}, {expected}")
    if when != "start" and not 0 <= moment * fps < frames:
        there = f"frames 0 to {frames - 1} (0 to {float((frames - 1) / fps):g} s)"
        raise UserError(f"{flag} got {ask!r}, but the stream has {there}; name one of them, or pass more --frames")
    words.encode(text)
    return Question(moment, text)


def parse_told(ask: str, frames: float, fps: Fraction, words: Vocabulary) -> tuple[Question, bool]:
    """A question, or what the model is only told, and whether it is to be answered. Raises UserError as `parse_ask`."""
    return parse_ask(ask, frames, fps, words), not isinstance(ask, Told)
