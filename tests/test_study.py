"""The studies: routers of their own, sweeps that never repeat a run, tables that say what was measured."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mod.config import PRESETS, Config, DataConfig, ModelConfig, TrainConfig
from mod.data import SPARK_LABEL, make_clip, vocabulary
from mod.evaluate import router_recall, teacher_forced
from mod.study import ablate, bench, bench_report, routers, seeds, sweep
from mod.study.ablate_report import judge, mean_and_error, report
from mod.study.machine import Machine
from mod.study.sweep import Variant, collect, configure, identity, same, train_here
from mod.study.tables import MEASURES, TABLES, VARIANTS, steps_to
from tests.helpers import as_batch, loud, offline, routed, small_config
from tests.test_block import plain_rotate

ROOT = Path(__file__).parent.parent
MINI = replace(PRESETS["study"], train=TrainConfig(steps=2, batch_size=2, vit_steps=2, eval_clips=8, eval_every=0))


class TestRouters:
    def test_the_oracle_keeps_every_sprite_and_spark(self):
        """On the study's own clips, in every routed layer."""
        config = PRESETS["study"]
        model = routers.build(replace(config.model, layers="all"), "oracle").eval()
        clips = [make_clip(config.data, config.model, "validation", 0, index) for index in range(12)]
        trace = []
        teacher_forced(model, vocabulary(), clips, trace=trace)
        assert router_recall(trace, clips, config.model.grid) == dict.fromkeys(range(4), 1.0)
        spark = torch.cat([torch.from_numpy(clip.patch_labels[..., SPARK_LABEL]) for clip in clips]) > 0
        assert spark.any() and trace[0].kept[:, 1:][spark].all()

    def test_the_oracle_refuses_frames_that_it_was_not_told_of(self):
        model = routers.build(small_config(layers="all"), "oracle")
        batch = as_batch(model.config, [(2, [])], torch.float32)
        seen = model.see(batch.pixels)
        model.see(batch.pixels[:1])
        with pytest.raises(ValueError, match="told of 1 frames"):
            model(batch.ids, batch.frame, batch.pos, seen)

    def test_a_lesson_is_the_gradient_of_the_cross_entropy_and_changes_no_value(self):
        scores, target = torch.randn(4, 5, requires_grad=True), torch.rand(4, 5).round()
        taught = routers.Lesson.apply(scores, target)
        assert torch.equal(taught, scores)
        (taught * 3).sum().backward()
        [expected] = torch.autograd.grad(
            (3 * scores).sum() + routers.LESSON * F.binary_cross_entropy_with_logits(scores, target), scores
        )
        torch.testing.assert_close(scores.grad, expected)

    def test_attention_from_text_equals_a_plain_version(self):
        model = loud(routers.build(small_config(gate="update"), "taught").double())
        attention = model.decoder.layers[0].attention
        x, frame = torch.randn(1, 9, 24, dtype=torch.float64), torch.tensor([[-1, 0, 0, 0, 0, 0, -1, -1, -1]])
        pos, size, heads = torch.arange(9), attention.head_dim, 4
        got, q, k = torch.zeros(9, dtype=torch.float64), attention.q(x[0]), attention.k(x[0])
        for head in range(heads):
            group = head // 2
            qh = plain_rotate(attention.q_norm(q[:, head * size : (head + 1) * size]), pos, attention.rope.base)
            kh = plain_rotate(attention.k_norm(k[:, group * size : (group + 1) * size]), pos, attention.rope.base)
            weights = (qh @ kh.T / size**0.5).masked_fill(pos[None] > pos[:, None], -torch.inf).softmax(-1)
            got += weights[frame[0] < 0].sum(0) / heads
        torch.testing.assert_close(routers.attention_from_text(attention, x, pos[None], frame)[0], got)

    def test_a_taught_router_learns_in_training_only_and_needs_a_dense_layer(self):
        model = routers.build(small_config(gate="update"), "taught")
        batch = as_batch(model.config, [(3, [])], torch.float32)
        for training in (True, False):
            model.train(training)
            offline(model, batch)
            assert all((layer.router.lesson is not None) == training for layer in routed(model))
        with pytest.raises(ValueError, match="dense layer before it"):
            routers.build(small_config(layers="all"), "taught")

    def test_lessons_alone_teach_a_router_what_the_text_reads(self):
        """With a main loss of zero the lesson is all that it learns from."""
        model = routers.build(small_config(gate="update", keep_ratio=0.4), "taught").train()
        batch = as_batch(model.config, [(4, []), (3, [])], torch.float32)
        dense, block = model.decoder.layers[0], routed(model)[0]
        x = dense(model.embed(batch.ids, batch.frame, model.see(batch.pixels)), batch.pos, batch.frame).detach()
        optimizer = torch.optim.Adam(block.router.parameters(), 0.2)
        for _ in range(300):
            optimizer.zero_grad()
            keep, mu, _ = block.router(x, batch.pos, batch.frame)
            (0 * mu).sum().backward()
            optimizer.step()
        kept = keep[batch.frame >= 0].view(7, 5)
        assert (kept == block.router.lesson.bool()).float().mean() > 0.9


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One mini run of two variants, trained here."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("mod", "oracle"):
        config = configure(MINI, VARIANTS[name], 0)
        train_here(folder / "runs" / name, folder / f"{name}-0.json", config, VARIANTS[name].routers)
    return folder


