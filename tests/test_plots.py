"""The pictures of a run: what is drawn is what was measured, what was counted lies on the formulas' lines."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_tiny
from mod.config import Config, ModelConfig, UserError
from mod.data import make_clip, recall, synthetic
from mod.decoder import Routing
from mod.evaluate import teacher_forced
from mod.live.costs import dense
from mod.real.lora import add_lora
from mod.study import looks, plots
from mod.study.costs import decoder_flops, kv_bytes
from mod.study.looks import FULL, THIS, Costs, Kept, Look, sprite_tokens, text_tokens
from mod.study.machine import Machine
from mod.videollm import VideoLLM
from tests.helpers import loud
from tests.test_scripts import QUICK, refused

MINI = {"image_size": 20, "patch_size": 4, "vit_dim": 16, "vit_depth": 1, "vit_heads": 2, "vit_hidden": 24, "dim": 24, "head_dim": 6,
        "ffn_hidden": 40}
LAYOUTS = ["interleaved", "none", "keep:1,0.2,0,0.5"]
NAMES = {"curve", "keeps", "scores", "cost", "latency"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("plots") / "run"
    assert train_tiny.main([*QUICK, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(looks, "CLIPS", 6)
    monkeypatch.setattr(looks, "ROWS", 4)


def make_look(layers: str = "interleaved", clips: int = 6, **changes) -> Look:
    config = Config(ModelConfig(**{**MINI, "layers": layers, **changes}))
    torch.manual_seed(0)
    model = loud(VideoLLM(config.model)).eval()
    models = {FULL: model} if layers == "none" else {THIS: model, FULL: VideoLLM(dense(config.model)).eval()}
    some = [make_clip(config.data, config.model, "test", 0, index, 4) for index in range(clips)]
    return Look(config, synthetic(config), models, some, Machine())


def panels(figure) -> dict:
    """Axes that show data, by the beginning of their title."""
    return {axis.get_title().split(":")[0].split(",")[0]: axis for axis in figure.axes if axis.axison}


def line(axis, label: str):
    [found] = [each for each in axis.lines if each.get_label() == label]
    return found


def sentences(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes if not axis.axison for text in axis.texts]


def test_the_command_draws_everything_into_out_alone(run, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    out = tmp_path / "new" / "pictures"
    assert plots.main(["--checkpoint", str(run), "--out", str(out), "--frames", "5", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "6 clips" in said[0] and "5 frames" in said[0] and "on cpu" in said[0], "first of all"
    assert said[1:] == [f"wrote {out / name}.png" for name in ("curve", "keeps", "scores", "cost", "latency")]
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in NAMES}
    assert all(path.stat().st_size > 10_000 for path in out.iterdir())
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    assert plots.main(["--checkpoint", str(run), "--frames", "1", "--device", "cpu"]) == 0
    assert {path.name for path in run.iterdir()} == {*before, *(f"{name}.png" for name in NAMES)}


def test_bad_input_is_one_sentence(run, tmp_path, capsys):
    def bad(*arguments_and_parts, out=tmp_path / "out"):
        arguments, parts = arguments_and_parts
        refused(plots.main, ["--out", str(out), "--device", "cpu", *arguments], capsys, *parts)
        assert not out.is_dir()

    this = ["--checkpoint", str(run)]
    bad(["--checkpoint", str(tmp_path / "none")], ["no run in", "train first"])
    bad([*this, "--frames", "0"], ["--frames got 0", "at least 1"])
    bad([*this, "--frames", "few"], ["invalid int value: 'few'"])
    bad([*this, "--dtype", "bfloat16"], ["needs a CUDA GPU"])
    bad([*this, "--frame", "3"], ["did you mean --frames"])
    bad(["--chekpoint", "x"], ["did you mean --checkpoint"])
    (tmp_path / "file").write_text("precious")
    bad(this, ["file"], out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    log = run / "log.jsonl"
    for text in ("[1]\n", '{"kind": "train", "st'):
        log.write_text(text)
        bad(this, ["log.jsonl is damaged"])
    log.unlink()
    bad(this, ["log.jsonl is missing"])
    (run / "model.safetensors").unlink()
    bad(this, ["is not finished", "--resume"])


def test_the_curve_is_the_log(run):
    entries = [json.loads(each) for each in (run / "log.jsonl").read_text().splitlines()]
    loss, accuracy, recall = plots.curve(run).axes
    train, evals = ([e for e in entries if e["kind"] == kind] for kind in ("train", "eval"))
    assert line(loss, "text (LM loss)").get_xydata().tolist() == [[e["step"], e["lm"]] for e in train]
    assert line(accuracy, "answers right").get_xydata().tolist() == [[e["step"], e["question_accuracy"]] for e in evals]
    assert line(recall, "layer 3").get_xydata().tolist() == [[e["step"], e["recall"]["3"]] for e in train]


def test_an_untrained_run_has_a_curve_without_losses(run):
    log = run / "log.jsonl"
    log.write_text("".join(each + "\n" for each in log.read_text().splitlines() if '"train"' not in each))
    loss, accuracy, recall = plots.curve(run).axes
    assert not loss.get_visible() and accuracy.get_visible() and not recall.get_visible()


@pytest.mark.parametrize("layers", ["interleaved", "keep:1,0.2,0,0.5"])
def test_keeps_by_layer_is_the_evaluations_recall(layers):
    look = make_look(layers)
    kept, trace = look.kept(), []
    teacher_forced(look.model, look.source.words, look.clips, trace=trace)
    expected = {int(layer): share for layer, share in recall(5, trace, look.clips).items()}
    figure = looks.keeps([], look.config.model, kept)
    axis = panels(figure)["When trained"]
    found, precision = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert found == pytest.approx(list(expected.values())) and len(expected) == (2 if layers == "interleaved" else 3)
    kept_by_chance, sprites = ([segment[0, 1] if segment.ndim == 2 else math.nan for segment in each.get_segments()] for each in axis.collections)
    assert kept_by_chance == [look.config.model.keep_counts[layer] / 26 for layer in expected]
    labels = np.concatenate([clip.patch_labels[..., 0] for clip in look.clips]) > 0
    most = line(axis, "the most that is possible, sprites being few").get_ydata()
    for number, layer in enumerate(expected):
        joined = torch.cat([routing.kept for routing in trace if routing.layer == layer]).numpy()[:, 1:]
        if look.config.model.keep_counts[layer] == 0:
            assert math.isnan(precision[number]) and math.isnan(most[number])
            continue
        hits = [labels[f, p] for f in range(len(joined)) for p in range(25) if joined[f, p]]
        assert precision[number] == pytest.approx(sum(hits) / len(hits))
        assert sprites[number] == pytest.approx(labels.mean())
        ideal = sum(min(joined[f].sum(), labels[f].sum()) for f in range(len(joined)))
        assert most[number] == pytest.approx(ideal / joined.sum()) and most[number] >= precision[number]


def test_keeps_by_step_is_the_log_beside_chance():
    look = make_look("keep:1,0.2,0,0.5")
    log = [{"kind": "warm-up", "step": 0, "right": 1.0},
           {"kind": "train", "step": 20, "recall": {"1": 0.5, "2": 0.0, "3": 0.25}},
           {"kind": "train", "step": 40, "recall": {"1": None, "2": None, "3": None}},
           {"kind": "eval", "step": 40, "recall": {"1": 0.75, "2": 0.0, "3": 1.0}}]
    axis = panels(looks.keeps(log, look.config.model, look.kept()))["By training step"]
    drawn = {(tuple(each.get_xdata()), tuple(map(str, each.get_ydata()))) for each in axis.lines}
    assert ((20, 40), ("0.5", "nan")) in drawn and ((40,), ("0.75",)) in drawn and ((20, 40), ("0.25", "nan")) in drawn
    levels = {each.get_ydata()[0] for each in axis.lines if list(each.get_xdata()) == [0, 1]}
    assert levels == {0, 6 / 26, 13 / 26}
    assert axis.lines[-1].get_label() == "chance: 0, 6, 13 of 26 tokens"


@pytest.mark.parametrize("sizes", [{}, {"grid": 2}, {"image_size": 40, "patch_size": 8, "grid": 3}, {"patch_size": 2, "grid": 4}])
def test_sprite_tokens_are_those_that_recall_counts(sizes):
    """Keeping them is a recall of 1, and none of them can be spared."""
    config = Config(ModelConfig(**{**MINI, **sizes}))
    clip = make_clip(config.data, config.model, "test", 0, 1, 6)
    sprite = sprite_tokens(clip, config.model.grid)
    kept = torch.from_numpy(np.pad(sprite, ((0, 0), (1, 0))))
    assert sprite.any() and recall(config.model.grid, [Routing(1, kept, kept)], [clip]) == {"1": 1.0}
    for place in kept.nonzero().tolist():
        fewer = kept.clone()
        fewer[tuple(place)] = False
        assert recall(config.model.grid, [Routing(1, fewer, fewer)], [clip])["1"] < 1


def test_histograms_are_densities_of_the_right_tokens():
    kept = Kept({2: np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]], bool)}, {2: np.array([[0.0, 9, 8, 1, 2], [7, 1, 2, 0, 10]])},
                {2: 1.0}, np.array([[1, 0, 0, 0], [0, 0, 0, 1]], bool))
    [axis] = looks.scores(ModelConfig(), kept).axes
    assert "2 of 5 tokens" in axis.get_title()
    found = {}
    for patch in axis.patches[:3]:
        values, edges, _ = patch.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
        found[patch.get_label()] = edges[:-1][values > 0]
    assert found["patches with a sprite"] == pytest.approx([9, 9.8]) and found["CLS tokens"] == pytest.approx([0, 7])
    assert found["patches without a sprite"] == pytest.approx([0, 1, 2, 8])
    assert axis.lines[0].get_xdata()[0] == pytest.approx(7.5), "the median of 8 and 7, the lowest kept of each frame"


@pytest.mark.parametrize("select", ["random", "uniform"])
def test_scores_that_mean_nothing_say_so(select):
    look = make_look(select=select)
    title = looks.scores(look.config.model, look.kept())._suptitle.get_text()
    assert {"random": "by chance", "uniform": "spread evenly"}[select] in title


@pytest.mark.parametrize("layers", LAYOUTS)
def test_what_was_counted_lies_on_the_formulas_lines(layers):
    look = make_look(layers)
    text, config = look.text_per_frame, look.config.model
    assert text > 0
    flops, (seconds, held) = look.count_flops([1, 3, 5]), look.stream(7)
    assert set(flops) == set(held) == set(seconds) == set(look.models)
    figure = looks.cost(config, Costs(flops, held, text, 4))
    decoder, cache = figure.axes
    for name in look.models:
        sizes = config if name == THIS else dense(config)
        assert len(seconds[name]) == 7
        assert flops[name] == {n: decoder_flops(sizes, n, text_tokens(text, n)) for n in (1, 3, 5)}
        assert held[name] == {n: kv_bytes(sizes, n, text_tokens(text, n)) for n in range(1, 8)}
        for axis in (decoder, cache):
            formula = dict(line(axis, f"{name}: formula").get_xydata().tolist())
            counted = dict(line(axis, f"{name}: counted").get_xydata().tolist())
            assert len(counted) >= 3 and counted == {n: formula[n] for n in counted}
    assert "GFLOPs" in decoder.get_ylabel() and "MiB" in cache.get_ylabel() and "frames" in cache.get_xlabel()


def test_low_rank_changes_are_merged_before_anything_is_counted():
    config = ModelConfig(**MINI)
    model = VideoLLM(config).eval()
    add_lora(model.decoder, 2, 4.0)
    look = Look(Config(config), synthetic(Config(config)), {THIS: model, FULL: model}, make_look(clips=1).clips, Machine())
    assert look.count_flops([2])[THIS] == {2: decoder_flops(config, 2, text_tokens(look.text_per_frame, 2))}


def test_text_grows_with_the_stream_as_in_the_clips():
    look = make_look(clips=20)
    assert text_tokens(look.text_per_frame, 0) == 1
    said = sum(2 + len(say.text.split()) if say.role == "assistant" else 1 + len(say.text.split()) for clip in look.clips for say in clip.said)
    assert look.text_per_frame == pytest.approx(said / 80, abs=0.5 / 4), "average_text rounds to whole tokens of a clip"


def test_latency_is_relative_on_a_cpu_and_in_ms_on_a_gpu():
    seconds = {THIS: [0.5] * 40, FULL: [1.0] * 3 + [2.0] * 17 + [4.0] * 20}
    for device, unit, name in (("cpu", 2.0, "median of full computation's first 20"), ("cuda", 1e-3, "(ms)")):
        machine = SimpleNamespace(device=device, name="X", dtype_name="float32")
        [axis] = looks.latency(seconds, machine).axes
        assert name in axis.get_ylabel() and axis.get_xlabel() == "frame of the stream"
        assert line(axis, FULL).get_ydata()[[0, 15, 39]].tolist() == pytest.approx([2 / unit, 2 / unit, 4 / unit])
        assert line(axis, THIS).get_ydata() == pytest.approx(np.full(40, 0.5 / unit))
        points = [each for each in axis.lines if each.get_marker() == "s" and each.get_linewidth() == 0]
        assert points[0].get_ydata() == pytest.approx(np.array(seconds[FULL]) / unit)


@pytest.mark.parametrize("layers", LAYOUTS)
def test_a_run_is_looked_at_beside_full_computation_on_clips_it_never_saw(layers, monkeypatch):
    it = make_look(layers)
    monkeypatch.setattr("mod.study.looks.load_run", lambda *_: (it.model, it.source, it.config))
    look = Look.at_run(None, torch.device("cpu"), "float32")
    assert look.model is it.model and set(look.models) == ({FULL} if layers == "none" else {THIS, FULL})
    assert look.models[FULL].config == dense(it.config.model) and not look.models[FULL].training
    expected = [make_clip(it.config.data, it.config.model, "validation", 0, index).frames for index in range(6)]
    assert all(np.array_equal(clip.frames, frames) for clip, frames in zip(look.clips, expected, strict=True))


def test_a_run_of_another_method_is_refused(monkeypatch):
    it = make_look()
    config = SimpleNamespace(model=SimpleNamespace(method="pool"))
    monkeypatch.setattr("mod.study.looks.load_run", lambda *_: (it.model, it.source, config))
    with pytest.raises(UserError, match="of the method pool"):
        Look.at_run(None, torch.device("cpu"), "float32")


def test_a_dense_run_has_nothing_routed_to_show():
    look = make_look("none")
    figures = look.figures([{"kind": "train", "step": 4, "recall": {}}], 2)
    assert sentences(figures["keeps"]) == [looks.DENSE] * 2 and sentences(figures["scores"]) == [looks.DENSE]
    assert "this run is full computation" in figures["cost"]._suptitle.get_text()
    assert [each.get_label() for each in figures["latency"].axes[0].lines][1:] == [FULL]


def test_real_videos_have_no_truth_to_compare_with():
    look = make_look()
    for clip in look.clips:
        clip.patch_labels = None
    figures = look.figures([{"kind": "eval", "step": 4, "recall": {}}], 2)
    assert sentences(figures["keeps"]) == [looks.UNKNOWN] * 2
    for axis in figures["scores"].axes:
        assert {patch.get_label() for patch in axis.patches[:2]} == {"patches", "CLS tokens"}
    assert set(figures) == NAMES - {"curve"}
