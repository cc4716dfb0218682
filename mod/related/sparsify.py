"""Key frames and novelty: some frames keep every patch, the others only those that show something new.

VTS-style, after Video Token Sparsification (2409.11182). From the paper's abstract: driving frames in a row are nearly
equal; a light convolutional network picks key frames and prunes the less informative tokens of the others; up to 33%
more throughput and 28% less memory without loss on DRAMA and LingoQA. In a secondary source only: about 40% fewer
visual tokens, a frozen vision encoder. The section on the method could not be checked, nor was there any code to read,
so every one of the following choices is ours and may differ from the paper's:

    the score z of a patch   two convolutions over the grid of vision tokens; the paper's network is one that proposes
                             before the vision encoder, and so presumably sees pixels, which a Reducer does not
    key frames, "clip"       the `keys` frames of a stream with the largest mean softplus(z); all frames must be known
    key frames, "stream"     a frame whose patches differ by more than `tau` in the mean from those of the last key
                             frame, and the first; nothing looks ahead and only the last key frame must be remembered
    novelty of a patch       sigmoid(z) * (1 - cosine with the patch at its place in the key frame); with several key
                             frames with the one most like it
    what is kept             the ceil(rho * patches) newest of each other frame, earlier ones first among equals, in
                             raster order at their old places; and the CLS token of every frame
    how the scorer learns    a patch is multiplied by 1 + (s - stopgrad(s)), s = sigmoid(z): its value stays, and its
                             gradient reaches the scorer

A stream of T frames, K of them key, keeps (K + (T - K) * rho) / T of its patches.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mod.config import keep_count
from mod.related.base import Reducer, Seen, VisionTokens, chosen

MODES = ("clip", "stream")


def difference(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of the last axes, (..., D) and (..., D) -> (...), from 0 to 2."""
    # As half the squared distance of unit vectors it is exactly 0 for equal ones, which 1 - cosine is not.
    return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1) / 2


class VTS(Reducer):
    """Key frames whole, of the others the CLS token and ceil(rho * patches) patches."""

    line = "key frames whole, of the others what is new"

    def __init__(
        self, width: int, rho: float = 0.5, mode: str = "clip", keys: int = 1, tau: float = 0.3, novelty: bool = True,
        hidden: int = 16,
    ):
        """tau is for "stream", keys for "clip"; without novelty a patch is kept for its score alone."""
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if not 0 <= rho <= 1 or keys < 1:
            raise ValueError(f"need rho from 0 to 1 and a key frame: {rho=}, {keys=}")
        self.scope = "prefix" if mode == "stream" else "clip"
        self.rho, self.mode, self.keys, self.tau, self.novelty = rho, mode, keys, tau, novelty
        self.scorer = nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, 1, 1))

    def most(self, tokens: int) -> int:
        return tokens

    def scores(self, seen: Seen) -> Tensor:
        """z (F, P), one for each patch, from it and its neighbours."""
        return rearrange(
            self.scorer(rearrange(seen.patches, "f (h w) d -> f d h w", h=seen.side)), "f 1 h w -> f (h w)"
        )

    def key_frames(self, seen: Seen, z: Tensor) -> Tensor:
        """(F, K) the key frames with which each frame is compared; a key frame is among its own."""
        pick = self._clip_keys if self.mode == "clip" else self._stream_keys
        reference = torch.zeros(len(z), self.keys if self.mode == "clip" else 1, dtype=torch.long, device=z.device)
        for row in seen.rows.unique():
            frames = (seen.rows == row).nonzero()[:, 0].to(z.device)
            reference[frames] = frames[pick(seen.patches[frames], z[frames])]
        return reference

    def remembered(self, seen: Seen) -> Tensor | None:
        """The last key frame."""
        return self.key_frames(seen, self.scores(seen))[:, 0] if self.mode == "stream" else None

    def _clip_keys(self, patches: Tensor, z: Tensor) -> Tensor:
        """Of one stream, patches (T, P, D) and z (T, P) -> (T, K), the same for all frames."""
        best = F.softplus(z).mean(1).argsort(descending=True, stable=True)[: self.keys]
        # A stream of fewer frames names its best again: no frame is changed by being compared with it twice.
        best = torch.cat((best, best[:1].expand(self.keys - len(best))))
        return best.expand(len(z), -1)

    def _stream_keys(self, patches: Tensor, z: Tensor) -> Tensor:
        """Of one stream, patches (T, P, D) -> (T, 1): a frame that differs too much takes over from the last."""
        last, keys = 0, []
        for now in range(len(patches)):
            if difference(patches[now], patches[last]).mean() > self.tau:
                last = now
            keys.append(last)
        return torch.tensor(keys, device=patches.device)[:, None]

    def kept(self, seen: Seen, z: Tensor) -> Tensor:
        """(F, N) bool, which tokens stay, the CLS token always."""
        reference = self.key_frames(seen, z)
        is_key = (reference == torch.arange(len(z), device=z.device)[:, None]).any(1)
        value = z.sigmoid()
        if self.novelty:
            apart = [difference(seen.patches, seen.patches[key]) for key in reference.unbind(1)]  # K of (F, P)
            value = value * torch.stack(apart).amin(0)
        best = value.argsort(dim=1, descending=True, stable=True)[:, : keep_count(self.rho, z.shape[1])]
        keep = torch.zeros_like(z, dtype=torch.bool).scatter(1, best, True) | is_key[:, None]
        return torch.cat((torch.ones_like(keep[:, :1]), keep), dim=1)

    def forward(self, seen: Seen) -> VisionTokens:
        z = self.scores(seen)
        with torch.no_grad():  # a choice has no gradient
            keep = self.kept(seen, z)
        s = z.sigmoid()
        gate = 1 + (s - s.detach())  # exactly 1
        gated = torch.cat((seen.tokens[:, :1], seen.patches * gate[..., None]), dim=1)
        return chosen(gated, keep)
