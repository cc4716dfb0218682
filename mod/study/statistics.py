"""Statistics of runs: means over seeds with their errors, and differences seed by seed with their tests.

Both runs of a seed see the same clips through the same encoder, so tests are paired (Student's t-test).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student
from scipy.stats import ttest_1samp

Values = dict[str, float | None]  # of one measure: seed -> value
EQUAL = 1e-9  # what differs by less differs by rounding


def mean_error(values: Values) -> tuple[float, float]:
    """Mean and standard error of the values that are there; no error of a single one."""
    known = pd.Series(values, dtype=float).dropna()
    return known.mean(), known.sem() if len(known) > 1 else 0.0


def mean_and_error(values: Values) -> str:
    """mean ± standard error; with the number of runs that count when some have no value."""
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return "-"
    (mean, error), digits = mean_error(values), 0 if known.max() > 10 else 3  # steps, or shares
    text = f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(known) > 1 else "")
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def means(values: dict[str, dict[str, Values]], rows: dict[str, str], columns: Sequence[str]) -> pd.DataFrame:
    """Mean and error of every variant in every measure: one row for each of `rows` (name -> what it is called)."""
    cells = [[mean_and_error(values[name][column]) for column in columns] for name in rows]
    return pd.DataFrame(cells, index=list(rows.values()), columns=list(columns))


def number_of_seeds(values: dict[str, dict[str, Values]]) -> str:
    """How many runs stand behind a table's rows."""
    seeds = {len(found["narration"]) for found in values.values()}
    return f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"


def differences(one: Values, other: Values) -> pd.Series:
    """Seed by seed, of the seeds for which both have a value. The paired test asks whether their mean is zero."""
    pairs = pd.DataFrame({"one": one, "other": other}, dtype=float).dropna()
    return pairs["one"] - pairs["other"]


def judge(one: Values, other: Values) -> str:
    """The difference of two variants in one measure, seed by seed: mean ± standard error (p of a paired t-test); bold
    when p is below 0.05, and then "reversed" when it is negative. No p is given for fewer than three seeds, nor when
    all differ alike, as at a ceiling."""
    gaps = differences(one, other)
    if len(gaps) < 2:
        return "-"
    text = f"{gaps.mean():+.3f} ± {gaps.sem():.3f}"
    if len(gaps) < 3 or gaps.std() < EQUAL:
        return text
    p = ttest_1samp(gaps, 0).pvalue
    told = "p < 0.001" if p < 0.001 else f"p {p:.3f}"
    return f"**{text} ({told}{', reversed' if gaps.mean() < 0 else ''})**" if p < 0.05 else f"{text} (p {p:.2f})"


def holm(pvalues: list[float]) -> list[float]:
    """Holm's correction: the smallest p counts as often as there are tests, the next once less, and none goes down."""
    order, corrected, worst = np.argsort(pvalues), [0.0] * len(pvalues), 0.0
    for rank, test in enumerate(order):
        worst = max(worst, min(1.0, (len(pvalues) - rank) * pvalues[test]))
        corrected[test] = worst
    return corrected


def compare(family: dict[str, tuple[Values, Values]]) -> pd.DataFrame:
    """A family of differences (name -> one, other), seed by seed: mean, 95% interval, effect size, Holm's p. Each needs
    at least two seeds that both have."""
    rows, pvalues = {}, []
    for name, (one, other) in family.items():
        gaps = differences(one, other)
        wide = student.ppf(0.975, len(gaps) - 1) * gaps.sem()
        spread = gaps.std() > EQUAL
        # Gaps that are all the same have no spread to test: no gap at all says nothing, any other one is certain.
        alike = float(abs(gaps.mean()) < EQUAL)
        pvalues.append(ttest_1samp(gaps, 0).pvalue if spread else alike)
        rows[name] = {"difference": f"{gaps.mean():+.3f}",
                      "95% interval": f"{gaps.mean() - wide:+.3f} to {gaps.mean() + wide:+.3f}",
                      "difference / its spread": f"{gaps.mean() / gaps.std():+.1f}" if spread else "-"}
    for row, p in zip(rows.values(), holm(pvalues), strict=True):
        row["p, corrected"] = f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
    return pd.DataFrame.from_dict(rows, orient="index")
