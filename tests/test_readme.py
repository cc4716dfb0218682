"""The README and the docstrings speak of what is there: files, functions, flags, numbers."""

import ast
import json
import re
from pathlib import Path

import pytest

import stream_tiny
import train_tiny
from mod.config import PRESETS
from mod.study import gap, soak, windows
from mod.study.ablate_report import report as table_report
from mod.study.bench_report import report as bench_report
from mod.study.seeds import table
from mod.study.sweep import collect
from mod.study.tables import MEASURES, TABLES, VARIANTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted((ROOT / "mod").glob("*.py"))


def test_every_file_of_the_method_is_in_the_reading_order_and_every_named_file_exists():
    named = re.findall(r"`((?:mod|tests|results)/[\w/.]*|\w+\.py|\w+/)`", README)
    for name in named:
        assert (ROOT / name).exists(), name
    for path in [*MODULES, *(ROOT / "mod/study").glob("*.py"), *(ROOT / "mod/real").glob("*.py"), *(ROOT / "mod/related").glob("*.py")]:
        if path.name != "__init__.py":
            assert f"`{path.relative_to(ROOT)}`" in README, path
    assert (ROOT / "results/stream.png").exists()


def test_the_paper_to_code_map_names_functions_that_exist():
    rows = re.findall(r"\|[^|\n]*\| (`mod/[^|]*) \|", README.split("## From the paper to the code")[1].split("## ")[0])
    assert len(rows) >= 8
    for row in rows:
        path = None
        for name in re.findall(r"`([^`]*)`", row):
            if name.startswith("mod/"):
                path, tree = name, ast.parse((ROOT / name).read_text())
                continue
            there = set()
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    there.add(node.name)
                    there |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)} if isinstance(node, ast.ClassDef) else set()
            assert name in there, f"{name} is not in {path}"


def test_the_results_table_is_what_the_study_wrote():
    results = json.loads((ROOT / "results/seeds.json").read_text())
    assert (ROOT / "results/seeds.md").read_text() == table(results)
    shown = README.split("<!-- results/seeds.md -->\n")[1].split("<!-- end -->")[0]
    assert shown == table(results)
    assert all(len(runs) >= 5 for runs in results.values())


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("table*.md")) + sorted((ROOT / "results").glob("bench*.md")), ids=lambda path: path.name)
def test_tables_are_what_their_json_files_say_and_what_the_readme_shows(path):
    data = json.loads(path.with_suffix(".json").read_text())
    written = bench_report(data) if path.name.startswith("bench") else table_report(int(path.stem.removeprefix("table")), data)
    assert path.read_text() == written
    assert README.split(f"<!-- results/{path.name} -->\n")[1].split("<!-- end -->")[0] == written
    assert f"(results/{path.stem}.png)" in README and path.with_suffix(".png").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("table*.json")), ids=lambda path: path.name)
def test_tables_are_what_the_runs_measured(path):
    """Every number in a table's file is read off results/study, and every run there has the configuration of today."""
    number, values = int(path.stem.removeprefix("table")), json.loads(path.read_text())["values"]
    found = collect(ROOT / "results/study", PRESETS["study"], {name: VARIANTS[name] for name in TABLES[number].rows}, 5)
    assert {name: set(seeds) for name, seeds in found.items() if seeds} == {name: set(rows["narration"]) for name, rows in values.items()}
    for name, seeds in found.items():
        for measure, read in MEASURES.items():
            for seed, run in seeds.items():
                assert values[name][measure][seed] == pytest.approx(read(run), nan_ok=True) or values[name][measure][seed] is None


@pytest.mark.parametrize(("name", "report"), [("soak", soak.report), ("gap", gap.report), ("windows", windows.report)])
def test_long_streams_are_as_their_json_files_say_and_as_the_readme_shows(name, report):
    written = report(json.loads((ROOT / f"results/{name}.json").read_text()))
    assert (ROOT / f"results/{name}.md").read_text() == written
    assert README.split(f"<!-- results/{name}.md -->\n")[1].split("<!-- end -->")[0] == written
    assert f"(results/{name}.png)" in README and (ROOT / f"results/{name}.png").exists()


def test_every_command_in_the_readme_parses():
    for line in re.findall(r"python (\w+_tiny\.py[^\n`&]*)", README):
        script, *flags = re.findall(r'"[^"]*"|\S+', line.split("#")[0])
        parser = {"train_tiny.py": train_tiny, "stream_tiny.py": stream_tiny}[script].build_parser()
        if "--help" not in flags:
            parser.parse_args([flag.strip('"') for flag in flags])


def test_every_departure_in_the_code_is_in_the_readme():
    marked = {f"mod/{path.name}" for path in MODULES if "DEVIATION:" in path.read_text()}
    departures = README.split("## Departures from the paper")[1].split("\n## ")[0]
    assert marked == set(re.findall(r"`(mod/\w+\.py)`", departures)) and len(marked) >= 6


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_house_is_walked_in_one_direction(path):
    """No file of the method imports a later one, a study, or the scripts; "Read next" leads through all of them."""
    order = re.findall(r"^    (\w+)  ", (ROOT / "mod/__init__.py").read_text().split("order")[1].split("Size letters")[0], re.M)
    assert set(order) | {"__init__", "flags"} == {module.stem for module in MODULES}
    if path.stem not in order:
        return
    imported = re.findall(r"^from mod\.(\w+)", path.read_text(), re.M)
    assert all(order.index(name) < order.index(path.stem) for name in imported), imported
    follows = ["../train_tiny.py", *[f"{name}.py" for name in order[1:]]]
    following = re.search(r"Read next: (\S+)", path.read_text()).group(1)
    assert following in follows and following == ([*follows[1:], follows[0]])[order.index(path.stem)]


def test_requirements_give_a_reason_for_every_line():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines[1]
    assert all("#" in line for line in lines if line.strip())
