"""The course: every chapter runs, its exercises judge rightly, and it speaks of nothing that is not there."""

import ast
import builtins
import functools
import importlib
import inspect
import io
import json
import keyword
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import numpy as np
import pytest

from tests import notebooks
from tests.notebooks import COURSE, ROOT, chapters, exercises, figures, printed, read, tagged, wrong_answers

CHAPTERS = (
    "00_the_idea", "01_frames_to_tokens", "02_the_stream", "03_the_decoder", "04_the_router", "05_the_cache", "06_train_it",
    "07_what_it_costs", "08_the_tables", "09_drop_merge_or_skip", "10_your_own",
)
SLOW = ("06_train_it", "10_your_own")  # they train; the others run beside them
each_chapter = pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)


def markdown(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def code_cells_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_cells(path: Path) -> list:
    return code_cells_of(read(path))


def prose(path: Path) -> str:
    """Markdown without code and formulas."""
    text = re.sub(r"```.*?```", " ", markdown(path), flags=re.DOTALL)
    return re.sub(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", " ", text, flags=re.DOTALL)


def inline_code(path: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", " ", markdown(path), flags=re.DOTALL))


def anchor_of(heading: str) -> str:
    """The link that a code host makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor_of(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}


@functools.cache
def words_of_the_repository() -> set[str]:
    paths = [*ROOT.glob("*.py"), *(ROOT / "mod").rglob("*.py"), COURSE / "course.py", *(ROOT / "tests").glob("*.py")]
    return set(re.findall(r"[A-Za-z_]\w*", "\n".join(path.read_text() for path in paths if path.name != "test_tutorials.py")))


def test_the_course_is_complete():
    assert [path.stem for path in chapters()] == list(CHAPTERS)


@pytest.fixture(scope="module")
def runs(request) -> Iterator[dict[Path, Future]]:
    """Every chapter that is to be tested, executed in processes of their own, two at a time."""
    tested = test_a_chapter_runs_and_its_exercises_judge_rightly.__name__
    asked = [item.callspec.params["path"] for item in request.session.items if item.originalname == tested]
    asked.sort(key=lambda path: path.stem not in SLOW)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        yield {path: pool.submit(notebooks.run, path, wrong_answers(path), again=True) for path in asked}
        pool.shutdown(cancel_futures=True)


@each_chapter
def test_a_chapter_runs_and_its_exercises_judge_rightly(path, runs):
    """Top to bottom, unsolved, each quick cell twice; every check refuses the unsolved cell and wrong answers, with a hint, and takes the
    solution. The file's outputs are of this code: same kinds, same displayed source."""
    result = runs[path].result()
    assert notebooks.complaints(result) == []
    assert result.seconds < 90, f"{result.seconds:.0f} s of processor time"
    for now, stored in zip(code_cells_of(result.notebook), code_cells(path), strict=True):
        kinds = [[sorted(output.get("data", {})) or output.output_type for output in cell.outputs] for cell in (now, stored)]
        assert kinds[0] == kinds[1], f"python -m tests.notebooks --write {path.stem}\n{now.source}"
        shown = [[output.data["text/markdown"] for output in cell.outputs if "```python" in output.get("data", {}).get("text/markdown", "")] for cell in (now, stored)]
        assert shown[0] == shown[1], f"the package has changed: python -m tests.notebooks --write {path.stem}"


@each_chapter
def test_the_file_is_clean(path):
    raw, notebook = path.read_text(), read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert path.stat().st_size < 500_000, "make figures smaller"
    text = re.sub(r'"image/png": "[^"]*"', "", raw)
    assert str(ROOT) not in text and "/tmp" not in text and "/home/" not in text
    assert set(re.findall(r"https?://([\w.]+)", nbformat.writes(notebook))) <= {"arxiv.org"}


@each_chapter
def test_outputs_are_there_and_without_errors(path):
    counts = []
    for cell in code_cells(path):
        counts.append(cell.execution_count)
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result"), cell.source
            assert output.get("name") != "stderr", f"warnings in a lesson: {output.text}"
        assert not tagged(cell, "check") or printed(cell).startswith("✗")
    assert counts == list(range(1, len(counts) + 1)), f"python -m tests.notebooks --write {path.stem}"


@each_chapter
def test_the_skeleton_is_the_same_everywhere(path):
    notebook, text, number = read(path), markdown(path), int(path.stem[:2])
    cells, code = notebook.cells, code_cells_of(notebook)
    assert 15 <= len(cells) <= 35
    assert re.match(rf"# {number} · [A-Z]", cells[0].source) and "**Question.**" in cells[0].source
    assert re.search(r"\*Time: about \d+ minutes\. Needs: .+\*", cells[0].source)
    assert code[0] is cells[1] and code[0].source == code_cells(COURSE / f"{CHAPTERS[0]}.ipynb")[0].source
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 26 and max(map(len, lines)) <= 120, cell.source
        assert "plt.show" not in cell.source, "use course.show, which knows alt text"
    sources = "\n".join(cell.source for cell in code)
    assert "course.source(" in sources, "show the package's own code"
    assert "assert_close(" in sources or "assert torch.equal(" in sources, "assert that naive and package are equal"
    assert re.search(r"^(from|import) mod\b", sources, re.M)
    if number < 10:
        assert f"]({CHAPTERS[number + 1]}.ipynb)" in cells[-1].source, "the way to the next chapter"
    # three exercises, in order: statement, stub, check; all solutions folded
    found = exercises(notebook)
    assert [each.number for each in found] == [f"{number}.{n}" for n in (1, 2, 3)]
    for each in found:
        place = cells.index(each.stub)
        assert cells[place - 1].cell_type == "markdown" and f"## Exercise {each.number}" in cells[place - 1].source
        assert cells[place + 1] is each.check and "..." in each.stub.source
    assert text.count("<details>") == text.count("</details>") == 3
    assert "**Afterwards you can** " in cells[0].source and "## An open question\n" in text
    for each in found:
        statement = cells[cells.index(each.stub) - 1].source
        assert re.search(rf"## Exercise {each.number}: .+\n\n\*(Easy|Medium|Hard), \d+ minutes\.\* ", statement), statement
    assert "| the paper says | we find | why |\n" in text and "](paper.md)" in text


@each_chapter
def test_figures_are_described(path):
    cells, count = read(path).cells, 0
    for place, cell in enumerate(cells):
        for figure in figures(cell) if cell.cell_type == "code" else ():
            count += 1
            alt = figure.metadata.get("image/png", {}).get("alt", "")
            assert len(alt) > 30 and alt == figure.data["text/plain"], cell.source
            following = cells[place + 1]
            assert following.cell_type == "markdown" and following.source.startswith("*Figure"), cell.source
    assert count >= 2, "a picture and a plot"
    assert not re.search(r"!\[", markdown(path)), "pictures are drawn, not linked"


def defined_at(path: str, name: str) -> bool:
    """Is there such a function, class, method or constant, and is it written in that file?"""
    value = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        if not hasattr(value, part):
            # an attribute that instances get, or a dataclass field without default
            return inspect.isclass(value) and part in getattr(value, "__annotations__", {})
        value = getattr(value, part)
    if inspect.isfunction(value) or inspect.isclass(value):
        return Path(inspect.getsourcefile(inspect.unwrap(value))).resolve() == (ROOT / path).resolve()
    return True


def equation_rows(path: Path) -> list[tuple[str, str]]:
    """(file, name) of every row of the table that begins with | equation | file | name |."""
    text, found = markdown(path), []
    for table in re.findall(r"^\| equation \| file \| name \|.*\n\|[-| ]+\n((?:\|.*\n?)+)", text, re.M):
        for row in table.strip().splitlines():
            file, name = re.search(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|", row).groups()
            found.append((file, name))
    return found


@each_chapter
def test_every_equation_is_where_the_table_says(path):
    rows = equation_rows(path)
    assert len(rows) >= 3, "a table | equation | file | name |"
    for file, name in rows:
        assert (ROOT / file).is_file() and defined_at(file, name), f"{file} {name}"


@each_chapter
def test_every_file_and_name_that_is_mentioned_exists(path):
    own = set(re.findall(r"[A-Za-z_]\w*", "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")))
    solutions = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"```python(.*?)```", markdown(path), re.DOTALL))))
    known = words_of_the_repository() | own | solutions | set(dir(builtins)) | set(keyword.kwlist)
    for span in inline_code(path):
        for file in re.findall(r"(?<![\w/.<-])((?:mod|tests|results|tutorials)/[\w./-]*|\w+\.(?:py|md|json|txt|ipynb))(?![\w/])", span):
            assert (ROOT / file).exists() or (COURSE / file).exists(), file
        for module in re.findall(r"\b((?:mod|tests)(?:\.\w+)+)", span):
            parts = module.split(".")
            importable = next(n for n in range(len(parts), 0, -1) if importlib.util.find_spec(".".join(parts[:n])))
            assert importable == len(parts) or defined_at("/".join(parts[:importable]) + ".py", ".".join(parts[importable:])), module
        plain = re.sub(r"\"[^\"]*\"|'[^']*'|<[^>]*>|--?[\w-]+|[\w./-]+\.\w{2,5}\b(?!\()|\w+/[\w./]*", " ", span)
        for name in re.findall(r"[A-Za-z_]\w*", plain):
            assert name in known or len(name) == 1, f"`{span}`: {name} is nowhere in the code"