class TestSweep:
    def test_a_finished_run_is_not_repeated(self, runs, monkeypatch):
        before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")}
        monkeypatch.setattr(sweep, "train_apart", lambda *job: pytest.fail("trained again"))
        sweep.sweep(runs / "runs", runs, MINI, VARIANTS, ("mod", "oracle"), seeds=1, jobs=1)
        assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")} == before

    def test_only_what_is_missing_is_trained(self, runs, monkeypatch):
        trained = []
        monkeypatch.setattr(sweep, "train_apart", lambda out, file, *rest: trained.append(file.name))
        sweep.sweep(runs / "runs", runs, MINI, VARIANTS, ("mod", "full"), seeds=1, jobs=1)
        assert trained == ["full-0.json"]

    def test_what_others_start_from_is_trained_first(self, runs, monkeypatch):
        trained = []
        monkeypatch.setattr(sweep, "train_apart", lambda out, file, *rest: trained.append((file.name, rest[2])))
        mini = {name: replace(VARIANTS[name], train={}) for name in ("full", "pretrained-value")}
        sweep.sweep(runs / "runs", runs, MINI, mini, ("pretrained-value",), seeds=1, jobs=1)
        start = runs / "runs" / "full-0" / "model.safetensors"
        assert trained == [("full-0.json", None), ("pretrained-value-0.json", start)]

    def test_a_pretrained_decoder_is_what_it_was(self, runs, tmp_path):
        """A MoD model that starts from a dense run computes, on text alone, what that run computes."""
        config = configure(MINI, VARIANTS["full"], 0)
        train_here(tmp_path / "full-0", tmp_path / "full-0.json", config)
        file, start = sweep.encoder(config, tmp_path), tmp_path / "full-0" / "model.safetensors"
        dense = sweep.build(config.model, file, "", start)
        routed_model = sweep.build(MINI.model, file, "", start)
        ids = torch.randint(0, 30, (1, 9))
        text = (ids, torch.full_like(ids, -1), torch.arange(9)[None], torch.zeros(0, 26, 96))
        assert torch.equal(dense(*text), routed_model(*text)) and routed(routed_model)

    def test_a_run_with_other_settings_is_refused(self, runs):
        other = replace(MINI, train=replace(MINI.train, lr=0.5))
        for config, kind in ((configure(other, VARIANTS["mod"], 0), ""), (configure(MINI, VARIANTS["mod"], 0), "oracle")):
            for file in (runs / "mod-0.json", runs / "runs" / "mod" / "identity.json"):
                with pytest.raises(ValueError, match="is of a run with other settings"):
                    same(file, identity(config, kind))
            with pytest.raises(ValueError, match="is of a run with other settings"):
                train_here(runs / "runs" / "mod", runs / "new.json", config, kind)
        with pytest.raises(ValueError, match="is of a run with other settings"):
            same(runs / "mod-0.json", identity(configure(MINI, VARIANTS["mod"], 0), "", "full-0"))

    def test_variants_of_a_seed_share_the_encoder(self, runs):
        file = sweep.encoder(configure(MINI, VARIANTS["mod"], 0), runs / "runs")
        built = {}
        for name in ("mod", "full", "pool"):
            torch.manual_seed(0)
            built[name] = sweep.build(replace(MINI.model, **VARIANTS[name].model), file, "")
        for name, parameter in built["mod"].vit.named_parameters():
            assert torch.equal(parameter, built["pool"].vit.get_parameter(name))

    def test_what_is_collected(self, runs):
        results = collect(runs, MINI, {name: VARIANTS[name] for name in ("mod", "full")}, seeds=2)
        assert list(results["mod"]) == ["0"] and results["full"] == {}
        one = results["mod"]["0"]
        assert set(one["kinds"]) == {"now", "past", "spark"} and one["curve"][0]["step"] == 2
        answers = list(one["kinds"].values())
        assert min(answers) <= one["question_accuracy"] <= max(answers)

    def test_a_run_in_a_process_of_its_own(self, tmp_path):
        config, file = configure(MINI, Variant(""), 0), tmp_path / "mod-0.json"
        sweep.train_apart(tmp_path / "run", file, config, "")
        assert same(file, identity(config))
        with pytest.raises(ValueError, match="--routers"):
            sweep.train_apart(tmp_path / "bad", tmp_path / "bad-0.json", config, "nobody")

    def test_a_failed_run_ends_the_sweep_before_the_next(self, runs, monkeypatch):
        begun = []

        def fails(out, file, *rest):
            begun.append(file.name)
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
        assert judge(mod["narration"], full["narration"]) == "**+0.100 ± 0.000 (p 0.000)**"
        assert judge(full["narration"], mod["narration"]) == "**-0.100 ± 0.000 (p 0.000, reversed)**"
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
        assert mean_and_error([0.5, 0.7]) == "0.600 ± 0.100"
        assert mean_and_error([0.5]) == "0.500"
        assert mean_and_error([100.0, None]) == "100 (1 of 2)" and mean_and_error([None]) == "-"

    def test_steps_to_a_quality(self):
        run = {"curve": [{"step": 20, "lm": 0.5}, {"step": 40, "lm": 0.2}, {"step": 60, "lm": 0.3}, {"step": 80, "lm": 0.1}]}
        assert steps_to(run, 0.35) == 40 and steps_to(run, 0.2) == 80 and math.isnan(steps_to(run, 0.01))

    def test_a_table_shows_every_row_and_ordering(self):
        data = {"steps": 3, "clips": 4, "values": self.values(), "times": dict.fromkeys(VARIANTS, 0.5),
                "costs": {name: {"flops": 0.6, "kv": 0.7} for name in VARIANTS}}  # fmt: skip
        text = report(1, data)
        assert all(f"| `{name}` {VARIANTS[name].title} |" in text for name in TABLES[1].rows)
        assert all(f"| `{better}` > `{worse}` |" in text for better, worse, _ in TABLES[1].claims) and "over 5 seeds" in text

    def test_every_claim_compares_rows_of_its_table(self):
        for table in TABLES.values():
            assert {name for claim in table.claims for name in claim[:2]} <= set(table.rows) <= set(VARIANTS)
            assert set(table.judged) <= set(MEASURES)

    def test_variants_are_configurations(self):
        for variant in VARIANTS.values():
            configure(PRESETS["study"], variant, 3)

    def test_costs_are_shares_of_full_computation(self):
        shares = ablate.costs(PRESETS["study"], ["full", "mod", "pool", "all", "r-0.5"])
        assert shares["full"] == {"flops": 1.0, "kv": 1.0} and shares["mod"]["flops"] < 0.7
        assert shares["pool"]["kv"] < shares["all"]["kv"] < shares["mod"]["kv"] < shares["r-0.5"]["kv"] < 1

    def test_mistakes_are_told(self, capsys):
        assert ablate.main(["--table", "1", "--seeds", "0"]) == 2
        assert "seeds and jobs must be at least 1" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            ablate.main(["--table", "9"])


