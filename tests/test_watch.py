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
from mod.config import StreamConfig
from mod.data import vocabulary
from mod.live import Live, Paced
from mod.real.parts import load_run
from mod.stream import Stream
from mod.study import calibrate, gap, soak, windows
from mod.study.costs import dense, forward_flops, kv_bytes, layer_tokens, window_that_fits
from mod.study.record import NOTHING, Recorder
from mod.train import validation_clips
from tests.helpers import WORDS_ALL, random_pixels, small_config, small_model
from tests.test_scripts import QUICK, refused

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
             "--ask", "5:where is it ?", "--ask", "115:where is it ?", "--refractory", "1"]  # fmt: skip
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
        budget = kv_bytes(model, window, window * words + 7)
        assert window_that_fits(model, budget, words, 7) == window == window_that_fits(model, budget + entry, words, 7)
        assert window_that_fits(model, budget - 1, words, 7) == window - 1
    assert window_that_fits(model, kv_bytes(model, 5, 5 * words), words, 0, sinks=2) == 3


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
        new = ["--ask", f"{frames - 1}:where is it ?", "--ask", f"{(frames - 1) / 2}s:where did it appear ?", "--ask", "0:which spark ?"]
        said = lines(capsys, *flags, "--frames", frames, *new)
        asked += [(line["frame"], line["text"]) for line in said if line["role"] == "user"]
        refused_ones += sum(line["role"] == "refused" for line in said)
    assert len(set(asked)) == len(asked) == 13, "the question about sparks is put once"
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


def test_saving_every_few_frames_counts_frames_of_time(trained, tmp_path, capsys, monkeypatch):
    saved = []
    keep = Live.save
    monkeypatch.setattr(Live, "save", lambda self, *parts: (saved.append(max(self.last)), keep(self, *parts)))
    lines(capsys, "--checkpoint", trained, "--frames", 11, "--streams", 2, "--state", tmp_path / "s", "--state-every", 4)
    assert saved == [3, 7, 10]


class Camera:
    """Stands in for a Video that is a camera: what it shows next is what it sees now."""

    about_frames, skipped, shown = None, 0, 0

    def __init__(self, name, fps, size):
        self.size = size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        for _ in range(50):
            Camera.shown += 1
            yield random_pixels(1, small_config(image_size=self.size), Camera.shown, torch.float32)[0].numpy()


def test_a_camera_goes_on_with_what_it_sees_now(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream_tiny, "Video", Camera)
    late = []
    monkeypatch.setattr(stream_tiny, "Paced", lambda *parts, **more: (late.append(parts[2]), Paced(*parts, **more))[1])
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
            stream = Stream(model, WORDS_ALL, frames=9, text=200, settings=settings, max_words=2, trace=[], log=True)
            live = Live(stream, [Paced(list(pixels), Fraction(2))], [Fraction(2)])
            live.ask(0, Fraction(-1), "where ?")
            live.ask(0, Fraction(1), "where is it ?")
            recorder, moments = Recorder(stream, 0, stream.trace), []
            stream.never[:] = True
            stream.never[9] = False  # both models say the same word, twice
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                while happened := live.step():
                    moments += recorder.note(happened[0], None, moments[-1] if moments else None, 0.0)
            apart = forward_flops(model.config, 5, 0)
            fed = len(stream.fed[0]) - 1  # <bos> was fed before anyone counted
            head = 2 * fed * model.config.dim * model.config.vocab_size
            totals[name] = (counter.get_total_flops() - apart["vit"] - apart["connector"] - head, moments[-1])
            said.append(stream.fed[0])
        assert said[0] == said[1]
        counted, last = totals["mod"]
        assert last.flops == (counted, totals["full"][0])
        assert last.entries == layer_tokens(mod.config, *last.held) and dense(mod.config).layers == "none"
        assert len(last.said) == 1 and last.frame == 4


