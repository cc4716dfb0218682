"""VoCo-LLaMA (2406.12275): the language model compresses each frame into K tokens, through a mask alone.

    <bos> text | vision of frame 0, VoCo of frame 0 | text | vision of frame 1, VoCo of frame 1 | text ...

After each frame's vision tokens come K learned VoCo tokens. They see the frame, and text sees them but never the frame:
once they have been computed, the frame's keys and values can be dropped from every layer (`evict`), and nothing that
comes later notices. One pass over everything under `mask` and the stream with eviction are the same computation.

From the paper's project page and checked in the authors' code: the mask, ordinary next-token loss (no distillation
term), for inference a first pass over vision and VoCo of which only the VoCo's keys and values stay, at original
positions. By a secondary source: for video, frames compressed one by one, and their VoCo tokens read in order of time.
The paper's headline has K = 1; the released code fixes 2.

`recurrent=False` (the paper's): a frame's tokens see their own frame and the text before the first frame. So the VoCo
of a frame depend on that frame alone; that text between frames is hidden from them, since it has read other frames,
is ours. `recurrent=True` [ours]: they see all earlier text and VoCo tokens as well, no other frame's vision tokens.

Quirk, behind `official_prefix=True`: in the authors' code text after the VoCo sees keys from the first VoCo on, and
with the image the system prompt before it is hidden, too. Here text sees text, unless asked. With several frames the
quirk is taken to hide the text before the first frame from all text after it [ours].

How tokens are told apart: a vision token carries the number f of its frame, a VoCo token -2 - f, text -1 (`codes`). The
cache stores the code beside the position, so an entry says by itself whose it is.

Unverified: training (nothing here is trained on data), and how embeddings of the VoCo begin.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from mod.config import ModelConfig
from mod.layers import PAD
from mod.related.ragged import CountingCache, CountingLayer


def codes(frame: Tensor, voco: Tensor) -> Tensor:
    """frame (..., T) of each vision token, voco (..., T) frame of each VoCo token, -1 elsewhere, as one number per
    token: the frame, -2 - frame, or -1 for text."""
    return torch.where(voco >= 0, -2 - voco, frame)


def owner(code: Tensor) -> Tensor:
    """Frame that a vision or VoCo token belongs to, -1 for text."""
    return torch.where(code <= -2, -2 - code, code)


def visible(
    pos: Tensor, code: Tensor, k_pos: Tensor, k_code: Tensor, first: Tensor, recurrent: bool = False,
    official_prefix: bool = False,
) -> Tensor:
    """The rule: pos, code (B, T) of queries, k_pos, k_code (B, S) of keys -> which keys they see, (B, T, S) bool.

    first (B,) is the position of the stream's first vision token, PAD where there is none yet.
    """
    pos, code = rearrange(pos, "b t -> b t 1"), rearrange(code, "b t -> b t 1")
    k_pos, k_code = rearrange(k_pos, "b s -> b 1 s"), rearrange(k_code, "b s -> b 1 s")
    first, other = rearrange(first, "b -> b 1 1"), owner(code) != owner(k_code)
    sees = (k_pos <= pos) & ~((k_code >= 0) & other)  # vision tokens are seen within their own frame alone
    if not recurrent:
        sees = sees & ~((owner(code) >= 0) & other & (k_pos >= first))
    if official_prefix:
        sees = sees & ~((owner(code) < 0) & (pos >= first) & (k_pos < first))
    return sees


def mask(pos: Tensor, code: Tensor, recurrent: bool = False, official_prefix: bool = False) -> Tensor:
    """Who sees whom in whole streams: pos, code (B, T) -> (B, T, T) bool, query by key."""
    first = pos.where(owner(code) >= 0, PAD).amin(1)
    sees = visible(pos, code, pos, code, first, recurrent, official_prefix)
    return sees | (pos >= PAD)[:, :, None]  # padding sees everything, or its softmax would be nan


def lay_out(frame: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stream's frame (T,) -> frame, voco and source (T',), with k VoCo tokens after each frame.

    source is the place of each token in the stream before, -1 - i for the i-th VoCo token of its frame.
    """
    frames, vocos, sources = [], [], []
    row = frame.tolist()
    for place, (number, after) in enumerate(zip(row, [*row[1:], -1], strict=True)):
        frames, vocos, sources = [*frames, number], [*vocos, -1], [*sources, place]
        if number >= 0 and after != number:
            frames, vocos, sources = frames + [-1] * k, vocos + [number] * k, sources + [-1 - i for i in range(k)]
    return tuple(torch.tensor(values, dtype=torch.long, device=frame.device) for values in (frames, vocos, sources))


