"""Every size and switch of the model, the data, the training and the real parts, with named presets.

Five frozen dataclasses, and the run that four of them make. A wrong value is refused here, in one sentence, before
anything is built.
The one representation of "who skips what" is `ModelConfig.keep`: a keep ratio for each layer. The dense model is
(1, 1, 1, 1), MoD is (1, r, 1, r), early exit is (1, 1, 0, 0), skipping every other layer is (1, 0, 1, 0).

Read next: block.py
"""

import math
from dataclasses import dataclass, field, fields


class UserError(ValueError):
    """A user's mistake, told in one sentence: got X, expected Y, do Z. The scripts print it and exit with code 2."""


HIDDEN = "hidden"
PATTERNS = ("interleaved", "all", "all-deep", "interleaved-deep", "none")


def flag(default, help, choices=None, otherwise=None):
    """A dataclass field that knows the help text of its command-line flag; `otherwise`: what holds when it is not
    given, where that is not the default itself; HIDDEN when it is no flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "otherwise": otherwise})


def routed_layers(pattern: str, depth: int) -> tuple[int, ...]:
    """Numbers of the layers that a named pattern routes, counted from 0 (paper, Table 2).

    "Every other" means the odd layers, so that a dense layer comes before each routed one.
    """
    every = range(depth)
    # DEVIATION: the paper names the deep patterns; where "deep" begins we could not check and take the second half.
    deep = range(depth // 2, depth)
    named = {
        "none": (),
        "all": tuple(every),
        "interleaved": tuple(i for i in every if i % 2 == 1),
        "all-deep": tuple(deep),
        "interleaved-deep": tuple(i for i in deep if i % 2 == 1),
    }
    return named[pattern]


def parse_keep(layers: str, keep_ratio: float, depth: int) -> tuple[float, ...]:
    """The keep ratio of every layer, from `--layers` and `--keep-ratio`.

    `layers` is a pattern's name, a list of routed layers ("1,3"), or "keep:" and one ratio a layer ("keep:1,1,0,0").
    Raises UserError, in one sentence, for anything else.
    """
    if not 0 < keep_ratio <= 1:
        raise UserError(
            f"keep ratio must be in (0, 1], got {keep_ratio}; for the dense model pass --layers none, "
            "for skipping a layer altogether --layers keep:1,0,1,0"
        )
    expected = f"{', '.join(PATTERNS)}, a list of layers such as 1,3, or one ratio a layer such as keep:1,1,0,0"
    try:
        if layers.startswith("keep:"):
            ratios = tuple(float(part) for part in layers[len("keep:") :].split(","))
            if len(ratios) != depth or not all(0 <= ratio <= 1 for ratio in ratios):
                raise ValueError
            return ratios
        routed = routed_layers(layers, depth) if layers in PATTERNS else [int(part) for part in layers.split(",")]
        if not all(0 <= layer < depth for layer in routed):
            raise ValueError
    except ValueError:
        message = f"layers got {layers!r} for a decoder of {depth} layers (0 to {depth - 1}); expected {expected}"
        raise UserError(message) from None
    return tuple(keep_ratio if layer in routed else 1.0 for layer in range(depth))


def kept_per_frame(keep_ratio: float, tokens: int) -> int:
    """ceil(r * n): how many of a frame's n vision tokens a layer with keep ratio r processes.

    The tiny subtraction keeps float noise from rounding an exact product up: 0.07 * 100 is 7.000000000000001.
    """
    return max(1, math.ceil(keep_ratio * tokens - 1e-9)) if keep_ratio > 0 else 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_fields(config) -> None:
    """Every field has its default's type (a float may be given whole), is finite, and is one of its choices."""
    for each in fields(config):
        name, value, kind, choices = each.name, getattr(config, each.name), type(each.default), each.metadata["choices"]
        fits = type(value) is kind or (kind is float and type(value) is int)
        _require(fits, f"{name} must be of type {kind.__name__}, got {value!r}")
        _require(kind is not float or math.isfinite(value), f"{name} must be finite, got {value}")
        _require(not choices or value in choices, f"{name} must be {' or '.join(choices or ())}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the three parts of the model and of its routing. The defaults are the tiny preset."""

    # vision encoder (SigLIP type)
    image_size: int = flag(40, "side of a square frame, pixels")
    patch_size: int = flag(8, "side of a patch, pixels")
    vit_dim: int = flag(64, "width of the vision encoder")
    vit_depth: int = flag(2, "layers of the vision encoder")
    vit_heads: int = flag(4, "attention heads of the vision encoder")
    vit_hidden: int = flag(192, "hidden width of the vision encoder's MLP")
    grid: int = flag(5, "a frame becomes 1 + grid*grid tokens")
    # decoder (Llama type)
    vocab_size: int = flag(64, "rows of the embedding; the data's vocabulary must fit")
    dim: int = flag(96, "width of the decoder")
    depth: int = flag(4, "layers of the decoder")
    heads: int = flag(4, "query heads")
    kv_heads: int = flag(2, "key/value heads; fewer than heads is grouped-query attention")
    head_dim: int = flag(32, "width of one head, even because RoPE rotates pairs")
    ffn_hidden: int = flag(256, "hidden width of SwiGLU")
    rope_base: float = flag(10000.0, "RoPE base; larger turns slower and reaches further")
    rope_factor: float = flag(1.0, "Llama 3.1 scaling of RoPE: how much the slow pairs are slowed; 1 is none")
    rope_low: float = flag(1.0, "a pair with fewer turns within rope_context is slow")
    rope_high: float = flag(4.0, "a pair with more turns within rope_context is left alone")
    rope_context: int = flag(8192, "context that the unscaled RoPE was trained for")
    norm_eps: float = flag(1e-5, "RMSNorm epsilon")
    qk_norm: bool = flag(
        True, "RMSNorm on queries and keys, as Qwen3; decisive at tiny scale"
    )  # DEVIATION: Llama 3 has none
    qkv_bias: bool = flag(False, "bias on the q, k and v projections, as Qwen2")
    tie_embeddings: bool = flag(True, "the output layer shares the embedding's weights")
    # who else than this project's method builds the model; the methods of mod/related set both
    method: str = flag("mod", "a system of the field in MoD's place; --method list explains each")
    tokens: int = flag(0, "tokens that a frame takes up in the stream; 0: 1 + grid*grid", otherwise=HIDDEN)
    # mixture of depths
    layers: str = flag("interleaved", f"routed layers: {', '.join(PATTERNS)}, a list such as 1,3, or keep:1,1,0,0")
    keep_ratio: float = flag(0.2, "share of a frame's vision tokens that a routed layer keeps, in (0, 1]")
    select: str = flag("learned", "how the kept tokens are chosen: learned, random, uniform, or a router of your own")
    gate: str = flag(
        "value",
        "what the score scales: update is the paper's, value also scales being read",
        ("update", "value"),
    )

    def __post_init__(self):
        _check_fields(self)
        for each in fields(self):
            value = getattr(self, each.name)
            least = 0 if each.name == "tokens" else 1
            _require(type(value) is not int or value >= least, f"{each.name} must be at least {least}, got {value}")
        _require(self.rope_base > 0 and self.norm_eps > 0, "rope_base and norm_eps must be positive")
        _require(
            self.rope_factor >= 1 and self.rope_low < self.rope_high,
            f"rope_factor must be at least 1 and rope_low below rope_high, got {self.rope_factor}, {self.rope_low}, "
            f"{self.rope_high}",
        )
        _require(
            self.image_size >= self.patch_size,
            f"image_size {self.image_size} is smaller than patch_size {self.patch_size}",
        )
        _require(
            self.grid <= self.patches_per_side,
            f"grid {self.grid} is finer than the encoder's {self.patches_per_side} patches a side",
        )
        _require(
            self.vit_dim % self.vit_heads == 0,
            f"vit_dim {self.vit_dim} must be a multiple of vit_heads {self.vit_heads}",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for RoPE, got {self.head_dim}")
        parse_keep(self.layers, self.keep_ratio, self.depth)

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def frame_tokens(self) -> int:
        """N: one CLS token and a grid of h*w patch tokens (paper, section 3), unless a method says otherwise."""
        return self.tokens or 1 + self.grid * self.grid

    @property
    def keep(self) -> tuple[float, ...]:
        """Keep ratio of every layer; 1 is a dense layer, 0 skips it for all vision tokens."""
        return parse_keep(self.layers, self.keep_ratio, self.depth)

    @property
    def kept(self) -> tuple[int, ...]:
        """Vision tokens of a frame that every layer processes and caches."""
        return tuple(kept_per_frame(ratio, self.frame_tokens) for ratio in self.keep)


@dataclass(frozen=True)
class DataConfig:
    """The synthetic stream."""

    frames: int = flag(8, "frames of a clip")
    sprites: int = flag(1, "most sprites visible at once")
    event_rate: float = flag(0.45, "chance that something happens at a frame")
    drift: float = flag(0.0, "chance that a sprite steps aside in a frame, unspoken")
    sparks: float = flag(0.0, "chance that a small spark flashes up in a frame, unspoken")
    question_rate: float = flag(0.5, "chance that the user asks something after a frame")
    ahead: float = flag(0.0, "chance that a question is asked before the first frame, and answered after the last")
    landmark: float = flag(
        0.0, "chance that a clip has a landmark: a question then asks on which side of it the sprite is"
    )
    wide: float = flag(0.0, "chance that a clip's frames are twice as wide as high")
    distractors: int = flag(4, "grey shapes in the background")
    noise: float = flag(0.03, "standard deviation of the pixel noise, of a 0 to 1 range")
    fps: float = flag(2.0, "frames per second of stream time")

    def __post_init__(self):
        _check_fields(self)
        _require(self.frames >= 1, f"frames must be at least 1, got {self.frames}")
        _require(1 <= self.sprites <= 6, f"sprites must be 1 to 6, got {self.sprites}")
        for name in ("event_rate", "drift", "sparks", "question_rate", "ahead", "landmark", "wide"):
            _require(
                0 <= getattr(self, name) <= 1,
                f"{name} is a chance, expected 0 to 1, got {getattr(self, name)}",
            )
        _require(
            self.noise >= 0 and self.distractors >= 0,
            f"noise and distractors must not be negative, got {self.noise}, {self.distractors}",
        )
        _require(self.fps > 0, f"fps must be positive, got {self.fps}")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = flag(400, "training steps; 0 writes an untrained run")
    seed: int = flag(0, "seed of weights and training clips; validation and test clips are the same for all seeds")
    batch_size: int = flag(
        16, "full-length clips in a step; shorter clips are batched more, so that a step has as many frames"
    )
    accumulate: int = flag(1, "split a step's batch into this many parts, to save memory")
    curriculum: str = flag(
        "0:8", "frames of a clip from which share of the steps on; the last stage always has --frames"
    )
    optimizer: str = flag("muon", "muon (matrices; AdamW for the rest) or adamw (everything)", ("muon", "adamw"))
    lr: float = flag(0.02, "Muon's learning rate, for the matrices of decoder and connector")
    adam_lr: float = flag(2e-3, "AdamW's learning rate, for everything else")
    warmup: int = flag(20, "steps of linear warm-up; a cosine to zero follows")
    clip: float = flag(1.0, "largest norm of the gradient")
    stream_weight: float = flag(1.0, "omega, the weight of the streaming loss")
    vit_steps: int = flag(250, "steps of the vision encoder's warm-up on single frames")
    vit_lr: float = flag(
        0.0, "AdamW's learning rate for the vision encoder after its warm-up; 0 freezes it, as the paper does"
    )
    threshold: float = flag(0.5, "speak when the probability of silence is below it, in evaluation")
    max_words: int = flag(12, "a longer response is cut there, in tokens")
    eval_every: int = flag(100, "steps between validations; 0 validates at the end only")
    eval_clips: int = flag(256, "validation clips at the end; a quarter of them during training")
    save_every: int = flag(100, "steps between training states, for --resume")
    device: str = flag("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16 uses autocast, on a CUDA GPU", ("float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the decoder")
    recompute: bool = flag(False, "activation checkpointing: compute each decoder block again on the way back")
    fsdp: bool = flag(False, "under torchrun, split the weights over the processes (FSDP2) instead of copying them")

    def __post_init__(self):
        _check_fields(self)
        _require(self.seed < 2**63, f"seed must be below 2**63, got {self.seed}")
        for name in ("steps", "seed", "warmup", "vit_steps", "eval_every"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("batch_size", "accumulate", "eval_clips", "save_every", "max_words"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "adam_lr", "clip"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            self.vit_lr >= 0 and self.stream_weight >= 0,
            f"vit_lr and stream_weight must not be negative, got {self.vit_lr}, {self.stream_weight}",
        )
        _require(0 <= self.threshold <= 1, f"threshold is a probability, expected 0 to 1, got {self.threshold}")
        _require(
            not self.fsdp or self.optimizer == "adamw",
            "fsdp splits matrices, which muon needs whole; pass --optimizer adamw",
        )
        _ = self.stages  # refuses a curriculum that cannot be read

    @property
    def stages(self) -> list[tuple[float, int]]:
        """The curriculum as (share of the steps, frames), e.g. [(0.0, 2), (0.2, 4), (0.5, 8)]."""
        try:
            stages = [
                (float(share), int(frames))
                for share, frames in (part.split(":") for part in self.curriculum.split(","))
            ]
        except ValueError:
            stages = []
        if (
            not stages
            or stages[0][0] != 0
            or sorted(stages) != stages
            or not stages[-1][0] < 1
            or min(frames for _, frames in stages) < 1
        ):
            expected = "SHARE:FRAMES pairs that begin at 0 and grow, such as 0:2,0.5:8"
            raise UserError(f"curriculum got {self.curriculum!r}, expected {expected}")
        return stages

    def frames_at(self, step: int, longest: int) -> int:
        """Frames of the clips of a step; the last stage always trains on full-length clips."""
        current = [frames for share, frames in self.stages if step >= share * self.steps]
        return longest if len(current) == len(self.stages) else min(current[-1], longest)


@dataclass(frozen=True)
class RealConfig:
    """Real parts in the place of the tiny ones, which stay where a name is empty. mod/real reads them."""

    llm: str = flag("", "folder or hub name of a Llama-type language model; its sizes replace the decoder's")
    vision: str = flag("", "folder or hub name of a SigLIP vision encoder; its sizes replace the encoder's")
    data: str = flag("", "streams.jsonl: a video and its conversation a line, cut into pieces of --frames at --fps")
    holdout: float = flag(0.1, "share of the videos, the last ones, kept for validation; 0 validates on all")
    features: str = flag("runs/features", "folder in which a frozen encoder's features of real videos are kept")
    symbols: str = flag("", "the tokenizer's symbols, e.g. 'bos=<s> eos=</s> user=User assistant=Assistant'")
    train: str = flag(
        "auto",
        "the decoder's part in training: everything, low-rank changes, or nothing but the connector (routers always); "
        "auto is lora with --llm, full without",
        ("auto", "full", "lora", "connector"),
    )
    lora_rank: int = flag(128, "rank of the low-rank changes")
    lora_alpha: float = flag(256.0, "their scale is alpha / rank")

    def __post_init__(self):
        _check_fields(self)
        _require(0 <= self.holdout < 1, f"holdout is a share, expected 0 to below 1, got {self.holdout}")
        _require(
            self.lora_rank >= 1 and self.lora_alpha > 0,
            f"lora_rank and lora_alpha must be positive, got {self.lora_rank} and {self.lora_alpha}",
        )
        _require(
            self.llm or self.train in ("auto", "full"),
            f"train got {self.train!r}, which needs a trained decoder; name one with --llm or pass --train full",
        )

    @property
    def trained(self) -> str:
        """full, lora or connector."""
        return self.train if self.train != "auto" else "lora" if self.llm else "full"


@dataclass(frozen=True)
class StreamConfig:
    """A live stream: when to speak, what to remember, and what to do when frames come too fast."""

    threshold: float = flag(
        0.5, "speak when the probability of silence is below it", otherwise="as calibrated, else as trained"
    )
    refractory: int = flag(0, "frames after a narration in which nothing but a question makes it speak")
    window: int = flag(0, "frames to remember; 0 remembers everything")
    memory_mb: float = flag(0.0, "instead of --window: as many frames as fit into so many MB of keys and values")
    forget: str = flag("all", "what of a frame is forgotten: all, its text too; or vision alone", ("all", "vision"))
    sinks: int = flag(0, "first frames that are never forgotten, beside <bos> and the text before them")
    positions: str = flag(
        "contiguous",
        "absolute positions grow for ever; contiguous ones close the gap that a forgotten frame leaves",
        ("absolute", "contiguous"),
    )
    on_late: str = flag(
        "off",
        "when frames come in real time, faster than they are processed: wait, or skip to the latest; off does not look "
        "at the clock",
        ("off", "wait", "skip"),
    )

    def __post_init__(self):
        _check_fields(self)
        _require(0 <= self.threshold <= 1, f"threshold is a probability, expected 0 to 1, got {self.threshold}")
        for name in ("refractory", "window", "sinks", "memory_mb"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(
            not (self.window and self.memory_mb), "got window and memory_mb, expected one of them; leave the other out"
        )
        _require(
            not (self.memory_mb and self.forget == "vision"),
            "memory_mb cannot bound a dialogue that is never forgotten; pass --forget all, or --window",
        )

    @property
    def most_frames(self) -> float:
        """Frames that are remembered at most; infinite when nothing is forgotten."""
        return self.sinks + self.window if self.window else math.inf

    @property
    def forgets_text(self) -> bool:
        return self.forget == "all"

    @property
    def contiguous(self) -> bool:
        return self.positions == "contiguous"


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    real: RealConfig = RealConfig()


PRESETS = {
    "tiny": Config(),
    # Harder, so that variants differ: what the tables of mod/study are made with.
    "study": Config(
        data=DataConfig(drift=0.3, sparks=0.4, question_rate=0.7),
        train=TrainConfig(steps=200, eval_every=50, save_every=100),
    ),
    # Harder still, so that the systems of the field differ: a landmark, wide frames, clutter, questions in advance.
    "field": Config(
        data=DataConfig(drift=0.3, sparks=0.4, question_rate=0.8, ahead=0.5, landmark=0.8, wide=0.5, distractors=8),
        train=TrainConfig(steps=500, batch_size=8, eval_every=0, save_every=250, eval_clips=128),
    ),
    # The paper's model: SigLIP-L/16-384, Llama-3-8B, LoRA 128/256, r = 0.2 interleaved, the score as the gate, 2 fps.
    # Steps and batch are the base paper's two epochs in order of magnitude only: they depend on the data.
    "paper": Config(
        ModelConfig(
            image_size=384,
            patch_size=16,
            vit_dim=1024,
            vit_depth=24,
            vit_heads=16,
            vit_hidden=4096,
            grid=7,
            vocab_size=128256,
            dim=4096,
            depth=32,
            heads=32,
            kv_heads=8,
            head_dim=128,
            ffn_hidden=14336,
            rope_base=5e5,
            qk_norm=False,
            tie_embeddings=False,
            gate="update",
        ),
        DataConfig(frames=120, fps=2.0),
        TrainConfig(
            steps=4000,
            batch_size=64,
            accumulate=8,
            optimizer="adamw",
            adam_lr=2e-4,
            warmup=200,
            vit_steps=0,
            curriculum="0:120",
            max_words=100,
            eval_clips=32,
            eval_every=0,
            dtype="bfloat16",
            recompute=True,
        ),
    ),
}
