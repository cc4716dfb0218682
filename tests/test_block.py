"""Attention, RoPE and the norm against plain versions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.block import PAD, Attention, RMSNorm, Rope, rotate
from mod.cache import LayerCache


def plain_attention(attention, x, pos):
    """One row, head by head, with an explicit mask from positions. q head h uses key/value head h // (H/G)."""
    size = attention.head_dim
    q, k, v = attention.q(x), attention.k(x), attention.v(x)
    heads, kv_heads = q.shape[-1] // size, k.shape[-1] // size
    outs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        qh = attention.q_norm(q[:, head * size : (head + 1) * size])
        kh = attention.k_norm(k[:, group * size : (group + 1) * size])
        vh = v[:, group * size : (group + 1) * size]
        qh, kh = (plain_rotate(t, pos, attention.rope.base) for t in (qh, kh))
        scores = qh @ kh.T / size**0.5
        scores = scores.masked_fill(pos[None, :] > pos[:, None], -torch.inf)
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
    attention = Attention(24, 4, 2, 6, qkv_bias=qkv_bias, qk_norm=qk_norm, rope=Rope(100.0)).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


@given(st.integers(1, 12), st.booleans(), st.integers(0, 9))
def test_attention_equals_plain_version(tokens, qk_norm, seed):
    torch.manual_seed(seed)
    attention = make_attention(qk_norm)
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    pos = torch.randint(1, 5, (2, tokens)).cumsum(1)  # gaps, as tokens that skip leave them
    y = attention(x, pos)
    for row in range(2):
        torch.testing.assert_close(y[row], plain_attention(attention, x[row], pos[row]), rtol=1e-10, atol=1e-10)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 9))
def test_any_chunks_through_the_cache_equal_one_pass(chunks, seed):
    """Guards against non-square is_causal, which lines a chunk's mask up with the wrong keys."""
    torch.manual_seed(seed)
    attention, total = make_attention(), sum(chunks)
    x, pos = torch.randn(1, total, 24, dtype=torch.float64), torch.arange(total)[None] * 2
    cache = LayerCache(1, 2, total, 6, torch.float64, torch.device("cpu"))
    outs, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        outs.append(attention(x[:, part], pos[:, part], torch.full((1, size), -1), past=cache))
        start += size
    torch.testing.assert_close(torch.cat(outs, 1), attention(x, pos), rtol=1e-10, atol=1e-10)


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 50))
def test_rope_scores_depend_on_distance_alone(shift, p, s):
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(a, b):
        return (rotate(q, torch.tensor([[a]]), Rope()) * rotate(k, torch.tensor([[b]]), Rope())).sum()

    torch.testing.assert_close(score(p, s), score(p + shift, s + shift), rtol=0, atol=1e-9)


def test_padding_is_invisible():
    """Whatever stands in a padded place changes no real output, and no output is nan."""
    attention = make_attention()
    x, pos = torch.randn(1, 6, 24, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, PAD, PAD]])
    before = attention(x, pos)
    x[:, 4:] = 1e4
    after = attention(x, pos)
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
    silent = attention(x, pos, value_gate=torch.zeros(1, 5, dtype=torch.float64))
    torch.testing.assert_close(silent, torch.zeros_like(silent))
    assert torch.equal(attention(x, pos, value_gate=torch.ones(1, 5, dtype=torch.float64)), attention(x, pos))


@given(st.integers(0, 99))
def test_rms_norm(seed):
    torch.manual_seed(seed)
    norm = RMSNorm(7, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 7, dtype=torch.float64) * 10
    torch.testing.assert_close(norm(x), norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
