"""The two scripts as a user runs them: what they write, and one sentence with exit code 2 for every mistake."""

import io
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

import stream_tiny
import train_tiny
from mod.config import UserError
from mod.data import synthetic
from mod.live.picture import save
from mod.run import read_config, read_tensors, run_script, write_tensors, write_text

ROOT = Path(__file__).parent.parent

QUICK = ["--steps", "4", "--batch-size", "2", "--vit-steps", "2", "--frames", "4", "--eval-clips", "4", "--eval-every",
         "2", "--device", "cpu"]
METRICS = {
    "narration_exact", "question_accuracy", "speak_accuracy", "silence_accuracy", "lm_ppl", "time_diff", "fluency",
    "lm_correctness", "free_running", "flop_ratio", "kv_ratio", "seconds", "steps", "params", "seed",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("scripts") / "run"
    assert train_tiny.main([*QUICK, "--out", str(out), "--seed", "3"]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def refused(main, arguments, capsys, *parts):
    """The script says one sentence on stderr, with all `parts` in it, and ends with exit code 2."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and "Traceback" not in error
    for part in parts:
        assert part in error, error


def test_training_writes_everything(trained):
    names = {"config.json", "model.safetensors", "state.safetensors", "log.jsonl", "metrics.json"}
    assert {path.name for path in trained.iterdir()} == names
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics) >= METRICS
    of_the_run = {"free_running", "flop_ratio", "kv_ratio", "seconds", "steps", "params", "seed"}
    assert set(metrics["free_running"]) >= METRICS - of_the_run
    assert metrics["steps"] == 4 and metrics["seed"] == 3 and 0.6 < metrics["kv_ratio"] < 1
    config = json.loads((trained / "config.json").read_text())
    assert config["world"] == "core" and config["data"]["frames"] == 4 and config["train"]["seed"] == 3
    kinds = [json.loads(line)["kind"] for line in (trained / "log.jsonl").open()]
    assert kinds == ["warm-up", "eval", "train", "eval"]


def test_training_prints_plan_and_table(trained, capsys, tmp_path):
    assert train_tiny.main([*QUICK, "--steps", "0", "--vit-steps", "0", "--out", str(tmp_path / "zero")]) == 0
    out = capsys.readouterr().out
    for part in ("parameters", "vit_dim 64", "decoder FLOPs", "full computation", "0 steps", "teacher-forced",
                 "free-running"):
        assert part in out
    assert "KV cache" in out and "stream_tiny.py --checkpoint" in out


def test_an_existing_run_is_never_overwritten_unasked(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refused(train_tiny.main, [*QUICK, "--out", str(run)], capsys, "already holds a run", "--resume", "--overwrite")
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    assert train_tiny.main([*QUICK, "--out", str(run), "--overwrite", "--seed", "4"]) == 0
    assert json.loads((run / "metrics.json").read_text())["seed"] == 4


def test_resume_goes_on_and_refuses_another_architecture(run, capsys):
    before = (run / "model.safetensors").read_bytes()
    for flags, parts in (
        (["--dim", "48"], ["dim got 48", "has 96", "resume without --dim"]),
        (["--gate", "score-update"], ["gate got score-update", "has sigmoid-value"]),
        (["--frames", "5"], ["frames got 5", "has 4"]),
        (["--optimizer", "adamw"], ["optimizer got adamw", "has muon", "resume without --optimizer"]),
        (["--vit-lr", "0.001"], ["vit_lr got 0.001", "has 0.0", "resume without --vit-lr"]),
        (["--seed", "8"], ["seed got 8", "has 3"]),
        (["--steps", "2"], ["at step 4 already", "--steps 2"]),
        (["--lr", "0.5"], ["lr got 0.5", "has finished its 4 steps", "--steps"]),
        (["--preset", "tiny"], ["--preset got tiny", "goes on as it began"]),
        (["--overwrite"], ["not allowed with argument"]),
    ):
        refused(train_tiny.main, ["--out", str(run), "--resume", *flags], capsys, *parts)
    refused(train_tiny.main, ["--out", str(run / "no"), "--resume"], capsys, "no run in", "config.json is missing")
    assert (run / "model.safetensors").read_bytes() == before
    assert train_tiny.main(["--out", str(run), "--resume", "--steps", "6"]) == 0
    assert json.loads((run / "metrics.json").read_text())["steps"] == 6
    assert "resuming" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--keep-ratio", "1.5"], ["keep ratio must be in (0, 1], got 1.5"]),
        (["--keep-ratio", "0"], ["keep ratio must be in (0, 1], got 0.0"]),
        (["--layers", "sometimes"], ["layers got 'sometimes'", "interleaved"]),
        (["--layers", "1,9"], ["layers got '1,9'", "4 layers"]),
        (["--steps", "-5"], ["steps must be at least 0, got -5"]),
        (["--steps", "many"], ["invalid int value: 'many'"]),
        (["--select", "best"], ["select got 'best'", "learned or random or uniform"]),
        (["--gate", "open"], ["invalid choice: 'open'"]),
        (["--lr", "inf"], ["lr must be finite"]),
        (["--seed", str(10**30)], ["seed must be below"]),
        (["--image-size", "8", "--grid", "1"], ["image_size must be at least 20"]),
        (["--batch-size", "0"], ["batch_size must be at least 1"]),
        (["--lr", "0"], ["lr must be at least"]),
        (["--frames", "0"], ["frames must be at least 1"]),
        (["--device", "cuda", "--dtype", "bfloat16"], ["cuda"]),
        (["--dtype", "bfloat16", "--device", "cpu"], ["needs a CUDA GPU"]),
        (["--keep-ration", "0.5"], ["unknown flag --keep-ration", "did you mean --keep-ratio"]),
        (["--event-rate", "1.5"], ["event_rate must be from 0 to 1, got 1.5"]),
        (["--fsdp"], ["fsdp splits matrices", "--optimizer adamw"]),
        (["--vocab-size", "10"], ["vocab_size must be at least"]),
    ],
)
def test_bad_training_flags(flags, parts, capsys, tmp_path):
    if flags[:2] == ["--device", "cuda"] and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    refused(train_tiny.main, [*flags, "--out", str(tmp_path / "run")], capsys, *parts)
    assert not (tmp_path / "run").exists()


def test_out_that_is_a_file_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    refused(train_tiny.main, [*QUICK, "--out", str(tmp_path / "file" / "run")], capsys, "file")
    refused(train_tiny.main, [*QUICK, "--out", str(tmp_path / "file")], capsys, "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_streaming_prints_every_frame_truth_and_cache(trained, capsys):
    flags = ["--checkpoint", str(trained), "--ask", "2:where is it?", "--ask", "1.5s:where did it appear ?",
             "--ask", "start:where is it ?"]
    assert stream_tiny.main([*flags, "--seed", "5", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "user: where is it ?" in out and "user: where did it appear ?" in out
    for part in ("truth", "frames per second", "entries in layers 0 to 3", "full computation"):
        assert part in out


@pytest.mark.parametrize("frames", [1, 6])
def test_the_table_and_the_cache_agree(trained, capsys, frames):
    """A line for each frame with its time, what is said and its truth, and the question after its frame; the entries at
    the end are the formula's for exactly these words."""
    flags = ["--checkpoint", str(trained), "--frames", str(frames), "--ask", "0:where is it ?", "--seed", "2"]
    assert stream_tiny.main(flags) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    config, text = read_config(trained), 1
    clips = list(islice(synthetic(config).live(2), frames))

    def said(when, truth):
        """What the next line says was said at this time."""
        line = lines.pop(0)
        assert line.startswith(f"{when:<16}   ") and line.removesuffix("   <- differs").endswith(f" {truth}"), line
        words = line[19:].removesuffix("   <- differs").removesuffix(truth).split()
        assert line.endswith("<- differs") == (" ".join(words) != truth)
        return words

    for t, clip in enumerate(clips):
        narration = said(f"{t:>5} {t / 2:>6.2f} s", clip.said[0].text if clip.said else ".")
        text += 0 if narration == ["."] else 2 + len(narration)
        if t == 0:
            assert lines.pop(0).split() == ["user:", "where", "is", "it", "?"]
            answer = said("", clip.truth[0]["where is it ?"])
            text += 5 + 2 + (0 if answer == ["."] else len(answer))
    entries = next(line for line in lines if line.startswith("cache:")).removeprefix("cache: ").split(" entries")[0]
    assert [int(entry) for entry in entries.split()] == [kept * frames + text for kept in config.model.keep_counts]


def test_streaming_is_reproducible(trained, capsys):
    outs = []
    for seed in ("9", "9", "10"):
        assert stream_tiny.main(["--checkpoint", str(trained), "--seed", seed]) == 0
        outs.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("right:")])
    assert outs[0] == outs[1] != outs[2] and outs[0]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--ask", "99:where is it ?"], ["--ask got '99:where is it ?'", "frames 0 to 3"]),
        (["--ask", "7.5s:where is it ?"], ["frames 0 to 3", "1.5 s"]),
        (["--ask", "where is it ?"], ["expected WHEN:WORDS"]),
        (["--ask", "x:where is it ?"], ["expected WHEN:WORDS"]),
        (["--ask", "-1:where is it ?"], ["frames 0 to 3"]),
        (["--ask", "1:"], ["expected WHEN:WORDS"]),
        (["--ask", "1:what is love ?"], ["unknown word 'what'", "known words"]),
        (["--ask", "infs:where ?"], ["expected WHEN:WORDS"]),
        (["--ask", "-0.4s:where ?"], ["frames 0 to 3"]),
        (["--threshold", "2"], ["threshold must be from 0 to 1, got 2.0"]),
        (["--frames", "0"], ["--frames got 0", "at least 1"]),
        (["--seed", "-1"], ["--seed got -1", "at least 0"]),
        (["--chekpoint", "x"], ["did you mean --checkpoint"]),
    ],
)
def test_bad_streaming_flags(trained, flags, parts, capsys):
    refused(stream_tiny.main, ["--checkpoint", str(trained), *flags], capsys, *parts)


