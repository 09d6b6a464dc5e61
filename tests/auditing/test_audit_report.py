import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from audit_example import QUICKEST

import mdnorm
from mdnorm.auditing.columns import printable
from mdnorm.auditing.findings import LEVELS
from mdnorm.auditing.results import Measure


def test_the_files_of_a_report(report, tmp_path):
    page = report.save(tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "report.html"
    names = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*") if path.is_file()}
    assert names == {"report.html", "report.json"} | {
        f"figures/{name}.{suffix}"
        for name in (
            "overview",
            "projection-site",
            "projection-age",
            "projection-shoe_size",
            "projection-diagnosis",
        )
        for suffix in ("png", "pdf")
    }
    content = json.loads((page.parent / "report.json").read_text())
    assert content == report.to_dict()
    assert content["schema_version"] == 1
    assert content["verdicts"]["shoe size"]["level"] == "open"
    assert "not found above R² 0.20" in content["verdicts"]["shoe size"]["words"]
    assert [column["name"] for column in content["columns"]] == ["site", "age", "shoe size", "diagnosis"]
    value = content["columns"][0]["representations"]["the old network"]["dependence_within"]["value"]
    assert value == report.columns[0].representations["the old network"].dependence_within.value
    report.save(page.parent)


def test_the_page_is_complete_and_needs_nothing_else(report):
    page = report.to_html()
    own = html.unescape(page.split("<script")[0])
    for finding in report.findings:
        assert finding.text in own
    assert not re.search(r'(src|href)="(?!data:|#)', own)
    assert "default-src 'none'" in own


def test_every_figure_has_its_place_and_its_values(report):
    page = report.to_html()
    figures = figures_of(page)
    assert set(figures["plots"]) == set(
        re.findall(r'class="plot" id="([^"]+)" role="img" aria-label="[^"]+"', page)
    )
    assert len(figures["plots"]) == 2 + 2 + 4 * 4 + 3 * 3
    for plot in figures["plots"].values():
        if "rows" in plot:
            for series in plot["series"]:
                assert {len(series[key]) for key in ("value", "low", "high", "text")} == {len(plot["rows"])}
        else:
            assert len(figures["treatments"][plot["treatment"]]["x"]) == 240
    site, age, *_ = figures["columns"]
    assert [site["names"][code] for code in site["codes"][:20]] == list(report.values[0].values[:20])
    assert age["numbers"][:5] == pytest.approx(report.values[1].values[:5], rel=1e-3)


def figures_of(page):
    """What the page's script draws."""
    block = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    return json.loads(block.group(1))


def test_names_from_files_cannot_run_scripts(report):
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    columns = tuple(
        type(column)(**{**column.__dict__, "name": evil}) if column.name == "site" else column
        for column in report.columns
    )
    values = tuple(
        type(column)(**{**column.__dict__, "name": evil}) if column.name == "site" else column
        for column in report.values
    )
    page = type(report)(**{**report.__dict__, "columns": columns, "values": values}).to_html()
    assert evil not in page
    assert '<script>alert("x")' not in page
    assert "<img src=x" not in page


HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "template": "{{7*7}}",
    "one dollar": "cost in $ (US) and $ (AU)",
    "broken TeX": r"$\frac{a}{$ $\foo$ $x_$",
    "long": "x" * 10_000,
    "controls": "a\nb\0c\u202egnp.exe",
    "half a pair": "a\ud800b",
    "empty": "",
    "path": "../../etc/passwd",
    "underscore": "_hidden",
    "link": '<a href="javascript:alert(1)">here</a>',
    "plotly": "%{x}<b>bold</b>",
    "markup": "[bold red]x[/] [/nope]",
}


@pytest.fixture(scope="module")
def hostile_report():
    """All hostile names at once, of columns, of their levels and of the label."""
    rng = np.random.default_rng(0)
    names = HOSTILE.values()
    columns = {name: np.where(rng.random(80) < 0.5, name or "B", "A") for name in names}
    features, after = rng.standard_normal((2, 80, 3))
    label = {"the label": np.where(rng.random(80) < 0.5, HOSTILE["script"], "well")}
    return mdnorm.audit(features, columns | label, "the label", after=after, settings=QUICKEST)


def test_any_text_in_names_is_saved(hostile_report, tmp_path):
    hostile_report.save(tmp_path / "out")
    assert len(list((tmp_path / "out" / "figures").iterdir())) == 2 * (1 + len(HOSTILE) + 1)
    assert (tmp_path / "out" / "report.json").exists()
    assert hostile_report._repr_html_()
    assert str(hostile_report)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_any_text_in_names_is_drawn_as_text(name, hostile_report):
    """In the names of the project and of the treatments, too."""
    known = printable(name)
    sets = {key: replace(part, title=known) for key, part in hostile_report.sets.items()}
    facts = hostile_report.facts | {"project": known}
    report = replace(hostile_report, sets=sets, facts=facts)
    page = report.to_html()
    assert known in html.unescape(page)
    for evil in ("<script>alert(1)", '<a href="j', "{{7*7}}{{"):
        assert evil not in page.split('<script type="text/plain"')[0]
    for text in texts_of(figures_of(page)):
        assert not re.search(r"<(?!/?b>|br>)", text), text
        assert "%{x}" not in text
    assert all(line.startswith("|") for line in report.markdown().splitlines()[:-2])


def texts_of(figure):
    """All strings that plotly draws."""
    if isinstance(figure, dict):
        for value in figure.values():
            yield from texts_of(value)
    elif isinstance(figure, list):
        for value in figure:
            yield from texts_of(value)
    elif isinstance(figure, str):
        yield figure


def test_the_page_is_saved_before_the_figures_are_drawn(report, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a figure cannot be drawn")

    monkeypatch.setattr("mdnorm.auditing.figures.all_figures", broken)
    with pytest.raises(RuntimeError, match="cannot be drawn"):
        report.save(tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10**6
    assert json.loads((tmp_path / "report.json").read_text())["label"] == "diagnosis"


def test_the_table_of_verdicts_goes_from_harm_to_none(report):
    rows = report.table()
    assert [row.column.name for row in rows] == ["site", "age", "shoe size", "diagnosis"]
    assert [LEVELS.index(row.level) for row in rows] == sorted(LEVELS.index(row.level) for row in rows)
    assert rows[0].words.startswith("cannot be decided; gap of ")
    assert len(rows[0].cells) == 2
    lines = report.markdown().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 8
    assert "R² 0.2, 60 % balanced accuracy of two classes" in lines[-1]


def test_in_a_notebook(report):
    text = report._repr_html_()
    assert "<script" not in text
    assert "shoe size was found neither before nor after" in text
    assert text.count("<tr>") == 1 + 8
    assert 'src="data:image/png;base64,' in text


def test_as_text(report):
    lines = str(report).splitlines()
    assert any(line.startswith("[cannot be decided] Whether site is in the new network") for line in lines)
    assert any(
        line.startswith("[found] age is found in the old network given diagnosis: R²") for line in lines
    )
    assert any(line.startswith("[kept] The label diagnosis is in the new network") for line in lines)


@pytest.mark.parametrize(
    ("value", "chance", "share"), [(0.5, 0.5, 0.0), (1.0, 0.5, 1.0), (0.75, 0.5, 0.5), (-0.5, 0.0, -0.5)]
)
def test_share_of_the_way_from_chance(value, chance, share):
    assert Measure("score", value, chance, 10).share == share
