"""Every system of the field by its name: what it does, what it changes in the configuration, and how it is built.

    python train_tiny.py --method list

`configure` puts a method into a model's configuration, `build` makes the model of a configuration, this project's own
for "mod". Sizes are for the tiny model's 5x5 patches; where a paper's own would leave nothing there, the line says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mod.config import ModelConfig, UserError, require
from mod.layers import Block
from mod.related.base import Reducer, Seen, VisionTokens
from mod.related.depths import GammaMoD, PMoD, SequenceMoD, decayed_ratios, gamma_router
from mod.related.models import Compressed, Deeper, Extended, FieldVideoLLM, Reduced, Thinned, Tiled
from mod.related.pooling import UniRes
from mod.related.prompted import PromptGuided
from mod.related.prumerge import PruMerge
from mod.related.queries import QueryResampler
from mod.related.setok import ClusterMerge, SeTok
from mod.related.sparsify import VTS
from mod.related.window_extension import ProgressivePooling


@dataclass(frozen=True)
class FieldModel(ModelConfig):
    """A model of this project or of another system of the field."""

    method: str = "mod"  # a system of the field in MoD's place; list explains each
    tokens: int = 0
    cheap: bool = False  # the method at about the cost of MoD in all layers, where it has a way to be; list tells which

    def __post_init__(self):
        super().__post_init__()
        require(self.tokens >= 0, f"tokens must be at least 0, got {self.tokens}")

    @property
    def frame_tokens(self) -> int:
        """N: how many places a frame takes up in the stream. The method says so; `tokens` 0 is the core's number."""
        return self.tokens or super().frame_tokens


Sizes = Callable[[FieldModel], dict]


@dataclass(frozen=True)
class Method:
    """One system.

    title   what it is called, with where it comes from
    line    what it does, in a line
    streams what a streaming run of it needs; for one that cannot run online, what it would have to wait for or redo
    build   FieldModel -> model
    sizes   FieldModel -> the fields that it sets; layers are dense unless it says otherwise
    cheap   what `cheap` changes, so that about 6 of a tiny frame's 26 tokens are computed on; empty: nothing can be
    """

    title: str
    line: str
    streams: str
    build: Callable[[FieldModel], FieldVideoLLM] = FieldVideoLLM
    sizes: Sizes = lambda config: {}
    cheap: str = ""


CAPACITY = 0.45
CHEAP = 0.4  # of p-MoD's shares, so that their mean over layers is MoD's
SETOK_TAU = 0.3  # about 6 tokens of a tiny frame, as many as the resamplers have; the paper's 0.5 leaves one cluster
SETOK_CHEAP = 0.4  # a crowd, whose patches are less alike, has twice as many at 0.3
OWN_CACHE = "nothing but its cache"
FRAME = "nothing but the frame: runs online"


class Nothing(Reducer):
    """Hands on one token per frame that says nothing: what a model can do that only listens."""

    line = "what listening alone achieves: one empty token per frame"

    def most(self, tokens: int) -> int:
        return 1

    def forward(self, seen: Seen) -> VisionTokens:
        x = seen.tokens.new_zeros(len(seen.tokens), 1, seen.tokens.shape[2])
        return VisionTokens(x, x[..., 0] == 0, x[..., 0].long())


def reduced(
    title: str, make: Callable[[FieldModel], Reducer], streams: str, behind: bool = False, more: dict | None = None,
    line: str = "", cheap: str = "",
) -> Method:
    """A method that is a Reducer, `make(config)`."""

    def sizes(config: FieldModel) -> dict:
        return {"tokens": make(config).most(1 + config.grid**2), **(more or {})}

    def build(config: FieldModel) -> Reduced:
        return Reduced(config, make(config), behind)

    return Method(title, line or make(FieldModel()).line, streams, build, sizes, cheap)


def sequence_mod(config: FieldModel) -> Deeper:
    """Its capacity is what VideoLLM-MoD's layers keep of a tiny clip, text included; the paper's 12.5% would not even
    hold the text."""
    routed = range(config.depth) if config.cheap else range(1, config.depth, 2)
    return Deeper(config, routed, lambda block, layer: SequenceMoD(block, config.dim, CAPACITY))


