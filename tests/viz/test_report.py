"""A report as a file: whole, escaped, without addresses; and as a browser shows it."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.viz.report import (
    Block,
    Cell,
    Code,
    Folded,
    Gallery,
    Heading,
    Legend,
    Note,
    Picture,
    Report,
    Section,
    Table,
    Text,
    data_uri,
    render,
    write,
)

RED, GREEN = (210, 30, 40), (20, 160, 60)
NASTY = "<b>run</b> & \"co\" {'style'}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
in_a_browser = pytest.mark.skipif(not BROWSER, reason="neither Chromium nor Chrome is installed")
VOID = {"meta", "img", "br", "hr", "link", "input"}


def small_report() -> Report:
    """Every kind of block, pictures of one colour, and a table that is wider than a phone."""
    red, green = Image.new("RGB", (320, 200), RED), Image.new("RGB", (320, 200), GREEN)
    cells = [Cell(f"{value}.0", value == 11, value / 12, "hint") for value in range(12)]
    numbers = Table(
        "Wide.", ["", *(f"column {value}" for value in range(12))], [(NASTY, cells)], [("", 1), ("all", 12)]
    )
    words = Table("Words.", ["", "one"], [("name", [Cell("/a/very/long/path/" + 30 * "without-a-blank")])], words=True)
    blocks: list[Block] = [
        Text(NASTY),
        Note("Missing."),
        Legend([("road", (128, 64, 128)), (NASTY, (0, 0, 142))]),
        numbers,
        words,
        Heading(30 * "long"),
        Gallery([Picture(red, "red", NASTY, photograph=True), Picture(green, NASTY, "green")], "both"),
        Folded("All", [Code(f"{NASTY}\n" + 400 * "x")]),
    ]
    return Report(NASTY, "subtitle", [Section("First", blocks), Section("Second & last", [Text("end")])], "footer")


class Tags(HTMLParser):
    """Opens and closes tags as they come, and keeps what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(document: str) -> Tags:
    """The document, its tags balanced."""
    tags = Tags()
    tags.feed(document)
    tags.close()
    assert tags.open == []
    return tags


# --- the file -----------------------------------------------------------------------------------------------------


def test_tags_are_balanced_and_text_is_escaped() -> None:
    document = render(small_report())
    tags = parse(document)
    # in a paragraph, a legend, a table, a caption, folded, as a title twice
    assert tags.text.count(NASTY) == 7
    assert not {"b", "script", "link"} & {name for name, _ in tags.seen}
    alts = [attributes["alt"] for name, attributes in tags.seen if name == "img"]
    assert alts == [NASTY, "green"]


def test_it_needs_no_network() -> None:
    document = render(small_report())
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[\w+/=]+", "", document).replace("/a/very/long/path/", ""))
    assert all(a["src"].startswith("data:image/") for name, a in parse(document).seen if name == "img")  # type: ignore[union-attr]
    assert "default-src 'none'" in document and "@import" not in document and "url(" not in document


def test_the_navigation_leads_to_every_section() -> None:
    seen = parse(render(small_report())).seen
    targets = [attributes["href"] for name, attributes in seen if name == "a"]
    assert targets == ["#first", "#second-last"]
    assert [f"#{attributes['id']}" for name, attributes in seen if name == "section"] == targets


def test_a_picture_is_stored_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    drawing, photograph = (data_uri(Image.fromarray(pixels), kind) for kind in (False, True))
    assert drawing.startswith("data:image/png;base64,") and photograph.startswith("data:image/jpeg;base64,")
    read = [np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))) for uri in (drawing, photograph)]
    assert (read[0] == pixels).all()
    assert read[1].shape == pixels.shape and np.abs(read[1].astype(int) - pixels).mean() < 12


