"""The harder streams: drift, sparks, landmarks, wide frames and questions asked in advance."""

import hashlib
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod import data as core
from mod.config import DataConfig, ModelConfig, UserError
from mod.data import COLOURS, WORDS, clip_batch, clip_pixels
from mod.layout import Vocabulary, lay_out
from mod.related.data import (
    HARDER_WORDS,
    LANDMARK_LABEL,
    LANDMARK_QUESTION,
    REMINDER,
    SPARK_LABEL,
    SPARKS,
    HarderData,
    endless,
    harder,
    label_sizes,
    make_clip,
    padded,
    pictures,
    squeeze,
)
from mod.related.world import WORLD
from tests.helpers import assert_it_is_the_one_last_spoken_of, shown

MODEL, DATA = ModelConfig(), HarderData()
STUDY, FIELD = (WORLD.presets[name].data for name in ("study", "field"))


def clip(index=0, split="train", seed=0, data=DATA, frames=None):
    return make_clip(data, MODEL, split, seed, index, frames)


def own_shape(some) -> np.ndarray:
    """A clip's frames without padding."""
    return torch.stack(pictures(torch.from_numpy(some.frames))).numpy()


@given(st.integers(0, 10**4), st.integers(2, 4))
def test_with_several_sprites_it_is_the_one_last_spoken_of(index, sprites):
    """... and the others are asked for by name; with drift, every answer is about the latest frame."""
    assert_it_is_the_one_last_spoken_of(clip(index, data=HarderData(sprites=sprites, drift=0.4, frames=10)))


@given(st.integers(0, 10**4), st.integers(1, 3))
def test_drift_is_one_silent_step_aside(index, sprites):
    some = clip(index, data=HarderData(sprites=sprites, drift=0.5, frames=10))
    for t in range(1, 10):
        spoken = " ".join(say.text for say in some.said if say.frame == t and say.role == "assistant")
        before, now = shown(some, t - 1), shown(some, t)
        for name in set(before) & set(now):
            if " ".join(name) not in spoken:
                (row, column), (new_row, new_column) = before[name], now[name]
                assert row == new_row and abs(column - new_column) <= 1


def test_drift_and_sparks_happen_as_often_as_asked():
    steps, still, sparks = 0, 0, 0
    for index in range(150):
        some = clip(index, data=HarderData(drift=0.5, sparks=0.3, event_rate=0.2))
        sparks += (some.patch_labels[..., SPARK_LABEL] > 0).any(1).sum()
        for t in range(1, DATA.frames):
            if not any(say.frame == t and say.text.split()[0] in COLOURS for say in some.said):
                for name, place in shown(some, t - 1).items():
                    steps, still = steps + (shown(some, t)[name] != place), still + (shown(some, t)[name] == place)
    assert steps / (steps + still) == pytest.approx(0.5, abs=0.05), "a step aside"
    assert sparks / (150 * DATA.frames) == pytest.approx(0.3, abs=0.05), "and a spark shows for one frame alone"


@given(st.integers(0, 10**4))
def test_the_last_spark_is_the_answer_and_never_hides_a_sprite(index):
    some, last = clip(index, data=HarderData(sparks=0.4, drift=0.3)), None
    for t, truth in enumerate(some.truth):
        labels = some.patch_labels[t]
        there = np.nonzero(labels[:, SPARK_LABEL])[0]
        assert len(there) <= 1 and not labels[there, 0].any() and not labels[there, 4].any()
        last = list(SPARKS)[labels[there[0], SPARK_LABEL] - 1] if len(there) else last
        assert truth["which spark ?"] == (f"spark {last}" if last else "none")
    narrated = [say.text for say in some.said if say.role == "assistant" and say.text.split()[0] in COLOURS]
    assert not any(word in SPARKS for text in narrated for word in text.split())


HARD = HarderData(frames=6, sparks=0.4, drift=0.3, ahead=0.6, landmark=0.7, wide=0.5, question_rate=0.9)


