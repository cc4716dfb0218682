"""How exercises are judged: one file a chapter, one function an exercise. A verdict says what is off.

A judge gets the student's answer, usually a function, and tries it on inputs of its own. It raises `Wrong` with one or
two sentences, or returns a sentence of praise. Beside it stand plausible wrong answers and a part of the hint that
each must get; the tests run them, and the unsolved cell, and the solution.
"""

import importlib
import math
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

COURSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOREIGN = (  # code that no student wrote
    os.path.join(COURSE, "checks"), os.path.join(os.path.dirname(COURSE), "mod", ""), "site-packages", "dist-packages",
    os.path.dirname(os.__file__),
)
EXERCISES: dict[str, "Exercise"] = {}


class Wrong(Exception):
    """What is off with an answer, in a sentence or two."""


@dataclass(frozen=True)
class Exercise:
    number: str
    judge: Callable[..., str]
    wrong: tuple[tuple[str, str], ...]  # (code of a plausible wrong answer, a part of the hint that it must get)


def exercise(number: str, *wrong: tuple[str, str]):
    """Decorates a judge: the exercise's number, such as "4.1", and plausible wrong answers."""

    def register(judge: Callable[..., str]) -> Callable[..., str]:
        EXERCISES[number] = Exercise(number, judge, wrong)
        return judge

    return register


def find(number: str) -> Exercise:
    importlib.import_module(f"{__name__}.chapter{int(number.split('.')[0]):02d}")
    return EXERCISES[number]


def something(answer, what: str = "your function"):
    """The answer, if there is one."""
    if answer is None or answer is ...:
        raise Wrong(f"Nothing here yet: {what} gives {answer}. Replace the three dots (or is a return missing?), then run both cells again.")
    return answer


@contextmanager
def instead(kinds, parts: tuple[str, ...], hint: str) -> Iterator[None]:
    """Says the hint in the place of an exception of these kinds whose message holds one of the parts."""
    try:
        yield
    except kinds as error:
        if any(part in str(error) for part in parts):
            raise Wrong(hint) from None
        raise


def numbers(got, want) -> tuple[str, str]:
    """Two numbers that differ, as short as shows it."""
    if all(float(value).is_integer() for value in (got, want)):
        return f"{int(got):,}", f"{int(want):,}"
    for digits in (4, 7, 12):
        texts = f"{got:.{digits}g}", f"{want:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def same(got, want, what: str = "your answer", tolerance: float = 1e-5) -> None:
    """Raises Wrong, naming the first place that differs, unless got equals want: tensors, numbers, lists, anything."""
    if want is not None:
        something(got, what)
    equal(got, want, what, tolerance)


def equal(got, want, what: str, tolerance: float) -> None:
    import torch

    if isinstance(want, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            raise Wrong(f"{what} is a {type(got).__name__}, expected a tensor of shape {tuple(want.shape)}.")
        if got.shape != want.shape:
            raise Wrong(f"{what} has shape {tuple(got.shape)}, expected {tuple(want.shape)}.")
        if (got.dtype == torch.bool) != (want.dtype == torch.bool):
            raise Wrong(f"{what} holds {got.dtype}, expected {want.dtype}.")
        wide = (got.detach().to(torch.float64), want.detach().to(torch.float64))
        off = ~torch.isclose(*wide, atol=tolerance, rtol=tolerance, equal_nan=True)
        if off.any():
            place = off.nonzero()[0].tolist()
            values = [tensor[tuple(place)].item() for tensor in (got, want)]
            shown = numbers(*values) if all(map(math.isfinite, values)) and want.dtype != torch.bool else values
            where = f" at place {place}" if place else ""
            count = f" (the first of {int(off.sum())} of {off.numel()} that differ)" if place else ""
            raise Wrong(f"{what}{where} is {shown[0]}, expected {shown[1]}{count}.")
    elif isinstance(want, (list, tuple)):
        if hasattr(got, "tolist"):  # a tensor or an array of as many numbers will do
            got = got.tolist()
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            raise Wrong(f"{what} is {got!r}, expected {len(want)} entries, one for each.")
        for place, (one, other) in enumerate(zip(got, want, strict=True)):
            equal(one, other, f"{what}, entry {place},", tolerance)
    elif isinstance(want, (int, float)) and not isinstance(want, bool):
        try:
            value = float(got)
        except (TypeError, ValueError):
            raise Wrong(f"{what} is {got!r}, expected a number.") from None
        if not (abs(value - want) <= tolerance * max(1, abs(want)) or math.isnan(value) and math.isnan(want)):
            shown = numbers(value, want) if math.isfinite(value) and math.isfinite(want) else (value, want)
            raise Wrong(f"{what} is {shown[0]}, expected {shown[1]}.")
    elif got != want:
        raise Wrong(f"{what} is {got!r}, expected {want!r}.")


def looks_like(got, mistake, hint: str, tolerance: float = 1e-5) -> None:
    """Raises Wrong with the hint when got equals what a known mistake would give."""
    try:
        same(got, mistake, tolerance=tolerance)
    except Wrong:
        return
    raise Wrong(hint)


def verdict(number: str, *answers) -> str:
    """One line: what is off, after "✗", or praise, after "✓"."""
    import torch

    try:
        for answer in answers:
            something(answer, "the cell above")
        with torch.random.fork_rng(devices=[]):  # the notebook's random numbers go on as if nobody had checked
            torch.manual_seed(0)
            return f"✓ {number}  {find(number).judge(*answers)}"
    except Wrong as wrong:
        return f"✗ {number}  {wrong}"
    except Exception as error:  # the student's code, most likely: say what and where instead of a page of traceback
        lines = traceback.extract_tb(error.__traceback__)
        # the last line that the student wrote: neither a judge's nor a library's
        own = [line for line in lines if not any(part in line.filename for part in FOREIGN)]
        line = (own or lines)[-1]
        reason = " ".join(str(error).split()) or "no reason given"
        reason = reason if len(reason) <= 300 else f"{reason[:150]} … {reason[-150:]}"  # einops says why at the end
        return f"✗ {number}  It stops with {type(error).__name__}: {reason} (in {line.name}: {line.line})"


def check(number: str, *answers) -> None:
    print(verdict(number, *answers))
