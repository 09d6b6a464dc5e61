import html
import json
import re

import plotly.graph_objects as go
import pytest

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
    value = content["columns"][0]["representations"]["before"]["dependence_within"]["value"]
    assert value == report.columns[0].representations["before"].dependence_within.value
    report.save(page.parent)


def test_the_page_is_complete_and_needs_nothing_else(report):
    page = report.to_html()
    own = html.unescape(page.split("<script>")[0])
    for finding in report.findings:
        assert finding.text in own
    assert not re.search(r'(src|href)="(?!data:)', own)
    assert "default-src 'none'" in own


def test_every_figure_is_valid_and_has_its_place(report):
    page = report.to_html()
    block = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    figures = json.loads(block.group(1))
    assert set(figures) == set(re.findall(r'class="plot" id="([^"]+)" role="img" aria-label="[^"]+"', page))
    assert len(figures) == 2 + 2 + 4 * 4 + 3 * 3
    points = json.loads(re.search(r'id="points">(.*?)</script>', page, re.DOTALL).group(1))
    for figure in figures.values():
        for trace in figure["data"]:
            if "rows" in trace:
                of = points[trace.pop("of")]
                trace["x"], trace["y"] = ([axis[row] for row in trace["rows"]] for axis in of)
                trace.pop("rows")
        go.Figure(figure)


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
