"""Runs the course's notebooks.

    python -m tests.notebooks                  # all of them, top to bottom, with every exercise: seconds and verdicts
    python -m tests.notebooks 04               # the chapters whose names begin so
    python -m tests.notebooks --write 04       # and write the outputs into the files: how checked-in outputs are made
    python -m tests.notebooks --pictures DIR   # and their figures as files, to look at
    python -m tests.notebooks --colab OWNER/NAME    # run nothing: put a badge on top that opens the chapter in Colab

Chapters are executed as a student would: in the folder tutorials, one kernel each, one thread, exercises unsolved. Then,
in the same kernel, every exercise is answered wrongly and rightly, and each answer is checked.
"""

import argparse
import base64
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "tutorials"
AGAIN_SECONDS = 3  # cells that take less are run again by the tests
CELL_SECONDS = 600  # far more than any cell takes, on a busy machine too; a cell that hangs must not hang the tests
FETCH = """import os
import sys

if "google.colab" in sys.modules and not os.path.isdir("/content/clone"):
    !git clone -q https://github.com/{repository} clone
    %cd -q clone/tutorials"""
STAMP = "import time as _time; print(_time.process_time())"


def chapters(prefixes: list[str] | None = None) -> list[Path]:
    found = sorted(COURSE.glob("[0-9][0-9]_*.ipynb"))
    return [path for path in found if not prefixes or any(path.name.startswith(prefix) for prefix in prefixes)]


def read(path: Path) -> NotebookNode:
    """A chapter, without what `put_badge` has put on top."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "colab")]
    return notebook


def write(path: Path, notebook: NotebookNode) -> None:
    """The same file for the same content: no times, no machine, nothing a viewer does not need. A badge stays."""
    if path.is_file() and not any(tagged(cell, "colab") for cell in notebook.cells):
        before = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in before.cells if tagged(cell, "colab")] + notebook.cells
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def put_badge(path: Path, repository: str) -> None:
    """Put a badge on top of a chapter that opens it in Colab, from a public repository (OWNER/NAME), and a cell that
    fetches the rest there and does nothing elsewhere."""
    notebook, host = read(path), "https://colab.research.google.com"
    page = f"{host}/github/{repository}/blob/HEAD/tutorials/{path.name}"
    top = [nbformat.v4.new_markdown_cell(f"[![Open in Colab]({host}/assets/colab-badge.svg)]({page})"),
           nbformat.v4.new_code_cell(FETCH.format(repository=repository))]
    for number, cell in enumerate(top):
        cell.id, cell.metadata.tags = f"colab-{number}", ["colab"]
    notebook.cells = top + notebook.cells
    write(path, notebook)


def tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def printed(cell: NotebookNode) -> str:
    """All text that a cell gave."""
    texts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type != "error":
            texts += [value for kind, value in output.data.items() if kind in ("text/plain", "text/markdown")]
    return "".join(texts)


def figures(cell: NotebookNode) -> list[NotebookNode]:
    return [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


@dataclass
class Exercise:
    """One exercise of a notebook: its number, its cells and its solution."""

    number: str
    stub: NotebookNode
    check: NotebookNode
    solution: str


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises, in order. The solution of 4.1 is the python block folded below <summary>Solution 4.1</summary>."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    pattern = r"<summary>Solution (\d+\.\d)</summary>.*?```python\n(.*?)```.*?</details>"
    solutions = dict(re.findall(pattern, text, re.DOTALL))
    stubs = [cell for cell in notebook.cells if tagged(cell, "exercise")]
    found = []
    for stub, check in zip(stubs, [cell for cell in notebook.cells if tagged(cell, "check")], strict=True):
        number = re.search(r'course\.check\("(\d+\.\d)"', check.source).group(1)
        found.append(Exercise(number, stub, check, solutions[number]))
    return found


@dataclass
class Run:
    """What came of a chapter."""

    notebook: NotebookNode
    unsolved: dict[str, str] = field(default_factory=dict)  # exercise -> verdict
    solved: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # exercise -> (hint to be in it, verdict)
    seconds: float = 0.0  # of the processor, for the chapter from top to bottom
    wall: float = 0.0


class Kernel:
    """A kernel that runs cells and scraps of code."""

    @contextmanager
    def running(self) -> Iterator["Kernel"]:
        # A student's notebook talks about nothing but the lesson; one thread, since small tensors need no more.
        settings = {"OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "TQDM_DISABLE": "1",
                    "MPLBACKEND": "agg"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        scratch = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()])  # nbclient puts each cell in there
        try:
            with tempfile.TemporaryDirectory() as folder:
                # Sockets in a folder of its own instead of network ports, where the system has them.
                ipc = {"transport": "ipc", "ip": f"{folder}/kernel"} if hasattr(socket, "AF_UNIX") else {}
                self.client = NotebookClient(
                    scratch, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
                    resources={"metadata": {"path": str(COURSE)}}, config=Config({"AsyncKernelManager": ipc}),
                )
                with self.client.setup_kernel():
                    yield self
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def cell(self, cell: NotebookNode, number: int | None = None) -> str:
        self.client.execute_cell(cell, 0, execution_count=number)
        return printed(cell)

    def code(self, source: str) -> str:
        """Run a scrap beside the notebook's cells. An exception is part of what it gives."""
        scrap = nbformat.v4.new_code_cell(source)
        try:
            return self.cell(scrap)
        except CellExecutionError as error:
            return f"{printed(scrap)}{error.ename}: {error.evalue}"


