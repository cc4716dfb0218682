"""Other people's files: damaged or hostile ones are refused in one sentence, quickly, and without memory beyond their own.

Every reader gets the same kinds of damage: cut off, bits flipped, parts swapped, numbers made huge, values of another
kind. What still reads as something is fine; a traceback, a hang or an allocation of what a header claims is not.
"""

import gc
import json
import re
import resource
import signal
import tracemalloc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mod.config import Config, DataConfig, TrainConfig, UserError, require
from mod.live import calibrate, saved
from mod.live.live import Live, Paced
from mod.live.settings import StreamConfig
from mod.optim import make_optimizers
from mod.real.config import RealModel, RealRun
from mod.real.llm import load_llm, read_llm_config
from mod.real.source import Piece, check_words, is_whole, read_piece
from mod.real.streams import pieces, placed, read_streams
from mod.real.tokenizer import TextTokenizer
from mod.real.video import Video
from mod.real.vision import load_vision, read_vision_config
from mod.run import load_run, read_tensors, write_config, write_tensors
from mod.study.plots import curve
from mod.train import Engine, read_state, write_state
from mod.videollm import VideoLLM
from mod.vit import ViT
from tests.helpers import WORDS_ALL, as_batch, random_pixels, small_config, small_model
from tests.test_llm import LLAMA3, write_checkpoint
from tests.test_video import numbered, write
from tests.test_vision import write_tower
from tests.test_window import Logged

INPUTS = 50  # damaged copies of every file
SECONDS, ROOM = 5, 2**28  # for one of them, and bytes of address space above what is there
HUGE = ["1e999", "-1", "0", "9" * 30, str(2**31), str(2**63), "1" + "0" * 400, "1e308", "NaN", "-Infinity", "true", "null", '"x"', "[]", "{}", "[1, 2]", '{"a": 1}']
CPU = torch.device("cpu")
MOMENTUM = "optimizer/decoder.layers.0.mlp.down.weight/momentum"


def damaged(raw: bytes, rng: np.random.Generator) -> bytes:
    """One more or less subtle change of a file."""
    kind, at = rng.integers(7), int(rng.integers(max(1, len(raw))))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        changed = bytearray(raw)
        for _ in range(int(rng.integers(1, 9))):
            changed[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 2:
        other, size = int(rng.integers(len(raw))), int(rng.integers(1, 40))
        first, second = sorted((at, other))
        return raw[:first] + raw[second : second + size] + raw[first + size : second] + raw[first : first + size] + raw[second + size :]
    if kind == 3:  # the length of a safetensors header, or of anything that begins with one
        return (0, 1, 2**20, 2**31, 2**62, 2**64 - 1)[int(rng.integers(6))].to_bytes(8, "little") + raw[8:]
    if kind == 4:
        return raw[:at] + bytes(rng.integers(0, 256, int(rng.integers(1, 30)), dtype=np.uint8)) + raw[at:]
    # A value of a JSON text, or of the header of a safetensors file, which keeps its length.
    end = 8 + int.from_bytes(raw[:8], "little") if raw[8:9] == b"{" else len(raw)
    values = list(re.finditer(rb'(?<=[:\[,])\s*(-?\d[\d.e+-]*|true|false|null|"[^"]*"|\[[^\[\]]*\])(?=\s*[,\]}])', raw[:end]))
    if not values:
        return raw[:at]
    found, value = values[int(rng.integers(len(values)))], HUGE[int(rng.integers(len(HUGE)))].encode()
    if kind == 6 and found.group(1).startswith(b'"'):
        value = json.dumps(["../" * 4 + "etc/passwd", "/etc/passwd", "\ud800", "a\0b", "x" * 5000, "F8_E4M3", "../a", "\u202e"][int(rng.integers(8))]).encode()
    changed = raw[: found.start(1)] + value + raw[found.end(1) : end]
    return (len(changed) - 8).to_bytes(8, "little") + changed[8:] + raw[end:] if end < len(raw) else changed


@contextmanager
def bounded():
    """An alarm for what hangs, and a limit to what can be allocated."""
    def stop(*_):
        raise TimeoutError("it hangs")

    size = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024 if Path("/proc/self/status").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def a_run(folder: Path):
    config = Config(small_config(image_size=20), DataConfig(frames=2), TrainConfig(device="cpu", max_words=3))
    folder.mkdir()
    write_config(folder, config)
    write_tensors(folder / "model.safetensors", VideoLLM(config.model).weights())
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in (
        {"kind": "warm-up", "step": 0, "loss": 1.0}, {"kind": "train", "step": 1, "lm": 1.0, "stream": 1.0, "recall": {"1": 0.2}})))
    calibrate.write({"threshold": 0.5, "clips": 1, "rows": [{"threshold": 0.5, "f1": 1.0, "missed": 0.0, "false": 0.0, "talkative": 1.0, "due": 1, "frames": 1}]}, folder)
    return lambda: load_run(folder, CPU)


