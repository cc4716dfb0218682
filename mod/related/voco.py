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

How tokens are told apart: where the decoder takes a token's frame, the VoCo of frame f carry -2 - f (`codes`). Anything
negative is no vision token to the cache, so it keeps them; and an entry says by itself whose it is.

Unverified: training (nothing here is trained on data), and how embeddings of the VoCo begin.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from mod.block import PAD
from mod.cache import KVCache
from mod.router import ROUTER_STD


def codes(frame: Tensor, voco: Tensor) -> Tensor:
    """frame (..., T) of each vision token, voco (..., T) frame of each VoCo token, -1 elsewhere, as one number a token:
    the frame, -2 - frame, or -1 for text."""
    return torch.where(voco >= 0, -2 - voco, frame)


def owner(code: Tensor) -> Tensor:
    """Frame that a vision or VoCo token belongs to, -1 for text."""
    return torch.where(code <= -2, -2 - code, code)


def visible(pos: Tensor, code: Tensor, k_pos: Tensor, k_code: Tensor, first: Tensor, recurrent: bool = False,
            official_prefix: bool = False) -> Tensor:  # fmt: skip
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


def mask(frame: Tensor, voco: Tensor, recurrent: bool = False, official_prefix: bool = False) -> Tensor:
    """Who sees whom in a whole stream: frame, voco (T,), see `codes` -> (T, T) bool, query by key."""
    code, pos = codes(frame, voco)[None], torch.arange(len(frame), device=frame.device)[None]
    first = pos.where(owner(code) >= 0, PAD).amin(1)
    return visible(pos, code, pos, code, first, recurrent, official_prefix)[0]


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
        self.tokens = nn.Parameter(torch.randn(k, dim) * ROUTER_STD)

    def forward(self, x: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), frame (T,), the same in all rows -> x (B, T', D) with VoCo tokens, frame and voco (T',)."""
        frame, voco, source = lay_out(frame, len(self.tokens))
        with_voco = x[:, source.clamp(min=0)]
        with_voco[:, voco >= 0] = self.tokens[-1 - source[voco >= 0]].to(x.dtype)
        return with_voco, frame, voco


class Masked:
    """Stands in for a cache in one pass over whole streams: hands keys and values through, with a mask of one's own.

    sees (T, T) or (B, T, T) bool, query by key; every token must see one key at least. Stores nothing, so gradients
    pass. It serves as the cache of a decoder and as that of each layer.
    """

    def __init__(self, sees: Tensor, depth: int = 0):
        self.sees = sees[None] if sees.ndim == 2 else sees
        self.layers = [self] * depth

    def make_room(self, pos: Tensor, frame: Tensor) -> None:
        pass

    def places(self, pos: Tensor) -> Tensor:
        return pos

    def append(self, k: Tensor, v: Tensor, pos: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return k, v, rearrange(self.sees, "b t s -> b 1 t s")


def stays(code: Tensor, k: int) -> Tensor:
    """Which entries of a cache stay, code (B, S) -> (B, S) bool: all but the vision tokens of frames whose k VoCo
    tokens are there."""
    compressed = (rearrange(code, "b s -> b 1 s") == rearrange(-2 - code, "b s -> b s 1")).sum(-1) >= k
    return ~((code >= 0) & compressed)


class VoCoCache:
    """A stream's KVCache under VoCo-LLaMA's rule. Pass `codes` as the frame; call `evict` after each frame.

    Make the KVCache from a config without routed layers and without a window; a VoCo token counts as text. A chunk may
    hold any number of whole frames with their VoCo tokens: what they see does not depend on how a stream is cut.
    """

    class Layer:
        def __init__(self, inner, whole: "VoCoCache"):
            self.inner, self.whole = inner, whole

        def __getattr__(self, name: str):
            """Everything else is the LayerCache's."""
            return getattr(self.__dict__["inner"], name)

        def places(self, pos: Tensor) -> Tensor:
            return self.inner.places(pos)

        def append(self, k: Tensor, v: Tensor, pos: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            k, v, sees = self.inner.append(k, v, pos, frame)
            k_pos, k_code = (stored[:, : k.shape[2]] for stored in (self.inner.pos, self.inner.frame))
            rule = visible(pos, frame, k_pos, k_code, self.whole.first, **self.whole.rule)
            return k, v, sees & rearrange(rule, "b t s -> b 1 t s")

    def __init__(self, cache: KVCache, k: int, recurrent: bool = False, official_prefix: bool = False):
        self.cache, self.k = cache, k
        self.rule = {"recurrent": recurrent, "official_prefix": official_prefix}
        self.first = torch.full_like(cache.layers[0].length, PAD)  # remembered: with k = 0 no entry would tell
        self.layers = [self.Layer(layer, self) for layer in cache.layers]

    def __getattr__(self, name: str):
        """Everything else is the KVCache's."""
        return getattr(self.__dict__["cache"], name)

    def make_room(self, pos: Tensor, frame: Tensor) -> None:
        self.cache.make_room(pos, frame)
        self.first = torch.minimum(self.first, pos.where(owner(frame) >= 0, PAD).amin(1))

    def state(self) -> dict[str, Tensor]:
        return self.cache.state() | {"first": self.first.clone()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.cache.restore(tensors)
        self.first = tensors["first"].to(self.first.device)

    def evict(self) -> None:
        """Drop the keys and values of every frame that has been compressed, in every layer."""
        for layer in self.cache.layers:
            code = layer.frame.where(layer.pos < PAD, -1)
            gone = ~stays(code, self.k)
            for number in code[gone].unique().tolist():
                mine = gone & (code == number)
                # A frame's vision tokens stand together, so a span of positions is those and nothing else.
                start = layer.pos.where(mine, PAD).amin(1).where(mine.any(1), 0)
                layer.forget(start, start + mine.sum(1), None)
                code = layer.frame.where(layer.pos < PAD, -1)
                gone = ~stays(code, self.k)
