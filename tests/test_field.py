"""The field side by side: the Pareto front, the table from made-up runs, the published one from its real runs."""

import json
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mod.related.methods import METHODS, build, configure
from mod.related.world import WORLD
from mod.study import crowd, crowd_field, field
from mod.study.sweep import collect
from mod.study.sweep import configure as configure_run

ROOT = Path(__file__).parent.parent
FIELD = WORLD.presets["field"]

numbers = st.integers(0, 4).map(float)


@given(placed=st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(numbers, numbers), min_size=1))
def test_the_front_is_what_nothing_beats(placed):
    ends = field.front(placed)
    for name, (cost, good) in placed.items():
        beaten = [n for n, (c, g) in placed.items() if (c < cost and g >= good) or (c <= cost and g > good)]
        assert (name in ends) == (not beaten)
    assert [placed[name] for name in ends] == sorted(placed[name] for name in ends)


def test_a_front_by_hand():
    placed = {"cheap": (0.2, 0.5), "worse": (0.3, 0.4), "middle": (0.5, 0.8), "dear": (1.0, 0.8), "best": (0.9, 0.9)}
    assert field.front(placed) == ["cheap", "middle", "best"]


def made_up_run(dice: random.Random, online: bool) -> dict:
    share = lambda: dice.random()  # noqa: E731
    names = ("narration_exact", "question_accuracy", "speak_accuracy", "silence_accuracy")
    run = {name: share() for name in names} | {
        "kinds": {kind: share() for kind in ("now", "past", "spark", "side", "ahead")},
        "needle": {str(frames): {str(depth): share() for depth in field.DEPTHS} for frames in field.LENGTHS},
        "costs": {"flops": 1e8 * (1 + share()), "encoder": 1e7, "tokens": 26.0, "entries": 104 * share(), "text": 100.0, "streamed": 1e8 if online else None},
    }
    run |= {part: {name: share() for name in names} for part in ("long", "square", "wide")}
    return run | ({"free_running": {"narration_exact": share()}} if online else {})


@pytest.fixture
def data(tmp_path) -> dict:
    """What field.json would say of some methods with made-up runs."""
    dice, names = random.Random(0), ("mod", "full", "no-vision", "fastv", "voco")
    results = {name: {str(seed): made_up_run(dice, name != "fastv") for seed in range(3)} for name in names}
    times = {"step": dict.fromkeys(names, 0.5), "frame": dict.fromkeys(set(names) - {"fastv"}, 0.25)}
    (tmp_path / "clock.json").write_text(json.dumps(times))
    return field.summary(FIELD, results, tmp_path / "clock.json", tmp_path) | {"raw": results}


def test_the_table_says_what_the_runs_measured(data, tmp_path):
    """Means by hand, a dash where nothing can be streamed, costs as shares of full computation; and it can be drawn."""
    text = field.report(data)
    runs = data["raw"]["voco"].values()
    mean = sum(run["narration_exact"] for run in runs) / 3
    row = next(line for line in text.splitlines() if line.startswith("| `voco` VoCo"))
    assert f"| {mean:.3f} ±" in row and row.endswith("| 0.50 | 0.25 | yes |")
    present = sum((run["kinds"]["now"] + run["kinds"]["side"]) / 2 for run in runs) / 3
    timing = sum((run["speak_accuracy"] + run["silence_accuracy"]) / 2 for run in runs) / 3
    past = sum((run["kinds"]["past"] + run["kinds"]["spark"]) / 2 for run in runs) / 3
    assert f"| {(mean + present + past + timing) / 4:.3f} ± " in row
    kept = sum(run["costs"]["entries"] for run in runs) / 3 * 2 * 4 * FIELD.model.kv_heads * FIELD.model.head_dim
    assert f"| {kept:,.0f} |" in row
    offline = next(line for line in text.splitlines() if line.startswith("| `fastv` "))
    assert offline.endswith("| 0.50 | - | no |") and offline.split("|")[7].strip() == "-"
    assert row.split("|")[10].strip() == "1.00" and offline.split("|")[10].strip() == "-"
    full = next(line for line in text.splitlines() if line.startswith("| `full` full"))
    assert "| 1.00 |" in full
    assert "`fastv`" not in text.split("On the Pareto front")[1].split("Apart")[0], "which has looked ahead"
    assert "`no-vision`" not in text.split("On the Pareto front")[1].split("Apart")[0]
    field.plot(data, tmp_path / "field.png")
    assert (tmp_path / "field.png").stat().st_size > 10_000


def test_every_method_has_a_colour_and_a_variant_of_its_own():
    drawn = [name for _, _, names in field.FAMILIES.values() for name in names]
    assert sorted([*drawn, "no-vision"]) == sorted(METHODS)
    every = field.variants(FIELD)
    for name, variant in every.items():
        assert replace(FIELD.model, **variant.model) == configure(FIELD.model, name) and variant.probed


def test_times_are_taken_of_what_can_be_timed(tmp_path):
    """Steps of all, frames of what runs online; of full computation the ratio to itself is one."""
    times = field.clock(FIELD, ("full", "fastv", "vts-stream"), tmp_path)
    assert set(times["step"]) == {"full", "fastv", "vts-stream"} and set(times["frame"]) == {"full", "vts-stream"}
    assert times["step"]["full"] == times["frame"]["full"] == 1
    assert all(0 < value < 100 for part in times.values() for value in part.values())


