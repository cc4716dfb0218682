"""What "good" means, measured on clips: the four metrics of the base paper (VideoLLM-online) and plain accuracies.

A stream is cut into turns, each ending with a response. In a turn, m frames carried a streaming label and n text labels
belong to the response; c is the length of its longest correct prefix. Averaged over turns, then over streams:

    LM-PPL          exp(-mean log p of the response's tokens)          a mean of perplexities
    LM-Correctness  c / n
    TimeDiff        |d| / fps seconds; d frames too early (> 0) or too late (< 0), narrations only
    Fluency         (m + c) / (m + n) on time, less when early or late, narrations only

Teacher-forced: the true conversation is the context, one offline pass. Free-running: the model's own words are fed
back, frame by frame through a Stream, as in real use; errors may pile up. Only the context differs between the two.

DEVIATION: a question is asked by the user, so its turn has no timing of its own, and that an answer begins is no
achievement: neither counts. Late speech is looked for to the end of the stream, never speaking counts as later than
that, and only frames that were decided rightly are credited; mod/study/paper_metrics.py has the base paper's own form.

Read next: optim.py
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mod.config import ModelConfig
from mod.data import Clip, clip_batch, clip_pixels
from mod.decoder import Routing
from mod.layout import NO_LABEL, Layout, Vocabulary, assistant_ids, collate, lay_out
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


def stream_mean(
    streams: Sequence[Sequence[Turn]], measure: Callable[[Turn], float], wanted: Callable[[Turn], bool]
) -> float:
    """Mean over the wanted turns of a stream, then over the streams that have any; nan when none has."""
    values = [[measure(turn) for turn in turns if wanted(turn)] for turns in streams]
    return mean([mean(one) for one in values if one])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def summarize(streams: Sequence[Sequence[Turn]], silent: Sequence[bool], fps: float) -> dict[str, float]:
    """All metrics. `silent`: for every frame to be silent at, was the model silent?

    narration_exact and question_accuracy are shares of responses that are right word for word; speak_accuracy and
    silence_accuracy are shares of frames; time_diff is in seconds. nan where there is nothing to count.
    """
    turns = [turn for stream in streams for turn in stream]
    return {
        "narration_exact": mean([turn.exact for turn in turns if turn.kind == "narration"]),
        "question_accuracy": mean([turn.exact for turn in turns if turn.kind == "answer"]),
        "speak_accuracy": mean([turn.spoke[-1] for turn in turns if turn.timed]),
        "silence_accuracy": mean(silent),
        "lm_ppl": stream_mean(streams, perplexity, lambda turn: len(turn.right) > 0),
        "lm_correctness": stream_mean(streams, lambda t: correct_prefix(t) / len(t.right), lambda t: len(t.right) > 0),
        "time_diff": stream_mean(streams, lambda turn: abs(frame_diff(turn)), lambda turn: turn.timed) / fps,
        "fluency": stream_mean(streams, fluency, lambda turn: turn.timed),
    }


def device_of(model: VideoLLM) -> torch.device:
    return model.decoder.embed.weight.device


@torch.inference_mode()
def speaks_later(model: VideoLLM, words: Vocabulary, clip: Clip, layout: Layout, cut: int, frame: int,
                 threshold: float) -> list[bool]:
    """Would the model speak at each frame after `frame`, if nothing had been said since position `cut` - 1?"""
    probe, sizes = Layout(layout.ids[:cut], layout.frame[:cut], [NO_LABEL] * cut, [False] * cut), model.config
    for t in range(frame + 1, len(clip.frames)):
        probe.image(t, sizes.frame_tokens, words.eos)
    batch = collate([probe], clip_pixels([clip]), sizes.frame_tokens, sizes.keep_counts).to(device_of(model))
    hidden = model.hidden(batch.ids, model.see(batch.pixels), batch.plan)
    logits = model.decoder.logits(hidden.flatten(0, 1)[batch.labelled])
    return decides_to_speak(logits, words, threshold).tolist()


@torch.inference_mode()
def teacher_forced(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], threshold: float = 0.5, rows: int = 32,
                   trace: list[Routing] | None = None) -> tuple[list[list[Turn]], list[bool]]:
    """One offline pass over the true conversations. Returns the turns of every clip, and for every frame that should be
    silent whether the model was. `trace` collects the routed layers' decisions."""
    streams, silent = [], []
    for start in range(0, len(clips), rows):
        some = clips[start : start + rows]
        batch = clip_batch(words, some, model.config).to(device_of(model))
        hidden = model.hidden(batch.ids, model.see(batch.pixels), batch.plan, trace=trace)
        logits = model.decoder.logits(hidden.flatten(0, 1)[batch.labelled])
        logp = logits.float().log_softmax(-1)
        speaks = decides_to_speak(logits, words, threshold).tolist()
        right = (logp.argmax(-1) == batch.labels).tolist()
        label_logp = logp.gather(-1, batch.labels[:, None])[:, 0].tolist()
        rated = zip(speaks, right, label_logp, strict=True)  # of every labelled token, row by row
        for clip in some:
            layout = lay_out(words, len(clip.frames), model.config.frame_tokens, clip.said)
            turns, turn, cut = [], Turn(), 0
            for position, label in enumerate(layout.labels):
                turn.end = max(turn.end, layout.frame[position], turns[-1].end if turns else -1)
                if label == NO_LABEL:
                    continue
                spoke, is_right, nats = next(rated)
                if layout.streaming[position]:
                    turn.spoke.append(spoke)
                    cut = position + 1
                    if label == words.eos:
                        silent.append(not spoke)
                elif label == words.assistant:  # the end of a question; that an answer follows is no achievement
                    turn.kind = "answer"
                else:
                    turn.right.append(is_right)
                    turn.logp.append(nats)
                    if label == words.eos:
                        turn.exact = all(turn.right)
                        if turn.timed and not any(turn.spoke):
                            turn.after = speaks_later(model, words, clip, layout, cut, turn.end, threshold)
                        turns.append(turn)
                        turn = Turn()
            streams.append(turns)
    return streams, silent


