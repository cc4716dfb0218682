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
    (
        "def frame_bytes(kept, kv_heads, head_dim, number_bytes):\n    return sum(kept) * 2 * head_dim * number_bytes",
        "heads are missing",
    ),
    (
        "def frame_bytes(kept, kv_heads, head_dim, number_bytes):\n    return sum(kept) / len(kept) * 2 * kv_heads * head_dim * number_bytes",
        "mean over layers",
    ),
    (
        "def frame_bytes(kept, kv_heads, head_dim, number_bytes):\n    return [n * 2 * kv_heads * head_dim * number_bytes for n in kept]",
        "add up the layers",
    ),
)
def frame_bytes(answer) -> str:
    kept, heads, size, number = (26, 6, 26, 6, 26), 3, 32, 4
    got = something(answer(kept, heads, size, number), "frame_bytes(...)")
    entry = heads * size
    if isinstance(got, (list, tuple)):
        raise Wrong("This is a list of bytes, one for each layer; add up the layers.")
    hints = {
        "Half of it: an entry of the cache is a key and a value.": sum(kept) * entry * number,
        "That is full computation's: every layer has a length of its own, so add up `kept`.":
            len(kept) * kept[0] * 2 * entry * number,
        "It counts numbers, not bytes: multiply by number_bytes.": sum(kept) * 2 * entry,
        "The heads are missing: every key/value head has a key and a value.": sum(kept) * 2 * size * number,
        "This is a mean over layers; a frame leaves entries in all of them.": sum(kept) / len(kept) * 2 * entry * number,
    }
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    same(got, sum(kept) * 2 * entry * number, "frame_bytes((26, 6, 26, 6, 26), 3, 32, 4)")
    same(answer((50, 10) * 16, 8, 128, 2), 960 * 2 * 8 * 128 * 2, "frame_bytes((50, 10) * 16, 8, 128, 2)")
    return "Right. The second number tried is the paper's model: compare it with the table above, in MiB."


@exercise(
    "7.2",
    ("def keep_ratio_for(share, routed):\n    return share", "dense layers"),
    ("def keep_ratio_for(share, routed):\n    return (share - (1 - routed)) / routed", "None"),
    ("def keep_ratio_for(share, routed):\n    return share / routed", "dense layers"),
    ("def keep_ratio_for(share, routed):\n    return ((share - (1 - routed)) / routed) ** 0.5", "attention"),
    ("def keep_ratio_for(share, routed):\n    return 0.2 if share == 0.6 else None", "does it"),
    ("def keep_ratio_for(share, routed):\n    r = share / routed\n    return r if 0 <= r <= 1 else None", "does it"),
    ("def keep_ratio_for(share, routed):\n    r = (share - (1 - routed)) / routed\n    return r if r > -1e-9 else None", "outside 0 to 1"),
    ("def keep_ratio_for(share, routed):\n    r = (share - routed) / (1 - routed)\n    return r if -1e-9 <= r <= 1 + 1e-9 or routed != 0.5 else None", "swapped"),
)
def keep_ratio_for(answer) -> str:
    got = answer(0.6, 0.5)
    if got is None and answer(0.3, 1.0) is not None:
        raise Wrong("keep_ratio_for(0.6, 0.5) is None, but r = 0.2 does it: put it into (1 - q) + q·r.")
    something(got, "keep_ratio_for(0.6, 0.5)")
    for mistake in (0.6, 1.2):
        looks_like(
            got, mistake, f"With r = {got:g} in half of the layers the whole cache would hold {0.5 + 0.5 * got:g} of full "
            "computation's, not 0.6: the dense layers keep everything, and r applies to the others alone."
        )
    looks_like(got, 0.2**0.5, "That is the r at which *attention* is down to 0.6; the cache shrinks with r, not with r².")
    same(got, 0.2, "keep_ratio_for(0.6, 0.5)")
    for share, routed, want in ((0.5, 0.5, 0.0), (1.0, 0.5, 1.0), (0.7, 0.75, 0.6), (0.4, 1.0, 0.4)):
        what = f"keep_ratio_for({share}, {routed})"
        got = answer(share, routed)
        if got is None:
            raise Wrong(f"{what} is None, but r = {want:g} does it: put it into (1 - q) + q·r.")
        if routed not in (0.5, 1.0):  # where swapping them shows
            looks_like(got, (share - routed) / (1 - routed), "The shares are swapped: the dense share is 1 - routed, and it is the routed share that r multiplies.")
        same(got, want, what)
    for share, routed in ((0.4, 0.5), (0.2, 0.25), (1.2, 0.5)):
        got = answer(share, routed)
        if got is not None:
            raise Wrong(
                f"keep_ratio_for({share}, {routed}) is {got:g}, but no layer can keep a share outside 0 to 1 of its "
                "tokens. Return None: with so few routed layers no r does it."
            )
    return "Right. With every other layer routed, half is the floor: below it only more routed layers help."


_FRAME = """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.keep_counts, config.keep_ratios):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * (cached + 1) * q
        flops += 2 * config.frame_tokens * config.dim if ratio < 1 else 0
    return flops"""


