"""The code blocks of README.md and docs/, as the tests run them.

A fenced block may carry an instruction, in an HTML comment on the line before it, which readers
do not see:

========================= ========================================================
``<!-- run -->``          Python, run in the tests' Django; one namespace a page
``<!-- test -->``         Python, its test functions and classes are run
``<!-- write: PATH -->``  a file of the project that the page builds
``<!-- append: PATH -->`` lines at the end of a file of that project
``<!-- shell -->``        Python, typed into ``manage.py shell``
``<!-- psql -->``         SQL, sent by a client that knows nothing of Django
``<!-- output -->``       lines that ``pglisten`` prints
========================= ========================================================

In ``console`` blocks the lines that begin with ``$ `` are commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
INSTRUCTIONS = frozenset({"run", "test", "write", "append", "shell", "psql", "output"})

_FENCE = re.compile(r"^(?P<fence>```+|:::+)(?P<language>[^\s`]*)")
_COMMENT = re.compile(r"^<!-- (?P<word>[a-z]+)(?:: (?P<argument>\S+))? -->$")


@dataclass(frozen=True)
class Snippet:
    """One fenced block; ``line`` is that of its first line of content."""

    path: Path
    line: int
    language: str
    text: str
    instruction: str = ""
    argument: str = ""

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    def __str__(self) -> str:
        return self.place

    @property
    def source(self) -> str:
        """The text, padded so that a traceback names the page's own line."""
        return "\n" * (self.line - 1) + self.text

    @property
    def commands(self) -> list[str]:
        """The commands of a console block."""
        return [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]


def pages() -> list[Path]:
    """Every page, the README first."""
    docs = (page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(docs)]


def snippets(*paths: Path) -> list[Snippet]:
    """The fenced blocks of these pages, or of all, in order."""
    return [snippet for path in paths or pages() for snippet in _of(path)]


def _of(path: Path) -> Iterator[Snippet]:
    lines = path.read_text(encoding="utf-8").splitlines()
    instruction = argument = ""
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if comment := _COMMENT.match(line):
            instruction, argument = comment["word"], comment["argument"] or ""
            continue
        if (fence := _FENCE.match(line)) and fence["fence"].startswith("`"):
            first = number
            while number < len(lines) and lines[number] != fence["fence"]:
                number += 1
            text = "\n".join(lines[first:number]) + "\n"
            yield Snippet(path, first + 1, fence["language"], text, instruction, argument)
            number += 1
        if line.strip():
            instruction = argument = ""
