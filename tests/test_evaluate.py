"""Reading turns out of a model: teacher-forced == what a stream decides on the true history; free-running == by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.config import DataConfig, StreamConfig
from mod.data import Clip, make_clip
from mod.decoder import Routing
from mod.evaluate import free_running, router_recall, teacher_forced
from mod.layout import assistant_ids
from mod.stream import Stream
from tests.helpers import WORDS_ALL, conversations, random_pixels, small_model

DATA = DataConfig(frames=5, question_rate=0.5)


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = small_model(1, torch.float32, image_size=20, patch_size=4, grid=5)
    return model, [make_clip(DATA, model.config, "validation", 0, index) for index in range(6)]


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.99])
def test_teacher_forced_equals_a_stream_fed_the_truth(setting, threshold):
    """Decisions, token hits, log-probabilities and what follows a missed moment, taken frame by frame from a live
    stream that is fed the true words. Catches labels that are off by one."""
    model, clips = setting
    streams, silent = teacher_forced(model, WORDS_ALL, clips, threshold, rows=4)
    expected_silent = []
    for clip, turns in zip(clips, streams, strict=True):
        stream = Stream(model, WORDS_ALL, frames=2 * len(clip.frames), text=300, settings=StreamConfig(threshold=threshold))
        spoke, number, missed = [], 0, []
        for t in range(len(clip.frames)):
            [speaks] = stream.wants_to_speak(stream.see(torch.from_numpy(clip.frames[t : t + 1])))
            said = [say for say in clip.said if say.frame == t]
            if not said or said[0].role == "assistant":
                spoke.append(speaks)
            if not said:
                expected_silent.append(not speaks)
            for say in said:
                if say.role == "user":
                    stream.hear([say.text])
                    continue
                turn, [scores] = turns[number], stream.score([say.text])
                ids = torch.tensor(assistant_ids(WORDS_ALL, say.text)[1:])
                assert turn.spoke == spoke and turn.kind == ("narration" if say is said[0] else "answer")
                assert turn.right == (scores.argmax(-1) == ids).tolist()
                torch.testing.assert_close(torch.tensor(turn.logp), scores[range(len(ids)), ids], rtol=1e-3, atol=1e-4)
                assert turn.exact == all(turn.right)
                if turn.timed and not any(spoke):
                    missed.append((turn, t))
                    assert turn.after == silence_goes_on(stream, clip, t, threshold)
                stream.feed([assistant_ids(WORDS_ALL, say.text)])
                spoke, number = [], number + 1
        assert number == len(turns)
    assert silent == expected_silent
    assert any(turn.after for turns in streams for turn in turns) == (threshold == 0.01)


def silence_goes_on(stream, clip, t, threshold):
    """From here, feed the further real frames with nothing said in between; then take it all back."""
    mark, position, seen = stream.cache.mark(), list(stream.position), list(stream.seen)
    later = [stream.wants_to_speak(stream.see(torch.from_numpy(clip.frames[s : s + 1])))[0] for s in range(t + 1, len(clip.frames))]
    stream.cache.rewind(mark)
    stream.position, stream.seen = position, seen
    return later


@pytest.mark.parametrize("threshold", [0.02, 0.99])
def test_free_running_is_what_a_stream_says(setting, threshold):
    model, clips = setting
    streams, silent = free_running(model, WORDS_ALL, clips, threshold, rows=4)
    expected_silent = []
    for clip, turns in zip(clips, streams, strict=True):
        stream, exact = Stream(model, WORDS_ALL, frames=len(clip.frames), text=300, settings=StreamConfig(threshold=threshold)), []
        for t in range(len(clip.frames)):
            [reply] = stream.frame(torch.from_numpy(clip.frames[t : t + 1]))
            said = [say for say in clip.said if say.frame == t]
            if said and said[0].role == "assistant":
                exact.append(reply == said.pop(0).text)
            elif not said:
                expected_silent.append(reply is None)
            while said:
                question, answer = said.pop(0), said.pop(0)
                exact.append(stream.ask([question.text]) == [answer.text])
        assert [turn.exact for turn in turns] == exact
    assert sorted(silent) == sorted(expected_silent)  # in another order: frame by frame, not clip by clip


def test_without_events_both_evaluations_count_silence_alike():
    """Nothing happens, so there are no turns, and every frame is a decision to stay silent."""
    model = small_model(1, torch.float32, image_size=20, patch_size=4, grid=5)
    quiet = DataConfig(frames=4, event_rate=0.0, question_rate=0.0)
    clips = [make_clip(quiet, model.config, "validation", 0, index) for index in range(3)]
    for threshold, silence in ((0.0, 1.0), (1.0, 0.0)):
        forced, free = teacher_forced(model, WORDS_ALL, clips, threshold), free_running(model, WORDS_ALL, clips, threshold)
        assert forced[0] == free[0] == [[], [], []]
        assert sum(forced[1]) == sum(free[1]) == silence * 12


def test_recall_counts_sprite_patches_kept():
    """Two frames of 5x5 patches; the second frame's sprite is kept, and pooled grids map patches to their cell."""
    data = DataConfig(frames=2, event_rate=1.0)
    model = small_model(1, torch.float32, image_size=20, patch_size=4, grid=5)
    clip = make_clip(data, model.config, "validation", 0, 1)
    places = clip.patch_labels[..., 0].argmax(1)
    kept = torch.zeros(2, 26, dtype=torch.bool)
    kept[0, 1 + int(places[0])] = True
    expected = 0.5 if clip.patch_labels[1, :, 0].any() else 1.0
    assert router_recall([Routing(1, kept, kept)], [clip], grid=5) == {1: expected}
    coarse = torch.zeros(2, 1 + 1, dtype=torch.bool)
    coarse[:, 1] = True
    assert router_recall([Routing(3, coarse, coarse)], [clip], grid=1) == {3: 1.0}


@given(conversations(), st.integers(0, 99))
def test_free_running_counts_the_turns_that_teacher_forcing_counts(talk, seed):
    """Whatever people say: unanswered questions, two in a row, answers frames later; a question is never an answer."""
    model, (frames, said) = small_model(1, torch.float32), talk
    together = [one for before, one in zip([None, *said], said, strict=False)
                if not (before and before.role == one.role == "assistant" and before.frame == one.frame)]  # fmt: skip
    clip = Clip(random_pixels(frames, model.config, seed, torch.float32).numpy(), together)
    [forced], silent = teacher_forced(model, WORDS_ALL, [clip])
    [free], silent_free = free_running(model, WORDS_ALL, [clip])
    assert [(turn.kind, len(turn.right)) for turn in free] == [(turn.kind, len(turn.right)) for turn in forced]
    assert [len(turn.spoke) for turn in free if turn.timed] == [len(turn.spoke) for turn in forced if turn.timed]
    assert len(silent) == len(silent_free)