def test_missing_foreign_and_truncated_checkpoints(run, tmp_path, capsys):
    def stream(*parts):
        refused(stream_tiny.main, ["--checkpoint", str(run)], capsys, *parts)

    refused(stream_tiny.main, ["--checkpoint", str(tmp_path / "nothing")], capsys, "no run in", "train first")
    weights, config = run / "model.safetensors", run / "config.json"
    whole, tensors = weights.read_bytes(), read_tensors(weights)[0]
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        stream("is damaged or no safetensors file")
    weights.unlink()
    stream("is not finished", "--resume")
    name = "decoder.norm.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    stream(f"lacks the tensor {name}")
    save_file({**tensors, "extra": tensors[name].clone()}, weights)
    stream("unknown tensor extra")
    save_file({**tensors, name: tensors[name][:3].clone()}, weights)
    stream(f"{name} is (3,), expected (96,)")
    weights.write_bytes(whole)
    original = config.read_text()
    wrong = [("\"dim\"", "\"width\""), ("0.2", "7.0"), ("\"dim\": 96", "\"dim\": \"96x\""), ("\"muon\"", "5"),
             ("\"cpu\"", "\"tpu\""), ("\"core\"", "\"moon\"")]
    for text in ("", "{", "[]", '{"model": {}}', *(original.replace(*pair) for pair in wrong)):
        assert text != original
        config.write_text(text)
        stream("is not the configuration of a run")


