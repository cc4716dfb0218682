"""Chapter 3: the decoder, and positions with gaps."""

from unittest.mock import patch

import torch

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "3.1",
    ("def turned_back(k, d):\n    return rotate(k[None, None], Rope().turn(torch.full((1, len(k)), d), k.shape[-1], k.dtype))[0, 0]", "forward"),
    ("def turned_back(k, d):\n    return rotate(k[None, None], Rope().turn(torch.arange(len(k))[None] - d, k.shape[-1], k.dtype))[0, 0]", "by the same"),
    ("def turned_back(k, d):\n    return k", "as they came"),
    ("def turned_back(k, d):\n    return rotate(k[None, None], Rope().turn(-torch.arange(len(k))[None], k.shape[-1], k.dtype))[0, 0]", "row numbers"),
    ("def turned_back(k, d):\n    angle = -d * Rope().frequency(k.shape[-1], k.device, k.dtype)\n    u, v = k[:, 0::2], k[:, 1::2]\n"
     "    out = torch.empty_like(k)\n    out[:, 0::2] = u * angle.cos() - v * angle.sin()\n    out[:, 1::2] = v * angle.cos() + u * angle.sin()\n    return out", "neighbours"),
    ("def turned_back(k, d):\n    return rotate(k[None, None], Rope(500.0).turn(torch.full((1, len(k)), -d), k.shape[-1], k.dtype))[0, 0]", "base"),
)
def turned_back(answer) -> str:
    from mod.layers import Rope, rotate

    rope, width, d = Rope(), 8, 3
    raw, pos = torch.randn(5, width, dtype=torch.float64), torch.tensor([4, 5, 9, 10, 17])

    def turned(x, at, by=rope):
        return rotate(x[None, None], by.turn(at[None], width, x.dtype))[0, 0]

    def apart(k):  # pairs of neighbours instead of halves
        angle, (u, v) = -d * rope.frequency(width, k.device, k.dtype), (k[:, 0::2], k[:, 1::2])
        return torch.stack((u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()), -1).flatten(1)

    k, want, rows = turned(raw, pos), turned(raw, pos - d), torch.arange(5)
    got = something(answer(k.clone(), d), "turned_back(k, d)")
    for mistake, hint in (
        (k, "The keys came back as they came: turn each once more, by the angles of position -d."),
        (turned(raw, pos + d), "You turned the keys forward, to positions p + d; back is a turn by -d."),
        (turned(k, rows - d), "You turned each key by a different amount. All stand d positions too far, so all are turned by the same: -d."),
        (turned(k, -rows), "You turned by row numbers. Each key already contains its position; turn all by -d."),
        (apart(k), "You paired neighbours, entries 0 and 1, 2 and 3. Here entry i turns with entry i + E/2."),
    ):
        looks_like(got, mistake, hint)
    for base in (100.0, 500.0, 1000.0, 500_000.0):
        looks_like(got, turned(k, torch.full((5,), -d), Rope(base)), "Another base: `Rope()` has the one that these keys were turned with.")
    same(got, want, "turned_back(k, d)")
    return "Right, and you did not need to know where the keys stood. Chapter 5 does this when a stream forgets."


