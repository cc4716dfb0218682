"""Keep the READMEs true: refill whatever is made from the results or from the code.

python -m mod.study.readme        # after a study has written new results, or a file of the core has changed

    <!-- results/NAME.md --> ... <!-- end -->    the table that a study wrote
    <!-- seeds --> ... <!-- end -->              what training reaches, from the worst seed to the best
    <!-- core --> ... <!-- end -->               the core's files in reading order, with their line counts
    <!-- files --> ... <!-- end -->              the files of the page's own folder, as their docstrings describe them
    <!-- contents --> ... <!-- end -->           the page's headings
    <!--NAME-->0.64<!--/-->                      one number of `numbers`

tests/test_readme.py fails when a page is stale.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mod.config import ModelConfig
from mod.run import write_text
from mod.study.common import SHARES, markdown

PAGES = ("README.md", "results/README.md", *(f"mod/{name}/README.md" for name in ("live", "real", "related", "study")))
SCRIPTS = {"train_tiny.py": "train a run", "stream_tiny.py": "watch a live stream"}
# Column of `seeds_table`: a metric of seeds.json, of what it costs; those of how good it is are `SHARES`.
COSTS = {"decoder FLOPs": "flop_ratio", "KV cache": "kv_ratio"}


def span(values: Sequence[float], digits: int = 3) -> str:
    """The least and the greatest value; one number when they look alike."""
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least}–{most}"


def seeds_table(results: dict[str, list[dict]]) -> str:
    """What training reaches with each variant, from the worst seed to the best, as a Markdown table."""
    layers = list(dict.fromkeys(layer for runs in results.values() for run in runs for layer in run["recall"]))
    rows = {}
    for title, runs in results.items():
        row = {column: span([run[key] for run in runs]) for column, key in SHARES.items()}
        for layer in layers:
            known = [run["recall"][layer] for run in runs if layer in run["recall"]]
            row[f"recall, layer {layer}"] = span(known, 2) if known else "-"
        row |= {column: span([run[key] for run in runs], 2) for column, key in COSTS.items()}
        rows[title] = row
    return markdown(pd.DataFrame.from_dict(rows, orient="index"))


def cell(table: str, row: str, column: str) -> str:
    """The cell of a study's Markdown tables in the row that begins so, below the column whose heading begins so."""
    heading: list[str] = []
    for line in table.splitlines():
        cells = [part.strip() for part in line.strip("| ").split("|")] if line.startswith("|") else []
        if not cells:
            heading = []
        elif not heading:
            heading = cells
        elif " | ".join(cells).replace("`", "").startswith(row) and any(name.startswith(column) for name in heading):
            return cells[next(number for number, name in enumerate(heading) if name.startswith(column))]
    raise KeyError(f"no row {row!r} with a column {column!r}")


def numbers(root: Path) -> dict[str, str]:
    """The numbers that stand in prose, by the name of their marker."""
    seeds = json.loads((root / "results/seeds.json").read_text(encoding="utf-8"))
    first, full, *_ = seeds.values()  # the default, and full computation
    apart = [abs(mod["narration_exact"] - other["narration_exact"]) for mod, other in zip(first, full, strict=True)]
    bench = (root / "results/bench-cpu.md").read_text(encoding="utf-8")
    kept, tokens = min(ModelConfig().keep_counts), ModelConfig().frame_tokens
    return {
        "kept": str(kept), "tokens": str(tokens), "chance": f"{kept / tokens:.2f}",
        "flops": f"{first[0]['flop_ratio']:.2f}", "kv": f"{first[0]['kv_ratio']:.2f}", "seeds": str(len(first)),
        "near": f"{math.ceil(1000 * max(apart)) / 1000:.3f}", "millions": f"{first[0]['params'] / 1e6:.1f}",
        "steps": str(first[0]["steps"]), "seconds": span([run["seconds"] for run in first], 0),
        "step": cell(bench, "tiny", "step time"), "frame": cell(bench, "tiny | 260", "time of one more frame"),
        "far": cell(bench, "paper-like | 16,000", "time of one more frame"),
    }


def reading_order(root: Path) -> dict[str, str]:
    """The core's modules in reading order, each with what it holds, as mod/__init__.py lists them."""
    listed = (root / "mod/__init__.py").read_text(encoding="utf-8").split("order")[1].split("Size letters")[0]
    return dict(re.findall(r"^    (\w+)  +(.+)$", listed, re.M))


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def core(root: Path) -> str:
    """The core's files in reading order, as a numbered list."""
    files = {f"mod/{name}.py": what for name, what in reading_order(root).items()} | SCRIPTS
    counts = {file: line_count(root / file) for file in files}
    lines = [f"{number}. [`{file}`]({file}) ({counts[file]}): {files[file]}\n" for number, file in enumerate(files, 1)]
    method = list(counts.values())[: 1 + list(counts).index("mod/stream.py")]  # the rest measures and trains
    told = f"Files 1 to {len(method)} are the method and its data, {sum(method):,} of {sum(counts.values()):,} lines."
    return "".join(lines) + f"\n{told}\n"


def describe(path: Path) -> str:
    """What a module's docstring says first: one sentence, or a question with the sentence after it."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z`])", " ".join(docstring.split("\n\n")[0].split()))
    return " ".join(sentences[: 2 if sentences[0].endswith("?") else 1]).replace("|", "\\|")


def files(folder: Path) -> str:
    """A folder's modules, as a table: those that say what to read next in that order, then the others by name."""
    after = {}
    for path in folder.glob("*.py"):
        if following := re.search(r"^Read next: (\w+\.py)$", path.read_text(encoding="utf-8"), re.M):
            after[path.name] = following[1]
    order = sorted(set(after) - set(after.values()))[:1]
    while order and after.get(order[-1], order[-1]) not in order:
        order.append(after[order[-1]])
    order += sorted({path.name for path in folder.glob("*.py")} - {"__init__.py", *order})
    found = [folder / name for name in order]
    rows = [f"| [`{path.name}`]({path.name}) | {describe(path)} |\n" for path in found]
    return "".join(["| file | what it is |\n", "|---|---|\n", *rows])


def headings(text: str) -> list[str]:
    """The page's second-level headings, without those in code blocks."""
    return re.findall(r"^## (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def anchor(heading: str) -> str:
    """The name under which GitHub and others link to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def filled(text: str, page: Path, root: Path) -> str:
    """A page's text with everything between its markers as the results and the code are now."""

    def block(match: re.Match) -> str:
        name = match[1]
        if name.startswith("results/"):
            made = (root / name).read_text(encoding="utf-8")
        elif name == "seeds":
            made = seeds_table(json.loads((root / "results/seeds.json").read_text(encoding="utf-8")))
        elif name == "contents":
            made = "".join(f"- [{one}](#{anchor(one)})\n" for one in headings(text) if one != "Contents")
        else:
            made = core(root) if name == "core" else files(page.parent)
        return f"<!-- {name} -->\n{made}<!-- end -->"

    text = re.sub(r"<!-- (results/[\w-]+\.md|seeds|core|files|contents) -->\n.*?<!-- end -->", block, text, flags=re.S)
    known = numbers(root)
    return re.sub(r"<!--(\w+)-->[^<]*<!--/-->", lambda match: f"<!--{match[1]}-->{known[match[1]]}<!--/-->", text)


def main() -> int:
    for name in PAGES:
        page = Path(name)
        write_text(page, filled(page.read_text(encoding="utf-8"), page, Path(".")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
