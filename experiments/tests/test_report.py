from html.parser import HTMLParser
from pathlib import Path

import pytest

from mdnorm_experiments.report import (
    HEADINGS,
    ReportFigure,
    ReportTable,
    summarise,
    synthetic_table,
    table_lines,
    verdict,
    write_report,
)

NAMES = {"none": "No normalisation", "mdn-last": "MDN, last layer"}


def row(method, batch_size, seed, bacc, a=0.1, b=0.2, seconds=1.0):
    return {
        "method": method,
        "batch_size": batch_size,
        "seed": seed,
        "bacc": bacc,
        "dcor2": {"A": a, "B": b},
        "seconds_per_epoch": seconds,
    }


def recalibrated(bacc):
    return {"recalibrated": {"bacc": bacc, "dcor2": {"A": 0.003, "B": -0.001}}}


ROWS = [
    row("mdn-last", 200, 0, 0.82, a=-0.0001, b=0.01, seconds=1) | recalibrated(0.81),
    row("mdn-last", 200, 1, 0.84, a=-0.0003, b=0.03, seconds=2) | recalibrated(0.83),
    row("none", 200, 0, 0.944),
    row("none", 20, 0, 0.5),
]


def test_means_and_standard_deviations():
    cell = next(cell for cell in summarise(ROWS) if cell["method"] == "mdn-last")
    assert cell["seeds"] == 2
    assert cell["bacc"] == pytest.approx(0.83)
    assert cell["bacc_sd"] == pytest.approx(0.01 * 2**0.5)
    assert cell["dcor2"] == pytest.approx({"A": -0.0002, "B": 0.02})
    assert cell["dcor2_sd"]["B"] == pytest.approx(0.01 * 2**0.5)
    assert cell["seconds_per_epoch"] == 1.5
    assert cell["recalibrated"]["bacc"] == pytest.approx(0.82)
    assert cell["recalibrated"]["dcor2"] == pytest.approx({"A": 0.003, "B": -0.001})


def test_recalibration_of_some_seeds_only_is_not_shown():
    """A mean over fewer seeds than the cell says would mislead."""
    partial = [{key: value for key, value in ROWS[0].items() if key != "recalibrated"}, ROWS[1]]
    assert summarise(partial)[0]["recalibrated"] is None


def test_lines_are_ordered_and_rounded():
    assert table_lines(ROWS, NAMES) == [
        ("No normalisation", "20", "1", "50.0", "below the limit", "0.100", "0.200", "–", "–", "1.0"),
        ("No normalisation", "200", "1", "94.4", "confounded", "0.100", "0.200", "–", "–", "1.0"),
        (
            "MDN, last layer",
            "200",
            "2",
            "83.0 ± 1.4",
            "at the limit",
            "0.000 ± 0.000",
            "0.020 ± 0.014",
            "82.0 ± 1.4",
            "0.003 / −0.001",
            "1.5",
        ),
    ]


def test_a_method_without_a_title_comes_last_under_its_own_name():
    assert table_lines([row("new", 20, 0, 0.8), *ROWS], NAMES)[1][0] == "new"


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (0.944, "confounded"),
        (0.849, "confounded"),
        (0.847, "at the limit"),
        (0.82, "at the limit"),
        (0.8, "below the limit"),
    ],
)
def test_verdict(accuracy, expected):
    assert verdict(accuracy) == expected


def test_markdown():
    lines = synthetic_table([row("a|b", 20, 0, 0.8, a=-0.012)], {}).markdown().splitlines()
    assert lines[0].count("|") == len(HEADINGS) + 1 == lines[1].count("|")
    assert lines[2].startswith("| a\\|b | 20 | 1 | 80.0 | below the limit | −0.012 | 0.200 |")
    assert "83.3 %" in lines[-1]
    assert "94.4 %" in lines[-1]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_complete_and_stands_alone(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"\x89PNG not really")
    path = write_report(
        tmp_path,
        title="A <title> & more",
        introduction=["One.", "<script>alert(1)</script>"],
        tables=[
            synthetic_table([*ROWS, row("<b>", 20, 0, 0.8)], NAMES),
            ReportTable(
                ["Name", "Value"], [["second", "7"]], "No limits.", "A legend.", title="Another table"
            ),
        ],
        figures=[ReportFigure(image, "Figure one", 'alt "quoted"', "A caption")],
        settings={"seeds": "0, 1"},
        command="mdnorm-experiments synthetic --out 'a b'",
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert ("html", {"lang": "en"}) in page.tags
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [i["alt"] for i in images] == ['alt "quoted"']
    assert images[0]["src"].startswith("data:image/png;base64,iVBORyBub3Q")
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "b", "iframe")]
    assert "http" not in "".join(str(attributes) for _, attributes in page.tags)
    for text in (
        "A <title> & more",
        "83.0 ± 1.4",
        "confounded",
        "<b>",
        "--out 'a b'",
        "Figure one",
        "A caption",
        "83.3\u00a0%",
        "more than 1.5 points above",
        "Another table",
        "No limits. A legend.",
    ):
        assert text in page.text
    assert sum(tag == "tr" for tag, _ in page.tags) == 1 + 4 + 1 + 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "report.html"]


def test_a_missing_figure_is_not_hidden(tmp_path):
    figure = ReportFigure(Path(tmp_path / "none.png"), "t", "a", "c")
    with pytest.raises(FileNotFoundError):
        write_report(
            tmp_path,
            title="t",
            introduction=[],
            tables=[],
            figures=[figure],
            settings={},
            command="",
        )
    assert not (tmp_path / "report.html").exists()