@exercise(
    "3.2",
    ("import torch\ndef visible(q_pos, k_pos):\n    return torch.ones(len(q_pos), len(k_pos), dtype=torch.bool).tril()", "row numbers"),
    ("def visible(q_pos, k_pos):\n    return k_pos[None, :] < q_pos[:, None]", "itself"),
    ("def visible(q_pos, k_pos):\n    return k_pos[None, :] >= q_pos[:, None]", "future"),
    ("def visible(q_pos, k_pos):\n    return k_pos[None, :] > q_pos[:, None]", "may look"),
    ("def visible(q_pos, k_pos):\n    return k_pos[:, None] <= q_pos[None, :]", r"shape (6, 3), expected (3, 6)"),
)
def visible(answer) -> str:
    q_pos, k_pos = torch.tensor([5, 6, 9]), torch.tensor([0, 2, 5, 6, 7, 9])
    got, want = something(answer(q_pos, k_pos), "visible(q_pos, k_pos)"), k_pos[None] <= q_pos[:, None]
    for mistake, hint in (
        (torch.ones(3, 6, dtype=torch.bool).tril(), "You compare row numbers, not positions. With a past or with holes they are different things; this is how is_causal goes wrong."),
        (torch.ones(3, 6, dtype=torch.bool).tril(3), "You compare row numbers, counted from the end; with holes they are not positions."),
        (k_pos[None] < q_pos[:, None], "A token may look at itself: <= instead of <."),
        (~want, "Turned round: true means that the query *may look* at the key, not that it is hidden."),
        (k_pos[None] >= q_pos[:, None], "These are the keys of the future (and itself): the wrong way round."),
    ):
        looks_like(got, mistake, hint)
    same(got, want, "visible(q_pos, k_pos)")
    return "Right. mod/cache.py makes its mask by this very comparison."


_ATTEND = (
    "def attend(q, k, v, q_pos, k_pos):\n"
    "    E, rope = q.shape[-1], Rope()\n"
    "    q, k = rotate(q[None], rope.turn(q_pos[None], E))[0], rotate(k[None], rope.turn(k_pos[None], E))[0]\n"
    "    k, v = k.repeat_interleave(len(q) // len(k), 0), v.repeat_interleave(len(q) // len(k), 0)\n"
    "    logits = q @ k.transpose(1, 2) / E ** 0.5\n"
    "    return logits.masked_fill(~(k_pos[None] <= q_pos[:, None]), -torch.inf).softmax(-1) @ v"
)


