"""Other mixtures of depths (MoD for language models, p-MoD, gamma-MoD): who is chosen, what becomes of the rest."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mod.decoder import dense_block
from mod.layers import PAD, Block, Rope
from mod.layout import PADDING, Say, make_plan
from mod.related.depths import (
    GammaMoD,
    PMoD,
    SequenceMoD,
    attention_rank,
    best,
    decayed_ratios,
    effective_rank,
    gamma_router,
    place_routed,
    replace,
)
from mod.related.ragged import CountingCache, CountingLayer
from tests.helpers import (
    as_batch,
    conversations,
    cut_into_chunks,
    frame_of,
    in_chunks,
    labels_of,
    loud,
    offline,
    small_config,
    small_model,
)

CONFIG = small_config()
KINDS = ["sequence", "p", "p per frame", "gamma"]


def make(kind: str, block: Block | None = None, dim: int = CONFIG.dim, share: float = 0.4, dtype=torch.float64):
    """A block whose router has an opinion."""
    block = block or loud(dense_block(CONFIG))
    if kind == "sequence":
        made = SequenceMoD(block, dim, share, hidden=8)
    elif kind == "gamma":
        made = GammaMoD(block, gamma_router(dim), 1 - share)
    else:
        made = PMoD(block, dim, share, per_frame=kind == "p per frame")
    router = made.router
    nn.init.normal_(router.weight, std=0.3)
    return made.to(dtype)


def stream(talks, dtype=torch.float64):
    """Random vectors in the layout of some conversations: x, pos, frame."""
    batch = as_batch(CONFIG, talks)
    return torch.randn(*batch.ids.shape, CONFIG.dim, dtype=dtype), batch.plan.pos, frame_of(batch)


def run(block, x, pos, frame, size: int = CONFIG.frame_tokens, **options):
    """The block on tokens at pos (B, T) of frames (B, T), `size` tokens each."""
    plan = make_plan(torch.where(pos < PAD, frame, PADDING).numpy(), pos[:, 0].tolist(), size, [])
    assert torch.equal(plan.pos, pos)
    return block(x, turn_of(x, pos), plan, **options)


def turn_of(x, pos):
    return Rope().turn(pos, CONFIG.head_dim, x.dtype)


def fresh_cache(x) -> CountingLayer:
    return CountingLayer(CONFIG.frame_tokens, len(x), CONFIG.kv_heads, CONFIG.head_dim, x.dtype, x.device)


class RunningSum(nn.Module):
    """In the place of attention: a token's sum with all before it, which tells who was there."""

    def forward(self, x, turn=None, pos=None, **_):
        return x.cumsum(1)


class Tenfold(nn.Module):
    def forward(self, x):
        return 10 * x


