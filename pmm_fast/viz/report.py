"""A report as one HTML file: what it is made of, and how that is written.

A ``Report`` has sections, a section has blocks: texts, tables, pictures, folded parts.  The file needs nothing else:
pictures are embedded as data URIs, the style (``report.css``) stands in its head, there is no script and no address.
All text is escaped, so that a run or a class may be called anything.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from pmm_fast.data.convert_files import write_whole

JPEG_QUALITY = 85
"""Of photographs: a tenth of the PNG, and the edges of painted classes stay clean."""

HEAT = 0.62
"""How strongly a cell of share 1 is tinted: its text must stay legible, in light and dark."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<nav aria-label="Sections">
<ul>
{entries}
</ul>
</nav>
<main>
<header>
<h1>{title}</h1>
<p>{subtitle}</p>
</header>
{sections}
<footer>
<p>{footer}</p>
</footer>
</main>
</body>
</html>
"""


class Block(Protocol):
    """A part of a section."""

    def html(self) -> str:
        """The part as HTML, its text escaped."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        """``<p>``."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Note:
    """A paragraph that stands out: what is missing here and why, or what one must know to read on."""

    text: str

    def html(self) -> str:
        """``<p>`` of the class note."""
        return f'<p class="note">{escape(self.text)}</p>'


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str

    def html(self) -> str:
        """``<h3>``."""
        return f"<h3>{escape(self.text)}</h3>"


@dataclass(frozen=True)
class Code:
    """Text set as it is, such as a configuration."""

    text: str

    def html(self) -> str:
        """``<pre>``."""
        return f'<pre tabindex="0">{escape(self.text)}</pre>'


@dataclass(frozen=True)
class Folded:
    """Blocks that open at a click on their title; all are open in print."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """``<details>``."""
        return f"<details>\n<summary>{escape(self.title)}</summary>\n{_join(self.blocks)}\n</details>"


@dataclass(frozen=True)
class Legend:
    """Names with a swatch of their colour, as many a line as the page is wide.

    Attributes:
        entries: name and RGB colour (0..255) of each.
    """

    entries: Sequence[tuple[str, tuple[int, int, int]]]

    def html(self) -> str:
        """``<ul>``."""
        items = [
            f'<li><span style="background: rgb{colour}"></span>{escape(name)}</li>' for name, colour in self.entries
        ]
        return '<ul class="legend">\n' + "\n".join(items) + "\n</ul>"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        best: whether it is the best of its kind; written in bold.
        share: 0..1, how strongly it is tinted; None: not at all.
        hint: a few small words after the text.
    """

    text: str
    best: bool = False
    share: float | None = None
    hint: str = ""

    def html(self) -> str:
        """``<td>``."""
        tint = "" if self.share is None else f' class="heat" style="--tint: {100 * HEAT * self.share:.0f}%"'
        text = f"<strong>{escape(self.text)}</strong>" if self.best else escape(self.text)
        hint = f" <small>{escape(self.hint)}</small>" if self.hint else ""
        return f"<td{tint}>{text}{hint}</td>"


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; where the page is too narrow it scrolls by itself.

    Attributes:
        caption: what it shows.
        header: one title a column.
        rows: title, which is the first column, and cells of each.
        groups: titles over several columns, from the left, and how many they span; empty: none.
        words: whether its columns are words, set to the left, and not numbers.

    Raises:
        ValueError: a row, or the groups, of another number of columns than the header.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    groups: Sequence[tuple[str, int]] = ()
    words: bool = False

    def __post_init__(self) -> None:
        widths = {1 + len(cells) for _, cells in self.rows} | (
            {sum(span for _, span in self.groups)} if self.groups else set()
        )
        if widths - {len(self.header)}:
            raise ValueError(f"table {self.caption!r}: expected {len(self.header)} columns, got {sorted(widths)}")

    def html(self) -> str:
        """``<table>`` in a region that scrolls."""
        head = [f'<th scope="col">{escape(title)}</th>' for title in self.header]
        lines = ["<tr>" + "".join(head) + "</tr>"]
        if self.groups:
            over = [f'<th scope="colgroup" colspan="{span}">{escape(title)}</th>' for title, span in self.groups]
            lines.insert(0, "<tr>" + "".join(over) + "</tr>")
        rows = [
            f'<tr><th scope="row">{escape(title)}</th>' + "".join(cell.html() for cell in cells) + "</tr>"
            for title, cells in self.rows
        ]
        kind = ' class="words"' if self.words else ""
        return (
            f'<figure class="table">\n<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(self.caption)}">\n<table{kind}>\n<thead>\n'
            + "\n".join(lines)
            + "\n</thead>\n<tbody>\n"
            + "\n".join(rows)
            + f"\n</tbody>\n</table>\n</div>\n<figcaption>{escape(self.caption)}</figcaption>\n</figure>"
        )


