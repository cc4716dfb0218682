"""What a stream costs, as formulas: floating-point operations (FLOPs, a count) and entries and bytes of the KV cache.

A layer processes n = kept * frames + text tokens. One multiply and one add are two FLOPs; attention is counted over
the full n * n square, as torch's own counter does.
"""

from dataclasses import replace

from mod.config import ModelConfig


def dense(config: ModelConfig) -> ModelConfig:
    """The same model with full computation: every layer processes every token."""
    return replace(config, layers="none")


def layer_tokens(config: ModelConfig, frames: int, text: int) -> list[int]:
    """Tokens that each decoder layer processes, which is also what it leaves in the cache."""
    return [kept * frames + text for kept in config.kept]


def forward_flops(config: ModelConfig, frames: int, text: int) -> dict[str, int]:
    """FLOPs of one offline forward pass over one stream, by part; norms and other elementwise work are left out."""
    patches, pixels = config.patches_per_side**2, 3 * config.patch_size**2
    width, hidden = config.vit_dim, config.vit_hidden
    vit_block = 2 * patches * (4 * width**2 + 2 * width * hidden) + 4 * patches**2 * width
    # The pooling head: one query, keys and values of every patch, one MLP.
    pooling = 2 * (2 * width**2 + 2 * patches * width**2 + 2 * width * hidden) + 4 * patches * width
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    tokens, vision = layer_tokens(config, frames, text), config.frame_tokens * frames
    learned = sum(ratio < 1 for ratio in config.keep) if config.select == "learned" else 0
    return {
        "vit": frames * (2 * patches * pixels * width + config.vit_depth * vit_block + pooling),
        "connector": 2 * vision * (width * config.dim + config.dim**2),
        "router": 2 * vision * config.dim * learned,
        "projections": sum(2 * n * config.dim * (2 * queries + 2 * keys) for n in tokens),
        "attention": sum(4 * n * n * queries for n in tokens),
        "ffn": sum(2 * n * 3 * config.dim * config.ffn_hidden for n in tokens),
        "head": 2 * (vision + text) * config.dim * config.vocab_size,
    }


def decoder_flops(config: ModelConfig, frames: int, text: int) -> int:
    """FLOPs of the decoder's layers and their routers: what the choice of layers changes."""
    parts = forward_flops(config, frames, text)
    return sum(parts[name] for name in ("router", "projections", "attention", "ffn"))


def kv_bytes(config: ModelConfig, frames: int, text: int, number_bytes: int = 4) -> int:
    """Bytes of all keys and values after a stream of so many frames and text tokens."""
    return sum(layer_tokens(config, frames, text)) * 2 * config.kv_heads * config.head_dim * number_bytes


def ratios(config: ModelConfig, frames: int, text: int) -> dict[str, float]:
    """Cost as a share of full computation: the decoder's FLOPs and the KV cache."""
    full = dense(config)
    return {
        "flop_ratio": decoder_flops(config, frames, text) / decoder_flops(full, frames, text),
        "kv_ratio": kv_bytes(config, frames, text) / kv_bytes(full, frames, text),
    }


def average_text(clips) -> int:
    """Mean number of text tokens of a clip's stream, <bos> and turn symbols included."""
    lengths = [
        1 + sum(len(say.text.split()) + (2 if say.role == "assistant" else 1) for say in clip.said) for clip in clips
    ]
    return round(sum(lengths) / len(lengths))
