"""One interface for what other systems do to a frame's tokens before the decoder: tokens in, fewer (or more) out.

A system here is a `Reducer`: it is given what the vision encoder made of some frames and returns `VisionTokens`, which
say which of them are real, where they come from and, where the system is linear, by which weights. `scope` says what
the tokens of a frame may depend on, and so whether the system can run while frames are still coming:

    frame   on that frame alone             prefix  on it and earlier frames of its stream         both run online
    clip    on all frames of the stream     query   on the question, which must then be known before the frames
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SCOPES = ("frame", "prefix", "clip", "query")
ONLINE = ("frame", "prefix")


@dataclass
class Seen:
    """What a system may look at, of F frames in the order of their streams and of time.

    tokens     (F, N, D) a summary (CLS) and then the h*w patches in raster order
    attention  (F, h*w) how much the encoder's summary looks at each patch, rows sum to one; None where nobody needs it
    keys       (F, h*w, E) the keys by which it looks; None where nobody needs them
    row        (F,) which stream of the batch a frame belongs to, rising
    number     (F,) which frame of its stream it is, from 0; None where all frames of the streams are here
    query      (B, D) one vector for each stream's question; None where nothing has been asked
    """

    tokens: Tensor
    attention: Tensor | None = None
    keys: Tensor | None = None
    row: Tensor | None = None
    query: Tensor | None = None
    number: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """(F, h*w, D), without the summary."""
        return self.tokens[:, 1:]

    @property
    def side(self) -> int:
        """h = w, patches per side."""
        return round((self.tokens.shape[1] - 1) ** 0.5)

    @property
    def rows(self) -> Tensor:
        """(F,) the stream of each frame; all are of one where nothing else is said."""
        return self.row if self.row is not None else torch.zeros(len(self.tokens), dtype=torch.long)

    @property
    def numbers(self) -> Tensor:
        """(F,) the number of each frame in its stream."""
        if self.number is not None:
            return self.number.to(self.tokens.device)
        rows = self.rows.to(self.tokens.device)
        return torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)


@dataclass
class VisionTokens:
    """What a system hands on to the decoder, for F frames.

    x      (F, n, D) tokens, padded on the right to the largest number in the batch
    valid  (F, n) bool, which of them are real; the real ones come first
    place  (F, n) the token of the frame (0 is the CLS) at which each stands, rising among the real ones; of a token
           that stands for several, the first of these
    merge  (F, n, N) weights by which x = merge @ tokens; None where the system is not linear for a given choice
    """

    x: Tensor
    valid: Tensor
    place: Tensor
    merge: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """(F,) real tokens of each frame."""
        return self.valid.sum(1)


class Reducer(nn.Module):
    """A system that changes which tokens of a frame enter the decoder. Subclasses set `scope` and `line`.

    `most` is the largest number of tokens that a frame may come out with, which is what has to be set aside for it.
    """

    scope = "frame"
    line = ""  # what it does, in one line
    looks = False  # does it need to know where the encoder's summary looks, and by which keys?

    def most(self, tokens: int) -> int:
        """At most so many come out of N = tokens."""
        raise NotImplementedError

    def forward(self, seen: Seen) -> VisionTokens:
        raise NotImplementedError

    def remembered(self, seen: Seen) -> Tensor | None:
        """(F,) of each frame, which frame of `seen` later ones would still have to be shown, before themselves, if the
        stream came in parts. None where a frame needs no other."""
        return None

    @property
    def online(self) -> bool:
        return self.scope in ONLINE


def merged(tokens: Tensor, merge: Tensor, valid: Tensor, place: Tensor) -> VisionTokens:
    """The VisionTokens of a linear system: tokens (F, N, D), merge (F, n, N)."""
    merge = merge * valid[..., None]
    return VisionTokens(merge.to(tokens.dtype) @ tokens, valid, place, merge)


def chosen(tokens: Tensor, keep: Tensor) -> VisionTokens:
    """Of tokens (F, N, D) those that `keep` (F, N) says, in their order, moved to the left."""
    counts = keep.sum(1)
    order = keep.logical_not().int().argsort(dim=1, stable=True)[:, : max(1, int(counts.max()))]
    frame = torch.arange(len(tokens), device=tokens.device)[:, None]
    valid = torch.arange(order.shape[1], device=tokens.device) < counts[:, None]
    merge = torch.zeros(*order.shape, tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    merge[frame, torch.arange(order.shape[1], device=tokens.device), order] = 1
    x = tokens[frame, order].masked_fill(~valid[..., None], 0)  # copies, bit for bit
    return VisionTokens(x, valid, order, merge * valid[..., None])
