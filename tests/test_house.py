"""The house: the core is small, stands by itself, and fetches other rooms only when a flag or a run asks for them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("live", "real", "related", "study", "parallel")
SCRIPTS = ("train_tiny.py", "stream_tiny.py")
CORE = sorted(path for path in (ROOT / "mod").glob("*.py") if path.stem not in ROOMS)
# Where the core names a room: run.py says where each kind of run is put together, the scripts go behind their flags.
DOORS = {"run.py": {"mod.related.world", "mod.real.world"}, "train_tiny.py": {"mod.parallel"},
         "router.py": {"mod.related.chance"}, "train.py": {"mod.related.narrowing"}, "stream_tiny.py": {"mod.live.watch"}}
LOADED = "import sys; {}; print(*sorted(name for name in sys.modules if name.split('.')[0] == 'mod'))"


def loaded_by(statement: str) -> set[str]:
    """The modules of this project that a fresh process has loaded after a statement."""
    done = subprocess.run([sys.executable, "-c", LOADED.format(statement)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return set(done.stdout.splitlines()[-1].split())


def room_of(name: str) -> str | None:
    """The room that a module's name leads to, if it is not the core's."""
    parts = name.split(".")
    return parts[1] if parts[0] == "mod" and parts[1:] and parts[1] in ROOMS else None


def test_the_scripts_load_the_core_and_nothing_else():
    loaded = loaded_by("import train_tiny, stream_tiny")
    assert not {name for name in loaded if room_of(name)}
    core = {"mod" if path.stem == "__init__" else f"mod.{path.stem}" for path in CORE}
    assert loaded == core, "every file of the core has its use"
    assert len(core - {"mod"}) + len(SCRIPTS) <= 17, sorted(core)


@pytest.mark.parametrize("script", ["train_tiny", "stream_tiny"])
@pytest.mark.parametrize("flags", ["--help", "--layers"])
def test_a_script_that_is_refused_or_explains_itself_has_trained_nothing(script, flags, tmp_path):
    done = subprocess.run([sys.executable, f"{script}.py", flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if flags == "--help" else 2) and "Traceback" not in done.stderr


def test_a_run_of_the_core_is_trained_and_streamed_by_the_core_alone(tmp_path):
    """Not only imported: a whole run, and a stream of it, without a flag that asks for more."""
    flags = ["--steps=1", "--vit-steps=0", "--frames=2", "--batch-size=1", "--eval-clips=1", "--device=cpu"]
    stream = [f"--checkpoint={tmp_path}", "--ask=0:where is it ?", "--device=cpu"]
    script = f"train_tiny.main({[*flags, f'--out={tmp_path}']}); stream_tiny.main({stream})"
    loaded = loaded_by(f"import train_tiny, stream_tiny; {script}")
    assert (tmp_path / "metrics.json").is_file()
    assert not {name for name in loaded if room_of(name)}


def imports(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    """Every module that a file imports, wherever it does."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


def sources() -> list[Path]:
    return [*CORE, *(ROOT / script for script in SCRIPTS)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_no_file_of_the_core_names_a_room_but_behind_its_door(path):
    """Neither an import nor a string: what is named in comments and explanations is for readers."""
    tree = ast.parse(path.read_text())
    named = {module for module, _ in imports(tree) if room_of(module)}
    explained = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
               and id(node) not in explained}
    named |= {text for text in strings if not set(text) & set(" \n") and room_of(text)}
    allowed = DOORS.get(path.name, set())
    assert all(any(name == door or name.startswith(door + ".") for door in allowed) for name in named), named
    for module, node in imports(tree):
        if room_of(module):
            assert node.col_offset > 0, f"{module} is imported before anybody asked for it"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_lines_are_at_most_120_wide(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 120]


MAY_IMPORT = {"live": {"real"}, "real": set(), "related": {"real"}, "study": {"live", "real", "related"},
              "parallel": set()}
FORMULAS = ("mod.study.costs", "mod.live.costs")  # sums about the core that anybody may do


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_the_core_and_each_other_one_way(room):
    """No circles: real needs none of them, live and related at most real, study all."""
    folder = ROOT / "mod" / room
    for path in sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
        modules = [module for module, _ in imports(ast.parse(path.read_text())) if not module.startswith(FORMULAS)]
        if f"mod.{room}.{path.stem}" in FORMULAS:
            assert not any(map(room_of, modules)), path
        others = set(map(room_of, modules)) - {None, room, "parallel"}
        assert others <= MAY_IMPORT[room], (path, others)
