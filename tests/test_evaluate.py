"""The metrics against a brute-force reading of their definitions; and reading turns out of a model: teacher-forced is
what a stream decides on the true history, free-running is what it says by itself."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mod.config import DataConfig
from mod.data import Clip, make_clip, recall
from mod.decoder import Routing
from mod.evaluate import (
    Turn,
    correct_prefix,
    cost_ratios,
    fluency,
    frame_diff,
    free_running,
    perplexity,
    summarize,
    teacher_forced,
)
from mod.layout import Say, assistant_ids
from mod.stream import Stream
from tests.helpers import WORDS_ALL, conversations, plan_of, random_pixels, small_config, small_model

DATA = DataConfig(frames=5, question_rate=0.5)


def narration(spoke, right, logp, **more):
    return Turn("narration", spoke=spoke, right=right, logp=logp, **more)


def oracle_d(spoke, after):
    """The definition, walked frame by frame."""
    m = len(spoke)
    for k in range(m):
        if spoke[k]:
            return m - 1 - k
    for j in range(len(after)):
        if after[j]:
            return -(j + 1)
    return -(len(after) + 1)


def oracle_fluency(spoke, right):
    """Count decisions and tokens one after the other until the first mistake."""
    m, n = len(spoke), len(right)
    if True not in spoke:  # all but the last were decided rightly
        return (m - 1) / (m + n)
    first = spoke.index(True)
    tokens = list(itertools.takewhile(bool, right)) if first == m - 1 else []
    return (first + (first == m - 1) + len(tokens)) / (m + n)


def all_cases():
    for m in range(1, 5):
        for spoke in itertools.product([False, True], repeat=m):
            for later in range(4):
                for after in itertools.product([False, True], repeat=later):
                    for right in ([True, True], [True, False, True], [False]):
                        yield narration(list(spoke), right, [-1.0] * len(right), after=list(after))


def test_time_diff_and_fluency_equal_the_oracle_on_all_small_cases():
    number = 0
    for turn in all_cases():
        assert frame_diff(turn) == oracle_d(turn.spoke, turn.after), turn
        assert fluency(turn) == pytest.approx(oracle_fluency(turn.spoke, turn.right)), turn
        number += 1
    assert number > 1000


def test_mistakes_cost_something():
    """Never speaking, in the last turn too; every frame too early; every frame too late, to the end of the stream."""
    never_in_last_turn = narration([False, False, False], [True, True], [0.0, 0.0])
    assert frame_diff(never_in_last_turn) == -1 and fluency(never_in_last_turn) == pytest.approx(2 / 5)
    one_early = narration([False, True, False], [True, True], [0.0, 0.0])
    assert frame_diff(one_early) == 1 and fluency(one_early) == pytest.approx(1 / 5)
    late = narration([False] * 3, [True], [0.0], after=[False, False, False, True])
    assert frame_diff(late) == -4


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_correct_prefix(right):
    assert correct_prefix(Turn("answer", right=right)) == len(list(itertools.takewhile(bool, right)))


def test_perplexity_is_a_mean_of_turns_then_of_streams():
    one, two, three = (Turn("answer", right=[True], logp=[-math.log(p)]) for p in (2, 4, 9))
    assert perplexity(one) == pytest.approx(2)
    summary = summarize([[one, two], [three]], [True, False], fps=2.0)
    assert summary["lm_ppl"] == pytest.approx((3 + 9) / 2)
    assert summary["silence_accuracy"] == 0.5
    assert math.isnan(summary["time_diff"]), "answers have no timing of their own"


def test_time_diff_is_in_seconds():
    early = narration([True, False, False], [True], [0.0])
    assert summarize([[early]], [], fps=2.0)["time_diff"] == 1.0
    assert summarize([[early]], [], fps=4.0)["time_diff"] == 0.5


def test_accuracies_by_hand():
    turns = [
        narration([False, True], [True, True], [0.0, 0.0], exact=True),
        narration([False, False], [True, False], [0.0, 0.0], after=[True], exact=False),
        Turn("answer", spoke=[False], right=[True], logp=[0.0], exact=True),
    ]
    summary = summarize([turns], [True, True, False, True], fps=1.0)
    assert summary["narration_exact"] == 0.5 and summary["question_accuracy"] == 1.0
    assert summary["speak_accuracy"] == 0.5 and summary["silence_accuracy"] == 0.75
    assert summary["lm_correctness"] == pytest.approx((1 + 0.5 + 1) / 3)


turns = st.builds(
    Turn,
    kind=st.sampled_from(["narration", "answer"]),
    end=st.integers(0, 9),
    spoke=st.lists(st.booleans(), max_size=3),
    right=st.lists(st.booleans(), min_size=1, max_size=3),
    logp=st.just([-0.5]),
    after=st.lists(st.booleans(), max_size=2),
    exact=st.booleans(),
)


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else math.nan


@given(st.lists(st.lists(turns, max_size=3), max_size=3), st.lists(st.booleans(), max_size=4))
def test_the_summary_equals_a_brute_force_one(streams, silent):
    """Every number of `summarize`, counted one turn after the other."""
    summary = summarize(streams, silent, fps=2.0)

    def by_stream(measure, wanted):
        return mean([mean([measure(t) for t in stream if wanted(t)]) for stream in streams if any(map(wanted, stream))])

    flat = [turn for stream in streams for turn in stream]
    timed = [turn for turn in flat if turn.kind == "narration" and turn.spoke]
    expected = {
        "narration_exact": mean([t.exact for t in flat if t.kind == "narration"]),
        "question_accuracy": mean([t.exact for t in flat if t.kind == "answer"]),
        "speak_accuracy": mean([t.spoke[-1] for t in timed]),
        "silence_accuracy": mean(silent),
        "lm_ppl": by_stream(lambda t: math.exp(0.5), lambda t: True),
        "lm_correctness": by_stream(lambda t: [*t.right, False].index(False) / len(t.right), lambda t: True),
        "time_diff": by_stream(lambda t: abs(oracle_d(t.spoke, t.after)), lambda t: t in timed) / 2,
        "fluency": by_stream(lambda t: oracle_fluency(t.spoke, t.right), lambda t: t in timed),
    }
    assert set(summary) == set(expected)
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, nan_ok=True), name


def test_a_perfect_model_scores_perfectly():
    turns = [narration([False, False, True], [True] * 4, [0.0] * 4, exact=True) for _ in range(3)]
    turns.append(Turn("answer", spoke=[False], right=[True] * 2, logp=[0.0] * 2, exact=True))
    summary = summarize([turns], [True] * 7, fps=2.0)
    assert summary["lm_ppl"] == 1.0 and summary["time_diff"] == 0.0
    assert all(summary[name] == 1.0 for name in summary if name not in ("lm_ppl", "time_diff"))


def test_a_model_that_has_diverged_is_infinitely_perplexed():
    assert perplexity(narration([True], [False], [-1e5])) == math.inf


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
        stream = Stream(model, WORDS_ALL, threshold=threshold)
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
                assert turn.exact == all(turn.right) and turn.end == t
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
    coming = [torch.from_numpy(frame[None]) for frame in clip.frames[t + 1 :]]
    later = [stream.wants_to_speak(stream.see(frame))[0] for frame in coming]
    stream.cache.rewind(mark)
    stream.position, stream.seen = position, seen
    return later


@pytest.mark.parametrize("threshold", [0.02, 0.99])
def test_free_running_is_what_a_stream_says(setting, threshold):
    model, clips = setting
    streams, silent = free_running(model, WORDS_ALL, clips, threshold, rows=4)
    expected_silent = []
    for clip, turns in zip(clips, streams, strict=True):
        stream, exact = Stream(model, WORDS_ALL, threshold=threshold), []
        for t in range(len(clip.frames)):
            [reply] = stream.narrate(torch.from_numpy(clip.frames[t : t + 1]))
            said = [say for say in clip.said if say.frame == t]
            if said and said[0].role == "assistant":
                exact.append(reply == said.pop(0).text)
            elif not said:
                expected_silent.append(reply is None)
            while said:
                question, answer = said.pop(0), said.pop(0)
                exact.append(stream.ask([question.text]) == [answer.text])
        assert [turn.exact for turn in turns] == exact
    assert silent == expected_silent


def test_without_events_both_evaluations_count_silence_alike():
    """Nothing happens, so there are no turns, and every frame is a decision to stay silent."""
    model = small_model(1, torch.float32, image_size=20, patch_size=4, grid=5)
    quiet = DataConfig(frames=4, event_rate=0.0, question_rate=0.0)
    clips = [make_clip(quiet, model.config, "validation", 0, index) for index in range(3)]
    for threshold, silence in ((0.0, 1.0), (1.0, 0.0)):
        forced, free = (evaluate(model, WORDS_ALL, clips, threshold) for evaluate in (teacher_forced, free_running))
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
    assert recall(5, [Routing(1, kept, kept)], [clip]) == {"1": expected}
    coarse = torch.zeros(2, 1 + 1, dtype=torch.bool)
    coarse[:, 1] = True
    assert recall(1, [Routing(3, coarse, coarse)], [clip]) == {"3": 1.0}


@given(conversations(), st.integers(0, 99))
def test_free_running_counts_the_turns_that_teacher_forcing_counts(talk, seed):
    """Whatever people say: unanswered questions, two in a row, answers some frames later; a question is no answer."""
    model, (frames, said) = small_model(1, torch.float32), talk
    together = [one for before, one in zip([None, *said], said, strict=False)
                if not (before and before.role == one.role == "assistant" and before.frame == one.frame)]
    clip = Clip(random_pixels(frames, model.config, seed, torch.float32).numpy(), together)
    [forced], silent = teacher_forced(model, WORDS_ALL, [clip])
    [free], silent_free = free_running(model, WORDS_ALL, [clip])
    assert [(turn.kind, turn.end, len(turn.right)) for turn in free] == [(t.kind, t.end, len(t.right)) for t in forced]
    assert [len(turn.spoke) for turn in free if turn.timed] == [len(turn.spoke) for turn in forced if turn.timed]
    assert len(silent) == len(silent_free)


def test_rows_of_a_batch_are_rated_as_each_alone(setting):
    """How many clips go through at once, and that they differ in length, changes nothing."""
    model, clips = setting
    some = [Clip(clip.frames[:frames], [say for say in clip.said if say.frame < frames]) for clip, frames in
            zip(clips, (5, 2, 4, 1, 5, 3), strict=True)]
    for evaluate in (teacher_forced, free_running):
        streams, silent = evaluate(model, WORDS_ALL, some, 0.05, rows=6)
        alone = [evaluate(model, WORDS_ALL, [clip], 0.05) for clip in some]
        for turns, ([own], _) in zip(streams, alone, strict=True):
            assert [(t.kind, t.end, t.spoke, t.right, t.after, t.exact) for t in turns] == [
                (t.kind, t.end, t.spoke, t.right, t.after, t.exact) for t in own]
            for one, two in zip(turns, own, strict=True):
                assert one.logp == pytest.approx(two.logp, rel=1e-3, abs=1e-4)
        assert silent == [flag for _, flags in alone for flag in flags]


def test_two_responses_without_a_question_between_are_refused():
    model = small_model(1, torch.float32)
    said = [Say(0, "assistant", "red disc moves"), Say(0, "assistant", "red disc leaves")]
    with pytest.raises(ValueError, match="a response after frame 0 follows neither the frame nor a question"):
        free_running(model, WORDS_ALL, [Clip(random_pixels(1, model.config, 0, torch.float32), said)])


def test_recall_of_clips_without_sprites_is_nothing():
    clip = make_clip(DataConfig(frames=2, event_rate=0.0), small_config(image_size=20, grid=5), "validation", 0, 1)
    kept = torch.zeros(2, 26, dtype=torch.bool)
    assert recall(5, [Routing(1, kept, kept)], [clip]) == {}


@pytest.mark.parametrize("changes", [{}, {"layers": "none"}, {"layers": "keep:1,0,0.4,1", "select": "random"}])
def test_cost_ratios_count_products_and_entries(changes):
    """FLOPs against torch's own counter over the decoder's layers, entries against a real cache."""
    model = small_model(**changes)
    frames, text = 3, 7
    plan = plan_of(model.config, torch.tensor([[-1] * text + [f for f in range(frames) for _ in range(5)]]))
    x = torch.randn(1, text + 5 * frames, 24, dtype=torch.float64)
    cache = model.new_cache()
    cache.begin(plan)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.decoder(x, plan, cache)
    dense = small_model(layers="none")
    with FlopCounterMode(display=False) as full, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        dense.decoder(x, plan)
    ratios = cost_ratios(model.config, frames, text)
    assert ratios["flop_ratio"] == pytest.approx(counter.get_total_flops() / full.get_total_flops(), rel=1e-9)
    assert ratios["kv_ratio"] == sum(cache.entries()) / (4 * (text + 5 * frames))
