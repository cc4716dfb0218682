"""Who is kept: exactly ceil(r n) of every frame, chosen inside the frame, ties broken by order."""

import math
from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.config import Gate, keep_count, parse_layers, routed_layers
from mod.layout import Say
from mod.related.chance import ROUTERS
from mod.router import LayerExpert, new_router, top_k
from tests.helpers import as_batch, conversations, offline, plan_of, small_config, small_model


def test_kept_is_the_exact_ceiling():
    """All of them, against float noise: 0.07 * 100 is 7.000000000000001, whose ceiling is 8."""
    for percent in range(1, 101):
        for tokens in range(1, 201):
            assert keep_count(percent / 100, tokens) == math.ceil(Fraction(percent, 100) * tokens)


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_top_k_is_exact_and_prefers_the_earlier_of_equals(frames, tokens, data):
    """Guards against `>` for `>=`, and against topk's arbitrary choice among ties."""
    k = data.draw(st.integers(1, tokens))
    one = st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)
    scores = data.draw(st.lists(one, min_size=frames, max_size=frames))
    chosen = top_k(torch.tensor(scores, dtype=torch.float32), k)
    for row, kept in zip(scores, chosen.tolist(), strict=True):
        assert kept == sorted(sorted(range(tokens), key=lambda i: (-row[i], i))[:k])


@pytest.mark.parametrize("select", sorted(ROUTERS))
@given(talks=st.lists(conversations(), min_size=1, max_size=3), ratio=st.sampled_from([0.01, 0.2, 0.4, 0.5, 0.9]))
def test_every_frame_keeps_the_same_number(select, talks, ratio):
    """Of every frame of every row, however long the rows; with the smallest ratio one token."""
    model = small_model(select=select, keep_ratio=ratio, layers="all")
    trace = []
    offline(model, as_batch(model.config, talks), trace)
    assert [routing.layer for routing in trace] == [0, 1, 2, 3]
    for routing in trace:
        assert routing.kept.shape == (sum(frames for frames, _ in talks), 5)
        assert (routing.kept.sum(1) == math.ceil(round(ratio * 5, 6))).all()


@pytest.mark.parametrize("select", sorted(ROUTERS))
def test_choice_depends_on_past_and_own_frame_only(select):
    """Guards against top-k over the whole sequence: scrambling a later frame must not move an earlier choice."""
    model = small_model(select=select, layers="all")
    batch = as_batch(model.config, [(4, [])])
    before, after = [], []
    offline(model, batch, before)
    batch.pixels[2:] = -batch.pixels[2:]
    offline(model, batch, after)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one.kept[:2], two.kept[:2]) and torch.equal(one.scores[:2], two.scores[:2])
    if select == "learned":
        assert any(not torch.equal(one.kept[2:], two.kept[2:]) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("select", sorted(ROUTERS))
def test_choice_is_independent_of_other_rows_and_padding(select):
    model = small_model(select=select, layers="all")
    talk, other = (2, []), conversation_of_length(5)
    alone, together = [], []
    offline(model, as_batch(model.config, [talk]), alone)
    offline(model, as_batch(model.config, [talk, other]), together)
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one.kept, two.kept[:2])
        torch.testing.assert_close(one.scores, two.scores[:2], rtol=0, atol=1e-12)


def conversation_of_length(frames: int):
    return frames, [Say(t, "assistant", "red disc moves") for t in range(frames)]


def test_random_choice_differs_between_layers_and_frames():
    model = small_model(select="random", layers="all", keep_ratio=0.4)
    trace = []
    offline(model, as_batch(model.config, [(5, [])]), trace)
    assert len({tuple(routing.kept.flatten().tolist()) for routing in trace}) == 4
    assert len({tuple(frame.tolist()) for frame in trace[0].kept}) > 1


def test_random_choice_is_fair():
    """Each place of a frame is kept about as often as the ratio says, over many positions."""
    router = ROUTERS["random"](8, 10, 0.2, layer=1)
    pos = torch.arange(20000).view(2000, 10)
    chosen, _, _ = router(torch.zeros(2000, 10, 8), pos)
    assert chosen.shape == (2000, 2)
    assert (chosen.flatten().bincount(minlength=10) / 2000 - 0.2).abs().max() < 0.04


@given(st.integers(1, 60), st.integers(1, 100))
def test_uniform_choice_is_evenly_spread(tokens, percent):
    router = ROUTERS["uniform"](8, tokens, percent / 100, layer=0)
    chosen, mu, _ = router(torch.zeros(1, tokens, 8), torch.zeros(1, tokens))
    gaps = chosen[0].diff()
    assert chosen.shape == mu.shape == (1, router.kept) and (mu == 1).all() and (gaps > 0).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("frame", [[0, 0, 0], [0, 0, -1, 0, 0, 0], [0] * 5 + [1] * 4, [-1, 0, 0, 0, 0, -2]])
def test_split_frame_is_refused(frame):
    """Half a frame has another top-k than the whole: refuse it rather than route it wrongly."""
    with pytest.raises(ValueError, match="expected whole frames of 5"):
        plan_of(small_config(), torch.tensor([frame]))


@given(st.integers(1, 4), st.floats(0.01, 1), st.sampled_from(get_args(Gate)), st.integers(0, 9))
def test_the_weight_of_a_chosen_token_is_its_own(frames, ratio, gate, seed):
    """Which, how loud and how good: all three speak of the same tokens, and only mu has a gradient."""
    torch.manual_seed(seed)
    router, x = LayerExpert(8, 7, ratio, 0, gate), torch.randn(frames, 7, 8, requires_grad=True)
    chosen, mu, scores = router(x, torch.zeros(frames, 7))
    expected = (x @ router.w.weight[0]).detach()
    torch.testing.assert_close(scores, expected)
    assert torch.equal(chosen, top_k(scores, router.kept)) and mu.requires_grad and not scores.requires_grad
    torch.testing.assert_close(mu.detach(), (2 * expected.sigmoid() if gate.startswith("sigmoid") else expected).gather(1, chosen))


