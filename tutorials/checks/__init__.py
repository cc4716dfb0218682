"""How exercises are judged: one file a chapter, one function an exercise. A verdict says what is off.

A judge gets the student's answer, usually a function, and tries it on inputs of its own. It raises `Wrong` with one or
two sentences, or returns a sentence of praise. Beside it stand plausible wrong answers and a part of the hint that
each must get; the tests run them, and the unsolved cell, and the solution.
"""

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass

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
        raise Wrong(f"Nothing here yet: {what} gives {answer}. Replace the three dots, then run both cells again.")
    return answer


def numbers(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def same(got, want, what: str = "your answer", tolerance: float = 1e-5) -> None:
    """Raises Wrong, naming the first place that differs, unless got equals want: tensors, numbers, lists, anything."""
    import torch

    if want is not None:
        something(got, what)
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
            values = [numbers(tensor[tuple(place)].item()) for tensor in (got, want)]
            count = f"the first of {int(off.sum())} of {off.numel()} that differ"
            raise Wrong(f"{what} at place {place} is {values[0]}, expected {values[1]} ({count}).")
    elif isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            raise Wrong(f"{what} is {got!r}, expected {len(want)} entries, one for each.")
        for place, (one, other) in enumerate(zip(got, want, strict=True)):
            same(one, other, f"{what}, entry {place},", tolerance)
    elif isinstance(want, (int, float)) and not isinstance(want, bool):
        try:
            got = float(got)
        except (TypeError, ValueError):
            raise Wrong(f"{what} is {got!r}, expected a number.") from None
        if not abs(got - want) <= tolerance * max(1, abs(want)):
            raise Wrong(f"{what} is {numbers(got)}, expected {numbers(want)}.")
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
        line = traceback.extract_tb(error.__traceback__)[-1]
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"✗ {number}  It stops with {type(error).__name__}: {reason} (in {line.name}: {line.line})"


def check(number: str, *answers) -> None:
    print(verdict(number, *answers))