@each_chapter
def test_links_lead_somewhere(path):
    text = markdown(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://arxiv.org/"):
            continue
        file, _, anchor = target.partition("#")
        assert (COURSE / file).exists() or file.removesuffix(".ipynb") in CHAPTERS, target
        assert not anchor or anchor in anchors((COURSE / file).read_text()), f"{target}: no such heading"
    assert len(set(re.findall(r"glossary\.md#[\w-]+", text))) >= 3, "terms are linked to the glossary where they come first"


@each_chapter
def test_numbers_in_the_prose_were_printed(path):
    """Decimals and percentages stand in a cell, in its output, or in what those studies wrote that the chapter names.
    (Chapter and exercise numbers, and counts that a sentence itself makes plain, are not measured.)"""
    looks = r"(?:figsize|[xy]lim)=\([^)]*\)|(?:lw|ms|alpha|width|fontsize|markersize|linewidth)=[\d.]+"  # measure nothing
    seen = "\n".join(re.sub(looks, "", cell.source) + printed(cell) for cell in code_cells(path))
    named = seen + markdown(path)
    tables = [file for file in (ROOT / "results").glob("*.md") if file.stem != "README"]
    studies = "\n".join(file.read_text() for file in tables if re.search(rf"\b{file.stem}\b", named))
    if "](paper.md)" in named:
        studies += (COURSE / "paper.md").read_text()
    numbers = set(re.findall(r"(?<![\d.])\d[\d,]*(?:\.\d+)?(?![\d.]*\d)", seen + studies))
    values = {float(number.replace(",", "")) for number in numbers}
    text = re.sub(r"(?:Exercise|Solution|[Ss]ection|[Cc]hapter|arXiv|Python|\]\(\S*)\s*[\d.]+\)?", " ", prose(path))
    text = re.sub(r"\]\([^)]*\)", " ", text)
    for number, percent in re.findall(r"(?<![\d.\w])(\d[\d,]*\.\d+|\d+(?=\s?%))(\s?%)?", text):
        value = float(number.replace(",", ""))
        assert value in values or (percent and value / 100 in values), f"{number}{percent} was printed by nobody"


@each_chapter
def test_the_prose_is_plain(path):
    text = prose(path)
    assert set(re.findall(r"<[^<>\n]*[a-z][^<>\n]*>", text)) <= {"<details>", "</details>", "<summary>", "</summary>"}, "`<eos>` needs backticks: as HTML nobody sees it"
    assert not re.search(r"(?i)\b(simply|obviously|clearly|of course|powerful|amazing|delve|leverage|seamless\w*)\b", text)
    assert not re.search("[\U0001f300-\U0001faff]", path.read_text())
    assert not re.search(r"(?i)\b(color|gray|behavior|neighbor|center)\b", text), "British English"
    parentheses = re.sub(r"\]\([^)]*\)", "]", text).count("(")
    assert parentheses <= 10, f"{parentheses} parentheses"


def test_the_map_agrees_with_the_chapters():
    """Title, minutes and needs of every chapter are in tutorials/README.md as the chapter itself says them."""
    text = (COURSE / "README.md").read_text()
    for path in chapters():
        head = read(path).cells[0].source
        title = re.match(r"# (.*)", head).group(1)
        minutes = re.search(r"Time: about (\d+) minutes", head).group(1)
        assert re.search(rf"\| \[{re.escape(title)}\]\({path.name}\) \| {minutes} \| .+ \|", text), f"| [{title}]({path.name}) | {minutes} | ... |"
    for target in re.findall(r"\]\(([\w./]+)\)", text):
        assert (COURSE / target).exists(), target
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt))`", text):
        assert (COURSE / name).exists() or (ROOT / name).exists(), name


def test_the_glossary_is_in_order_and_says_something_of_every_term():
    text = (COURSE / "glossary.md").read_text()
    terms = re.findall(r"^### (.*)$", text, re.M)
    assert terms == sorted(terms, key=str.lower) and len(set(anchors(text))) == len(terms) + 1
    for term, meaning in zip(terms, re.split(r"^### .*$", text, flags=re.M)[1:], strict=True):
        assert len(meaning.split()) >= 8, term
    assert not re.search(r"<\w+>", re.sub(r"`[^`]*`", "", text)), "symbols need backticks"
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        assert anchor in anchors(text), anchor
    # JupyterLab's own ids of headings keep capitals; it finds a term by the line above it.
    assert re.findall(r'^<a id="([\w-]+)"></a>\n\n### ', text, re.M) == list(map(anchor_of, terms))


def test_the_first_cell_starts_a_chapter_in_the_folder_of_the_course():
    """Two lines, with nothing but Python and the packages: what Jupyter, VS Code and Colab (after %cd) run there."""
    first = code_cells(COURSE / f"{CHAPTERS[0]}.ipynb")[0].source
    assert len([line for line in first.splitlines() if line]) == 2
    more = "import mod.config, sys; print('mod' in sys.modules, sys.path.count(course.ROOT.as_posix()))"
    ran = subprocess.run([sys.executable, "-c", f"{first}\ncourse.start(seed=1)\n{more}"], cwd=COURSE, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "torch" in ran.stdout and ran.stdout.splitlines()[-1] == "True 1"


def test_only_what_is_missing_is_installed(monkeypatch):
    course = importlib.import_module("tutorials.course")
    called = []
    monkeypatch.setattr(course.subprocess, "check_call", lambda command: called.append(command))
    monkeypatch.setattr(course.importlib.util, "find_spec", lambda name: None if name == "tqdm" else object())
    course.need(*course.NEEDS)
    assert [re.sub(r"[\d.]+", "#", each) for each in called[0][-1:]] == ["tqdm>=#"] and len(called) == 1
    lines = (ROOT / "requirements.txt").read_text()
    assert all(re.search(rf"^{name}[=>]", lines, re.M) for name in course.NEEDS)


def test_a_layout_is_told_as_a_table():
    """Position, token, frame, label; the middle of a frame is folded, so every other token has a line."""
    from mod.data import WORDS
    from mod.layout import Say, Vocabulary, lay_out

    words = Vocabulary(WORDS)
    layout = lay_out(words, 2, 5, [Say(0, "assistant", "red disc leaves"), Say(1, "user", "where is it ?")])
    lines = importlib.import_module("tutorials.course").row_of(layout, words).splitlines()
    text = sum(frame < 0 for frame in layout.frame)
    assert lines[0].split() == ["position", "token", "frame", "label"] and len(lines) == 1 + text + 2 * 3
    assert lines[2].split() == ["1", "<v>", "0"] and lines[3].split() == ["..."]
    assert lines[4].split(maxsplit=3) == ["5", "<v>", "0", "<assistant>   (streaming: speak)"]
    assert lines[6].split() == ["7", "red", "disc"] and lines[-1].split() == [str(len(layout.ids) - 1), "?"]


def test_a_badge_is_put_on_top_once_and_its_cell_does_nothing_elsewhere(tmp_path):
    from IPython.core.inputtransformer2 import TransformerManager

    before = read(shutil.copy(COURSE / f"{CHAPTERS[0]}.ipynb", tmp_path / "00_copy.ipynb"))
    for name in ("somebody/else", "someone/some.where"):
        notebooks.put_badge(tmp_path / "00_copy.ipynb", name)
    badge, fetch, *rest = nbformat.read(tmp_path / "00_copy.ipynb", as_version=4).cells
    assert badge.source.endswith("/github/someone/some.where/blob/HEAD/tutorials/00_copy.ipynb)")
    assert rest == before.cells == read(tmp_path / "00_copy.ipynb").cells
    exec(TransformerManager().transform_cell(fetch.source), {})  # in Colab alone it would need a shell
    notebooks.write(tmp_path / "00_copy.ipynb", read(tmp_path / "00_copy.ipynb"))
    assert nbformat.read(tmp_path / "00_copy.ipynb", as_version=4).cells[:2] == [badge, fetch], "new outputs, the same badge"
    for flags in (["https://somewhere"], ["a/b", "--write"], ["a/b", "99"]):
        with pytest.raises(SystemExit):
            notebooks.main(["--colab", *flags])


def test_scratch_folders_and_tables(capsys, monkeypatch):
    course = importlib.import_module("tutorials.course")
    folder = course.scratch()
    assert folder.is_dir() and folder != course.scratch()
    with course.quiet() as told:
        print("a path")
    assert told.getvalue() == "a path\n" and capsys.readouterr().out == ""
    shown = []
    monkeypatch.setattr(course, "display", shown.append)
    course.table("table1.md")
    course.table("table1.md", 1)
    text = (ROOT / "results/table1.md").read_text()
    assert all(each in text for each in shown) and shown[0].startswith("**Table 1") and shown[1].startswith("Orderings")


def test_a_verdict_says_what_is_off():
    import torch

    checks = importlib.import_module("tutorials.checks")
    want = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for got, hint in (
        (None, "Nothing here yet"), (want[0], r"shape \(2,\), expected \(2, 2\)"), ([1, 2], "is a list, expected a tensor"),
        (want + torch.tensor([[0.0, 0], [1, 0]]), r"at place \[1, 0\] is 4, expected 3 \(the first of 1 of 4"), (want > 0, "holds torch.bool"),
    ):
        with pytest.raises(checks.Wrong, match=hint):
            checks.same(got, want)
    for got, wanted, hint in (("a", 1.0, "expected a number"), (2, 1, "is 2, expected 1"), ([1], [1, 2], "expected 2 entries"), ([1, 3], [1, 2], "entry 1, is 3"), ("a", "b", "'a', expected 'b'")):
        with pytest.raises(checks.Wrong, match=hint):
            checks.same(got, wanted)
    checks.same(want.clone(), want)
    checks.same(want[0], [1.0, 2.0])  # a tensor where a list of numbers is wanted
    with pytest.raises(checks.Wrong, match="is 17,082,048, expected 17,082,112"):
        checks.same(17_082_048, 17_082_112, tolerance=0)
    with pytest.raises(checks.Wrong, match=r"is 4\.21637, expected 4\.216371"):
        checks.same(4.21637, 4.216371, tolerance=1e-9)
    with pytest.raises(checks.Wrong, match="entry 1, is None, expected a number"):
        checks.same([1, None], [1, 2])
    import einops

    told = checks.verdict("1.1", lambda frame, p: einops.rearrange(frame, "c (h p) (w p) -> (h w) (c p p)", p=p))
    assert 'duplicate dimension "p"' in told and "(in <lambda>: told" in told, "the reason and the student's own line"
    from mod.layout import make_plan

    def asks_the_package(x, kept, mu, f):
        return make_plan(np.zeros((1, 3)), [0], 5, [2])

    told = checks.verdict("0.2", asks_the_package)
    assert "It stops with ValueError: got 3 vision tokens" in told and "(in asks_the_package: return make_plan(" in told, "not a line of mod/"
    state = torch.random.get_rng_state()
    assert checks.verdict("0.1", lambda r, n: 1 / 0).startswith("✗ 0.1  It stops with ZeroDivisionError: division by zero")
    assert torch.equal(state, torch.random.get_rng_state()), "checking leaves the notebook's random numbers alone"


def golf(source: str) -> list[str]:
    """Lines of a cell that do several things at once."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.NamedExpr)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            found.append(node)
        for block in (getattr(node, name, None) for name in ("body", "orelse")):
            if isinstance(block, list):
                found += [two for one, two in zip(block, block[1:], strict=False) if one.end_lineno == two.lineno]
    return [ast.unparse(node) for node in found]


@pytest.mark.parametrize("source", ["a, b = 1, 2", "a = 1; b = 2", "if (a := 1):\n    pass", "for i in x:\n    f(); g()"])
def test_golf_is_seen(source):
    assert golf(source) and not golf("a, b = f()\nc = [i for i in a]\nfor x, y in zip(a, b):\n    print(x)")


@each_chapter
def test_a_line_of_a_cell_does_one_thing(path):
    for cell in code_cells(path):
        assert golf(cell.source) == [], cell.source


def test_code_cells_are_python_and_results_are_read_by_one_helper():
    for path in chapters():
        for cell in code_cells(path):
            list(tokenize.generate_tokens(io.StringIO(cell.source).readline))
            assert "json.load" not in cell.source, "use course.results"
    course = importlib.import_module("tutorials.course")
    assert course.results("seeds.json") == json.loads((ROOT / "results/seeds.json").read_text())


def test_what_chapter_8_says_of_the_results_holds():
    """The chapter prints its numbers from the results, and its prose names hardly any. These orderings it relies on."""
    from mod.study.statistics import judge

    results = importlib.import_module("tutorials.course").results
    one = {}
    for number in (1, 2, 3):
        one |= results(f"table{number}.json")["values"]
    for other in ("full", "exit-1", "exit-2", "skip", "all", "random", "uniform"):
        assert "**" not in judge(one["mod"]["questions"], one[other]["questions"]), other
    for better, worse, measure in (("all", "all-random", "questions"), ("all", "all-uniform", "questions"), ("mod", "all", "silence")):
        text = judge(one[better][measure], one[worse][measure])
        assert "**" in text and "reversed" not in text, (better, worse, text)
    crowd = results("crowd.json")
    shares = {name: list(found["quality"].values()) for name, found in crowd["values"].items()}
    mean = {name: sum(found) / len(found) for name, found in shares.items()}
    ceiling = {name: cost["ceiling"] for name, cost in crowd["costs"].items()}
    for other in ("one-drop", "one-random-all"):
        assert min(shares["one-mod-all"]) > max(shares[other]) + 0.05, other
        assert abs(mean[other] - ceiling[other]) < 0.05, other
    assert min(shares["one-mod-all"]) > 0.98 and mean["one-skip"] > 0.98
    mine = crowd["values"]["mod-all"]
    for other in ("skip", "exit", "drop", "pool", "random-all", "uniform-all"):
        theirs = crowd["values"][other]["quality"]
        better = [mine["quality"][seed] > share + 0.02 for seed, share in theirs.items()]
        assert all(better) if other != "skip" else sum(better) == len(better) - 1, other
        assert len(better) == 5, other
    assert abs(mean["drop"] - ceiling["drop"]) < 0.05
    assert all(abs(mean[other] - ceiling[other]) < 0.04 for other in ("exit", "random-all", "uniform-all"))
    below = [crowd["values"]["full"]["quality"][seed] - share for seed, share in mine["quality"].items()]
    assert min(below) > 0 and max(below) < 0.01 and min(mine["one look"].values()) > 0.99
    for found in results("division.json")["seeds"].values():
        most, few, many, rest = found["layers"]
        assert min(most, many) > 0.6 and 0.2 < min(few, rest) <= max(few, rest) < 0.4 and found["any"] > 0.99
