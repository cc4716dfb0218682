"""A choice that looks ahead, planted in chapter 4, and four bugs of streaming caches, planted in chapter 5.

Each replaces one or two pieces of the package and nothing else. The chapters show them and measure what they do; the
judge of exercise 5.1 hides some of them behind a stream.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch

from mod.cache import LayerCache
from mod.config import keep_count
from mod.decoder import MoDBlock, Routing
from mod.layers import Attention, Rope
from mod.layout import make_plan
from mod.router import LayerExpert, top_k


class SequenceBlock(MoDBlock):
    def forward(self, x, turn, plan, past=None, trace=None):
        pos, vision, keep = plan.pos, plan.vision, torch.ones(plan.pos.numel(), dtype=torch.bool)
        scores = self.router.score(x.flatten(0, 1)[vision], pos.flatten()[vision])
        best = top_k(scores.detach().view(1, -1), self.router.kept * len(scores))  # of all frames at once
        keep[vision] = torch.zeros_like(scores, dtype=torch.bool).view(1, -1).scatter(1, best, True).view_as(scores)
        if trace is not None:
            trace.append(Routing(self.router.layer, keep[vision], scores.detach()))
        keep, mu = keep.view_as(pos), torch.ones_like(keep, dtype=x.dtype)
        mu = mu.index_put((vision,), self.router.weight(scores)).view_as(pos)
        mask = keep[:, None] & (pos[:, None] <= pos[:, :, None])  # skipped tokens are hidden from everybody
        update = self.block.update(x, turn, pos, mask=mask, value_gate=mu)
        return torch.where(keep[..., None], x + mu[..., None] * update, x)


class Renumbered(Attention):
    def forward(self, x, turn, pos, *, past=None, **attend):
        if past is not None:
            turn = Rope().turn(past.slots, self.head_dim, x.dtype)  # where the layer stores the new tokens
        return super().forward(x, turn, pos, past=past, **attend)


class MaskedByIndex(LayerCache):
    def append(self, k, v, pos):
        k, v, _ = super().append(k, v, pos)
        return k, v, torch.arange(k.shape[2]) <= pos[..., None]


class EverybodyCached(LayerCache):
    def __init__(self, kept, *sizes):
        super().__init__(5, *sizes)  # all five tokens of a frame, in every layer


class EverybodyComputed(MoDBlock):
    def forward(self, x, turn, plan, past=None, trace=None):
        pos, vision = plan.pos, plan.vision
        chosen, _, scores = self.router(x.flatten(0, 1)[vision], pos.flatten()[vision])
        mu = torch.ones(pos.numel(), dtype=x.dtype).index_put((vision,), self.router.weight(scores))
        skipped = torch.zeros_like(mu).index_fill(0, vision.flatten(), 1)
        skipped = skipped.index_fill(0, vision.gather(1, chosen).flatten(), 0).view_as(pos)[..., None]
        update = self.block.update(x, turn, pos, past=past, value_gate=mu.view_as(pos))
        return torch.where(skipped > 0, x, x + mu.view_as(pos)[..., None] * update)


def half_plan(frame, start, frame_tokens, keep_counts):
    come = max(1, int((frame == frame.max()).sum()))  # so many tokens of the latest frame are there
    counts = {k: keep_count(k / frame_tokens, come) for k in keep_counts}
    plan = make_plan(frame, start, come, counts.values())
    routes = {k: plan.routes[count] for k, count in counts.items() if count in plan.routes}
    return plan._replace(routes=routes, counts={k: plan.counts[count] for k, count in counts.items()})


class HalfFrames(LayerExpert):
    def forward(self, tokens, pos, before=None):
        scores = self.score(tokens, pos)
        chosen = top_k(scores, keep_count(0.4, tokens.shape[1]))  # of as many as have come
        return chosen, self.weight(scores).gather(1, chosen), scores


@contextmanager
def everybody_cached():
    with patch("mod.cache.LayerCache", EverybodyCached), patch("mod.decoder.MoDBlock", EverybodyComputed):
        yield


@contextmanager
def half_frames():
    with patch("mod.layout.make_plan", half_plan), patch.dict("mod.router.ROUTERS", learned=HalfFrames):
        yield
