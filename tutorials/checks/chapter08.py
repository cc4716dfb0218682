"""Chapter 8: the tables."""

import math
import statistics

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "8.1",
    (
        """def paired(a, b):
    from statistics import mean, variance
    d = mean(a.values()) - mean(b.values())
    e = (variance(a.values()) / len(a) + variance(b.values()) / len(b)) ** 0.5
    return d, e, d / e""",
        "unpaired",
    ),
    (
        """def paired(a, b):
    from statistics import mean, stdev
    gaps = [x - y for x, y in zip(a.values(), b.values())]
    e = stdev(gaps) / len(gaps) ** 0.5
    return mean(gaps), e, mean(gaps) / e""",
        "by seed",
    ),
    (
        """def paired(a, b):
    from statistics import mean, pstdev
    gaps = [a[s] - b[s] for s in a]
    e = pstdev(gaps) / len(gaps) ** 0.5
    return mean(gaps), e, mean(gaps) / e""",
        "n - 1",
    ),
    (
        """def paired(a, b):
    from statistics import mean, stdev
    gaps = [a[s] - b[s] for s in a]
    return mean(gaps), stdev(gaps), mean(gaps) / stdev(gaps)""",
        "square root",
    ),
    (
        """def paired(a, b):
    from statistics import mean, stdev
    gaps = [b[s] - a[s] for s in a]
    e = stdev(gaps) / len(gaps) ** 0.5
    return mean(gaps), e, mean(gaps) / e""",
        "a - b",
    ),
)
def paired(answer) -> str:
    a = {"0": 0.91, "1": 0.84, "2": 0.89, "3": 0.62, "4": 0.80}
    b = {"4": 0.74, "3": 0.58, "2": 0.86, "1": 0.83, "0": 0.85}
    got = something(answer(dict(a), dict(b)), "paired(a, b)")
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise Wrong(f"paired(a, b) is {got!r}, expected three numbers: mean difference, standard error, t.")
    gaps, n = [a[seed] - b[seed] for seed in a], len(a)
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(n)
    looks_like(got[0], -mean, "The sign is turned round: the difference is a - b.", 1e-9)
    places = [x - y for x, y in zip(a.values(), b.values(), strict=True)]
    hints = {
        "That is the unpaired error: it has all of the spread between seeds in it, which cancels when each seed is "
        "compared with itself.": math.sqrt((statistics.variance(a.values()) + statistics.variance(b.values())) / n),
        "The values were matched by their place in the dictionary. Match them by seed: a[seed] - b[seed].":
            statistics.stdev(places) / math.sqrt(n),
        "The spread is divided by n; with a mean taken from the same numbers it must be n - 1.":
            statistics.pstdev(gaps) / math.sqrt(n),
        "That is the spread of single differences; the mean of n varies less, by the square root of n.":
            statistics.stdev(gaps),
    }  # fmt: skip
    for hint, mistake in hints.items():
        looks_like(got[1], mistake, hint, 1e-9)
    same(list(got), [mean, error, mean / error], "paired(a, b)", 1e-9)
    return "Right. Unpaired, the error of these numbers would be several times as large."


