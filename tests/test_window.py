"""What an endless stream forgets has an exact meaning: streaming with eviction is the offline pass under its mask."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.cache import KVCache, LayerCache
from mod.config import UserError
from mod.layers import Rope, rotate
from mod.layout import TEXT
from mod.live.costs import held_bytes
from mod.live.live import LiveStream
from mod.live.saved import restore_stream, stream_state
from mod.live.settings import StreamConfig
from mod.live.window import WindowCache, open_cache
from tests.helpers import (
    WORDS_ALL,
    as_batch,
    conversations,
    cut_into_chunks,
    frame_of,
    plan_of,
    random_pixels,
    small_model,
)

LAYERS = st.sampled_from(["none", "interleaved", "all", "keep:1,0,0.4,1"])
WINDOWS = st.builds(
    StreamConfig, window=st.integers(1, 3), sinks=st.integers(0, 2), forget=st.sampled_from(["all", "vision"]),
    positions=st.sampled_from(["absolute", "contiguous"]),
)


class Logged(LiveStream):
    """A LiveStream that notes down what it is fed: per row, (token id, frame) pairs; TEXT for text."""

    def __init__(self, model, words, rows=1, **options):
        self.fed = [[] for _ in range(rows)]
        super().__init__(model, words, rows, **options)

    def advance(self, texts, frames, seen=None):
        for row, text in enumerate(texts):
            vision = [(0, self.seen[row])] * (frames[row] * self.model.config.frame_tokens)
            self.fed[row] += vision + [(token, TEXT) for token in text]
        return super().advance(texts, frames, seen)


def seen_and_places(frame: list[int], rule: StreamConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule, token by token: does the token at p see that at s; and where does s stand when p looks? Both (T, T)."""
    total = len(frame)
    moment = [max(frame[: position + 1]) for position in range(total)]  # the latest frame; -1 before the first

    def sees(p, s):
        old = rule.sinks <= moment[s] <= moment[p] - rule.window
        return s <= p and not (old and (rule.forget == "all" or frame[s] >= 0))

    visible = torch.tensor([[sees(p, s) for s in range(total)] for p in range(total)])
    if rule.positions == "absolute":
        return visible, torch.arange(total).expand(total, -1)
    return visible, visible.long().cumsum(1) - 1  # as many places back as tokens before it can still be seen


class Plain:
    """Stands in for a cache in one offline pass: hands keys through unturned, and remembers whose turn it is."""

    def __init__(self):
        self.layers, self.pos, self.places = [self] * 99, None, None

    def begin(self, plan):
        self.places = torch.zeros_like(plan.pos)

    def append(self, k, v, pos):
        self.pos = pos[0]
        return k, v, None


def offline_under(model, ids, frame, seen, rule: StreamConfig) -> torch.Tensor:
    """Logits of one pass over a whole stream, ids and frame (1, T), in which every query looks at its own keys, turned
    to where they stand for it."""
    visible, places = seen_and_places(frame[0].tolist(), rule)
    past, rope = Plain(), Rope(model.config.rope_base)

    def turned(x, at):
        return rotate(x, rope.turn(at, x.shape[-1], torch.float64))

    def attend(q, k, v, *_, **__):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        outs = []
        for i, p in enumerate(past.pos):
            keys = visible[p, past.pos]
            query, key = turned(q[:, :, i : i + 1], places[p, p].view(1, 1)), turned(k[:, :, keys], places[p, past.pos][keys][None])
            outs.append((query @ key.mT / q.shape[-1] ** 0.5).softmax(-1) @ v[:, :, keys])
        return torch.cat(outs, 2)

    with torch.no_grad(), mock.patch("mod.layers.F.scaled_dot_product_attention", attend):
        return model.decoder.logits(model.hidden(ids, seen, plan_of(model.config, frame), past))


