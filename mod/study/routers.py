"""One choice of tokens for all layers, which is dropping tokens before the decoder."""

from torch import Tensor

from mod.config import UserError
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


def equip(model: VideoLLM, kind: str) -> None:
    """Put `OneChoice` routers, the kind "once", into a model's routed layers. Raises UserError for another kind."""
    if kind != "once":
        raise UserError(f"routers got {kind!r}, expected once; leave it out for those of the configuration")
    config, first = model.config, None
    for number, layer in enumerate(model.decoder.layers):
        if isinstance(layer, MoDBlock):
            old = layer.router
            layer.router = OneChoice(config.dim, config.frame_tokens, config.keep_ratios[number], number, config.gate)
            layer.router.keep_last = old.keep_last
            layer.router.load_state_dict(old.state_dict())
            object.__setattr__(layer.router, "first", first)  # not as a submodule: its weights are the first layer's
            first = first or layer.router
