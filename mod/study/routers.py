"""Routers that only a study needs: an oracle that is told where the sprites are, and one that is taught by attention.

`build(config, kind)` makes a model whose routed layers use one of them; `mod.train.train` takes such a builder.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from mod.block import rotate
from mod.config import ModelConfig
from mod.decoder import MoDBlock
from mod.router import LayerExpert, Router, top_k_mask
from mod.videollm import VideoLLM

LESSON = 0.1  # weight of the auxiliary loss, beside a main loss of one


def colourfulness(pixels: Tensor, grid: int) -> Tensor:
    """How colourful each token of a frame is: (F, 3, height, width) -> (F, N). Sprites are, background and grey shapes
    are not. The CLS token has no pixels of its own; it comes after the colourful patches and before the grey ones."""
    spread = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    patches = rearrange(F.adaptive_avg_pool2d(spread, grid), "f 1 h w -> f (h w)")
    return torch.cat((torch.full_like(patches[:, :1], 0.15), patches), dim=1)


class OracleRouter(Router):
    """Keeps the sprites, whatever the layer: the best that a router can do if sprites are all that matters."""

    told: Tensor | None = None  # (F, N), set when the vision encoder sees the frames that come next

    def score(self, tokens: Tensor, pos: Tensor) -> Tensor:
        if len(tokens) == 0:
            return tokens.new_zeros(0, self.frame_tokens)
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
    """A LayerExpert with the paper's gate that is also taught, by an auxiliary loss, to predict which tokens of the
    frame the text attends to most in the dense layer before; at inference it is a LayerExpert like any other."""

    watched: Tensor | None = None  # (B, T) attention that each token got from text in the dense layer before

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.lesson = None
        if self.training and self.watched is not None:
            got = rearrange(self.watched[frame >= 0], "(f n) -> f n", n=self.frame_tokens)
            self.lesson = top_k_mask(got, self.kept).to(x.dtype)
        return super().forward(x, pos, frame)

    def weight(self, scores: Tensor) -> Tensor:
        return super().weight(scores if self.lesson is None else Lesson.apply(scores, self.lesson))


@torch.no_grad()
def attention_from_text(attention, x: Tensor, pos: Tensor, frame: Tensor) -> Tensor:
    """x (B, T, D) as an Attention sees it -> (B, T): the attention each token gets, mean over heads, sum over text."""
    q = attention.q_norm(rearrange(attention.q(x), "b t (h e) -> b h t e", e=attention.head_dim))
    k = attention.k_norm(rearrange(attention.k(x), "b t (g e) -> b g t e", e=attention.head_dim))
    q, k = rotate(q, pos, attention.rope), rotate(k, pos, attention.rope)
    q = rearrange(q, "b (g r) t e -> b g r t e", g=k.shape[1])
    scores = torch.einsum("b g r t e, b g s e -> b g r t s", q, k) / attention.head_dim**0.5
    unseen = rearrange(pos, "b s -> b 1 s") > rearrange(pos, "b t -> b t 1")
    weights = scores.masked_fill(rearrange(unseen, "b t s -> b 1 1 t s"), -torch.inf).softmax(-1)
    from_text = reduce(weights, "b g r t s -> b t s", "mean") * rearrange(frame < 0, "b t -> b t 1")
    return reduce(from_text, "b t s -> b s", "sum")


def build(config: ModelConfig, kind: str) -> VideoLLM:
    """A VideoLLM with "oracle" or "taught" routers in its routed layers.

    Raises ValueError when a taught router has no dense layer before it to learn from.
    """
    model = VideoLLM(config)
    previous = None
    for layer in model.decoder.layers:
        if not isinstance(layer, MoDBlock):
            previous = layer
            continue
        size = (config.dim, config.frame_tokens, config.keep[layer.router.layer], layer.router.layer, config.gate)
        if kind == "oracle":
            layer.router = OracleRouter(*size)
            model.vit.register_forward_pre_hook(partial(tell, layer.router, config.grid))
        else:
            if previous is None:
                raise ValueError("a taught router learns from the dense layer before it, and there is none")
            taught = TaughtRouter(*size)
            taught.load_state_dict(layer.router.state_dict())
            layer.router = taught
            previous.attention.register_forward_hook(partial(watch, taught))
    return model


def tell(router: OracleRouter, grid: int, vit, inputs) -> None:
    router.told = colourfulness(inputs[0], grid)


def watch(router: TaughtRouter, attention, inputs, output) -> None:
    x, pos, frame = inputs
    router.watched = attention_from_text(attention, x, pos, frame) if router.training else None
