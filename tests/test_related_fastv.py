"""FastV: what is dropped, that it stays dropped, and that the EarlyExit baseline is its extreme."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.layers import PAD
from mod.layout import Say, make_plan
from mod.related.depths import attention_rank
from mod.related.fastv import FastV, attention_weights
from mod.related.ragged import CountingCache
from tests.helpers import as_batch, conversations, frame_of, plan_of, small_model

MODEL = small_model(layers="none")
TALKS = st.lists(conversations(most_frames=3), min_size=1, max_size=3)


def stream(talks):
    batch = as_batch(MODEL.config, talks)
    return torch.randn(*batch.ids.shape, MODEL.config.dim, dtype=torch.float64), batch.plan.pos, frame_of(batch)


def run(decoder, x, pos, frame, **options):
    """The decoder on tokens at pos (B, T) of frames (B, T)."""
    plan = make_plan(frame.numpy(), pos[:, 0].tolist(), 5, [0])  # early exit keeps none in some layers
    assert torch.equal(plan.pos, pos)
    if "cache" in options:
        options["cache"].begin(plan)
    return decoder(x, plan, **options)


def turn_of(x, pos):
    return MODEL.decoder.rope.turn(pos, MODEL.config.head_dim, x.dtype)


def choose(fast, x, pos, frame):
    return fast.choose(x, turn_of(x, pos), plan_of(MODEL.config, frame))


def states(decoder, go) -> list[torch.Tensor]:
    """What enters each layer while `go` runs."""
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args)) for layer in decoder.layers]
    out = go()
    for hook in hooks:
        hook.remove()
    return [*seen, out]


def test_attention_weights_are_those_of_the_attention():
    """Weights times values, through the output layer, are what `Attention.forward` returns."""
    x, pos, _ = stream([(2, []), (1, [])])
    turn = turn_of(x, pos)
    attention = MODEL.decoder.layers[0].attention
    query = torch.arange(x.shape[1]).expand(len(x), -1)
    weights = attention_weights(attention, x, turn, query)
    values = attention.v(x).unflatten(-1, (2, 6)).transpose(1, 2).repeat_interleave(2, 1)
    mixed = attention.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed[pos < PAD], attention(x, turn, pos)[pos < PAD])
    torch.testing.assert_close(attention_weights(attention, x, turn, query[:, 3:5]), weights[:, :, 3:5])
    assert 1 <= attention_rank(weights[1:, :, :6, :6]) <= 5


@settings(max_examples=10)
@given(TALKS, st.integers(1, 4), st.sampled_from([0.25, 0.5, 0.9, 1.0]), st.sampled_from(["last", "received"]))
def test_in_place_and_masked_agree_and_counts_are_exact(talks, after, drop, score):
    x, pos, frame = stream(talks)
    trace = []
    in_place = run(FastV(MODEL.decoder, after, drop, score), x, pos, frame, trace=trace)
    masked = run(FastV(MODEL.decoder, after, drop, score, masked=True), x, pos, frame)
    kept, real = trace[0].kept, pos < PAD
    torch.testing.assert_close(in_place[kept], masked[kept], rtol=1e-9, atol=1e-9)
    for row in range(len(x)):
        vision = int((frame[row] >= 0).sum())
        assert int(kept[row, frame[row] >= 0].sum()) == vision - int(drop * vision + 1e-9), "ceil of what is left"
        assert torch.equal(kept[row, frame[row] < 0], real[row, frame[row] < 0]), "text is never dropped"
        length = slice(0, int(real[row].sum()))
        alone = run(FastV(MODEL.decoder, after, drop, score), x[row : row + 1, length], pos[row : row + 1, length], frame[row : row + 1, length])
        torch.testing.assert_close(in_place[row, length], alone[0])


@pytest.mark.parametrize("changes", [{"drop": 0.0}, {"after": 4}])
def test_nothing_dropped_is_the_dense_decoder_bit_for_bit(changes):
    x, pos, frame = stream([(3, [Say(1, "user", "red disc")]), (1, [])])
    for masked in (False, "after" in changes):
        y = run(FastV(MODEL.decoder, **changes, masked=masked), x, pos, frame)
        assert torch.equal(y[pos < PAD], run(MODEL.decoder, x, pos, frame)[pos < PAD])


def test_before_k_all_is_dense_and_after_k_the_same_few_go_on_at_their_positions():
    """Nested sets: every layer from K on sees the very same tokens. A dropped token leaves as it is."""
    x, pos, frame = stream([(3, [])])
    trace = []
    dense = states(MODEL.decoder, lambda: run(MODEL.decoder, x, pos, frame))
    fast = states(MODEL.decoder, lambda: run(FastV(MODEL.decoder), x, pos, frame, trace=trace))
    kept = trace[0].kept
    for layer in range(2):
        assert torch.equal(fast[layer][0], dense[layer][0])
    for layer in (2, 3):
        assert torch.equal(fast[layer][2], pos[kept][None]), "original positions"
    assert torch.equal(fast[2][0], dense[2][0][kept][None])
    assert torch.equal(fast[4][~kept], MODEL.decoder.norm(dense[2][0])[~kept])


def test_the_kept_are_those_the_last_token_looks_at_most():
    """The score by an independent way: give one token all the value and see how much of it the last token reads."""
    x, pos, frame = stream([(2, [Say(1, "user", "red disc")]), (1, [])])
    fast, attention, block = FastV(MODEL.decoder, after=1, drop=0.6), MODEL.decoder.layers[0].attention, MODEL.decoder.layers[0]
    kept, scores = choose(fast, x, pos, frame)
    for row in range(2):
        last = int((pos[row] < PAD).sum()) - 1
        for token in range(last + 1):
            read = {}
            gate = torch.zeros_like(pos, dtype=x.dtype)
            gate[row, token] = 1
            hook = attention.out.register_forward_pre_hook(lambda _, args, read=read: read.update(mixed=args[0]))
            attention(block.norm1(x), turn_of(x, pos), pos, value_gate=gate)
            hook.remove()
            value = attention.v(block.norm1(x))[row, token].unflatten(0, (2, 6)).repeat_interleave(2, 0)
            share = (read["mixed"][row, last].unflatten(0, (4, 6)) / value).mean()
            torch.testing.assert_close(scores[row, token], share)
        vision = frame[row] >= 0
        count = int(kept[row, vision].sum())
        assert count == [4, 2][row]
        assert set(scores[row].masked_fill(~vision, -1).topk(count).indices.tolist()) == set((kept[row] & vision).nonzero()[:, 0].tolist())


def test_a_hand_computed_case(monkeypatch):
    """One text and four vision tokens; weights as given: of 1..4 the last looks most at 3, then at 1."""
    weights = torch.tensor([[1.0, 0, 0, 0, 0], [0.2, 0.8, 0, 0, 0], [0.1, 0.8, 0.1, 0, 0], [0.2, 0.1, 0.3, 0.4, 0],
                            [0.1, 0.25, 0.15, 0.3, 0.2]])
    monkeypatch.setattr("mod.related.fastv.attention_weights", lambda a, x, turn, query: weights[None, None, query[0]])
    x, pos, frame = torch.randn(1, 5, 24).double(), torch.arange(5)[None], np.array([[-1, 0, 0, 0, 0]])
    plan = make_plan(frame, [0], 4, [])
    last, _ = FastV(MODEL.decoder).choose(x, turn_of(x, pos), plan)
    assert last[0].tolist() == [True, True, False, True, False]
    received, scores = FastV(MODEL.decoder, score="received").choose(x, turn_of(x, pos), plan)
    torch.testing.assert_close(scores, torch.tensor([[1.6 / 5, 1.95 / 4, 0.55 / 3, 0.7 / 2, 0.2]]))
    assert received[0].tolist() == [True, True, False, True, False]


def test_all_dropped_is_early_exit():
    """R = 1 after K = 2 == the decoder whose layers keep 1, 1, 0, 0."""
    early = small_model(layers="keep:1,1,0,0")
    state = {name.replace(".block.", "."): value for name, value in early.decoder.state_dict().items() if "router" not in name}
    dense = small_model(layers="none")
    dense.decoder.load_state_dict(state)
    x, pos, frame = stream([(3, [Say(1, "assistant", "red disc")]), (1, [])])
    for score in ("last", "received"):
        torch.testing.assert_close(run(FastV(dense.decoder, 2, 1.0, score), x, pos, frame)[pos < PAD], run(early.decoder, x, pos, frame)[pos < PAD])


def test_the_question_decides_what_is_kept():
    """Other text after the frames, another choice; in a layer of VideoLLM-MoD vision tokens do not know the question."""
    choices = set()
    x, pos, frame = stream([(3, [Say(2, "user", "red disc")])])
    for _ in range(6):
        x = x.clone()
        x[:, -3:] = torch.randn_like(x[:, -3:])
        trace = []
        run(FastV(MODEL.decoder), x, pos, frame, trace=trace)
        choices.add(tuple(trace[0].kept[0].tolist()))
    assert len(choices) > 1


class TestStreams:
    def cache(self):
        return CountingCache(MODEL.config, dtype=torch.float64)

    @settings(max_examples=6)
    @given(talk=conversations(most_frames=3), more=st.integers(1, 3))
    def test_frames_and_question_in_one_chunk_and_then_text(self, talk, more):
        """The choice is made with the first chunk's last token; text after it == the masked whole under that choice."""
        x, pos, frame = stream([talk])
        later = torch.randn(1, more, MODEL.config.dim, dtype=x.dtype)
        fast, cache, trace = FastV(MODEL.decoder), self.cache(), []
        first = run(fast, x, pos, frame, cache=cache, trace=trace)
        torch.testing.assert_close(first, run(fast, x, pos, frame))
        end = pos.shape[1]
        outs = [run(fast, later[:, i : i + 1], torch.tensor([[end + i]]), torch.tensor([[-1]]), cache=cache) for i in range(more)]
        kept = trace[0].kept
        assert cache.entries() == [end + more] * 2 + [int(kept.sum()) + more] * 2

        whole = FastV(MODEL.decoder)
        whole.choose = lambda x, turn, plan, asks=None: (torch.cat((kept, kept.new_ones(1, more)), 1), None)
        together = run(whole, torch.cat((x, later), 1), torch.arange(end + more)[None], torch.cat((frame, frame.new_full((1, more), -1)), 1))
        torch.testing.assert_close(torch.cat(outs, 1), together[:, end:])

    def test_more_frames_are_refused(self):
        x, pos, frame = stream([(2, [])])
        fast, cache = FastV(MODEL.decoder), self.cache()
        run(fast, x[:, :6], pos[:, :6], frame[:, :6], cache=cache)
        with pytest.raises(ValueError, match="in the first chunk"):
            run(fast, x[:, 6:], pos[:, 6:], frame[:, 6:], cache=cache)
        with pytest.raises(ValueError, match="has no cache"):
            run(FastV(MODEL.decoder, masked=True), x, pos, frame, cache=self.cache())


@pytest.mark.parametrize("changes", [{"after": 0}, {"after": 5}, {"drop": 1.5}, {"score": "first"}])
def test_wrong_settings_are_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        FastV(MODEL.decoder, **changes)


def test_logits_are_the_decoders():
    x, pos, frame = stream([(1, [])])
    fast = FastV(MODEL.decoder, drop=0.0)
    assert torch.equal(fast.logits(run(fast, x, pos, frame)), MODEL.decoder.logits(run(MODEL.decoder, x, pos, frame)))
