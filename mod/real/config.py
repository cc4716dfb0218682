"""The settings of a run with real parts: which checkpoints and videos, and what of the decoder is trained."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from mod.config import Config, DataConfig, ModelConfig, TrainConfig, check, require

MOST = 2**20  # of any size: no model is wider, and what is damaged is told before memory is asked for
LLAMA, SIGLIP = "<Llama-3-8B>", "<SigLIP-L/16-384>"  # in the place of folders: the preset "paper" wants them named


@dataclass(frozen=True)
class RealConfig:
    """Real parts in the place of the tiny ones, which stay where a name is empty."""

    llm: str = ""  # folder or hub name of a Llama-type language model; its sizes replace the decoder's
    vision: str = ""  # folder or hub name of a SigLIP vision encoder; its sizes replace the encoder's
    data: str = ""  # streams.jsonl: a video and its conversation per line, cut into pieces of --frames at --fps
    frame_tokens: str = ""  # another way to say --grid: 1+7x7 is --grid 7
    sentences: bool = False  # on synthetic streams: whole sentences in the place of the closed words
    holdout: float = 0.1  # share of the videos, the last ones, kept for validation; 0 validates on all
    features: str = "runs/features"  # folder in which a frozen encoder's features of real videos are kept
    symbols: str = ""  # the tokenizer's symbols, e.g. 'bos=<s> eos=</s> user=User assistant=Assistant'
    align_steps: int = 0  # steps of the connector's warm-up, after the tiny encoder's
    train: Literal["auto", "full", "lora", "connector"] = "auto"  # decoder: auto is lora with --llm, full without
    lora_rank: int = 128  # rank of the low-rank changes
    lora_alpha: float = 256.0  # their scale is alpha / rank

    def __post_init__(self):
        check(self, {"lora_rank": 1, "lora_alpha": 1e-30})
        require(self.holdout < 1, f"holdout is a share, expected 0 to below 1, got {self.holdout}")
        require(bool(self.llm) or self.train in ("auto", "full"),
                f"train got {self.train!r}, which needs a trained decoder; name one with --llm or pass --train full")

    @property
    def trained(self) -> str:
        """The decoder's part in training: full, lora or connector (then nothing of it; routers always learn)."""
        return self.train if self.train != "auto" else "lora" if self.llm else "full"


@dataclass(frozen=True)
class RealModel(ModelConfig):
    """Sizes of a model with real parts.

    Whether they fit together is asked by `fit`, not on the way: flags are read before the sizes of the checkpoints.
    """

    rope_factor: float = 1.0  # Llama 3.1 scaling of RoPE: how much the slow pairs are slowed; 1 is none
    rope_low: float = 1.0  # a pair with fewer turns within rope_context is slow
    rope_high: float = 4.0  # a pair with more turns within rope_context is left alone
    rope_context: int = 8192  # context that the unscaled RoPE was trained for

    def __post_init__(self):
        pass

    def fit(self) -> "RealModel":
        """This. Raises UserError when a size is none, or when sizes do not fit together."""
        check(self, {"rope_factor": 1, "rope_context": 1})
        for name in (each.name for each in fields(self) if each.type is int and each.name != "rope_context"):
            require(getattr(self, name) <= MOST, f"{name} must be at most {MOST}, got {getattr(self, name)}")
        super().__post_init__()
        require(self.rope_low < self.rope_high,
                f"rope_low must be below rope_high, got {self.rope_low} and {self.rope_high}")
        return self


@dataclass(frozen=True)
class RealTrain(TrainConfig):
    """The training loop, for models that fill a GPU."""

    recompute: bool = False  # activation checkpointing: compute each decoder block again on the way back


@dataclass(frozen=True)
class RealRun(Config):
    """A run with real parts."""

    world: ClassVar[str] = "real"
    model: RealModel = RealModel()
    train: RealTrain = RealTrain()
    real: RealConfig = RealConfig()


PRESETS = {
    # Tiny sizes wherever no checkpoint is named.
    "real": RealRun(),
    # A real language model on synthetic streams, in its own words and chat format.
    "llm": RealRun(
        RealModel(image_size=56, grid=7),
        DataConfig(frames=4, event_rate=0.7),
        RealTrain(steps=140, batch_size=2, adam_lr=1e-3, warmup=10, max_words=16, log_every=5, eval_every=20,
                  eval_clips=48, save_every=20, vit_steps=400),
        RealConfig(sentences=True, lora_rank=16, lora_alpha=32.0, align_steps=150),
    ),
    # The paper's model: SigLIP-L/16-384, Llama-3-8B, LoRA 128/256, r = 0.2 interleaved, the score as the gate, 2 fps.
    # Steps and batch are the base paper's two epochs in order of magnitude only: they depend on the data.
    "paper": RealRun(
        RealModel(image_size=384, patch_size=16, vit_dim=1024, vit_depth=24, vit_heads=16, vit_hidden=4096, grid=7,
                  vocab_size=128256, dim=4096, depth=32, heads=32, kv_heads=8, head_dim=128, ffn_hidden=14336,
                  rope_base=5e5, qk_norm=False, tie_embeddings=False, gate="score-update"),
        DataConfig(frames=120, fps=2.0),
        RealTrain(steps=4000, batch_size=64, accumulate=8, optimizer="adamw", adam_lr=2e-4, warmup=200, vit_steps=0,
                  max_words=100, eval_clips=32, eval_every=0, dtype="bfloat16", recompute=True),
        RealConfig(llm=LLAMA, vision=SIGLIP),
    ),
}
