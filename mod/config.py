"""Every size and switch of the model, the data and the training, each with a remark that is also its flag's help.

The one representation of "who skips what" is `ModelConfig.keep_ratios`: a keep ratio for each layer. The dense model is
(1, 1, 1, 1), MoD is (1, r, 1, r), early exit is (1, 1, 0, 0), skipping every other layer is (1, 0, 1, 0).

Read next: layers.py
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_type_hints

# What mu is, and what it scales: see router.py.
Gate = Literal["score-update", "sigmoid-update", "score-value", "sigmoid-value", "score-read", "sigmoid-read"]
PATTERNS = ("interleaved", "all", "all-deep", "interleaved-deep", "none")


class UserError(ValueError):
    """A user's mistake, told in one sentence: got X, expected Y, do Z. The scripts print it and exit with code 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check(config, least: dict[str, float], shares: tuple[str, ...] = ()) -> None:
    """Raise UserError unless every field has its type (a float may be given whole) and is one of its choices, and every
    number is finite and at least 0, or `least[name]`; `shares` lie from 0 to 1."""
    hints = get_type_hints(type(config))
    for each in fields(config):
        name, value, kind = each.name, getattr(config, each.name), hints[each.name]
        if choices := get_args(kind):
            require(value in choices, f"{name} must be {' or '.join(choices)}, got {value!r}")
            continue
        fits = type(value) is kind or (kind is float and type(value) is int)
        require(fits, f"{name} must be of type {kind.__name__}, got {value!r}")
        if kind in (int, float):
            require(kind is int or math.isfinite(value), f"{name} must be finite, got {value}")
            require(name not in shares or 0 <= value <= 1, f"{name} must be from 0 to 1, got {value}")
            lowest = least.get(name, 0)
            require(value >= lowest, f"{name} must be at least {lowest}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the three parts of the model and of its routing. The defaults are the tiny preset."""

    # vision encoder (SigLIP type)
    image_size: int = 40  # side of a square frame, pixels
    patch_size: int = 8  # side of a patch, pixels
    vit_dim: int = 64  # width of the vision encoder
    vit_depth: int = 2  # layers of the vision encoder
    vit_heads: int = 4  # attention heads of the vision encoder
    vit_hidden: int = 192  # hidden width of the vision encoder's MLP
    grid: int = 5  # a frame becomes 1 + grid*grid tokens
    # decoder (Llama type)
    vocab_size: int = 64  # rows of the embedding; the data's vocabulary must fit
    dim: int = 96  # width of the decoder
    depth: int = 4  # layers of the decoder
    heads: int = 4  # query heads
    kv_heads: int = 2  # key/value heads; fewer than heads is grouped-query attention
    head_dim: int = 32  # width of one head, even because RoPE rotates pairs
    ffn_hidden: int = 256  # hidden width of SwiGLU
    rope_base: float = 10000.0  # RoPE base; larger turns slower and reaches further
    norm_eps: float = 1e-5  # RMSNorm epsilon
    # DEVIATION: Llama 3 has no QK-norm.
    qk_norm: bool = True  # RMSNorm on queries and keys, as Qwen3; decisive at tiny scale
    qkv_bias: bool = False  # bias on the q, k and v projections, as Qwen2
    tie_embeddings: bool = True  # the output layer shares the embedding's weights
    # mixture of depths
    layers: str = "interleaved"  # routed: interleaved, all, all-deep, interleaved-deep, none, 1,3 or keep:1,1,0,0
    keep_ratio: float = 0.2  # share of a frame's vision tokens that a routed layer keeps, in (0, 1]
    select: str = "learned"  # how the kept tokens are chosen: learned, random, uniform, or a router of your own
    gate: Gate = "sigmoid-value"  # what mu is, and what it scales; the paper: score-update
    # DEVIATION: in the paper the frame's last token, which decides whether to speak, competes like the others.
    keep_last: bool = False  # routed layers always keep the last token of a frame, as one of their k
    # DEVIATION: in the paper each layer chooses on its own.
    take_turns: int = 0  # look back at this many routed layers, and prefer tokens that few of them kept

    def __post_init__(self):
        sizes = {each.name: 1 for each in fields(ModelConfig) if each.type is int}
        check(self, sizes | {"take_turns": 0, "rope_base": 1e-30, "norm_eps": 1e-30})
        require(max(self.depth, self.vit_depth) <= 1000,
                f"depth {self.depth} and vit_depth {self.vit_depth} must be at most 1000")
        require(self.image_size >= self.patch_size,
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        require(self.grid <= self.patches_per_side,
                f"grid {self.grid} is finer than the encoder's {self.patches_per_side} patches per side")
        require(self.vit_dim % self.vit_heads == 0,
                f"vit_dim {self.vit_dim} must be a multiple of vit_heads {self.vit_heads}")
        require(self.heads % self.kv_heads == 0, f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        require(self.head_dim % 2 == 0, f"head_dim must be even for RoPE, got {self.head_dim}")
        _ = self.keep_ratios  # refuses layers that cannot be read

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def frame_tokens(self) -> int:
        """N: one CLS token and a grid of h*w patch tokens (paper, section 3)."""
        return 1 + self.grid * self.grid

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """Keep ratio of every layer: 1 is a dense layer, 0 is skipped by all vision tokens."""
        return parse_layers(self.layers, self.keep_ratio, self.depth)

    @property
    def keep_counts(self) -> tuple[int, ...]:
        """k of every layer: how many vision tokens of a frame it processes and caches."""
        return tuple(keep_count(ratio, self.frame_tokens) for ratio in self.keep_ratios)


def routed_layers(pattern: str, depth: int) -> tuple[int, ...]:
    """Numbers of the layers that a named pattern routes, counted from 0 (paper, Table 2).

    "Every other" means the odd layers, so that a dense layer comes before each routed one.
    """
    # DEVIATION: the paper names the deep patterns; we could not check where deep begins and take the second half.
    first = depth // 2 if pattern.endswith("deep") else 0
    every = range(first, depth) if pattern != "none" else ()
    return tuple(layer for layer in every if pattern.startswith("all") or layer % 2 == 1)


def parse_layers(layers: str, keep_ratio: float, depth: int) -> tuple[float, ...]:
    """The keep ratio of every layer, from `--layers` and `--keep-ratio`.

    `layers` is a pattern's name, a list of routed layers ("1,3"), or "keep:" and one ratio per layer ("keep:1,1,0,0").
    Raises UserError for anything else.
    """
    require(0 < keep_ratio <= 1, f"keep ratio must be in (0, 1], got {keep_ratio}; for the dense model pass --layers "
            "none, for skipping a layer altogether --layers keep:1,0,1,0")
    try:
        if layers.startswith("keep:"):
            ratios = tuple(float(part) for part in layers.removeprefix("keep:").split(","))
            if len(ratios) != depth or not all(0 <= ratio <= 1 for ratio in ratios):
                raise ValueError
            return ratios
        routed = routed_layers(layers, depth) if layers in PATTERNS else [int(part) for part in layers.split(",")]
        if not all(0 <= layer < depth for layer in routed):
            raise ValueError
    except ValueError:
        expected = f"{', '.join(PATTERNS)}, a list such as 1,3, or one ratio per layer such as keep:1,1,0,0"
        told = f"layers got {layers!r} for a decoder of {depth} layers (0 to {depth - 1}); expected {expected}"
        raise UserError(told) from None
    return tuple(keep_ratio if layer in routed else 1.0 for layer in range(depth))


def keep_count(keep_ratio: float, tokens: int) -> int:
    """k = ceil(r * n): how many of a frame's n vision tokens a layer with keep ratio r processes (paper, section 3.2).

    The tiny subtraction keeps float noise from rounding an exact product up: 0.07 * 100 is 7.000000000000001.
    """
    return max(1, math.ceil(keep_ratio * tokens - 1e-9)) if keep_ratio > 0 else 0


@dataclass(frozen=True)
class DataConfig:
    """The synthetic stream."""

    frames: int = 8  # frames of a clip
    sprites: int = 1  # most sprites visible at once
    event_rate: float = 0.45  # chance that something happens at a frame
    question_rate: float = 0.5  # chance that the user asks something after a frame
    distractors: int = 4  # grey shapes in the background
    noise: float = 0.03  # standard deviation of the pixel noise, of a 0 to 1 range
    fps: float = 2.0  # frames per second of stream time

    def __post_init__(self):
        check(self, {"frames": 1, "sprites": 1, "fps": 1e-9}, shares=("event_rate", "question_rate"))
        require(self.sprites <= 6, f"sprites must be 1 to 6, got {self.sprites}")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 400  # training steps; 0 writes an untrained run
    seed: int = 0  # seed of weights and training clips; validation and test clips are the same for all seeds
    batch_size: int = 16  # clips in a step
    accumulate: int = 1  # split a step's batch into this many parts, to save memory
    optimizer: Literal["muon", "adamw"] = "muon"  # muon (matrices; AdamW for the rest) or adamw (everything)
    lr: float = 0.02  # Muon's learning rate, for the matrices of decoder and connector
    adam_lr: float = 2e-3  # AdamW's learning rate, for everything else
    router_rate: float = 1.0  # the routers' learning rate, in AdamW's
    # DEVIATION: the paper begins with a pretrained decoder; a new one can learn to look before it learns to skip. See
    # mod/related/narrowing.py.
    dense_steps: int = 0  # routed layers keep all tokens for this many steps, and routers do not learn
    narrow_steps: int = 0  # over this many more steps they come down to what they keep from then on
    warmup: int = 20  # steps of linear warm-up; a cosine to zero follows
    clip: float = 1.0  # largest norm of the gradient
    stream_weight: float = 1.0  # omega, the weight of the streaming loss
    vit_steps: int = 250  # steps of the vision encoder's warm-up on single frames
    vit_lr: float = 0.0  # AdamW's rate for the vision encoder after its warm-up; 0 freezes it, as the paper does
    threshold: float = 0.5  # speak when the probability of silence is below it, in evaluation
    max_words: int = 12  # a longer response is cut there, in tokens
    log_every: int = 20  # steps between lines of the log; nothing is fetched from the device in between
    eval_every: int = 100  # steps between validations; 0 validates at the end only
    eval_clips: int = 256  # validation clips at the end; a quarter of them during training
    save_every: int = 100  # steps between training states, for --resume
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to train
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 uses autocast, on a CUDA GPU
    compile: bool = False  # torch.compile the decoder
    fsdp: bool = False  # under torchrun, split the weights over the processes (FSDP2) instead of copying them

    def __post_init__(self):
        one = ("batch_size", "accumulate", "log_every", "eval_clips", "save_every", "max_words")
        positive = dict.fromkeys(("lr", "adam_lr", "router_rate", "clip"), 1e-30)
        check(self, dict.fromkeys(one, 1) | positive, shares=("threshold",))
        require(self.seed < 2**63, f"seed must be below 2**63, got {self.seed}")
        require(self.accumulate <= self.batch_size,
                f"a step's {self.batch_size} clips cannot be split into {self.accumulate} parts; raise --batch-size")
        require(not self.fsdp or self.optimizer == "adamw",
                "fsdp splits matrices, which muon needs whole; pass --optimizer adamw")


@dataclass(frozen=True)
class Config:
    """A whole run. Folders such as mod/related have a subclass with more settings; `world` says who builds the run."""

    world: ClassVar[str] = "core"  # a name in `WORLDS` of run.py
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