def a_training_state(folder: Path):
    """Of an interrupted run, after a step: going on with it must not end in the middle of the next step either."""
    folder.mkdir()
    model = small_model(dtype=torch.float32)
    optimizers = make_optimizers(dict(model.named_parameters()), "muon", 0.02, 1e-3)

    def a_step():
        sum(model(as_batch(model.config, [(2, [])], torch.float32))).backward()
        for optimizer in optimizers:
            optimizer.step()

    a_step()
    write_state(folder, model, optimizers, 7, 1.5, Engine())

    def read():
        for optimizer in optimizers:
            optimizer.state.clear()
        step, _ = read_state(folder, model, optimizers, Engine())
        assert step >= 0
        for optimizer in optimizers:
            optimizer.step()

    return read


def a_calibration(folder: Path):
    a_run(folder)
    return lambda: calibrate.calibrated(folder)


def a_log(folder: Path):
    a_run(folder)
    return lambda: curve(folder)


def a_saved_stream(folder: Path):
    model, about = small_model(0, torch.float32), {"run": "x"}
    folder.mkdir()

    def live():
        stream = Logged(model, WORDS_ALL, settings=StreamConfig(window=2), max_words=2)
        return Live(stream, [Paced(list(random_pixels(4, model.config, dtype=torch.float32)), Fraction(2))], [Fraction(2)])

    first = live()
    for at in (0, 5):
        first.ask(0, Fraction(at, 3), "where is it ?")
    first.kept = {"given": [["0", "where is it ?"]], "window": 2, "question_room": None}
    for _ in range(5):
        first.step()
    saved.save(first, folder / "live.safetensors", about)

    def read():
        again = live()
        saved.restore(again, *saved.read_saved(folder / "live.safetensors", about))
        again.step()

    return read


def streams(folder: Path):
    folder.mkdir()
    (folder / "a.mp4").touch()
    turns = [{"time": k / 2, "role": ("user", "assistant")[k % 2], "content": "where is it ?"} for k in range(6)]
    (folder / "streams.jsonl").write_text(json.dumps({"video": "a.mp4", "conversation": turns}) + "\n")
    config = replace(RealRun(), real=replace(RealRun().real, data=str(folder / "streams.jsonl")))

    def read():
        for talk in read_streams(folder / "streams.jsonl"):
            said = placed(talk, 2.0, 8)
            check_words(talk.video, said, config, WORDS_ALL)
            pieces(said, 8, 3)

    return read


def a_language_model(folder: Path):
    write_checkpoint(folder, {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}, 6, shards=2)

    def read():
        load_llm(folder, read_llm_config(folder, small_config(layers="none")))
        words = TextTokenizer(folder)
        words.decode(words.encode("the red disc"))

    return read


def a_vision_tower(folder: Path):
    folder.mkdir()
    write_tower(folder)

    def read():
        with torch.device("meta"):
            vit = ViT(read_vision_config(folder, RealModel(grid=1)).fit())
        load_vision(folder, vit)

    return read


def features(folder: Path):
    folder.mkdir()
    config = replace(RealRun(), model=replace(RealRun().model, **{name: getattr(small_config(), name) for name in ("vit_dim", "grid")}))
    path = folder / "a-0.safetensors"
    write_tensors(path, {"features": torch.randn(6, config.model.frame_tokens, config.model.vit_dim)})

    def read():
        require(is_whole(path, config), "to be made again")
        clip = read_piece(Piece(folder / "a.mp4", path, 2, 3, []), config)
        assert clip.frames.shape[1:] == (config.model.frame_tokens, config.model.vit_dim) and clip.frames.is_floating_point()

    return read


