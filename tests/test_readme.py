"""The READMEs and the docstrings speak of what is there: files, functions, commands, flags, links, numbers."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

import stream_tiny
import train_tiny
from mod.live import watch
from mod.run import Parser, find_world
from mod.study import readme
from mod.study.seeds import BASE, table
from mod.study.sweep import collect
from mod.study.tables import MEASURES, TABLES, VARIANTS

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in readme.PAGES}
README, RESULTS = PAGES["README.md"], PAGES["results/README.md"]
CORE = list(readme.reading_order(ROOT))
MODULES = sorted((ROOT / "mod").rglob("*.py"))
GENERATED = r"<!-- (?:results/[\w-]+\.md|seeds|core|files|contents) -->\n.*?<!-- end -->"
pages = pytest.mark.parametrize("name", PAGES)


def prose(text: str) -> str:
    """A page without what is generated, code blocks, code spans and the targets of links."""
    for pattern in (GENERATED, r"<!--\w+-->.*?<!--/-->", r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(pattern, "", text, flags=re.S)
    return text


def commands(text: str) -> list[list[str]]:
    """Every `python ...` of a page's code blocks and code spans, split into words, `python` left out."""
    code = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text))
    lines = [part for line in code.splitlines() for part in line.split(" && ")]
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"(\S*/)?python3? ", line)]
    return [line[1:] for line in words]


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}")[1].split("\n## ")[0]


@pages
def test_pages_are_filled_with_what_is_there(name):
    """Tables, numbers in prose, line counts, lists of files, contents: `python -m mod.study.readme` would change nothing."""
    assert readme.filled(PAGES[name], ROOT / name, ROOT) == PAGES[name], "stale: run python -m mod.study.readme"


def test_filling_sees_what_is_stale_and_repeats_itself():
    page, text = ROOT / "README.md", README
    worse = re.sub(r"<!--flops-->.*?<!--/-->", "<!--flops-->9.99<!--/-->", re.sub(r"\(\d+\): every size", "(1): every size", text))
    assert worse != text and readme.filled(worse, page, ROOT) == readme.filled(text, page, ROOT)
    with pytest.raises(KeyError):
        readme.filled("<!--nothing-->1<!--/-->", page, ROOT)


def test_a_cell_is_found_by_row_and_column():
    text = "| a | b c |\n|---|---|\n| `x` | 1 |\n| y | 2 |\n\n| a | d |\n|---|---|\n| x | 3 |\n"
    assert [readme.cell(text, *where) for where in (("x", "b"), ("y", "b c"), ("x", "d"))] == ["1", "2", "3"]
    with pytest.raises(KeyError):
        readme.cell(text, "y", "d")


def test_the_readme_is_one_sitting():
    assert len(README.split()) <= 1200
    assert "<!-- test command -->\n```bash\n" in README  # .ci/run takes the command from there


@pages
def test_long_pages_have_contents(name):
    if name != "README.md" and len(PAGES[name].splitlines()) > 100:
        assert "## Contents\n\n<!-- contents -->\n- [" in PAGES[name]


@pages
def test_numbers_in_prose_come_from_results_or_from_the_code(name):
    """A number with a decimal point stands, as it is written, in a result or in the core; or it is not written."""
    sources = [path.read_text() for path in [*(ROOT / "results").glob("*.md"), *(ROOT / "mod").glob("*.py")] if path.name != "README.md"]
    there = set(re.findall(r"\d+\.\d+", "\n".join(sources))) | {"3.11", "2.5"}  # versions: of Python, of Qwen
    assert set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose(PAGES[name]))) <= there


@pages
def test_every_link_leads_somewhere(name):
    text, folder = PAGES[name], (ROOT / name).parent
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, part = link.partition("#")
        target = folder / file if file else ROOT / name
        assert target.exists(), link
        assert not part or part in map(readme.anchor, readme.headings(target.read_text())), link
    assert set(re.findall(r"\((https?://[^)]*)\)", text)) <= {"https://arxiv.org/abs/2408.16730"}


@pages
def test_every_named_file_exists(name):
    for named in re.findall(r"`((?:mod|tests|results|tutorials)/[\w/.*-]*|\w+\.py|\w+/)`", PAGES[name]):
        folder = (ROOT / name).parent
        assert list(ROOT.glob(named.rstrip("/"))) or list(folder.glob(named.rstrip("/"))), named


def test_every_file_is_named_and_every_picture_shown():
    for path in MODULES:
        listed = README if path.parent == ROOT / "mod" else PAGES[f"mod/{path.parent.name}/README.md"]
        file = f"mod/{path.name}" if listed is README else path.name
        assert path.name == "__init__.py" or f"[`{file}`]({file})" in listed, path
    for path in (ROOT / "results").glob("*.png"):
        assert f"](results/{path.name})" in README or f"]({path.name})" in RESULTS, path
    for path in (ROOT / "results").glob("*.md"):
        assert path.name == "README.md" or f"<!-- results/{path.name} -->\n" in RESULTS, path


def test_the_paper_to_code_map_names_functions_that_exist():
    rows = re.findall(r"\|[^|\n]*\| (`mod/[^|]*) \|", section(README, "From the paper to the code"))
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


def parsed_by_train(flags: list[str]) -> None:
    # --resume asks the folder what kind of run it is.
    train_tiny.choose_world([flag for flag in flags if flag != "--resume"])


def stream_parser() -> Parser:
    return watch.extend(stream_tiny.build_parser(), stream_tiny.__doc__)


def parsed_by_stream(flags: list[str]) -> None:
    stream_parser().parse_args(flags)