@given(st.integers(0, 10**4))
def test_the_landmark_is_where_its_label_says_and_answers_are_by_it(index):
    """It never moves, nothing stands on it, it is white with a hole, and the sprite's side of it is as labelled."""
    some = clip(index, data=HARD)
    marks = some.patch_labels[..., LANDMARK_LABEL]
    assert marks.shape[1] == 25 and (marks == marks[0]).all() and marks[0].sum() <= 1
    asked = [truth[LANDMARK_QUESTION] for truth in some.truth if LANDMARK_QUESTION in truth]
    if not marks[0].any():
        assert not asked
        return
    row, column = divmod(int(marks[0].argmax()), 5)
    frames = own_shape(some)
    cell = frames.shape[-1] // 5
    left = cell * column + (cell - 8) // 2
    there = frames[:, :, 8 * row : 8 * row + 7, left : left + 7].mean(0)
    assert there[:, 3, 3].max() < -0.5 and there[:, 1, 3].min() > 0.5
    for labels, truth in zip(some.patch_labels, some.truth, strict=True):
        sprites = labels[:, 0] > 0
        assert not (sprites & (labels[:, LANDMARK_LABEL] > 0)).any()
        if LANDMARK_QUESTION in truth:
            side = int(labels[sprites][0, 3]) - 1
            assert truth[LANDMARK_QUESTION] == ("its left" if side < column else "its right" if side > column else "neither side")


@given(st.integers(0, 10**4))
def test_wide_frames_are_twice_as_wide_and_squeezed_they_show_the_sprite_where_its_label_says(index):
    some = clip(index, data=HARD)
    assert some.frames.shape[2:] == (40, 80), "square ones are padded"
    assert own_shape(some).shape[2:] in ((40, 40), (40, 80)) and np.isfinite(own_shape(some)).all()
    square = squeeze(torch.from_numpy(some.frames))
    assert square.shape[2:] == (40, 40)
    for frame, labels in zip(square.numpy(), some.patch_labels, strict=True):
        colourful = frame.max(0) - frame.min(0)
        for patch in np.flatnonzero(labels[:, 0]):
            row, column = divmod(patch, 5)
            assert colourful[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].max() > 0.3


def test_both_shapes_come_and_mix_in_one_batch():
    """The narrower end in nan, which nobody sees: squeezed alone or together they are the same."""
    some = [clip(index, data=HARD) for index in range(8)]
    assert {own_shape(one).shape[3] for one in some} == {40, 80}
    together = squeeze(clip_pixels(some))
    alone = torch.cat([squeeze(torch.from_numpy(own_shape(one))) for one in some])
    assert torch.equal(together, alone) and not together.isnan().any()
    assert clip_pixels(some).isnan().any()


@given(st.integers(0, 10**4))
def test_a_question_asked_ahead_is_answered_after_the_last_frame(index):
    some = clip(index, data=HARD)
    ahead = [say for say in some.said if say.frame < 0]
    if not ahead:
        assert all(say.text != REMINDER for say in some.said)
        return
    (question,) = ahead
    reminder, answer = some.said[-2:]
    assert question.role == "user" and (reminder.text, reminder.role, reminder.frame) == (REMINDER, "user", 5)
    assert answer.frame == 5 and answer.text == some.truth[-1][question.text] and answer.text not in ("none", "nowhere")
    layout = lay_out(Vocabulary(HARDER_WORDS), len(some.frames), 3, some.said)
    assert layout.frame[: layout.frame.index(0)] == [-1] * (2 + len(question.text.split()))


def test_what_is_not_asked_for_changes_no_clip():
    """Clips of the settings before there were landmarks, wide frames and questions in advance are what they were."""
    whole = hashlib.sha256()
    for index in range(5):
        some = clip(index, data=HarderData(drift=0.3, sparks=0.4))
        whole.update(some.frames.tobytes() + repr(some.said).encode() + some.patch_labels.tobytes())
    assert whole.hexdigest()[:16] == "45b3b68925635287"


