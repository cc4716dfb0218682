"""Every system of the field as a model: it learns, a row alone is what it is in a batch, streaming equals offline where
it can stream and is refused in one sentence where it cannot, and what it costs is counted right."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stream_tiny
import train_tiny
from mod.config import ModelConfig, UserError
from mod.data import clip_batch, clip_pixels
from mod.evaluate import cost_ratios
from mod.layout import NO_LABEL, Vocabulary, lay_out
from mod.live.live import LiveStream
from mod.live.saved import cache_state, restore_cache, restore_stream, stream_state
from mod.live.settings import StreamConfig
from mod.related import world
from mod.related.base import ONLINE, Reducer
from mod.related.costs import counted, frame_bytes
from mod.related.data import HARDER_WORDS, SPARK_QUESTION, make_clip
from mod.related.methods import METHODS, FieldModel, build, configure, listing, own_fields
from mod.related.models import Deeper, Reduced
from mod.related.window_extension import visual_rope
from mod.related.world import PRESETS, WORLD, RelatedRun, settle
from mod.run import config_from
from mod.stream import Stream
from mod.study.costs import forward_flops, kv_bytes
from mod.study.needle import needle_clip
from mod.videollm import VideoLLM
from tests.helpers import frame_of, labels_of, plan_of

WORDS = Vocabulary(HARDER_WORDS)
SMALL = FieldModel(vit_dim=16, vit_hidden=24, vit_heads=2, dim=24, heads=2, kv_heads=1, head_dim=12, ffn_hidden=32)
DATA = replace(PRESETS["field"].data, frames=5)
FIELD = replace(PRESETS["field"], model=SMALL, data=DATA)
OFFLINE = {"fastv", "p-mod", "free-video", "vts"}
OTHER_CHOICE = {"sequence-mod", "gamma-mod"}  # training chooses among all tokens, all else by each token alone
NO_WINDOW = {"voco", "visual-rope"}
LOOKS_BACK = {"mod", "p-mod-frame", "gamma-mod", "sequence-mod"}  # what a frame keeps depends on what is remembered


CHEAP = [name for name in METHODS if METHODS[name].cheap]


def model_of(name: str, seed: int = 0, cheap: bool = False):
    torch.manual_seed(seed)
    model = build(configure(replace(SMALL, cheap=cheap), name))
    for part, value in model.named_parameters():
        if "router" in part:  # some begin at zero, and would choose the first tokens
            torch.nn.init.normal_(value)
    return model.double().eval()


def some_clips(number: int, first: int = 0, **data):
    return [make_clip(replace(DATA, **data), SMALL, "train", 0, first + i) for i in range(number)]


def hidden_of(model, clips, cache=None):
    batch = clip_batch(WORDS, clips, model.config)
    return model.hidden(batch.ids, model.see(batch.pixels.double()), batch.plan, cache), batch


def loss_of(model, clips):
    """The mean over all labels, and the batch."""
    batch = clip_batch(WORDS, clips, model.config)
    text, stream = model(batch._replace(pixels=batch.pixels.double()))
    return (text + stream) / sum(batch.counts), batch


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_learns(name):
    """One step forward and back: a finite loss, and a gradient for all that the method has."""
    model = model_of(name).train()
    loss, batch = loss_of(model, some_clips(3, wide=0.5))
    loss.backward()
    without = {part for part, value in model.named_parameters() if value.grad is None and value.requires_grad}
    if name == "no-vision":
        assert without == {part for part, _ in model.named_parameters() if part.startswith("vit.")}
    else:
        assert not without
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", METHODS)
def test_a_stream_alone_is_what_it_is_in_a_batch(name):
    """Neither the other rows nor their padding change a row, at any place that a loss or a reader looks at."""
    model, clips = model_of(name), some_clips(2, wide=0.5) + some_clips(1, 5, frames=3)
    with torch.no_grad():
        together, batch = hidden_of(model, clips)
        for row, clip in enumerate(clips):
            alone, single = hidden_of(model, [clip])
            looked_at = labels_of(single)[0] != NO_LABEL
            torch.testing.assert_close(alone[0, looked_at], together[row, : len(looked_at)][looked_at], rtol=0, atol=1e-9)


def pieces(frame: list[int], sizes: list[int]) -> list[range]:
    """A stream cut before frames: first what comes before them, then so many frames and their text at a time, the last
    of `sizes` for ever."""
    begins = [t for t, f in enumerate(frame) if f >= 0 and frame[t - 1] != f] + [len(frame)]
    cuts, number = [0, begins[0]], 0
    for size in [*sizes, *[sizes[-1]] * len(begins)]:
        number = min(number + size, len(begins) - 1)
        cuts.append(begins[number])
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]


def streamed(model, batch, sizes):
    """The hidden states of one stream fed in pieces, and the cache that it leaves."""
    cache, outs, seen, frame = model.new_cache(), [], 0, frame_of(batch)
    for part in pieces(frame[0].tolist(), sizes):
        own, part = frame[:, part], slice(part.start, part.stop)
        frames = len({f for f in own[0].tolist() if f >= 0})
        vision = model.see(batch.pixels[seen : seen + frames].double()) if frames else None
        plan = plan_of(model.config, own, [part.start])
        outs.append(model.hidden(batch.ids[:, part], vision, plan, cache))
        seen += frames
    return torch.cat(outs, dim=1), cache


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OFFLINE])
@settings(max_examples=4, deadline=None)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), index=st.integers(0, 20), wide=st.booleans())
def test_streaming_is_offline(name, sizes, index, wide):
    """In pieces of any number of whole frames: the hidden states of one pass, and a cache of the size that is counted."""
    model, clip = model_of(name), some_clips(1, index, wide=float(wide))[0]
    with torch.no_grad():
        offline, batch = hidden_of(model, [clip])
        online, cache = streamed(model, batch, sizes)
    looked_at = labels_of(batch)[0] != NO_LABEL
    torch.testing.assert_close(online[0, looked_at], offline[0, looked_at], rtol=0, atol=1e-8)
    counts = counted(model, WORDS, [clip])
    assert sum(cache.entries()) == pytest.approx(counts["entries"] * len(clip.frames) + counts["text"])


@pytest.mark.parametrize("name", METHODS)
def test_the_future_changes_nothing_in_what_runs_online(name):
    """Other last frames, and the same before them: methods that stream by the choice of training do not notice; the
    others say that they look ahead."""
    model, (clip,) = model_of(name), some_clips(1, 3, wide=0.0)
    other = replace(clip, frames=clip.frames.copy())
    other.frames[3:] = some_clips(1, 4, wide=0.0)[0].frames[3:]
    with torch.no_grad():
        (one, batch), (two, _) = hidden_of(model, [clip]), hidden_of(model, [other])
    before = (labels_of(batch)[0] != NO_LABEL) & (frame_of(batch)[0].cummax(0).values < 3)
    same = torch.allclose(one[0, before], two[0, before], rtol=0, atol=1e-9)
    if name not in OFFLINE:
        assert same
    elif name != "free-video":  # which without a question chooses frames by their number alone
        assert not same
    if name in OTHER_CHOICE:
        model.train()
        with torch.no_grad():
            (one, _), (two, _) = hidden_of(model, [clip]), hidden_of(model, [other])
        assert not torch.allclose(one[0, before], two[0, before], rtol=0, atol=1e-9), "in training they look ahead"


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_what_must_know_all_frames_is_not_streamed(name):
    model = model_of(name)
    assert not model.online
    with pytest.raises(UserError, match="must know all frames"):
        Stream(model, WORDS)


@pytest.mark.parametrize("name", METHODS)
def test_what_decides_to_speak_has_seen_the_frame(name):
    """The last place of a frame, after which the model speaks or keeps silent, depends on what the frame shows; without
    vision it does not."""
    model, (clip,) = model_of(name), some_clips(1, 6, wide=0.0)
    other = replace(clip, frames=clip.frames.copy())
    other.frames[2] = some_clips(1, 7, wide=0.0)[0].frames[2]
    with torch.no_grad():
        (one, batch), (two, _) = hidden_of(model, [clip]), hidden_of(model, [other])
    last = int((frame_of(batch)[0] == 2).nonzero()[-1])
    assert torch.equal(one[0, last], two[0, last]) == (name == "no-vision")


def test_online_is_what_the_scope_says():
    for name in METHODS:
        model = model_of(name)
        assert model.online == (name not in OFFLINE)
        if isinstance(model, Reduced):
            assert model.online == (model.reducer.scope in ONLINE) and isinstance(model.reducer, Reducer)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OFFLINE])
def test_rows_that_see_at_different_times_are_what_they_are_alone(name):
    """Two streams through one batch, a question before one of them, frames in turns and together."""
    words, model = WORDS, model_of(name).float()
    videos = [clip_pixels(some_clips(1, index, frames=3, wide=0.0)).float() for index in (1, 2)]
    both, alone = Stream(model, words, 2), [Stream(model, words) for _ in videos]
    both.hear([None, "where is it ?"])
    alone[1].hear(["where is it ?"])
    for rows, numbers in (((0, 1), (0, 0)), ((0,), (1, 0)), ((1,), (1, 1)), ((0, 1), (2, 2))):
        pictures = torch.stack([videos[row][numbers[row]] for row in rows])
        together = both.see(pictures, [row in rows for row in (0, 1)])
        for row in rows:
            mine = alone[row].see(videos[row][numbers[row]][None])
            torch.testing.assert_close(together[row], mine[0], rtol=0, atol=2e-4)
    assert [both.cache.entries(row) for row in (0, 1)] == [one.cache.entries() for one in alone]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OFFLINE])
def test_a_saved_stream_goes_on_bit_for_bit(name):
    """With what its method remembers beside keys and values."""
    words, clip = WORDS, some_clips(1, 2, wide=0.0)[0]
    model = model_of(name).float()
    pixels = clip_pixels([clip]).float()

    def stream():
        return LiveStream(model, words, settings=StreamConfig())

    whole, first, second = stream(), stream(), stream()
    for one in (whole, first):
        for picture in pixels[:3]:
            one.see(picture[None])
    restore_stream(second, *stream_state(first))
    for picture in pixels[3:]:
        assert torch.equal(second.see(picture[None]), whole.see(picture[None]))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OFFLINE])
def test_windows_forget_whole_frames_of_any_number_of_tokens(name):
    """With a window that is longer than the stream nothing changes; with a shorter one the cache stops growing, and
    holds the same frames in every layer. Some methods cannot forget frames, and say so."""
    model, words = model_of(name).float(), WORDS

    def stream(**rule):
        return LiveStream(model, words, settings=StreamConfig(**rule))

    if name in NO_WINDOW:
        with pytest.raises(UserError, match="a window got 2 frames, but .*; leave it out"):
            stream(window=2)
        return
    clip = make_clip(replace(DATA, frames=9), SMALL, "train", 0, 1)
    pixels = clip_pixels([clip]).float()
    plain, wide, narrow = stream(), stream(window=50), stream(window=2)
    for number, picture in enumerate(pixels):
        a, b = plain.see(picture[None]), wide.see(picture[None])
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        narrow.see(picture[None])
        if number == 4:
            for one in (plain, wide, narrow):
                one.hear(["where is it ?"])
    size = model.config.frame_tokens
    before = 1 + 5 * size + 5  # <bos>, five frames, a question of five tokens
    for layer, all_of_it in zip(narrow.cache.layers, plain.cache.layers, strict=True):
        held, pos = layer.pos[0, : layer.lengths[0]], all_of_it.pos[0, : all_of_it.lengths[0]]
        stays = (pos == 0) | (pos >= before + 2 * size)  # <bos>, and frames 7 and 8
        if name in LOOKS_BACK:
            assert (held[held > 0] >= before + 2 * size).all()
            assert name in OTHER_CHOICE or (held[0] == 0 and len(held) == stays.sum())
        else:
            assert held.tolist() == pos[stays].tolist()
    assert narrow.held() == (2, 1) and plain.held() == (9, 6)


@pytest.mark.parametrize("name", ["full", "setok", "prumerge", "q-former", "adaptvision", "longva"])
def test_what_a_window_has_forgotten_has_never_been(name):
    """In a decoder of one layer an entry knows of no other, and positions close the gap: after six frames a stream that
    remembers two is one that has had no others."""
    model = build(configure(replace(SMALL, depth=1), name)).eval()
    whole, short = LiveStream(model, WORDS, settings=StreamConfig(window=2)), Stream(model, WORDS)
    pixels = clip_pixels(some_clips(1, 1, frames=6, wide=0.0)).float()
    for number, picture in enumerate(pixels):
        seen = whole.see(picture[None])
        if number >= 4:
            alone = short.see(picture[None])
    torch.testing.assert_close(seen, alone, rtol=0, atol=1e-5)
    assert whole.cache.entries() == short.cache.entries()


@pytest.mark.parametrize("name", ["mod", "setok"])
def test_a_window_in_half_precision_counts_what_comes(name):
    """Its layers keep keys in float32, and still count."""
    model = model_of(name).bfloat16()
    stream = LiveStream(model, WORDS, settings=StreamConfig(window=2))
    for picture in clip_pixels(some_clips(1, 1, frames=4, wide=0.0)):
        stream.see(picture[None])
    size = model.config.frame_tokens
    for layer in stream.cache.layers:
        held = layer.pos[0, : layer.lengths[0]]
        assert layer.k.dtype == torch.float32 and held[0] == 0 and 2 * size < held[1:].min() and 3 * size < held.max()


@pytest.mark.parametrize("name", ["setok", "p-mod-frame", "gamma-mod"])
def test_a_window_may_forget_frames_and_not_their_text(name):
    """Of the frames that are gone only the question is left."""
    stream = LiveStream(model_of(name).float(), WORDS, settings=StreamConfig(window=2, forget="vision"))
    for number, picture in enumerate(clip_pixels(some_clips(1, 1, frames=5, wide=0.0)).float()):
        stream.see(picture[None])
        if number == 1:
            stream.hear(["where is it ?"])
    size = stream.model.config.frame_tokens
    for layer in stream.cache.layers:
        held = layer.pos[0, : layer.lengths[0]].tolist()
        assert held[:6] == [0, *range(1 + 2 * size, 6 + 2 * size)] and min(held[6:], default=9e9) >= 6 + 3 * size


def test_counts_are_the_formulas():
    """Of MoD, full computation, early exit and layer skipping, for which there are formulas, text and vision, exactly."""
    clips = some_clips(2, wide=0.0)
    for name in ("mod", "full", "early-exit", "layer-skip"):
        model = model_of(name).float()
        counts = counted(model, WORDS, clips)
        texts = [len(lay_out(WORDS, 5, 0, clip.said).ids) for clip in clips]
        flops = [forward_flops(model.config, 5, text, logits=0) for text in texts]
        assert counts["flops"] == sum(sum(one.values()) for one in flops) / 2
        assert counts["encoder"] == flops[0]["vit"] and counts["tokens"] == 26
        vision = kv_bytes(model.config, 1, 0)
        assert frame_bytes(model, counts) == vision and counts["text"] == SMALL.depth * sum(texts) / 2


def test_a_frame_leaves_what_its_method_says():
    """Tokens into the decoder and entries in the cache, of methods whose numbers are fixed."""
    expected = {"no-vision": (1, 4), "q-former": (6, 24), "perceiver": (6, 24), "longva": (10, 40), "voco": (28, 8),
                "fastv": (26, 26 * 3), "early-exit": (26, 52), "visual-rope": (26, 104)}
    for name, numbers in expected.items():
        counts = counted(model_of(name).float(), WORDS, [make_clip(replace(DATA, frames=4), SMALL, "train", 0, 1)])
        assert (counts["tokens"], counts["entries"]) == numbers, name
    square, wide = (
        counted(model_of("adaptvision").float(), WORDS, some_clips(1, wide=w))["tokens"] for w in (0.0, 1.0)
    )
    assert (square, wide) == (1 + 25 + 6, 1 + 25 + 2 * 6)


def test_auxiliary_losses_reach_their_parameters_and_nobody_else():
    """The predictor of Mixture-of-Depths learns; what it learns from does not notice."""
    clips, losses = some_clips(2), []

    def gradients(with_loss: bool):
        model = model_of("sequence-mod").train()
        if not with_loss:
            model.forward = super(Deeper, model).forward
        loss, _ = loss_of(model, clips)
        loss.backward()
        losses.append(loss.item())
        return {name: value.grad for name, value in model.named_parameters()}

    with_loss, without = gradients(True), gradients(False)
    for name, gradient in with_loss.items():
        if "predictor" in name:
            assert without[name] is None and gradient.abs().sum() > 0
        else:
            torch.testing.assert_close(gradient, without[name])
    assert losses[0] == losses[1], "the logged loss is that of the words"


@pytest.mark.parametrize("name", ["sequence-mod", "gamma-mod"])
def test_auxiliary_losses_weigh_as_much_as_the_mean_over_labels(name):
    """The gradient is that of the main loss and the auxiliary losses, written out."""
    model, clips = model_of(name).train(), some_clips(2)
    loss, _ = loss_of(model, clips)
    loss.backward()
    gradients = {part: value.grad.clone() for part, value in model.named_parameters()}
    model.zero_grad()
    hidden, batch = hidden_of(model, clips)
    logits = model.decoder.logits(hidden.flatten(0, 1)[batch.labelled])
    auxiliary = [layer.auxiliary for layer in model.decoder.layers if hasattr(layer, "auxiliary")]
    assert len(auxiliary) == 2
    (torch.nn.functional.cross_entropy(logits, batch.labels) + sum(auxiliary)).backward()
    for part, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[part])


def test_longer_streams_turn_more_slowly_and_others_as_they_were():
    model = model_of("visual-rope").train()
    hidden_of(model, some_clips(2))
    model.eval()
    plain = model.decoder.rope
    assert model.longest.item() == 5 and model.rope(5) == plain and model.rope(20).factor == 4
    assert model.rope(20).context == 5 * 26
    with torch.no_grad():
        hidden_of(model, some_clips(1, frames=20))
    assert model.decoder.rope == plain and model.longest.item() == 5, "a forward pass leaves the model as it was"


def test_a_stream_that_was_announced_turns_as_one_pass_does():
    """Online the number of frames is said before the first; otherwise it turns as in training."""
    model, clip = model_of("visual-rope"), some_clips(1, 2, frames=6, wide=0.0)[0]
    model.longest.data.fill_(2.0)
    with torch.no_grad():
        offline, batch = hidden_of(model, [clip])
        for frames in (6, 0):
            cache = model.new_cache()
            cache.announce(frames)
            online, _ = hidden_of(model, [clip], cache)
            assert torch.allclose(online, offline, rtol=0, atol=1e-9) == (frames == 6)


def test_rows_of_different_lengths_turn_each_at_its_own_speed_and_a_stream_goes_on_at_its_own():
    model = model_of("visual-rope")
    model.longest.data.fill_(4.0)
    clips = some_clips(1, frames=3) + some_clips(1, 1, frames=9)
    with torch.no_grad():
        together, _ = hidden_of(model, clips)
        for row, clip in enumerate(clips):
            alone, batch = hidden_of(model, [clip])
            looked_at = labels_of(batch)[0] != NO_LABEL
            torch.testing.assert_close(alone[0, looked_at], together[row, : len(looked_at)][looked_at], rtol=0, atol=1e-9)
    short, long = model.new_cache(), model.new_cache()
    short.announce(5)
    long.announce(9)
    with pytest.raises(UserError, match="opened for 9 frames, got 5"):
        restore_cache(short, cache_state(long))


def test_fastv_does_not_look_at_the_answer():
    """What is dropped depends on the question, not on what stands behind it."""
    model, clip = model_of("fastv"), make_clip(replace(DATA, question_rate=1.0), SMALL, "train", 0, 11)
    last = max(number for number, say in enumerate(clip.said) if say.role == "assistant")
    for wrong in ("now left", "spark orange", "nowhere"):
        said = [replace(say, text=wrong) if number == last else say for number, say in enumerate(clip.said)]
        with torch.no_grad():
            (one, batch), (two, other) = hidden_of(model, [clip]), hidden_of(model, [replace(clip, said=said)])
        begins = int((batch.ids[0] == WORDS.assistant).nonzero()[-1])
        same = (frame_of(batch)[0, : begins + 1] >= 0) | (batch.ids[0, : begins + 1] == other.ids[0, : begins + 1])
        assert same.all()
        torch.testing.assert_close(one[0, : begins + 1], two[0, : begins + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OFFLINE])
def test_a_stream_comes_back_to_where_it_stood(name):
    """After `rewind` the next frame is what it was the first time, with all that a method remembers."""
    model, pixels = model_of(name).float(), clip_pixels(some_clips(1, 2, wide=0.0)).float()
    stream = Stream(model, WORDS)
    for picture in pixels[:2]:
        stream.see(picture[None])
    mark, position, logits = stream.cache.mark(), list(stream.position), []
    for picture in (pixels[2], pixels[3], pixels[2]):
        logits.append(stream.see(picture[None]))
        stream.cache.rewind(mark)
        stream.position = list(position)
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[0], logits[1]) == (name == "no-vision")


@pytest.mark.parametrize("name", CHEAP)
def test_a_cheap_setting_learns_streams_and_costs_less(name):
    """Of a long stream in which little is said, at most a third of full computation's decoder, FastV a little more,
    but for clusters, of which there are as many as frames have."""
    model, plain = model_of(name, cheap=True), model_of(name)
    loss, batch = loss_of(model.train(), some_clips(3, wide=0.5))
    loss.backward()
    assert not [part for part, value in model.named_parameters() if value.grad is None and value.requires_grad]
    clip, model = some_clips(1, 3, wide=0.0)[0], model.eval()
    if model.online:
        with torch.no_grad():
            offline, batch = hidden_of(model, [clip])
            online, _ = streamed(model, batch, [1, 2])
        looked_at = labels_of(batch)[0] != NO_LABEL
        torch.testing.assert_close(online[0, looked_at], offline[0, looked_at], rtol=0, atol=1e-8)
    quiet = [make_clip(replace(DATA, question_rate=0.0, event_rate=0.0, ahead=0.0, wide=0.0), SMALL, "train", 0, 1, 24)]
    cost, own, full = (one["flops"] - one["encoder"] for one in (counted(each, WORDS, quiet) for each in
                                                                 (model, plain, model_of("full"))))
    assert cost < own and (name == "setok" or cost < 0.36 * full)


def test_a_method_without_a_cheap_setting_says_so(capsys):
    assert train_tiny.main(["--method", "voco", "--cheap"]) == 2
    assert "cheap got True, but voco has no such setting; leave it out" in capsys.readouterr().err


def test_a_key_frame_is_remembered_and_saved():
    stream = Stream(model_of("vts-stream").float(), WORDS, 2)
    assert not stream.cache.remembered
    picture = clip_pixels(some_clips(1, 2, wide=0.0))[:1]
    stream.see(picture, [False, True])
    assert list(stream.cache.remembered) == [1] and stream.cache.frames == [0, 1]
    assert set(stream.cache.more()) == {"frames", "remembered.1"}


def test_a_reducer_may_not_hand_on_more_than_its_places():
    model = build(replace(configure(SMALL, "longva"), tokens=4))
    with pytest.raises(ValueError, match="10 tokens of a frame that has 4 places"):
        hidden_of(model.double(), some_clips(1, wide=0.0))


def test_configuring():
    """A method sets what it decides, forgets what another had set, and unknown ones are refused."""
    for name in METHODS:
        config = configure(configure(FieldModel(), "voco"), name)
        assert config == configure(FieldModel(layers="none"), name)
        assert config.method == name and own_fields(config) <= set(vars(config))
    assert configure(FieldModel(), "mod") == FieldModel()
    with pytest.raises(UserError, match="--method got 'all', expected one of mod, full"):
        configure(FieldModel(), "all")
    with pytest.raises(UserError, match="this run's method is 'gone'"):
        build(replace(FieldModel(), method="gone"))
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS) and all(line.count("Streaming needs:") == 1 for line in lines)


@pytest.mark.parametrize("depth", [0.0, 0.67, 1.0])
def test_a_needle_is_in_one_frame_and_asked_for_at_the_end(depth):
    clip = needle_clip(FIELD, 3, 10, depth)
    sparks = clip.patch_labels[..., -1].max(1)
    assert [t for t, spark in enumerate(sparks) if spark] == [round(depth * 9)]
    assert [(say.frame, say.text) for say in clip.said if say.role == "user"] == [(9, SPARK_QUESTION)]
    assert clip.said[-1].text.startswith("spark ")


QUICK = ["--steps", "1", "--batch-size", "2", "--vit-steps", "1", "--frames", "3", "--eval-clips", "2", "--eval-every", "0",
         "--preset", "field", "--device", "cpu", "--max-words", "3"]


@pytest.fixture
def one_clip_counted(monkeypatch):
    """Costs are counted on one clip, so that a test is quick that is not about them."""
    monkeypatch.setattr(world, "COUNTED", 1)
    world.full_counts.cache_clear()
    yield
    world.full_counts.cache_clear()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_by_its_flag_and_streams_or_says_why_not(name, tmp_path, capsys, one_clip_counted):
    out = tmp_path / "run"
    assert train_tiny.main([*QUICK, "--method", name, "--dense-steps", "1", "--narrow-steps", "1", "--out", str(out)]) == 0
    told, config = capsys.readouterr().out, json.loads((out / "config.json").read_text())
    assert config["model"]["method"] == name and (name == "mod" or METHODS[name].line in told)
    metrics = json.loads((out / "metrics.json").read_text())
    assert ("free_running" in metrics) == (name not in OFFLINE) and 0 < metrics["kv_ratio"] < 1.5
    code = stream_tiny.main(["--checkpoint", str(out), "--device", "cpu", "--frames", "2", "--ask", "1:where is it ?", "--streams", "3"])
    said = capsys.readouterr()
    if name in OFFLINE:
        assert code == 2 and said.err == f"stream_tiny.py: {name} must know all frames before the first answer; it cannot be streamed\n"
        assert "it cannot be streamed" in told
    else:
        full, dense = said.out.split(" full: ")[1].split(" entries")[0].split(), said.out.split("cache: ")[1].split()
        assert code == 0 and len(set(full)) == 1 and int(full[0]) > 3 * 52  # three streams, square and wide, of two frames of 26 tokens; and text
        if name in ("full", "mod", "layer-skip"):
            assert dense[0] == full[0]


def test_the_script_announces_how_long_a_stream_will_be(tmp_path, capsys, monkeypatch):
    out, made = tmp_path / "run", []
    assert train_tiny.main([*QUICK, "--method", "visual-rope", "--out", str(out)]) == 0
    monkeypatch.setattr("mod.related.models.visual_rope", lambda *sizes: made.append(sizes) or visual_rope(*sizes))
    for frames, turned in ((3, False), (4, True)):
        assert stream_tiny.main(["--checkpoint", str(out), "--device", "cpu", "--frames", str(frames)]) == 0
        assert bool(made) == turned
    assert set(made) == {(10000.0, 3 * 26, 4 * 26, 0.5, 4.0)}


def test_the_scripts_refuse_what_a_method_cannot_do(tmp_path, capsys):
    def refused(main, flags, *parts):
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(part in error for part in parts), error

    out = tmp_path / "run"
    refused(train_tiny.main, [*QUICK, "--method", "prunemerge", "--out", str(out)], "got 'prunemerge'", "prumerge")
    refused(train_tiny.main, [*QUICK, "--method", "setok", "--layers", "all", "--out", str(out)], "--layers does nothing", "setok")
    refused(train_tiny.main, [*QUICK, "--method", "longva", "--rope-base", "5", "--out", str(out)], "--rope-base does nothing")
    refused(train_tiny.main, [*QUICK, "--method", "p-mod", "--compile", "--out", str(out)], "compile got True", "p-mod")
    refused(train_tiny.main, [*QUICK, "--method", "voco", "--gate", "score-update", "--out", str(out)], "--gate does nothing")
    assert not out.exists()
    assert train_tiny.main([*QUICK, "--method", "voco", "--out", str(out)]) == 0
    refused(train_tiny.main, ["--resume", "--method", "setok", "--out", str(out)], "method got setok", "has voco")
    capsys.readouterr()
    stream = ["--checkpoint", str(out), "--device", "cpu", "--frames", "2"]
    refused(stream_tiny.main, [*stream, "--html", str(tmp_path / "page.html")], "--html", "voco")
    refused(stream_tiny.main, [*stream, "--window", "2"], "window", "VoCo")
    refused(stream_tiny.main, [*stream, "--memory-mb", "2"], "--memory-mb", "voco")
    assert train_tiny.main(["--method", "list"]) == 0
    assert capsys.readouterr().out.strip() == listing()


def settled(**sizes):
    return settle(RelatedRun(model=replace(FieldModel(), **sizes)), set(sizes))


def test_a_method_depends_on_the_other_sizes():
    assert settled(method="setok", image_size=56, grid=7).model.frame_tokens == 50
    assert settled(method="early-exit", depth=6).model.keep_ratios == (1, 1, 1, 0, 0, 0)
    again = settled(method="voco")
    assert settle(again, set()) == again, "a run that goes on"


def test_the_world_of_the_field():
    """Its default is the tiny model on the core's data; a run is read back as it was written; an unwritten `tokens` is no
    flag; MoD costs what the formulas say."""
    assert next(iter(WORLD.presets.values())) == RelatedRun()
    run = settled(method="voco")
    assert config_from({"world": run.world, **json.loads(json.dumps(asdict(run)))}) == run
    with pytest.raises(SystemExit):
        train_tiny.main(["--tokens", "3"])
    model, source = WORLD.build(PRESETS["study"], torch.device("cpu"))
    assert type(model).__mro__[1] is VideoLLM and model.online and source.live
    assert WORLD.costs(PRESETS["study"], 8, 40, model) == cost_ratios(ModelConfig(), 8, 40)
    torch.manual_seed(PRESETS["study"].train.seed)
    core = VideoLLM(ModelConfig())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), core.parameters(), strict=True))


def test_costs_are_shares_of_full_computation_and_leave_the_dice_alone():
    for name, share in (("full", 1.0), ("layer-skip", 0.5)):
        run = replace(FIELD, model=configure(SMALL, name))
        model, _ = WORLD.build(run, torch.device("cpu"))
        before = torch.get_rng_state()
        costs = WORLD.costs(run, 5, 40, model)
        assert torch.equal(torch.get_rng_state(), before)
        assert costs["kv_ratio"] == share and (costs["flop_ratio"] == 1) == (name == "full") and costs["flop_ratio"] <= 1


def test_a_method_is_refused_what_it_cannot_do():
    for name, changes, why in (("p-mod", {"compile": True}, "compile got True"),
                               ("setok", {"fsdp": True, "optimizer": "adamw"}, "fsdp got True")):
        run = replace(FIELD, model=configure(SMALL, name), train=replace(FIELD.train, **changes))
        with pytest.raises(UserError, match=why):
            WORLD.build(run, torch.device("cpu"))
    for name in ("sequence-mod", "fastv"):
        model, _ = WORLD.build(replace(FIELD, model=configure(SMALL, name)), torch.device("cpu"))
        with pytest.raises(UserError, match=f"compile got True, but how much {name} computes"):
            model.decoder.compile(dynamic=True)


def test_a_decoder_that_never_asks_the_data_compiles_to_one_graph():
    """Also where it is given a plan of other tokens than the core's."""
    name = "setok"
    model = model_of(name)
    assert model.static
    model.decoder.compile(backend="eager")
    clips = some_clips(2, wide=0.0)
    with torch.no_grad():
        compiled, batch = hidden_of(model, clips)
        plain, _ = hidden_of(model_of(name), clips)
    looked_at = labels_of(batch) != NO_LABEL
    torch.testing.assert_close(compiled[looked_at], plain[looked_at])
