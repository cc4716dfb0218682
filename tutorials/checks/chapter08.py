"""Chapter 8: the tables."""

import math

from . import Wrong, exercise, looks_like, same, something

_FLIPS = (
    "from itertools import product\ndef sign_flips(gaps):\n"
    "    sums = [abs(sum(s * g for s, g in zip(signs, gaps))) for signs in product((1, -1), repeat=len(gaps))]\n"
    "    return sum(one >= abs(sum(gaps)) - 1e-12 for one in sums) / len(sums)"
)


@exercise(
    "8.1",
    (_FLIPS.replace("[abs(sum(s * g for s, g in zip(signs, gaps)))", "[sum(s * g for s, g in zip(signs, gaps))"), "both directions"),
    (_FLIPS.replace(" - 1e-12", " + 1e-12"), "at least"),
    (_FLIPS.replace(" / len(sums)", ""), "share"),
    ("def sign_flips(gaps):\n    from scipy.stats import ttest_1samp\n    return ttest_1samp(gaps, 0).pvalue", "bell"),
    ("def sign_flips(gaps):\n    from scipy.stats import binomtest\n    return binomtest(sum(g > 0 for g in gaps), len(gaps)).pvalue", "sizes"),
    (_FLIPS.replace("abs(sum(gaps))", "sum(gaps)"), "below zero"),
    (_FLIPS.replace(" - 1e-12", ""), "last bit"),
    (_FLIPS.replace("abs(sum(gaps))", "sum(map(abs, gaps))"), "their own signs"),
)
def sign_flips(answer) -> str:
    from itertools import product

    from scipy.stats import binomtest, ttest_1samp

    def right(gaps, pick=lambda one, measured: abs(one) >= abs(measured) - 1e-12):
        sums = [sum(sign * gap for sign, gap in zip(signs, gaps, strict=True)) for signs in product((1, -1), repeat=len(gaps))]
        return sum(pick(one, sum(gaps)) for one in sums) / len(sums)

    tied = [0.1, 0.2, 0.3, -0.1, 0.4]
    if abs(something(answer(list(tied)), f"sign_flips({tied})") - 0.125) < 1e-9:
        raise Wrong(f"sign_flips({tied}) is 0.125, expected {right(tied)}: two sums that are equal on paper differ in their last bit. Allow a hair, say 1e-12.")
    for gaps in ([0.06, 0.01, 0.03, -0.02, 0.05], [0.03, 0.01, 0.02, 0.04, 0.05], [-0.02, 0.01, -0.03, -0.05, -0.01, 0.02]):
        got = something(answer(list(gaps)), f"sign_flips({gaps})")
        for mistake, hint in (
            (right(gaps, lambda one, measured: one >= measured - 1e-12), "Only one direction counts here; a difference as large the other way is as surprising: take both directions."),
            (right(gaps, lambda one, measured: abs(one) > abs(measured) + 1e-12), "The measured pattern itself is one of the ways: *at least* as large, up to rounding, not larger."),
            (right(gaps) * 2 ** len(gaps), "This is how many of the ways there are; the share of all 2ⁿ is asked for."),
            (2 / 2 ** len(gaps), "This compares with the largest sum there is. The measured sum is that of the gaps with their own signs."),
            (ttest_1samp(gaps, 0).pvalue, "That is the t-test, which assumes a bell. Count signs instead."),
            (binomtest(sum(gap > 0 for gap in gaps), len(gaps)).pvalue, "That counts signs alone; here the sizes count as well: compare sums."),
            (1.0 if sum(gaps) < 0 else None, "Where the measured sum is below zero everything passes: compare with its size, without the sign."),
        ):
            if mistake is not None and abs(mistake - right(gaps)) > 1e-9:
                looks_like(got, mistake, hint)
        same(got, right(gaps), f"sign_flips({gaps})")
    return "Right. Five seeds that all agree have p = 0.0625, the smallest there can be."


