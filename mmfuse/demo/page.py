"""The report: one self-contained HTML page. The terminal shows its claims, each at once."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape as plain
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import mmfuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee4; --paper: #fff; --card: #f5f7f9;
  --link: #0b5fa5; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #343b44; --paper: #15181c;
  --card: #1e2329; --link: #79b8f3; --good: #56c98b; --bad: #ff8a80; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff;
  --link: #000; --good: #1a7f4b; --bad: #b3261e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
ul + ul { margin-top: -.7rem; } code { font-size: .9em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line);
  break-after: avoid; }
p { max-width: 46rem; margin: .6rem 0; } .soft { color: var(--soft); }
a { color: var(--link); } nav a { margin-right: 1.1rem; white-space: nowrap; }
ul { list-style: none; padding: 0; margin: 1rem 0; } li { padding-left: 1.7rem; text-indent: -1.7rem; margin: .3rem 0; }
li::before { display: inline-block; width: 1.7rem; text-indent: 0; font-weight: 700; }
.holds::before { content: "\\2713"; color: var(--good); } .fails::before { content: "\\2717"; color: var(--bad); }
.fails { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.1rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); } .left { text-align: left; }
td.left:last-child { white-space: normal; } tr { break-inside: avoid; }
td:last-child, th:last-child { padding-right: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; font-size: .8rem;
  line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; break-inside: avoid; }
figure { margin: 1.2rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
summary { cursor: pointer; color: var(--link); font-size: .86rem; }
figcaption { color: var(--soft); font-size: .86rem; margin-top: .4rem; max-width: 52rem; }
@media print { body { font-size: 10pt; padding: 0; } nav { display: none; } .wide { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding-right: .7rem; } pre { font-size: 7.5pt; } h2 { margin-top: 1.5rem; } }
"""


class Page:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._console = Console(highlight=False)
        self._titles: list[str] = []
        self._html: list[str] = []
        self._claims: list[tuple[bool, str]] = []

    @property
    def holds(self) -> bool:
        return all(holds for holds, _ in self._claims)

    def section(self, title: str) -> None:
        self._titles.append(title)
        self._html.append(f'<h2 id="{_slug(title)}">{escape(title)}</h2>')

    def text(self, text: str) -> None:
        """A paragraph."""
        code = re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
        self._html.append(f"<p>{code}</p>")

    def pre(self, text: str) -> None:
        """Text with its own line breaks."""
        self._html.append(f"<pre>{escape(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, folded: str = "") -> None:
        """The first `left` columns are text, the others numbers. With `folded`, this line unfolds it."""
        cells = _row("th", columns, left) + "".join(_row("td", row, left) for row in rows)
        table = f'<div class="wide"><table>{cells}</table></div>'
        self._html.append(f"<details><summary>{escape(folded)}</summary>{table}</details>" if folded else table)

    def figure(self, name: str, caption: str, figure: Figure | None = None) -> None:
        """A figure, saved as `name`.png in the folder, or the file of that name that is there already."""
        path = self.folder / f"{name}.png"
        if figure is not None:
            figure.savefig(path, dpi=130)
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        self._html.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def claim(self, holds: bool, text: str) -> None:
        """Something that the demo says, checked: the exit code is 1 if it does not hold."""
        self._claims.append((holds, text))
        line = f"[green]holds[/green]  {plain(text)}" if holds else f"[red]FAILS  {plain(text)}[/red]"
        self._console.print(line, soft_wrap=True)
        self._html.append(f"<ul>{_claim(holds, text)}</ul>")

    @contextmanager
    def progress(self, total: float) -> Iterator[Callable[[str, float], None]]:
        """A bar while something runs; call with what is being done and how much is."""
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            task = progress.add_task("", total=total)
            yield lambda text, done: progress.update(task, description=plain(text), completed=done)

    def write(self, seconds: float) -> Path:
        """The page as `report.html`; returns its path."""
        path = self.folder / "report.html"
        failed = sum(not holds for holds, _ in self._claims)
        verdict = f"{failed} of {len(self._claims)} claims FAIL" if failed else f"all {len(self._claims)} claims hold"
        when = f"mmfuse {mmfuse.__version__}, {datetime.now():%Y-%m-%d %H:%M}, {seconds:.0f} seconds"
        links = "".join(f'<a href="#{_slug(t)}">{escape(t)}</a> ' for t in self._titles)
        claims = "".join(_claim(*claim) for claim in self._claims)
        path.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mmfuse demo</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
            f'<h1>mmfuse demo: {verdict}</h1><p class="soft">{when}</p><nav>{links}</nav><ul>{claims}</ul>\n'
            + "\n".join(self._html)
            + "\n</body></html>\n",
            encoding="utf-8",
        )
        return path


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _row(tag: str, cells: Sequence[str], left: int) -> str:
    kinds = (' class="left"' if i < left else "" for i in range(len(cells)))
    return f"<tr>{''.join(f'<{tag}{k}>{escape(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True))}</tr>"


def _claim(holds: bool, text: str) -> str:
    return f'<li class="{"holds" if holds else "fails"}">{escape(text)}</li>'
