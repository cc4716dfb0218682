"""The MoD block against a slow, plain version; and the equalities that make it a skip and not something else."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.config import Gate
from mod.layers import PAD
from mod.layout import Say
from mod.router import ROUTERS, Router
from tests.helpers import as_batch, conversations, frame_of, offline, plan_of, routed, small_config, small_model


def through(model, block, x, plan, **more):
    """A layer, dense or MoD, on token vectors x (B, T, D)."""
    turn = model.decoder.rope.turn(plan.pos, model.config.head_dim, x.dtype)
    return block(x, turn, plan.pos if block not in routed(model) else plan, **more)


def vectors(model, batch, dtype=torch.float64, **more):
    return torch.randn(*batch.ids.shape, model.config.dim, dtype=dtype, **more)


def plain_mod(model, block, x, pos, frame):
    """One routed layer on one unpadded row, token by token in Python: score, choose, gather, run densely, add."""
    router, keep, mu = block.router, [], []
    for t in range(len(frame)):
        if frame[t] < 0:
            keep.append(True)
            mu.append(torch.ones((), dtype=x.dtype))
            continue
        mates = [s for s in range(len(frame)) if frame[s] == frame[t]]
        scores = {s: (router.w.weight[0] * x[s]).sum().item() for s in mates}
        best = sorted(mates, key=lambda s: (-scores[s], s))[: router.kept]
        keep.append(t in best)
        score = (router.w.weight[0] * x[t]).sum()
        mu.append(2 * torch.sigmoid(score) if router.gate.startswith("sigmoid") else score)
    kept = [t for t in range(len(frame)) if keep[t]]
    attention, dense = block.block.attention, block.block
    normed = dense.norm1(x[kept][None])
    gate = torch.stack(mu)[kept]
    turn = model.decoder.rope.turn(pos[kept][None], model.config.head_dim, x.dtype)
    attended = attention(normed, turn, value_gate=None if router.gate.endswith("update") else gate[None])[0]
    update = attended + dense.mlp(dense.norm2(x[kept] + attended))
    if router.gate.endswith("read"):
        gate = torch.ones_like(gate)
    y = x.clone()
    for place, t in enumerate(kept):
        y[t] = x[t] + gate[place] * update[place]
    return y, keep


@pytest.mark.parametrize("gate", get_args(Gate))
@given(talks=st.lists(conversations(), min_size=1, max_size=3), ratio=st.sampled_from([0.2, 0.4, 0.8]))
def test_block_equals_plain_version(gate, talks, ratio):
    """Batched gather and scatter on ragged rows == a Python loop on each row alone. Catches unsorted top-k, renumbered
    positions, a lost residual, text scaled, rows mixed up, padding competing for places, slots off by one."""
    model = small_model(gate=gate, keep_ratio=ratio)
    block, batch = routed(model)[0], as_batch(model.config, talks)
    x, pos, frame = vectors(model, batch), batch.plan.pos, frame_of(batch)
    y = through(model, block, x, batch.plan)
    for row in range(len(x)):
        length = int((pos[row] < PAD).sum())
        expected, keep = plain_mod(model, block, x[row, :length], pos[row, :length], frame[row, :length].tolist())
        torch.testing.assert_close(y[row, :length], expected, rtol=1e-9, atol=1e-9)
        skipped = [t for t in range(length) if not keep[t]]
        assert torch.equal(y[row, skipped], x[row, skipped]), "a skipped token was touched"
        assert torch.equal(y[row, length:], x[row, length:]), "padding was touched"


@given(talk=conversations(), seed=st.integers(0, 5))
def test_skipped_tokens_are_bitwise_unchanged_and_kept_ones_change(talk, seed):
    model = small_model(seed, dtype=torch.float32)
    block, batch = routed(model)[1], as_batch(model.config, [talk], torch.float32)
    x, trace = vectors(model, batch, torch.float32), []
    y = through(model, block, x, batch.plan, trace=trace)
    vision, kept = frame_of(batch)[0] >= 0, trace[0].kept.flatten()
    assert torch.equal(y[0, vision][~kept], x[0, vision][~kept])
    assert (y[0, vision][kept] != x[0, vision][kept]).any(-1).all()
    assert (y[0, ~vision] != x[0, ~vision]).any(-1).all()


@given(talks=st.lists(conversations(), min_size=1, max_size=2))
def test_keep_all_with_gate_one_equals_dense(talks):
    """k = N and mu = 1: the MoD block computes what the dense block computes."""
    model = small_model(keep_ratio=0.99)  # ceil(0.99 * 5) is 5: a routed layer that takes everything
    batch = as_batch(model.config, talks)
    for block in routed(model):
        torch.nn.init.zeros_(block.router.w.weight)  # 2 * sigmoid(0) is one
        x, real = vectors(model, batch), batch.plan.pos < PAD
        torch.testing.assert_close(through(model, block, x, batch.plan)[real],
                                   through(model, block.block, x, batch.plan)[real], rtol=1e-12, atol=1e-12)


def test_text_never_notices_mod():
    """A stream without frames is computed as by the dense model, bit for bit."""
    mod, dense = small_model(), small_model(layers="none")
    state = {name.replace(".block.", "."): value for name, value in mod.state_dict().items() if "router" not in name}
    dense.load_state_dict(state)
    ids = torch.randint(0, 30, (1, 12))
    one, two = (model.hidden(ids, None, plan_of(model.config, torch.full_like(ids, -1))) for model in (mod, dense))
    assert torch.equal(one, two)


def test_layer_with_keep_one_is_the_dense_block_itself():
    assert routed(small_model(layers="none")) == [] and routed(small_model(keep_ratio=1.0)) == []
    assert len(routed(small_model(layers="keep:1,0,0.2,1"))) == 2


def test_keep_zero_lets_text_alone_through():
    model = small_model(layers="keep:0,1,1,1")
    batch = as_batch(model.config, [(2, [Say(0, "assistant", "red disc moves")])])
    x, pos, text = vectors(model, batch), batch.plan.pos, frame_of(batch)[0] < 0
    [block] = routed(model)
    y = through(model, block, x, batch.plan)
    assert torch.equal(y[0, ~text], x[0, ~text])
    turn = model.decoder.rope.turn(pos[:, text], model.config.head_dim, x.dtype)
    torch.testing.assert_close(y[:, text], block.block(x[:, text], turn, pos[:, text]))


@given(talk=conversations(least_frames=2), position=st.integers(0, 200),
       layers=st.sampled_from(["all", "interleaved", "none"]))
def test_no_output_before_a_changed_token_changes(talk, position, layers):
    """Causality through the whole model. Catches sequence-wide top-k and a wrong mask."""
    model = small_model(layers=layers)
    batch = as_batch(model.config, [talk])
    position %= batch.ids.shape[1]
    # Vision is changed frame by frame: the choice inside a frame may depend on all of that frame.
    frames = frame_of(batch)[0]
    frame = int(frames[position])
    first = int((frames == frame).nonzero()[0]) if frame >= 0 else position
    before = offline(model, batch)
    if frame >= 0:
        batch.pixels[frame] = -batch.pixels[frame]
    else:
        batch.ids[0, position] = (batch.ids[0, position] + 1) % 30
    after = offline(model, batch)
    torch.testing.assert_close(before[:, :first], after[:, :first], rtol=0, atol=1e-11)
    assert not torch.equal(before[:, first:], after[:, first:])


@given(talks=st.lists(conversations(), min_size=2, max_size=3), layers=st.sampled_from(["all", "interleaved", "none"]))
def test_rows_of_a_batch_are_independent(talks, layers):
    """A row in a ragged batch == the row alone."""
    model = small_model(layers=layers)
    batch, start = as_batch(model.config, talks), 0
    together = offline(model, batch)
    for row, (frames, _) in enumerate(talks):
        alone = as_batch(model.config, [talks[row]])
        alone.pixels.copy_(batch.pixels[start : start + frames])
        start += frames
        logits = offline(model, alone)
        torch.testing.assert_close(together[row, : logits.shape[1]], logits[0], rtol=1e-9, atol=1e-9)


def test_positions_matter_inside_the_layer():
    """Guards the guard: the comparison with the plain version would see other positions of the kept tokens."""
    model = small_model()
    block, batch = routed(model)[0], as_batch(model.config, [(3, [])])
    x, spread = vectors(model, batch), batch.plan._replace(pos=batch.plan.pos * 3)
    assert (through(model, block, x, batch.plan) - through(model, block, x, spread)).abs().max() > 1e-3


class TestGradients:
    def loss(self, model, batch, streaming=True):
        labelled = batch.labelled if streaming else batch.labelled[~batch.streaming]
        return offline(model, batch).flatten(0, 1)[labelled].logsumexp(-1).sum()

    def test_every_router_gets_a_gradient_with_the_value_gate(self):
        model = small_model(layers="all")
        for block in routed(model):
            block.router.w.weight.data.mul_(0.1)  # where the sigmoid is not flat
        self.loss(model, as_batch(model.config, [(3, [Say(1, "assistant", "red disc moves")])])).backward()
        for block in routed(model):
            assert block.router.w.weight.grad.abs().max() > 1e-8

    def test_last_router_gets_none_with_the_papers_gate_when_only_text_predicts(self):
        """Why the value gate exists: nobody reads what the last layer writes to a vision token."""
        for gate in get_args(Gate):
            model = small_model(layers="all", gate=gate)
            batch = as_batch(model.config, [(3, [Say(2, "assistant", "red disc moves")])])
            self.loss(model, batch, streaming=False).backward()
            assert (routed(model)[-1].router.w.weight.grad.abs().max() > 0) != gate.endswith("update")

    def test_skipped_tokens_pass_the_gradient_through_unchanged(self):
        model = small_model()
        block, batch, trace = routed(model)[0], as_batch(model.config, [(3, [])]), []
        x = vectors(model, batch, requires_grad=True)
        y, weight = through(model, block, x, batch.plan, trace=trace), torch.randn_like(x)
        (y * weight).sum().backward()
        vision = frame_of(batch)[0] >= 0
        skipped = ~trace[0].kept.flatten()
        assert torch.equal(x.grad[0, vision][skipped], weight[0, vision][skipped])

    @pytest.mark.parametrize("gate", get_args(Gate))
    def test_finite_differences(self, gate):
        """The router's gradient is the slope of the loss (the choice itself held by a margin)."""
        model = small_model(gate=gate)
        batch = as_batch(model.config, [(2, [Say(1, "assistant", "red disc moves")])])
        weight = routed(model)[0].router.w.weight
        self.loss(model, batch).backward()
        direction, step = torch.randn_like(weight), 1e-6
        with torch.no_grad():
            weight += step * direction
            up = self.loss(model, batch)
            weight -= 2 * step * direction
            down = self.loss(model, batch)
        slope = (weight.grad * direction).sum()
        torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-5, atol=1e-7)


