"""Streaming == offline, and the cache that makes it so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.config import StreamConfig
from mod.layout import Say, lay_out
from mod.stream import Stream
from tests.helpers import (
    WORDS_ALL,
    as_batch,
    assert_cache_holds_what_was_kept,
    conversations,
    in_chunks,
    offline,
    random_pixels,
    small_model,
)

LAYERS = st.sampled_from(["none", "interleaved", "all", "keep:1,0,0.4,1"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@given(talk=conversations(), layers=LAYERS, gate=st.sampled_from(["value", "update"]), random=st.randoms(use_true_random=False))
def test_any_chunks_equal_the_offline_pass(dtype, tolerance, talk, layers, gate, random):
    """Whole frames and text, cut anywhere between them: logits, cached positions and cached frames all agree.

    Catches non-square is_causal, one length for all layers, renumbered positions, routing that looks ahead."""
    model = small_model(dtype=dtype, layers=layers, gate=gate)
    config, batch, trace = model.config, as_batch(model.config, [talk], dtype), []
    expected, seen = offline(model, batch, trace), model.see(batch.pixels)
    logits, cache = in_chunks(model, batch, seen, random)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)

    text = int((batch.frame < 0).sum())
    assert cache.lengths() == [kept * talk[0] + text for kept in config.kept]
    assert_cache_holds_what_was_kept(cache, batch, trace)


@given(talk=conversations(), layers=LAYERS)
def test_fed_tokens_are_the_training_layout(talk, layers):
    """A stream that is fed a timeline feeds the tokens that lay_out writes for it, in order."""
    frames, said = talk
    model = small_model(layers=layers)
    stream = Stream(model, WORDS_ALL, frames=frames, text=400, log=True)
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
    assert stream.fed[0] == list(zip(layout.ids, layout.frame, strict=True))


@given(seed=st.integers(0, 30), threshold=st.sampled_from([0.0, 0.5, 1.0]), most=st.integers(0, 3))
def test_what_a_live_stream_fed_is_the_layout_of_what_was_said(seed, threshold, most):
    """Whatever an untrained model says, and however its answers are cut: the stream is a proper conversation,
    and its last logits are those of the offline pass over that conversation."""
    model, frames = small_model(seed), 3
    pixels, said = random_pixels(frames, model.config, seed), []
    stream = Stream(model, WORDS_ALL, frames=frames, text=200, log=True, settings=StreamConfig(threshold=threshold), max_words=most)
    for t in range(frames):
        [reply] = stream.frame(pixels[t : t + 1])
        said += [] if reply is None else [Say(t, "assistant", reply)]
        if t == 1:
            [answer] = stream.ask(["where is it ?"])
            said += [Say(t, "user", "where is it ?"), Say(t, "assistant", answer)]
            assert answer is not None and len(answer.split()) <= most
    layout = lay_out(WORDS_ALL, frames, model.config.frame_tokens, said)
    assert stream.fed[0] == list(zip(layout.ids, layout.frame, strict=True))
    assert (threshold == 0) <= (len(said) == 2) and (threshold < 1) | (len(said) == 2 + frames)
    batch = as_batch(model.config, [(frames, said)])
    batch.pixels = pixels
    live = stream.feed([WORDS_ALL.encode("red")])
    ids = torch.cat([batch.ids, torch.tensor([WORDS_ALL.encode("red")])], 1)
    frame = torch.cat([batch.frame, torch.tensor([[-1]])], 1)
    hidden = model(ids, frame, torch.arange(ids.shape[1])[None], model.see(pixels))
    torch.testing.assert_close(live[0, -1], model.decoder.logits(hidden)[0, -1], rtol=1e-9, atol=1e-9)


def run_alone(model, pixels, questions, threshold):
    """What one stream says to one video; questions {frame: text}."""
    stream, heard = Stream(model, WORDS_ALL, frames=len(pixels), text=100, log=True, settings=StreamConfig(threshold=threshold), max_words=3), []
    for t in range(len(pixels)):
        heard += stream.frame(pixels[t : t + 1])
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
    stream = Stream(model, WORDS_ALL, 3, frames=frames, text=100, log=True, settings=StreamConfig(threshold=0.15), max_words=3)
    heard = [[], [], []]
    for t in range(frames):
        for row, reply in enumerate(stream.frame(torch.stack([video[t] for video in videos]))):
            heard[row].append(reply)
        asked = [q.get(t) for q in questions]
        for row, answer in enumerate(stream.ask(asked)):
            heard[row] += [answer] if asked[row] else []
    for row in range(3):
        assert heard[row] == alone[row][0]
        assert stream.cache.lengths(row) == alone[row][1].cache.lengths()
        assert stream.fed[row] == alone[row][1].fed[0]


def test_two_interleaved_streams_through_one_model():
    """The model holds no stream state: two streams in turns == each alone."""
    model = small_model(3)
    videos = [random_pixels(3, model.config, seed) for seed in (1, 2)]
    alone = [run_alone(model, video, {1: "where is it ?"}, 0.2)[0] for video in videos]
    streams = [Stream(model, WORDS_ALL, frames=3, text=100, log=True, settings=StreamConfig(threshold=0.2), max_words=3) for _ in videos]
    heard = [[], []]
    for t in range(3):
        for number, (stream, video) in enumerate(zip(streams, videos, strict=True)):
            heard[number] += stream.frame(video[t : t + 1])
        if t == 1:
            for number, stream in enumerate(streams):
                heard[number] += stream.ask(["where is it ?"])
    assert heard == alone


@given(talk=conversations(), layers=LAYERS)
def test_scoring_a_response_leaves_no_trace(talk, layers):
    """score() equals the offline pass over that response, and the stream goes on as if nothing had happened."""
    model = small_model(layers=layers)
    pixels = random_pixels(2, model.config)
    one, two = (Stream(model, WORDS_ALL, frames=2, text=200, log=True) for _ in range(2))
    for stream in (one, two):
        stream.see(pixels[:1])
    [scores] = one.score(["red disc moves"])
    batch = as_batch(model.config, [(1, [Say(0, "assistant", "red disc moves")])])
    batch.pixels = pixels[:1]
    expected = offline(model, batch).log_softmax(-1)[0, -5:-1]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert one.fed == two.fed and one.cache.lengths() == two.cache.lengths()
    torch.testing.assert_close(one.see(pixels[1:]), two.see(pixels[1:]), rtol=0, atol=0)


def test_full_cache_says_so_before_anything_is_lost():
    model = small_model()
    stream, pixels = Stream(model, WORDS_ALL, frames=1, text=6, log=True), random_pixels(1, model.config)
    stream.see(pixels)
    before, fed = stream.cache.lengths(), list(stream.fed[0])
    # Layer 1 keeps a single token of a frame and layer 0 all five: the text's room lets layer 1 take a frame more.
    assert before == [6, 2, 6, 2] and [layer.capacity for layer in stream.cache.layers] == [11, 7, 11, 7]
    stream.feed([[1] * 3])
    with pytest.raises(ValueError, match="the cache is full: layer 0 would hold 14 entries, it has room for 11"):
        stream.see(pixels)
    before, fed = stream.cache.lengths(), list(stream.fed[0])
    with pytest.raises(ValueError, match="open the stream with more frames or text"):
        stream.hear(["where did it appear ?"])
    assert stream.cache.lengths() == before and stream.fed[0] == fed and stream.seen[0] == 1


def test_cache_bytes_are_the_real_tensors():
    model = small_model(dtype=torch.float32)
    stream = Stream(model, WORDS_ALL, frames=3, text=20, log=True)
    for t in range(3):
        stream.see(random_pixels(3, model.config, dtype=torch.float32)[t : t + 1])
    used = 0
    for layer in stream.cache.layers:
        part = layer.k[:, :, : int(layer.length)]
        used += 2 * part.numel() * part.element_size()
    assert stream.cache.bytes() == used


def test_threshold_decides():
    model = small_model()
    stream = Stream(model, WORDS_ALL, frames=1, text=9, log=True, settings=StreamConfig(threshold=0.3))
    logits = torch.full((2, model.config.vocab_size), -30.0)
    logits[:, WORDS_ALL.eos] = torch.tensor([0.29, 0.31]).log()
    logits[:, WORDS_ALL.assistant] = torch.tensor([0.71, 0.69]).log()
    assert stream.wants_to_speak(logits) == [True, False]
    with pytest.raises(ValueError, match="threshold is a probability"):
        Stream(model, WORDS_ALL, frames=1, text=9, settings=StreamConfig(threshold=1.5))
