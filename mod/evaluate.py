"""What "good" means, measured on clips: the four metrics of the base paper (VideoLLM-online) and plain accuracies.

A stream is cut into turns, each ending with a response. In a turn, m frames carried a streaming label and n text labels
belong to the response; c is the length of its longest correct prefix. Averaged over turns, then over streams:

    LM-PPL          exp(-mean log p of the response's tokens)          a mean of perplexities
    LM-Correctness  c / n
    TimeDiff        |d| / fps seconds; d frames too early (> 0) or too late (< 0), narrations only
    Fluency         (m + c) / (m + n) on time, less when early or late, narrations only

Teacher-forced: the true conversation is the context, one offline pass. Free-running: the model's own words are fed
back, frame by frame through a Stream, as in real use; errors may pile up. Only the context differs between the two.

DEVIATION: a question comes from the user, so its turn is not timed, and starting to answer earns nothing. Late speech
is looked for to the end of the stream, never speaking counts as later than that, and only frames that were decided
rightly are credited; mod/study/paper_metrics.py has the base paper's own form.

Read next: optim.py
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import torch
from einops import rearrange

from mod.config import ModelConfig
from mod.data import Clip, clip_batch
from mod.decoder import Routing
from mod.layout import Vocabulary, reply_ids
from mod.stream import Stream, decides_to_speak
from mod.videollm import VideoLLM


@dataclass
class Turn:
    """What a model did in one turn.

    kind   "narration" or "answer"
    end    the frame after which it ends
    spoke  at each of the m labelled frames: did it speak? In a narration's turn it should at the last one only
    right  at each of the n text labels: was the most likely token the right one?
    logp   at each of the n text labels: log-probability of the right token, nats
    after  when it never spoke in a narration's turn: did it at each further frame, to the end of the stream?
    exact  was the response right, word for word? (free-running: at the right frame, too)
    """

    kind: str = "narration"
    end: int = -1
    spoke: list[bool] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    after: list[bool] = field(default_factory=list)
    exact: bool = False

    @property
    def timed(self) -> bool:
        """Does this turn have a moment at which the model itself should have spoken?"""
        return self.kind == "narration" and len(self.spoke) > 0


def perplexity(turn: Turn) -> float:
    nats = -sum(turn.logp) / len(turn.logp)
    return math.exp(nats) if nats < 700 else math.inf  # beyond that exp overflows: the model has diverged


def correct_prefix(turn: Turn) -> int:
    """c: length of the longest correct prefix of the response."""
    return turn.right.index(False) if False in turn.right else len(turn.right)


def frame_diff(turn: Turn) -> int:
    """d: frames between the moment to speak and the first time the model did; positive is early, negative late."""
    if True in turn.spoke:
        return len(turn.spoke) - 1 - turn.spoke.index(True)
    return -(turn.after.index(True) + 1) if True in turn.after else -(len(turn.after) + 1)


def fluency(turn: Turn) -> float:
    """Share of the turn's decisions and tokens that came out right before the first mistake."""
    m, n, d = len(turn.spoke), len(turn.right), frame_diff(turn)
    good = m + correct_prefix(turn) if d == 0 else m - 1 - max(0, d)
    return good / (m + n)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def summarize(streams: Sequence[Sequence[Turn]], silent: Sequence[bool], fps: float) -> dict[str, float]:
    """All metrics. `silent`: for every frame to be silent at, was the model silent?

    narration_exact and question_accuracy are shares of responses that are right word for word; speak_accuracy and
    silence_accuracy are shares of frames; time_diff is in seconds. nan where there is nothing to count.
    """
    turns = [turn for stream in streams for turn in stream]
    worded = [[turn for turn in stream if turn.right] for stream in streams]
    timed = [[turn for turn in stream if turn.timed] for stream in streams]

    def over(streams: list[list[Turn]], measure: Callable[[Turn], float]) -> float:
        """Mean over the turns of a stream, then over the streams that have any."""
        return mean([mean([measure(turn) for turn in stream]) for stream in streams if stream])

    return {
        "narration_exact": mean([turn.exact for turn in turns if turn.kind == "narration"]),
        "question_accuracy": mean([turn.exact for turn in turns if turn.kind == "answer"]),
        "speak_accuracy": mean([turn.spoke[-1] for turn in turns if turn.timed]),
        "silence_accuracy": mean(silent),
        "lm_ppl": over(worded, perplexity),
        "lm_correctness": over(worded, lambda turn: correct_prefix(turn) / len(turn.right)),
        "time_diff": over(timed, lambda turn: abs(frame_diff(turn))) / fps,
        "fluency": over(timed, fluency),
    }