def test_compute_is_really_skipped():
    """The dense block inside sees the short sequence only."""
    model = small_model(keep_ratio=0.2)
    batch, seen = as_batch(model.config, [(4, []), (2, [])]), []
    for block in routed(model):
        block.block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    offline(model, batch)
    assert seen == [1 + 4 * 1] * 2, "1 <bos> and 4 frames of ceil(0.2 * 5) tokens"


def test_wrong_sizes_are_refused():
    for changes, message in (
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"grid": 9}, "finer than the encoder"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"gate": "open"}, "gate must be"),
    ):
        with pytest.raises(ValueError, match=message):
            small_config(**changes)
    with pytest.raises(ValueError, match="select got 'best', expected learned or random or uniform"):
        small_model(select="best")


def test_a_router_of_ones_own_is_chosen_by_its_name(monkeypatch):
    """As the docstring of Router says: subclass, score, add to ROUTERS."""

    class Last(Router):
        def score(self, tokens, pos):
            return pos.to(tokens.dtype)

    monkeypatch.setitem(ROUTERS, "last", Last)
    model, trace = small_model(select="last"), []
    offline(model, as_batch(model.config, [(2, [])]), trace)
    kept = trace[0].kept[0].sum()
    for routing in trace:
        assert routing.kept[:, -kept:].all() and routing.kept.sum() == 2 * kept
