"""What is measured: costs of training and streaming, long streams, and what only a GPU can tell."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_tiny
from mod.config import Config, ModelConfig
from mod.live.settings import StreamConfig
from mod.run import load_run
from mod.study import bench, bench_report, gap, gpu, machine, soak, windows
from mod.study.machine import Machine
from tests.test_scripts import QUICK, refused

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "run"
    assert train_tiny.main([*QUICK, "--out", str(out), "--seed", "3", "--max-words", "3"]) == 0
    return out


class Bar:
    def update(self):
        pass


class TestBench:
    def test_quick_bench_prints_tables_and_json(self):
        done = subprocess.run([sys.executable, "-m", "mod.study.bench", "--quick"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])
        assert done.stdout.count("| decoder |") == 3 and set(results["sizes"]) == {"tiny", "middle"}
        for size in results["sizes"].values():
            assert size["training"]["time_ratio"] > 0 and size["training"]["flop_ratio"] < 0.7
            assert size["training"]["mfu"] is None, "nobody knows this machine's peak"
            for point in size["streaming"]:
                frame, word = point["frame"], point["word"]
                assert frame["seconds"]["mod"] > 0 and word["seconds"]["mod"] > 0
                assert frame["flop_ratio"] < word["flop_ratio"], "text runs through every layer"
                assert frame["flop_ratio"] < frame["read_ratio"] < 1, "all weights are read, however few the tokens"
        filled = results["filled"]["frames"]
        assert filled["mod"] / filled["full"] == pytest.approx(1 / 0.6, abs=0.05)

    def test_results_become_tables_and_a_figure(self, tmp_path):
        results = json.loads((ROOT / "results/bench-cpu.json").read_text())
        assert (ROOT / "results/bench-cpu.md").read_text() == bench_report.report(results)
        bench_report.plot(results, tmp_path / "bench.png")
        assert (tmp_path / "bench.png").stat().st_size > 10_000

    def test_a_gpus_table_has_milliseconds_and_the_share_of_its_peak(self):
        pair = {"mod": 0.002, "full": 0.004}
        step = {"rows": 1, "tokens": 9, "time_ratio": 0.5, "flop_ratio": 0.6, "seconds": pair, "mfu": {"mod": 0.25, "full": 0.5}}
        chunk = {"time_ratio": 0.5, "flop_ratio": 0.6, "read_ratio": 0.7, "seconds": pair}
        point = {"context": 1000, "kv_bytes": {"mod": 6, "full": 10}, "frame": chunk, "word": chunk}
        memory = {"peak_bytes": {"mod": 2**20, "full": 2**21}, "peak_ratio": 0.5, "saved_ratio": 0.6}
        results = {"device": "NVIDIA H100", "dtype": "bfloat16", "compile": True, "torch": "2", "threads": 1,
                   "sizes": {"large": {"training": step, "memory": memory, "streaming": [point]}},
                   "filled": {"budget_bytes": 2**20, "frames": {"mod": 5, "full": 3}, "ratio": 1.67}}
        text = bench_report.report(results)
        assert "| 2.00 / 4.00 | 25.0 / 50.0 | 1 / 2 |" in text and text.count("| 2.00 / 4.00 |") == 3
        assert text.startswith("NVIDIA H100, bfloat16, compiled") and "MFU" in text

    def test_mistakes_are_told(self, capsys):
        refused(bench.main, ["--dtype", "bfloat16"], capsys, "expected float32")
        refused(bench.main, ["--threads", "0"], capsys, "threads must be at least 1")
        if not torch.cuda.is_available():
            refused(bench.main, ["--device", "cuda"], capsys, "no CUDA GPU")

    def test_skipping_to_a_context_is_as_long_as_going_there(self):
        gone, skipped = (bench.Live(Machine(), ModelConfig(depth=2)) for _ in range(2))
        for _ in range(3):
            gone.step()
        skipped.skip_to(3)
        assert gone.cache.entries() == skipped.cache.entries() and gone.position == skipped.position
        for one in (gone, skipped):
            one.say()
            assert one.cache.entries() == [3 * 26 + 1, 3 * 6 + 1]
            one.undo()
            one.step()
        assert gone.cache.entries() == skipped.cache.entries() == [4 * 26, 4 * 6]

    def test_a_stream_that_is_undone_computes_the_same_again(self):
        live = bench.Live(Machine(), ModelConfig(depth=2))
        live.step()
        first = live.feed(*live.frame)
        live.undo()
        live.say()
        live.undo()
        assert torch.equal(first, live.feed(*live.frame))

    def test_a_short_action_is_repeated_and_undone_each_time(self):
        class Clock(Machine):
            def clock(self, action):
                action()
                return 0.02

        done = []
        actions, undo = ({name: lambda name=name, sign=sign: done.append(sign + name) for name in "ab"} for sign in ("", "-"))
        times = machine.side_by_side(Clock(), actions, 2, Bar(), undo)
        assert times == {"a": [pytest.approx(0.02)] * 2, "b": [pytest.approx(0.02)] * 2}
        assert done == (["a", "-a"] * 3 + ["b", "-b"] * 3) * 3, "two turns after one that warms up"

    def test_a_cards_peak_is_found_by_its_name(self, monkeypatch):
        one = Machine()
        assert one.peak_flops is None
        one.device, one.dtype = "cuda", torch.bfloat16
        for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12), ("X", None)):
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
            assert one.peak_flops == peak


class TestGpu:
    def test_a_rehearsal_on_a_cpu_does_every_part(self, tmp_path, capsys):
        assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
        results = json.loads((tmp_path / "gpu.json").read_text())
        assert list(results["parts"]) == list(gpu.PARTS) and not any("failed" in found for found in results["parts"].values())
        assert set(results["parts"]["waits"].values()) == {"nothing"}
        assert results["parts"]["compiled"]["compile"] and not results["parts"]["bench"]["compile"]
        text = (tmp_path / "gpu.md").read_text()
        assert text == gpu.report(results) and results["device"] in text.splitlines()[0] and text.count("| decoder |") == 12

    def test_a_part_that_fails_or_hangs_says_so(self, monkeypatch):
        monkeypatch.setitem(gpu.PARTS, "waits", ("What waits", 0.01, None))
        found = gpu.apart("waits", gpu.Trial("cpu", True))
        assert found == {"failed": "took longer than 0.01 s"}
        assert "Nothing was measured: took longer" in gpu.report({"device": "X", "parts": {"waits": found}})
        if not torch.cuda.is_available():
            assert "no CUDA GPU is here" in gpu.apart("bench", gpu.Trial("cuda", True))["failed"]

    def test_it_takes_at_most_eight_minutes(self, capsys):
        assert sum(limit for _, limit, _ in gpu.PARTS.values()) <= 480
        if not torch.cuda.is_available():
            refused(gpu.main, [], capsys, "no CUDA GPU")


class TestLongStreams:
    def test_a_short_soak(self, trained, tmp_path, capsys):
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

    def test_a_soak_notices_what_drifts(self, trained):
        model, source, _ = load_run(trained, torch.device("cpu"))
        watched = soak.Watched(model, source.words, StreamConfig(window=2), 3)
        for clip in source.validation(1):
            watched.see(type(clip)(clip.frames[:1], [], None, [{}]), soak.Block())
        watched.check()
        watched.stream.position[0] += 1
        with pytest.raises(RuntimeError, match="positions drifted"):
            watched.check()

    def test_windows_are_measured_once_and_never_mixed(self, trained, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(windows, "WINDOWS", (2, 3))
        flags = ["--frames", "12", "--out", str(tmp_path)]
        for number in (10, 0):
            assert windows.main([*flags, "--checkpoint", str(trained)]) == 0
            assert f"{number} streams of 12 frames" in capsys.readouterr().out
        results = json.loads((tmp_path / "windows.json").read_text())
        assert all(sum(one[name][1] for name in ("narrations", "silent")) == 12 for rule in results["rules"].values() for one in rule.values())
        other = shutil.copytree(trained, tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        config["data"]["noise"] = 0.5
        (other / "config.json").write_text(json.dumps(config))
        refused(windows.main, [*flags, "--checkpoint", str(other)], capsys, "of 12 frames of run", "--overwrite")

    def test_the_gap_is_nothing_after_the_first_layer_and_something_above(self, trained):
        """At contiguous positions the first layer's keys are those of a fresh pass; above, they remember what has gone."""
        model, source, config = load_run(trained, torch.device("cpu"))
        gaps = {name: gap.measure(model, source.words, config, StreamConfig(window=3, **rule), 26, Bar()) for name, rule in gap.RULES.items()}
        for name, measured in gaps.items():
            assert (measured["states"][0] < 1e-5) == name.startswith("contiguous"), name
            assert all(value > 1e-4 for value in measured["states"][1:])
            assert measured["frames"] == 4 and 0 < measured["kept"] <= 1
        everything = gap.measure(model, source.words, config, StreamConfig(window=12, sinks=14), 26, Bar())
        assert max(everything["states"]) < 1e-4, "while nothing has been forgotten there is no gap"
        assert isinstance(config, Config) and not math.isnan(everything["silence"])

    def test_the_gap_is_published(self, trained, tmp_path, capsys):
        flags = ["--checkpoint", str(trained), "--frames", "20", "--window", "3", "--out", str(tmp_path)]
        assert gap.main(flags) == 0
        assert (tmp_path / "gap.md").read_text() == gap.report(json.loads((tmp_path / "gap.json").read_text()))
        refused(gap.main, [*flags, "--window", "9"], capsys, "got 20 frames and a window of 9")