class TestCalibration:
    def test_counts_are_what_streams_do_frame_by_frame(self, trained):
        model, words, config = load_run(trained, torch.device("cpu"))
        clips = validation_clips(config, 6)
        for threshold in (0.05, 0.5, 0.98):
            on_time = missed = false = quiet = 0
            for clip in clips:
                stream = Stream(model, words, frames=9, text=300, settings=StreamConfig(threshold=threshold), max_words=3)
                for t, picture in enumerate(clip.frames):
                    said = [say for say in clip.said if say.frame == t]
                    [reply] = stream.frame(torch.from_numpy(picture)[None])
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


def test_a_short_soak(trained, tmp_path, capsys):
    """What the hundred thousand frames of the real one show, in small: memory and latency flat, nothing drifts."""
    flags = ["--checkpoint", str(trained), "--frames", "360", "--block", "90", "--window", "3", "--threshold", "0", "--out", str(tmp_path)]
    assert soak.main(flags) == 0
    results = json.loads((tmp_path / "soak.json").read_text())
    assert [block["frames"] for block in results["blocks"]] == [90, 180, 270, 360]
    # Three frames of 26 tokens, at most two turns of text after each, and <bos>.
    assert results["furthest"] < 1 + 4 * (26 + 2 * 5 + 5)
    rss = [block["rss"] for block in results["blocks"]]
    assert max(rss[1:]) - rss[1] < 20e6
    assert 0.6 < results["old_to_fresh"] < 1.6
    assert sum(block["narrations"][1] + block["silent"][1] for block in results["blocks"]) == 360
    assert (tmp_path / "soak.md").read_text() == soak.report(results) and "| answers right |" in soak.report(results)
    refused(soak.main, [*flags, "--frames", "100"], capsys, "expected three blocks")


def test_windows_are_measured_once_and_never_mixed(trained, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.setattr(windows, "WINDOWS", (2, 3))
    flags = ["--frames", "12", "--out", str(tmp_path)]
    assert windows.main([*flags, "--checkpoint", str(trained)]) == 0
    assert "10 streams of 12 frames" in capsys.readouterr().out
    assert windows.main([*flags, "--checkpoint", str(trained)]) == 0
    assert "0 streams of 12 frames" in capsys.readouterr().out
    results = json.loads((tmp_path / "windows.json").read_text())
    assert all(sum(one[name][1] for name in ("narrations", "silent")) == 12 for rule in results["rules"].values() for one in rule.values())
    other = shutil.copytree(trained, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["data"]["noise"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    refused(windows.main, [*flags, "--checkpoint", str(other)], capsys, "of 12 frames of run", "--overwrite")


def test_a_soak_notices_what_drifts(trained):
    model, words, config = load_run(trained, torch.device("cpu"))
    watched = soak.Watched(model, words, StreamConfig(window=2), 3, 9)
    for clip in validation_clips(config, 1):
        watched.see(type(clip)(clip.frames[:1], [], None, [{}]), soak.Block())
    watched.check()
    watched.stream.position[0] += 1
    with pytest.raises(RuntimeError, match="positions drifted"):
        watched.check()


def test_the_gap_is_nothing_after_the_first_layer_and_something_above(tmp_path, trained):
    """At contiguous positions the first layer's keys are those of a fresh pass; above, they remember what has gone."""
    model, words, config = load_run(trained, torch.device("cpu"))

    class Bar:
        def update(self):
            pass

    gaps = {name: gap.measure(model, words, config, StreamConfig(window=3, **rule), 26, Bar()) for name, rule in gap.RULES.items()}
    for name, measured in gaps.items():
        assert (measured["states"][0] < 1e-5) == name.startswith("contiguous"), name
        assert all(value > 1e-4 for value in measured["states"][1:])
        assert measured["frames"] == 4 and 0 < measured["kept"] <= 1
    everything = gap.measure(model, words, config, StreamConfig(window=12, sinks=14), 26, Bar())
    assert max(everything["states"]) < 1e-4, "while nothing has been forgotten there is no gap"
    assert vocabulary().words == words.words and small_config().depth == 4