@exercise(
    "3.3",
    (_ATTEND.replace(" / E ** 0.5", ""), "square root"),
    (_ATTEND.replace("k.repeat_interleave(len(q) // len(k), 0), v.repeat_interleave(len(q) // len(k), 0)", "k.repeat(len(q) // len(k), 1, 1), v.repeat(len(q) // len(k), 1, 1)"), "neighbouring query heads"),
    (_ATTEND.replace("rotate(k[None], rope.turn(k_pos[None], E))[0]", "k"), "keys were not turned"),
    (_ATTEND.replace("q, k = rotate(q[None], rope.turn(q_pos[None], E))[0], rotate(k[None], rope.turn(k_pos[None], E))[0]", "q, k = q, k"), "Nothing was turned"),
    (_ATTEND.replace("turn(q_pos[None]", "turn(torch.arange(len(q_pos))[None]").replace("turn(k_pos[None]", "turn(torch.arange(len(k_pos))[None]"), "by row number"),
    (_ATTEND.replace("    E", "    q_pos, k_pos = torch.arange(q.shape[1]), torch.arange(k.shape[1])\n    E", 1), "turned and masked"),
    (_ATTEND.replace("~(k_pos[None] <= q_pos[:, None])", "torch.zeros(len(q_pos), len(k_pos), dtype=torch.bool)"), "future"),
    (_ATTEND.replace(".softmax(-1) @ v", ".softmax(1) @ v"), "over the keys"),
    (_ATTEND.replace("~(k_pos[None] <= q_pos[:, None])", "~torch.ones(len(q_pos), len(k_pos), dtype=torch.bool).tril()"), "by row number; compare"),
    (_ATTEND.replace("-torch.inf", "0"), "ordinary logit"),
    (_ATTEND.replace("logits.masked_fill(~(k_pos[None] <= q_pos[:, None]), -torch.inf).softmax(-1)", "logits.softmax(-1).masked_fill(~(k_pos[None] <= q_pos[:, None]), 0)"), "after the softmax"),
    (_ATTEND.replace("<= q_pos", "< q_pos"), "itself"),
    (_ATTEND.replace("E ** 0.5", "E"), "by E"),
    (_ATTEND.replace("    k, v = k.rep", "    v = rotate(v[None], rope.turn(k_pos[None], E))[0]\n    k, v = k.rep"), "Values"),
    ("def attend(q, k, v, q_pos, k_pos):\n    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0]", "Do without"),
)
def attend(answer) -> str:
    from mod.layers import Rope, rotate

    heads, groups, width, rope = 6, 2, 8, Rope()
    q_pos, k_pos = torch.tensor([5, 6, 9]), torch.tensor([0, 2, 5, 6, 7, 9])
    q, k, v = (2 * torch.randn(n, len(p), width) for n, p in ((heads, q_pos), (groups, k_pos), (groups, k_pos)))

    def reference(turn_q=True, turn_k=True, scale=width**0.5, tile=False, mask=True, renumbered=False, turn_v=False,
                  strict=False, hide=-torch.inf, axis=-1, late=False, rows=False):
        places = [torch.arange(len(pos)) if renumbered else pos for pos in (q_pos, k_pos)]
        turns = [rope.turn(at[None], width) for at in (*places, k_pos)]
        a = rotate(q[None], turns[0])[0] if turn_q else q
        b = rotate(k[None], turns[1])[0] if turn_k else k
        c = rotate(v[None], turns[2])[0] if turn_v else v
        b, c = (x.repeat(3, 1, 1) if tile else x.repeat_interleave(3, 0) for x in (b, c))
        hidden = (k_pos[None] >= q_pos[:, None] if strict else k_pos[None] > q_pos[:, None]) & mask
        if rows:
            hidden = ~torch.ones(len(q_pos), len(k_pos), dtype=torch.bool).tril()
        logits = (a @ b.transpose(1, 2)) / scale
        if late:
            return logits.softmax(-1).masked_fill(hidden, 0) @ c
        return logits.masked_fill(hidden, hide).softmax(axis) @ c

    def forbidden(*_, **__):
        raise Wrong("Do without scaled_dot_product_attention: write the products and the softmax yourself.")

    with patch("torch.nn.functional.scaled_dot_product_attention", forbidden), patch("torch._C._nn.scaled_dot_product_attention", forbidden):
        got = something(answer(q.clone(), k.clone(), v.clone(), q_pos, k_pos), "attend(...)")
    for mistake, hint in (
        (reference(scale=1), "The logits are not divided by the square root of E: the softmax is too sharp."),
        (reference(tile=True), "The heads are paired wrongly: neighbouring query heads share a key head (repeat_interleave, not repeat)."),
        (reference(turn_q=False, turn_k=False), "Nothing was turned: queries and keys need RoPE at their positions."),
        (reference(turn_k=False), "The keys were not turned, only the queries; then q·k depends on more than the distance."),
        (reference(turn_q=False), "The queries were not turned, only the keys; then q·k depends on more than the distance."),
        (reference(renumbered=True), "You turned by row number; RoPE wants the positions q_pos and k_pos, which have gaps."),
        (reference(scale=width), "The logits are divided by E; it should be its square root."),
        (reference(axis=1), "The weights of a query must add up to one over the keys: softmax over the last axis."),
        (reference(hide=0.0), "0 is an ordinary logit; a hidden key needs -inf, or it keeps a weight."),
        (reference(late=True), "You masked after the softmax: what is left no longer adds up to one. Mask the logits."),
        (reference(strict=True), "No token sees itself; a key at the query's own position may be looked at."),
        (reference(turn_v=True), "Values are not turned, only queries and keys."),
        (reference(renumbered=True, rows=True), "You turned and masked by row number; use the positions q_pos and k_pos, which have gaps."),
        (reference(rows=True), "You masked by row number; compare the positions q_pos and k_pos."),
        (reference(mask=False), "Queries look into the future: no mask was applied."),
    ):
        looks_like(got, mistake, hint)
    same(got, reference(), "attend(...)", tolerance=1e-4)
    return "Right: with holes in the keys, fewer key heads than query heads, and a past. This is all that a cache will need."