@torch.no_grad()
def in_pieces(model, batch, rule: StreamConfig, random) -> tuple[torch.Tensor, KVCache]:
    """The stream fed in random pieces, of which a frame begins each that has one."""
    frame, outs = frame_of(batch), []
    seen, cache = model.see(batch.pixels), open_cache(model, rule)
    for chunk in cut_into_chunks(frame[0].tolist(), model.config.frame_tokens, random):
        begins = [p for p in chunk if p > chunk.start and frame[0, p] >= 0 and frame[0, p] != frame[0, p - 1]]
        edges = [chunk.start, *begins, chunk.stop]
        for start, stop in zip(edges, edges[1:], strict=False):
            frames = sorted({f for f in frame[0, start:stop].tolist() if f >= 0})
            plan = plan_of(model.config, frame[:, start:stop], [start])
            outs.append(model.decoder.logits(model.hidden(batch.ids[:, start:stop], seen[frames], plan, cache)))
    return torch.cat(outs, 1), cache


@settings(max_examples=40)
@given(conversations(most_frames=7, least_frames=2), LAYERS, WINDOWS, st.randoms(use_true_random=False))
def test_streaming_with_eviction_equals_the_offline_pass_under_its_mask(talk, layers, rule, random):
    """Dense and MoD, any policy, in any pieces; and every layer holds what is remembered, at its old positions.

    Catches a window that is one frame off, frames cut in half, text that goes too early, positions turned twice."""
    model = small_model(layers=layers)
    batch = as_batch(model.config, [talk])
    logits, cache = in_pieces(model, batch, rule, random)
    frame = frame_of(batch)
    expected = offline_under(model, batch.ids, frame, model.see(batch.pixels), rule)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    remembered = seen_and_places(frame[0].tolist(), rule)[0][-1]
    assert cache.held() == (len(frame[0, remembered & (frame[0] >= 0)].unique()), int((remembered & (frame[0] < 0)).sum()))
    for layer, ratio in zip(cache.layers, model.config.keep_ratios, strict=True):
        held = layer.pos[0, : layer.lengths[0]].tolist()
        assert held == sorted(held) and remembered[held].all()
        assert len(held) == layer.kept * cache.held()[0] + cache.held()[1]
        if ratio == 1:
            assert held == remembered.nonzero()[:, 0].tolist()


