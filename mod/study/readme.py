"""Copy the tables of results/ into the README, between `<!-- results/NAME.md -->` and `<!-- end -->`.

python -m mod.study.readme        # after a study has written new tables; tests/test_readme.py sees a stale one
"""

import re
import sys
from pathlib import Path

from mod.checkpoint import write_text


def filled(text: str, root: Path) -> str:
    """The README's text with every marked place holding the file that its marker names, where there is one."""

    def fill(match: re.Match) -> str:
        file = root / match[1]
        return f"<!-- {match[1]} -->\n{file.read_text(encoding='utf-8') if file.is_file() else match[2]}<!-- end -->"

    return re.sub(r"<!-- (results/[\w-]+\.md) -->\n(.*?)<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    readme = Path("README.md")
    write_text(readme, filled(readme.read_text(encoding="utf-8"), Path(".")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
