"""Streaming inference: frames arrive one by one, answers leave one by one (paper, section 3.1).

A `Stream` owns everything that changes: the cache, the next position, the frame count. The model is only read, so any
number of streams share it. A stream may have several rows: B videos, each with a conversation of its own. A frame, a
question or an answer may come in some rows and not in others: then the others stand still.

    see(pixels)  feed one frame of every row      hear(questions)  feed what users ask
    respond(...) let some rows speak              narrate, ask     the two together: what most callers want

The tokens fed for a timeline are those that `layout.lay_out` writes for it: an opening, then words, then <eos>.

Read next: evaluate.py
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mod.cache import KVCache
from mod.config import ModelConfig
from mod.layout import PADDING, TEXT, Plan, Vocabulary, make_plan, reply_ids, to_device, user_ids
from mod.videollm import VideoLLM


def decides_to_speak(logits: Tensor, words: Vocabulary, threshold: float) -> Tensor:
    """Is staying silent (<eos>) less likely than the threshold? Logits (..., V) after a frame -> (...) bool."""
    return logits.float().softmax(-1)[..., words.eos] < threshold


@lru_cache(maxsize=256)
def chunk_plan(config: ModelConfig, texts: tuple[int, ...], frames: tuple[bool, ...], device: torch.device) -> Plan:
    """The plan of a chunk that begins at position 0 in every row: a frame where `frames` says, then so much text."""
    size = config.frame_tokens
    lengths = [seen * size + text for seen, text in zip(frames, texts, strict=True)]
    frame = np.full((len(texts), max(lengths)), PADDING)
    for row, length in enumerate(lengths):
        frame[row, :length] = TEXT
        frame[row, : frames[row] * size] = 0
    return make_plan(frame, [0] * len(texts), size, config.keep_counts).to(device)


class Stream:
    """B live streams through one model.

    threshold  speak when the probability of silence is below it
    max_words  a longer response is cut there, in tokens, and still closed with <eos>
    cache      an empty memory; a KVCache that never forgets if not given
    trace      a list that collects the routed layers' decisions, or None
    seen, position  per row: frames so far, and the position of the next token
    """

    def __init__(self, model: VideoLLM, words: Vocabulary, rows: int = 1, *, threshold: float = 0.5,
                 max_words: int = 12, cache: KVCache | None = None, trace: list | None = None):
        self.model, self.words, self.rows = model, words, rows
        self.threshold, self.max_words, self.trace = threshold, max_words, trace
        self.device = model.decoder.embed.weight.device
        self.cache = cache if cache is not None else model.new_cache(rows)
        self.seen, self.position = [0] * rows, [0] * rows
        # A response is words and a closing <eos>, never a turn symbol, whatever an untrained model prefers.
        never = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        never[[words.bos, words.user, words.assistant]] = True
        never[len(words) :] = True  # rows of the embedding that stand for no word
        never[words.eos] = False  # some tokenizers have one symbol for <bos> and <eos>
        self.never = never.to(self.device)
        self.advance([[words.bos]] * rows, [False] * rows)

    @torch.inference_mode()
    def advance(self, texts: Sequence[Sequence[int]], frames: Sequence[bool], vectors: Tensor | None = None) -> Tensor:
        """Append to every row a frame where `frames` says, of those in `vectors` (F, N, D), and then its text, which
        may be empty. Returns hidden states (B, T, D), rows padded on the right."""
        counts = tuple(map(len, texts))
        plan = chunk_plan(self.model.config, counts, tuple(frames), self.device)
        ids = np.zeros(plan.pos.shape, np.int64)
        for row, text in enumerate(texts):
            start = frames[row] * self.model.config.frame_tokens
            ids[row, start : start + len(text)] = text
        start = torch.tensor(self.position)[:, None]
        ids, start = to_device((torch.from_numpy(ids), start), self.device)
        # PAD plus a position is later than every real one, too.
        hidden = self.model.hidden(ids, vectors, plan._replace(pos=plan.pos + start), self.cache, self.trace)
        for row, (count, sees) in enumerate(zip(counts, frames, strict=True)):
            self.position[row] += count + sees * self.model.config.frame_tokens
            self.seen[row] += sees
        return hidden

    @torch.inference_mode()
    def feed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Append text, one id list per row, which may be empty. Returns logits (B, T, V), rows padded on the right."""
        return self.model.decoder.logits(self.advance(texts, [False] * self.rows))

    @torch.inference_mode()
    def see(self, pixels: Tensor, rows: Sequence[bool] | None = None) -> Tensor:
        """Feed one frame of every row, as `VideoLLM.see` takes them, (F, ...); with `rows`, of those rows only.
        Returns logits (B, V) after its last token, which mean nothing in other rows."""
        rows = list(rows or [True] * self.rows)
        if len(pixels) != sum(rows):
            raise ValueError(f"got {len(pixels)} frames for {sum(rows)} streams, expected one each")
        hidden = self.advance([[]] * self.rows, rows, self.model.see(pixels.to(self.device, non_blocking=True)))
        return self.model.decoder.logits(hidden[:, -1])

    def wants_to_speak(self, logits: Tensor) -> list[bool]:
        """The streaming decision, from the logits (B, V) after a frame: is silence less likely than the threshold?"""
        return decides_to_speak(logits, self.words, self.threshold).tolist()

    def hear(self, questions: Sequence[str | None]) -> None:
        """Feed a question of some rows' users; None where nobody asks."""
        texts = [[] if question is None else user_ids(self.words, question) for question in questions]
        if any(texts):
            self.advance(texts, [False] * self.rows)

    def respond(self, speaking: Sequence[bool]) -> list[str | None]:
        """Let some rows speak, word by word, the most likely word each time; returns what each said, or None."""
        spoken: list[list[int]] = [[] for _ in range(self.rows)]
        active = list(speaking)
        opening, closing = self.words.opening["assistant"], self.words.closing["assistant"]
        texts, last = [opening if row else [] for row in active], len(opening) - 1
        while any(active):
            best = self.feed(texts)[:, last].masked_fill(self.never, -torch.inf).argmax(-1).tolist()
            last = 0  # from now on a row that is still speaking is fed one token
            for row in range(self.rows):
                if not active[row]:
                    texts[row] = []
                    continue
                token = best[row] if len(spoken[row]) < self.max_words else self.words.eos
                texts[row] = [token]
                if token == self.words.eos:
                    active[row], texts[row] = False, [token, *closing]
                else:
                    spoken[row].append(token)
        if any(speaking):
            self.advance(texts, [False] * self.rows)  # the <eos> of the rows that finished last
        return [self.words.decode(text) if speaks else None for text, speaks in zip(spoken, speaking, strict=True)]

    def narrate(self, pixels: Tensor, rows: Sequence[bool] | None = None) -> list[str | None]:
        """See one frame of every row, or of some as `see`; returns what each row says about it, None for silence."""
        wants = self.wants_to_speak(self.see(pixels, rows))
        return self.respond([want and sees for want, sees in zip(wants, rows or wants, strict=True)])

    def ask(self, questions: Sequence[str | None]) -> list[str | None]:
        """Ask some rows a question; returns the answers, None where nobody asked."""
        self.hear(questions)
        return self.respond([question is not None for question in questions])

    @torch.inference_mode()
    def score(self, responses: Sequence[str | None]) -> list[Tensor | None]:
        """How the model would rate given responses if they were said now, without saying them.

        Returns, per row, log-probabilities (n, V) of the token after the opening, after the first word, and so on.
        """
        opening = self.words.opening["assistant"]
        texts = [[] if text is None else [*opening, *reply_ids(self.words, text)[:-1]] for text in responses]
        if not any(texts):
            return [None] * self.rows
        mark, position, trace, self.trace = self.cache.mark(), list(self.position), self.trace, None
        scores = self.feed(texts).float().log_softmax(-1)
        self.cache.rewind(mark)
        self.position, self.trace = position, trace
        return [scores[row, len(opening) - 1 : len(text)] if text else None for row, text in enumerate(texts)]
