"""The studies: routers of their own, sweeps that never repeat a run, tables that say what was measured."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mod.config import Config, DataConfig, ModelConfig, TrainConfig, UserError
from mod.data import COLOURS, SHAPES
from mod.evaluate import teacher_forced
from mod.related.crowd import NAME_WORDS
from mod.related.data import HarderData
from mod.related.world import WORLD
from mod.run import read_tensors, write_tensors
from mod.study import ablate, crowd, division, gates, routers, seeds, sweep
from mod.study.ablate import report
from mod.study.statistics import compare, holm, judge, mean_and_error
from mod.study.sweep import Job, Variant, collect, configure, quick, same, train_here
from mod.study.tables import COLUMNS, JUDGED, MEASURES, TABLES, VARIANTS, steps_to
from mod.videollm import VideoLLM
from tests.helpers import as_batch, offline, plan_of, routed, small_config

ROOT = Path(__file__).parent.parent
STUDY = WORLD.presets["study"]
GONE = {"time_diff_paper", "fluency_paper", "shared_encoder"}  # what an older seeds.json holds besides
MINI = replace(STUDY, train=TrainConfig(steps=2, batch_size=2, vit_steps=2, eval_clips=8, eval_every=0))


def equipped(kind: str, **changes) -> VideoLLM:
    model = VideoLLM(small_config(**changes))
    routers.equip(model, kind)
    return model


OURS = VARIANTS | {"drop": replace(crowd.METHODS["drop"], train={})}  # and one with routers of its own


def job(name: str, folder: Path, base: Config = MINI, **more) -> Job:
    return Job(folder / "runs" / name, folder / f"{name}-0.json", configure(base, OURS[name], 0), OURS[name].routers, **more)


class TestRouters:
    def test_one_choice_is_made_once_and_learns_from_every_layer(self):
        """Also in a stream, frame by frame."""
        model = equipped("once", layers="keep:0.4,1,0.4,0.4").double()
        batch, trace = as_batch(model.config, [(3, []), (2, [])]), []
        offline(model, batch)
        model.hidden(batch.ids, model.see(batch.pixels), batch.plan, trace=trace)
        assert [routing.layer for routing in trace] == [0, 2, 3]
        assert all(torch.equal(routing.kept, trace[0].kept) for routing in trace)
        text, stream = model(batch)
        (text + stream).backward()
        first, *others = [layer.router for layer in routed(model)]
        assert first.w.weight.grad.abs().max() > 0 and all(one.w.weight.grad is None for one in others)
        with torch.no_grad():
            first.w.weight.neg_()
        again = []
        model.hidden(batch.ids, model.see(batch.pixels), batch.plan, trace=again)
        assert not torch.equal(again[0].kept, trace[0].kept) and torch.equal(again[2].kept, again[0].kept)

    def test_one_weight_scores_in_every_layer_and_learns_from_all_of_them(self):
        """Each layer chooses for itself. The gradient is the sum of what routers with equal weights of their own have."""
        model, apart = (VideoLLM(small_config(layers="keep:0.4,1,0.4,0.4", gate="sigmoid-read")).double() for _ in range(2))
        routers.equip(model, "shared")
        apart.load_state_dict(model.state_dict())
        experts = [layer.router for layer in routed(model)]
        assert len(experts) == 3 and all(one.w.weight is experts[0].w.weight for one in experts)
        assert sum(".router." in name for name in model.weights()) == 1
        batch, trace = as_batch(model.config, [(3, []), (2, [])]), []
        model.hidden(batch.ids, model.see(batch.pixels), batch.plan, trace=trace)
        assert not all(torch.equal(routing.kept, trace[0].kept) for routing in trace)
        for one in (model, apart):
            sum(one(batch)).backward()
        summed = sum(layer.router.w.weight.grad for layer in routed(apart))
        assert summed.abs().max() > 0 and torch.allclose(experts[0].w.weight.grad, summed)

    def test_no_other_kind_is_known(self):
        with pytest.raises(ValueError, match="expected once or shared"):
            equipped("nobody")


class TestCrowd:
    def test_ceilings_are_those_that_can_be_worked_out_by_hand(self):
        found = {looks: {name: self.ceiling(name, HarderData(crowd=10, looks=looks)) for name in crowd.VARIANTS}
                 for looks in (0.0, 1.0)}
        for name in ("full", "mod-all", "own-choice", "mod", "even", "exit-2", "skip-2", "random"):
            assert found[0.0][name] == found[1.0][name] == 1, name
        one = {name.removeprefix("one-"): share for name, share in found[0.0].items() if name.startswith("one-")}
        two = {name.removeprefix("one-"): share for name, share in found[1.0].items() if name.startswith("one-")}
        assert one["exit"] == one["skip"] == one["mod-all"] == 1
        assert one["pool"] is None and found[0.0]["pool"] is None and found[0.0]["pool-4"] is None
        # A guess is right in one of five, or a little more often, because known sprites leave less room for others.
        # The last cell is always kept; it holds a sprite in four of ten frames, and each sprite in one of 25. In turns
        # four layers keep 20 of the 25 other tokens.
        for name, known in (("drop", (5 + 0.4) / 10), ("random-all", 24 / 25 * 20 / 25 + 1 / 25),
                            ("uniform-all", 24 / 25 * 20 / 25 + 1 / 25)):
            assert known + (1 - known) / 5 < one[name] < known + (1 - known) / 3.5, name
        # One layer is one look. Of the four others of a shape two stand on the fullest of five sides; of fewer, more.
        assert 0.45 < two["exit"] == two["skip"] == found[1.0]["exit"] < 0.55
        assert 0.55 < self.ceiling("exit", HarderData(crowd=10, looks=1.0, shapes=3)) < 0.7
        # Who is kept once is followed only if the leader's layer comes after: in half of two layers, and never behind.
        assert 0.5 < two["mod-all"] < 0.8
        both = 5 / 10 * 4 / 9
        assert both + (1 - both) * 0.45 < two["drop"] < both + 0.1 + (1 - both) * 0.55

    def ceiling(self, name: str, data: HarderData) -> float | None:
        variant = crowd.VARIANTS[name]
        return crowd.ceiling(configure(crowd.BASE, variant, 0).model, variant.routers == "once", data, draws=500)

    @pytest.mark.parametrize(("kept", "cells", "told", "found"), [
        ([[1, 0, 0], [0, 1, 0]], (3, 4, 0), [], True),  # first the sprite, then its leader
        ([[0, 1, 0], [1, 0, 0]], (3, 4, 0), [], False),  # the wrong order
        ([[1, 1, 0], [0, 1, 0]], (3, 4, 0), [], True),
        ([[1, 1, 0], [1, 0, 0]], (3, 4, 0), [], False),  # the leader comes later in the frame, unread by the sprite
        ([[1, 1, 0], [1, 0, 0]], (4, 3, 0), [], True),  # the sprite has read its leader, and is then read itself
        ([[0, 0, 0], [1, 1, 0]], (4, 3, 0), [], False),  # one layer alone
        ([[1, 0, 0], [0, 0, 0]], (3, 4, 0), [1], True),  # an answer told where the leader is
        ([[0, 0, 0], [1, 0, 0]], (3, 4, 0), [1], False),  # but no layer is left to read it
        ([[1, 0, 0], [0, 0, 0]], (3, 4, 0), [2], False),  # it told of another
    ])
    def test_two_looks_need_two_layers_in_the_right_order(self, kept, cells, told, found):
        """Sprite 0 follows sprite 1; the others of its shape stand on two sides, so a guess is right in half."""
        mine, *_ = crowd.followed(np.array(cells), np.array(kept, bool), np.arange(3), told)
        assert mine == (1.0 if found else 0.5)

    def test_who_begins_with_whom_and_what_is_told_of_it(self):
        """All but those of one look begin with a dense decoder of their task, take as many steps from there, and are
        told as much. Learned routers of all layers share a weight, or the choice, unless their name says otherwise."""
        base, preset = crowd.BASE, crowd.PRESET
        for name, variant in crowd.VARIANTS.items():
            family, config = name.split("-")[0], configure(base, variant, 0)
            easy, start = family in ("one", "deep", "late"), variant.start
            assert start == ("" if family in ("one", "deep") or name.endswith("dense") else "late-dense" if easy else "dense"), name
            assert easy or name == "dense" or config.train.steps == 1400
            assert config.data == (preset if easy else base).data or name == "dense"
            learned = config.model.layers == "all" and config.model.select == "learned"
            kind = "once" if name.endswith("drop") else "shared" if learned and not easy and name != "own-weights" else ""
            assert variant.routers == kind, name
            if "mod-all" in name or "random" in name:
                assert (config.model.take_turns == 3) == easy
                assert (config.model.keep_ratio == 0.2) == easy
            assert config.model.depth == (8 if family == "deep" else 4)
            if not easy and not variant.train:  # nothing of its own
                assert config.train == base.train, name
        dense = configure(base, crowd.VARIANTS["dense"], 0)
        assert dense.data == replace(base.data, asks=6) and dense.model.layers == "none"  # asked more often
        assert configure(base, crowd.VARIANTS["mod"], 0) == base
        for name in ("mod-all", "own-weights"):
            assert configure(base, crowd.VARIANTS[name], 0).model == replace(base.model, layers="all")
        assert configure(base, crowd.VARIANTS["one-mod-all"], 0) == replace(preset, model=replace(preset.model, layers="all"))

    def test_holms_correction(self):
        """Worked by hand: .01 * 4, .02 * 3, .03 * 2, and .04 * 1, none below the one before."""
        assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
        assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.001]) == [0.001]

    def test_comparisons_pair_the_seeds_that_both_have(self):
        one, other = {"0": 0.9, "1": 0.8, "2": 0.7, "3": 0.6}, {"2": 0.4, "1": 0.45, "0": 0.5, "7": 0.0}
        row = compare({"other": (one, other)}).loc["other"]
        assert row["difference"] == "+0.350" and row["95% interval"] == "+0.226 to +0.474"
        assert row["difference / its spread"] == "+7.0" and row["p, corrected"] == "0.0067"
        # Without spread a gap is certain, unless there is none.
        alike = dict.fromkeys(one, 0.75)
        found = compare({"less": (alike, dict.fromkeys(one, 0.5)), "same": (alike, alike)})
        assert list(found["p, corrected"]) == ["< 0.0001", "1.0000"]

    def test_a_report_shows_what_is_finished_and_compares_what_has_three_seeds(self, tmp_path):
        """Without the variant that others are compared with, with too few seeds, and with enough."""
        def data(**qualities):
            values = {name: {measure: dict(enumerate(found)) for measure in crowd.MEASURES} for name, found in qualities.items()}
            return {"steps": 1, "clips": 1, "values": values, "costs": {name: crowd.costs(name, 100) for name in qualities}}

        few = data(full=[0.9, 1.0], pool=[0.5, 0.6])
        enough = data(**{"mod-all": [0.9, 0.8, 1.0], "full": [0.9, 1.0, 0.9], "drop": [0.6, 0.7, 0.6]})
        assert "minus" not in crowd.report(few) and "`full` full computation" in crowd.report(few)
        text = crowd.report(enough)
        assert "`mod-all` minus the others" in text and "| `drop` | +0.267 |" in text and "`mod` minus" not in text
        crowd.plot(json.loads(json.dumps(enough)), tmp_path / "crowd.png")
        assert (tmp_path / "crowd.png").stat().st_size > 10_000

    def test_rivals_are_variants_and_cost_no_less(self):
        spent = {name: crowd.costs(name, 100)["flops"] for name in crowd.VARIANTS}
        for one, others in crowd.RIVALS:
            for other in others:
                assert spent[other] > 0.8 * spent[one], (one, other)


def test_the_division_of_a_crowd_is_counted_as_by_hand(tmp_path):
    """Against a loop over frames, sprites and layers, on a run whose routers know nothing."""
    config = configure(quick(crowd.BASE), crowd.VARIANTS["mod-all"], 0)
    model, source = crowd.WORLD.build(config, torch.device("cpu"))
    (tmp_path / "mod-all-0").mkdir()
    write_tensors(tmp_path / "mod-all-0" / "model.safetensors", {name: p.detach() for name, p in model.weights().items()})
    result = {"config": {"world": config.world} | asdict(config), "routers": "", "question_accuracy": 0.5, "narration_exact": 0.25,
              "curve": [{"step": 1, "lm": 1.0, "recall": {"0": 0.1, "1": 0.2, "2": 0.3, "3": 0.4}}, {"step": 2, "questions": 0.5}]}
    (tmp_path / "mod-all-0.json").write_text(json.dumps(result))
    flags = division.Flags(runs=tmp_path, results=tmp_path, out=tmp_path / "division", clips=3)
    assert division.run(flags) == 0
    found, trace = json.loads((tmp_path / "division.json").read_text())["seeds"]["0"], []
    clips = source.validation(3)
    teacher_forced(model.eval(), source.words, clips, trace=trace)
    kept = {layer: torch.cat([one.kept for one in trace if one.layer == layer]) for layer in range(4)}
    seen, trails, by_name = [], [], {name: [] for name in NAME_WORDS}
    for number, labels in enumerate(label for clip in clips for label in clip.patch_labels):
        for patch, (colour, shape, _, _, trail, *_) in enumerate(labels):
            if trail:
                trails.append(any(bool(kept[layer][number, 1 + patch]) for layer in range(4)))
            if colour:
                seen.append([bool(kept[layer][number, 1 + patch]) for layer in range(4)])
                by_name[f"{list(COLOURS)[colour - 1]}-{SHAPES[shape - 1]}"].append(seen[-1])
    assert len(seen) == 3 * 4 * 10 and trails
    assert found["trails"] == pytest.approx(np.mean(trails)) and found["narrated"] == 0.25
    assert found["layers"] == pytest.approx(np.mean(seen, 0)) and found["any"] == pytest.approx(np.mean(np.any(seen, 1)))
    for name, shares in zip(NAME_WORDS, found["by name"], strict=True):
        if by_name[name]:
            assert shares == pytest.approx(np.mean(by_name[name], 0))
    assert found["curve"] == [[1, [0.1, 0.2, 0.3, 0.4]]] and (tmp_path / "division.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="no finished run of drop in"):
        division.run(division.Flags(variant="drop", runs=tmp_path, results=tmp_path))
    with pytest.raises(UserError, match="variant got 'full', expected one of mod-all"):  # nothing is divided there
        division.Flags(variant="full")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One mini run of two variants, trained here."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("mod", "drop"):
        train_here(job(name, folder))
    return folder


class TestSweep:
    def test_a_finished_run_is_not_repeated(self, runs, monkeypatch):
        before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")}
        monkeypatch.setattr(sweep, "train_apart", lambda job: pytest.fail("trained again"))
        sweep.sweep(runs / "runs", runs, MINI, OURS, ("mod", "drop"), seeds=1, jobs=1)
        assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")} == before

    def test_only_what_is_missing_is_trained(self, runs, monkeypatch):
        trained = []
        monkeypatch.setattr(sweep, "train_apart", lambda job: trained.append(job.file.name))
        sweep.sweep(runs / "runs", runs, MINI, VARIANTS, ("mod", "full"), seeds=1, jobs=1)
        assert trained == ["full-0.json"]

    def test_what_others_start_from_is_trained_first(self, runs, monkeypatch):
        trained = []
        monkeypatch.setattr(sweep, "train_apart", lambda job: trained.append((job.file.name, job.start)))
        mini = {name: replace(gates.VARIANTS[name], train={}) for name in ("full", "pretrained-score-value")}
        sweep.sweep(runs / "runs", runs, MINI, mini, ("pretrained-score-value",), seeds=1, jobs=1)
        start = runs / "runs" / "full-0" / "model.safetensors"
        assert trained == [("full-0.json", None), ("pretrained-score-value-0.json", start)]
        trained.clear()  # and what those start from before them, in whatever order they are asked for
        mini["last"] = replace(mini["full"], start="pretrained-score-value")
        sweep.sweep(runs / "runs", runs, MINI, mini, ("last", "full"), seeds=1, jobs=1)
        assert [file for file, _ in trained] == ["full-0.json", "pretrained-score-value-0.json", "last-0.json"]

    def test_a_pretrained_decoder_is_what_it_was(self, runs, tmp_path):
        """A MoD model that starts from a dense run computes, on text alone, what that run computes, and sees as it does,
        even on other data, for which another encoder would be warmed up."""
        full = job("full", tmp_path)
        train_here(full)
        start = full.out / "model.safetensors"
        dense, routed_model = (sweep.build(one)[0] for one in (replace(full, start=start), job("mod", tmp_path, start=start)))
        ids = torch.randint(0, 30, (1, 9))
        plans = [plan_of(model.config, torch.full((1, 9), -1)) for model in (dense, routed_model)]
        assert torch.equal(dense.hidden(ids, None, plans[0]), routed_model.hidden(ids, None, plans[1])) and routed(routed_model)
        elsewhere = replace(MINI, data=replace(MINI.data, question_rate=0.1))
        other, _ = sweep.build(job("mod", tmp_path, elsewhere, start=start))
        assert torch.equal(other.vit.position, dense.vit.position) and len(list((tmp_path / "runs").glob("encoder-*"))) == 1

    def test_runs_that_are_compared_start_with_the_same_weights(self, tmp_path):
        full = job("full", tmp_path)
        train_here(full)
        one, other = (job(name, tmp_path, start=full.out / "model.safetensors") for name in ("mod", "all"))
        train_here(one)
        held = json.loads(one.file.read_text())
        assert len(held["weights of start"]) == 12 and "weights of start" not in json.loads(full.file.read_text())
        one.file.write_text(json.dumps(held | {"weights of start": "of another"}))
        with pytest.raises(ValueError, match="mod-0.json is of a run that started with other weights than today's"):
            train_here(other)
        assert not other.out.exists()
        one.file.unlink()
        write_tensors(full.out / "model.safetensors", {name: 2 * p for name, p in read_tensors(one.start)[0].items()})
        with pytest.raises(ValueError, match="identity.json is of a run that started with other weights"):
            train_here(one)  # as if it had been cut off
        shutil.rmtree(one.out)
        train_here(one)
        held = json.loads(one.file.read_text())
        one.file.write_text(json.dumps(held | {"weights of start": "of another", "start": "another-0"}))
        train_here(other)
        assert json.loads(other.file.read_text())["weights of start"] == held["weights of start"]

    def test_a_run_with_other_settings_is_refused(self, runs):
        known = job("mod", runs)
        other = replace(known, config=replace(known.config, train=replace(MINI.train, lr=0.5)))
        for one in (other, replace(known, routers="once")):
            for file in (runs / "mod-0.json", runs / "runs" / "mod" / "identity.json"):
                with pytest.raises(ValueError, match="is of a run with other settings"):
                    same(file, one.about)
            with pytest.raises(ValueError, match="is of a run with other settings"):
                train_here(replace(one, file=runs / "new.json"))
        with pytest.raises(ValueError, match="is of a run with other settings"):
            same(runs / "mod-0.json", replace(known, start=Path("full-0/model.safetensors")).about)

    def test_a_variants_own_routers_are_trained(self, runs):
        one = sweep.job_of(runs / "runs", runs, MINI, OURS, "drop", 0)
        model, _ = sweep.build(one)
        assert [type(layer.router) for layer in routed(model)] == [routers.OneChoice] * 4
        assert json.loads((runs / "drop-0.json").read_text())["routers"] == "once"

    def test_variants_of_a_seed_share_the_encoder(self, runs):
        """Whatever is drawn before, and whatever sizes the decoder has."""
        built = {name: sweep.build(job(name, runs))[0] for name in ("mod", "pool")}
        for name, parameter in built["mod"].vit.named_parameters():
            assert torch.equal(parameter, built["pool"].vit.get_parameter(name))
        assert len(list((runs / "runs").glob("encoder-*"))) == 1

    def test_what_is_collected(self, runs):
        results = collect(runs, MINI, {name: VARIANTS[name] for name in ("mod", "full")}, seeds=2)
        assert list(results["mod"]) == ["0"] and results["full"] == {}
        one = results["mod"]["0"]
        assert set(one["kinds"]) == {"now", "past", "spark"} and one["curve"][0]["step"] == 2
        answers = list(one["kinds"].values())
        assert min(answers) <= one["question_accuracy"] <= max(answers)

    def test_what_the_flags_of_a_study_ask_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        asked = []
        monkeypatch.setattr(sweep, "sweep", lambda *all_of_it: asked.append(all_of_it))
        with pytest.raises(UserError, match="no finished run in results/mini; train first"):
            sweep.trained("mini", sweep.TrialFlags(report=True), MINI, OURS)
        assert not asked
        for flags, folder in ((sweep.TrialFlags(seeds=3), "results/mini"), (sweep.TrialFlags(seeds=3, quick=True), "runs/mini-quick/mini")):
            with pytest.raises(UserError, match=f"no finished run in {folder}; train first"):
                sweep.trained("mini", flags, MINI, gates.VARIANTS, ["full"])
            runs, results, base, variants, names, seeds, _ = asked.pop()
            assert (results, names, seeds) == (Path(folder), ["full"], 2 if flags.quick else 3)
            assert runs == Path("runs/mini-quick" if flags.quick else "runs/mini") and base == (quick(MINI) if flags.quick else MINI)
            assert variants["pretrained-score-value"].train == ({} if flags.quick else {"steps": 80})

    def test_a_run_in_a_process_of_its_own(self, tmp_path):
        apart = Job(tmp_path / "run", tmp_path / "mod-0.json", configure(MINI, Variant(""), 0))
        sweep.train_apart(apart)
        assert same(apart.file, apart.about)
        with pytest.raises(ValueError, match="routers got 'nobody'"):
            sweep.train_apart(Job(tmp_path / "bad", tmp_path / "bad-0.json", apart.config, "nobody"))

    def test_a_run_that_was_cut_off_goes_on(self, tmp_path, monkeypatch):
        """A sweep that is interrupted between two steps is continued, and ends as it would have."""
        whole, cut = (Job(tmp_path / name / "run", tmp_path / f"{name}.json", configure(MINI, Variant(""), 0)) for name in ("whole", "cut"))
        train_here(whole)
        real = sweep.train

        def stopped(config, *rest, **more):
            real(replace(config, train=replace(config.train, steps=1)), *rest, **more)

        monkeypatch.setattr(sweep, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_here(cut)
        monkeypatch.setattr(sweep, "train", real)
        assert not cut.file.exists() and not (cut.out / "nothing").exists()
        train_here(cut)
        found = [json.loads(one.file.read_text()) for one in (whole, cut)]
        assert found[0]["kinds"] == found[1]["kinds"] and found[0]["lm_ppl"] > 0

    def test_a_failed_run_ends_the_sweep_before_the_next(self, runs, monkeypatch):
        begun = []

        def fails(job):
            begun.append(job.file.name)
            raise RuntimeError("diverged")

        monkeypatch.setattr(sweep, "train_apart", fails)
        with pytest.raises(RuntimeError, match="diverged"):
            sweep.sweep(runs / "runs", runs, MINI, VARIANTS, ("full", "pool", "skip", "all", "random"), seeds=1, jobs=1)
        assert len(begun) < 5


class TestTables:
    def values(self, gap: float = 0.1):
        """Narrations of five seeds, MoD ahead by about `gap`; every other measure the same everywhere."""
        values = {name: {measure: {str(seed): 0.5 for seed in range(5)} for measure in MEASURES} for name in VARIANTS}
        for name in VARIANTS:
            for seed in range(5):
                values[name]["narration"][str(seed)] = 0.9 + 0.01 * seed - (0 if name == "mod" else gap + 0.001 * (seed % 2))
        return values

    def test_differences_are_judged_by_a_paired_test(self):
        values = self.values()
        mod, full = values["mod"], values["full"]
        assert judge(mod["narration"], full["narration"]) == "**+0.100 ± 0.000 (p < 0.001)**"
        assert judge(full["narration"], mod["narration"]) == "**-0.100 ± 0.000 (p < 0.001, reversed)**"
        assert judge(mod["now"], full["now"]) == "+0.000 ± 0.000", "no p when all seeds differ alike"
        assert judge(mod["narration"], {"0": 0.5, "1": None}) == "-"
        assert judge(mod["narration"], {"0": 0.5, "1": 0.4}) == "+0.455 ± 0.055", "no p for two seeds"

    def test_the_test_statistic_is_the_textbooks(self):
        """t of paired differences by hand: mean / (deviation / sqrt(n)), against the tabulated 5% value for n = 5."""
        for gaps, seen in (([0.1, 0.12, 0.08, 0.11, 0.09], True), ([0.3, -0.1, 0.05, -0.02, 0.1], False)):
            one = {str(seed): 0.5 + gap + 0.1 * seed for seed, gap in enumerate(gaps)}
            other = {str(seed): 0.5 + 0.1 * seed for seed in range(5)}
            mean = sum(gaps) / 5
            deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 4)
            assert (mean / (deviation / math.sqrt(5)) > 2.776) == seen
            assert judge(one, other).startswith("**") == seen

    def test_mean_and_standard_error(self):
        assert mean_and_error({"0": 0.5, "1": 0.7}) == "0.600 ± 0.100"
        assert mean_and_error({"0": 0.5}) == "0.500"
        assert mean_and_error({"0": 100.0, "1": None}) == "100 (1 of 2)" and mean_and_error({"0": None}) == "-"

    def test_steps_to_a_quality(self):
        run = {"curve": [{"step": 20, "lm": 0.5}, {"step": 40, "lm": 0.2}, {"step": 60, "lm": 0.3}, {"step": 80, "lm": 0.1}]}
        assert steps_to(run, 0.35) == 40 and steps_to(run, 0.2) == 80 and math.isnan(steps_to(run, 0.01))

    def test_a_table_shows_every_row_and_ordering(self):
        data = {"steps": 3, "clips": 4, "values": self.values(),
                "costs": {name: {"flops": 0.6, "kv": 0.7} for name in VARIANTS}}
        text = report(1, data)
        assert all(f"| `{name}` {VARIANTS[name].title} |" in text for name in TABLES[1].rows)
        assert all(f"| `{better}` > `{worse}` |" in text for better, worse, _ in TABLES[1].claims) and "over 5 seeds" in text

    def test_every_claim_compares_rows_of_its_table(self):
        for table in TABLES.values():
            assert {name for claim in table.claims for name in claim[:2]} <= set(table.rows) <= set(VARIANTS)
        assert set(JUDGED) <= set(COLUMNS) <= set(MEASURES)

    def test_variants_are_configurations(self):
        for variant in VARIANTS.values():
            configure(STUDY, variant, 3)

    def test_costs_are_shares_of_full_computation(self):
        shares = ablate.costs(STUDY, ["full", "mod", "pool", "all", "r-0.5"])
        assert shares["full"] == {"flops": 1.0, "kv": 1.0} and shares["mod"]["flops"] < 0.7
        assert shares["pool"]["kv"] < shares["all"]["kv"] < shares["mod"]["kv"] < shares["r-0.5"]["kv"] < 1

    def test_mistakes_are_told(self, capsys):
        assert ablate.main(["--table", "1", "--seeds", "0"]) == 2
        assert "seeds must be at least 1" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            ablate.main(["--table", "9"])


class TestGates:
    def values(self, seeds: int = 4) -> dict:
        """Quality rises by .2 with the sigmoid and by .05 with the value, recall the other way round; both together add
        .04. All layers lack a gate."""
        values = {}
        for setting in ("interleaved", "all"):
            for gate in list(gates.GATES)[: 4 if setting == "interleaved" else 3]:
                what, scales = 0.2 * gate.startswith("sigmoid"), 0.05 * gate.endswith("value")
                both = 0.04 * (gate == "sigmoid-value")
                rows = {"quality": 0.5 + what + scales + both, "recall": 0.3 + 0.25 * what + 4 * scales + both}
                values[f"{setting}-{gate}"] = {measure: {str(seed): rows.get(measure, 0.5) + 0.01 * seed + 0.001 * (seed % 2) * what
                                                         for seed in range(seeds)} for measure in gates.MEASURES}
        return values

    def test_an_effect_is_of_one_factor_averaged_over_the_other(self):
        found = {measure: compare(dict(gates.effects(self.values(), measure))) for measure in ("quality", "recall")}
        names = ["layers 1 and 3: sigmoid − score", "layers 1 and 3: value − update"]
        assert list(found["quality"].index) == list(found["recall"].index) == names, "all layers lack a gate"
        assert list(found["quality"]["difference"]) == ["+0.220", "+0.070"]
        assert list(found["recall"]["difference"]) == ["+0.070", "+0.220"]
        assert not dict(gates.effects(self.values(2), "quality")), "two seeds are too few"

    def test_every_cell_of_the_two_by_two_differs_in_the_gate_alone(self):
        for setting in gates.SETTINGS:
            cells = [configure(gates.BASE, gates.VARIANTS[f"{setting}-{gate}"], 0) for gate in gates.GATES]
            assert {replace(one, model=replace(one.model, gate="score-update")) for one in cells} == {cells[0]}
            assert [one.model.gate for one in cells] == ["-".join(levels) for levels in gates.GATES.values()]

    def test_a_report_shows_what_is_finished(self, tmp_path):
        data = {"steps": 200, "short": 80, "clips": 8, "values": self.values()}
        text = gates.report(data)
        assert "| all layers: score-value |" in text and "all layers: sigmoid − score" not in text
        gates.plot(json.loads(json.dumps(data)), tmp_path / "gates.png")
        assert (tmp_path / "gates.png").stat().st_size > 10_000


class TestSeeds:
    def test_runs_become_the_readmes_table_and_are_not_repeated(self, tmp_path, monkeypatch):
        mini = replace(Config(), train=MINI.train)
        for name, value in (("BASE", mini), ("RUNS", tmp_path / "runs"), ("RESULTS", tmp_path), ("EARLY", 2)):
            monkeypatch.setattr(seeds, name, value)
        monkeypatch.setattr(sweep, "train_apart", sweep.train_here)  # five more processes would show nothing new
        assert seeds.main(["--seeds", "1", "--jobs", "1"]) == 0
        results, known = (json.loads((path / "seeds.json").read_text()) for path in (tmp_path, ROOT / "results"))
        shown = (tmp_path / "seeds.md").read_text()
        assert shown == seeds.table(results) and "share its vision encoder" in shown and list(results) == list(known)
        for title, [one] in results.items():
            assert set(one) == set(known[title][0]) - GONE and one["recall_early"].keys() == one["recall"].keys()
            for cost in ("flop_ratio", "kv_ratio"):
                assert one[cost] == 1 if title == "full computation" else 0.6 < one[cost] < 0.75
        monkeypatch.setattr(sweep, "train_apart", lambda job: pytest.fail("trained again"))
        assert seeds.main(["--seeds", "1"]) == 0 and (tmp_path / "seeds.md").read_text() == shown

    def test_mistakes_are_told(self, capsys):
        for flag in ("--seeds", "--jobs"):
            assert seeds.main([flag, "0"]) == 2
            assert f"{flag[2:]} must be at least 1" in capsys.readouterr().err


def test_the_study_preset_is_harder_than_the_default():
    assert STUDY.model == replace(STUDY.model, **vars(ModelConfig())) and STUDY.data.drift and STUDY.data.sparks
    assert Config() == seeds.BASE and Config().data == DataConfig()
