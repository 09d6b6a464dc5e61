import base64
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from mdnorm_experiments.report import ReportFigure, ReportTable, listed, mean_with_deviation, write_page
from mdnorm_experiments.synthetic import HEADINGS, SETTING, verdict


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
    row("mdn-last-dataset", 200, 0, 0.82, a=-0.0001, b=0.01, seconds=1) | recalibrated(0.81),
    row("mdn-last-dataset", 200, 1, 0.84, a=-0.0003, b=0.03, seconds=2) | recalibrated(0.83),
    row("none", 200, 0, 0.944),
    row("none", 20, 0, 0.5),
]


def lines(rows):
    (table,) = SETTING.tables(rows)
    return table.lines


def test_means_with_deviations():
    assert mean_with_deviation([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert mean_with_deviation([-0.04], 1) == "0.0"
    assert mean_with_deviation([0.04], 1, signed=True) == "0.0"
    assert mean_with_deviation([-1.0], 1, signed=True) == "−1.0"
    assert mean_with_deviation([], 1) == "–"


def test_different_values_are_listed():
    assert listed([3, 1, 3, 0.25]) == "0.25, 1, 3"
    assert listed(["b", None, "b"]) == "None, b"


def test_recalibration_of_some_seeds_only_is_not_shown():
    """A mean over fewer seeds than the cell says would mislead."""
    partial = [{key: value for key, value in ROWS[0].items() if key != "recalibrated"}, ROWS[1]]
    assert lines(partial)[0][7:9] == ("–", "–")


def test_lines_are_ordered_and_rounded():
    assert lines(ROWS) == [
        ("No normalisation", "20", "1", "50.0", "below the limit", "0.100", "0.200", "–", "–", "1.0"),
        ("No normalisation", "200", "1", "94.4", "confounded", "0.100", "0.200", "–", "–", "1.0"),
        (
            "MDN, last layer, dataset",
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
    (table,) = SETTING.tables([row("none", 20, 0, 0.8, a=-0.012)])
    lines = table.markdown().splitlines()
    assert lines[0].count("|") == len(HEADINGS) + 1 == lines[1].count("|")
    assert lines[2].startswith("| No normalisation | 20 | 1 | 80.0 | below the limit | −0.012 | 0.200 |")
    assert "83.3 %" in lines[-1]
    assert "94.4 %" in lines[-1]
    escaped = ReportTable(["Name"], [["a|b"]], "No limits.", "").markdown()
    assert "| a\\|b |" in escaped


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
    rows = [row | {"learning_rate": 1e-3, "epochs": 5, "group_size": 7} for row in ROWS]
    figure = Figure(figsize=(1, 1))
    path = write_page(
        tmp_path,
        title="A <title> & more",
        introduction=["One.", "<script>alert(1)</script>"],
        tables=[
            *SETTING.tables(rows),
            ReportTable(["Name", "Value"], [["<b>", "7"]], "No limits.", "A legend.", title="Another table"),
        ],
        figures=[ReportFigure("one", figure, "Figure one", 'alt "quoted"', "A caption")],
        rows=rows,
        row_names={"epochs": "epochs", "size": "group_size"},
        command="mdnorm-experiments synthetic --out 'a b'",
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert ("html", {"lang": "en"}) in page.tags
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [i["alt"] for i in images] == ['alt "quoted"']
    kept = (tmp_path / "figures" / "one.png").read_bytes()
    assert images[0]["src"] == "data:image/png;base64," + base64.b64encode(kept).decode()
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
        "batch size 20: 5 epochs from 0.001; batch size 200: 5 epochs from 0.001",
        "group size",
    ):
        assert text in page.text
    assert sum(tag == "tr" for tag, _ in page.tags) == 1 + 3 + 1 + 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figures", "report.html", "table.md"]