@pytest.mark.parametrize("select", sorted(ROUTERS))
@given(st.floats(0.01, 1), st.integers(0, 9))
def test_the_last_token_is_kept_when_asked_for_and_the_others_compete_as_before(select, ratio, seed):
    config = small_config(select=select, keep_ratio=ratio, layers="all", keep_last=True)
    torch.manual_seed(seed)
    router, n = new_router(config, 1), config.frame_tokens
    tokens, pos = torch.randn(3, n, config.dim), torch.arange(3 * n).view(3, n)
    chosen, mu, scores = router(tokens, pos)
    assert (chosen[:, -1] == n - 1).all()
    assert torch.equal(chosen[:, :-1], top_k(scores[:, :-1], router.kept - 1))
    torch.testing.assert_close(mu.detach(), router.weight(scores).gather(1, chosen).detach())


@pytest.mark.parametrize("select", sorted(ROUTERS))
@given(st.floats(0.01, 1), st.booleans(), st.integers(0, 9))
def test_what_fewer_layers_kept_comes_first(select, ratio, keep_last, seed):
    config = small_config(select=select, keep_ratio=ratio, layers="all", keep_last=keep_last)
    torch.manual_seed(seed)
    router, n = new_router(config, 1), config.frame_tokens
    tokens, pos, times = torch.randn(3, n, config.dim), torch.arange(3 * n).view(3, n), torch.randint(0, 4, (3, n))
    chosen, mu, scores = router(tokens, pos, times)
    for kept, counts, own in zip(chosen.tolist(), times.tolist(), scores.tolist(), strict=True):
        best = sorted(range(n), key=lambda i: (not keep_last or i < n - 1, counts[i], -own[i], i))
        assert kept == sorted(best[: router.kept])
    torch.testing.assert_close(mu.detach(), router.weight(scores).gather(1, chosen).detach())


@pytest.mark.parametrize("select", sorted(ROUTERS))
def test_routed_layers_take_turns_whatever_dense_layers_stand_between_them(select):
    """Two of five tokens. Layer 1 chooses as if alone, and 2 two of the other three. Layer 4 takes the one that is left
    if it remembers both, and else may keep again what layer 1 kept."""
    trace, alone = [], []
    changes = {"select": select, "layers": "1,2,4", "depth": 6, "keep_ratio": 0.4}
    model = small_model(**changes, take_turns=2)
    batch = as_batch(model.config, [(3, [Say(1, "assistant", "red disc moves")]), (2, [])])
    assert torch.equal(offline(model, batch, trace), offline(model, batch))  # whether anybody listens or not
    first, second, third = trace
    assert torch.equal(first.kept.nonzero()[:, 1].view(-1, 2), top_k(first.scores, 2))
    assert not (first.kept & second.kept).any() and (first.kept | second.kept | third.kept).all()
    model.decoder.layers[4].router.take_turns, forgetful = 1, []
    offline(model, batch, forgetful)
    assert torch.equal(forgetful[1].kept, second.kept) and not (second.kept & forgetful[2].kept).any()
    assert not (first.kept | second.kept | forgetful[2].kept).all()
    offline(small_model(**changes), batch, alone)
    assert select == "random" or any((one.kept & two.kept).any() for one, two in zip(alone, alone[1:], strict=False))


def test_a_sigmoid_gate_is_one_at_score_zero_and_a_score_gate_is_the_score():
    scores = torch.tensor([[0.0, 1.0, -2.0]])
    sigmoid, score = LayerExpert(8, 3, 0.5, 0, "sigmoid-value"), LayerExpert(8, 3, 0.5, 0, "score-update")
    assert sigmoid.weight(scores)[0, 0] == 1.0 and (sigmoid.weight(scores) > 0).all()
    assert torch.equal(score.weight(scores), scores)


def test_patterns():
    assert routed_layers("interleaved", 6) == (1, 3, 5)
    assert routed_layers("all", 3) == (0, 1, 2)
    assert routed_layers("all-deep", 6) == (3, 4, 5)
    assert routed_layers("interleaved-deep", 8) == (5, 7)
    assert routed_layers("none", 6) == ()
    assert parse_layers("1,3", 0.2, 4) == (1.0, 0.2, 1.0, 0.2)
    assert parse_layers("keep:1,1,0,0", 0.2, 4) == (1.0, 1.0, 0.0, 0.0)  # early exit
    assert parse_layers("keep:1,0,1,0", 0.2, 4) == (1.0, 0.0, 1.0, 0.0)  # skipping every other layer
    assert parse_layers("interleaved", 1.0, 4) == (1.0,) * 4  # the dense model


@pytest.mark.parametrize("layers", ["alll", "", "1,9", "-1", "keep:1,1", "keep:1,2,1,1", "keep:a,1,1,1", "1;3"])
def test_unknown_patterns_are_refused(layers):
    with pytest.raises(ValueError, match="layers got"):
        parse_layers(layers, 0.2, 4)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, float("nan")])
def test_keep_ratio_outside_range_is_refused(ratio):
    with pytest.raises(ValueError, match="keep ratio must be in"):
        parse_layers("interleaved", ratio, 4)
