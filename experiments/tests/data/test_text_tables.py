"""Tables of text: cells as written, rows with the line that an editor shows, errors that name the file."""

from __future__ import annotations

import pytest

from mdnorm_experiments.data.reading import column_names, is_missing, read_rows


def rows(path, names, delimiter=","):
    return read_rows(path, delimiter, {part: (name,) for part, name in names.items()})


def test_cells_are_text_and_rows_know_their_line(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(
        '\ufeffname, age ,note\n007, 1.50 ,"a, b"\n\n"two\nlines",NA\nlast,3,\n', encoding="utf-8"
    )
    assert rows(path, {"who": "name", "years": "age", "text": "note"}) == [
        ("line 2 of table.csv", {"who": "007", "years": "1.50", "text": "a, b"}),
        ("line 4 of table.csv", {"who": "two\nlines", "years": "NA", "text": ""}),
        ("line 6 of table.csv", {"who": "last", "years": "3", "text": ""}),
    ]


def test_other_delimiters_and_trailing_ones(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text("a\tb\n1\t2,5\t\t\n", encoding="utf-8")
    assert rows(path, {"a": "a", "b": "b"}, "\t") == [("line 2 of table.tsv", {"a": "1", "b": "2,5"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no header"),
        (b",,\n1,2,3\n", "there is no header"),
        (b"a,b\n1,2\n1,2,3\n", "line 3 has 3 cells, the header 2"),
        (b'a,b\n1,"2\n', "unexpected end of data"),
        (b"a,b\nM\xe4nnlich,2\n", "can't decode byte 0xe4"),
    ],
)
def test_what_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"table\.csv cannot be read as a table \(UTF-8.*','\): .*{message}"
    ):
        read_rows(path, ",", {})


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b,b\n1,2,3\n")
    assert rows(path, {"a": "a"}) == [("line 2 of table.csv", {"a": "1"})]
    with pytest.raises(ValueError, match="more than one column of the name b"):
        rows(path, {"x": "b"})


def test_missing_cells_and_given_names():
    assert all(map(is_missing, ("", " ", "N/A", "nan", "None", "null")))
    assert not any(map(is_missing, ("0", "no", "-")))


def test_which_column_holds_what(tmp_path):
    wanted = {"age": ("age", "years"), "sex": ("sex",)}
    path = tmp_path / "table.csv"
    assert column_names(path, ["years", "sex"], wanted) == {"age": "years", "sex": "sex"}
    names = column_names(path, ["age", "Age_at_scan", "sex"], wanted, {"age": "Age_at_scan"})
    assert names == {"age": "Age_at_scan", "sex": "sex"}
    with pytest.raises(ValueError, match="columns may name age, sex, got shoes"):
        column_names(path, ["age", "sex"], wanted, {"shoes": "x"})
    message = r"table\.csv has no column for the age \(Age\); it has age, sex\..*columns: age=NAME"
    with pytest.raises(ValueError, match=message):
        column_names(path, ["age", "sex"], wanted, {"age": "Age"})