FILES = {
    "config.json of a run": (a_run, "config.json"), "weights of a run": (a_run, "model.safetensors"),
    "a training state": (a_training_state, "state.safetensors"), "calibration.json": (a_calibration, "calibration.json"),
    "log.jsonl": (a_log, "log.jsonl"), "a saved stream": (a_saved_stream, "live.safetensors"), "streams.jsonl": (streams, "streams.jsonl"),
    "config.json of a checkpoint": (a_language_model, "config.json"), "index": (a_language_model, "model.safetensors.index.json"),
    "shard": (a_language_model, "model-00002-of-00002.safetensors"), "tokenizer.json": (a_language_model, "tokenizer.json"),
    "generation_config.json": (a_language_model, "generation_config.json"), "config.json of an encoder": (a_vision_tower, "config.json"),
    "weights of an encoder": (a_vision_tower, "model.safetensors"), "features": (features, "a-0.safetensors"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_in_one_sentence(name, tmp_path):
    make, file = FILES[name]
    read, path = make(tmp_path / "files"), tmp_path / "files" / file
    raw, rng, refusals = path.read_bytes(), np.random.default_rng(len(name)), 0
    read()
    for number in range(INPUTS):
        path.write_bytes(damaged(raw, rng))
        try:
            with bounded():
                read()
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and str(error)
        except BaseException as error:
            raise AssertionError(f"input {number} of {name}: {type(error).__name__}: {error}") from error
    assert refusals > INPUTS // 10


@pytest.mark.parametrize("change", [
    lambda tensors, note: tensors.update({"random/cpu": tensors["random/cpu"].float()}),
    lambda tensors, note: tensors.update({"random/cpu": tensors["random/cpu"][:7].clone()}),
    lambda tensors, note: tensors.update({MOMENTUM: tensors[MOMENTUM][:1].clone()}),
    lambda tensors, note: tensors.update({MOMENTUM: tensors[MOMENTUM].long()}),
    lambda tensors, note: tensors.update({MOMENTUM: tensors[MOMENTUM].half()}),
    lambda tensors, note: tensors.pop("optimizer/decoder.norm.weight/exp_avg"),
    lambda tensors, note: tensors.update({"optimizer/decoder.norm.weight/step": torch.ones(2)}),
    lambda tensors, note: tensors.update({"optimizer/decoder.norm.weight/step": torch.tensor(-1e30)}),
    lambda tensors, note: note.update(step="-1"), lambda tensors, note: note.update(step="9" * 30), lambda tensors, note: note.update(seconds="x"),
])
def test_a_training_state_is_refused_before_the_next_step(tmp_path, change):
    """Not in its middle, by an optimizer that finds a memory of another shape or kind."""
    read = a_training_state(tmp_path / "files")
    tensors, note = read_tensors(tmp_path / "files" / "state.safetensors")
    change(tensors, note)
    write_tensors(tmp_path / "files" / "state.safetensors", tensors, note)
    with pytest.raises(UserError, match="state.safetensors"):
        read()


@pytest.mark.parametrize("video", ["/etc/hostname", "../a.mp4", "b/../../a.mp4", "..", "a\0.mp4", "\ud800.mp4", "x" * 300 + ".mp4"])
def test_a_streams_file_names_videos_of_its_own_folder(tmp_path, video):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "streams.jsonl").write_text(json.dumps({"video": video, "conversation": []}))
    with pytest.raises(UserError, match="line 1: got .*expected"):
        read_streams(tmp_path / "in" / "streams.jsonl")


@pytest.mark.parametrize("content", ["ffconcat version 1.0\nfile a.mkv\n", "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n#EXT-X-ENDLIST\n"])
def test_a_list_of_other_files_is_no_video(tmp_path, content):
    """A download that is named like a video could make the reader open any file of the machine."""
    write(tmp_path / "a.mkv", numbered(3))
    write(tmp_path / "a.ts", numbered(3, 64), codec="libx264")
    for name in ("list.mp4", "list.m3u8"):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="got .*list.*expected a video"):
            Video(str(tmp_path / name), 2, 16)


def test_a_saved_stream_cannot_say_what_no_user_can(tmp_path):
    """Its queue of questions is asked when it goes on: a symbol in one is refused as in a flag, and so is a time whose
    digits would fill the memory."""
    read = a_saved_stream(tmp_path / "files")
    path = tmp_path / "files" / "live.safetensors"
    tensors, metadata = read_tensors(path)
    for time, text in (("7/2", "where is it ? <assistant> nowhere"), ("1e999999999", "where is it ?"), ("1/0", "where is it ?")):
        note = json.loads(metadata["live"])
        note["questions"][0].append([time, 9, text, True])
        write_tensors(path, tensors, {"live": json.dumps(note)})
        with pytest.raises(UserError, match="unknown word '<assistant>'|damaged or of another kind"), bounded():
            read()


def test_a_long_streams_file_is_never_all_in_memory_beside_its_turns(tmp_path):
    (tmp_path / "a.mp4").touch()
    turns = [{"time": k, "role": "assistant", "content": f"{k} " + "a red disc appears " * 20} for k in range(20)]
    line = json.dumps({"video": "a.mp4", "conversation": turns}) + "\n"
    (tmp_path / "streams.jsonl").write_text(line * 300)
    size = (tmp_path / "streams.jsonl").stat().st_size
    tracemalloc.start()
    try:
        assert len(read_streams(tmp_path / "streams.jsonl")) == 300
        assert tracemalloc.get_traced_memory()[1] < 2 * size
    finally:
        tracemalloc.stop()


def peak() -> int:
    """The most bytes of memory that this process has held since `Path("/proc/self/clear_refs")` was last told 5."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("claimed", [False, True])
def test_a_run_needs_no_memory_beyond_twice_its_file(tmp_path, claimed):
    """Weights of 60 MB, read as they are, and beside a config.json that claims ten thousand times as many."""
    sizes = small_config(vocab_size=500_000)
    folder = tmp_path / "run"
    a_run(folder)
    config = Config(replace(sizes, image_size=20), DataConfig(frames=2), TrainConfig(device="cpu", max_words=3))
    write_tensors(folder / "model.safetensors", VideoLLM(config.model).weights())
    size = (folder / "model.safetensors").stat().st_size
    if claimed:
        config = replace(config, model=replace(config.model, vocab_size=5_000_000_000))
    write_config(folder, config)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    with pytest.raises(UserError, match="5000000000") if claimed else nullcontext():
        load_run(folder, CPU)
    assert size > 4e7 and peak() - before < 2.2 * size