def test_a_stream_that_is_timed_stands_where_it_stood(tmp_path):
    for name in ("mod", "vts-stream", "voco"):
        see, back = field.next_frame(FIELD, name, tmp_path)
        first = see()
        back()
        assert (see() == first).all()


def test_the_command_refuses_in_one_sentence(capsys):
    for flag in ("--seeds", "--jobs"):
        assert field.main([flag, "0"]) == 2
        assert f"{flag[2:]} must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        field.main(["--seed", "1"])
    assert exit.value.code == 2 and "did you mean --seeds?" in capsys.readouterr().err


def made_up_crowd(seeds: int = 3) -> dict:
    """Runs of the crowd as `crowd_field` finds them: those of table C say no costs, chance is worse than MoD."""
    dice, share = random.Random(1), {"mod-all": 0.9, "random-all": 0.6, "fastv-cheap": 0.8, "full": 0.95}
    runs = {name: {str(seed): made_up_run(dice, name != "fastv-cheap") | {"question_accuracy": good + 0.01 * dice.random()}
                   for seed in range(seeds)} for name, good in share.items()}
    for name in ("mod-all", "random-all", "full"):
        for run in runs[name].values():
            del run["costs"]
    return crowd_field.with_costs(runs)


def test_the_crowd_has_every_method_once_and_each_cheap_one_once():
    """What table C has already is not trained twice; all else differs from the preset by its method alone."""
    names = {name.removesuffix("-cheap") for name in crowd_field.VARIANTS}
    assert names >= set(METHODS) - {"visual-rope"}
    cheap = {name for name in METHODS if METHODS[name].cheap}
    assert {name + "-cheap" for name in cheap} - set(crowd_field.VARIANTS) == {"early-exit-cheap", "layer-skip-cheap"}
    drawn = [name for _, _, group in crowd_field.FAMILIES.values() for name in group if name in crowd_field.VARIANTS]
    assert sorted([*drawn, "no-vision"]) == sorted(crowd_field.VARIANTS)
    configs = {name: configure_run(crowd.BASE, variant, 0) for name, variant in crowd_field.VARIANTS.items()}
    for name, config in configs.items():
        assert config.data == crowd.PRESET.data and config.train == crowd.PRESET.train
        if config.model.method != "mod":
            one = replace(crowd.PRESET.model, cheap=name.endswith("-cheap"))
            assert config.model == configure(one, name.removesuffix("-cheap"))
    same = {"exit": ("early-exit", True), "skip": ("layer-skip", True), "full": ("full", False), "mod": ("mod", False)}
    for name, (method, is_cheap) in same.items():
        twin = configure(replace(crowd.PRESET.model, cheap=is_cheap), method)
        assert configs[name].model.keep_ratios == twin.keep_ratios


def test_the_crowd_table_says_what_it_costs_and_who_is_on_the_front(tmp_path):
    found = made_up_crowd()
    data = {"steps": 900, "clips": 256, "entry_bytes": 512, "online": {name: name != "fastv-cheap" for name in found},
            "ceilings": {name: crowd_field.ceiling(name) for name in found},
            "values": crowd_field.read_off(found, crowd_field.MEASURES)}
    assert data["ceilings"]["full"] == data["ceilings"]["mod-all"] == 1 > data["ceilings"]["random-all"] > 0.8
    assert data["ceilings"]["fastv-cheap"] is None
    text = crowd_field.report(data)
    row = next(line for line in text.splitlines() if line.startswith("| `mod-all`"))
    assert row.endswith("| 0.18 | 12,288 | yes |") and "| 1.00 |" in row
    assert "quality against FLOPs: `random-all`, `mod-all`, `full`" in text, "who cannot run online is not on it"
    assert "| `random-all` | +0.30" in text and "| `full` | -0.05" in text
    field.plot(data, tmp_path / "crowd.png", crowd_field.FAMILIES, "A crowd", "FLOPs")
    assert (tmp_path / "crowd.png").stat().st_size > 10_000


PUBLISHED = ROOT / "results/field.json"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the field has not been run yet")
def test_the_published_table_is_what_the_runs_measured():
    """results/field.md is results/field.json, which is results/field/*.json; every method has three
    seeds, and learns: narration and answers clearly above what listening alone achieves."""
    data, readme = json.loads(PUBLISHED.read_text()), (ROOT / "results/README.md").read_text()
    assert (ROOT / "results/field.md").read_text() == field.report(data)
    found = collect(ROOT / "results/field", FIELD, field.variants(FIELD), 3)
    assert set(data["values"]) == set(METHODS)
    for name, runs in found.items():
        assert len(runs) == 3, name
        for measure, read in field.MEASURES.items():
            for seed, run in runs.items():
                value = read(run)
                assert data["values"][name][measure][seed] == (None if value is None else pytest.approx(value)), (name, measure)
        assert data["online"][name] == build(configure(FIELD.model, name)).online
        if name != "no-vision":  # it learns: clearly above what listening alone achieves
            blind, seeing = (statistics.mean(data["values"][one]["quality"].values()) for one in ("no-vision", name))
            assert seeing > blind + 0.1, name
            worst = min(data["values"][name]["narration"].values())
            assert worst > 0.1 + max(data["values"]["no-vision"]["narration"].values()), name
    section = readme.split("## The field side by side")[1].split("\n## ")[0]
    heads = re.findall(r"^- (`[\w-]+`(?:, `[\w-]+`)*):", section, re.M)
    told = {name for head in heads for name in re.findall(r"`([\w-]+)`", head)}
    assert told >= set(METHODS) - {"mod", "full", "no-vision"}, "a sentence explains each result"
