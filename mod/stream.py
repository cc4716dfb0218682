"""Streaming inference: frames arrive one by one, answers leave one by one (paper, section 3.1).

A `Stream` owns everything that changes: the cache, the next position, the frame count. The model is only read, so any
number of streams share it. A stream may have several rows: B videos, each with a conversation of its own. A frame, a
question or an answer may come in some rows and not in others: then the others stand still.

    see(pixels)  feed one frame of every row      hear(questions)  feed what users ask
    respond(...) let some rows speak              frame, ask       the two together: what most callers want

The tokens fed for a timeline are those that `layout.lay_out` writes for it: both use the same two functions for text.

Read next: evaluate.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mod.block import PAD
from mod.config import StreamConfig
from mod.layout import Vocabulary, assistant_ids, user_ids
from mod.videollm import VideoLLM


def decides_to_speak(logits: Tensor, words: Vocabulary, threshold: float) -> Tensor:
    """Is staying silent (<eos>) less likely than the threshold? Logits (..., V) after a frame -> (...) bool."""
    return logits.float().softmax(-1)[..., words.eos] < threshold


class Stream:
    """B live streams through one model.

    settings   when to speak and what to forget
    max_words  a longer response is cut there, in tokens, and still closed with <eos>
    frames, text  room in the cache, per row: frames, and text tokens; with a window, at a time
    trace      a list that collects the routed layers' decisions, or None
    log        whether to note down in `fed` what is fed, which grows for ever: per row, (token id, frame) pairs; vision
               tokens have id 0, text has frame -1
    seen       per row, how many frames it has seen
    """

    def __init__(self, model: VideoLLM, words: Vocabulary, rows: int = 1, *, frames: int, text: int,
                 settings: StreamConfig | None = None, max_words: int = 12, trace: list | None = None,
                 log: bool = False):  # fmt: skip
        self.model, self.words, self.rows = model, words, rows
        self.settings, self.max_words, self.trace = settings or StreamConfig(), max_words, trace
        weight = model.decoder.embed.weight
        self.device = weight.device
        frames = min(frames, self.settings.most_frames)
        self.cache = model.open_cache(rows, frames, text, self.settings)
        self.seen, self.position, self.quiet = [0] * rows, [0] * rows, [0] * rows
        self.fed: list[list[tuple[int, int]]] | None = [[] for _ in range(rows)] if log else None
        self.no_frames = weight.new_zeros(0, model.config.frame_tokens, model.config.dim)
        # A response is words and a closing <eos>, never a turn symbol, whatever an untrained model prefers.
        self.never = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.never[[words.bos, words.user, words.assistant]] = True
        self.never[len(words) :] = True  # rows of the embedding that stand for no word
        self.never[words.eos] = False  # which some tokenizers begin a text with, too
        self.feed([[words.bos]] * rows)

    @torch.inference_mode()
    def _advance(self, chunks: list[list[tuple[int, int]]], seen: Tensor) -> Tensor:
        """Append a chunk of (token id, frame) pairs, which may be empty, to every row; `seen` are the frames in them.

        Returns logits (B, T, V), rows padded on the right. Raises UserError, with nothing fed, when the cache is full.
        """
        longest = max(len(chunk) for chunk in chunks)
        ids, frame, pos = (torch.full((self.rows, longest), fill, dtype=torch.long) for fill in (0, -1, PAD))
        for row, chunk in enumerate(chunks):
            if chunk:
                ids[row, : len(chunk)], frame[row, : len(chunk)] = torch.tensor(chunk).unbind(1)
                pos[row, : len(chunk)] = torch.arange(self.position[row], self.position[row] + len(chunk))
        ids, frame, pos = ids.to(self.device), frame.to(self.device), pos.to(self.device)
        hidden = self.model(ids, frame, pos, seen, cache=self.cache, trace=self.trace)
        for row, chunk in enumerate(chunks):
            self.position[row] += len(chunk)
            if self.fed is not None:
                self.fed[row] += chunk
        return self.model.decoder.logits(hidden)

    def feed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Append text, one id list a row, may be empty. Returns and raises as `_advance`."""
        return self._advance([[(token, -1) for token in text] for text in texts], self.no_frames)

    @torch.inference_mode()
    def see(self, pixels: Tensor, rows: Sequence[bool] | None = None) -> Tensor:
        """Feed one frame of every row, (B, 3, height, width) or features as `VideoLLM.see` takes them; with `rows`, of
        those rows alone, which `pixels` holds one after the other. Returns logits (B, V) after its last token, which
        mean nothing in other rows."""
        rows = rows or [True] * self.rows
        if len(pixels) != sum(rows):
            raise ValueError(f"got {len(pixels)} frames for {sum(rows)} streams, expected one each")
        size = self.model.config.frame_tokens
        chunks = [[(0, self.seen[row])] * size if sees else [] for row, sees in enumerate(rows)]
        logits = self._advance(chunks, self.model.see(pixels.to(self.device)))[:, -1]
        self.seen = [seen + sees for seen, sees in zip(self.seen, rows, strict=True)]
        return logits

    def wants_to_speak(self, logits: Tensor) -> list[bool]:
        """The streaming decision, from the logits (B, V) after a frame: is silence less likely than the threshold?"""
        return decides_to_speak(logits, self.words, self.settings.threshold).tolist()

    def hear(self, questions: Sequence[str | None]) -> None:
        """Feed a question of some rows' users; None where nobody asks."""
        self.feed([user_ids(self.words, question) if question is not None else [] for question in questions])

    def respond(self, speaking: Sequence[bool]) -> list[str | None]:
        """Let some rows speak, word by word, the most likely word each time; returns what each said, or None.

        Raises UserError, with nothing fed, when the cache has no room for the longest response.
        """
        self.cache.require(0, torch.tensor([self.max_words + 2 if row else 0 for row in speaking], device=self.device))
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

    def frame(self, pixels: Tensor, rows: Sequence[bool] | None = None) -> list[str | None]:
        """See one frame of every row, or of some as `see`; returns what each row says about it, None for silence.

        After a narration, `settings.refractory` frames are not narrated, whatever the model would say.
        Raises UserError, with nothing fed, when the cache has no room for the frame and the longest narration.
        """
        due, most = rows or [True] * self.rows, self.settings.most_frames
        # Once the window is full, a frame leaves for every frame that comes.
        frames = [sees and seen < most for sees, seen in zip(due, self.seen, strict=True)]
        text = [self.max_words + 2 if sees else 0 for sees in due]
        self.cache.require(torch.tensor(frames, device=self.device), torch.tensor(text, device=self.device))
        wants, speaks = self.wants_to_speak(self.see(pixels, rows)), [False] * self.rows
        for row, sees in enumerate(due):
            if sees:
                speaks[row] = wants[row] and not self.quiet[row]
                self.quiet[row] = self.settings.refractory if speaks[row] else max(0, self.quiet[row] - 1)
        return self.respond(speaks)

    def ask(self, questions: Sequence[str | None]) -> list[str | None]:
        """Ask some rows a question; returns the answers, None where nobody asked.

        Raises UserError, with nothing fed, when the cache has no room for the question and the longest answer.
        """
        longest = self.max_words + 2
        room = [0 if text is None else len(user_ids(self.words, text)) + longest for text in questions]
        self.cache.require(0, torch.tensor(room, device=self.device))
        self.hear(questions)
        return self.respond([question is not None for question in questions])

    @torch.inference_mode()
    def score(self, responses: Sequence[str | None]) -> list[Tensor | None]:
        """How the model would rate given responses if they were said now, without saying them.

        Returns, per row, log-probabilities (n, V) of the token after <assistant>, after the first word, and so on.
        """
        mark, position, fed = self.cache.mark(), list(self.position), [list(row) for row in self.fed or ()]
        trace, self.trace = self.trace, None
        texts = [assistant_ids(self.words, text)[:-1] if text is not None else [] for text in responses]
        try:
            scores = self.feed(texts).float().log_softmax(-1) if any(texts) else None
        finally:
            self.cache.rewind(mark)
            self.position, self.trace = position, trace
            self.fed = fed if self.fed is not None else None
        return [scores[row, : len(text)] if text else None for row, text in enumerate(texts)]

    def held(self, row: int = 0) -> tuple[int, int]:
        """Frames and text tokens that the cache still stands for."""
        first = self.cache.layers[0]  # every layer holds all of the text
        text = (first.frame[row] == -1) & (first.pos[row] < PAD)
        return min(self.seen[row], self.settings.most_frames), int(text.sum())

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """All that the next frame depends on: tensors, and plain numbers."""
        numbers = {"seen": list(self.seen), "position": list(self.position), "quiet": list(self.quiet)}
        return self.cache.state(), numbers | ({"window": self.cache.window.state()} if self.cache.window else {})

    def restore(self, tensors: dict[str, Tensor], numbers: dict) -> None:
        """Go on from what `state` gave, bit for bit. Raises UserError when it is another model's."""
        self.cache.restore(tensors)
        self.seen, self.position, self.quiet = (list(numbers[key]) for key in ("seen", "position", "quiet"))
        if self.cache.window:
            self.cache.window.restore(numbers["window"])
