"""What training and streaming cost, as formulas: FLOPs (operations, a count), bytes of the cache and bytes that must be
read, saved activations.

A layer processes n = kept * frames + text tokens: every formula below is a sum over layers of something in n. One
multiply and one add are two FLOPs; attention is counted over the full n * n square, as torch's own counter does; norms
and other elementwise work are left out. tests/test_costs.py holds the formulas against torch's counter and the real
tensors.
"""

from collections.abc import Sequence

from mod.config import ModelConfig
from mod.data import Clip
from mod.layout import Vocabulary, lay_out
from mod.live.costs import chunk_flops, layer_tokens

DECODER = ("router", "projections", "attention", "ffn")  # the parts that the choice of layers changes


def learned_layers(config: ModelConfig) -> int:
    """Layers whose tokens are scored by a linear LayerExpert."""
    return sum(ratio < 1 for ratio in config.keep_ratios) if config.select == "learned" else 0


def forward_flops(config: ModelConfig, frames: int, text: int, logits: int | None = None) -> dict[str, int]:
    """FLOPs of one offline forward pass over one stream, by part. `logits`: at how many tokens; default at all."""
    patches, pixels = config.patches_per_side**2, 3 * config.patch_size**2
    width, hidden = config.vit_dim, config.vit_hidden
    vit_block = 2 * patches * (4 * width**2 + 2 * width * hidden) + 4 * patches**2 * width
    # The pooling head: one query, keys and values of every patch, one MLP.
    pooling = 2 * (2 * width**2 + 2 * patches * width**2 + 2 * width * hidden) + 4 * patches * width
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    tokens, vision = layer_tokens(config, frames, text), config.frame_tokens * frames
    return {
        "vit": frames * (2 * patches * pixels * width + config.vit_depth * vit_block + pooling),
        "connector": 2 * vision * (width * config.dim + config.dim**2),
        "router": 2 * vision * config.dim * learned_layers(config),
        "projections": sum(2 * n * config.dim * (2 * queries + 2 * keys) for n in tokens),
        "attention": sum(4 * n * n * queries for n in tokens),
        "ffn": sum(2 * n * 3 * config.dim * config.ffn_hidden for n in tokens),
        "head": 2 * (vision + text if logits is None else logits) * config.dim * config.vocab_size,
    }


def training_flops(config: ModelConfig, frames: int, text: int, labels: int) -> dict[str, int]:
    """FLOPs of one training step on one stream with so many labels: forward and backward, vision encoder frozen.

    A product costs three times its forward: once forward, once for the gradient of each of its two factors. Nothing
    before the connector is trained, so its first layer needs no gradient of its input.
    """
    forward = forward_flops(config, frames, text, labels)
    first = 2 * config.frame_tokens * frames * config.vit_dim * config.dim
    return {name: flops if name == "vit" else 3 * flops for name, flops in forward.items()} | {
        "connector": 3 * forward["connector"] - first
    }


def decoder_flops(config: ModelConfig, frames: int, text: int) -> int:
    """FLOPs of the decoder's layers and their routers, forward; a training step has three times as many."""
    parts = forward_flops(config, frames, text)
    return sum(parts[name] for name in DECODER)


def frame_flops(config: ModelConfig, cached: int, text: int) -> int:
    """FLOPs of the decoder's layers for one more frame, after `cached` frames and `text` text tokens."""
    return chunk_flops(config, 1, 0, cached + 1, text)


def word_flops(config: ModelConfig, cached: int, text: int) -> int:
    """FLOPs of the decoder's layers for one more text token, after `cached` frames and `text` text tokens."""
    return chunk_flops(config, 0, 1, cached, text + 1)