class TestSeeds:
    def test_runs_become_the_readmes_table_and_are_not_repeated(self, tmp_path, monkeypatch):
        monkeypatch.setitem(PRESETS, "tiny", MINI)
        for name, value in (("RUNS", tmp_path / "runs"), ("RESULTS", tmp_path), ("EARLY", 2)):
            monkeypatch.setattr(seeds, name, value)
        monkeypatch.setattr(sweep, "train_apart", train_here)
        assert seeds.main(["--seeds", "1", "--jobs", "1"]) == 0
        results, known = (json.loads((path / "seeds.json").read_text()) for path in (tmp_path, ROOT / "results"))
        shown = (tmp_path / "seeds.md").read_text()
        assert shown == seeds.table(results) and "share its vision encoder" in shown and list(results) == list(known)
        for title, [one] in results.items():
            assert set(one) == {*known[title][0], "shared_encoder"} and one["recall_early"].keys() == one["recall"].keys()
            for cost in ("flop_ratio", "kv_ratio"):
                assert one[cost] == 1 if title == "full computation" else 0.6 < one[cost] < 0.75
        monkeypatch.setattr(sweep, "train_apart", lambda *job: pytest.fail("trained again"))
        assert seeds.main(["--seeds", "1"]) == 0 and (tmp_path / "seeds.md").read_text() == shown

    def test_mistakes_are_told(self, capsys):
        assert seeds.main(["--seeds", "0"]) == 2
        assert "seeds and jobs must be at least 1" in capsys.readouterr().err