class VoCo(nn.Module):
    """K learned embeddings, shared by all frames, and where they go."""

    def __init__(self, dim: int, k: int = 1):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(k, dim) * 0.02)

    def forward(self, x: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), frame (T,), the same in all rows -> x (B, T', D) with VoCo tokens, frame and voco (T',)."""
        frame, voco, source = lay_out(frame, len(self.tokens))
        with_voco = x[:, source.clamp(min=0)]
        with_voco[:, voco >= 0] = self.tokens[-1 - source[voco >= 0]].to(x.dtype)
        return with_voco, frame, voco


def stays(code: Tensor, k: int) -> Tensor:
    """Which entries of a cache stay, code (B, S) -> (B, S) bool: all but the vision tokens of frames whose k VoCo
    tokens are there."""
    compressed = (rearrange(code, "b s -> b 1 s") == rearrange(-2 - code, "b s -> b s 1")).sum(-1) >= k
    return ~((code >= 0) & compressed)


class VoCoLayer(CountingLayer):
    """A layer's keys and values with the code of each entry, (B, slots)."""

    def __init__(self, *size):
        super().__init__(*size)
        self.code = torch.full_like(self.pos, -1)
        self.whole: VoCoCache | None = None  # which knows the rule

    def append(self, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v, sees = super().append(k, v, pos)
        code, held = self.whole.code, slice(0, self.longest)
        self.code[self.row, self.slots] = code
        rule = visible(pos, code, self.pos[:, held], self.code[:, held], self.whole.first, **self.whole.rule)
        return k, v, sees & rule | (pos >= PAD)[:, :, None]  # padding sees something, or its softmax would be nan

    def grow(self, slots: int) -> None:
        super().grow(slots)
        more = self.pos.shape[1] - self.code.shape[1]
        self.code = torch.cat((self.code, self.code.new_full((len(self.code), more), -1)), 1)

    def drop(self, gone: Tensor) -> None:
        """Forget the entries that gone (B, S) says, S up to the longest row, and close ranks."""
        used = gone.shape[1]
        # A stable sort puts what stays first, in its order.
        order, row = gone.int().argsort(dim=1, stable=True), self.row
        self.pos[:, :used] = self.pos[:, :used].masked_fill(gone, PAD)[row, order]
        self.code[:, :used] = self.code[row, order]
        for stored in (self.k, self.v):
            stored[:, :, :used] = rearrange(stored[row, :, order], "b s g e -> b g s e")
        self.lengths = (torch.tensor(self.lengths) - gone.sum(1).cpu()).tolist()
        self.longest = max(self.lengths)


class VoCoCache(CountingCache):
    """A stream's memory under VoCo-LLaMA's rule. Tell `coming` of each chunk's codes before it, and `evict` after it.

    A chunk may hold any number of whole frames with their VoCo tokens: what they see does not depend on how a stream is
    cut.
    """

    layer, no_window = VoCoLayer, "VoCo's cache holds no frames"

    def __init__(
        self, config: ModelConfig, rows: int = 1, dtype: torch.dtype = torch.float32, device="cpu", *, k: int,
        recurrent: bool = False, official_prefix: bool = False,
    ):
        super().__init__(config, rows, dtype, device)
        self.k, self.rule = k, {"recurrent": recurrent, "official_prefix": official_prefix}
        # The position of each row's first vision token. Remembered: with k = 0 no entry would tell.
        self.first = torch.full((rows,), PAD, device=device)
        self.code = torch.zeros(rows, 0)  # (B, T) of the coming tokens
        for layer in self.layers:
            layer.whole = self

    def coming(self, pos: Tensor, code: Tensor) -> None:
        """Tokens of these codes (B, T) come next, at pos (B, T), PAD for padding on the right."""
        self.places, self.code = pos, code
        self.first = torch.minimum(self.first, pos.where(owner(code) >= 0, PAD).amin(1))

    def evict(self) -> None:
        """Drop the keys and values of every frame that has been compressed, in every layer."""
        for layer in self.layers:
            used = slice(0, layer.longest)
            gone = ~stays(layer.code[:, used].where(layer.pos[:, used] < PAD, -1), self.k)
            if gone.any():
                layer.drop(gone)

    def more(self) -> dict[str, Tensor]:
        return super().more() | {"first": self.first, "code": self.layers[0].code[:, : self.layers[0].longest].clone()}

    def restore_more(self, tensors: dict[str, Tensor]) -> None:
        super().restore_more(tensors)
        self.first = tensors["first"]
        for layer in self.layers:
            layer.code[:, : layer.longest] = tensors["code"]

    def mark(self) -> tuple:
        return super().mark(), self.first

    def rewind(self, mark: tuple) -> None:
        held, self.first = mark
        super().rewind(held)
