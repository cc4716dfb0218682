"""Four bugs of streaming caches, planted in chapter 5: each replaces one method of the package and nothing else.

The chapter shows them and measures what they do; the judge of exercise 5.1 hides some of them behind a stream.
"""

import torch

from mod.cache import LayerCache
from mod.config import kept_per_frame
from mod.decoder import MoDBlock
from mod.router import LayerExpert


class Renumbered(LayerCache):
    def places(self, pos):  # where new tokens stand, as RoPE counts
        return self.length[:, None] + torch.arange(pos.shape[1])


class MaskedByIndex(LayerCache):
    def append(self, k, v, pos, frame):
        k, v, _ = super().append(k, v, pos, frame)
        return k, v, (torch.arange(k.shape[2]) <= pos[..., None])[:, None]


class EverybodyCached(MoDBlock):
    def forward(self, x, pos, frame, past=None, trace=None):
        keep, mu, _ = self.router(x, pos, frame)
        update = self.block.update(x, pos, frame, past=past, value_gate=mu)
        return torch.where(keep[..., None], x + mu[..., None] * update, x)


class HalfFrames(LayerExpert):
    def forward(self, x, pos, frame):
        self.frame_tokens = max(1, int((frame >= 0).sum()))  # as many as have come
        self.kept = kept_per_frame(0.4, self.frame_tokens)
        return super().forward(x, pos, frame)