class TestBench:
    def test_quick_bench_prints_a_table_and_json(self, tmp_path):
        done = subprocess.run([sys.executable, "-m", "mod.study.bench", "--quick"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])
        assert "| decoder |" in done.stdout and set(results["sizes"]) == {"tiny", "middle"}
        for size in results["sizes"].values():
            assert size["training"]["time_ratio"] > 0 and size["training"]["flop_ratio"] < 0.7
            assert all(point["seconds"]["mod"] > 0 for point in size["streaming"])
        filled = results["filled"]["frames"]
        assert filled["mod"] / filled["full"] == pytest.approx(1 / 0.6, abs=0.05)

    def test_results_become_tables_and_a_figure(self, tmp_path):
        results = json.loads((ROOT / "results/bench-cpu.json").read_text())
        assert (ROOT / "results/bench-cpu.md").read_text() == bench_report.report(results)
        bench_report.plot(results, tmp_path / "bench.png")
        assert (tmp_path / "bench.png").stat().st_size > 10_000

    def test_mistakes_are_told(self, capsys):
        assert bench.main(["--dtype", "bfloat16"]) == 2
        assert "expected float32" in capsys.readouterr().err
        if not torch.cuda.is_available():
            assert bench.main(["--device", "cuda"]) == 2 and "no CUDA GPU" in capsys.readouterr().err

    def test_skipping_to_a_context_is_as_long_as_going_there(self):
        machine = Machine()
        config = ModelConfig(depth=2)
        gone, skipped = (bench.Live(machine, config, 4) for _ in range(2))
        for _ in range(3):
            gone.step()
        skipped.skip_to(3)
        assert gone.cache.lengths() == skipped.cache.lengths() and gone.seen == skipped.seen
        skipped.step()


def test_the_study_preset_is_harder_than_the_default():
    assert PRESETS["study"].model == ModelConfig() and PRESETS["study"].data != DataConfig()
    assert PRESETS["tiny"] == Config()