def test_tables() -> None:
    html = Table("About.", ["", "a", "b"], [("x", [Cell("1", best=True), Cell("2", share=0.5, hint="h")])]).html()
    assert "<td><strong>1</strong></td>" in html
    assert '<td class="heat" style="--tint: 31%">2 <small>h</small></td>' in html
    with pytest.raises(ValueError, match=r"table 'About\.': expected 3 columns, got \[2\]"):
        Table("About.", ["", "a", "b"], [("x", [Cell("1")])])
    with pytest.raises(ValueError, match=r"expected 2 columns, got \[2, 3\]"):
        Table("About.", ["", "a"], [("x", [Cell("1")])], groups=[("", 1), ("all", 2)])


def test_sections_of_one_title_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different titles, got \['A b', 'a-B'\]"):
        render(Report("", "", [Section("A b", []), Section("a-B", [])], ""))


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep/report.html"
    assert write(small_report(), file) == file.stat().st_size
    assert file.read_text(encoding="utf-8") == render(small_report())
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "write_bytes", lambda self, data: (_ for _ in ()).throw(OSError(28, "disk full", self)))
        write(Report("new", "", [], ""), file)
    assert [path.name for path in file.parent.iterdir()] == ["report.html"] and "First" in file.read_text()


# --- in a browser -------------------------------------------------------------------------------------------------


def browse(page: Path, profile: Path, *flags: str) -> str:
    """Open a page in a headless browser; what it prints."""
    common = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir={profile} --no-first-run"
    command = [BROWSER, *common.split(), *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    write(small_report(), file)
    return file


def screenshot(page: Path, tmp_path: Path, width: int, height: int, *flags: str) -> np.ndarray:
    size = f"--window-size={width},{height}"
    browse(page, tmp_path / "profile", size, f"--screenshot={tmp_path / 'shot.png'}", *flags)
    return np.array(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour, or nearly."""
    return int((np.abs(pixels - colour).max(-1) <= 6).sum())


@in_a_browser
def test_wide(page: Path, tmp_path: Path) -> None:
    pixels = screenshot(page, tmp_path, 1280, 1400)
    assert pixels.shape == (1400, 1280, 3)
    # both pictures, side by side and as large as one another; but for rounded corners
    shown = [np.argwhere(np.abs(pixels - colour).max(-1) <= 6) for colour in (RED, GREEN)]
    boxes = [(*where.min(0), *(np.ptp(where, 0) + 1)) for where in shown]
    assert boxes[0][0] == boxes[1][0] and boxes[0][2:] == boxes[1][2:] and boxes[0][3] > 300
    assert boxes[1][1] > boxes[0][1] + boxes[0][3]
    assert count(pixels, (255, 255, 255)) > pixels[..., 0].size / 2
    assert count(pixels, (28, 34, 48)) > 500, "no text"


@in_a_browser
def test_dark(page: Path, tmp_path: Path) -> None:
    pixels = screenshot(page, tmp_path, 1280, 1400, "--blink-settings=preferredColorScheme=0")
    assert count(pixels, (18, 22, 29)) > pixels[..., 0].size / 2
    assert count(pixels, RED) > 50_000 and count(pixels, GREEN) > 50_000


@in_a_browser
def test_nothing_sticks_out(page: Path, tmp_path: Path) -> None:
    # in frames, for a window is never as narrow as a phone; their own scripts are forbidden, this page's are not
    opened = page.read_text(encoding="utf-8").replace("<details>", "<details open>")
    document, widths = escape(opened), (360, 400, 700, 1280)
    frames = "".join(f'<iframe style="width: {w}px; border: 0" srcdoc="{document}"></iframe>' for w in widths)
    ask = "e => [e.contentWindow.innerWidth, e.contentDocument.documentElement.scrollWidth].join(':')"
    script = f"onload = () => {{ document.title = [...document.querySelectorAll('iframe')].map({ask}).join(' ') }}"
    asking = tmp_path / "asking.html"
    asking.write_text(f"<title></title><script>{script}</script>{frames}", encoding="utf-8")
    title = re.search("<title>(.*?)</title>", browse(asking, tmp_path / "profile", "--dump-dom"))
    assert title and title[1] == " ".join(f"{width}:{width}" for width in widths)
