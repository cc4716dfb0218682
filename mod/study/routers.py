"""Routers that belong together: one choice of tokens for all layers, and one weight for all layers.

One choice is dropping tokens before the decoder. With one weight each layer still scores its own tokens and makes its
own choice; only what is looked for is the same in all of them.
"""

from collections.abc import Sequence

from torch import Tensor

from mod.config import ModelConfig, require
from mod.decoder import MoDBlock
from mod.router import LayerExpert
from mod.videollm import VideoLLM


class OneChoice(LayerExpert):
    """The first routed layer's choice, in every routed layer: the others' tokens might as well be dropped before the
    decoder, though they still take up positions. Each layer scales what it keeps by the same mu."""

    first: "OneChoice | None" = None  # whose scores these are; None: its own
    scores: Tensor | None = None  # (F, N) of the frames that came last

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        self.scores = super().score(tokens, pos) if self.first is None else self.first.scores
        return self.scores


def one_choice(config: ModelConfig, blocks: Sequence[MoDBlock]) -> None:
    """`OneChoice` in every block: the first one's scores decide."""
    first = None
    for block in blocks:
        old = block.router
        block.router = OneChoice(config.dim, config.frame_tokens, config.keep_ratios[old.layer], old.layer, config.gate)
        block.router.keep_last = old.keep_last
        block.router.load_state_dict(old.state_dict())
        object.__setattr__(block.router, "first", first)  # not as a submodule: its weights are the first layer's
        first = first or block.router


def one_weight(config: ModelConfig, blocks: Sequence[MoDBlock]) -> None:
    """All routers score with the first one's weight, which learns from all of them."""
    for block in blocks:
        block.router.w.weight = blocks[0].router.w.weight


KINDS = {"once": one_choice, "shared": one_weight}


def equip(model: VideoLLM, kind: str) -> None:
    """Let a model's routed layers share one choice (the kind "once") or one weight ("shared"). Raises UserError for
    another kind."""
    require(kind in KINDS, f"routers got {kind!r}, expected {' or '.join(KINDS)}; leave it out for those of the "
                           "configuration")
    KINDS[kind](model.config, [layer for layer in model.decoder.layers if isinstance(layer, MoDBlock)])
