"""Chapter 7: what it costs."""

from mod.config import ModelConfig
from mod.study.costs import frame_flops

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "7.1",
    (
        "def frame_bytes(kept, kv_heads, head_dim, number_bytes):\n    return sum(kept) * kv_heads * head_dim * number_bytes",
        "a key and a value",
    ),
    (
        "def frame_bytes(kept, kv_heads, head_dim, number_bytes):\n"
        "    return len(kept) * kept[0] * 2 * kv_heads * head_dim * number_bytes",
        "length of its own",
    ),
    (
        "def frame_bytes(kept, kv_heads, head_dim, number_bytes):\n    return sum(kept) * 2 * kv_heads * head_dim",
        "counts numbers, not bytes",
    ),
)
def frame_bytes(answer) -> str:
    kept, heads, size, number = (26, 6, 26, 6), 2, 32, 4
    got = something(answer(kept, heads, size, number), "frame_bytes(...)")
    entry = heads * size
    hints = {
        "Half of it: an entry of the cache is a key and a value.": sum(kept) * entry * number,
        "That is full computation's: every layer has a length of its own, so add up `kept`.":
            len(kept) * kept[0] * 2 * entry * number,
        "It counts numbers, not bytes: multiply by number_bytes.": sum(kept) * 2 * entry,
    }  # fmt: skip
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    same(got, sum(kept) * 2 * entry * number, "frame_bytes((26, 6, 26, 6), 2, 32, 4)")
    same(answer((50, 10) * 16, 8, 128, 2), 960 * 2 * 8 * 128 * 2, "frame_bytes((50, 10) * 16, 8, 128, 2)")
    return "Right. The second number tried is the paper's model: compare it with the table above, in MiB."


@exercise(
    "7.2",
    ("def keep_ratio_for(share, routed):\n    return share", "dense layers"),
    ("def keep_ratio_for(share, routed):\n    return (share - (1 - routed)) / routed", "None"),
    ("def keep_ratio_for(share, routed):\n    return share / routed", "dense layers"),
    ("def keep_ratio_for(share, routed):\n    return ((share - (1 - routed)) / routed) ** 0.5", "attention"),
    ("def keep_ratio_for(share, routed):\n    return 0.2 if share == 0.6 else None", "does it"),
)
def keep_ratio_for(answer) -> str:
    got = something(answer(0.6, 0.5), "keep_ratio_for(0.6, 0.5)")
    for mistake in (0.6, 1.2):
        looks_like(
            got, mistake, f"With r = {got:g} in half of the layers the whole cache would hold {0.5 + 0.5 * got:g} of full "
            "computation's, not 0.6: the dense layers keep everything, and r applies to the others alone."
        )  # fmt: skip
    looks_like(got, 0.2**0.5, "That is the r at which *attention* is down to 0.6; the cache shrinks with r, not with r².")
    same(got, 0.2, "keep_ratio_for(0.6, 0.5)")
    for share, routed, want in ((0.5, 0.5, 0.0), (0.4, 1.0, 0.4), (1.0, 0.5, 1.0), (0.7, 0.75, 0.6)):
        what = f"keep_ratio_for({share}, {routed})"
        got = answer(share, routed)
        if got is None:
            raise Wrong(f"{what} is None, but r = {want:g} does it: put it into (1 - q) + q·r.")
        same(got, want, what)
    for share, routed in ((0.4, 0.5), (0.2, 0.25)):
        got = answer(share, routed)
        if got is not None:
            raise Wrong(
                f"keep_ratio_for({share}, {routed}) is {got:g}, but no layer can keep a share outside 0 to 1 of its "
                "tokens. Return None: with so few routed layers no r does it."
            )
    return "Right. With every other layer routed, half is the floor: below it only more routed layers help."


@exercise(
    "7.3",
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.kept, config.keep):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * cached * q
        flops += 2 * config.frame_tokens * config.dim if ratio < 1 else 0
    return flops""",
        "itself",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.kept, config.keep):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * (cached + 1) * q
    return flops""",
        "router",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.kept, config.keep):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * (cached + 1) * k
        flops += 2 * config.frame_tokens * config.dim if ratio < 1 else 0
    return flops""",
        "key/value heads",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, n, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.frame_tokens, 0
    for kept, ratio in zip(config.kept, config.keep):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * n * (cached + 1) * q
        flops += 2 * n * config.dim if ratio < 1 else 0
    return flops""",
        "every frame's",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.kept, config.keep):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * (cached + 1) * q
        flops += 2 * kept * config.dim if ratio < 1 else 0
    return flops""",
        "before it is chosen",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, n, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.frame_tokens, 0
    for ratio in config.keep:
        flops += 2 * n * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * n * n * (cached + 1) * q
        flops += 2 * n * config.dim if ratio < 1 else 0
    return flops""",
        "full computation",
    ),
)
def one_more_frame(answer) -> str:
    def count(config, cached, see=1, router=True, heads=None, keys=None, scored=None, through=None):
        q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
        for kept, ratio in zip(config.kept, config.keep, strict=True):
            n = through or kept
            flops += 2 * n * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden)
            flops += 4 * n * (keys or n) * (cached + see) * (heads or config.heads) * config.head_dim
            flops += 2 * (kept if scored else config.frame_tokens) * config.dim if ratio < 1 and router else 0
        return flops

    config, cached = ModelConfig(), 3
    got = something(answer(config, cached), "one_more_frame(...)")
    n = config.frame_tokens
    hints = {
        "The new frame's own keys are missing: its tokens see the cached frames and the frame itself.":
            count(config, cached, see=0),
        "The router is missing: a routed layer scores all N tokens of the frame, one dot product each.":
            count(config, cached, router=False),
        "Attention is counted with the key/value heads. They are fewer than the query heads, but shared: each query head "
        "still does its own products.": count(config, cached, heads=config.kv_heads),
        "The keys are every frame's N tokens, but a routed layer's cache holds only the kept ones: "
        "attention shrinks twice.": count(config, cached, keys=n),
        "The router is charged for the kept tokens alone, but a token has to be scored before it is chosen: all N are.":
            count(config, cached, scored=True),
        "All N tokens go through the routed layers: that is masking, not skipping, and costs as much as full computation.":
            count(config, cached, through=n),
    }  # fmt: skip
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint, tolerance=0)
    same(got, frame_flops(config, cached, 0), "one_more_frame(ModelConfig(), 3)", tolerance=0)
    for changes in ({"layers": "none"}, {"layers": "all", "keep_ratio": 0.5}, {"heads": 8, "kv_heads": 1, "layers": "2,3"}):
        other = ModelConfig(**changes)
        named = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        same(answer(other, 7), frame_flops(other, 7, 0), f"one_more_frame(ModelConfig({named}), 7)", tolerance=0)
    return "Right, to the last operation. Now you can price any pattern before anybody trains it."