class Book:
    """What is noted down about one stream: the turns so far, the decisions of the open one, whether it spoke at every
    frame, and for every frame that should be silent whether it was."""

    def __init__(self):
        self.turns, self.open, self.spoke, self.silent = [], [], [], []

    def decide(self, spoke: bool, expected: bool | None) -> None:
        """At the end of a frame the model spoke or did not; None: a user speaks next, so nothing was expected."""
        self.spoke.append(spoke)
        if expected is not None:
            self.open.append(spoke)
        if expected is False:
            self.silent.append(not spoke)

    def respond(self, kind: str, frame: int, right: list[bool], logp: list[float], exact: bool) -> None:
        """A response ends the open turn."""
        self.turns.append(Turn(kind, frame, self.open, right, logp, exact=exact))
        self.open = []


@torch.inference_mode()
def speaks_later(model: VideoLLM, words: Vocabulary, clip: Clip, frame: int, threshold: float) -> list[bool]:
    """Would the model speak at each frame after `frame`, if nobody had spoken from its end on?"""
    silent = replace(clip, said=[say for say in clip.said if say.frame < frame])
    batch = clip_batch(words, [silent], model.config).to(model.decoder.embed.weight.device)
    decisions = decides_to_speak(model.predict(batch), words, threshold).tolist()
    return decisions[len(decisions) - (len(clip.frames) - 1 - frame) :]


@torch.inference_mode()
def teacher_forced(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], threshold: float = 0.5, rows: int = 32,
                   trace: list[Routing] | None = None) -> tuple[list[list[Turn]], list[bool]]:
    """One offline pass over the true conversations. Returns the turns of every clip, and for every frame that should be
    silent whether the model was. `trace` collects the routed layers' decisions."""
    books = []
    for start in range(0, len(clips), rows):
        some = clips[start : start + rows]
        batch = clip_batch(words, some, model.config).to(model.decoder.embed.weight.device)
        logits = model.predict(batch, trace)
        logp = logits.float().log_softmax(-1)
        speaks = decides_to_speak(logits, words, threshold).tolist()
        right = (logp.argmax(-1) == batch.labels).tolist()
        likely = rearrange(logp.gather(-1, batch.labels[:, None]), "l 1 -> l").tolist()
        rated = zip(speaks, right, likely, strict=True)  # of every labelled token, in the order of `lay_out`
        for clip in some:
            book = Book()
            for t in range(-1, len(clip.frames)):
                says = [say for say in clip.said if say.frame == t]
                roles = ["nobody", *(say.role for say in says)]
                if t >= 0:
                    asked = roles[1:2] == ["user"]
                    book.decide(False if asked else next(rated)[0], None if asked else len(roles) > 1)
                for before, say in zip(roles, says, strict=False):
                    if say.role == "assistant":
                        if before == "user":
                            next(rated)  # the end of a question: that an answer follows is no achievement
                        _, correct, likely = zip(*islice(rated, len(reply_ids(words, say.text))), strict=True)
                        kind = "answer" if before == "user" else "narration"
                        book.respond(kind, t, list(correct), list(likely), all(correct))
            for turn in book.turns:
                if turn.timed and not any(turn.spoke):
                    turn.after = speaks_later(model, words, clip, turn.end, threshold)
            books.append(book)
    return [book.turns for book in books], list(chain(*(book.silent for book in books)))


