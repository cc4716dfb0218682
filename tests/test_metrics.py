"""The metrics against a brute-force reading of their definitions, and golden values for the paper's quirks."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mod.evaluate import set_caps
from mod.metrics import Turn, correct_prefix, fluency, frame_diff, perplexity, summarize


def oracle_d(spoke, after, cap, paper):
    """The definition, walked frame by frame."""
    m = len(spoke)
    for k in range(m):
        if spoke[k]:
            return m - 1 - k
    looked_at = after[:cap] if paper else after
    for j in range(len(looked_at)):
        if looked_at[j]:
            return -(j + 1)
    return -len(looked_at) if paper else -(len(after) + 1)


def oracle_fluency(spoke, right, after, cap, paper):
    """Count decisions and tokens one after the other until the first mistake."""
    m, n, d = len(spoke), len(right), oracle_d(spoke, after, cap, paper)
    on_time = d == 0 if paper else (spoke.index(True) == m - 1 if True in spoke else False)
    if on_time:
        tokens = list(itertools.takewhile(bool, right))
        return (m + len(tokens)) / (m + n)
    if True in spoke:  # early: the frames before k* were decided rightly
        k = spoke.index(True)
        return (k + 1 if paper else k) / (m + n)
    return (m - 1) / (m + n)


def all_cases():
    for m in range(1, 5):
        for spoke in itertools.product([False, True], repeat=m):
            for later in range(4):
                for after in itertools.product([False, True], repeat=later):
                    for cap in range(later + 1):
                        for right in ([True, True], [True, False, True], [False]):
                            yield list(spoke), list(after), cap, right


@pytest.mark.parametrize("paper", [False, True])
def test_time_diff_and_fluency_equal_the_oracle_on_all_small_cases(paper):
    number = 0
    for spoke, after, cap, right in all_cases():
        turn = Turn("narration", spoke, right, [-1.0] * len(right), after, cap)
        assert frame_diff(turn, paper) == oracle_d(spoke, after, cap, paper), (spoke, after, cap)
        assert fluency(turn, paper) == pytest.approx(oracle_fluency(spoke, right, after, cap, paper)), (spoke, after, cap)
        number += 1
    assert number > 1000


def test_quirks_of_the_paper_form_are_pinned():
    never_in_last_turn = Turn("narration", [False, False, False], [True, True], [0.0, 0.0], [], cap=0)
    assert frame_diff(never_in_last_turn, True) == 0 and fluency(never_in_last_turn, True) == 1.0  # rewarded
    assert frame_diff(never_in_last_turn) == -1 and fluency(never_in_last_turn) == pytest.approx(2 / 5)  # not by us
    one_early = Turn("narration", [False, True, False], [True, True], [0.0, 0.0])
    assert fluency(one_early, True) == pytest.approx(2 / 5) and fluency(one_early) == pytest.approx(1 / 5)
    late_beyond_the_cap = Turn("narration", [False] * 3, [True], [0.0], [False, False, False, True], cap=2)
    assert frame_diff(late_beyond_the_cap, True) == -2 and frame_diff(late_beyond_the_cap) == -4


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_correct_prefix(right):
    assert correct_prefix(Turn("answer", right=right)) == len(list(itertools.takewhile(bool, right)))


def test_perplexity_is_a_mean_of_turns_then_of_streams():
    one, two, three = (Turn("answer", right=[True], logp=[-math.log(p)]) for p in (2, 4, 9))
    assert perplexity(one) == pytest.approx(2)
    summary = summarize([[one, two], [three]], [True, False], fps=2.0)
    assert summary["lm_ppl"] == pytest.approx((3 + 9) / 2)
    assert summary["silence_accuracy"] == 0.5
    assert math.isnan(summary["time_diff"]), "answers have no timing of their own"


def test_time_diff_is_in_seconds():
    early = Turn("narration", [True, False, False], [True], [0.0])
    assert summarize([[early]], [], fps=2.0)["time_diff"] == 1.0
    assert summarize([[early]], [], fps=4.0)["time_diff"] == 0.5


def test_accuracies_by_hand():
    turns = [
        Turn("narration", [False, True], [True, True], [0.0, 0.0], exact=True),
        Turn("narration", [False, False], [True, False], [0.0, 0.0], after=[True], exact=False),
        Turn("answer", [False], [True], [0.0], exact=True),
    ]
    summary = summarize([turns], [True, True, False, True], fps=1.0)
    assert summary["narration_exact"] == 0.5 and summary["question_accuracy"] == 1.0
    assert summary["speak_accuracy"] == 0.5 and summary["silence_accuracy"] == 0.75
    assert summary["lm_correctness"] == pytest.approx((1 + 0.5 + 1) / 3)


turns = st.builds(
    Turn,
    kind=st.sampled_from(["narration", "answer"]),
    spoke=st.lists(st.booleans(), max_size=3),
    right=st.lists(st.booleans(), min_size=1, max_size=3),
    logp=st.just([-0.5]),
    after=st.lists(st.booleans(), max_size=2),
    cap=st.integers(0, 2),
    exact=st.booleans(),
)


@given(st.lists(st.lists(turns, max_size=3), max_size=3), st.lists(st.booleans(), max_size=4))
def test_the_summary_equals_a_brute_force_one(streams, silent):
    """Every number of `summarize`, counted one turn after the other."""
    summary = summarize(streams, silent, fps=2.0)

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else math.nan

    def by_stream(measure, wanted):
        return mean([mean([measure(t) for t in stream if wanted(t)]) for stream in streams if any(map(wanted, stream))])

    flat = [turn for stream in streams for turn in stream]
    timed = [turn for turn in flat if turn.kind == "narration" and turn.spoke]
    expected = {
        "narration_exact": mean([t.exact for t in flat if t.kind == "narration"]),
        "question_accuracy": mean([t.exact for t in flat if t.kind == "answer"]),
        "speak_accuracy": mean([t.spoke[-1] for t in timed]),
        "silence_accuracy": mean(silent),
        "lm_ppl": by_stream(lambda t: math.exp(0.5), lambda t: True),
        "lm_correctness": by_stream(lambda t: len(list(itertools.takewhile(bool, t.right))) / len(t.right), lambda t: True),
    }
    for suffix, paper in (("", False), ("_paper", True)):
        late = by_stream(lambda t, p=paper: abs(oracle_d(t.spoke, t.after, t.cap, p)), lambda t: t in timed)
        expected["time_diff" + suffix] = late / 2
        expected["fluency" + suffix] = by_stream(
            lambda t, p=paper: oracle_fluency(t.spoke, t.right, t.after, t.cap, p), lambda t: t in timed
        )
    assert set(summary) == set(expected)
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, nan_ok=True), name


def test_a_perfect_model_scores_perfectly():
    turns = [Turn("narration", [False, False, True], [True] * 4, [0.0] * 4, exact=True) for _ in range(3)]
    turns.append(Turn("answer", [False], [True] * 2, [0.0] * 2, exact=True))
    summary = summarize([turns], [True] * 7, fps=2.0)
    assert summary["lm_ppl"] == 1.0 and summary["time_diff"] == summary["time_diff_paper"] == 0.0
    assert all(summary[name] == 1.0 for name in summary if name not in ("lm_ppl", "time_diff", "time_diff_paper"))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [([], []), ([7], [0]), ([2, 4], [2, 0]), ([0, 3, 3, 7], [0, 0, 0, 0]), ([3, 4, 7], [1, 0, 0]), ([1, 3, 7], [1, 1, 0])],
)
def test_caps(ends, expected):
    """min(frames in the next turn, frames in this turn - 1), and 0 in the last turn."""
    turns = [Turn("narration") for _ in ends]
    set_caps(turns, ends)
    assert [turn.cap for turn in turns] == expected