@dataclass(frozen=True)
class Picture:
    """An image with a caption.

    Attributes:
        image: what is shown, any mode that converts to RGB.
        caption: what it shows, for those who see it.
        alt: what it shows, for those who do not.
        photograph: stored as JPEG; else, as suits drawings, as PNG.
    """

    image: Image.Image
    caption: str
    alt: str
    photograph: bool = False

    def html(self) -> str:
        """``<figure>`` with the image in it."""
        width, height = self.image.size
        return (
            f'<figure class="picture">\n<img src="{data_uri(self.image, self.photograph)}" width="{width}" '
            f'height="{height}" alt="{escape(self.alt)}">\n<figcaption>{escape(self.caption)}</figcaption>\n</figure>'
        )


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many as the page is wide, under one caption.

    Attributes:
        pictures: in order.
        caption: what they show together.
        size: ``large`` for drawings with text, ``small`` for pictures whose details do not matter.
    """

    pictures: Sequence[Picture]
    caption: str
    size: Literal["small", "medium", "large"] = "medium"

    def html(self) -> str:
        """``<figure>`` of figures."""
        return (
            f'<figure class="gallery {self.size}">\n<div>\n{_join(self.pictures)}\n</div>\n'
            f"<figcaption>{escape(self.caption)}</figcaption>\n</figure>"
        )


@dataclass(frozen=True)
class Section:
    """A part of a report, with an entry in its navigation."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        title: of the page.
        subtitle: a line below it.
        sections: in order, their titles all different.
        footer: what it was made with.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str


def data_uri(image: Image.Image, photograph: bool) -> str:
    """An image as the address that holds it.

    Args:
        image: any mode that converts to RGB.
        photograph: as JPEG, else as PNG.

    Returns:
        ``data:image/...;base64,...``.
    """
    file = io.BytesIO()
    if photograph:
        # full colour resolution: painted classes differ in colour more than in brightness
        image.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    else:
        image.convert("RGB").save(file, "PNG", optimize=True)
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def render(report: Report) -> str:
    """A report as an HTML document.

    Raises:
        ValueError: two sections have one title.
    """
    names = {section.title: _anchor(section.title) for section in report.sections}
    if len(set(names.values())) != len(report.sections):
        raise ValueError(f"report: sections need different titles, got {[s.title for s in report.sections]}")
    style = (resources.files("pmm_fast.viz") / "report.css").read_text(encoding="utf-8")
    entries = [f'<li><a href="#{anchor}">{escape(title)}</a></li>' for title, anchor in names.items()]
    sections = [
        f'<section id="{names[section.title]}">\n<h2>{escape(section.title)}</h2>\n{_join(section.blocks)}\n</section>'
        for section in report.sections
    ]
    return _PAGE.format(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        style=style,
        entries="\n".join(entries),
        sections="\n".join(sections),
        footer=escape(report.footer),
    )


def write(report: Report, path: str | Path) -> int:
    """Write a report, so that a reader finds the old file or the new one, never a part.

    Args:
        report: what to write.
        path: the file; its folder is made.

    Returns:
        Size of the file in bytes.

    Raises:
        OSError: it cannot be written; an older file survives.
    """
    content = render(report).encode()
    write_whole(Path(path), lambda part: part.write_bytes(content))
    return len(content)


def _join(blocks: Sequence[Block]) -> str:
    return "\n".join(block.html() for block in blocks)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
