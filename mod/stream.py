"""Streaming inference: frames arrive one by one, answers leave one by one (paper, section 3.1).

A `Stream` owns everything that changes: the cache, the next position, the frame count. The model is only read, so any
number of streams share it. A stream may have several rows: B videos in step, each with a conversation of its own.

    see(pixels)  feed one frame of every row      hear(questions)  feed what users ask
    respond(...) let some rows speak              frame, ask       the two together: what most callers want

The tokens fed for a timeline are those that `layout.lay_out` writes for it: both use the same two functions for text.

Read next: evaluate.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mod.block import PAD
from mod.cache import KVCache
from mod.config import UserError
from mod.layout import Vocabulary, assistant_ids, user_ids
from mod.videollm import VideoLLM


def decides_to_speak(logits: Tensor, words: Vocabulary, threshold: float) -> Tensor:
    """Is staying silent (<eos>) less likely than the threshold? Logits (..., V) after a frame -> (...) bool."""
    return logits.float().softmax(-1)[..., words.eos] < threshold


class Stream:
    """B live streams through one model.

    threshold  speak when the probability of <eos> ("stay silent") after a frame is below it, 0 to 1
    max_words  a longer response is cut there, in tokens, and still closed with <eos>
    frames, text  room in the cache, per row: frames, and text tokens
    trace      a list that collects the routed layers' decisions, or None
    fed        per row, the (token id, frame) pairs fed so far; vision tokens have id 0, text has frame -1
    """

    def __init__(self, model: VideoLLM, words: Vocabulary, rows: int = 1, *, frames: int, text: int,
                 threshold: float = 0.5, max_words: int = 12, trace: list | None = None):  # fmt: skip
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold is a probability, expected 0 to 1, got {threshold}")
        self.model, self.words, self.rows = model, words, rows
        self.threshold, self.max_words, self.trace = threshold, max_words, trace
        weight = model.decoder.embed.weight
        self.device = weight.device
        self.cache = KVCache(model.config, rows, frames=frames, text=text, dtype=weight.dtype, device=weight.device)
        self.frames = 0
        self.position = [0] * rows
        self.fed: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        self.no_frames = weight.new_zeros(0, model.config.frame_tokens, model.config.dim)
        # A response is words and a closing <eos>, never a turn symbol, whatever an untrained model prefers.
        self.never = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.never[[words.bos, words.user, words.assistant]] = True
        self.never[len(words) :] = True  # rows of the embedding that stand for no word
        self.never[words.eos] = False  # which some tokenizers begin a text with, too
        self.feed([[words.bos]] * rows)

    @torch.inference_mode()
    def feed(self, texts: Sequence[Sequence[int]], pixels: Tensor | None = None) -> Tensor:
        """Append text (one id list a row, may be empty) and then a frame, as `VideoLLM.see` takes it, to every row.

        Returns logits (B, T, V), rows padded on the right. Raises UserError, with nothing fed, when the cache is full.
        """
        config = self.model.config
        vision = config.frame_tokens if pixels is not None else 0
        self.cache.require(frames=1 if vision else 0, text=[len(text) for text in texts])
        if vision and len(pixels) != self.rows:
            raise ValueError(f"got {len(pixels)} frames for {self.rows} streams, expected one each")
        seen = self.model.see(pixels.to(self.device)) if vision else self.no_frames
        chunks = [[(token, -1) for token in text] + [(0, self.frames)] * vision for text in texts]
        longest = max(len(chunk) for chunk in chunks)
        ids, frame, pos = (torch.full((self.rows, longest), fill, dtype=torch.long) for fill in (0, -1, PAD))
        for row, chunk in enumerate(chunks):
            if chunk:
                ids[row, : len(chunk)], frame[row, : len(chunk)] = torch.tensor(chunk).unbind(1)
                pos[row, : len(chunk)] = torch.arange(self.position[row], self.position[row] + len(chunk))
            self.position[row] += len(chunk)
            self.fed[row] += chunk
        ids, frame, pos = ids.to(self.device), frame.to(self.device), pos.to(self.device)
        self.frames += 1 if vision else 0
        return self.model.decoder.logits(self.model(ids, frame, pos, seen, cache=self.cache, trace=self.trace))

    def see(self, pixels: Tensor) -> Tensor:
        """Feed one frame of every row, (B, 3, height, width); returns the logits (B, V) after its last token."""
        return self.feed([[]] * self.rows, pixels)[:, -1]

    def wants_to_speak(self, logits: Tensor) -> list[bool]:
        """The streaming decision, from the logits (B, V) after a frame: is silence less likely than the threshold?"""
        return decides_to_speak(logits, self.words, self.threshold).tolist()

    def hear(self, questions: Sequence[str | None]) -> None:
        """Feed a question of some rows' users; None where nobody asks."""
        self.feed([user_ids(self.words, question) if question is not None else [] for question in questions])

    def respond(self, speaking: Sequence[bool]) -> list[str | None]:
        """Let some rows speak, word by word, the most likely word each time; returns what each said, or None.

        Raises UserError, with nothing fed, when the cache has no room for the longest response.
        """
        self.cache.require(0, [self.max_words + 2 if row else 0 for row in speaking])
        spoken: list[list[int]] = [[] for _ in range(self.rows)]
        active = list(speaking)
        chunks = [[self.words.assistant] if row else [] for row in active]
        while any(active):
            # A chunk of a row that is still speaking has one token, so its next word is predicted at place 0.
            best = self.feed(chunks)[:, 0].masked_fill(self.never, -torch.inf).argmax(-1).tolist()
            for row in range(self.rows):
                if not active[row]:
                    chunks[row] = []
                    continue
                token = best[row] if len(spoken[row]) < self.max_words else self.words.eos
                chunks[row] = [token]
                if token == self.words.eos:
                    active[row] = False
                else:
                    spoken[row].append(token)
        if any(speaking):
            self.feed(chunks)  # the <eos> of the rows that finished last
        return [self.words.decode(text) if speaks else None for text, speaks in zip(spoken, speaking, strict=True)]

    def frame(self, pixels: Tensor) -> list[str | None]:
        """See one frame of every row; returns what each row says about it, None for silence."""
        return self.respond(self.wants_to_speak(self.see(pixels)))

    def ask(self, questions: Sequence[str | None]) -> list[str | None]:
        """Ask some rows a question; returns the answers, None where nobody asked."""
        self.hear(questions)
        return self.respond([question is not None for question in questions])

    @torch.inference_mode()
    def score(self, responses: Sequence[str | None]) -> list[Tensor | None]:
        """How the model would rate given responses if they were said now, without saying them.

        Returns, per row, log-probabilities (n, V) of the token after <assistant>, after the first word, and so on.
        """
        mark, position, fed = self.cache.mark(), list(self.position), [list(row) for row in self.fed]
        trace, self.trace = self.trace, None
        texts = [assistant_ids(self.words, text)[:-1] if text is not None else [] for text in responses]
        try:
            scores = self.feed(texts).float().log_softmax(-1) if any(texts) else None
        finally:
            self.cache.rewind(mark)
            self.position, self.fed, self.trace = position, fed, trace
        return [scores[row, : len(text)] if text else None for row, text in enumerate(texts)]