# What the clips of each setting were when they were first drawn, patch labels in their present order.
PINNED = {
    "drift": (HarderData(drift=0.4), "08a573ccf2e0c880"),
    "sparks": (HarderData(sparks=0.4), "94a78ffa96808400"),
    "ahead": (HarderData(ahead=0.7), "0a7253db4676713c"),
    "landmark": (HarderData(landmark=0.7), "722f70931d27a10c"),
    "wide": (HarderData(wide=0.5), "349d88069c08ab96"),
    "several": (HarderData(sprites=4, drift=0.3, sparks=0.4, landmark=0.5, wide=0.5, event_rate=0.7), "98c15e16e8761f15"),
    "study": (STUDY, "6f24fb9c2670caaa"),
    "field": (FIELD, "25a1304bd94b5826"),
}


@pytest.mark.parametrize("name", PINNED)
def test_clips_are_what_they_always_were(name):
    data, _ = PINNED[name]
    assert digest(data) == PINNED[name][1]


def digest(data) -> str:
    """Of five clips and ten frames of an endless stream: what is seen, said, labelled and true."""
    whole = hashlib.sha256()
    for some in [*(clip(index, "validation", 3, data) for index in range(5)), *islice(endless(data, MODEL, "test", 1), 10)]:
        whole.update((own_shape(some) * 1000).round().astype(np.int32).tobytes() + repr(some.said).encode())
        whole.update(np.ascontiguousarray(some.patch_labels).tobytes() + repr(some.truth).encode())
    return whole.hexdigest()[:16]


def test_with_nothing_asked_for_it_is_the_core():
    """Clips, live streams and warm-up; the labels have one more column, for sparks that never come."""
    for index in range(5):
        one, other = clip(index, "validation"), core.make_clip(DataConfig(), MODEL, "validation", 0, index)
        assert np.array_equal(one.frames, other.frames) and one.said == other.said and one.truth == other.truth
        assert np.array_equal(one.patch_labels[..., :-1], other.patch_labels) and not one.patch_labels[..., -1].any()
    live = zip(endless(DATA, MODEL, "test", 2), core.endless(DataConfig(), MODEL, "test", 2), strict=False)
    assert all(np.array_equal(one.frames, other.frames) for one, other in islice(live, 5))
    assert HARDER_WORDS[: len(WORDS)] == WORDS, "the ids of the core's words stay"


def test_a_source_of_harder_streams():
    """One shape of frames for all clips, a warm-up of squares, labels of which the CLS token need not know the sparks."""
    config = replace(WORLD.presets["field"], data=replace(FIELD, frames=3))
    source = harder(config)
    assert {one.frames.shape[1:] for one in [*source.training(0)[:4], *source.validation(4), next(source.live(0))]} == {(3, 40, 80)}
    batch = clip_batch(source.words, source.training(1), config.model)
    assert batch.pixels.shape == (8 * 3, 3, 40, 80) and batch.pixels.isnan().any()
    warm = source.warm_up(0)
    assert clip_pixels(warm).shape == (64, 3, 40, 40) and not clip_pixels(warm).isnan().any()
    assert source.label_sizes == label_sizes(FIELD) and len(source.label_sizes) == warm[0].patch_labels.shape[-1] == 7
    assert source.summary_labels == 6 and label_sizes(FIELD)[SPARK_LABEL] == 5 and label_sizes(FIELD)[LANDMARK_LABEL] == 2
    assert len(harder(WORLD.presets["study"]).label_sizes) == 6
    steps = [{(repr(one.said), one.frames.tobytes()) for one in source.training(step)} for step in (0, 1)]
    assert not steps[0] & steps[1] and len(steps[0]) == config.train.batch_size
    assert all(len(one.said) == 0 or one.said[0].role == "assistant" for one in islice(source.live(0), 20)), "nobody asks"
    with pytest.raises(UserError, match="vocab_size must be at least"):
        harder(replace(config, model=replace(config.model, vocab_size=len(WORDS) + 4)))


def test_square_data_stays_square():
    frames = np.zeros((2, 3, 10, 10), np.float32)
    assert padded(frames, STUDY) is frames and squeeze(torch.from_numpy(frames)).shape == frames.shape
    assert clip(0, data=STUDY).frames.shape[2:] == (40, 40)


@pytest.mark.parametrize("name", ["drift", "sparks", "ahead", "landmark", "wide"])
def test_chances_are_from_0_to_1(name):
    for wrong in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"{name} must be from 0 to 1"):
            HarderData(**{name: wrong})
