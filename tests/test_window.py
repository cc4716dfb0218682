"""What an endless stream forgets has an exact meaning: streaming with eviction is the offline pass under its mask."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.block import Rope, rotate
from mod.cache import KVCache
from mod.config import StreamConfig, UserError
from mod.stream import Stream
from tests.helpers import WORDS_ALL, as_batch, conversations, cut_into_chunks, random_pixels, small_model

LAYERS = st.sampled_from(["none", "interleaved", "all", "keep:1,0,0.4,1"])
WINDOWS = st.builds(
    StreamConfig, window=st.integers(1, 3), sinks=st.integers(0, 2), forget=st.sampled_from(["all", "vision"]),
    positions=st.sampled_from(["absolute", "contiguous"]),
)  # fmt: skip


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
        self.layers, self.pos = [self] * 99, None

    def make_room(self, pos, frame):
        pass

    def places(self, pos):
        return torch.zeros_like(pos)

    def append(self, k, v, pos, frame):
        self.pos = pos[0]
        return k, v, None


def offline_under(model, batch, rule: StreamConfig) -> torch.Tensor:
    """Logits of one pass over the whole stream, in which every query looks at its own keys, turned to where they stand
    for it."""
    visible, places = seen_and_places(batch.frame[0].tolist(), rule)
    past, rope = Plain(), Rope.of(model.config)

    def attend(q, k, v, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        outs = []
        for i, p in enumerate(past.pos):
            keys = visible[p, past.pos]
            turned = rotate(k[:, :, keys], places[p, past.pos][keys][None], rope)
            query = rotate(q[:, :, i : i + 1], places[p, p].view(1, 1), rope)
            outs.append((query @ turned.mT / q.shape[-1] ** 0.5).softmax(-1) @ v[:, :, keys])
        return torch.cat(outs, 2)

    seen = model.see(batch.pixels)
    with torch.no_grad(), mock.patch("mod.block.F.scaled_dot_product_attention", attend):
        return model.decoder.logits(model(batch.ids, batch.frame, batch.pos, seen, cache=past))


def in_pieces(model, batch, rule: StreamConfig, random) -> tuple[torch.Tensor, KVCache]:
    """The stream fed in random pieces; with contiguous positions every frame begins a piece."""
    config, dtype = model.config, next(model.parameters()).dtype
    frame, total = batch.frame[0].tolist(), batch.ids.shape[1]
    seen = model.see(batch.pixels)
    cache, outs = KVCache(config, frames=len(seen), text=total, stream=rule, dtype=dtype), []
    for chunk in cut_into_chunks(frame, config.frame_tokens, random):
        begins = [p for p in chunk if p > chunk.start and frame[p] >= 0 and frame[p] != frame[p - 1]]
        edges = [chunk.start, *(begins if rule.positions == "contiguous" else []), chunk.stop]
        for start, stop in zip(edges, edges[1:], strict=False):
            part = slice(start, stop)
            frames = sorted({f for f in frame[part] if f >= 0})
            hidden = model(batch.ids[:, part], batch.frame[:, part], batch.pos[:, part], seen[frames], cache=cache)
            outs.append(model.decoder.logits(hidden))
    return torch.cat(outs, 1).detach(), cache


@settings(max_examples=40)
@given(conversations(most_frames=7, least_frames=2), LAYERS, WINDOWS, st.randoms(use_true_random=False))
def test_streaming_with_eviction_equals_the_offline_pass_under_its_mask(talk, layers, rule, random):
    """Dense and MoD, any policy, in any pieces; and every layer holds what is remembered, at its old positions.

    Catches a window that is one frame off, frames cut in half, text that goes too early, positions turned twice."""
    model = small_model(layers=layers)
    batch = as_batch(model.config, [talk])
    logits, cache = in_pieces(model, batch, rule, random)
    torch.testing.assert_close(logits, offline_under(model, batch, rule), rtol=1e-8, atol=1e-8)

    frame = batch.frame[0].tolist()
    last_chunk_may_hold_more = len({f for f in frame if f >= 0}) - rule.sinks > rule.window
    visible, _ = seen_and_places(frame, rule)
    remembered = visible[-1]
    dense = [number for number, ratio in enumerate(model.config.keep) if ratio == 1]
    for number in dense:
        held = cache.layers[number].pos[0, : int(cache.layers[number].length)]
        assert set(torch.arange(len(frame))[remembered].tolist()) <= set(held.tolist())
        # A chunk of several frames drops only what its first token cannot see.
        assert len(held) == int(remembered.sum()) or (last_chunk_may_hold_more and rule.positions == "absolute")
        assert torch.equal(cache.layers[number].frame[0, : len(held)], batch.frame[0, held]), "frames go with positions"


@given(st.integers(0, 30), LAYERS, WINDOWS, st.integers(4, 9), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_live_stream_holds_the_window_and_no_more(seed, layers, rule, frames, threshold):
    """After every frame and answer each layer holds kept * frames + text entries of what the rule remembers; fed tokens
    equal the offline pass under the mask; room for a window is room for ever."""
    rule = StreamConfig(**{**vars(rule), "threshold": threshold})
    model = small_model(seed, layers=layers)
    stream = Stream(model, WORDS_ALL, frames=frames, text=40 if rule.forgets_text else 200, settings=rule, max_words=2, log=True)
    pixels, capacity = random_pixels(frames, model.config, seed), [layer.capacity for layer in stream.cache.layers]
    for t in range(frames):
        stream.frame(pixels[t : t + 1])
        if t % 3 == 1:
            stream.ask(["where is it ?"])
        fed = [frame for _, frame in stream.fed[0]]
        remembered = seen_and_places(fed, rule)[0][-1].tolist()
        held = [frame for frame, stays in zip(fed, remembered, strict=True) if stays]
        assert stream.held() == (len({f for f in held if f >= 0}), sum(f < 0 for f in held))
        assert stream.cache.lengths() == [kept * stream.held()[0] + stream.held()[1] for kept in model.config.kept]
    assert [layer.capacity for layer in stream.cache.layers] == capacity
    ids, frame = (torch.tensor(column)[None] for column in zip(*stream.fed[0], strict=True))
    batch = as_batch(model.config, [(frames, [])])
    batch.ids, batch.frame, batch.pos, batch.pixels = ids, frame, torch.arange(ids.shape[1])[None], pixels
    live = stream.feed([[9]])[0, -1]
    batch.ids, batch.frame = torch.cat([ids, torch.tensor([[9]])], 1), torch.cat([frame, torch.tensor([[-1]])], 1)
    batch.pos = torch.arange(ids.shape[1] + 1)[None]
    torch.testing.assert_close(live, offline_under(model, batch, rule)[0, -1], rtol=1e-8, atol=1e-8)


@settings(max_examples=15)
@given(st.integers(0, 30), LAYERS, WINDOWS)
def test_rows_that_forget_differently_equal_each_alone(seed, layers, rule):
    """Three rows: one sees every frame, one every other frame, one comes late; texts of different lengths."""
    model, rule = small_model(seed, layers=layers), StreamConfig(**{**vars(rule), "threshold": 0.2})
    due = [[True] * 8, [t % 2 == 0 for t in range(8)], [t >= 3 for t in range(8)]]
    asked = [{2: "where is it ?"}, {4: "where did the red disc appear ?"}, {}]
    pixels = [random_pixels(8, model.config, 10 * seed + row) for row in range(3)]

    def fresh(rows):
        return Stream(model, WORDS_ALL, rows, frames=8, text=120, settings=rule, max_words=3, log=True)

    together, heard = fresh(3), [[], [], []]
    for t in range(8):
        rows = [row[t] for row in due]
        replies = together.frame(torch.stack([pixels[row][t] for row in range(3) if rows[row]]), rows)
        answers = together.ask([questions.get(t) for questions in asked])
        for row in range(3):
            heard[row] += [replies[row]] * rows[row] + [answers[row]] * (t in asked[row])
    for row in range(3):
        alone, said = fresh(1), []
        for t in range(8):
            said += alone.frame(pixels[row][t : t + 1]) if due[row][t] else []
            said += alone.ask([asked[row][t]]) if t in asked[row] else []
        assert said == heard[row] and alone.fed[0] == together.fed[row]
        assert alone.cache.lengths() == together.cache.lengths(row) and alone.held() == together.held(row)
        torch.testing.assert_close(together.feed([[9] if row == r else [] for r in range(3)])[row], alone.feed([[9]])[0])


def test_contiguous_positions_stay_small_and_absolute_ones_grow():
    """The largest place that RoPE is given, over a stream ten windows long."""
    model, places = small_model(), {"absolute": [], "contiguous": []}
    for kind, largest in places.items():
        rule = StreamConfig(window=2, sinks=1, positions=kind, threshold=0.0)
        stream, pixels = Stream(model, WORDS_ALL, frames=3, text=4, settings=rule), random_pixels(20, model.config)

        def watch(x, pos, rope, largest=largest, plain=rotate):
            largest.append(int(pos.max()))
            return plain(x, pos, rope)

        with mock.patch("mod.block.rotate", watch):
            for t in range(20):
                stream.see(pixels[t : t + 1])
    assert max(places["absolute"]) == 20 * 5 and max(places["contiguous"]) == 3 * 5


def test_turned_keys_are_the_keys_of_the_new_place():
    """After many turns a key differs from the one turned once by rounding alone, also far into a stream."""
    rope = Rope()
    key = torch.randn(1, 2, 1, 6)
    turned = rotate(key, torch.tensor([[64 * 27]]), rope)
    for _ in range(64):
        turned = rotate(turned, torch.tensor([[-27]]), rope)
    torch.testing.assert_close(turned, key, rtol=0, atol=2e-5)
    far = 3_000_000
    near = (rotate(key, torch.tensor([[7]]), rope) * rotate(key, torch.tensor([[0]]), rope)).sum()
    late = (rotate(key, torch.tensor([[far + 7]]), rope) * rotate(key, torch.tensor([[far]]), rope)).sum()
    torch.testing.assert_close(late, near, rtol=1e-5, atol=1e-5)


def test_in_half_precision_turning_again_and_again_costs_nothing():
    """Keys that are turned are kept in float32, so that sixty-four turns are as good as one."""
    rule, torch_type = StreamConfig(window=3, sinks=0), torch.bfloat16
    model = small_model(dtype=torch.float32, layers="none")
    cache = KVCache(model.config, frames=9, text=9, stream=rule, dtype=torch_type)
    layer, key = cache.layers[0], torch.randn(1, 2, 1, 6).to(torch_type)
    layer.append(key, key, torch.tensor([[1000]]), torch.tensor([[-1]]))
    for _ in range(64):
        layer.forget(torch.tensor([0]), torch.tensor([5]), Rope.of(model.config))
    expected = rotate(key.float(), torch.tensor([[-320]]), Rope.of(model.config))
    torch.testing.assert_close(layer.k[:, :, :1], expected, rtol=0, atol=1e-4)
    k, v, _ = layer.append(key, key, torch.tensor([[1001]]), torch.tensor([[-1]]))
    assert k.dtype == v.dtype == torch_type and cache.bytes() == 2 * 2 * 6 * (4 + 2)


def test_a_stream_is_restored_over_whatever_was_there():
    model, rule = small_model(dtype=torch.float32), StreamConfig(window=2, threshold=0.3)
    pixels = random_pixels(12, model.config, dtype=torch.float32)

    def fresh():
        return Stream(model, WORDS_ALL, frames=9, text=99, settings=rule, max_words=2)

    one, other = fresh(), fresh()
    for t in range(4):
        one.frame(pixels[t : t + 1])
    tensors, numbers = one.state()
    for t in range(11, 3, -1):
        other.frame(pixels[t : t + 1])
    kept = {key: str(value) for key, value in numbers.items()}
    other.restore(tensors, numbers)
    for t in range(4, 8):
        assert torch.equal(one.see(pixels[t : t + 1]), other.see(pixels[t : t + 1]))
    assert kept == {key: str(value) for key, value in numbers.items()}, "the saved state is not changed by going on"


def test_a_frame_in_the_middle_of_a_chunk_is_refused_where_positions_would_change():
    model, rule = small_model(), StreamConfig(window=1, sinks=0)
    batch = as_batch(model.config, [(3, [])])
    cache = KVCache(model.config, frames=9, text=9, stream=rule, dtype=torch.float64)
    with pytest.raises(ValueError, match="a chunk of its own"):
        model(batch.ids, batch.frame, batch.pos, model.see(batch.pixels), cache=cache)


def test_a_frame_that_does_not_fit_is_as_if_it_had_not_come():
    model = small_model(layers="none")
    stream = Stream(model, WORDS_ALL, frames=1, text=5, settings=StreamConfig(window=1))
    stream.hear([" ".join(["where"] * 8)])  # before the first frame, in the room that was meant for it
    before = stream.cache.window.state()
    with pytest.raises(UserError, match="the cache is full"):
        stream.see(random_pixels(1, model.config))
    assert stream.cache.window.state() == before and stream.seen == [0] and stream.position == [10]


def test_a_question_that_does_not_fit_loses_nothing():
    model = small_model()
    stream = Stream(model, WORDS_ALL, frames=2, text=24, settings=StreamConfig(window=1, sinks=0, threshold=0.0), log=True)
    pixels = random_pixels(6, model.config)
    for t in range(3):
        stream.see(pixels[t : t + 1])
    before, fed, window = stream.cache.state(), list(stream.fed[0]), stream.cache.window.state()
    with pytest.raises(UserError, match="the cache is full"):
        stream.hear([" ".join(["where"] * 24)])
    with pytest.raises(UserError, match="the cache is full"):
        stream.ask([" ".join(["where"] * 10)])
    assert stream.fed[0] == fed and stream.cache.window.state() == window
    assert all(torch.equal(tensor, stream.cache.state()[name]) for name, tensor in before.items())
    stream.see(pixels[3:4])