def run(path: Path, wrong: dict[str, tuple[tuple[str, str], ...]] | None = None, again: bool = False) -> Run:
    """Execute a chapter, then its exercises: `wrong` maps an exercise to (code, part of the hint) pairs. With `again`
    each quick cell is run twice, as students do, which must go well."""
    notebook = read(path)
    result, kernel, count, repeated = Run(notebook), Kernel(), 0, 0.0
    begun = time.perf_counter()
    with kernel.running():
        for cell in notebook.cells:
            if cell.cell_type == "code":
                count, started = count + 1, time.perf_counter()
                kernel.cell(cell, count)
                if again and time.perf_counter() - started < AGAIN_SECONDS:
                    before = float(kernel.code(STAMP))
                    kernel.cell(nbformat.v4.new_code_cell(cell.source))
                    repeated += float(kernel.code(STAMP)) - before
        result.seconds, result.wall = float(kernel.code(STAMP)) - repeated, time.perf_counter() - begun
        for each in exercises(notebook):
            result.unsolved[each.number] = printed(each.check)
            result.wrong[each.number] = []
            for code, hint in (wrong or {}).get(each.number, ()):
                told = kernel.code(code) + kernel.code(each.check.source)
                result.wrong[each.number].append((hint, told))
            result.solved[each.number] = kernel.code(each.solution) + kernel.code(each.check.source)
    return result


def wrong_answers(path: Path) -> dict[str, tuple[tuple[str, str], ...]]:
    """The wrong answers that stand beside a chapter's checks."""
    import importlib

    if str(COURSE) not in sys.path:
        sys.path.insert(0, str(COURSE))
    checks = importlib.import_module("checks")
    return {each.number: checks.find(each.number).wrong for each in exercises(read(path))}


def complaints(result: Run) -> list[str]:
    """What is wrong with how exercises are judged."""
    found = []
    for number, verdict in result.unsolved.items():
        if not verdict.startswith("✗"):
            found.append(f"{number} unsolved: {verdict!r}")
    for number, verdict in result.solved.items():
        if not verdict.startswith("✓"):
            found.append(f"{number} solved: {verdict!r}")
    for number, told in result.wrong.items():
        if not told:
            found.append(f"{number} has no wrong answer to try")
        for hint, verdict in told:
            if not verdict.startswith("✗") or hint not in verdict:
                found.append(f"{number} wrong answer, expected a hint with {hint!r}, got {verdict!r}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the course's notebooks.")
    parser.add_argument("chapters", nargs="*", help="beginnings of chapters' names, such as 04; all without")
    parser.add_argument("--write", action="store_true", help="write the outputs into the files")
    parser.add_argument("--pictures", type=Path, help="write the figures into this folder")
    parser.add_argument("--colab", metavar="OWNER/NAME", help="run nothing; put a badge on top that opens it in Colab")
    args = parser.parse_args(argv)
    if args.colab:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.colab):
            parser.error(f"--colab got {args.colab!r}, expected a public repository as OWNER/NAME")
        if args.write or args.pictures or not chapters(args.chapters):
            parser.error("--colab runs nothing: name chapters that there are, and leave --write and --pictures out")
        for path in chapters(args.chapters):
            put_badge(path, args.colab)
        return 0
    bad = 0
    for path in chapters(args.chapters):
        try:
            result = run(path, wrong_answers(path))
        except CellExecutionError as error:
            print(f"{path.name}: {error}")
            bad += 1
            continue
        problems = complaints(result)
        bad += len(problems)
        for number, hints in result.wrong.items():
            for verdict in (result.unsolved[number], *(verdict for _, verdict in hints), result.solved[number]):
                print(f"    {verdict.strip()}")
        print(f"{path.name}: {result.seconds:.1f} s of processor, {result.wall:.1f} s", *problems, sep="\n    ! ")
        if args.write:
            write(path, result.notebook)
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            drawn = [each for cell in result.notebook.cells for each in figures(cell)]
            for number, each in enumerate(drawn):
                (args.pictures / f"{path.stem}-{number}.png").write_bytes(base64.b64decode(each.data["image/png"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
