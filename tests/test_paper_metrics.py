"""TimeDiff and Fluency as the base paper's code computes them: a brute-force reading, and golden values of quirks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mod import evaluate
from mod.study.paper_metrics import caps, fluency, frame_diff, summarize
from tests.test_evaluate import all_cases, mean, narration, oracle_d, oracle_fluency, turns


def paper_d(turn, cap):
    """What is looked at after the turn ends at the cap; who never spoke there is as late as that."""
    return oracle_d(turn.spoke, turn.after[:cap]) + (not any(turn.spoke) and not any(turn.after[:cap]))


def paper_fluency(turn, cap):
    """As the corrected form, but for who never spoke and was not seen to be late, and for who was early."""
    m, n, d = len(turn.spoke), len(turn.right), paper_d(turn, cap)
    if d == 0:
        return (m + evaluate.correct_prefix(turn)) / (m + n)
    return oracle_fluency(turn.spoke, turn.right) + (d > 0) / (m + n)


def test_time_diff_and_fluency_equal_the_oracle_on_all_small_cases():
    number = 0
    for turn in all_cases():
        for cap in range(len(turn.after) + 1):
            assert frame_diff(turn, cap) == paper_d(turn, cap), (turn, cap)
            assert fluency(turn, cap) == pytest.approx(paper_fluency(turn, cap)), (turn, cap)
            number += 1
    assert number > 1000


def test_quirks_are_pinned():
    never_in_last_turn = narration([False, False, False], [True, True], [0.0, 0.0])
    assert frame_diff(never_in_last_turn, 0) == 0 and fluency(never_in_last_turn, 0) == 1.0  # rewarded
    assert evaluate.frame_diff(never_in_last_turn) == -1  # not by us
    one_early = narration([False, True, False], [True, True], [0.0, 0.0])
    assert fluency(one_early, 0) == pytest.approx(2 / 5) and evaluate.fluency(one_early) == pytest.approx(1 / 5)
    late_beyond_the_cap = narration([False] * 3, [True], [0.0], after=[False, False, False, True])
    assert frame_diff(late_beyond_the_cap, 2) == -2 and evaluate.frame_diff(late_beyond_the_cap) == -4


@pytest.mark.parametrize(
    ("ends", "expected"),
    [([], []), ([7], [0]), ([2, 4], [2, 0]), ([0, 3, 3, 7], [0, 0, 0, 0]), ([3, 4, 7], [1, 0, 0]),
     ([1, 3, 7], [1, 1, 0])],
)
def test_caps(ends, expected):
    """min(frames in the next turn, frames in this turn - 1), and 0 in the last turn."""
    assert caps([evaluate.Turn("narration", end=end) for end in ends]) == expected


@given(st.lists(st.lists(turns, max_size=3).map(lambda some: sorted(some, key=lambda turn: turn.end)), max_size=3))
def test_the_summary_equals_a_brute_force_one(streams):
    late, fluent = [], []
    for stream in streams:
        pairs = zip(stream, caps(stream), strict=True)
        timed = [(turn, cap) for turn, cap in pairs if turn.kind == "narration" and turn.spoke]
        late += [mean([abs(paper_d(turn, cap)) for turn, cap in timed])] if timed else []
        fluent += [mean([paper_fluency(turn, cap) for turn, cap in timed])] if timed else []
    expected = {"time_diff_paper": mean(late) / 4, "fluency_paper": mean(fluent)}
    summary = summarize(streams, fps=4.0)
    assert set(summary) == set(expected)
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, nan_ok=True), name
    assert math.isnan(summarize([], 2.0)["fluency_paper"])
