"""Writes the table of csrc/README.md: the sources, their libraries and every operator that they register."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- written by csrc/table.py -->\n", "<!-- end -->\n"


def table() -> str:
    """A row for each source, in which the first sentence of its head says what it holds."""
    rows = ["| file | library | operators | what it holds |", "|---|---|---|---|"]
    for source in sorted(f for f in HERE.rglob("*") if f.suffix in (".cpp", ".cu", ".h")):
        path, text = source.relative_to(HERE), source.read_text()
        head = re.match(r"// (.*?)\.\s", text, re.DOTALL)[1].replace("\n// ", " ")
        registered = re.findall(r'(?:\bm\.def\(\s*|^    \{)"(\w+)', text, re.MULTILINE)
        operators = ", ".join(f"`{name}`" for name in registered)
        library = f"`mmfuse/_C_{path.parent}.so`" if operators else ""
        rows.append(f"| `{path}` | {library} | {operators} | {head} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])
