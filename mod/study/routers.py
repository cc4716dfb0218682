"""Routers that only a study needs: an oracle that is told where the sprites are, one that is taught by attention, and
one choice for all layers, which is dropping tokens before the decoder.

`equip(model, kind)` puts one of them into every routed layer of a model. What a router must know beyond its tokens
comes to it through hooks, so the model knows nothing of it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from mod.config import UserError
from mod.decoder import MoDBlock
from mod.layers import Attention, rotate
from mod.layout import Plan
from mod.router import LayerExpert, Router, top_k
from mod.videollm import VideoLLM

LESSON = 0.1  # weight of the auxiliary loss, beside a main loss of one


def colourfulness(pixels: Tensor, grid: int) -> Tensor:
    """How colourful each token of a frame is: (F, 3, side, side) -> (F, N). Sprites are, background and grey shapes are
    not. The CLS token has no pixels of its own; it comes after the colourful patches and before the grey ones."""
    spread = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    patches = rearrange(F.adaptive_avg_pool2d(spread, grid), "f 1 h w -> f (h w)")
    return torch.cat((torch.full_like(patches[:, :1], 0.15), patches), dim=1)


class OracleRouter(Router):
    """Keeps the sprites, whatever the layer: the best that a router can do if sprites are all that matters."""

    told: Tensor | None = None  # (F, N), set when the vision encoder sees the frames that come next

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        if len(tokens) != len(self.told):
            raise ValueError(f"told of {len(self.told)} frames, got {len(tokens)}; see and decode the same frames")
        return self.told.to(tokens.dtype)


class Lesson(torch.autograd.Function):
    """The identity on scores; backwards it adds the gradient of a loss that the main loss knows nothing of."""

    @staticmethod
    def forward(context, scores: Tensor, target: Tensor) -> Tensor:
        context.save_for_backward(scores, target)
        return scores.view_as(scores)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        scores, target = context.saved_tensors
        # d/dscore of the mean binary cross-entropy of sigmoid(score) against the target.
        return gradient + LESSON * (scores.sigmoid() - target) / scores.numel(), None


class TaughtRouter(LayerExpert):
    """A LayerExpert that is also taught, by an auxiliary loss, to predict which tokens of the frame the text attends to
    most in the dense layer before. At inference it is a LayerExpert like any other."""

    plan: Plan | None = None  # where the tokens lie that the decoder works on
    lesson: Tensor | None = None  # (F, N) 1 for the tokens that should be kept, 0 for others; None outside training

    def weight(self, scores: Tensor) -> Tensor:
        return super().weight(scores if self.lesson is None else Lesson.apply(scores, self.lesson))


class OneChoice(LayerExpert):
    """The first routed layer's choice, in every routed layer: the others' tokens might as well be dropped before the
    decoder, though they still take up positions. Each layer scales what it keeps by the same mu."""

    first: "OneChoice | None" = None  # whose scores these are; None: its own
    scores: Tensor | None = None  # (F, N) of the frames that came last

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        self.scores = super().score(tokens, pos) if self.first is None else self.first.scores
        return self.scores


KINDS = {"oracle": OracleRouter, "taught": TaughtRouter, "once": OneChoice}


@torch.no_grad()
def attention_from_text(attention: Attention, x: Tensor, turn: Tensor, pos: Tensor, vision: Tensor) -> Tensor:
    """The attention that each vision token gets from text: mean over heads, sum over all tokens that are not vision.

    x (B, T, D), turn and pos as `Attention.forward` has them, vision (F, N) as in a Plan -> (F, N).
    """
    q = attention.q_norm(rearrange(attention.q(x), "b t (h e) -> b h t e", e=attention.head_dim))
    k = attention.k_norm(rearrange(attention.k(x), "b t (g e) -> b g t e", e=attention.head_dim))
    q, k = rotate(q, turn), rotate(k, turn)
    q = rearrange(q, "b (g r) t e -> b g r t e", g=k.shape[1])
    scores = torch.einsum("b g r t e, b g s e -> b g r t s", q, k) / attention.head_dim**0.5
    unseen = rearrange(pos, "b s -> b 1 s") > rearrange(pos, "b t -> b t 1")
    weights = scores.masked_fill(rearrange(unseen, "b t s -> b 1 1 t s"), -torch.inf).softmax(-1)
    reads = torch.ones(pos.numel(), dtype=x.dtype).index_fill(0, vision.flatten(), 0).view(*pos.shape, 1)
    return reduce(reduce(weights, "b g r t s -> b t s", "mean") * reads, "b t s -> (b s)", "sum")[vision]


def equip(model: VideoLLM, kind: str) -> None:
    """Put "oracle", "taught" or "once" routers into a model's routed layers.

    Raises UserError for another kind, and ValueError when a taught router has no dense layer before it to learn from.
    """
    if kind not in KINDS:
        raise UserError(f"routers got {kind!r}, expected oracle, taught or once; leave it out for those of the "
                        "configuration")
    config, previous, first = model.config, None, None
    for number, layer in enumerate(model.decoder.layers):
        if not isinstance(layer, MoDBlock):
            previous = layer
            continue
        old = layer.router
        router = KINDS[kind](config.dim, config.frame_tokens, config.keep_ratios[number], number, config.gate)
        router.keep_last, router.take_turns = old.keep_last, 0 if kind == "once" else old.take_turns
        layer.router = router
        if kind == "oracle":
            model.vit.register_forward_pre_hook(partial(tell, router, config.grid))
            continue
        router.load_state_dict(old.state_dict())
        if kind == "once":
            object.__setattr__(router, "first", first)  # not as a submodule: its weights are the first layer's
            first = first or router
            continue
        if previous is None:
            raise ValueError("a taught router learns from the dense layer before it, and there is none")
        model.decoder.register_forward_pre_hook(partial(begin, router))
        previous.attention.register_forward_hook(partial(watch, router))


def tell(router: OracleRouter, grid: int, vit, inputs) -> None:
    router.told = colourfulness(inputs[0], grid)


def begin(router: TaughtRouter, decoder, inputs) -> None:
    router.plan, router.lesson = inputs[1], None


def watch(router: TaughtRouter, attention: Attention, inputs, output) -> None:
    if router.training:
        got = attention_from_text(attention, *inputs, router.plan.vision)
        router.lesson = torch.zeros_like(got).scatter(1, top_k(got, router.kept), 1)
