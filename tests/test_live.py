"""Frames and questions with their times: whatever the order, the tokens fed are the training layout of the timeline."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mod.config import UserError
from mod.layout import Say, lay_out
from mod.live.live import Live, LiveStream, Paced
from mod.live.saved import read_saved, restore, save, stream_state
from mod.live.settings import StreamConfig
from tests.helpers import WORDS_ALL, random_pixels, small_model
from tests.test_window import Logged

ASKED = ["where is it ?", "where did it appear ?", "where is the red disc ?"]
RATES = st.sampled_from([Fraction(1), Fraction(2), Fraction(3, 2), Fraction(30000, 1001)])


@st.composite
def timelines(draw):
    """A number of frames, their rate, and timed questions: before the first frame, at a frame's time, between, several
    at once, at the very end."""
    frames, fps = draw(st.integers(1, 5)), draw(RATES)
    moment = st.one_of(
        st.integers(0, frames - 1).map(lambda k: k / fps),
        st.integers(0, 8 * frames - 1).map(lambda k: k / fps / 8),
        st.just(Fraction(-1)),
    )
    return frames, fps, draw(st.lists(st.tuples(moment, st.sampled_from(ASKED)), max_size=5))


def written(frames, fps, questions, narrations, answers) -> list[Say]:
    """What was said, in order, by the plain rule: a question stands after the last frame that is not after it."""
    said, order = [], sorted(range(len(questions)), key=lambda i: questions[i][0])
    for t in range(-1, frames):
        if t >= 0 and narrations[t] is not None:
            said.append(Say(t, "assistant", narrations[t]))
        for i in order:
            time, text = questions[i]
            if max([k for k in range(frames) if k / fps <= time], default=-1) == t:
                said += [Say(t, "user", text), Say(t, "assistant", answers[i])]
    return said


def by_question(happened, row, questions):
    """What has happened in a stream; its narrations; and by their numbers the questions, which come in order of time."""
    mine = [one for one in happened if one.row == row]
    order = sorted(range(len(questions)), key=lambda i: questions[i][0])
    heard = dict(zip(order, (one for one in mine if one.question is not None), strict=True))
    assert [one.question for one in heard.values()] == [questions[i][1] for i in order]
    return mine, [one.reply for one in mine if one.question is None], heard


def live_of(model, timelines, rule, seeds, first=None):
    first = first or [0] * len(timelines)
    stream = Logged(model, WORDS_ALL, len(timelines), settings=rule, max_words=3)
    sources = [
        Paced(list(random_pixels(frames, model.config, seed))[begin:], fps, first=begin)
        for (frames, fps, _), seed, begin in zip(timelines, seeds, first, strict=True)
    ]
    return Live(stream, sources, [fps for _, fps, _ in timelines])


def run(live, each=lambda: None):
    while happened := live.step():
        yield from happened
        each()


@settings(max_examples=40)
@given(st.lists(timelines(), min_size=1, max_size=3), st.integers(0, 20), st.sampled_from([0.0, 0.25, 1.0]), st.booleans())
def test_fed_tokens_are_the_layout_of_the_timeline(timelines, seed, threshold, window):
    """One to three streams together. Catches questions before their frame, answers that go to another's question, and a
    second question lost while the first is answered. Each stream says and feeds what it does alone."""
    model, rule = small_model(seed), StreamConfig(threshold=threshold, window=2 * window)
    live = live_of(model, timelines, rule, range(3)[: len(timelines)])
    for row, (_, _, questions) in enumerate(timelines):
        for time, text in questions:
            live.ask(row, time, text)
    happened = list(run(live))
    for row, (frames, fps, questions) in enumerate(timelines):
        mine, narrations, heard = by_question(happened, row, questions)
        answers = {i: one.reply for i, one in heard.items()}
        layout = lay_out(WORDS_ALL, frames, model.config.frame_tokens, written(frames, fps, questions, narrations, answers))
        assert live.stream.fed[row] == list(zip(layout.ids, layout.frame, strict=True))
        assert [one.time for one in mine] == sorted(one.time for one in mine)
        assert [one.time for one in mine if one.question is None] == [k / fps for k in range(frames)]

        alone = live_of(model, [timelines[row]], rule, [row])
        for time, text in questions:
            alone.ask(0, time, text)
        assert [(one.time, one.question, one.reply) for one in run(alone)] == [(one.time, one.question, one.reply) for one in mine]
        assert alone.stream.fed[0] == live.stream.fed[row]


@settings(max_examples=20)
@given(timelines(), timelines(), st.integers(0, 20), st.integers(0, 8), st.sampled_from([0, 1, 2]), st.booleans())
@example((5, Fraction(2), []), (5, Fraction(2), []), 0, 3, 1, True)  # cut after frames were forgotten, before others come
def test_a_saved_stream_goes_on_bit_for_bit(tmp_path_factory, one, other, seed, cut, window, contiguous):
    """Stopped after any number of steps and restored in a new stream: the same replies, the same cache, every bit."""
    path = tmp_path_factory.mktemp("saved") / "live.safetensors"
    model = small_model(seed, torch.float32)
    rule = StreamConfig(threshold=0.3, window=window, refractory=1, positions="contiguous" if contiguous else "absolute")
    both = [one, other]

    def ask(live):
        for row, (_, _, questions) in enumerate(both):
            for time, text in questions:
                live.ask(row, time, text)

    whole = live_of(model.float(), [(f, r, q) for f, r, q in both], rule, (1, 2))
    ask(whole)
    expected, states = [], []
    while happened := whole.step():
        expected.append([(h.row, h.time, h.question, h.reply) for h in happened])
        states.append(stream_state(whole.stream))
        if len(states) == cut:
            save(whole, path, {"video": "a"})
    if cut == 0 or len(states) < cut:
        return
    tensors, note = read_saved(path, {"video": "a"})
    again = live_of(model, both, rule, (1, 2), first=[number + 1 for number in note["last"]])
    restore(again, tensors, note)
    for happened, (cached, numbers) in zip(expected[cut:], states[cut:], strict=True):
        assert [(h.row, h.time, h.question, h.reply) for h in again.step()] == happened
        now, now_numbers = stream_state(again.stream)
        assert numbers == now_numbers and all(torch.equal(tensor, now[name]) for name, tensor in cached.items())
    assert again.step() == []


def test_a_saved_stream_of_something_else_is_refused(tmp_path):
    model, path = small_model(), tmp_path / "live.safetensors"
    live = live_of(model, [(2, Fraction(2), [])], StreamConfig(), [0])
    live.step()
    save(live, path, {"video": "a", "window": 0})
    with pytest.raises(UserError, match="is a stream with video a, got b"):
        read_saved(path, {"video": "b", "window": 0})
    tensors, note = read_saved(path, {"video": "a", "window": 0})
    other = live_of(small_model(kv_heads=1), [(2, Fraction(2), [])], StreamConfig(), [0])
    with pytest.raises(UserError, match="another model"):
        restore(other, tensors, note)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        read_saved(path, {"video": "a", "window": 0})


def test_after_a_narration_the_refractory_period_is_silent_but_answers():
    model, pixels = small_model(), random_pixels(9, small_model().config)
    stream = LiveStream(model, WORDS_ALL, settings=StreamConfig(threshold=1.0, refractory=2), max_words=2)
    spoke = []
    for t in range(9):
        [reply] = stream.narrate(pixels[t : t + 1])
        spoke.append(reply is not None)
        if t == 1:
            assert stream.ask(["where is it ?"]) != [None]
    assert spoke == [True, False, False] * 3


class Clock:
    """A clock that moves when someone sleeps, or works."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


