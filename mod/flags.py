"""Command-line flags made from the fields of the configuration: name, type, help and choices are written once, there.

The two scripts use this. A flag that is not given stays out of the parsed arguments, so that a preset or a
checkpoint can fill it in: flag > checkpoint > preset.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from mod.config import HIDDEN, UserError


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is told in one sentence (exit code 2), with the nearest flag when the name is wrong."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(flag, known, n=1)
            message = f"got the unknown flag {flag}; {f'did you mean {near[0]}?' if near else 'see --help'}"
        self.exit(2, f"{self.prog}: {message}\n")


def add_fields(parser: argparse.ArgumentParser, title: str, kind: type) -> None:
    """One flag for every field of a dataclass."""
    group = parser.add_argument_group(title)
    for field in fields(kind):
        if field.metadata["otherwise"] == HIDDEN:
            continue
        name, default = "--" + field.name.replace("_", "-"), field.default
        told = field.metadata["otherwise"] or ("none" if default == "" else default)
        help = f"{field.metadata['help']} (default: {told})".replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            group.add_argument(
                name,
                type=type(default),
                choices=field.metadata["choices"],
                default=argparse.SUPPRESS,
                help=help,
            )


def given(arguments: argparse.Namespace, kind: type) -> dict:
    """The fields of a dataclass that were given as flags."""
    return {field.name: getattr(arguments, field.name) for field in fields(kind) if hasattr(arguments, field.name)}


def check_file(flag: str, path: Path, kinds: Sequence[str]) -> None:
    """Raises UserError, before any work, when no file of these kinds could be written at `path` afterwards."""
    if path.suffix not in kinds:
        raise UserError(f"{flag} got {path}, expected a file name that ends with {', '.join(kinds)}; name another")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(
            f"{flag} got {path}, but its folder does not exist or it is one itself; name a file in a folder"
        )


def run_script(script, arguments: argparse.Namespace, name: str) -> int:
    """Call script(arguments) -> exit code; a user's mistake becomes one sentence on stderr and exit code 2."""
    try:
        return script(arguments)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"{name}: not enough memory ({error}); ask for less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = ", and an unfinished run goes on with --resume" if name == "train_tiny.py" else ""
        print(f"{name}: interrupted; nothing is half written{goes_on}", file=sys.stderr)
        return 130