@given(st.integers(0, 30), LAYERS, WINDOWS, st.integers(4, 9), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_live_stream_holds_the_window_and_no_more(seed, layers, rule, frames, threshold):
    """After every frame and answer each layer holds kept * frames + text entries of what the rule remembers; fed tokens
    equal the offline pass under the mask."""
    rule = StreamConfig(**{**vars(rule), "threshold": threshold})
    model = small_model(seed, layers=layers)
    stream, pixels = Logged(model, WORDS_ALL, settings=rule, max_words=2), random_pixels(frames, model.config, seed)
    for t in range(frames):
        stream.narrate(pixels[t : t + 1])
        if t % 3 == 1:
            stream.ask(["where is it ?"])
        fed = [frame for _, frame in stream.fed[0]]
        remembered = seen_and_places(fed, rule)[0][-1].tolist()
        held = [frame for frame, stays in zip(fed, remembered, strict=True) if stays]
        assert stream.held() == (len({f for f in held if f >= 0}), sum(f < 0 for f in held))
        assert stream.cache.entries() == [k * stream.held()[0] + stream.held()[1] for k in model.config.keep_counts]
        assert len(stream.cache.segments[0]) <= 1 + rule.most_frames, "nothing that was forgotten is counted on"
    live = stream.feed([[9]])[0, -1]
    ids, frame = (torch.tensor(column)[None] for column in zip(*stream.fed[0], strict=True))
    expected = offline_under(model, ids, frame, model.see(pixels), rule)[0, -1]
    torch.testing.assert_close(live, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=15)
@given(st.integers(0, 30), LAYERS, WINDOWS)
def test_rows_that_forget_differently_equal_each_alone(seed, layers, rule):
    """Three rows: one sees every frame, one every other frame, one comes late; texts of different lengths."""
    model, rule = small_model(seed, layers=layers), StreamConfig(**{**vars(rule), "threshold": 0.2})
    due = [[True] * 8, [t % 2 == 0 for t in range(8)], [t >= 3 for t in range(8)]]
    asked = [{2: "where is it ?"}, {4: "where did the red disc appear ?"}, {}]
    pixels = [random_pixels(8, model.config, 10 * seed + row) for row in range(3)]

    def fresh(rows):
        return Logged(model, WORDS_ALL, rows, settings=rule, max_words=3)

    together, heard = fresh(3), [[], [], []]
    for t in range(8):
        rows = [row[t] for row in due]
        replies = together.narrate(torch.stack([pixels[row][t] for row in range(3) if rows[row]]), rows)
        answers = together.ask([questions.get(t) for questions in asked])
        for row in range(3):
            heard[row] += [replies[row]] * rows[row] + [answers[row]] * (t in asked[row])
    for row in range(3):
        alone, said = fresh(1), []
        for t in range(8):
            said += alone.narrate(pixels[row][t : t + 1]) if due[row][t] else []
            said += alone.ask([asked[row][t]]) if t in asked[row] else []
        assert said == heard[row] and alone.fed[0] == together.fed[row]
        assert alone.cache.entries() == together.cache.entries(row) and alone.held() == together.held(row)
        torch.testing.assert_close(together.feed([[9] if row == r else [] for r in range(3)])[row], alone.feed([[9]])[0])


def test_contiguous_positions_stay_small_and_absolute_ones_grow():
    """The largest place that RoPE is given, over a stream ten windows long."""
    model, places = small_model(), {"absolute": [], "contiguous": []}
    for kind, largest in places.items():
        rule = StreamConfig(window=2, sinks=1, positions=kind, threshold=0.0)
        stream, pixels = LiveStream(model, WORDS_ALL, settings=rule), random_pixels(20, model.config)

        def watch(self, pos, *size, largest=largest, plain=Rope.turn):
            largest.append(int(pos.max()))
            return plain(self, pos, *size)

        with mock.patch("mod.layers.Rope.turn", watch):
            for t in range(20):
                stream.see(pixels[t : t + 1])
    assert max(places["absolute"]) == 20 * 5 and max(places["contiguous"]) == 3 * 5


def turned(x, by: int):
    return rotate(x, Rope().turn(torch.tensor([[by]]), x.shape[-1]))


def test_turned_keys_are_the_keys_of_the_new_place():
    """After many turns a key differs from the one turned once by rounding alone, also far into a stream."""
    key = torch.randn(1, 2, 1, 6)
    again = turned(key, 64 * 27)
    for _ in range(64):
        again = turned(again, -27)
    torch.testing.assert_close(again, key, rtol=0, atol=2e-5)
    far = 3_000_000
    near = (turned(key, 7) * turned(key, 0)).sum()
    late = (turned(key, far + 7) * turned(key, far)).sum()
    torch.testing.assert_close(late, near, rtol=1e-5, atol=1e-5)


def test_in_half_precision_turning_again_and_again_costs_nothing():
    """A word after 64 frames is turned as often as one of them leaves. Keys are kept in float32, so that sixty-four
    turns are as good as one."""
    half = torch.bfloat16
    model = small_model(dtype=half, layers="none")
    cache, word = open_cache(model, StreamConfig(window=64, forget="vision")), torch.randn(1, 2, 1, 6).to(half)

    def come(frame):
        cache.begin(plan_of(model.config, torch.tensor([frame])))
        keys, pos = word.expand(-1, -1, len(frame), -1), torch.arange(len(frame))[None]
        return cache.layers[0].append(keys, keys, pos)[:2]

    for t in range(2 * 64):
        if t == 64:
            come([TEXT])
        k, v = come([0] * 5)
    assert cache.held() == (64, 1) and cache.gone == [64 * 5]
    torch.testing.assert_close(cache.layers[0].k[:, :, :1], turned(word.float(), -64 * 5), rtol=0, atol=1e-4)
    assert k.dtype == v.dtype == half and held_bytes(cache) == sum(cache.entries()) * 2 * 6 * (4 + 2)


@settings(max_examples=10)
@given(WINDOWS, st.integers(0, 20))
def test_a_stream_is_restored_over_whatever_was_there(rule, seed):
    model, rule = small_model(seed, torch.float32), StreamConfig(**{**vars(rule), "threshold": 0.3})
    pixels = random_pixels(12, model.config, dtype=torch.float32)
    one, other = (LiveStream(model, WORDS_ALL, settings=rule, max_words=2) for _ in range(2))
    for t in range(4):
        one.narrate(pixels[t : t + 1])
    tensors, numbers = stream_state(one)
    for t in range(11, 3, -1):
        other.narrate(pixels[t : t + 1])
    kept = json.dumps(numbers)
    restore_stream(other, tensors, json.loads(kept))
    for t in range(4, 8):
        assert torch.equal(one.see(pixels[t : t + 1]), other.see(pixels[t : t + 1]))
    assert kept == json.dumps(numbers), "the saved state is not changed by going on"


def test_scoring_leaves_no_trace_in_a_window():
    model = small_model()
    one, other = (LiveStream(model, WORDS_ALL, settings=StreamConfig(window=2), max_words=2) for _ in range(2))
    pixels = random_pixels(5, model.config)
    for t in range(5):
        assert torch.equal(one.see(pixels[t : t + 1]), other.see(pixels[t : t + 1]))
        one.score(["red disc appears top"])
        assert one.held() == other.held() and one.cache.state() == other.cache.state()


@pytest.mark.parametrize("frame", [[0] * 5 + [1] * 5, [TEXT] * 2 + [0] * 5 + [1] * 5])
def test_more_than_one_frame_of_a_row_in_a_chunk_is_refused(frame):
    model, rule = small_model(), StreamConfig(window=1, sinks=0)
    cache = open_cache(model, rule)
    with pytest.raises(ValueError, match="a chunk of its own"):
        cache.begin(plan_of(model.config, torch.tensor([frame])))
    assert cache.held() == (0, 0) and cache.entries() == [0] * 4


def test_a_cache_that_cannot_forget_frames_says_why():
    model = small_model()

    class Own(KVCache):
        no_window = "it holds no frames"

    class Other(KVCache):
        pass

    model.new_cache = lambda rows=1: Own(model.config, rows)
    assert type(open_cache(model, StreamConfig())) is Own
    with pytest.raises(UserError, match="a window got 2 frames, but it holds no frames; leave it out"):
        open_cache(model, StreamConfig(window=2))
    model.new_cache = lambda rows=1: Other(model.config, rows)
    cache = open_cache(model, StreamConfig(window=2), 3)
    assert isinstance(cache, Other) and isinstance(cache, WindowCache) and len(cache.segments) == 3


def test_without_a_window_everything_is_remembered():
    model = small_model()
    stream, pixels = LiveStream(model, WORDS_ALL, settings=StreamConfig(), max_words=2), random_pixels(9, model.config)
    for t in range(9):
        stream.see(pixels[t : t + 1])
    stream.hear(["where is it ?"])
    assert type(stream.cache) is KVCache and stream.held() == (9, 6)
    assert stream.cache.entries() == [9 * k + 6 for k in model.config.keep_counts] and np.isinf(stream.settings.most_frames)


def test_in_half_precision_a_layer_stays_of_its_own_kind():
    model = small_model(dtype=torch.bfloat16)

    class OwnLayer(LayerCache):
        pass

    class Own(KVCache):
        def __init__(self, config, rows=1, dtype=torch.float32, device="cpu"):
            super().__init__(config, rows, dtype, device)
            self.layers = [OwnLayer(kept, rows, config.kv_heads, config.head_dim, dtype, device) for kept in config.keep_counts]

    model.new_cache = lambda rows=1: Own(model.config, rows, torch.bfloat16)
    for positions, precision in (("contiguous", torch.float32), ("absolute", torch.bfloat16)):
        cache = open_cache(model, StreamConfig(window=2, positions=positions), 2)
        assert all(isinstance(layer, OwnLayer) and layer.k.dtype == precision for layer in cache.layers)
        assert [layer.kept for layer in cache.layers] == list(model.config.keep_counts)
