"""What the tables hold: variants that are trained, rows and columns of each table, orderings that it judges."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from mod.study.sweep import Variant

VARIANTS = {
    "mod": Variant("MoD: interleaved, learned, r = 0.2, value gate"),
    "full": Variant("full computation", {"layers": "none"}),
    "exit-2": Variant("early exit after 2 of 4 layers", {"layers": "keep:1,1,0,0"}),
    "exit-1": Variant("early exit after 1 of 4 layers", {"layers": "keep:1,0,0,0"}),
    "skip": Variant("skipping every other layer", {"layers": "keep:1,0,1,0"}),
    "pool": Variant("fewer tokens: 1 + 2×2 by pooling", {"layers": "none", "grid": 2}),
    "all": Variant("all layers, learned, value gate", {"layers": "all"}),
    "all-deep": Variant("all deep layers (2, 3)", {"layers": "all-deep"}),
    "interleaved-deep": Variant("interleaved deep (3)", {"layers": "interleaved-deep"}),
    "random": Variant("interleaved, random", {"select": "random"}),
    "uniform": Variant("interleaved, uniform", {"select": "uniform"}),
    "all-random": Variant("all layers, random", {"layers": "all", "select": "random"}),
    "all-uniform": Variant("all layers, uniform", {"layers": "all", "select": "uniform"}),
    "r-0.1": Variant("interleaved, learned, r = 0.1", {"keep_ratio": 0.1}),
    "r-0.5": Variant("interleaved, learned, r = 0.5", {"keep_ratio": 0.5}),
}

COLUMNS = ("free-running narration", "silence", "past", "spark", "steps to quality")  # shown; the JSON has all measures
JUDGED = COLUMNS[:4]


@dataclass(frozen=True)
class Table:
    """Rows are names of variants; `claims` are orderings (better, worse, who says so), on each measure of JUDGED."""

    title: str
    rows: tuple[str, ...]
    claims: tuple[tuple[str, str, str], ...]


TABLES = {
    1: Table(
        "Methods",
        ("full", "exit-2", "exit-1", "skip", "pool", "mod"),
        (
            ("mod", "full", "paper: comparable"),
            ("mod", "exit-2", "paper: drops dramatically"),
            ("mod", "exit-1", "paper: drops dramatically"),
            ("mod", "skip", "paper"),
            ("mod", "pool", "paper"),
        ),
    ),
    2: Table(
        "Which layers are routed",
        ("full", "all", "all-deep", "mod", "interleaved-deep"),
        (
            ("mod", "all", "paper: interleaved is the best trade-off"),
            ("mod", "all-deep", "paper: interleaved is the best trade-off"),
            ("interleaved-deep", "mod", "paper: more computation, hardly better"),
        ),
    ),
    3: Table(
        "How tokens are chosen, and how many are kept",
        ("full", "random", "uniform", "r-0.1", "mod", "r-0.5", "all-random", "all-uniform", "all"),
        (
            ("mod", "random", "paper"),
            ("mod", "uniform", "paper"),
            ("all", "all-random", "the paper's, with no dense layer to help"),
            ("all", "all-uniform", "the paper's, with no dense layer to help"),
            ("mod", "r-0.1", "more tokens, more seen"),
            ("r-0.5", "mod", "more tokens, more seen"),
        ),
    ),
}


def steps_to(run: dict, quality: float) -> float:
    """The first logged step at which the LM loss, mean of two logged steps, was as low as this; nan if never."""
    loss = pd.Series({point["step"]: point["lm"] for point in run["curve"] if "lm" in point})
    low = loss.rolling(2).mean() <= quality
    return int(low.idxmax()) if low.any() else math.nan


def recall(run: dict) -> float:
    """Share of sprite patches kept, mean over the routed layers and over the logged steps of the whole training."""
    points = pd.DataFrame([point["recall"] for point in run["curve"] if point.get("recall")])
    return points.mean(axis=1).mean()


GOOD = 0.2  # the fixed quality: LM loss, nats per text label; training clips are never repeated, so they are unseen
MEASURES: dict[str, Callable[[dict], float]] = {  # how a column is read off the result of a run
    "narration": lambda run: run["narration_exact"],
    "free-running narration": lambda run: run["free_running"]["narration_exact"],
    "speak": lambda run: run["speak_accuracy"],
    "silence": lambda run: run["silence_accuracy"],
    "questions": lambda run: run["question_accuracy"],
    "now": lambda run: run["kinds"]["now"],
    "past": lambda run: run["kinds"]["past"],
    "spark": lambda run: run["kinds"]["spark"],
    "LM-PPL": lambda run: run["lm_ppl"],
    "TimeDiff (s)": lambda run: run["time_diff"],
    "Fluency": lambda run: run["fluency"],
    "LM-Correctness": lambda run: run["lm_correctness"],
    "steps to quality": lambda run: steps_to(run, GOOD),
    "recall": recall,
}