@exercise(
    "8.2",
    ("def holm(p_values, alpha=0.05):\n    return [p <= alpha for p in p_values]", "test alone"),
    ("def holm(p_values, alpha=0.05):\n    return [p <= alpha / len(p_values) for p in p_values]", "Bonferroni"),
    (
        """def holm(p_values, alpha=0.05):
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    kept = [False] * m
    for rank, i in enumerate(order):
        kept[i] = p_values[i] <= alpha / (m - rank)
    return kept""",
        "stop",
    ),
    (
        """def holm(p_values, alpha=0.05):
    m, kept, going = len(p_values), [], True
    for rank, p in enumerate(sorted(p_values)):
        going = going and p <= alpha / (m - rank)
        kept.append(going)
    return kept""",
        "order in which they were given",
    ),
    (
        """def holm(p_values, alpha=0.05):
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    most = max([rank for rank, i in enumerate(order) if p_values[i] <= alpha * (rank + 1) / m], default=-1)
    return [order.index(i) <= most for i in range(m)]""",
        "Benjamini",
    ),
)
def holm(answer) -> str:
    def right(p_values, alpha):
        kept, order = [False] * len(p_values), sorted(range(len(p_values)), key=p_values.__getitem__)
        for rank, index in enumerate(order):
            if p_values[index] > alpha / (len(order) - rank):
                break
            kept[index] = True
        return kept

    p = [0.045, 0.001, 0.012, 0.028, 0.6]
    got = [bool(one) for one in something(answer(list(p)), "holm(...)")]
    want = right(p, 0.05)
    order = sorted(range(5), key=p.__getitem__)
    found = [rank for rank, index in enumerate(order) if p[index] <= 0.05 * (rank + 1) / 5]
    hints = {
        "Each test alone is held against alpha; among many, one in twenty of those with nothing to find will pass.":
            [one <= 0.05 for one in p],
        "That is Bonferroni's method: alpha / m for every test. Holm's asks less of the second, third, … smallest.":
            [one <= 0.05 / 5 for one in p],
        "The answers are in the order of size; return them in the order in which they were given.":
            sorted(want, reverse=True),
        "That is Benjamini and Hochberg's method: it bounds the share of false alarms among what is found, not the "
        "chance of even one.": [order.index(i) <= max(found) for i in range(5)],
    }  # fmt: skip
    for hint, mistake in hints.items():
        if got == mistake:
            raise Wrong(hint)
    same(got, want, f"holm({p})")
    for p in ([0.02, 0.02, 0.02, 0.04], [0.2, 0.4], [0.01], [0.03, 0.03, 0.001, 0.04], [0.0125, 0.02, 0.02, 0.02]):
        got = [bool(one) for one in answer(list(p))]
        want = right(p, 0.05)
        if sum(got) > sum(want):
            raise Wrong(
                f"holm({p}) finds {sum(got)}, expected {sum(want)}: at the first p that fails, stop; a larger one can "
                "never be significant."
            )
        same(got, want, f"holm({p})")
    if [bool(one) for one in answer([0.04, 0.09], 0.1)] != [True, True]:
        raise Wrong("With alpha = 0.1 both of [0.04, 0.09] stay; use the parameter alpha.")
    return "Right: as safe as Bonferroni's, and never finds less."


@exercise(
    "8.3",
    (
        "def seeds_needed(difference, spread):\n    import math\n"
        "    return max(2, math.ceil(((1.96 + 0.84) * spread / difference) ** 2))",
        "normal",
    ),
    (
        "def seeds_needed(difference, spread):\n    import math\n"
        "    return max(2, math.ceil(2 * ((1.96 + 0.84) * spread / difference) ** 2))",
        "too many",
    ),
    (
        """def seeds_needed(difference, spread):
    from scipy.stats import t
    for n in range(2, 1000):
        if difference / spread * n ** 0.5 >= t.ppf(0.975, n - 1):
            return n""",
        "half of the time",
    ),
    ("def seeds_needed(difference, spread):\n    return 5", "grow"),
)
def seeds_needed(answer) -> str:
    from scipy.stats import nct, t

    def exact(size):
        for n in range(2, 1000):
            edge, shift = t.ppf(0.975, n - 1), size * n**0.5
            if nct.sf(edge, n - 1, shift) + nct.cdf(-edge, n - 1, shift) >= 0.8:
                return n

    cases = ((0.1, 0.1), (0.02, 0.01), (0.3, 0.1), (0.05, 0.1))
    got = [something(answer(*case), f"seeds_needed{case}") for case in cases]
    want = [exact(difference / spread) for difference, spread in cases]
    coin = [next(n for n in range(2, 1000) if d / s * n**0.5 >= t.ppf(0.975, n - 1)) for d, s in cases]
    z = [max(2, math.ceil((2.8 * s / d) ** 2)) for d, s in cases]
    if len(set(got)) == 1:
        raise Wrong(f"It says {got[0]} whatever the difference is; the number must grow as the difference shrinks.")
    if got == coin:
        raise Wrong("With these a study of the expected size would just pass. But half of the time it comes out smaller: "
                    "so you would find it only half of the time, not four times out of five.")  # fmt: skip
    if all(abs(one - other) <= 1 for one, other in zip(got, z, strict=True)) and got[1] < want[1]:
        raise Wrong(f"Those are the numbers of the normal distribution: {got[1]} for a difference of two standard "
                    f"deviations, where {want[1]} are needed. With few seeds the t distribution has heavier tails.")  # fmt: skip
    for case, one, other in zip(cases, got, want, strict=True):
        if abs(one - other) > max(1, round(0.06 * other)):
            raise Wrong(f"seeds_needed{case} is {one}, too {'many' if one > other else 'few'}: expected about {other}.")
    return "Right. Now compare with the five seeds of the tables, and with the spreads that the last figure printed."