def paced(on_late, works, fps=Fraction(2), frames=10):
    """Hand over frames to a reader who works so many seconds on each; returns (number, moment) and the pacer."""
    clock, seen = Clock(), []
    pacer = Paced(range(frames), fps, on_late, clock=clock, sleep=clock.sleep)
    for (number, picture), work in zip(pacer, [*works, *[0.0] * frames], strict=False):
        assert number == picture
        seen.append((number, clock.now - 100.0))
        clock.now += work
    return seen, pacer


def test_a_reader_in_time_gets_every_frame_at_its_own_time():
    for on_late in ("wait", "skip"):
        seen, pacer = paced(on_late, [0.3] * 10, fps=Fraction(30, 13))
        assert seen == [(k, pytest.approx(k * 13 / 30)) for k in range(10)], "no drift, whatever the work"
        assert (pacer.late, pacer.skipped) == (0, 0)


def test_waiting_hands_over_everything_and_counts_what_was_late():
    seen, pacer = paced("wait", [1.6, 0.1, 0.1, 0.1, 0.1])
    assert [number for number, _ in seen] == list(range(10)) and seen[1][1] == pytest.approx(1.6)
    assert pacer.late == 2 and pacer.skipped == 0 and pacer.lag == pytest.approx(1.1)
    assert seen[6] == (6, pytest.approx(3.0)), "once it has caught up, it is on time again"


def test_skipping_goes_on_with_the_latest_and_keeps_true_times():
    seen, pacer = paced("skip", [1.6, 0.1])
    assert seen == [(0, 0.0), *[(k, pytest.approx(max(k / 2, 1.6))) for k in range(3, 10)]]
    assert pacer.skipped == 2 and pacer.late == 0
    seen, pacer = paced("skip", [99.0])
    assert [number for number, _ in seen] == [0, 9] and pacer.skipped == 8, "of what is overdue the latest is shown"
    assert [number for number, _ in paced("off", [99.0] * 10)[0]] == list(range(10))


def test_the_last_picture_counts_as_late_even_under_skip():
    _, pacer = paced("skip", [99.0])
    assert pacer.late == 1 and pacer.lag == pytest.approx(94.5)