_HOLM = """def holm(p_values, alpha=0.05):
    m, kept = len(p_values), [False] * len(p_values)
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (m - rank):
            break
        kept[index] = True
    return kept"""


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
    (_HOLM.replace("sorted(range(m), key=lambda i: p_values[i])", "range(m)"), "smallest p-value"),
    (
        """def holm(p_values, alpha=0.05):
    import numpy as np
    m, order = len(p_values), np.argsort(p_values)
    passes = np.sort(p_values) <= alpha / (m - np.arange(m))
    return np.cumprod(passes).astype(bool)[order].tolist()""",
        "wrong way round",
    ),
    (_HOLM.replace("(m - rank)", "(m - rank - 1) if rank + 1 < m else alpha"), "ranks from 0"),
    (_HOLM.replace("> alpha", ">= alpha"), "at most"),
    (_HOLM.replace("(m - rank)", "(m - rank + 1)"), "m + 1"),
    (_HOLM.replace("kept[index] = True", "kept[p_values.index(p_values[index])] = True"), "equal p-values"),
    (_HOLM.replace("p_values[index] > alpha / (m - rank)", "p_values[index] > 1 - (1 - alpha) ** (1 / (m - rank))"), "alpha / m"),
    (_HOLM.replace("return kept", "return [i for i in range(m) if kept[i]]"), "one for each"),
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
    def ask(p, alpha=0.05):
        got = something(answer(list(p), alpha), "holm(...)")
        got = got.tolist() if hasattr(got, "tolist") else got
        if not isinstance(got, (list, tuple)) or len(got) != len(p):
            raise Wrong(f"holm({list(p)}) is {got!r}, expected {len(p)} times True or False, one for each p-value.")
        return [bool(one) for one in got]

    if not ask([0.012, 0.6, 0.7, 0.8])[0]:
        raise Wrong("holm([0.012, 0.6, 0.7, 0.8]) finds nothing, but 0.012 is below 0.05 / 4. If yours is held against alpha / (m + 1): with ranks from 0 the divisor is m - rank.")
    got, want = ask(p), right(p, 0.05)
    order = sorted(range(5), key=p.__getitem__)
    found = [rank for rank, index in enumerate(order) if p[index] <= 0.05 * (rank + 1) / 5]
    hints = {
        "Each test alone is held against alpha; among many, one in twenty of those with nothing to find will pass.":
            [one <= 0.05 for one in p],
        "That is Bonferroni's method: alpha / m for every test. Holm's asks less of the second, third, … smallest.":
            [one <= 0.05 / 5 for one in p],
        "Nothing passes, but 0.001 is below 0.05 / 5: begin with the smallest p-value, not with the one given first.":
            [False] * 5,
        "The order is applied the wrong way round: what rank r says belongs to the p-value at order[r].":
            [sorted(want, reverse=True)[index] for index in order],
        "The answers are in the order of size; return them in the order in which they were given.":
            sorted(want, reverse=True),
        "That is Benjamini and Hochberg's method: it bounds the share of false alarms among what is found, not the "
        "chance of even one.": [order.index(i) <= max(found) for i in range(5)],
    }
    for hint, mistake in hints.items():
        if got == mistake:
            raise Wrong(hint)
    same(got, want, f"holm({p})")
    if not ask([0.0125, 0.6, 0.7, 0.8])[0]:
        raise Wrong("0.0125 is exactly 0.05 / 4, and *at most* includes it: <=, not <.")
    if ask([0.0126, 0.6, 0.7, 0.8])[0]:
        raise Wrong("0.0126 is more than 0.05 / 4: the smallest of m is held against alpha / m, the next against alpha / (m - 1). Count ranks from 0.")
    if ask([0.01, 0.01, 0.9]) == [True, False, False]:
        raise Wrong("Of two equal p-values only one is found: look them up by their place, not by their value.")
    for p in ([0.02, 0.02, 0.02, 0.04], [0.2, 0.4], [0.01], [0.03, 0.03, 0.001, 0.04], [0.0125, 0.02, 0.02, 0.02]):
        got, want = ask(p), right(p, 0.05)
        if sum(got) > sum(want):
            raise Wrong(
                f"holm({p}) finds {sum(got)}, expected {sum(want)}: at the first p that fails, stop; a larger one can "
                "never be significant."
            )
        same(got, want, f"holm({p})")
    if ask([0.04, 0.09], 0.1) != [True, True]:
        raise Wrong("With alpha = 0.1 both of [0.04, 0.09] stay; use the parameter alpha.")
    return "Right: as safe as Bonferroni's, and never finds less."


