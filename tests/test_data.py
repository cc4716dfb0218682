"""The synthetic stream: reproducible, disjoint splits, and what is said is true."""

import hashlib
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mod.config import Config, DataConfig, ModelConfig
from mod.data import (
    COLOURS,
    HEIGHTS,
    LABEL_SIZES,
    SHAPES,
    SIDES,
    SPLITS,
    clip_batch,
    endless,
    make_clip,
    synthetic,
)
from tests.helpers import WORDS_ALL, assert_it_is_the_one_last_spoken_of, shown

MODEL, DATA = ModelConfig(), DataConfig()


def clip(index=0, split="train", seed=0, data=DATA, frames=None):
    return make_clip(data, MODEL, split, seed, index, frames)


@given(st.integers(0, 10**6), st.sampled_from(sorted(SPLITS)), st.integers(0, 99))
def test_a_clip_is_its_split_seed_and_number(index, split, seed):
    one, two = clip(index, split, seed), clip(index, split, seed)
    assert np.array_equal(one.frames, two.frames) and one.said == two.said and one.truth == two.truth
    for other in (clip(index + 1, split, seed), clip(index, split, seed + 1)):
        assert not np.array_equal(one.frames, other.frames)
    for name in set(SPLITS) - {split}:
        assert not np.array_equal(one.frames, clip(index, name, seed).frames)


@given(st.integers(0, 10**4), st.integers(1, 3))
def test_narrations_follow_the_scene(index, sprites):
    """Replay the narrations: they must lead to the sprites that the patch labels show, frame by frame."""
    some, alive = clip(index, data=DataConfig(sprites=sprites, frames=10)), {}
    for t in range(10):
        for say in some.said:
            if say.frame == t and say.role == "assistant" and say.text.split()[0] in COLOURS:
                colour, shape, verb, *rest = say.text.split()
                if verb == "appears":
                    assert (colour, shape) not in alive
                    alive[colour, shape] = rest[0]
                elif verb == "leaves":
                    del alive[colour, shape]
                elif verb == "turns":
                    alive[rest[0], shape] = alive.pop((colour, shape))
                else:
                    assert verb == "moves" and alive[colour, shape] != rest[0]
                    alive[colour, shape] = rest[0]
        shown = some.patch_labels[t][some.patch_labels[t][:, 0] > 0]
        assert {(list(COLOURS)[c - 1], SHAPES[s - 1]): HEIGHTS[h - 1] for c, s, h, *_ in shown} == alive
        assert len(shown) <= sprites


@given(st.integers(0, 10**4))
def test_answers_are_where_the_patch_labels_say(index):
    some, first = clip(index), None
    for t, truth in enumerate(some.truth):
        shown = some.patch_labels[t][some.patch_labels[t][:, 0] > 0]
        if any(say.frame == t and "appears" in say.text for say in some.said):
            first = SIDES[shown[0][3] - 1]
        assert truth["where is it ?"] == (f"now {SIDES[shown[0][3] - 1]}" if len(shown) else "nowhere")
        assert truth["where did it appear ?"] == (f"first {first}" if first else "nowhere")
    for ask, answer in zip(some.said, some.said[1:], strict=False):
        if ask.role == "user":
            assert answer.role == "assistant" and answer.text == some.truth[ask.frame][ask.text]


@given(st.integers(0, 10**4), st.integers(2, 4))
def test_with_several_sprites_it_is_the_one_last_spoken_of(index, sprites):
    """... and the others are asked for by name; every answer is about the latest frame."""
    assert_it_is_the_one_last_spoken_of(clip(index, data=DataConfig(sprites=sprites, frames=10)))


def test_default_clips_are_what_they_always_were():
    """Pinned: what is switched off draws no random number, so that earlier runs can be repeated."""
    some = clip(5, "validation")
    pixels = (some.frames * 1000).round().astype(np.int32).tobytes()
    assert hashlib.sha256(pixels + repr(some.said).encode()).hexdigest()[:16] == "323deb9c406c1318"


@given(st.integers(0, 10**4))
def test_sides_are_never_narrated(index):
    """Otherwise question accuracy would measure reading, not seeing."""
    said = [say.text for say in clip(index).said if say.role == "assistant"]
    narrations = [text for text in said if not text.startswith(("now", "first"))]
    assert not any(word in SIDES for text in narrations for word in text.split())


@given(st.integers(0, 10**4))
def test_a_moving_sprite_changes_height_and_a_still_one_stays(index):
    some = clip(index)
    for t in range(1, DATA.frames):
        before, now = (some.patch_labels[s][some.patch_labels[s][:, 0] > 0] for s in (t - 1, t))
        if len(before) and len(now):
            moved = any(say.frame == t and "moves" in say.text for say in some.said)
            assert (before[0][2] != now[0][2]) == moved


