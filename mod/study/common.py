"""What all studies share: one style of command line, of tables, and of figures.

Colours are those that colour-blind readers can tell apart (Okabe and Ito's palette).
"""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mod.live.picture import BLUE, GREEN, VERMILION
from mod.run import Parser, add_flags, given, run_script, to_json, write_text

PURPLE, SKY = "#CC79A7", "#56B4E9"
SHARES = {"narration": "narration_exact", "questions": "question_accuracy", "speak": "speak_accuracy",
          "silence": "silence_accuracy"}  # a column's name: its metric
LAYERS = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"))  # of the routed layers, in turn


def command(name: str, doc: str, flags: type, study: Callable[..., int]) -> Callable[[list[str] | None], int]:
    """The `main` of a study, whose flags are the fields of a dataclass, as those of a run are: name, type, default and
    remark are written once, there. `study` takes one object of that class and returns the exit code."""

    def main(argv: list[str] | None = None) -> int:
        parser = Parser(prog=name, description=doc.split("\n")[0])
        add_flags(parser, "flags", flags)
        arguments = parser.parse_args(argv)
        return run_script(lambda: study(flags(**given(arguments, flags))), name)

    return main


def markdown(table: pd.DataFrame) -> str:
    """A table of finished cells, its index as first column."""
    return table.to_markdown(stralign=None, disable_numparse=True) + "\n"


def publish(path: Path, results: dict, text: str, plot: Callable[[dict, Path], None]) -> None:
    """Write a study's results beside each other: as JSON, as Markdown, and drawn; then print the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".json"), to_json(results, indent=1) + "\n")
    write_text(path.with_suffix(".md"), text)
    plot(results, path.with_suffix(".png"))
    print(f"{text}\nwrote {path}.json, .md and .png")