_SEEDS = """def seeds_needed(difference, spread):
    from scipy.stats import nct, t
    for n in range(2, 10_000):
        edge, shift = t.ppf(0.975, n - 1), difference / spread * n**0.5
        if nct.sf(edge, n - 1, shift) + nct.cdf(-edge, n - 1, shift) >= 0.8:
            return n"""


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
    (_SEEDS.replace("0.975", "0.95"), "one-sided"),
    (_SEEDS.replace("* n**0.5", "* (n / 2) ** 0.5"), "unpaired"),
    (_SEEDS.replace("difference / spread", "spread / difference"), "upside down"),
    (_SEEDS.replace("difference / spread", "difference"), "divide by spread"),
    ("def seeds_needed(difference, spread):\n    import math\n    return math.ceil((2.8 * spread / difference) ** 2) + 4", "too many"),
)
def seeds_needed(answer) -> str:
    from scipy.stats import nct, t

    def exact(size, level=0.975):
        for n in range(2, 1000):
            edge, shift = t.ppf(level, n - 1), size * n**0.5
            if nct.sf(edge, n - 1, shift) + nct.cdf(-edge, n - 1, shift) >= 0.8:
                return n

    first, scaled = (something(answer(size, size), f"seeds_needed({size}, {size})") for size in (1.0, 2.0))
    if abs(first - scaled) > 1 and first >= 5:  # asked before any case that would take a simulation long
        raise Wrong(f"seeds_needed(1.0, 1.0) is {first}, seeds_needed(2.0, 2.0) is {scaled}, but only difference / spread can matter: power takes the "
                    "difference in standard deviations, so divide by spread.")
    cases = ((0.1, 0.1), (0.02, 0.01), (0.3, 0.1), (0.05, 0.1), (0.03, 0.1))
    got = [something(answer(*case), f"seeds_needed{case}") for case in cases]
    want = [exact(difference / spread) for difference, spread in cases]
    coin = [next(n for n in range(2, 1000) if d / s * n**0.5 >= t.ppf(0.975, n - 1)) for d, s in cases]
    z = [max(2, math.ceil((2.8 * s / d) ** 2)) for d, s in cases]
    if len(set(got)) == 1:
        raise Wrong(f"It says {got[0]} whatever the difference is; the number must grow as the difference shrinks.")
    if got == coin:
        raise Wrong("With these a study of the expected size would just pass. But half of the time it comes out smaller: "
                    "so you would find it only half of the time, not four times out of five.")
    if all(abs(one - other) <= 1 for one, other in zip(got, z, strict=True)) and got[1] < want[1]:
        raise Wrong(f"Those are the numbers of the normal distribution: {got[1]} for a difference of two standard "
                    f"deviations, where {want[1]} are needed. With few seeds the t distribution has heavier tails.")
    def near(one, other):  # a simulation of a few thousand runs ends within a twentieth
        return abs(one - other) <= max(1 if other < 20 else 2, other / 20)

    if got[1] > got[0] + 1:
        raise Wrong(f"It says {got[0]} for a difference of one standard deviation and {got[1]} for one of two, but a larger difference needs "
                    "fewer seeds: difference / spread is upside down.")
    for hint, mistakes in (
        ("Those are the numbers of a one-sided test. Two-sided, each tail has half of 0.05.", [exact(d / s, 0.95) for d, s in cases]),
        ("Those are the numbers of an unpaired test. `spread` is that of the paired differences already.", [exact(d / s / 2**0.5) for d, s in cases]),
    ):
        if all(map(near, got, mistakes)):
            raise Wrong(hint)
    for case, one, other in zip(cases, got, want, strict=True):
        if not near(one, other):
            raise Wrong(f"seeds_needed{case} is {one}, too {'many' if one > other else 'few'}: expected about {other}.")
    return "Right. Now compare with the five seeds of the tables, and with the spreads printed above the power curves."
