"""Figures and names on a report's page run no script, ask no address and do not change the page."""

import random
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.report import svg
from pipeline.report.extras import Section, read_section, write_section
from pipeline.report.figures import Figure, confusion_map, draw, lines
from pipeline.report.page import write_report
from pipeline.report.svg import drawing
from pipeline.report.tables import Table
from tests.fuzz import mutate
from tests.unit.report.test_tables import stage

XML = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:h="http://www.w3.org/1999/xhtml"'
HOSTILE = [
    "<script>evil</script>",
    "<g><script href='data:,evil'/></g>",
    "<h:script>evil</h:script>",
    "<foreignObject><h:iframe src='http://evil'/></foreignObject>",
    "<path onload='evil' d='M0 0'/>",
    "<g onclick='evil' tabindex='0'/>",
    "<a href='javascript:evil'><text>x</text></a>",
    "<image href='http://evil/x.png'/>",
    "<image href='data:image/svg+xml;base64,evil'/>",
    "<image xlink:href='file:///evil'/>",
    "<use href='http://evil#a'/>",
    "<use href='data:image/svg+xml,evil#a'/>",
    "<style>@import 'http://evil'; body { display: none }</style>",
    "<g style='inset: 0; evil: 1; background: url(http://evil)'/>",
    "<g style='fill: url(http://evil)'/>",
    "<g style='fill: u\\72l(http://evil)'/>",
    "<g style='fill: image-set(\"http://evil\" 1x)'/>",
    "<g fill='url(//evil)'/>",
    "<g filter='url(http://evil#a)'/>",
    "<g class='evil'/>",
    "<animate attributeName='href' to='javascript:evil'/>",
    "<set attributeName='onload' to='evil'/>",
    "<!--><img src='x' onerror='evil'>-->",
    "<desc><![CDATA[</svg><img src=x onerror=evil>]]></desc>",
    "<title>evil</title>",
    "<?xml-stylesheet href='http://evil'?>",
    "<svg onload='evil'/>",
]


@pytest.mark.parametrize("inside", HOSTILE)
def test_nothing_but_a_drawing_is_left(inside: str) -> None:
    built = drawing(f"<svg {XML} onload='evil'><g id='a'>{inside}</g><path id='p' d='M0 0'/></svg>")
    assert "evil" not in built
    assert '<path id="p" d="M0 0" />' in built


def test_words_of_a_drawing_stay_words() -> None:
    text = "a &lt;script&gt; &amp; <![CDATA[</text></svg><script>]]>"
    built = drawing(f"<svg {XML}><text>{text}<tspan>b</tspan> c</text></svg>")
    (found,) = ET.fromstring(built)
    assert "".join(found.itertext()) == "a <script> & </text></svg><script>b c"
    assert "<script" not in built


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "<svg>",
        "<svg/>",  # without a namespace it is no SVG to an XML parser
        f"<g {XML}/>",
        f"<svg {XML}></svg><script>",
        f"<svg {XML}/><svg {XML}/>",
        f"<!DOCTYPE svg [<!ENTITY a 'b'>]><svg {XML}>&a;</svg>",
        f"<svg {XML}><p></svg>",
        f"<svg {XML}>&nbsp;</svg>",
    ],
)
def test_what_is_no_single_svg_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a figure"):
        drawing(text)


def test_a_drawing_cannot_be_larger_than_its_file() -> None:
    """Groups that use groups would be drawn 10^9 times; deep nesting would end the parser of a browser."""
    groups = ""
    for k in range(1, 10):
        uses = f'<use href="#g{k - 1}"/>' * 10
        groups += f'<g id="g{k}">{uses}</g>'
    assert "href" not in drawing(f"<svg {XML}>{groups}</svg>")
    assert drawing(f"<svg {XML}>{'<g>' * 100_000}{'</g>' * 100_000}</svg>").count("<g") < 50
    assert "href" in drawing(f"<svg {XML}><defs><path id='p'/></defs><use xlink:href='#p'/></svg>")


