"""What all studies share: one style of command line, and one of tables."""

from collections.abc import Callable

import pandas as pd

from mod.run import Parser, add_flags, given, run_script


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