def counting_block() -> Block:
    return Block(RunningSum(), Tenfold(), nn.Identity(), nn.Identity())


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(talks=st.lists(conversations(most_frames=3), min_size=1, max_size=3), share=st.sampled_from([0.0, 0.3, 0.5, 0.81]))
def test_exactly_so_many_are_kept_and_the_rest_is_as_the_rule_says(kind, talks, share):
    """Count, skipped rows, text, and each row what it is alone (in particular, padding competes for nothing)."""
    block, (x, pos, frame), trace = make(kind, share=share), stream(talks), []
    y = run(block, x, pos, frame, trace=trace)
    for row in range(len(x)):
        real = pos[row] < PAD
        vision, kept = real & (frame[row] >= 0), trace[0].kept[row]
        tokens, seen = int(real.sum()), int(vision.sum())
        expected = {
            "sequence": math.ceil(share * tokens - 1e-9), "p": math.floor(share * seen + 1e-9) + tokens - seen,
            "p per frame": math.ceil(share * 5 - 1e-9) * (seen // 5) + tokens - seen,
            "gamma": math.ceil(tokens - (1 - share) * seen - 1e-6),
        }[kind]
        assert int(kept.sum()) == expected and not kept[~real].any()
        skipped = real & ~kept
        if kind.startswith("p"):
            weight = 1 + 0.2 * torch.tanh(block.router(x[row, skipped]))
            torch.testing.assert_close(y[row, skipped], weight * x[row, skipped])
        else:
            assert torch.equal(y[row, skipped], x[row, skipped])
        if kind != "sequence":
            assert kept[real & ~vision].all(), "text always runs"
        assert (y[row, kept] != x[row, kept]).any(-1).all()
        length = slice(0, tokens)
        alone = run(block, x[row : row + 1, length], pos[row : row + 1, length], frame[row : row + 1, length])
        torch.testing.assert_close(y[row : row + 1, length], alone)


class TestByHand:
    frame = torch.tensor([[-1, 0, 0, 1, 1]])
    pos = torch.arange(5)[None]

    def test_sequence(self):
        """Scores are the numbers: of 1..4 the half that is kept is 3 and 4; sums 3 and 7; 3 + 3 * (3 + 10 * 6)."""
        block = make("sequence", counting_block(), 1, share=0.5)
        nn.init.ones_(block.router.weight)
        y = run(block, numbers(1, 2, 3, 4), self.pos[:, :4], -torch.ones_like(self.pos[:, :4]))
        torch.testing.assert_close(y, numbers(1, 2, 3 + 3 * 63, 4 + 4 * (7 + 110)))

    def test_p(self):
        """Kept are the text 1 and, of 2..5, 4 and 5; their sums are 1, 5 and 10; the text's weight is one."""
        block = make("p", counting_block(), 1, share=0.5)
        nn.init.ones_(block.router.weight)
        w = [1 + 0.2 * math.tanh(n) for n in range(6)]
        y = run(block, numbers(1, 2, 3, 4, 5), self.pos, self.frame, 2)
        torch.testing.assert_close(y, numbers(2 + 20, 2 * w[2], 3 * w[3], 9 + w[4] * 90, 15 + w[5] * 150))

    def test_p_per_frame(self):
        """Frames (2, 3) and (4, 5) keep 3 and 5: sums 1, 4 and 9."""
        block = make("p per frame", counting_block(), 1, share=0.5)
        nn.init.ones_(block.router.weight)
        w = [1 + 0.2 * math.tanh(n) for n in range(6)]
        y = run(block, numbers(1, 2, 3, 4, 5), self.pos, self.frame, 2)
        torch.testing.assert_close(y, numbers(22, 2 * w[2], 7 + w[3] * 70, 4 * w[4], 14 + w[5] * 140))

    def test_gamma(self):
        """ceil(5 - 0.5 * 4) = 3 are kept: the text, although its p is least, 4 and 5. Every kept token is weighed by p."""
        block = make("gamma", counting_block(), 1, share=0.5)
        with torch.no_grad():
            block.router.weight.copy_(torch.tensor([[0.0], [1.0]]))
        p = [1 / (1 + math.exp(-n)) for n in range(6)]
        y, trace = run(block, numbers(1, 2, 3, 4, 5), self.pos, self.frame, 2), []
        torch.testing.assert_close(y, numbers(2 + p[1] * 20, 2, 3, 9 + p[4] * 90, 15 + p[5] * 150))
        run(block, numbers(1, 2, 3, 4, 5), self.pos, self.frame, 2, trace=trace)
        wanted = -(math.log(p[1]) + math.log(1 - p[2]) + math.log(1 - p[3]) + math.log(p[4]) + math.log(p[5])) / 5
        assert block.auxiliary.item() == pytest.approx(0.01 * wanted) and trace[0].scores[0, 4] == pytest.approx(p[5])


def test_of_equal_scores_the_earlier_wins_and_only_candidates_do():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    among = torch.tensor([[True, True, True, True, False], [False, True, True, True, True]])
    assert best(scores, among, torch.tensor([2, 9])).int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]


