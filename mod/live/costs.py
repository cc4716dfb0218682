"""What a live stream costs, as formulas: FLOPs of its chunks, cache entries, and the window that fits into a budget.

A layer processes kept * frames + text tokens, and caches as many. One multiply and one add are two FLOPs; norms and
other elementwise work are left out.

Read next: record.py
"""

from dataclasses import fields

from mod.cache import KVCache
from mod.config import ModelConfig


def dense(config: ModelConfig) -> ModelConfig:
    """The same model with full computation: every layer processes every token that the encoder makes."""
    return ModelConfig(**{each.name: getattr(config, each.name) for each in fields(ModelConfig)} | {"layers": "none"})


def layer_tokens(config: ModelConfig, frames: int, text: int) -> list[int]:
    """Tokens that each decoder layer processes, which is also what it leaves in the cache."""
    return [kept * frames + text for kept in config.keep_counts]


def held_bytes(cache: KVCache, row: int = 0) -> int:
    """Bytes of the keys and values that one stream holds (what is in use, not what is allocated)."""
    number_bytes = cache.layers[0].k.element_size() + cache.layers[0].v.element_size()
    return sum(cache.entries(row)) * cache.config.kv_heads * cache.config.head_dim * number_bytes


def chunk_flops(config: ModelConfig, frames: int, text: int, held_frames: int, held_text: int) -> int:
    """FLOPs of the decoder's layers for a chunk of a stream: so many new frames and text tokens, after which the cache
    stands for `held_frames` frames and `held_text` text tokens."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.dim * (2 * queries + 2 * keys) + 3 * config.dim * config.ffn_hidden
    new, seen = layer_tokens(config, frames, text), layer_tokens(config, held_frames, held_text)
    products = sum(2 * n * weights + 4 * n * s * queries for n, s in zip(new, seen, strict=True))
    scored = sum(ratio < 1 for ratio in config.keep_ratios) if config.select == "learned" else 0
    return products + 2 * frames * config.frame_tokens * config.dim * scored


def window_that_fits(config: ModelConfig, budget: int, words: int, spare: int, sinks: int = 0,
                     number_bytes: float = 4) -> int:
    """The longest window, in frames, whose keys and values surely fit into `budget` bytes: with `words` text tokens
    after each of its frames and those of `sinks`, and `spare` more. 0 when not even one frame fits."""
    entry = 2 * config.kv_heads * config.head_dim * number_bytes
    frame = (sum(config.keep_counts) + config.depth * words) * entry
    return max(0, int((budget - config.depth * spare * entry) // frame) - sinks)