def test_what_does_not_fit_the_memory_is_refused_and_the_stream_goes_on():
    """Room for one question and answer at a time: the second at once is refused, one after the window has passed is not."""
    model = small_model()
    settings = StreamConfig(threshold=0.0, window=2)
    stream = Logged(model, WORDS_ALL, settings=settings, max_words=3)
    live = Live(stream, [Paced(list(random_pixels(8, model.config)), Fraction(1))], [Fraction(1)], question_room=12)
    for time in (1, 1, 2, 5):
        live.ask(0, Fraction(time), "where is it ?")
    answers = [one for one in run(live) if one.question]
    assert [one.refused for one in answers] == [False, True, True, False]
    assert [one.reply is None for one in answers] == [False, True, True, False]
    assert sum(token == WORDS_ALL.user for token, frame in stream.fed[0] if frame < 0) == 2


def test_questions_between_left_out_frames_come_before_the_next_one():
    """Frames 1 to 4 are skipped; what was asked at their times stands before frame 5, in order."""
    model, clock = small_model(), Clock()
    pixels = random_pixels(8, model.config)
    stream = LiveStream(model, WORDS_ALL, settings=StreamConfig(threshold=0.0), max_words=1)
    source = Paced(list(pixels), Fraction(2), "skip", clock=clock, sleep=clock.sleep)
    live = Live(stream, [source], [Fraction(2)])
    live.ask(0, Fraction(1), ASKED[0])
    live.ask(0, Fraction(1, 4), ASKED[1])
    [zero] = live.step()
    clock.now += 2.6
    rest = list(run(live))
    assert zero.number == 0
    assert [(one.number, one.question) for one in rest][:3] == [(0, ASKED[1]), (0, ASKED[0]), (5, None)]
    assert [one.time for one in rest if one.question is None] == [Fraction(k, 2) for k in (5, 6, 7)]


@settings(max_examples=40)
@given(timelines(), timelines(), st.integers(0, 20), st.data())
def test_what_the_model_is_only_told_is_fed_as_training_lays_it_out(one, other, seed, data):
    """Asked before the first frame or in the middle of the stream, answered some frames later or never: what the model
    says after later frames follows as narrations. In two streams at once, beside questions that are answered."""
    model, both = small_model(seed), [one, other]
    answered = [[data.draw(st.booleans()) for _ in questions] for *_, questions in both]
    live = live_of(model, both, StreamConfig(threshold=0.3), (0, 1))
    for row, (_, _, questions) in enumerate(both):
        for (time, text), to_answer in zip(questions, answered[row], strict=True):
            live.ask(row, time, text, to_answer)
    happened = list(run(live))
    for row, (frames, fps, questions) in enumerate(both):
        _, narrations, heard = by_question(happened, row, questions)
        assert all(each.told == (each.reply is None) == (not answered[row][i]) for i, each in heard.items())
        replies = {i: each.reply for i, each in heard.items()}
        said = [say for say in written(frames, fps, questions, narrations, replies) if say.text is not None]
        layout = lay_out(WORDS_ALL, frames, model.config.frame_tokens, said)
        assert live.stream.fed[row] == list(zip(layout.ids, layout.frame, strict=True))


def test_an_answer_that_is_due_later_comes_from_the_same_tokens_as_in_training():
    """The layout of a conversation with a question at -1 and its answer after frame 3, fed live: token for token."""
    model = small_model(3)
    stream = Logged(model, WORDS_ALL, settings=StreamConfig(threshold=0.0), max_words=3)
    live = Live(stream, [Paced(list(random_pixels(5, model.config)), Fraction(2))], [Fraction(2)])
    live.ask(0, Fraction(-1), ASKED[0], answered=False)
    live.ask(0, Fraction(1), ASKED[1], answered=False)
    for happened in run(live):
        if happened.number == 3 and happened.question is None:
            stream.never[:] = True
            stream.never[WORDS_ALL.encode("red")] = False
            stream.respond([True])  # as the model does when it finds that it is time
    said = [Say(-1, "user", ASKED[0]), Say(2, "user", ASKED[1]), Say(3, "assistant", "red red red")]
    layout = lay_out(WORDS_ALL, 5, model.config.frame_tokens, said)
    assert stream.fed[0] == list(zip(layout.ids, layout.frame, strict=True))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_what_is_still_to_be_told_survives_a_crash(tmp_path, cut):
    """And a file from before there was anything to tell: all of its questions are answered."""
    model, frames = small_model(2), (6, Fraction(2), [])
    whole = live_of(model, [frames], StreamConfig(threshold=0.3), (1,))
    for time, text, to_answer in ((-1, ASKED[0], False), (1, ASKED[1], False), (1, ASKED[2], True), (2, ASKED[0], False)):
        whole.ask(0, Fraction(time), text, to_answer)
    for _ in range(cut):
        whole.step()
    save(whole, tmp_path / "live", {})
    expected = [(one.time, one.question, one.told, one.reply) for one in run(whole)]
    for old in (False, True):
        tensors, note = read_saved(tmp_path / "live", {})
        again = live_of(model, [frames], StreamConfig(threshold=0.3), (1,), first=[note["last"][0] + 1])
        if old:
            note["questions"] = [[entry[:3] for entry in row] for row in note["questions"]]
        restore(again, tensors, note)
        goes_on = [(one.time, one.question, one.told, one.reply) for one in run(again)]
        assert old or goes_on == expected
        assert not old or not any(told for _, _, told, _ in goes_on)