def test_a_damaged_drawing_is_refused_or_inert(tmp_path: Path) -> None:
    """A damaged or mixed drawing has only allowed parts after it is built, and is then built the same again (80 drawings)."""
    sound = draw(tmp_path, "f", "F", lines({"a": [([1.0, 2.0], [3.0, 4.0])]}, "x", "y")).svg
    built = 0
    for seed in range(80):
        rng = random.Random(seed)
        place = sound.index(">", rng.randrange(len(sound) - 10)) + 1
        text = sound[:place] + rng.choice(HOSTILE) + sound[place:]
        if rng.random() < 0.5:
            text = mutate.data(rng, text.encode()).decode(errors="replace")
        text = text.replace("<svg ", f"<svg {XML.rpartition(' ')[2]} ", 1)
        try:
            found = drawing(text)
        except ValueError:
            continue
        built += 1
        assert drawing(found) == found
        assert "evil" not in found
        assert {svg._name(e) for e in ET.fromstring(found).iter()} <= svg._ELEMENTS
    assert built > 20


def test_our_own_drawings_lose_nothing_that_draws(tmp_path: Path) -> None:
    """All but the description of the file and one style, which the page has for all figures."""
    figure = draw(tmp_path, "f", "F", lines({"a": [([1.0, 2.0], [3.0, 4.0])]}, "x", "y"))
    raw = [e.tag.partition("}")[2] for e in ET.parse(tmp_path / "f.svg").getroot().iter()]
    kept = [e.tag.partition("}")[2] for e in ET.fromstring(figure.svg).iter()]
    about = ("metadata", "RDF", "Work", "type", "format", "creator", "Agent", "title", "style")
    assert kept == [name for name in raw if name not in about]
    assert drawing(figure.svg) == figure.svg


@pytest.mark.filterwarnings("ignore:Glyph 1 ")
def test_names_of_classes_are_no_formulas_and_no_markup(tmp_path: Path) -> None:
    names = ["$\\evil$", "$x^2$", "<script>", "a\x01b"]
    figure = draw(tmp_path, "f", "F", confusion_map(np.eye(4), names, names))
    words = "".join(ET.fromstring(figure.svg).itertext())
    assert "<script" not in figure.svg
    for name in ("$\\evil$", "$x^2$", "<script>", "a\ufffdb"):
        assert name in words


def test_a_section_of_somebody_else_is_inert_on_the_page(tmp_path: Path) -> None:
    stage(tmp_path / "a" / "distill", lr=0.1, seed=0)
    word = "<script>evil()</script>"
    table = Table(name=word, title=word, header=[word], rows=[[word], ["![x](http://evil)"]], note=word)
    figures = [Figure(f'"{word}', word, word, f"<svg {XML}>{inside}</svg>") for inside in HOSTILE]
    write_section(tmp_path / "s", Section(word, [table], figures))
    page = write_report([tmp_path / "a"], tmp_path / "page.html", extras=[read_section(tmp_path / "s")])
    html, markdown = page.read_text(), (tmp_path / "page" / "report.md").read_text()
    assert "<script" not in html + markdown
    assert "onload" not in html
    assert "](http://evil" not in markdown
    assert html.count("<svg") == len(HOSTILE) + len(list((tmp_path / "page" / "figures").glob("*.svg")))
    assert "default-src 'none'" in html


def test_a_section_that_is_huge_or_no_svg_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_section(tmp_path, Section("S", [], [Figure("f", "F", "", "<svg><script>")]))
    with pytest.raises(DataError, match=r"is damaged \(figures.0.svg: .*a figure is no SVG"):
        read_section(tmp_path)
    monkeypatch.setattr("pipeline.report.extras._LARGEST", 10)
    with pytest.raises(DataError, match="so it is no section"):
        read_section(tmp_path)
