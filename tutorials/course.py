"""Small helpers of the course: start a notebook, show the package's own source, show figures, check exercises.

Everything else in the notebooks is plain PyTorch, matplotlib and the package `mod`. Nothing happens at import.
"""

import atexit
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ("torch", "numpy", "einops", "matplotlib", "scipy", "pandas", "safetensors", "tqdm")

# Okabe and Ito's palette, which colour-blind readers can tell apart. Pair a colour with a marker, a line or a hatch.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
GREY = "#BBBBBB"
CYCLE = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"))  # colour and line style of lines, in turn


def need(*packages: str) -> None:
    """Install those of the packages that are missing, at the versions of requirements.txt; the rest stays as it is."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
        wanted = [line for line in lines if line.replace("=", ">").split(">")[0] in missing]
        print("installing", ", ".join(wanted))
        try:
            quietly = ["install", "-q", "--disable-pip-version-check"]
            subprocess.check_call([sys.executable, "-m", "pip", *quietly, *wanted])
        except subprocess.CalledProcessError:
            raise ImportError(f"pip could not install them; in a terminal: pip install {' '.join(wanted)}") from None
        importlib.invalidate_caches()


def start(seed: int = 0) -> None:
    """What every chapter begins with: packages, plot style, seed, versions."""
    need(*NEEDS)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # where the packages mod and tests lie
    import matplotlib.pyplot as plt
    import torch

    plt.rcParams.update({
        "figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "image.cmap": "cividis", "image.interpolation": "nearest",
        "axes.prop_cycle": plt.cycler(color=[c for c, _ in CYCLE], linestyle=[s for _, s in CYCLE]),
    })
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # tensors are so small here that threads only wait for each other
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "einops", "matplotlib")]
    print(f"Python {sys.version.split()[0]}, {', '.join(versions)}, seed {seed}")


def display(text: str, **other: str) -> None:
    """Show Markdown, with the same text for readers that have none."""
    from IPython.display import display as show_in_notebook

    show_in_notebook({"text/markdown": text, "text/plain": text, **other}, raw=True)


def source(*things) -> None:
    """Show functions, methods or classes of the package as they stand in their files."""
    for thing in things:
        # (unwrap: a cached or wrapped function shows its own source)
        real = inspect.unwrap(thing)
        path = Path(inspect.getsourcefile(real)).resolve().relative_to(ROOT).as_posix()
        code = textwrap.dedent(inspect.getsource(real)).rstrip()
        display(f"`{path}` · `{real.__qualname__}`\n\n```python\n{code}\n```")


def show(figure, alt: str) -> None:
    """Show a figure and close it. `alt` says what is to be seen, for those who cannot see it. (VS Code
    uses it. JupyterLab and exported pages drop it, so the caption below says what matters, too.)"""
    import base64

    import matplotlib.pyplot as plt
    from IPython.display import display as show_in_notebook

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}
    show_in_notebook(data, metadata={"image/png": {"alt": alt}}, raw=True)


def diagram(name: str) -> None:
    """Show one of the project's diagrams, drawn anew."""
    from mod.study.diagrams import DIAGRAMS

    show(DIAGRAMS[name].figure(), DIAGRAMS[name].alt)


def row_of(layout, words) -> str:
    """A layout as a table of position, token, frame and label, one line per token; the middle of a frame is folded."""
    from mod.layout import NO_LABEL

    lines = [f"{'position':>8}  {'token':<14} {'frame':>5}  label"]
    for position, (token, frame, label) in enumerate(zip(layout.ids, layout.frame, layout.labels, strict=True)):
        folded = frame >= 0 and label == NO_LABEL and position + 1 < len(layout.ids)
        if folded and layout.frame[position - 1] == frame and layout.frame[position + 1] == frame:
            if not lines[-1].endswith("..."):
                lines.append(f"{'...':>8}")
            continue
        word = "<v>" if frame >= 0 else words.words[token]
        meaning = "" if label == NO_LABEL else words.words[label]
        if frame >= 0 and label != NO_LABEL:
            meaning += "   (streaming: " + ("stay silent)" if label == words.eos else "speak)")
        lines.append(f"{position:>8}  {word:<14} {frame if frame >= 0 else '':>5}  {meaning}".rstrip())
    return "\n".join(lines)


def results(name: str):
    """What a study of the repository measured: a JSON file of the folder results."""
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def scratch() -> Path:
    """A folder for files that nobody needs for long: it goes when the notebook's kernel does."""
    import tempfile

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Collect what is printed inside instead of showing it: scripts name folders and times, which differ."""
    with redirect_stdout(io.StringIO()) as told:
        yield told


def table(name: str, number: int = 0) -> None:
    """Show one table of a study's Markdown file in the folder results, with the line that explains it."""
    blocks = (ROOT / "results" / name).read_text(encoding="utf-8").strip().split("\n\n")
    display("\n\n".join(blocks[2 * number : 2 * number + 2]))


def check(number: str, *answers) -> None:
    """Judge the answer to an exercise: prints what is off, or that it is right. Never raises."""
    importlib.import_module("checks").check(number, *answers)
