"""Begin dense, then narrow down: a decoder learns to look before its layers learn to skip.

For `--dense-steps` a routed layer keeps all tokens of a frame, every mu is one, and routers do not learn. Then the
share that it keeps falls by the same factor per step, for `--narrow-steps`, to its keep ratio. In a layer that is to be
skipped it falls to one token, and then to none. `mod/train.py` imports this file when one of the two is given, whatever
kind of run it trains.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from mod.config import Config
from mod.decoder import MoDBlock
from mod.router import LayerExpert, Router
from mod.videollm import VideoLLM


def narrowed(config: Config, step: int) -> Config:
    """The configuration of a step, with the keep ratios that its layers have then."""
    settings, model = config.train, config.model
    if step >= settings.dense_steps + settings.narrow_steps:
        return config
    part = max(0.0, (step - settings.dense_steps) / max(1, settings.narrow_steps))
    ratios = ((ratio or 1 / model.frame_tokens) ** part for ratio in model.keep_ratios)
    return replace(config, model=replace(model, layers="keep:" + ",".join(map(str, ratios))))


def routers(model: VideoLLM) -> list[Router]:
    """Those of the method's own kind; other mixtures of depths (depths.py) have a linear layer there, and stay as they
    are."""
    found = [layer.router for layer in model.decoder.layers if isinstance(layer, MoDBlock)]
    return [router for router in found if isinstance(router, Router)]


def quiet(model: VideoLLM) -> None:
    """Begin with scores near zero. A sigmoid gate's mu is one then, which does not disturb a decoder that can look
    already; a score gate's would be zero, and nothing could be learned, so it begins as it is."""
    for router in routers(model):
        if isinstance(router, LayerExpert) and router.gate.startswith("sigmoid"):
            nn.init.normal_(router.w.weight, std=1e-3)


def asleep(router: Router, scores: Tensor) -> Tensor:
    """What a router that sleeps has in place of its `weight`: one for each token, (F, N) -> (F, N)."""
    # Times zero, so that the weights have a gradient, which several processes wait for.
    return 1 + 0 * type(router).weight(router, scores)


def keep(model: VideoLLM, counts: Sequence[int], sleep: bool = False) -> None:
    """From now on layer l keeps counts[l] tokens of a frame, if it is routed. Routers that `sleep` do not learn."""
    for router in routers(model):
        router.kept = counts[router.layer]
        vars(router).pop("weight", None)
        if sleep:
            router.weight = partial(asleep, router)


@contextmanager
def routed(model: VideoLLM, config: Config, step: int) -> Iterator[Config]:
    """While this lasts, layers keep what they keep in this step. Yields the step's configuration."""
    now = narrowed(config, step)
    keep(model, now.model.keep_counts, sleep=step < config.train.dense_steps)
    try:
        yield now
    finally:
        keep(model, config.model.keep_counts)
