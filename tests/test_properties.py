"""The invariants of routing over random everything: sizes, keep ratios, patterns, routers, gates, ragged batches, text
placements, dtypes and seeds. The other files test one part each; here nothing is held fixed."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.config import PATTERNS, Gate, ModelConfig
from mod.decoder import MoDBlock
from mod.layers import PAD
from mod.layout import Say
from mod.videollm import VideoLLM
from tests.helpers import (
    as_batch,
    assert_cache_holds_what_was_kept,
    conversations,
    frame_of,
    in_chunks,
    loud,
    offline,
    random_pixels,
    routed,
)
from tests.test_mod_block import through, vectors
from tests.test_stream import LoggedStream

DTYPES = st.sampled_from([(torch.float64, 1e-9), (torch.float32, 2e-4)])


@st.composite
def configs(draw, layers: str | None = None, ratios=(0.01, 0.1, 0.2, 0.34, 0.5, 0.9, 1.0), **fixed) -> ModelConfig:
    """Any small model: 1 to 4 layers, 2 to 10 tokens per frame, any pattern, ratio, router and gate."""
    kv_heads, grid, depth = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    if layers is None:
        one = st.sampled_from([0, 0.2, 0.5, 1]).map(str)
        ratio_list = st.lists(one, min_size=depth, max_size=depth).map(lambda parts: "keep:" + ",".join(parts))
        layers = draw(st.sampled_from(PATTERNS) | ratio_list)
    sizes = {
        "image_size": 4 * (grid + draw(st.integers(0, 1))), "patch_size": 4, "grid": grid, "vit_dim": 8, "vit_heads": 2,
        "vit_depth": draw(st.integers(1, 2)), "vit_hidden": 8, "dim": draw(st.sampled_from([6, 8, 12])), "depth": depth,
        "heads": kv_heads * draw(st.integers(1, 3)), "kv_heads": kv_heads, "head_dim": draw(st.sampled_from([2, 4, 6])),
        "ffn_hidden": draw(st.integers(4, 12)), "qk_norm": draw(st.booleans()), "qkv_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()), "layers": layers, "keep_ratio": draw(st.sampled_from(ratios)),
        "select": draw(st.sampled_from(["learned", "learned", "random", "uniform"])),
        "gate": draw(st.sampled_from(get_args(Gate))), "keep_last": draw(st.booleans()),
        "take_turns": draw(st.integers(0, 2)),
    }
    return ModelConfig(**{**sizes, **fixed})


def build(config: ModelConfig, dtype=torch.float64, seed: int = 0) -> VideoLLM:
    torch.manual_seed(seed)
    return loud(VideoLLM(config)).to(dtype).eval()


SEEDS = st.integers(0, 99)
TALKS = st.lists(conversations(most_frames=4), min_size=1, max_size=3)


@given(configs(), TALKS, SEEDS)
def test_every_routed_layer_keeps_exactly_the_ceiling_of_every_frame_and_all_text(config, talks, seed):
    model, batch, trace = build(config, seed=seed), as_batch(config, talks), []
    offline(model, batch, trace)
    frames = sum(number for number, _ in talks)
    assert [routing.layer for routing in trace] == [n for n, ratio in enumerate(config.keep_ratios) if ratio < 1]
    for routing in trace:
        exact = math.ceil(round(config.keep_ratios[routing.layer] * config.frame_tokens, 6))
        assert routing.kept.shape == (frames, config.frame_tokens)
        assert (routing.kept.sum(1) == exact).all() and exact == config.keep_counts[routing.layer]


@given(configs(), TALKS, SEEDS, DTYPES)
def test_a_layer_leaves_skipped_tokens_alone_bit_for_bit_and_changes_all_others(config, talks, seed, kind):
    model, batch = build(config, kind[0], seed), as_batch(config, talks, kind[0])
    vision, real = frame_of(batch) >= 0, batch.plan.pos < PAD
    for layer in routed(model):
        x, trace = vectors(model, batch, kind[0]), []
        y = through(model, layer, x, batch.plan, trace=trace)
        kept = trace[0].kept.flatten()
        assert torch.equal(y[vision][~kept], x[vision][~kept])
        changed = (y != x).any(-1)
        assert changed[real & ~vision].all(), "text always runs"
        assert changed[vision][kept].all(), "what is kept runs"
        assert torch.equal(y[~real], x[~real]), "padding is nobody"


@given(configs(), conversations(least_frames=2, most_frames=4), SEEDS, st.data())
def test_the_past_decides_and_the_future_does_not(config, talk, seed, data):
    """A change in frame t moves no kept set and no output before it."""
    model, batch = build(config, seed=seed), as_batch(config, [talk])
    t = data.draw(st.integers(0, talk[0] - 1))
    first = int(batch.plan.vision[t, 0])
    before, after = [], []
    one = offline(model, batch, before)
    batch.pixels[t:] = -batch.pixels[t:].flip(0)
    two = offline(model, batch, after)
    torch.testing.assert_close(one[:, :first], two[:, :first], rtol=0, atol=1e-11)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.kept[:t], b.kept[:t])


@given(configs(), st.lists(conversations(most_frames=3), min_size=2, max_size=3), SEEDS)
def test_a_row_knows_nothing_of_the_others_nor_of_padding(config, talks, seed):
    model, together, trace = build(config, seed=seed), as_batch(config, talks), []
    logits, start = offline(model, together, trace), 0
    for row, talk in enumerate(talks):
        alone, own = as_batch(config, [talk]), []
        alone.pixels.copy_(together.pixels[start : start + talk[0]])
        expected = offline(model, alone, own)
        torch.testing.assert_close(logits[row, : expected.shape[1]], expected[0], rtol=1e-9, atol=1e-9)
        for a, b in zip(trace, own, strict=True):
            assert torch.equal(a.kept[start : start + talk[0]], b.kept)
        start += talk[0]


@settings(max_examples=40)
@given(configs(), conversations(most_frames=4), SEEDS, DTYPES, st.randoms(use_true_random=False))
def test_streaming_equals_offline_and_every_cache_holds_what_the_formula_says(config, talk, seed, kind, random):
    dtype, tolerance = kind
    model, batch, trace = build(config, dtype, seed), as_batch(config, [talk], dtype), []
    expected, seen = offline(model, batch, trace), model.see(batch.pixels)
    logits, cache = in_chunks(model, batch, seen, random)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    text = int((frame_of(batch) < 0).sum())
    assert cache.entries() == [text + count * talk[0] for count in config.keep_counts]
    assert_cache_holds_what_was_kept(cache, batch, trace)


@given(configs(), SEEDS, st.lists(st.integers(0, 1), min_size=2, max_size=8))
def test_streams_that_take_turns_equal_each_alone(config, seed, turns):
    """Two streams through one model, in any order of turns: the model holds no state of either."""
    model = build(config, seed=seed)
    pixels = [random_pixels(len(turns), config, seed + row) for row in range(2)]

    def fresh():
        return LoggedStream(model, threshold=0.3, max_words=2)

    streams, heard = [fresh(), fresh()], [[], []]
    for row in turns:
        t = streams[row].seen[0]
        heard[row] += streams[row].narrate(pixels[row][t : t + 1])
        heard[row] += streams[row].ask(["where is it ?"]) if t % 2 else []
    for row in range(2):
        alone, said = fresh(), []
        for t in range(turns.count(row)):
            said += alone.narrate(pixels[row][t : t + 1])
            said += alone.ask(["where is it ?"]) if t % 2 else []
        assert said == heard[row] and alone.fed == streams[row].fed
        assert alone.cache.entries() == streams[row].cache.entries()


@given(configs(layers="all", ratios=(0.2, 0.5)), TALKS, SEEDS)
def test_keeping_all_with_weight_one_is_the_dense_model(config, talks, seed):
    model, batch = build(config, seed=seed), as_batch(config, talks)
    real, x = batch.plan.pos < PAD, vectors(model, batch)
    for layer in routed(model):
        layer.router.kept = config.frame_tokens
        layer.router.weight = torch.ones_like
        dense, routing = (through(model, one, x, batch.plan) for one in (layer.block, layer))
        torch.testing.assert_close(routing[real], dense[real], rtol=1e-11, atol=1e-11)


@given(configs(), TALKS, SEEDS)
def test_no_routed_layer_is_the_dense_model_bit_for_bit(config, talks, seed):
    """`none`, and any pattern with r = 1, is the plain chain of blocks."""
    for changes in ({"layers": "none"}, {"layers": "all", "keep_ratio": 1.0}):
        model = build(ModelConfig(**{**vars(config), **changes}), torch.float32, seed)
        batch = as_batch(config, talks, torch.float32)
        assert not routed(model)
        x = model.decoder.embed(batch.ids)
        x[frame_of(batch) >= 0] = model.see(batch.pixels).flatten(0, 1)
        turn = model.decoder.rope.turn(batch.plan.pos, config.head_dim, x.dtype)
        for block in model.decoder.layers:
            x = x + block.update(x, turn)
        assert torch.equal(model.decoder.logits(model.decoder.norm(x)), offline(model, batch))


class TestGradients:
    """Trained on labels after a frame and in the text, as in training."""

    def talk_to_the_end(self, config, talk):
        """One row, of which text comes last, so that something reads every frame."""
        frames, said = talk
        return as_batch(config, [(frames, [*said, Say(frames - 1, "assistant", "red disc moves")])])

    def loss(self, model, batch, trace=None):
        return offline(model, batch, trace).flatten(0, 1)[batch.labelled].logsumexp(-1).sum()

    @given(configs(ratios=(0.2, 0.5), select="learned", gate="sigmoid-value"), conversations(least_frames=1), SEEDS)
    def test_with_the_value_gate_every_router_learns(self, config, talk, seed):
        """Whenever anything is labelled after a frame: a kept token is read, or predicts, in every routed layer."""
        model, batch = build(config, seed=seed), self.talk_to_the_end(config, talk)
        self.loss(model, batch).backward()
        for layer in routed(model):
            if layer.router.kept:
                assert layer.router.w.weight.grad.abs().max() > 0

    @given(configs(ratios=(0.2, 0.5)), TALKS, SEEDS)
    def test_skipped_tokens_pass_gradients_through_as_they_come(self, config, talks, seed):
        model, batch = build(config, seed=seed), as_batch(config, talks)
        vision = frame_of(batch) >= 0
        for layer in routed(model):
            x, trace = vectors(model, batch, requires_grad=True), []
            weight = torch.randn_like(x)
            (through(model, layer, x, batch.plan, trace=trace) * weight).sum().backward()
            skipped = ~trace[0].kept.flatten()
            assert torch.equal(x.grad[vision][skipped], weight[vision][skipped])

    @settings(max_examples=15)
    @given(configs(ratios=(0.2, 0.5), select="learned"), conversations(most_frames=3), SEEDS)
    def test_gradients_are_slopes(self, config, talk, seed):
        """Central differences in float64 along a random direction of all weights; the choice itself has no slope."""
        model, batch = build(config, seed=seed), self.talk_to_the_end(config, talk)
        weights = list(model.decoder.parameters())
        self.loss(model, batch).backward()
        directions = [torch.randn_like(p) for p in weights]
        slope = sum((p.grad * d).sum() for p, d in zip(weights, directions, strict=True) if p.grad is not None)

        def value(step):
            trace = []
            with torch.no_grad():
                for p, d in zip(weights, directions, strict=True):
                    p += step * d
                loss = self.loss(model, batch, trace)
                for p, d in zip(weights, directions, strict=True):
                    p -= step * d
            return loss, [routing.kept for routing in trace]

        (up, above), (down, below) = value(1e-6), value(-1e-6)
        if all(torch.equal(a, b) for a, b in zip(above, below, strict=True)):
            torch.testing.assert_close((up - down) / 2e-6, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [True, False])
def test_the_only_difference_between_dense_and_mod_is_the_wrapper(wrap):
    """The dense block of a MoD layer has the dense layer's parameters, and nothing but a router beside them."""
    config = ModelConfig(layers="all" if wrap else "none", depth=1)
    [layer] = VideoLLM(config).decoder.layers
    names = {name.removeprefix("block.") for name, _ in layer.named_parameters()} - {"router.w.weight"}
    [dense] = VideoLLM(ModelConfig(layers="none", depth=1)).decoder.layers
    assert isinstance(layer, MoDBlock) == wrap and names == {name for name, _ in dense.named_parameters()}
