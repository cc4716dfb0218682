"""Streaming == offline, and the cache that makes it so."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.cache import FIRST
from mod.config import Gate
from mod.layers import PAD
from mod.layout import TEXT, Say, lay_out
from mod.live.costs import held_bytes
from mod.stream import Stream
from tests.helpers import (
    WORDS_ALL,
    as_batch,
    assert_cache_holds_what_was_kept,
    conversations,
    frame_of,
    in_chunks,
    offline,
    plan_of,
    random_pixels,
    small_model,
)

LAYERS = st.sampled_from(["none", "interleaved", "all", "keep:1,0,0.4,1"])


class LoggedStream(Stream):
    """A stream that notes what the model is fed: per row (id, number of the frame or TEXT), in order of positions."""

    def __init__(self, model, rows=1, **options):
        self.fed = [[] for _ in range(rows)]
        hidden = model.hidden

        def listening(ids, seen, plan, cache=None, trace=None):
            if cache is self.cache:
                vision = torch.zeros(ids.numel(), dtype=torch.bool)
                vision = vision.index_fill(0, plan.vision.flatten(), True).view_as(ids)
                for row, noted in enumerate(self.fed):
                    for t in (plan.pos[row] < PAD).nonzero()[:, 0]:
                        assert plan.pos[row, t] == len(noted), "positions follow each other"
                        frame = sum(number >= 0 for _, number in noted) // model.config.frame_tokens
                        noted.append((int(ids[row, t]), frame if vision[row, t] else TEXT))
            return hidden(ids, seen, plan, cache, trace)

        model.hidden = listening
        super().__init__(model, WORDS_ALL, rows, **options)

    def score(self, responses):
        before = [list(noted) for noted in self.fed]
        scores = super().score(responses)
        self.fed = before  # which the cache forgets as well
        return scores


def tokens_of(layout):
    return list(zip(layout.ids, layout.frame, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@given(talk=conversations(), layers=LAYERS, gate=st.sampled_from(get_args(Gate)),
       random=st.randoms(use_true_random=False))
def test_any_chunks_equal_the_offline_pass(dtype, tolerance, talk, layers, gate, random):
    """Whole frames and text, cut anywhere between them: logits and cached positions agree.

    Catches non-square is_causal, one length for all layers, renumbered positions, routing that looks ahead."""
    model = small_model(dtype=dtype, layers=layers, gate=gate)
    config, batch, trace = model.config, as_batch(model.config, [talk], dtype), []
    expected, seen = offline(model, batch, trace), model.see(batch.pixels)
    logits, cache = in_chunks(model, batch, seen, random)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)

    text = int((frame_of(batch) < 0).sum())
    assert cache.entries() == [kept * talk[0] + text for kept in config.keep_counts]
    assert_cache_holds_what_was_kept(cache, batch, trace)


@given(talk=conversations(), layers=LAYERS)
def test_fed_tokens_are_the_training_layout(talk, layers):
    """A stream that is fed a timeline feeds the tokens that lay_out writes for it, in order."""
    frames, said = talk
    model = small_model(layers=layers)
    stream = LoggedStream(model)
    pixels = random_pixels(frames, model.config)
    for t in range(frames):
        stream.see(pixels[t : t + 1])
        for say in [say for say in said if say.frame == t]:
            if say.role == "user":
                stream.hear([say.text])
            else:
                ids = [WORDS_ALL.assistant, *WORDS_ALL.encode(say.text), WORDS_ALL.eos]
                stream.feed([ids])
    layout = lay_out(WORDS_ALL, frames, model.config.frame_tokens, said)
    assert stream.fed[0] == tokens_of(layout)


@given(seed=st.integers(0, 30), threshold=st.sampled_from([0.0, 0.5, 1.0]), most=st.integers(0, 3))
def test_what_a_live_stream_fed_is_the_layout_of_what_was_said(seed, threshold, most):
    """Whatever an untrained model says, and however its answers are cut: the stream is a proper conversation,
    and its last logits are those of the offline pass over that conversation."""
    model, frames = small_model(seed), 3
    pixels, said = random_pixels(frames, model.config, seed), []
    stream = LoggedStream(model, threshold=threshold, max_words=most)
    for t in range(frames):
        [reply] = stream.narrate(pixels[t : t + 1])
        said += [] if reply is None else [Say(t, "assistant", reply)]
        if t == 1:
            [answer] = stream.ask(["where is it ?"])
            said += [Say(t, "user", "where is it ?"), Say(t, "assistant", answer)]
            assert answer is not None and len(answer.split()) <= most
    layout = lay_out(WORDS_ALL, frames, model.config.frame_tokens, said)
    assert stream.fed[0] == tokens_of(layout)
    assert (threshold == 0) <= (len(said) == 2) and (threshold < 1) | (len(said) == 2 + frames)
    live = stream.feed([WORDS_ALL.encode("red")])
    ids = torch.tensor([layout.ids + WORDS_ALL.encode("red")])
    plan = plan_of(model.config, torch.tensor([[*layout.frame, TEXT]]))
    hidden = model.hidden(ids, model.see(pixels), plan)
    torch.testing.assert_close(live[0, -1], model.decoder.logits(hidden)[0, -1], rtol=1e-9, atol=1e-9)


def run_alone(model, pixels, questions, threshold):
    """What one stream says to one video; questions {frame: text}."""
    stream, heard = LoggedStream(model, threshold=threshold, max_words=3), []
    for t in range(len(pixels)):
        heard += stream.narrate(pixels[t : t + 1])
        if t in questions:
            heard += stream.ask([questions[t]])
    return heard, stream


@given(seed=st.integers(0, 20), layers=LAYERS)
def test_rows_of_a_batched_stream_equal_each_alone(seed, layers):
    """Three videos in step, speaking at different moments and for different lengths."""
    model, frames = small_model(seed, layers=layers), 3
    videos = [random_pixels(frames, model.config, 10 * seed + row) for row in range(3)]
    questions = [{0: "where is it ?"}, {}, {0: "is it red ?", 2: "where ?"}]
    alone = [run_alone(model, video, asked, 0.15) for video, asked in zip(videos, questions, strict=True)]
    stream = LoggedStream(model, 3, threshold=0.15, max_words=3)
    heard = [[], [], []]
    for t in range(frames):
        for row, reply in enumerate(stream.narrate(torch.stack([video[t] for video in videos]))):
            heard[row].append(reply)
        asked = [q.get(t) for q in questions]
        for row, answer in enumerate(stream.ask(asked)):
            heard[row] += [answer] if asked[row] else []
    for row in range(3):
        assert heard[row] == alone[row][0]
        assert stream.cache.entries(row) == alone[row][1].cache.entries()
        assert stream.fed[row] == alone[row][1].fed[0]


def test_two_interleaved_streams_through_one_model():
    """The model holds no stream state: two streams in turns == each alone."""
    model = small_model(3)
    videos = [random_pixels(3, model.config, seed) for seed in (1, 2)]
    alone = [run_alone(model, video, {1: "where is it ?"}, 0.2)[0] for video in videos]
    streams = [Stream(model, WORDS_ALL, threshold=0.2, max_words=3) for _ in videos]
    heard = [[], []]
    for t in range(3):
        for number, (stream, video) in enumerate(zip(streams, videos, strict=True)):
            heard[number] += stream.narrate(video[t : t + 1])
        if t == 1:
            for number, stream in enumerate(streams):
                heard[number] += stream.ask(["where is it ?"])
    assert heard == alone


@given(talk=conversations(), layers=LAYERS)
def test_scoring_a_response_leaves_no_trace(talk, layers):
    """score() equals the offline pass over that response, and the stream goes on as if nothing had happened."""
    model = small_model(layers=layers)
    pixels = random_pixels(2, model.config)
    one, two = (LoggedStream(model) for _ in range(2))
    for stream in (one, two):
        stream.see(pixels[:1])
    [scores] = one.score(["red disc moves"])
    batch = as_batch(model.config, [(1, [Say(0, "assistant", "red disc moves")])])
    batch.pixels.copy_(pixels[:1])
    expected = offline(model, batch).log_softmax(-1)[0, -5:-1]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert one.fed == two.fed and one.cache.entries() == two.cache.entries()
    torch.testing.assert_close(one.see(pixels[1:]), two.see(pixels[1:]), rtol=0, atol=0)


@given(st.sampled_from(["none", "all", "keep:1,0,0.4,1"]), st.integers(0, 9))
def test_rows_that_rewind_go_on_as_if_nothing_had_been_fed(layers, seed):
    """Rows of different lengths, fed different numbers of words and wound back: cache and logits are as before."""
    model = small_model(seed, layers=layers)
    one, two = (Stream(model, WORDS_ALL, 3) for _ in range(2))
    pixels = random_pixels(3, model.config, seed)
    for stream in (one, two):
        stream.see(pixels[:2], [True, False, True])
        stream.hear(["where is it ?", None, "where ?"])
    mark, position = one.cache.mark(), list(one.position)
    one.feed([[5], [6, 7, 8], []])
    one.see(pixels)
    one.cache.rewind(mark)
    one.position = position
    assert [one.cache.entries(row) for row in range(3)] == [two.cache.entries(row) for row in range(3)]
    for a, b in zip(one.cache.layers, two.cache.layers, strict=True):
        for row, length in enumerate(a.lengths):
            assert torch.equal(a.pos[row, :length], b.pos[row, :length]) and (a.pos[row, length:] >= PAD).all()
    torch.testing.assert_close(one.see(pixels), two.see(pixels), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_that_grows_forgets_nothing(rows):
    """Streamed beyond the slots that every layer begins with: still the offline pass, row by row."""
    model, frames = small_model(layers="interleaved"), FIRST // 5 + 20
    stream, pixels, seen = Stream(model, WORDS_ALL, rows), random_pixels(frames, model.config), [0] * rows
    logits = [[] for _ in range(rows)]
    for t in range(frames):
        sees = [row == 0 or t % 3 > 0 for row in range(rows)]
        last = stream.see(torch.stack([pixels[seen[row]] for row in range(rows) if sees[row]]), sees)
        for row in range(rows):
            seen[row] += sees[row]
            logits[row] += [last[row]] if sees[row] else []
    assert max(stream.cache.entries()) > FIRST > min(stream.cache.entries())
    for row in range(rows):
        batch = as_batch(model.config, [(seen[row], [])])
        batch.pixels.copy_(pixels[: seen[row]])
        ends = batch.plan.vision[:, -1]
        torch.testing.assert_close(torch.stack(logits[row]), offline(model, batch)[0, ends], rtol=1e-9, atol=1e-9)
        for layer, kept in zip(stream.cache.layers, model.config.keep_counts, strict=True):
            assert layer.lengths[row] == 1 + kept * seen[row] and (layer.pos[row, layer.lengths[row] :] >= PAD).all()


def test_cache_bytes_are_the_real_tensors():
    model = small_model(dtype=torch.float32)
    stream = Stream(model, WORDS_ALL)
    for t in range(3):
        stream.see(random_pixels(3, model.config, dtype=torch.float32)[t : t + 1])
    used = 0
    for layer in stream.cache.layers:
        part = layer.k[:, :, : layer.lengths[0]]
        used += 2 * part.numel() * part.element_size()
    assert held_bytes(stream.cache) == used


def test_a_frame_for_each_stream_is_asked_for():
    model = small_model()
    stream, pixels = Stream(model, WORDS_ALL, 2), random_pixels(2, model.config)
    with pytest.raises(ValueError, match="got 2 frames for 1 streams, expected one each"):
        stream.see(pixels, [True, False])
    assert stream.cache.entries() == [1] * 4 and stream.seen == [0, 0]


def test_rows_without_a_frame_say_nothing_about_it():
    """However talkative the model is: only who sees speaks."""
    model = small_model()
    stream, pixels = Stream(model, WORDS_ALL, 3, threshold=1.0, max_words=2), random_pixels(2, model.config)
    before, replies = stream.cache.entries(1), stream.narrate(pixels, [True, False, True])
    assert replies[1] is None and None not in (replies[0], replies[2])
    assert stream.cache.entries(1) == before and stream.seen == [1, 0, 1] and stream.position[1] == 1


def test_threshold_decides():
    model = small_model()
    stream = Stream(model, WORDS_ALL, threshold=0.3)
    logits = torch.full((2, model.config.vocab_size), -30.0)
    logits[:, WORDS_ALL.eos] = torch.tensor([0.29, 0.31]).log()
    logits[:, WORDS_ALL.assistant] = torch.tensor([0.71, 0.69]).log()
    assert stream.wants_to_speak(logits) == [True, False]