class Book:
    """What is noted down about one free-running stream: what is still to be said, the turns so far, the open one, and
    whether it spoke at every frame."""

    def __init__(self, words: Vocabulary, clip: Clip):
        self.words, self.said, self.frames = words, deque(clip.said), len(clip.frames)
        self.turn, self.turns, self.decided = Turn(), [], []

    def due(self, frame: int, role: str) -> str | None:
        """The next turn of the true conversation, if it is this role's after this frame."""
        return self.said.popleft().text if self.next_role(frame) == role else None

    def next_role(self, frame: int) -> str | None:
        return self.said[0].role if self.said and self.said[0].frame == frame else None

    def close(self, kind: str, frame: int, truth: str, said: str | None, scores: Tensor) -> None:
        """End the open turn: the truth is known, what was said instead, and how likely the truth was, (n, V)."""
        ids = torch.tensor(assistant_ids(self.words, truth)[1:], device=scores.device)
        self.turn.kind, self.turn.end, self.turn.exact = kind, frame, said == self.words.decode(ids[:-1].tolist())
        self.turn.right = (scores.argmax(-1) == ids).tolist()
        self.turn.logp = scores.gather(-1, ids[:, None])[:, 0].tolist()
        self.turns.append(self.turn)
        self.turn = Turn()

    def finished(self) -> list[Turn]:
        for turn in self.turns:
            if turn.timed and not any(turn.spoke):
                turn.after = self.decided[turn.end + 1 :]
        return self.turns


@torch.inference_mode()
def free_running(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], threshold: float = 0.5, rows: int = 64,
                 max_words: int = 12) -> tuple[list[list[Turn]], list[bool]]:
    """Stream the clips with the model's own words as context. The same returns as `teacher_forced`.

    A response counts as exact when it is said at the right frame, word for word. Perplexity and correctness rate the
    true response after the model's own history. Raises ValueError for two responses without a question between.
    """
    streams, silent = [], []
    for start in range(0, len(clips), rows):
        some = clips[start : start + rows]
        stream = Stream(model, words, len(some), threshold=threshold, max_words=max_words)
        books = [Book(words, clip) for clip in some]
        for t in range(-1, max(book.frames for book in books)):
            if t >= 0:
                sees = [t < book.frames for book in books]
                pictures = [torch.as_tensor(clip.frames[t]) for clip, there in zip(some, sees, strict=True) if there]
                wants = stream.wants_to_speak(stream.see(torch.stack(pictures), sees))
                speaks = [want and there for want, there in zip(wants, sees, strict=True)]
                decided = [book.next_role(t) != "user" for book in books]  # before a user's turn there is no label
                truths = [book.due(t, "assistant") for book in books]
                scores, replies = stream.score(truths), stream.respond(speaks)
                for row, book in enumerate(books):
                    if not sees[row]:
                        continue
                    book.decided.append(speaks[row])
                    if decided[row]:
                        book.turn.spoke.append(speaks[row])
                    if truths[row] is not None:
                        book.close("narration", t, truths[row], replies[row], scores[row])
                    elif decided[row]:
                        silent.append(not speaks[row])
            # Then the questions: one of every row that has any at a time, and the answers that are due.
            while any(book.next_role(t) for book in books):
                questions = [book.due(t, "user") for book in books]
                if not any(questions):
                    raise ValueError(f"two responses after frame {t} without a question between; join them")
                stream.hear(questions)
                truths = [book.due(t, "assistant") if questions[row] else None for row, book in enumerate(books)]
                scores, replies = stream.score(truths), stream.respond([truth is not None for truth in truths])
                for row, book in enumerate(books):
                    if truths[row] is not None:
                        book.close("answer", t, truths[row], replies[row], scores[row])
        streams += [book.finished() for book in books]
    return streams, silent


def cost_ratios(config: ModelConfig, frames: int, text: int) -> dict[str, float]:
    """What a stream of so many frames and text tokens costs as a share of full computation: FLOPs of the decoder's
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
