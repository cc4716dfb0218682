"""A conversation about a video as one row of tokens, with the labels beside it (paper, section 3.1).

  <bos> [frame 0] [frame 1] <assistant> red disc appears top <eos> [frame 2] <user> where is it ? <assistant> ...

Labels are built from token ids, one position early: the label of position i is the token that should come next.

    last token of a frame, nobody speaks   -> <eos>, "stay silent"                  streaming loss
    last token of a frame, assistant next  -> <assistant>, the response's first     streaming loss
    last token of a frame, user next       -> none: when users speak is theirs to decide
    question's end, answer words           -> the next token, <eos> last            LM loss
    everything else                        -> none

DEVIATION: a silent frame leaves nothing behind. The predicted <eos> is not fed and the next frame simply follows;
VideoLLM-online's code feeds a separator between frames.

Read next: videollm.py
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mod.block import PAD
from mod.config import UserError

NO_LABEL = -100


class Vocabulary:
    """Words to ids and back. A closed list of words: the synthetic stream needs no tokenizer."""

    def __init__(self, words: Sequence[str]):
        self.words = ["<bos>", "<eos>", "<user>", "<assistant>", *words]
        self.ids = {word: number for number, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError("the vocabulary holds a word twice")
        self.bos, self.eos, self.user, self.assistant = range(4)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        unknown = [word for word in text.split() if word not in self.ids]
        if unknown:
            raise UserError(
                f"got the unknown word {unknown[0]!r} in {text!r}; known words are: {' '.join(self.words[4:])}"
            )
        return [self.ids[word] for word in text.split()]

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


def user_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    """The tokens of a question: training and streaming both build it here."""
    return [vocabulary.user, *vocabulary.encode(text)]


def assistant_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    """The tokens of a response, closing <eos> included."""
    return [vocabulary.assistant, *vocabulary.encode(text), vocabulary.eos]


@dataclass
class Layout:
    """One stream as parallel rows of length T; `frame` is -1 for text; the ids of vision tokens are 0, never read."""

    ids: list[int] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    streaming: list[bool] = field(default_factory=list)  # is the label a speak-or-stay-silent decision?

    def text(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        self.ids += ids
        self.frame += [-1] * len(ids)
        self.labels += labels
        self.streaming += [False] * len(ids)

    def image(self, frame: int, tokens: int, label: int) -> None:
        self.ids += [0] * tokens
        self.frame += [frame] * tokens
        self.labels += [NO_LABEL] * (tokens - 1) + [label]
        self.streaming += [False] * (tokens - 1) + [label != NO_LABEL]


def lay_out(vocabulary: Vocabulary, frames: int, frame_tokens: int, said: Sequence[Say]) -> Layout:
    """A stream of `frames` frames of N = frame_tokens tokens, and what is said after each, in the order given;
    after frame -1 is before the first.

    Raises UserError when something is said after a frame that does not exist.
    """
    late = [say for say in said if not -1 <= say.frame < frames]
    if late:
        raise UserError(f"got {late[0].text!r} after frame {late[0].frame}, expected a frame from -1 to {frames - 1}")
    layout = Layout()
    layout.text([vocabulary.bos], [NO_LABEL])
    for t in range(-1, frames):
        turns = [say for say in said if say.frame == t]
        if t < 0:
            pass  # what users say before the first frame
        elif not turns:
            layout.image(t, frame_tokens, vocabulary.eos)
        elif turns[0].role == "assistant":
            layout.image(t, frame_tokens, vocabulary.assistant)
        else:
            layout.image(t, frame_tokens, NO_LABEL)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                ids = assistant_ids(vocabulary, turn.text)
                layout.text(ids, [*ids[1:], NO_LABEL])
            else:
                ids = user_ids(vocabulary, turn.text)
                answered = any(after.role == "assistant" for after in turns[number + 1 : number + 2])
                layout.text(ids, [NO_LABEL] * (len(ids) - 1) + [vocabulary.assistant if answered else NO_LABEL])
    return layout


def show(layout: Layout, vocabulary: Vocabulary) -> str:
    """The layout as a table of position, token, frame and label, one line a token; the middle of a frame is folded."""
    lines = [f"{'position':>8}  {'token':<14} {'frame':>5}  label"]
    for position, (token, frame, label) in enumerate(zip(layout.ids, layout.frame, layout.labels, strict=True)):
        folded = frame >= 0 and label == NO_LABEL and position + 1 < len(layout.ids)
        if folded and layout.frame[position - 1] == frame and layout.frame[position + 1] == frame:
            if not lines[-1].endswith("..."):
                lines.append(f"{'...':>8}")
            continue
        word = "<v>" if frame >= 0 else vocabulary.words[token]
        meaning = "" if label == NO_LABEL else vocabulary.words[label]
        if layout.streaming[position]:
            meaning += "   (streaming: " + ("stay silent)" if label == vocabulary.eos else "speak)")
        lines.append(f"{position:>8}  {word:<14} {frame if frame >= 0 else '':>5}  {meaning}".rstrip())
    return "\n".join(lines)


@dataclass
class Batch:
    """B streams, padded on the right to T tokens; `pixels` are the frames (F, 3, side, side) of all rows, in order."""

    ids: Tensor
    frame: Tensor
    pos: Tensor
    labels: Tensor
    streaming: Tensor
    pixels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def collate(layouts: Sequence[Layout], pixels: Tensor) -> Batch:
    """Pad rows on the right. A padded token is text at position PAD, which no real token can see."""
    longest = max(len(layout.ids) for layout in layouts)

    def rows(name: str, fill, dtype) -> Tensor:
        return torch.tensor(
            [[*getattr(layout, name), *[fill] * (longest - len(layout.ids))] for layout in layouts],
            dtype=dtype,
        )

    step = torch.arange(longest).expand(len(layouts), -1)
    lengths = torch.tensor([len(layout.ids) for layout in layouts])
    return Batch(
        ids=rows("ids", 0, torch.long),
        frame=rows("frame", -1, torch.long),
        pos=step.where(step < lengths[:, None], PAD),
        labels=rows("labels", NO_LABEL, torch.long),
        streaming=rows("streaming", False, torch.bool),
        pixels=pixels,
    )