@pages
def test_every_command_parses(name):
    for words in commands(PAGES[name]):
        if words[0] != "-m":
            {"train_tiny.py": parsed_by_train, "stream_tiny.py": parsed_by_stream}[words[0]](words[1:])
        elif words[1] not in ("venv", "pytest"):
            module, flags = importlib.import_module(words[1]), [word for word in words[2:] if word.startswith("--")]
            if flags:
                with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
                    module.main(["--help"])
                assert set(flags) <= set(re.findall(r"--[\w-]+", printed.getvalue())), words
            assert hasattr(module, "main") or "__main__" in Path(module.__file__).read_text(), words


@pages
def test_every_flag_named_in_prose_exists(name):
    worlds = [find_world(world) for world in ("core", "related", "real")]
    known = {option for parser in (train_tiny.build_parser(worlds), stream_parser()) for action in parser._actions for option in action.option_strings}
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[name], flags=re.S))
    for span in (span for span in spans if not span.startswith("python -m ")):  # those are in the test above
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", span)) <= known | {"--nproc-per-node"}, span


def test_every_departure_in_the_code_is_listed():
    """As many as each file marks; the core's in the README, a folder's in the folder's."""
    for page, folder, heading in (("README.md", "mod", "Departures from the paper"), ("mod/related/README.md", "mod/related", "Departures from the papers")):
        marked = Counter({path.relative_to((ROOT / page).parent).as_posix(): path.read_text().count("DEVIATION:") for path in (ROOT / folder).glob("*.py")})
        told = Counter(re.findall(r"^- \[`([\w/]+\.py)`\]\(\1\)", section(PAGES[page], heading), re.M))
        assert +marked == told
    assert not [path for path in MODULES if path.parent.name in ("live", "real", "study") and "DEVIATION:" in path.read_text()]


def test_the_results_table_is_what_the_study_wrote():
    results = json.loads((ROOT / "results/seeds.json").read_text())
    assert (ROOT / "results/seeds.md").read_text() == table(results)
    assert all(len(runs) >= 5 for runs in results.values())
    assert list(results)[:2] == ["MoD (the default, gate sigmoid-value)", "full computation"] and len(results) == 5


def test_the_readme_shows_the_range_over_seeds():
    """Read once more, by hand, and against the configuration of today."""
    results = json.loads((ROOT / "results/seeds.json").read_text())
    for title, runs in results.items():
        cells = [part.strip() for part in next(line for line in README.splitlines() if line.startswith(f"| {title} ")).split("|")]
        shown, silence = cells[2], [run["silence_accuracy"] for run in runs]
        assert shown == "–".join(dict.fromkeys(f"{pick(run['narration_exact'] for run in runs):.3f}" for pick in (min, max)))
        assert f"{min(silence):.3f}" in cells[5] and f"{max(silence):.3f}" in cells[5]
    assert all(run["steps"] == BASE.train.steps for runs in results.values() for run in runs)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("table*.md")) + sorted((ROOT / "results").glob("bench*.md")), ids=lambda path: path.name)
def test_tables_are_what_their_json_files_say(path):
    data = json.loads(path.with_suffix(".json").read_text())
    from mod.study import ablate, bench_report
    written = bench_report.report(data) if path.name.startswith("bench") else ablate.report(int(path.stem.removeprefix("table")), data)
    assert path.read_text() == written
    assert f"]({path.stem}.png)" in RESULTS and path.with_suffix(".png").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("table*.json")), ids=lambda path: path.name)
def test_tables_are_what_the_runs_measured(path):
    """Every number in a table's file is read off results/study, and every run there has the configuration of today."""
    number, values = int(path.stem.removeprefix("table")), json.loads(path.read_text())["values"]
    base = find_world("related").presets["study"]
    found = collect(ROOT / "results/study", base, {name: VARIANTS[name] for name in TABLES[number].rows}, 5)
    assert {name: set(seeds) for name, seeds in found.items() if seeds} == {name: set(rows["narration"]) for name, rows in values.items()}
    for name, seeds in found.items():
        for measure, read in MEASURES.items():
            for seed, run in seeds.items():
                assert values[name][measure][seed] == pytest.approx(read(run), nan_ok=True) or values[name][measure][seed] is None


@pytest.mark.parametrize("name", ["soak", "gap", "windows", "crowd", "gates"])
def test_reports_are_what_their_json_files_say(name):
    report = importlib.import_module(f"mod.study.{name}").report
    assert (ROOT / f"results/{name}.md").read_text() == report(json.loads((ROOT / f"results/{name}.json").read_text()))
    assert f"]({name}.png)" in RESULTS and (ROOT / f"results/{name}.png").exists()


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_walked_in_one_direction(name):
    """No file of the core imports a later one; "Read next" leads through all of them and the two scripts."""
    assert set(CORE) | {"__init__", "parallel"} == {path.stem for path in (ROOT / "mod").glob("*.py")}
    text, place = (ROOT / f"mod/{name}.py").read_text(), CORE.index(name)
    imported = re.findall(r"^from mod\.(\w+)", text, re.M)
    assert all(CORE.index(other) < place for other in imported), imported
    following = [*(f"{other}.py" for other in CORE[1:]), "../train_tiny.py"]
    assert re.findall(r"^Read next: (\S+)$", text, re.M) == [following[place]]


def test_read_next_leads_somewhere():
    for path in MODULES:
        for following in re.findall(r"^Read next: (\S+)$", path.read_text(), re.M):
            assert (path.parent / following).is_file(), (path, following)


def test_requirements_give_a_reason_for_every_line():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines[1]
    assert all("#" in line for line in lines if line.strip())
