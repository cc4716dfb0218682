"""The streaming script on long, several, interrupted and hurried streams, and what is measured on them."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stream_tiny
import train_tiny
from mod.live import calibrate, saved
from mod.live.costs import dense, layer_tokens, window_that_fits
from mod.live.live import Live, Paced
from mod.live.record import NOTHING, Recorder
from mod.live.settings import StreamConfig
from mod.run import load_run
from mod.stream import Stream
from tests.helpers import WORDS_ALL, random_pixels, small_config, small_model
from tests.test_scripts import QUICK, refused
from tests.test_window import Logged

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("watch") / "run"
    assert train_tiny.main([*QUICK, "--out", str(out), "--seed", "3", "--max-words", "3"]) == 0
    return out


def lines(capsys, *flags) -> list[dict]:
    capsys.readouterr()
    assert stream_tiny.main([*map(str, flags), "--json", "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_stream_killed_at_any_moment_goes_on_identically(trained, tmp_path, capsys):
    """SIGKILL while it runs; the same command again. Together they are the uninterrupted stream, but for one frame at
    most that is told twice; the question asked before the kill is not asked again, that after it is."""
    flags = ["--checkpoint", str(trained), "--frames", "130", "--window", "3", "--threshold", "0.3",
             "--ask", "5:where is it ?", "--ask", "115:where is it ?", "--refractory", "1"]
    expected = lines(capsys, *flags)
    command = [sys.executable, str(ROOT / "stream_tiny.py"), *flags, "--json", "--device", "cpu", "--state", str(tmp_path / "live.st")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    first = [process.stdout.readline() for _ in range(12)]
    time.sleep(0.1)  # it has just told something; be it somewhere else when it is killed
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    assert process.wait() == -signal.SIGKILL
    cut = rest if rest.endswith("\n") else rest[: rest.rfind("\n") + 1]
    before = [json.loads(line) for line in [*first, *cut.splitlines()]]
    assert 12 <= len(before) < len(expected), "it was killed half way"
    after = lines(capsys, *flags, "--state", tmp_path / "live.st")
    repeated = len(before) + len(after) - len(expected)
    assert before == expected[: len(before)] and after == expected[len(expected) - len(after) :]
    assert 0 <= repeated <= 2 and (repeated == 0 or {line["frame"] for line in after[:repeated]} == {before[-1]["frame"]})
    assert lines(capsys, *flags, "--state", tmp_path / "live.st") == [], "it has ended"


def test_several_streams_say_what_each_says_alone(trained, capsys):
    flags = ["--checkpoint", trained, "--frames", 12, "--window", 4, "--threshold", 0.2, "--ask", "start:where is it ?", "--ask", "2.25s:where did it appear ?"]
    together = lines(capsys, *flags, "--streams", 3, "--seed", 5)
    for row in range(3):
        alone = lines(capsys, *flags, "--seed", 5 + row)
        mine = [{key: value for key, value in line.items() if key != "stream"} for line in together if line["stream"] == row]
        assert mine == alone and [line["frame"] for line in alone if line["role"] == "user"] == [-1, 4]


def test_memory_is_bounded_as_asked_and_windows_are_what_the_formula_says(trained, capsys):
    _, _, config = load_run(trained, torch.device("cpu"))
    model = config.model
    flags = ["--checkpoint", trained, "--frames", 40, "--threshold", 1.0, "--ask", "9:where is it ?"]
    for megabytes in (0.3, 0.5):
        entries = [sum(line["cache_entries"]) for line in lines(capsys, *flags, "--memory-mb", megabytes)]
        most = max(entries) * 2 * model.kv_heads * model.head_dim * 4
        assert most <= megabytes * 1e6 and most > 0.4 * megabytes * 1e6
    words = config.train.max_words + 2
    entry = 2 * model.kv_heads * model.head_dim * 4
    for window in (1, 5, 9):
        budget = (window * sum(model.keep_counts) + (window * words + 7) * model.depth) * entry
        assert window_that_fits(model, budget, words, 7) == window == window_that_fits(model, budget + entry, words, 7)
        assert window_that_fits(model, budget - 1, words, 7) == window - 1
    five = 5 * (sum(model.keep_counts) + words * model.depth) * entry
    assert window_that_fits(model, five, words, 0, sinks=2) == 3


@pytest.mark.parametrize("extra", [["--sinks", 5], ["--streams", 2], ["--ask", "3:where is it ?", "--ask", "4:where is it ?"]])
def test_memory_is_bounded_with_everything_else(trained, capsys, extra):
    _, _, config = load_run(trained, torch.device("cpu"))
    entry = 2 * config.model.kv_heads * config.model.head_dim * 4
    said = lines(capsys, "--checkpoint", trained, "--frames", 30, "--threshold", 1.0, "--memory-mb", 0.5, *extra)
    most = {row: max(sum(line["cache_entries"]) for line in said if line.get("stream", 0) == row) for row in (0, 1) if any(line.get("stream", 0) == row for line in said)}
    assert 0.3 * 5e5 < sum(most.values()) * entry <= 5e5


def test_new_questions_come_into_a_saved_stream_and_memory_never_wedges_it(trained, tmp_path, capsys):
    """A frame more at every start, and new questions each time: asked once each, or refused; the stream never dies."""
    flags = ["--checkpoint", trained, "--threshold", 1.0, "--memory-mb", 0.4, "--state", tmp_path / "live.st"]
    asked, refused_ones = [], 0
    for frames in range(1, 7):
        new = ["--ask", f"{frames - 1}:where is it ?", "--ask", f"{(frames - 1) / 2}s:where did it appear ?", "--ask", "0:where is the red disc ?"]
        said = lines(capsys, *flags, "--frames", frames, *new)
        asked += [(line["frame"], line["text"]) for line in said if line["role"] == "user"]
        refused_ones += sum(line["role"] == "refused" for line in said)
    assert len(set(asked)) == len(asked) == 13, "the question about the red disc is put once"
    assert 0 < refused_ones < 13


def test_a_question_given_again_in_other_words_is_asked_once_and_still_judged(trained, tmp_path, capsys):
    flags = ["--checkpoint", str(trained), "--threshold", "0", "--window", "2", "--state", str(tmp_path / "s"), "--device", "cpu"]
    assert stream_tiny.main([*flags, "--frames", "4", "--ask", "3:where is it ?"]) == 0
    assert "where is it ?" in capsys.readouterr().out
    assert stream_tiny.main([*flags, "--frames", "5", "--ask", "1.5s:where is it?"]) == 0
    assert "user:" not in capsys.readouterr().out
    assert stream_tiny.main([*flags, "--frames", "6", "--ask", "4:where did it appear ?"]) == 0
    out = capsys.readouterr().out
    assert "user: where did it appear ?" in out and "   ?" not in out and "of 1 answers" in out


def test_what_the_model_is_told_gets_no_answer_of_its_own(trained, tmp_path, capsys):
    """Shown, put on the page, and not judged; in the order in which it was given among questions of the same time."""
    flags = ["--checkpoint", trained, "--frames", 6, "--threshold", 0.0, "--tell", "start:where is it?", "--ask", "3:where is it ?",
             "--tell", "3:where did it appear ?", "--tell", "1.2s:where is the red disc ?", "--state", tmp_path / "s"]
    said = lines(capsys, *flags, "--html", tmp_path / "s.html")
    talk = [(line["frame"], line["role"], line["text"]) for line in said if line["role"] != "silence"]
    [answer] = [text for _, role, text in talk if role == "assistant"]
    assert talk == [(-1, "user", "where is it ?"), (2, "user", "where is the red disc ?"), (3, "user", "where is it ?"), (3, "assistant", answer),
                    (3, "user", "where did it appear ?")]
    layers = [line["cache_entries"][0] for line in said]
    told = 5  # <user>, and four words
    assert layers[0] == 1 + told and layers[1] == layers[0] + 26, "nothing but its own words was fed"
    data = json.loads((tmp_path / "s.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert [(line["role"], line["text"]) for moment in data["moments"] for line in moment["said"] if line["truth"] in (None, "")][:1] == [("user", "where is it ?")]
    assert lines(capsys, *flags) == [], "it is not told again"
    assert stream_tiny.main([*map(str, flags[:-2]), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("   user: ") == 4 and "of 1 answers" in printed
    refused(stream_tiny.main, ["--checkpoint", str(trained), "--tell", "99:where is it ?"], capsys, "--tell got '99:where is it ?'")
    refused(stream_tiny.main, ["--checkpoint", str(trained), "--tell", "where is it ?"], capsys, "--tell got", "expected WHEN:WORDS")


def test_saving_every_few_frames_counts_frames_of_time(trained, tmp_path, capsys, monkeypatch):
    moments = []
    keep = saved.save
    monkeypatch.setattr(saved, "save", lambda live, *parts: (moments.append(max(live.last)), keep(live, *parts)))
    lines(capsys, "--checkpoint", trained, "--frames", 11, "--streams", 2, "--state", tmp_path / "s", "--state-every", 4)
    assert moments == [3, 7, 10]


class Camera:
    """Stands in for a Video that is a camera: what it shows next is what it sees now."""

    about_frames, shown = None, 0

    def __init__(self, name, fps, size):
        self.size = size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def remarks(self):
        return []

    def __iter__(self):
        for _ in range(50):
            Camera.shown += 1
            yield random_pixels(1, small_config(image_size=self.size), Camera.shown, torch.float32)[0].numpy()


def test_a_camera_goes_on_with_what_it_sees_now(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mod.real.video.Video", Camera)
    late = []
    monkeypatch.setattr("mod.live.watch.Paced", lambda *parts, **more: (late.append(parts[2]), Paced(*parts, **more))[1])
    flags = ["--checkpoint", trained, "--video", "/dev/video0", "--fps", 1000, "--window", 3, "--state", tmp_path / "live.st"]
    lines(capsys, *flags, "--frames", 4, "--on-late", "wait")
    assert Camera.shown == 4 and late == ["wait"]
    said = lines(capsys, *flags, "--frames", 6, "--on-late", "wait")
    assert Camera.shown == 6 and {line["frame"] for line in said} == {4, 5}
    lines(capsys, *flags, "--frames", 7)
    assert late[-1] == "skip", "unless told otherwise"


def test_ctrl_c_keeps_what_was_shown(trained, tmp_path, capsys, monkeypatch):
    steps, step = [], Live.step

    def interrupted(self):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Live, "step", interrupted)
    flags = ["--checkpoint", str(trained), "--frames", "9", "--html", str(tmp_path / "s.html"), "--state", str(tmp_path / "s"), "--device", "cpu"]
    assert stream_tiny.main(flags) == 130
    told = capsys.readouterr()
    assert "interrupted; go on with --state" in told.err and "speed:" in told.out and "Traceback" not in told.err
    assert len(json.loads((tmp_path / "s.html").read_text().split('id="data">')[1].split("</script>")[0])["moments"]) == 3


def test_the_clock_is_kept_and_told(trained, capsys):
    assert stream_tiny.main(["--checkpoint", str(trained), "--frames", "3", "--on-late", "wait", "--device", "cpu"]) == 0
    assert "clock: 0 frames later than the next was due, 0 skipped" in capsys.readouterr().err


def test_drawing_in_the_terminal(trained, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert stream_tiny.main(["--checkpoint", str(trained), "--frames", "2", "--draw", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "layer 1 keeps 6 of 26" in out and "▀" in out and "\x1b[0m" in out


def test_the_page_shows_what_the_json_says(trained, tmp_path, capsys):
    """The two outputs of one stream agree: frames, dialogue, entries, with a window that forgets."""
    flags = ["--checkpoint", trained, "--frames", 9, "--window", 3, "--threshold", 0.25, "--ask", "4:where is it ?", "--ask", "start:where ?"]
    said = lines(capsys, *flags, "--html", tmp_path / "stream.html")
    page = (tmp_path / "stream.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    moments = data["moments"]
    assert [moment["frame"] for moment in moments] == list(range(9))
    for moment in moments:
        mine = [line for line in said if line["frame"] == moment["frame"] or (line["frame"] < 0 and moment["frame"] == 0)]
        assert moment["entries"] == mine[-1]["cache_entries"] and moment["time"] == mine[-1]["time"]
        spoken = [(line["role"], line["text"]) for line in mine if line["role"] != "silence"]
        assert [(line["role"], line["text"].replace(NOTHING, "")) for line in moment["said"] if line["text"]] == spoken


class TestRecorder:
    @pytest.mark.parametrize(("layers", "window"), [("interleaved", 0), ("interleaved", 2), ("keep:1,0,0.4,1", 2)])
    def test_flops_are_those_that_torch_counts(self, layers, window):
        """Over a whole live stream with questions: the formula's sum is the counter's, and full computation's is that
        of a dense model fed the same tokens."""
        totals = {}
        settings = StreamConfig(threshold=1.0, window=window)
        mod, full = small_model(1, torch.float32, layers=layers), small_model(1, torch.float32, layers="none")
        said: list = []
        for name, model in (("mod", mod), ("full", full)):
            pixels = random_pixels(5, model.config, dtype=torch.float32)
            stream = Logged(model, WORDS_ALL, settings=settings, max_words=2, trace=[])
            live = Live(stream, [Paced(list(pixels), Fraction(2))], [Fraction(2)])
            live.ask(0, Fraction(-1), "where ?")
            live.ask(0, Fraction(1), "where is it ?")
            recorder, moments = Recorder(stream, 0, stream.trace), []
            stream.never[:] = True
            stream.never[9] = False  # both models say the same word, twice
            rated, logits = [], model.decoder.logits
            model.decoder.logits = lambda hidden, rated=rated, logits=logits: (rated.append(hidden[..., 0].numel()), logits(hidden))[1]
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                while happened := live.step():
                    moments += recorder.note(happened[0], None, moments[-1] if moments else None, 0.0)
            with FlopCounterMode(display=False) as apart, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
                model.see(pixels)
            head = 2 * sum(rated) * model.config.dim * model.config.vocab_size
            totals[name] = counter.get_total_flops() - apart.get_total_flops() - head, moments[-1]
            said.append(stream.fed[0])
        assert said[0] == said[1]
        counted, last = totals["mod"]
        assert last.flops == (counted, totals["full"][0])
        assert last.entries == layer_tokens(mod.config, *last.held) and dense(mod.config).layers == "none"
        assert len(last.said) == 1 and last.frame == 4


class TestCalibration:
    def test_counts_are_what_streams_do_frame_by_frame(self, trained):
        model, source, _ = load_run(trained, torch.device("cpu"))
        words, clips = source.words, source.validation(6)
        for threshold in (0.05, 0.5, 0.98):
            on_time = missed = false = quiet = 0
            for clip in clips:
                stream = Stream(model, words, threshold=threshold, max_words=3)
                for t, picture in enumerate(clip.frames):
                    said = [say for say in clip.said if say.frame == t]
                    [reply] = stream.narrate(torch.from_numpy(picture)[None])
                    if not said:
                        false, quiet = false + (reply is not None), quiet + (reply is None)
                    elif said[0].role == "assistant":
                        on_time, missed = on_time + (reply is not None), missed + (reply is None)
                    for say in said:
                        if say.role == "user":
                            stream.ask([say.text])
            row = calibrate.counts(model, words, clips, threshold, 3)
            assert row["due"] == on_time + missed and row["frames"] == on_time + missed + false + quiet
            assert row["missed"] == pytest.approx(missed / (on_time + missed)) and row["false"] == pytest.approx(false / (false + quiet))
            assert row["talkative"] == pytest.approx((on_time + false) / row["frames"])
            precision, recall = on_time / max(1, on_time + false), on_time / (on_time + missed)
            assert row["f1"] == pytest.approx(2 * precision * recall / max(1e-9, precision + recall))

    def test_the_best_threshold_lies_in_the_middle_of_the_best(self):
        rows = [{"threshold": t, "f1": f} for t, f in ((0.1, 0.5), (0.2, 0.9), (0.3, 0.899), (0.4, 0.9), (0.5, 0.7))]
        assert calibrate.best(rows) == 0.3

    def test_the_script_calibrates_and_then_goes_by_it(self, trained, tmp_path, capsys, monkeypatch):
        import shutil

        run = shutil.copytree(trained, tmp_path / "run")
        monkeypatch.setattr(calibrate, "THRESHOLDS", (0.1, 0.9))
        assert stream_tiny.main(["--checkpoint", str(run), "--calibrate", "--device", "cpu"]) == 0
        assert "timing F1" in capsys.readouterr().out and (run / "calibration.png").stat().st_size > 5000
        held = json.loads((run / "calibration.json").read_text())
        assert held["threshold"] in (0.1, 0.9) and len(held["rows"]) == 2

        def talk(*flags):
            return [line["role"] for line in lines(capsys, "--checkpoint", run, "--frames", 6, *flags)]

        for threshold, role in ((0.0, "silence"), (1.0, "assistant")):
            (run / "calibration.json").write_text(json.dumps(held | {"threshold": threshold}))
            assert set(talk()) == {role}
        assert set(talk("--threshold", 0.0)) == {"silence"}, "a flag is stronger"
        (run / "calibration.json").write_text(json.dumps(held | {"threshold": 0.0, "run": "another"}))
        assert talk() == talk("--threshold", 0.5), "what was calibrated with other weights does not count"
        (run / "calibration.json").write_text("{")
        refused(stream_tiny.main, ["--checkpoint", str(run)], capsys, "is no calibration", "--calibrate")
