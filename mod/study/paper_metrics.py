"""TimeDiff and Fluency as the base paper's code computes them, beside the corrected forms of mod/evaluate.py.

Its quirks: never speaking costs nothing in a stream's last turn or after a single frame; at most as many late frames as
the next turn has, and one less than this one has, are looked at; a narration that comes d frames early is credited with
one frame too many.
"""

from collections.abc import Sequence

from mod.evaluate import Turn, correct_prefix, mean


def caps(turns: Sequence[Turn]) -> list[int]:
    """How many of the frames after each turn of a stream are looked at: as many as the next turn has, but one less than
    this turn has at most, and none after the last turn."""
    ends = [-1, *(turn.end for turn in turns)]
    lengths = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return [max(0, min(following, own - 1)) for own, following in zip(lengths, [*lengths[1:], 0], strict=False)]


def frame_diff(turn: Turn, cap: int) -> int:
    """d: frames between the moment to speak and the first time the model did; positive is early, negative late."""
    if True in turn.spoke:
        return len(turn.spoke) - 1 - turn.spoke.index(True)
    after = turn.after[:cap]
    return -(after.index(True) + 1) if True in after else -len(after)


def fluency(turn: Turn, cap: int) -> float:
    """Share of the turn's decisions and tokens that came out right before the first mistake."""
    m, n, d = len(turn.spoke), len(turn.right), frame_diff(turn, cap)
    # On time is also what never spoke and could not be seen to be late.
    good = m + correct_prefix(turn) if d == 0 else m - d if d > 0 else m - 1
    return good / (m + n)


def summarize(streams: Sequence[Sequence[Turn]], fps: float) -> dict[str, float]:
    """Both metrics, averaged over the narrations of a stream, then over the streams that have any; nan when none has.
    time_diff_paper is in seconds."""
    late, fluent = [], []
    for turns in streams:
        timed = [(turn, cap) for turn, cap in zip(turns, caps(turns), strict=True) if turn.timed]
        if timed:
            late.append(mean([abs(frame_diff(turn, cap)) for turn, cap in timed]))
            fluent.append(mean([fluency(turn, cap) for turn, cap in timed]))
    return {"time_diff_paper": mean(late) / fps, "fluency_paper": mean(fluent)}
