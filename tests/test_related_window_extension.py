"""Visual Context Window Extension: frequencies by parts, and groups of frames pooled by two strides."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.layers import Rope, rotate
from mod.layout import Say
from mod.real.rope import ScaledRope
from mod.related.pooling import UniRes, pooling_weights
from mod.related.window_extension import ProgressivePooling, visual_rope
from tests.helpers import WORDS_ALL, as_batch, in_chunks, offline, small_model
from tests.related_checks import check, seen_of

EXACT = (torch.device("cpu"), torch.float64)
BASE = Rope().base


def test_a_hand_computed_rope():
    """Base 100, two pairs, trained for 20π tokens or so: 10 turns and 1. For four times as many, between 0 and 4."""
    trained = 63
    fast, slow = visual_rope(100.0, trained, 4 * trained, 0, 4).frequency(4, *EXACT).tolist()
    turns = trained * 0.1 / (2 * math.pi)
    assert fast == 1 and turns == pytest.approx(1.0027, abs=1e-4)
    assert slow == pytest.approx(0.1 * (turns / 4 + (1 - turns / 4) / 4), rel=1e-12)


@given(st.sampled_from([2, 8, 32]), st.sampled_from([100.0, 1e4, 1e6]), st.integers(1, 9000), st.floats(1, 60), st.floats(0, 2))
def test_frequencies(size, base, trained, times, low):
    plain, high = Rope(base), low + 3
    rope = visual_rope(plain.base, trained, math.ceil(times * trained), low, high)
    before, after = plain.frequency(size, *EXACT), rope.frequency(size, *EXACT)
    s = math.ceil(times * trained) / trained
    assert (rope.factor, rope.context) == (s, trained)
    for one, other in zip(before.tolist(), after.tolist(), strict=True):  # the paper's rule, pair by pair
        gamma = min(1, max(0, (trained / (2 * math.pi / one) - low) / (high - low)))
        assert other == pytest.approx((gamma + (1 - gamma) / s) * one, rel=1e-9)
    turns = trained * before / (2 * math.pi)
    assert torch.equal(after[turns >= high], before[turns >= high]) and torch.equal(after[turns <= low], before[turns <= low] / s)
    assert (after <= before * (1 + 1e-12)).all() and (after >= before / s * (1 - 1e-12)).all() and (after.diff() < 0).all()
    smaller = visual_rope(plain.base, max(1, trained // 2), math.ceil(s * max(1, trained // 2)), low, high)
    if smaller.factor >= s:  # a smaller window at the same scale leaves less as it was
        assert (smaller.frequency(size, *EXACT) <= after * (1 + 1e-12)).all()


def test_nothing_to_extend_changes_nothing():
    plain = Rope(1e4)
    for target in (200, 100):
        assert torch.equal(visual_rope(plain.base, 200, target).frequency(16, *EXACT), plain.frequency(16, *EXACT))


def test_a_short_window_leaves_no_pair_alone_by_the_papers_numbers():
    """Why low and high are to be chosen: with 32 turns in 200 positions even the fastest pair is slowed."""
    plain = Rope().frequency(32, *EXACT)
    assert (visual_rope(BASE, 200, 800).frequency(32, *EXACT) < plain).all()
    chosen = visual_rope(BASE, 200, 800, 0.5, 4).frequency(32, *EXACT)
    assert chosen[0] == plain[0] and torch.equal(chosen[-1], plain[-1] / 4)
    rope = visual_rope(BASE, 10, 20)
    assert (rope.low, rope.high) == (1, 32), "the paper's alpha and beta"


def test_the_visual_window_and_the_language_window_are_two_ropes():
    visual, language = (visual_rope(BASE, window, 4 * window).frequency(64, *EXACT) for window in (500, 5000))
    assert (visual <= language).all() and (visual < language).any()


def turn(rope, position):
    return rope.turn(torch.tensor([[position]]), 16, torch.float64)


@settings(max_examples=10)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_scores_depend_on_the_distance_alone(p, q, shift):
    rope = visual_rope(BASE, 100, 800, 0.5, 4)
    x, y = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    score = [(rotate(x, turn(rope, p + by)) * rotate(y, turn(rope, q + by))).sum() for by in (0, shift)]
    torch.testing.assert_close(score[0], score[1])


def test_a_rope_is_scaled_by_sensible_numbers():
    for low, high, trained in ((4, 4, 9), (5, 4, 9), (-1, 4, 9), (1, 4, 0)):
        with pytest.raises(ValueError, match="expected"):
            visual_rope(BASE, trained, 200, low, high)


@pytest.mark.parametrize("gate", ["sigmoid-value", "score-update"])
def test_with_tokens_that_skip_layers(gate):
    """Slower positions and MoD together: a stream in pieces is what it is in one pass, and the speeds do matter."""
    rope = visual_rope(BASE, 16, 64, 0.1, 2)
    assert isinstance(rope, ScaledRope)
    talk = (4, [Say(1, "user", WORDS_ALL.words[-1]), Say(3, "assistant", WORDS_ALL.words[-2])])
    logits = []
    for scaled in (Rope(), rope):
        model = small_model(keep_ratio=0.4, gate=gate)
        model.decoder.rope = scaled
        batch = as_batch(model.config, [talk])
        logits.append(offline(model, batch))
        pieces, _ = in_chunks(model, batch, model.see(batch.pixels), Random(0))
        torch.testing.assert_close(pieces, logits[-1])
    assert not torch.allclose(*logits)


def cells(side, stride):
    return math.ceil(side / stride) ** 2


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_pooling_is_a_reducer_and_its_counts_are_the_formulas(group, first, more, streams, side, seed):
    frames = 3 + seed % 4
    seen = seen_of(frames * streams, side, streams=streams, seed=seed)
    pool = ProgressivePooling(group, first, first + more)
    check(pool, seen)
    out = pool(seen)
    leads, fine, coarse = math.ceil(frames / group), cells(side, first), cells(side, first + more)
    assert int(out.counts.sum()) == streams * (frames + leads * fine + (frames - leads) * coarse)
    by_number = [1 + (fine if number % group == 0 else coarse) for number in range(frames)]
    assert out.counts.tolist() == streams * by_number and pool.most(1 + side**2) == 1 + fine == out.valid.shape[1]
    torch.testing.assert_close(out.merge.sum(-1), out.valid.float())
    for frame in range(len(seen.tokens)):
        stride = first if frame % frames % group == 0 else first + more
        expected = torch.cat((seen.tokens[frame, :1], pooling_weights(side, stride) @ seen.patches[frame]))
        torch.testing.assert_close(out.x[frame, : len(expected)], expected)


def test_a_hand_computed_pooling():
    """Three frames of 3×3 in groups of two: by ones, by threes, by ones."""
    seen = seen_of(3, 3, 1)
    seen.tokens = torch.arange(30.0).reshape(3, 10, 1)
    out = ProgressivePooling(2, 1, 3)(seen)
    assert out.counts.tolist() == [10, 2, 10] and out.x[1, :2, 0].tolist() == [10, 15]
    assert torch.equal(out.x[0], seen.tokens[0]) and torch.equal(out.x[2], seen.tokens[2])
    assert out.place[1, :2].tolist() == [0, 1] and out.place[0].tolist() == list(range(10))


def test_the_papers_numbers():
    """27×27 patches: 196 and 16 tokens, 244 a group of four; 15,616 for 256 frames (CLS tokens not counted)."""
    out = ProgressivePooling()(seen_of(5, 27, 2))
    assert (out.counts - 1).tolist() == [196, 16, 16, 16, 196] and 64 * 244 == 15616
    assert ProgressivePooling().most(730) == 197


def test_limits():
    seen = seen_of(6, 5, streams=2)
    assert torch.equal(ProgressivePooling(4, 1, 1)(seen).x, seen.tokens), "strides of one change nothing"
    torch.testing.assert_close(ProgressivePooling(1, 2, 9)(seen).x, UniRes(2)(seen).x)  # groups of one: pooled alike
    seen.tokens[:] = 2.5
    out = ProgressivePooling(2, 2, 4)(seen)
    torch.testing.assert_close(out.x, out.valid[..., None] * torch.full_like(out.x, 2.5))
    assert ProgressivePooling().online and ProgressivePooling().scope == "prefix"
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 3, 2)):
        with pytest.raises(ValueError, match="expected"):
            ProgressivePooling(*wrong)


def test_a_frames_content_depends_on_that_frame_alone():
    seen, pool = seen_of(6, 5), ProgressivePooling(3, 2, 5)
    before = pool(seen)
    seen.tokens[[0, 1, 2, 4, 5]] = torch.randn(5, 26, 12)
    after = pool(seen)
    assert torch.equal(before.x[3], after.x[3]) and torch.equal(before.valid, after.valid)
