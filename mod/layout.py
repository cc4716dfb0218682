"""A conversation about a video as one row of tokens, with the labels beside it (paper, section 3.1).

  <bos> [frame 0] [frame 1] <assistant> red disc appears top <eos> [frame 2] <user> where is it ? <assistant> ...

Labels are built from token ids, one position early: the label of position i is the token that should come next.

    last token of a frame, nobody speaks   -> <eos>, "stay silent"                  streaming loss
    last token of a frame, assistant next  -> <assistant>, the response's first     streaming loss
    last token of a frame, user next       -> none: users decide when they speak
    question's end, answer words           -> the next token, <eos> last            LM loss
    everything else                        -> none

The decision to notice: *which* tokens a routed layer keeps depends on the data, but *how many* of each frame it keeps,
and where their slots lie in its short row, does not. The `Plan` therefore knows every shape before the model runs, and
the model never has to ask the device for a number.

DEVIATION: a silent frame leaves nothing behind. The predicted <eos> is not fed and the next frame simply follows;
VideoLLM-online's code feeds a separator between frames.

Read next: router.py
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from mod.config import UserError
from mod.layers import PAD

NO_LABEL = -100
TEXT, PADDING = -1, -2  # stand in for the number of a frame


class Vocabulary:
    """Words to ids and back. A closed list of words: the synthetic stream needs no tokenizer."""

    def __init__(self, words: Sequence[str]):
        self.words = ["<bos>", "<eos>", "<user>", "<assistant>", *words]
        self.ids = {word: number for number, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError("the vocabulary holds a word twice")
        self.bos, self.eos, self.user, self.assistant = range(4)
        # What stands around a turn's words; a checkpoint's own format may need several tokens (mod/real/tokenizer.py).
        self.opening, self.closing = {"user": [self.user], "assistant": [self.assistant]}, {"user": [], "assistant": []}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        unknown = [word for word in text.split() if self.ids.get(word, 0) <= self.assistant]  # symbols are no words
        if unknown:
            known = " ".join(self.words[4:])
            raise UserError(f"got the unknown word {unknown[0]!r} in {text!r}; known words are: {known}")
        return [self.ids[word] for word in text.split()]

    def typed(self, text: str) -> str:
        """What somebody typed, as the stream spells it: in lower case, question marks apart."""
        return " ".join(text.lower().replace("?", " ? ").split())

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] if i < len(self.words) else f"<{i}>" for i in ids)


@dataclass(frozen=True)
class Say:
    """Something said after frame `frame`: by the "user" (a question) or the "assistant" (a narration or an answer).

    Frame -1: before the first frame.
    """

    frame: int
    role: str
    text: str


def user_ids(words: Vocabulary, text: str) -> list[int]:
    """The tokens of a question: training and streaming both build it here."""
    return [*words.opening["user"], *words.encode(text), *words.closing["user"]]


def reply_ids(words: Vocabulary, text: str) -> list[int]:
    """The tokens of a response that the model chooses: words and the closing <eos>."""
    return [*words.encode(text), words.eos]


def assistant_ids(words: Vocabulary, text: str) -> list[int]:
    """The tokens of a whole response."""
    return [*words.opening["assistant"], *reply_ids(words, text), *words.closing["assistant"]]


@dataclass
class Layout:
    """One stream as parallel rows of length T; `frame` is TEXT for text; the ids of vision tokens are 0, never read."""

    ids: list[int] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def append(self, frame: int, ids: Sequence[int], labels: Sequence[int]) -> None:
        self.ids += ids
        self.frame += [frame] * len(ids)
        self.labels += labels


def lay_out(words: Vocabulary, frames: int, frame_tokens: int, said: Sequence[Say]) -> Layout:
    """A stream of `frames` frames of N = frame_tokens tokens, and what is said after each, in the order given.

    Raises UserError when something is said after a frame that does not exist.
    """
    late = [say for say in said if not -1 <= say.frame < frames]
    if late:
        raise UserError(f"got {late[0].text!r} after frame {late[0].frame}, expected a frame from -1 to {frames - 1}")
    layout = Layout()
    layout.append(TEXT, [words.bos], [NO_LABEL])
    for t in range(-1, frames):
        turns = [say for say in said if say.frame == t]
        if t >= 0:
            first = turns[0].role if turns else "nobody"
            label = {"nobody": words.eos, "assistant": words.assistant, "user": NO_LABEL}[first]
            layout.append(t, [0] * frame_tokens, [NO_LABEL] * (frame_tokens - 1) + [label])
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                ids, chosen = assistant_ids(words, turn.text), reply_ids(words, turn.text)
                labels = [NO_LABEL] * (len(words.opening["assistant"]) - 1) + chosen
                layout.append(TEXT, ids, labels + [NO_LABEL] * (len(ids) - len(labels)))
            else:
                ids = user_ids(words, turn.text)
                answered = any(after.role == "assistant" for after in turns[number + 1 : number + 2])
                layout.append(TEXT, ids, [NO_LABEL] * (len(ids) - 1) + [words.assistant if answered else NO_LABEL])
    return layout


class Route(NamedTuple):
    """The short row of a layer that keeps k tokens of each frame, for B streams. A flat index is b * T + t."""

    index: Tensor  # (B, K) flat index of the token in each slot; those of frames are the router's to fill in
    real: Tensor  # (B, K) bool, False where a row has fewer than K tokens
    slots: Tensor  # (F, k) flat slots, b * K + j, of the tokens that are kept of every frame


class Plan(NamedTuple):
    """Where the tokens of a batch, or of the next chunk of B streams, lie in every layer."""

    pos: Tensor  # (B, T) position of each token in its stream, PAD for padding
    vision: Tensor  # (F, N) flat indices of every frame's tokens
    routes: dict[int, Route]  # by keep count k, N among them
    counts: dict[int, tuple[int, ...]]  # by keep count: how many tokens of each row enter such a layer, on the host

    def to(self, device: torch.device | str) -> "Plan":
        return to_device(self, device)


def make_plan(frame: np.ndarray, start: Sequence[int], frame_tokens: int, keep_counts: Collection[int]) -> Plan:
    """The plan of tokens whose frames are `frame` (B, T), TEXT for text and PADDING on the right; row b begins at
    position start[b]. Made on the host, with NumPy. Raises ValueError when a frame is not whole.

    An example with N = 3 and k = 1: of `<bos> A A A word` the short row is [0, 1, 4], and slot 1 is the frame's. When
    the router picks the third A it writes 3 there: [0, 3, 4].
    """
    rows, length = frame.shape
    real, vision = frame != PADDING, np.flatnonzero(frame >= 0)
    if vision.size % frame_tokens or (np.diff(vision.reshape(-1, frame_tokens)) != 1).any():
        raise ValueError(f"got {vision.size} vision tokens, expected whole frames of {frame_tokens}; do not split one")
    vision = vision.reshape(-1, frame_tokens)
    routes, counts = {}, {}
    for k in sorted({frame_tokens, *keep_counts}):
        # As if every frame kept its first k: the slots would be the same.
        keep = real.copy()
        keep.ravel()[vision[:, k:]] = False
        counts[k] = tuple(keep.sum(1).tolist())
        index = np.argsort(~keep, axis=1, kind="stable")[:, : max(counts[k], default=0)]
        kept, seen = (np.take_along_axis(values, index, 1) for values in (keep, frame))
        slots = np.flatnonzero(kept & (seen >= 0)).reshape(len(vision), k)
        index = index + length * np.arange(rows)[:, None]
        routes[k] = Route(*map(torch.from_numpy, (index, kept, slots)))
    pos = np.where(real, np.asarray(start)[:, None] + np.arange(length), PAD)
    return Plan(torch.from_numpy(pos), torch.from_numpy(vision), routes, counts)


def to_device(tree, device: torch.device | str):
    """The same tuple or dict with its tensors on a device; nothing waits for them. On a GPU those of whole numbers and
    booleans go there in one copy."""
    if torch.device(device).type != "cuda":
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)
    leaves, shape = tree_flatten(tree)
    index = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and not x.is_floating_point()}
    flat = torch.cat([x.flatten().long() for x in index.values()]).pin_memory().to(device, non_blocking=True)
    for (i, x), part in zip(index.items(), flat.split([x.numel() for x in index.values()]), strict=True):
        leaves[i] = part.view(x.shape).to(x.dtype)
    rest = tree_unflatten(leaves, shape)
    return tree_map_only(Tensor, lambda x: x if x.is_cuda else x.pin_memory().to(device, non_blocking=True), rest)


class Batch(NamedTuple):
    """B streams, padded on the right to T tokens, of which L have a label."""

    ids: Tensor  # (B, T)
    plan: Plan
    labelled: Tensor  # (L,) flat indices of the tokens that have a label, row by row
    labels: Tensor  # (L,) what should come next there
    streaming: Tensor  # (L,) bool, is it a speak-or-stay-silent decision?
    pixels: Tensor  # (F, 3, side, side) frames of all rows, in order
    counts: tuple[int, int]  # text labels, streaming labels; on the host

    def to(self, device: torch.device | str) -> "Batch":
        return to_device(self, device)


def collate(layouts: Sequence[Layout], pixels: Tensor, frame_tokens: int, keep_counts: Collection[int]) -> Batch:
    """Pad rows on the right, and plan where their tokens lie. Raises ValueError when a frame is not whole."""
    longest = max(len(layout.ids) for layout in layouts)

    def rows(name: str, fill: int) -> np.ndarray:
        return np.array([[*getattr(one, name), *[fill] * (longest - len(one.ids))] for one in layouts])

    frame, labels = rows("frame", PADDING), rows("labels", NO_LABEL).ravel()
    labelled = np.flatnonzero(labels != NO_LABEL)
    streaming = frame.ravel()[labelled] >= 0  # decisions stand at vision tokens, and no other labels do
    plan = make_plan(frame, [0] * len(layouts), frame_tokens, keep_counts)
    ids, *rest = map(torch.from_numpy, (rows("ids", 0), labelled, labels[labelled], streaming))
    decisions = int(streaming.sum())
    return Batch(ids, plan, *rest, pixels, (len(labelled) - decisions, decisions))