class TestKeepAll:
    """Where everybody is kept with weight one, each is the dense block."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_with_weight_one_it_is_the_dense_block(self, kind):
        block, (x, pos, frame) = make(kind, share=1.0), stream([(3, [Say(1, "assistant", "red disc")]), (1, [])])
        if kind == "gamma":
            nn.init.zeros_(block.router.weight)
            block.router.bias.data = torch.tensor([-1e4, 1e4], dtype=x.dtype)
        elif kind != "sequence":
            nn.init.zeros_(block.router.weight)
        with mock.patch.object(SequenceMoD, "score", lambda self, x: torch.ones_like(x[..., 0])):
            y = run(block, x, pos, frame)
        torch.testing.assert_close(y[pos < PAD], block.block(x, turn_of(x, pos), pos)[pos < PAD], rtol=1e-12, atol=1e-12)

    def test_sequence_weighs_the_update(self):
        block, (x, pos, frame) = make("sequence", share=1.0), stream([(2, [])])
        torch.testing.assert_close(run(block, x, pos, frame), x + block.score(x)[..., None] * block.block.update(x, turn_of(x, pos), pos))

    def test_p_weighs_the_mlp_of_vision_tokens_alone(self):
        block, (x, pos, frame) = make("p", share=1.0), stream([(2, [Say(0, "user", "red disc")])])
        u = x + block.block.attention(block.block.norm1(x), turn_of(x, pos), pos)
        weight = torch.where(frame[..., None] >= 0, 1 + 0.2 * torch.tanh(block.router(x)), 1.0)
        torch.testing.assert_close(run(block, x, pos, frame), u + weight * block.block.mlp(block.block.norm2(u)))


def changed_before_the_end(block, seed: int) -> bool:
    """Does another last frame change what comes out before it?"""
    torch.manual_seed(seed)
    x, pos, frame = stream([(4, [])])
    before, other = run(block, x, pos, frame), x.clone()
    other[:, -5:] = 3 * torch.randn_like(other[:, -5:])
    return not torch.allclose(before[:, :-5], run(block, other, pos, frame)[:, :-5], atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_among_a_whole_sequence_is_not_causal_and_one_within_a_frame_is(kind):
    """EXPECTED to look into the future, all but the last: the reason for predictors, and for choosing frame by frame."""
    block = make(kind)
    assert any(changed_before_the_end(block, seed) for seed in range(8)) == (kind != "p per frame")


class TestStreams:
    @pytest.mark.parametrize("kind", ["sequence", "p per frame", "gamma"])
    @settings(max_examples=8)
    @given(talk=conversations(most_frames=3), seed=st.integers(0, 99), random=st.randoms())
    def test_in_pieces_it_is_what_it_is_in_one(self, kind, talk, seed, random):
        torch.manual_seed(seed)
        block, (x, pos, frame) = make(kind), stream([talk])
        if kind == "gamma":
            block.threshold = 0.5  # or nearly everything would be kept
        if kind == "sequence":  # a predictor that says no as often as yes
            nn.init.normal_(block.predictor[2].weight)
            nn.init.zeros_(block.predictor[2].bias)
        one = run(block, x, pos, frame, past=fresh_cache(x))
        if kind == "p per frame":
            torch.testing.assert_close(one, run(block, x, pos, frame))
        past, outs = fresh_cache(x), []
        for chunk in cut_into_chunks(frame[0].tolist(), 5, random):
            part = slice(chunk.start, chunk.stop)
            outs.append(run(block, x[:, part], pos[:, part], frame[:, part], past=past))
        torch.testing.assert_close(torch.cat(outs, 1), one)

    def test_the_predictor_decides_by_each_token_alone_and_skipped_ones_leave_nothing(self):
        block, (x, pos, frame), trace = loud(make("sequence")), stream([(3, [])]), []
        nn.init.normal_(block.predictor[2].weight)
        nn.init.zeros_(block.predictor[2].bias)
        past = fresh_cache(x)
        y = run(block, x, pos, frame, past=past, trace=trace)
        kept = trace[0].kept
        assert 0 < kept.sum() < kept.numel() and torch.equal(kept, block.predict(x) > 0) and block.auxiliary is None
        assert torch.equal(y[~kept], x[~kept]) and past.lengths == kept.sum(1).tolist()
        assert torch.equal(past.pos[0, : past.lengths[0]], pos[kept]), "original positions"
        other, again = torch.randn_like(x), []
        other[:, 4] = x[:, 4]
        run(block, other, pos, frame, past=fresh_cache(x), trace=again)
        assert kept[0, 4] == again[0].kept[0, 4]

    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_of_different_length_store_what_they_kept_and_no_filling(self, kind):
        block, (x, pos, frame), trace = make(kind), stream([(3, [Say(1, "user", "red disc")]), (1, []), (2, [])]), []
        past = fresh_cache(x)
        y = run(block, x, pos, frame, past=past, trace=trace)
        assert past.lengths == trace[0].kept.sum(1).tolist()
        for row in range(3):
            one = slice(row, row + 1)
            alone = run(block, x[one], pos[one], frame[one], past=fresh_cache(x[one]))
            torch.testing.assert_close(y[one][pos[one] < PAD], alone[pos[one] < PAD])

    def test_gamma_has_a_threshold_and_text_is_in(self):
        block, (x, pos, frame), trace = make("gamma"), stream([(2, [Say(1, "user", "red disc")])]), []
        block.threshold = 0.55
        run(block, x, pos, frame, past=fresh_cache(x), trace=trace)
        p = block.router(block.block.norm1(x)).softmax(-1)[..., 1]
        assert torch.equal(trace[0].kept, (p > 0.55) | (frame < 0)) and not trace[0].kept.all()

    def test_a_sample_wide_choice_refuses_a_second_chunk_of_frames_but_not_text(self):
        block, (x, pos, frame) = make("p"), stream([(3, [Say(2, "user", "red disc")])])
        past = fresh_cache(x)
        outs = [run(block, x[:, part], pos[:, part], frame[:, part], past=past) for part in (slice(0, 16), slice(16, None))]
        torch.testing.assert_close(torch.cat(outs, 1), run(block, x, pos, frame))
        with pytest.raises(ValueError, match="in the first chunk"):
            run(block, x[:, :6], pos[:, :6] + 50, frame[:, :6], past=past)

    def test_half_a_frame_is_refused(self):
        x, pos, frame = stream([(2, [])])
        with pytest.raises(ValueError, match="expected whole frames of 5"):
            run(make("p per frame"), x[:, :8], pos[:, :8], frame[:, :8])

    def test_a_whole_decoder_of_p_mod_streams(self):
        import random

        model = small_model(layers="interleaved")
        ratios = decayed_ratios(4)
        replace(model.decoder, [1, 2, 3], lambda block, n: make("p per frame", block, share=ratios[n]))
        batch = as_batch(model.config, [(4, [Say(1, "assistant", "red disc moves")])])
        cache = CountingCache(model.config, dtype=torch.float64)
        streamed, _ = in_chunks(model, batch, model.see(batch.pixels), random.Random(3), cache)
        torch.testing.assert_close(streamed, offline(model, batch))
        text = int((frame_of(batch) < 0).sum())
        assert cache.entries() == [text + 4 * kept for kept in (5, 4, 2, 1)]


def test_no_token_goes_through_when_nobody_is_chosen():
    x, pos, frame = stream([(2, [])])
    block = make("sequence")
    nn.init.constant_(block.predictor[2].bias, -1e4)
    assert run(block, x, pos, frame, past=fresh_cache(x)) is x
    vision = frame[0] >= 0
    for kind in ("p", "gamma"):
        block = make(kind, share=0.0)
        y = run(block, x[:, vision], pos[:, vision], frame[:, vision])
        weight = 1 + 0.2 * torch.tanh(block.router(x[:, vision])) if kind == "p" else 1
        assert torch.equal(y, x[:, vision] * weight)


class TestGradients:
    @pytest.mark.parametrize("kind", KINDS)
    def test_routers_learn(self, kind):
        block, (x, pos, frame) = make(kind), stream([(3, [Say(1, "user", "red disc")])])
        router = block.router
        run(block, x, pos, frame).square().sum().backward()
        assert router.weight.grad.abs().max() > 1e-6

    def test_p_mod_begins_as_the_dense_block_and_learns_from_kept_and_skipped(self):
        block, (x, pos, frame), trace = PMoD(loud(dense_block(CONFIG)), CONFIG.dim, 0.4).double(), stream([(3, [])]), []
        y = run(block, x, pos, frame, trace=trace)
        kept = trace[0].kept[0]
        assert torch.equal(y[0, ~kept], x[0, ~kept])
        torch.testing.assert_close(y[:, kept], block.block(x[:, kept], turn_of(x, pos[:, kept]), pos[:, kept]))
        assert kept.int().tolist() == [1] * 7 + [0] * 9, "all scores are equal: <bos> and the earliest"
        for which in (kept & (frame[0] >= 0), ~kept):
            (grad,) = torch.autograd.grad(y[0, which].square().sum(), block.router.weight, retain_graph=True)
            assert grad.abs().max() > 1e-6

    @given(st.floats(-50, 50))
    def test_the_weight_stays_near_one(self, score):
        block = make("p", counting_block(), 1, share=0.0)
        nn.init.zeros_(block.router.weight)
        nn.init.constant_(block.router.bias, score)
        weight = run(block, numbers(1.0), torch.tensor([[0]]), torch.tensor([[0]]), 1).item()
        assert 0.8 <= weight <= 1.2 and (score != 0 or weight == 1) and (weight - 1) * score >= 0

    def test_the_predictor_learns_the_choice_and_leaves_the_model_alone(self):
        block, (x, pos, frame), trace = make("sequence"), stream([(4, [])]), []
        x.requires_grad_()
        run(block, x, pos, frame, trace=trace)
        grads = torch.autograd.grad(block.auxiliary, [x, block.router.weight, block.predictor[0].weight], allow_unused=True)
        assert grads[0] is None and grads[1] is None and grads[2].abs().max() > 0
        logits, kept = block.predict(x), trace[0].kept
        by_hand = -torch.where(kept, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()
        torch.testing.assert_close(block.auxiliary, by_hand)
        for _ in range(60):  # plain gradient descent
            run(block, x.detach(), pos, frame)
            weights = list(block.predictor.parameters())
            with torch.no_grad():
                for weight, grad in zip(weights, torch.autograd.grad(block.auxiliary, weights), strict=True):
                    weight -= grad
        assert ((block.predict(x) > 0) == kept).float().mean() > 0.9

    def test_padding_has_no_part_in_the_auxiliary_losses(self):
        for kind in ("sequence", "gamma"):
            block, (x, pos, frame), losses = make(kind), stream([(3, []), (1, [])]), []
            for padding in (1.0, 1e4):
                run(block, torch.where((pos < PAD)[..., None], x, padding * x), pos, frame)
                losses.append(float(block.auxiliary.detach()))
            assert losses[0] == losses[1] > 0

    def test_gammas_layers_share_one_router(self):
        model, router = small_model(layers="none"), gamma_router(CONFIG.dim).double()
        replace(model.decoder, [1, 2], lambda block, _: GammaMoD(block, router))
        batch = as_batch(CONFIG, [(2, [Say(0, "assistant", "red disc")])])
        offline(model, batch)[labels_of(batch) >= 0].logsumexp(-1).sum().backward()
        assert router.weight.grad.abs().max() > 1e-8
        assert sum("router" in name for name, _ in model.named_parameters()) == 2, "one weight and one bias"


class TestWhere:
    def test_decayed_ratios(self):
        assert decayed_ratios(4) == pytest.approx([1, 0.75, 0.25, 0.15]) and decayed_ratios(1) == [1]
        ratios = decayed_ratios(32)
        assert sum(ratios) / 32 == pytest.approx(0.5375, abs=5e-4) and ratios[:9].count(1.0) == 8

    @given(st.integers(2, 60))
    def test_ratios_fall_and_average_half_before_they_are_cut(self, depth):
        ratios = decayed_ratios(depth)
        assert ratios == sorted(ratios, reverse=True) and min(ratios) == 0.15 and ratios[0] == 1
        assert not any(0.85 < ratio < 1 for ratio in ratios)
        assert sum(decayed_ratios(depth, high=2, low=0)) / depth == pytest.approx(0.5)

    @given(st.integers(2, 9), st.integers(0, 99))
    def test_attention_rank(self, size, seed):
        torch.manual_seed(seed)
        sink = torch.zeros(size, size)
        sink[:, 0] = 1
        even = torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]
        itself = torch.eye(size)
        for weights, rank in ((sink, 1), (even, size - 1), (itself, 0)):
            assert attention_rank(weights[None, None]) == rank
        assert attention_rank(torch.stack((sink, even, itself))[None]) == pytest.approx(size / 3), "mean over heads"
        some = torch.randn(2, 3, size, size).tril().softmax(-1)
        assert attention_rank(some) <= size - 1 and effective_rank(some) <= size - 1 + 1e-9
        assert attention_rank(some[:, [2, 0, 1]]) == pytest.approx(attention_rank(some))
        assert effective_rank(sink[None, None]) == pytest.approx(1) and effective_rank(itself[None, None]) == 0

    def test_lowest_ranks_are_routed(self):
        assert place_routed([3.0, 1.0, 2.0, 1.0, 2.0], 3) == [1, 2, 3]