@torch.inference_mode()
def free_running(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], threshold: float = 0.5, rows: int = 64,
                 max_words: int = 12) -> tuple[list[list[Turn]], list[bool]]:
    """Stream the clips with the model's own words as context. The same returns as `teacher_forced`.

    A response counts as exact when it is said at the right frame, word for word. Perplexity and correctness rate the
    true response after the model's own history. Raises ValueError for two responses without a question between.
    """
    books = []
    for start in range(0, len(clips), rows):
        some = clips[start : start + rows]
        stream = Stream(model, words, len(some), threshold=threshold, max_words=max_words)
        told, left = [Book() for _ in some], [deque(clip.said) for clip in some]

        def due(t: int, role: str, left=left) -> list[str | None]:
            """What the true conversation of each row says next, where that is this role's after frame t."""
            return [row.popleft().text if row and (row[0].frame, row[0].role) == (t, role) else None for row in left]

        def respond(kind: str, t: int, truths: list[str | None], speaks: list[bool], stream=stream, told=told) -> None:
            """Let rows speak, and rate in each the truth that is due and what was said instead."""
            scores, replies = stream.score(truths), stream.respond(speaks)
            for book, truth, said, logp in zip(told, truths, replies, scores, strict=True):
                if truth is not None:
                    ids = torch.tensor(reply_ids(words, truth), device=logp.device)
                    likely = rearrange(logp.gather(-1, ids[:, None]), "l 1 -> l").tolist()
                    exact = said == words.decode(ids[:-1].tolist())
                    book.respond(kind, t, (logp.argmax(-1) == ids).tolist(), likely, exact)

        for t in range(-1, max(len(clip.frames) for clip in some)):
            if t >= 0:
                sees = [t < len(clip.frames) for clip in some]
                pictures = [torch.as_tensor(clip.frames[t]) for clip, there in zip(some, sees, strict=True) if there]
                wants = stream.wants_to_speak(stream.see(torch.stack(pictures), sees))
                speaks = [want and there for want, there in zip(wants, sees, strict=True)]
                asked = [bool(row) and (row[0].frame, row[0].role) == (t, "user") for row in left]
                truths = due(t, "assistant")
                for row in (row for row, there in enumerate(sees) if there):
                    told[row].decide(speaks[row], None if asked[row] else truths[row] is not None)
                respond("narration", t, truths, speaks)
            # Then the questions, one of every row that has any at a time, and the answers that are due.
            while any(row and row[0].frame == t for row in left):
                questions = due(t, "user")
                if not any(questions):
                    raise ValueError(f"a response after frame {t} follows neither the frame nor a question; join them")
                stream.hear(questions)
                answers = [row if asked is not None else deque() for row, asked in zip(left, questions, strict=True)]
                truths = due(t, "assistant", answers)
                respond("answer", t, truths, [truth is not None for truth in truths])
        for book in told:
            for turn in book.turns:
                if turn.timed and not any(turn.spoke):
                    turn.after = book.spoke[turn.end + 1 :]
        books += told
    return [book.turns for book in books], list(chain(*(book.silent for book in books)))


def cost_ratios(config: ModelConfig, frames: int, text: int) -> dict[str, float]:
    """What a stream of this many frames and text tokens costs as a share of full computation: FLOPs of the decoder's
    layers, and entries of the KV cache. A layer processes, and caches, n = k * frames + text tokens."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.dim * (2 * queries + 2 * keys) + 3 * config.dim * config.ffn_hidden

    def flops(n: int) -> int:
        return 2 * n * weights + 4 * n * n * queries  # products with weights; the square of attention

    tokens = [kept * frames + text for kept in config.keep_counts]
    scored = sum(ratio < 1 for ratio in config.keep_ratios) if config.select == "learned" else 0
    full = config.frame_tokens * frames + text
    router = 2 * scored * config.frame_tokens * frames * config.dim
    return {"flop_ratio": (sum(map(flops, tokens)) + router) / (config.depth * flops(full)),
            "kv_ratio": sum(tokens) / (config.depth * full)}
