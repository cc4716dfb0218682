"""What "good" means: the four metrics of the base paper (VideoLLM-online) and plain accuracies.

A stream is cut into turns, each ending with a response. In a turn, m frames carried a streaming label and n text labels
belong to the response; c is the length of its longest right beginning. Then, averaged over turns, then over streams:

    LM-PPL          exp(-mean log p of the response's tokens)          a mean of perplexities
    LM-Correctness  c / n
    TimeDiff        |d| / fps seconds; d frames too early (> 0) or too late (< 0), narrations only
    Fluency         (m + c) / (m + n) on time, less when early or late, narrations only

DEVIATION: a question is asked by the user, so its turn has no timing of its own, and that an answer begins is no
achievement: neither counts. Two forms of TimeDiff and Fluency are offered.
`paper_compatible` follows the base paper's code, with its quirks: never speaking costs nothing in a stream's last turn
or after a single frame, at most as many late frames as the next turn has (and one less than this one) are looked at,
and a narration k frames early is credited with one frame too many. The corrected form, ours, looks for late speech to
the end of the stream, counts never speaking as later than that, and credits only frames that were decided rightly.

Read next: stream.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Turn:
    """What a model did in one turn.

    kind   "narration" or "answer"
    spoke  at each of the m labelled frames: did it speak? In a narration's turn it should at the last one only
    right  at each of the n text labels: was the most likely token the right one?
    logp   at each of the n text labels: log-probability of the right token, nats
    after  when it never spoke in a narration's turn: did it at each further frame, to the end of the stream?
    cap    how many of `after` the paper-compatible form looks at; 0 in a stream's last turn
    exact  was the response right, word for word? (free-running: at the right frame, too)
    """

    kind: str
    spoke: list[bool] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    after: list[bool] = field(default_factory=list)
    cap: int = 0
    exact: bool = False

    @property
    def timed(self) -> bool:
        """Does this turn have a moment at which the model itself should have spoken?"""
        return self.kind == "narration" and len(self.spoke) > 0


def perplexity(turn: Turn) -> float:
    nats = -sum(turn.logp) / len(turn.logp)
    return math.exp(nats) if nats < 700 else math.inf  # beyond that exp overflows: the model has diverged


def correct_prefix(turn: Turn) -> int:
    """c: length of the longest beginning of the response that is right."""
    return turn.right.index(False) if False in turn.right else len(turn.right)


def frame_diff(turn: Turn, paper_compatible: bool = False) -> int:
    """d: frames between the moment to speak and the first time the model did; positive is early, negative late."""
    if True in turn.spoke:
        return len(turn.spoke) - 1 - turn.spoke.index(True)
    after = turn.after[: turn.cap] if paper_compatible else turn.after
    if True in after:
        return -(after.index(True) + 1)
    return -len(after) if paper_compatible else -(len(after) + 1)


def fluency(turn: Turn, paper_compatible: bool = False) -> float:
    """Share of the turn's decisions and tokens that came out right before the first mistake."""
    m, n, d = len(turn.spoke), len(turn.right), frame_diff(turn, paper_compatible)
    if d == 0:
        # The paper's code gets here, too, when the model never spoke and could not be seen to be late.
        good = m + correct_prefix(turn)
    elif d > 0:
        good = m - d if paper_compatible else m - 1 - d
    else:
        good = m - 1
    return good / (m + n)


def stream_mean(
    streams: Sequence[Sequence[Turn]], measure: Callable[[Turn], float], wanted: Callable[[Turn], bool]
) -> float:
    """Mean over the wanted turns of a stream, then over the streams that have any; nan when none has."""
    means = [
        sum(map(measure, turns)) / len(turns)
        for stream in streams
        if (turns := [turn for turn in stream if wanted(turn)])
    ]
    return sum(means) / len(means) if means else math.nan


def summarize(streams: Sequence[Sequence[Turn]], silent: Sequence[bool], fps: float) -> dict:
    """All metrics as one flat dictionary. `silent`: for every frame to be silent at, was the model silent?

    narration_exact and question_accuracy are shares of responses that are right word for word; speak_accuracy and
    silence_accuracy are shares of frames; time_diff is in seconds. nan where there is nothing to count.
    """

    def share(flags: list[bool]) -> float:
        return sum(flags) / len(flags) if flags else math.nan

    turns = [turn for stream in streams for turn in stream]

    def worded(turn: Turn) -> bool:
        return len(turn.right) > 0

    def timed(turn: Turn) -> bool:
        return turn.timed

    summary = {
        "narration_exact": share([turn.exact for turn in turns if turn.kind == "narration"]),
        "question_accuracy": share([turn.exact for turn in turns if turn.kind == "answer"]),
        "speak_accuracy": share([turn.spoke[-1] for turn in turns if turn.timed]),
        "silence_accuracy": share(list(silent)),
        "lm_ppl": stream_mean(streams, perplexity, worded),
        "lm_correctness": stream_mean(streams, lambda turn: correct_prefix(turn) / len(turn.right), worded),
    }
    for suffix, form in (("", False), ("_paper", True)):
        late = stream_mean(streams, lambda turn, form=form: abs(frame_diff(turn, form)), timed)
        summary["time_diff" + suffix] = late / fps
        summary["fluency" + suffix] = stream_mean(streams, lambda turn, form=form: fluency(turn, form), timed)
    return summary
