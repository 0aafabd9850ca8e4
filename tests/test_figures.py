"""The pictures of the docs: each is drawn from stored results by a program, and is what that program draws today."""

import re
import sys
from types import SimpleNamespace

import matplotlib
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import claims
import curves
import figures
import speed

DRAWN = {
    **{draw.__name__: draw for draw in figures.PICTURES},
    **{f"curves-{name}": (lambda n=name, p=panels: curves.draw(n, p)) for name, panels in curves.FIGURES.items()},
    "speed-growth": lambda: speed.growth_figure(growth(), figures.IMAGES),
}


def growth() -> list[dict]:
    rows = speed.read_results(SimpleNamespace(results=speed.RESULTS)).values()
    return [row for row in rows if row["part"] == "growth"]


def words(svg: str) -> list[str]:
    """Matplotlib writes each text as a comment before its outlines."""
    return re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)


def test_pictures_are_those_that_pages_show():
    stored = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    lines = [line for claim in claims.load_claims() for line in claims.judge(claim)]
    sources = {line.claim.source for line in claims.drawn(lines)}
    assert {name.removesuffix(".svg") for name in stored} == {*DRAWN, *map(claims.picture, sources)}
    text = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert stored == set(re.findall(r"images/([\w-]+\.svg)\)", text))


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_what_the_stored_results_give(name, monkeypatch, tmp_path):
    """The same words, and where matplotlib is the same, the same places to a twentieth of a point."""
    stored = (figures.IMAGES / f"{name}.svg").read_text()
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    DRAWN[name]()
    made = (tmp_path / f"{name}.svg").read_text()
    assert words(made) == words(stored) and len(words(made)) > 8, f"docs/images/{name}.svg is out of date"
    if f"Matplotlib v{matplotlib.__version__}," in stored:
        places = [[float(x) for x in re.findall(r"-?\d+\.\d+", svg)] for svg in (made, stored)]
        assert places[0] == pytest.approx(places[1], abs=0.05), f"docs/images/{name}.svg is out of date"


def test_lines_differ_without_their_colours():
    looks = [(look["linestyle"], look["marker"]) for look in figures.LOOK.values()]
    assert len(set(looks)) == len(looks)
    for panels in curves.FIGURES.values():
        for _, _, runs in panels:
            assert len({str(curves.LOOK[run]["linestyle"]) for run in runs}) == len(runs)


def test_apart():
    """Nothing moves that need not; neighbours that are too close share what is missing."""
    assert figures.apart([0.0, 1.0, 3.0], 1.0) == [0.0, 1.0, 3.0]
    assert figures.apart([0.0, 0.0], 1.0) == [-0.5, 0.5]
    assert figures.apart([0.0, 0.5, 0.5, 9.0], 1.0) == pytest.approx([-2 / 3, 1 / 3, 4 / 3, 9.0])
    assert figures.apart([1.0, 1.5, 2.0], 1.0) == [0.5, 1.5, 2.5]


def test_names_stand_beside_their_lines():
    """In the order of the ends, at their heights where there is room; naming a line moves no limit."""
    figure, axis = figures.plt.subplots(figsize=(4, 3))
    for name, end in (("a", 0.5), ("b", 0.0), ("c", 0.501)):
        axis.plot([0, 10], [1.0, end], label=name)
    limits = axis.get_xlim(), axis.get_ylim()
    figures.name_lines(axis, points=12)
    assert (axis.get_xlim(), axis.get_ylim()) == limits
    at = {text.get_text(): text.get_position()[1] for text in axis.texts}
    low, high = limits[1]
    assert at["b"] == pytest.approx((0.0 - low) / (high - low)) and at["b"] < at["a"] < at["c"]
    assert at["c"] - at["a"] == pytest.approx(12 / (72 * 3 * axis.get_position().height))
    assert at["a"] < (0.5 - low) / (high - low) < at["c"]
    figures.plt.close(figure)
