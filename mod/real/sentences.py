"""What is said on the synthetic streams in whole sentences, for a language model that knows them.

The events and the clips are those of `mod.data`; only how they are put into words differs, and no two closed texts
become the same sentence:

    red disc appears top        A red disc appears at the top.
    where did it appear ?       Where did it appear?
    first far-left              It appeared on the far left.
"""

from collections.abc import Iterator
from dataclasses import replace

from mod.data import Clip, endless, make_clip

WHERE = {"top": "at the top", "upper": "in the upper part", "middle": "in the middle", "lower": "in the lower part",
         "bottom": "at the bottom", "far-left": "on the far left", "left": "on the left", "centre": "in the centre",
         "right": "on the right", "far-right": "on the far right"}
TO = {"top": "to the top", "upper": "to the upper part", "middle": "to the middle", "lower": "to the lower part",
      "bottom": "to the bottom"}


def sentence(text: str) -> str:
    """A narration, question or answer of the closed words as a sentence. Raises ValueError for any other text."""
    match text.split():
        case [colour, shape, "appears", height]:
            return f"A {colour} {shape} appears {WHERE[height]}."
        case [colour, shape, "moves", height]:
            return f"The {colour} {shape} moves {TO[height]}."
        case [colour, shape, "turns", other]:
            return f"The {colour} {shape} turns {other}."
        case [colour, shape, "leaves"]:
            return f"The {colour} {shape} leaves."
        case ["now", side]:
            return f"It is {WHERE[side]}."
        case ["first", side]:
            return f"It appeared {WHERE[side]}."
        case ["nowhere"]:
            return "It is nowhere."
        case ["where", *rest, "?"]:
            return " ".join(["Where", *rest]) + "?"
    raise ValueError(f"got {text!r}, expected a text of the synthetic stream")


def in_sentences(clip: Clip) -> Clip:
    """The same clip, with all that is said and all that is true in sentences."""
    said = [replace(say, text=sentence(say.text)) for say in clip.said]
    truth = [{sentence(question): sentence(answer) for question, answer in one.items()} for one in clip.truth]
    return replace(clip, said=said, truth=truth)


def make_spoken_clip(*what) -> Clip:
    """As `mod.data.make_clip`."""
    return in_sentences(make_clip(*what))


def spoken_endless(*what) -> Iterator[Clip]:
    """As `mod.data.endless`."""
    return map(in_sentences, endless(*what))