def layer_weights(config: ModelConfig) -> list[int]:
    """Weights of every decoder layer, its router's included: numbers that are read whenever a token runs through it."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    products = config.dim * (2 * queries + 2 * keys) + 3 * config.dim * config.ffn_hidden
    norms = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    biases = queries + 2 * keys if config.qkv_bias else 0
    router = config.dim if config.select == "learned" else 0
    return [products + norms + biases + (router if ratio < 1 else 0) for ratio in config.keep_ratios]


def read_bytes(config: ModelConfig, frames: int, text: int, held_frames: int, held_text: int,
               number_bytes: int = 4) -> int:
    """Bytes that the decoder's layers must at least read for a chunk of a stream: so many new frames and text tokens,
    after which the cache stands for `held_frames` frames and `held_text` text tokens.

    They are the weights once, and all keys and values that are held then. A chunk is a few dozen tokens, so this, and
    not the FLOPs, is what bounds a large model: every weight that is read is used only as often as there are tokens.
    A layer that none of the tokens enters reads only its router's weights.
    """
    entry = 2 * config.kv_heads * config.head_dim
    new, seen = layer_tokens(config, frames, text), layer_tokens(config, held_frames, held_text)
    layers = zip(new, seen, layer_weights(config), strict=True)
    scored = config.dim if config.select == "learned" and frames else 0
    return number_bytes * sum(weights + entry * s if n else scored for n, s, weights in layers)


def activation_numbers(config: ModelConfig, frames: int, text: int) -> dict[str, int]:
    """Numbers that one stream's training step keeps for its backward pass in the decoder's layers, by part.

    Per token and layer: each norm keeps its input, the input normed, and its output, which the next product needs, with
    one statistic; attention its queries, keys, values before and after norm and rotation, and its result; SwiGLU four
    hidden vectors. What a routed layer adds: the scored tokens and their scores, the updates and values before mu
    scales them, and the rotations of its own tokens. Dense layers share one set of rotations.
    """
    queries, keys, size = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.head_dim
    norms = 6 * config.dim + 2
    qk_norm = 2 * queries + 2 * keys + config.heads + config.kv_heads if config.qk_norm else 0
    attention = 2 * queries + 2 * keys + config.heads + qk_norm
    ffn = 4 * config.ffn_hidden
    tokens, every = layer_tokens(config, frames, text), config.frame_tokens * frames + text
    routed = [n for n, ratio in zip(tokens, config.keep_ratios, strict=True) if ratio < 1]
    rotated = sum(routed) + (every if len(routed) < config.depth else 0)
    # mu, one per token; the updates that it scales are kept for its gradient, if it learns; so are values and sigmoids.
    learned, value = config.select == "learned", not config.gate.endswith("update")
    gate = 1 + (config.dim if learned else 0) + (keys if learned and value else 0)
    scored = config.frame_tokens * frames * learned_layers(config)
    return {
        "norms": sum(tokens) * norms,
        "attention": sum(tokens) * attention + rotated * 2 * size,
        "ffn": sum(tokens) * ffn,
        "router": scored * (config.dim + 1 + (1 if value else 0)),
        "gate": sum(routed) * gate,
    }


def activation_bytes(config: ModelConfig, frames: int, text: int, number_bytes: int = 4) -> int:
    """Bytes that one stream's training step keeps for its backward pass in the decoder's layers."""
    return sum(activation_numbers(config, frames, text).values()) * number_bytes


def kv_bytes(config: ModelConfig, frames: int, text: int, number_bytes: int = 4) -> int:
    """Bytes of all keys and values after a stream of so many frames and text tokens."""
    return sum(layer_tokens(config, frames, text)) * 2 * config.kv_heads * config.head_dim * number_bytes


def frames_that_fit(config: ModelConfig, budget: int, text: int, number_bytes: int = 4) -> int:
    """The longest stream, in frames, whose keys and values fit into `budget` bytes beside `text` text tokens."""
    empty = kv_bytes(config, 0, text, number_bytes)
    return max(0, (budget - empty) // (kv_bytes(config, 1, text, number_bytes) - empty))


def average_text(clips: Sequence[Clip], words: Vocabulary) -> int:
    """Mean number of text tokens of a clip's stream, <bos> and turn symbols included."""
    return round(sum(len(lay_out(words, len(clip.frames), 0, clip.said).ids) for clip in clips) / len(clips))