def test_a_run_without_its_state_or_its_end_is_told(run, capsys):
    model = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    refused(stream_tiny.main, ["--checkpoint", str(run)], capsys, "is not finished", "--resume")
    (run / "model.safetensors").write_bytes(model)
    (run / "state.safetensors").unlink()
    refused(train_tiny.main, ["--out", str(run), "--resume", "--steps", "6"], capsys, "state.safetensors is missing")
    assert (run / "model.safetensors").read_bytes() == model


def test_a_cut_log_and_a_resumed_end_leave_one_line_of_each(run):
    """A crash may cut the log anywhere; resuming a finished run evaluates its end again, and logs it once."""
    log = run / "log.jsonl"
    log.write_text(log.read_text() + '{"kind": "train", "step": 4, "recall": {"1": 0.2}\n' + "[]\n")
    assert train_tiny.main(["--out", str(run), "--resume"]) == 0
    entries = [json.loads(line) for line in log.open()]
    kinds = [(entry["kind"], entry["step"]) for entry in entries]
    assert kinds == [("warm-up", 0), ("eval", 2), ("train", 4), ("eval", 4)]


def test_ctrl_c_anywhere_is_one_sentence(trained, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mod.train.warm_up_vit", interrupt)
    assert train_tiny.main([*QUICK, "--out", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr("mod.stream.Stream.narrate", interrupt)
    assert stream_tiny.main(["--checkpoint", str(trained)]) == 130


def test_a_diverged_run_stops_with_one_sentence(tmp_path, capsys):
    hasty = ["--steps", "60", "--lr", "1e30", "--adam-lr", "1e30", "--out", str(tmp_path / "r")]
    refused(train_tiny.main, [*QUICK, *hasty], capsys, "the loss became")


def test_damaged_training_state_is_told(run, capsys):
    state = run / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    model = (run / "model.safetensors").read_bytes()
    refused(train_tiny.main, ["--out", str(run), "--resume", "--steps", "6"], capsys, "is damaged")
    shutil.copy(run / "model.safetensors", state)
    refused(train_tiny.main, ["--out", str(run), "--resume", "--steps", "6"], capsys, "is no training state")
    assert (run / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("main", [train_tiny.main, stream_tiny.main])
def test_help_names_every_flag(main, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    wanted = {
        train_tiny.main: "out steps seed batch-size lr frames keep-ratio layers select gate device dtype compile "
                         "resume overwrite eval-every",
        stream_tiny.main: "checkpoint seed frames ask threshold device dtype compile",
    }[main]
    for flag in wanted.split():
        assert f"--{flag}" in out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_an_output_that_cannot_show_a_character_shows_another(encoding, monkeypatch):
    """On a terminal of another encoding a stream goes on, and so do errors about a file's name."""
    bytes_of = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, raw in bytes_of.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, errors="strict"))

    def script():
        print("a red disc \N{grinning face} appears, caf\xe9 \udc80")
        raise UserError("got \N{snowman}\udcff.mp4, expected a video")

    assert run_script(script, "stream_tiny.py") == 2
    for name in bytes_of:
        getattr(sys, name).flush()
    assert bytes_of["stdout"].getvalue().startswith(b"a red disc ? appears, caf") and bytes_of["stdout"].getvalue().endswith(b" ?\n")
    assert bytes_of["stderr"].getvalue() == b"stream_tiny.py: got ??.mp4, expected a video\n"


def test_the_methods_are_listed_in_ascii():
    """Their names and formulas hold characters that not every terminal has."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train_tiny.py", "--method", "list"], cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 0 and len(done.stdout) > 500 and b"Traceback" not in done.stderr


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    """255 bytes; the temporary name that is written first must not be longer."""
    for name in ("x" * 250 + ".json", "\N{hiragana letter a}" * 83 + ".json", "\N{grinning face}" * 62 + ".json"):
        write_text(tmp_path / name, "{}")
        write_tensors(tmp_path / name, {"a": torch.ones(2)})
        assert read_tensors(tmp_path / name)[0]["a"].tolist() == [1, 1]
    picture = tmp_path / ("x" * 251 + ".png")
    save(Figure(), picture)
    assert picture.is_file() and len(list(tmp_path.iterdir())) == 4