@exercise(
    "7.3",
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.keep_counts, config.keep_ratios):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * cached * q
        flops += 2 * config.frame_tokens * config.dim if ratio < 1 else 0
    return flops""",
        "itself",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.keep_counts, config.keep_ratios):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * (cached + 1) * q
    return flops""",
        "router",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.keep_counts, config.keep_ratios):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * (cached + 1) * k
        flops += 2 * config.frame_tokens * config.dim if ratio < 1 else 0
    return flops""",
        "key/value heads",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, n, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.frame_tokens, 0
    for kept, ratio in zip(config.keep_counts, config.keep_ratios):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * n * (cached + 1) * q
        flops += 2 * n * config.dim if ratio < 1 else 0
    return flops""",
        "every frame's N",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, 0
    for kept, ratio in zip(config.keep_counts, config.keep_ratios):
        flops += 2 * kept * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * kept * kept * (cached + 1) * q
        flops += 2 * kept * config.dim if ratio < 1 else 0
    return flops""",
        "before it is chosen",
    ),
    (
        """def one_more_frame(config, cached):
    q, k, n, flops = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.frame_tokens, 0
    for ratio in config.keep_ratios:
        flops += 2 * n * config.dim * (2 * q + 2 * k + 3 * config.ffn_hidden) + 4 * n * n * (cached + 1) * q
        flops += 2 * n * config.dim if ratio < 1 else 0
    return flops""",
        "full computation",
    ),
    (_FRAME.replace("4 * kept * kept", "2 * kept * kept"), "one of the two products"),
    (_FRAME.replace("2 * k +", "2 * q +"), "kv_heads of them"),
    (_FRAME.replace("2 * kept * config.dim", "kept * config.dim"), "A multiply-add"),
    (_FRAME.replace("return flops", "return flops // 2"), "Half of it"),
    (_FRAME.replace("4 * kept * kept * (cached + 1)", "4 * (kept * (cached + 1)) ** 2"), "do not ask again"),
    (_FRAME.replace("4 * kept * kept * (cached + 1)", "4 * kept * kept * ((cached + 1) ** 2 - cached**2)"), "do not ask again"),
    (_FRAME.replace("4 * kept * kept", "4 * config.frame_tokens * kept"), "only K of every frame are asked"),
    (_FRAME.replace("3 * config.ffn_hidden", "2 * config.ffn_hidden"), "three matrices"),
    (_FRAME.replace("if ratio < 1 else 0", ""), "Dense layers have no router"),
    (_FRAME.replace("if ratio < 1 else 0", "if kept < config.frame_tokens else 0"), "still scores them"),
)
def one_more_frame(answer) -> str:
    def count(config, cached, see=1, router=True, heads=None, keys=None, scored=None, through=None, products=4, square=None,
              ffn=3, charged=False, kv_heads=None, multiply_add=2):
        q, flops = config.heads * config.head_dim, 0
        for kept, ratio in zip(config.keep_counts, config.keep_ratios, strict=True):
            n = through or kept
            k = (kv_heads or config.kv_heads) * config.head_dim
            flops += multiply_add * n * config.dim * (2 * q + 2 * k + ffn * config.ffn_hidden)
            pairs = n * n * square if square else n * (keys or n) * (cached + see)
            flops += products * pairs * (heads or config.heads) * config.head_dim
            flops += 2 * (kept if scored else config.frame_tokens) * config.dim if (ratio < 1 or charged) and router else 0
        return flops

    config, cached = ModelConfig(kv_heads=1), 3
    got = something(answer(config, cached), "one_more_frame(...)")
    n = config.frame_tokens
    hints = {
        "The new frame's own keys are missing: its tokens see the cached frames and the frame itself.":
            count(config, cached, see=0),
        "The router is missing: a routed layer scores all N tokens of the frame, one dot product each.":
            count(config, cached, router=False),
        "Attention is counted with the key/value heads. They are fewer than the query heads, but shared: each query head "
        "still does its own products.": count(config, cached, heads=config.kv_heads),
        "Attention is counted as K times every frame's N tokens. Only K tokens of the new frame ask, and only K of every frame are asked: "
        "it shrinks twice.": count(config, cached, keys=n),
        "Attention is two products, queries times keys and weights times values, of two FLOPs each: one of the two products is missing.":
            count(config, cached, products=2),
        "That is attention of the whole square. Old tokens do not ask again: only the new frame's K do.": count(config, cached, square=(cached + 1) ** 2),
        "That is the difference of two squares. Old tokens do not ask again, not even for the new keys: only the new frame's K do.":
            count(config, cached, square=(cached + 1) ** 2 - cached**2),
        "SwiGLU has three matrices: gate, up and down.": count(config, cached, ffn=2),
        "Keys and values are counted for all query heads; there are only config.kv_heads of them.":
            count(config, cached, kv_heads=config.heads),
        "A multiply-add is two FLOPs, so a matrix of m numbers costs 2m per token.": count(config, cached, multiply_add=1),
        "Dense layers have no router; only routed ones score.": count(config, cached, charged=True),
        "The router is charged for the kept tokens alone, but a token has to be scored before it is chosen: all N are.":
            count(config, cached, scored=True),
        "All N tokens go through the routed layers: that is masking, not skipping, and costs as much as full computation.":
            count(config, cached, through=n),
    }
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint, tolerance=0)
    looks_like(got, count(config, cached) // 2, "Half of it: a multiply-add is two FLOPs.", tolerance=0)
    same(got, frame_flops(config, cached, 0), "one_more_frame(ModelConfig(kv_heads=1), 3)", tolerance=0)
    at_full = ModelConfig(layers="all", keep_ratio=0.99)
    if answer(at_full, 7) == count(at_full, 7, router=False):
        raise Wrong("A layer with r = 0.99 keeps all 26 tokens and still scores them: whether there is a router, config.keep_ratios says, not the number kept.")
    for changes in ({"layers": "none"}, {"layers": "all", "keep_ratio": 0.5}, {"heads": 8, "kv_heads": 1, "layers": "2,3"}):
        other = ModelConfig(**changes)
        named = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        same(answer(other, 7), frame_flops(other, 7, 0), f"one_more_frame(ModelConfig({named}), 7)", tolerance=0)
    return "Right, to the last operation. Now you can price any pattern before anybody trains it."