@given(st.integers(0, 10**4))
def test_a_trail_shows_in_the_frame_of_a_move_and_only_there(index):
    some = clip(index)
    for t in range(DATA.frames):
        moved = any(say.frame == t and "moves" in say.text for say in some.said)
        trails = np.nonzero(some.patch_labels[t][:, 4])[0]
        assert len(trails) == moved
        if moved:
            assert trails[0] == np.nonzero(some.patch_labels[t - 1][:, 0])[0][0], "where the sprite was"


def test_the_sprite_is_painted_where_its_label_is():
    some = clip(3, data=DataConfig(noise=0.0, event_rate=1.0, distractors=0))
    for t in range(DATA.frames):
        for place in np.nonzero(some.patch_labels[t][:, 0])[0]:
            row, column = divmod(place, 5)
            patch = some.frames[t][:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            colour = np.array(list(COLOURS.values())[some.patch_labels[t][place, 0] - 1]) * 2 - 1
            painted = np.isclose(patch, colour[:, None, None], atol=1e-5).all(0)
            assert painted.sum() >= 12


def test_frames_are_in_range_and_shaped():
    some = clip(frames=3)
    assert some.frames.shape == (3, 3, 40, 40) and some.frames.dtype == np.float32
    assert some.frames.min() >= -1 and some.frames.max() <= 1
    assert some.patch_labels.shape == (3, 25, 5)


def test_data_is_never_the_bottleneck():
    """Far below a training step's time: some milliseconds per clip, even on a busy machine."""
    started = time.perf_counter()
    for index in range(50):
        clip_batch(WORDS_ALL, [clip(index)], MODEL)
    assert (time.perf_counter() - started) / 50 < 0.05


def test_an_endless_stream_goes_on_with_frames_of_its_own():
    """Clips of a single frame, numbered from 0 on; the same for the same seed; what is said fits what is seen."""
    config = Config(data=DataConfig(event_rate=0.8))
    one, two = (list(islice(synthetic(config).live(seed), 40)) for seed in (4, 4))
    assert [clip.frames.tobytes() for clip in one] == [clip.frames.tobytes() for clip in two]
    assert len({clip.frames.tobytes() for clip in one}) == 40
    for t, some in enumerate(one):
        assert some.frames.shape == (1, 3, 40, 40) and some.patch_labels.shape == (1, 25, 5) and len(some.truth) == 1
        roles = [(say.frame, say.role) for say in some.said]
        assert roles in ([], [(t, "assistant")]), "the user of a live stream asks"
        seen = shown(some, 0)
        for say in some.said:
            assert (tuple(say.text.split()[:2]) in seen) == (say.text.split()[2] in ("appears", "moves"))
    other = next(endless(config.data, MODEL, "validation", 4)), next(synthetic(config).live(5))
    assert all(not np.array_equal(one[0].frames, some.frames) for some in other)


def test_the_warm_up_shows_single_frames_and_their_labels():
    source = synthetic(Config())
    clips = source.warm_up(0)
    assert source.label_sizes == LABEL_SIZES and source.summary_labels == len(LABEL_SIZES)
    for some in clips:
        assert len(some.frames) == 2 and (some.patch_labels >= 0).all()
        assert (some.patch_labels < np.array(LABEL_SIZES)).all()
    assert np.mean([(some.patch_labels[..., 0] > 0).any() for some in clips]) > 0.9, "there is something to learn"


@pytest.mark.parametrize(("changes", "message"), [({"vocab_size": 10}, "vocab_size must be at least"),
                                                  ({"image_size": 16, "grid": 2}, "image_size must be at least 20")])
def test_a_model_that_cannot_read_or_show_the_stream_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        synthetic(Config(model=ModelConfig(**changes)))


@pytest.mark.parametrize("changes", [{"frames": 0}, {"sprites": 0}, {"event_rate": 1.5}, {"noise": -1.0}, {"fps": 0.0}])
def test_wrong_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        DataConfig(**changes)


def best_answer_by_reading(said, question):
    """What the text so far gives away: that nobody is there, or was; otherwise a guess, but never the last answer."""
    here, seen, known = False, False, {}
    for say in said:
        if say.role == "user":
            asked = say.text
        elif say.text.split()[-1] in (*SIDES, "nowhere"):
            known[asked] = say.text
        else:
            here, seen = say.text.split()[2] != "leaves", True
    if (question == "where is it ?" and not here) or not seen:
        return "nowhere"
    word = "now" if "is" in question.split() else "first"
    return next(answer for side in SIDES if (answer := f"{word} {side}") != known.get(question))


def test_reading_alone_answers_few_questions():
    """A reader who never looks stays far below the model: it can know "nowhere", and that an answer is not repeated."""
    right, number = 0, 0
    for index in range(400):
        said = clip(index, "validation").said
        for place, say in enumerate(said):
            if say.role == "user":
                right += best_answer_by_reading(said[:place], say.text) == said[place + 1].text
                number += 1
    assert number > 500 and 0.15 < right / number < 0.4, right / number