def p_mod(config: FieldModel, per_frame: bool) -> Deeper:
    ratios = [ratio * (CHEAP if config.cheap else 1) for ratio in decayed_ratios(config.depth)]
    routed = [layer for layer, ratio in enumerate(ratios) if ratio < 1]

    def make(block: Block, layer: int) -> PMoD:
        return PMoD(block, config.dim, ratios[layer], per_frame=per_frame)

    return Deeper(config, routed, make, online=per_frame)


def gamma_mod(config: FieldModel) -> Deeper:
    router, inner = gamma_router(config.dim), range(1, config.depth - 1)
    return Deeper(config, inner, lambda block, layer: GammaMoD(block, router))


def dense_layers(config: FieldModel, dense: Sequence[int]) -> dict:
    return {"layers": "keep:" + ",".join("1" if layer in dense else "0" for layer in range(config.depth))}


def half_deep(config: FieldModel) -> dict:
    return dense_layers(config, range(1 if config.cheap else config.depth // 2))


def every_other(config: FieldModel) -> dict:
    return dense_layers(config, [1] if config.cheap else range(0, config.depth, 2))


def tiles(config: FieldModel) -> dict:
    patches = config.grid**2
    return {"tokens": 1 + patches + 2 * (1 + patches // config.grid)}


METHODS: dict[str, Method] = {
    "mod": Method("VideoLLM-MoD (2408.16730)", "this project: in every other layer the best tokens of each frame go "
                  "through, the others skip it", OWN_CACHE),
    "full": Method("full computation", "every token through every layer", OWN_CACHE),
    "no-vision": reduced("no vision", lambda config: Nothing(), FRAME),
    "early-exit": Method("early exit", "vision tokens leave for good after half of the layers", OWN_CACHE,
                         sizes=half_deep, cheap="after one layer"),
    "layer-skip": Method("layer skipping", "all vision tokens skip every other layer", OWN_CACHE, sizes=every_other,
                         cheap="all layers but one"),
    "fastv": Method("FastV (2403.06764)", "after half of the layers, the vision tokens that the last token looked at "
                    "least leave for good", "the question before it drops; another question needs the frames again",
                    lambda config: Thinned(config, 1 if config.cheap else max(1, config.depth // 2),
                                           0.9 if config.cheap else 0.5), cheap="after one layer, nine of ten"),
    "sequence-mod": Method("Mixture-of-Depths (2404.02258)", "in every other layer the best 45% of the whole sequence "
                           "goes through, text competing", "a predictor of the choice, which sees the future in "
                           "training; all evaluation is by the predictor", sequence_mod, cheap="in every layer"),
    "p-mod": Method("p-MoD (2412.04449)", "fewer and fewer of all vision tokens go through, weighed by 1 + a tanh(r)",
                    "all frames: the choice is among all of them", partial(p_mod, per_frame=False),
                    cheap="two fifths of its shares"),
    "p-mod-frame": Method("p-MoD, chosen in each frame (ours)", "p-MoD made causal: fewer and fewer of each frame's "
                          "tokens go through", OWN_CACHE, partial(p_mod, per_frame=True),
                          cheap="two fifths of its shares"),
    "gamma-mod": Method("gamma-MoD (2410.13859)", "one router for the inner layers lets half of all vision tokens "
                        "through", "a threshold on the router's score in place of training's count; all evaluation is "
                        "by the threshold, which may let everything through", gamma_mod),
    "q-former": reduced("Q-Former of BLIP-2 (2301.12597)",
                        lambda config: QueryResampler(6, config.vit_dim, 2, config.vit_heads, "qformer"), FRAME),
    "perceiver": reduced("Perceiver Resampler of Flamingo (2204.14198)",
                         lambda config: QueryResampler(6, config.vit_dim, 2, config.vit_heads, "perceiver"), FRAME),
    "free-video": reduced("Free Video-LLM (2410.10441)",
                          lambda config: PromptGuided(*((1, 0) if config.cheap else (2, 2)), 0.5, 2, 1),
                          "all frames and the question; a later question needs the frames again", behind=True,
                          cheap="a region in one frame"),
    "progressive": reduced("Visual Context Window (2409.20018), pooling",
                           lambda config: ProgressivePooling(*((8, 1, 5) if config.cheap else (4, 1, 3))),
                           "the number of the frame: runs online",
                           line="one frame in four with every patch, the others pooled by 3×3",
                           cheap="one frame in eight, the others pooled by 5×5"),
    "visual-rope": Method("Visual Context Window (2409.20018), positions", "all tokens; streams longer than in "
                          "training turn RoPE more slowly", "how long the stream will be, before it begins", Extended),
    "vts": reduced("VTS-style (2409.11182)",
                   lambda config: VTS(config.vit_dim, *((0.1, "clip", 1) if config.cheap else (0.5, "clip", 2))),
                   "all frames: key frames are chosen among them", cheap="one key frame, and a tenth of the others"),
    "vts-stream": reduced("VTS-style, streaming (ours)",
                          lambda config: VTS(config.vit_dim, 0.1 if config.cheap else 0.5, "stream",
                                             tau=0.6 if config.cheap else 0.3),
                          "the last key frame's features: runs online",
                          cheap="key frames when twice as much has changed, and a tenth of the others"),
    "adaptvision": Method("AdaptVision (2408.16986)", "the frame squeezed to a square, and tiles in its own shape, up "
                          "to two", FRAME, lambda config: Tiled(config, 2, config.grid), tiles),
    "longva": reduced("LongVA (2406.16852)", lambda config: UniRes(3 if config.cheap else 2), FRAME,
                      more={"rope_base": 1e9}, line="the mean of every 2×2 patches, and a RoPE base of a billion",
                      cheap="of every 3×3 patches"),
    "voco": Method("VoCo-LLaMA (2406.12275)", "each frame is read once into two tokens that know the earlier ones "
                   "(ours), and its own leave the cache", "a cache that evicts after each frame: runs online",
                   lambda config: Compressed(config, 2), lambda config: {"tokens": 3 + config.grid**2}),
    "setok": reduced("SeTok (2406.05127)",
                     lambda config: SeTok(tau=SETOK_CHEAP if config.cheap else SETOK_TAU,
                                          merger=ClusterMerge(config.vit_dim)), FRAME, cheap="fewer clusters"),
    "prumerge": reduced("LLaVA-PruMerge (2403.15388)", lambda config: PruMerge(4), FRAME),
    "prumerge-plus": reduced("LLaVA-PruMerge+ (2403.15388)", lambda config: PruMerge(4, plus=True), FRAME,
                             line="PruMerge, and every so many-th patch beside"),
}


def configure(config: FieldModel, name: str) -> FieldModel:
    """`config` with the method of that name in it. Raises UserError when there is none."""
    if name not in METHODS:
        raise UserError(f"--method got {name!r}, expected one of {', '.join(METHODS)}; --method list explains each")
    require(METHODS[name].cheap or not config.cheap, f"cheap got True, but {name} has no such setting; leave it out")
    if name == "mod":
        return replace(config, method=name, tokens=0)
    base = replace(config, method=name, tokens=0, layers="none")
    return replace(base, **METHODS[name].sizes(base))


def own_fields(config: FieldModel) -> set[str]:
    """Fields of the configuration that its method decides."""
    if config.method == "mod":
        return set()
    return {"tokens", "layers", "keep_ratio", "select", "gate", *METHODS[config.method].sizes(config)}


def build(config: FieldModel) -> FieldVideoLLM:
    """The model of a configuration. Raises UserError when its method is unknown."""
    if config.method not in METHODS:
        raise UserError(f"this run's method is {config.method!r}, expected one of {', '.join(METHODS)}; name another")
    return METHODS[config.method].build(config)


def listing() -> str:
    """All methods, one line each."""
    width = max(map(len, METHODS))
    lines = [
        f"{name:<{width}}  {method.title}: {method.line}. Streaming needs: {method.streams}."
        + (f" With --cheap: {method.cheap}." if method.cheap else "")
        for name, method in METHODS.items()
    ]
    return "\n".join(lines)
