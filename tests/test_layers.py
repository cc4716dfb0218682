"""Attention, RoPE and the norm against plain versions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.cache import KVCache
from mod.layers import PAD, Attention, RMSNorm, Rope, rotate
from tests.helpers import plan_of, small_config

ROPE = Rope(100.0)


def plain_attention(attention, x, pos, sees=None):
    """One row, head by head, with an explicit mask from positions, or `sees` (T, T). q head h uses key/value head
    h // (H/G)."""
    size = attention.head_dim
    q, k, v = attention.q(x), attention.k(x), attention.v(x)
    heads, kv_heads = q.shape[-1] // size, k.shape[-1] // size
    outs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        qh = attention.q_norm(q[:, head * size : (head + 1) * size])
        kh = attention.k_norm(k[:, group * size : (group + 1) * size])
        vh = v[:, group * size : (group + 1) * size]
        qh, kh = (plain_rotate(t, pos, ROPE.base) for t in (qh, kh))
        scores = qh @ kh.T / size**0.5
        hidden = pos[None, :] > pos[:, None] if sees is None else ~sees
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(scores.softmax(-1) @ vh)
    return attention.out(torch.cat(outs, -1))


def plain_rotate(x, pos, base):
    """Entry by entry: the pair (x[i], x[i + E/2]) turns by pos * base^(-2i/E)."""
    half, y = x.shape[-1] // 2, torch.empty_like(x)
    for i in range(half):
        angle = pos.to(x.dtype) * base ** (-2 * i / x.shape[-1])
        y[:, i] = x[:, i] * angle.cos() - x[:, i + half] * angle.sin()
        y[:, i + half] = x[:, i + half] * angle.cos() + x[:, i] * angle.sin()
    return y


def make_attention(qk_norm=True, qkv_bias=True):
    attention = Attention(24, 4, 2, 6, qkv_bias=qkv_bias, qk_norm=qk_norm).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def attend(attention, x, pos, **more):
    """Attention of tokens at `pos`, turned by RoPE."""
    return attention(x, ROPE.turn(pos, attention.head_dim, x.dtype), pos, **more)


@given(st.integers(1, 12), st.booleans(), st.integers(0, 9))
def test_attention_equals_plain_version(tokens, qk_norm, seed):
    torch.manual_seed(seed)
    attention = make_attention(qk_norm)
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    pos = torch.randint(1, 5, (2, tokens)).cumsum(1)  # gaps, as tokens that skip leave them
    y = attend(attention, x, pos)
    for row in range(2):
        torch.testing.assert_close(y[row], plain_attention(attention, x[row], pos[row]), rtol=1e-10, atol=1e-10)


@given(st.integers(1, 8), st.booleans(), st.integers(0, 9))
def test_a_mask_says_otherwise(tokens, shared, seed):
    """A mask takes the place of the rule, for each row or for all of them."""
    torch.manual_seed(seed)
    attention = make_attention()
    x, pos = torch.randn(2, tokens, 24, dtype=torch.float64), torch.arange(tokens).expand(2, -1)
    mask = torch.rand(1 if shared else 2, tokens, tokens) < 0.5
    mask |= torch.eye(tokens, dtype=torch.bool)  # nobody sees nothing
    y = attend(attention, x, pos, mask=mask)
    for row, sees in enumerate(mask.expand(2, -1, -1)):
        torch.testing.assert_close(y[row], plain_attention(attention, x[row], pos[row], sees), rtol=1e-10, atol=1e-10)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 9))
def test_any_chunks_through_the_cache_equal_one_pass(chunks, seed):
    """Guards against non-square is_causal, which lines a chunk's mask up with the wrong keys."""
    torch.manual_seed(seed)
    attention, total, config = make_attention(), sum(chunks), small_config(layers="none")
    x, pos = torch.randn(1, total, 24, dtype=torch.float64), torch.arange(total)[None] * 2
    cache = KVCache(config, dtype=torch.float64)
    outs, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        cache.begin(plan_of(config, torch.full((1, size), -1), [start]))
        outs.append(attend(attention, x[:, part], pos[:, part], past=cache.layers[0]))
        start += size
    torch.testing.assert_close(torch.cat(outs, 1), attend(attention, x, pos), rtol=1e-10, atol=1e-10)


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 50))
def test_rope_scores_depend_on_distance_alone(shift, p, s):
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def turned(x, at):
        return rotate(x, Rope().turn(torch.tensor([[at]]), 8, torch.float64))

    torch.testing.assert_close((turned(q, p) * turned(k, s)).sum(), (turned(q, p + shift) * turned(k, s + shift)).sum(),
                               rtol=0, atol=1e-9)


@given(st.integers(0, 10**9))
def test_angles_keep_their_precision_after_hours(position):
    """In float32 a position beyond 2**24 has no neighbours; whole turns are taken off in float64 first."""
    x, pos = torch.randn(1, 1, 2, 8), torch.tensor([[position, position + 1]])
    turned = rotate(x, Rope().turn(pos, 8))[0, 0]
    expected = plain_rotate(x[0, 0].double(), pos[0].double(), 10000.0)
    torch.testing.assert_close(turned.double(), expected, rtol=0, atol=2e-6)


def test_padding_is_invisible():
    """Whatever stands in a padded place changes no real output, and no output is nan."""
    attention = make_attention()
    x, pos = torch.randn(1, 6, 24, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, PAD, PAD]])
    before = attend(attention, x, pos)
    x[:, 4:] = 1e4
    after = attend(attention, x, pos)
    assert torch.equal(before[:, :4], after[:, :4]) and after.isfinite().all()


def test_without_positions_attention_looks_both_ways():
    attention = make_attention()
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    before = attention(x)
    x[:, 4] += 1
    assert (attention(x)[:, 0] != before[:, 0]).any()


def test_value_gate_scales_how_loudly_a_token_is_read():
    attention = make_attention(qkv_bias=False)
    x, pos = torch.randn(1, 5, 24, dtype=torch.float64), torch.arange(5)[None]
    silent = attend(attention, x, pos, value_gate=torch.zeros(1, 5, dtype=torch.float64))
    torch.testing.assert_close(silent, torch.zeros_like(silent))
    ones = torch.ones(1, 5, dtype=torch.float64)
    assert torch.equal(attend(attention, x, pos, value_gate=ones), attend(attention, x, pos))


@given(st.integers(0, 99))
def test_rms_norm(seed):
    torch.manual_seed(seed)
    norm = RMSNorm(7, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 7, dtype=torch.float64) * 10
    torch.testing.assert_close(norm(x), norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
