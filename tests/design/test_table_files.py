"""What a file says is what is read: nothing is left out, altered or guessed in silence."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import reference
from mdnorm.design.files import open_table, read_table_file
from mdnorm.design.table_file import TableFileError
from mdnorm.tables import MetadataModel, residualize_file

N = 120


def people(n: int = N, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, n).round(1)
    return pd.DataFrame(
        {"age": age, "vol": (age / 10 + rng.standard_normal(n)).round(4), "w": rng.standard_normal(n)}
    )


def write(table: pd.DataFrame, path, **options) -> None:
    table.to_parquet(path, **options) if path.suffix == ".parquet" else table.to_csv(path, index=False)


def expected(table: pd.DataFrame, features=("vol", "w")) -> np.ndarray:
    return reference.residual(table[list(features)].to_numpy(), table[["age"]].to_numpy())


def read(path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_identifiers_and_codes_are_left_alone_unless_they_are_named(tmp_path, suffix) -> None:
    table = people().assign(id=np.arange(N) + 50_000, sex=np.arange(N) % 2 + 1, grade=np.arange(N) % 3)
    table["note"] = "x"
    source, out = tmp_path / f"t{suffix}", tmp_path / f"o{suffix}"
    write(table, source)
    summary = residualize_file(source, out, formula="age")
    assert summary.feature_names == ("vol", "w")
    assert summary.left_alone == {
        "id": f"like an identifier: {N} different whole numbers in {N} rows",
        "sex": "codes: 2 different whole numbers",
        "grade": "codes: 3 different whole numbers",
        "note": "text",
    }
    result = read(out)
    np.testing.assert_allclose(result[["vol", "w"]], expected(table), rtol=1e-8, atol=1e-8)
    pd.testing.assert_frame_equal(result[["id", "sex", "grade"]], table[["id", "sex", "grade"]])
    named = residualize_file(source, out, formula="age", features=["vol", "grade"])
    assert (named.feature_names, named.left_alone) == (("vol", "grade"), {})
    np.testing.assert_allclose(
        read(out)[["vol", "grade"]], expected(table, ("vol", "grade")), rtol=1e-8, atol=1e-8
    )


def test_whole_numbers_that_repeat_are_features(tmp_path) -> None:
    counts = np.random.default_rng(0).integers(0, 40, N)
    write(people().assign(count=counts), tmp_path / "t.parquet")
    summary = residualize_file(tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age")
    assert summary.feature_names == ("vol", "w", "count")


@pytest.mark.parametrize("name", [None, "subject"])
def test_the_index_of_a_frame_is_no_feature(tmp_path, name) -> None:
    table = people()
    kept = table[table["age"] > 40].rename_axis(name)
    kept.to_parquet(tmp_path / "t.parquet")
    summary = residualize_file(tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age")
    assert summary.feature_names == ("vol", "w")
    assert set(summary.left_alone.values()) == {"the index of a DataFrame"}
    result = pd.read_parquet(tmp_path / "o.parquet")
    pd.testing.assert_index_equal(result.index, kept.index)
    np.testing.assert_allclose(result[["vol", "w"]], expected(kept), rtol=1e-10, atol=1e-10)
    if name is None:
        kept.to_csv(tmp_path / "t.csv")
        summary = residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
        assert (summary.feature_names, list(summary.left_alone)) == (("vol", "w"), [""])
        pd.testing.assert_index_equal(pd.read_csv(tmp_path / "o.csv", index_col=0).index, kept.index)


@pytest.mark.parametrize("cell", ["?", ".", "-", "#NAME?", "58,2", "unknown"])
@pytest.mark.parametrize("column", ["age", "vol"])
@pytest.mark.parametrize("row", [7, 119])
def test_an_odd_cell_among_numbers_is_an_error(tmp_path, cell, column, row) -> None:
    table = people().astype(object)
    table.loc[row, column] = cell
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(
        TableFileError, match=rf"column '{column}' has numbers, but '.+' in row {row} .*--missing-values"
    ):
        residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
    assert not (tmp_path / "o.csv").exists()
    options = {"missing": "mean"} if column == "age" else {"missing_features": "skip"}
    residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age", missing_values=[cell], **options)
    result = pd.read_csv(tmp_path / "o.csv", na_values=[cell])
    table.loc[row, column] = np.nan
    complete = table.dropna().astype(float)
    other = result.drop(index=row)[["vol", "w"]]
    wanted = expected(complete)
    if column == "vol":
        assert np.isnan(result.loc[row, "vol"])
        np.testing.assert_allclose(other, wanted, rtol=1e-7, atol=1e-7)
        beta = np.polyfit(complete["age"], complete["w"].astype(float), 1)[0]
        corrected = table.loc[row, "w"] - (table.loc[row, "age"] - complete["age"].mean()) * beta
        np.testing.assert_allclose(result.loc[row, "w"], corrected, rtol=1e-7, atol=1e-7)
    else:
        filled = table.fillna({"age": complete["age"].mean()}).astype(float)
        np.testing.assert_allclose(result[["vol", "w"]], expected(filled), rtol=1e-7, atol=1e-7)


def test_an_odd_cell_of_a_later_block_is_an_error_too(tmp_path) -> None:
    rows = 300_000
    lines = ["age,vol,note", *(f"{20 + i % 50}.5,{i % 91}.25,{'x' * 10}" for i in range(rows))]
    for column, wrong in ((0, "?,1.5,x"), (1, "30.5,?,x")):
        changed = [*lines]
        changed[rows - 3] = wrong
        (tmp_path / "t.csv").write_text("\n".join(changed))
        with pytest.raises(TableFileError, match=r"'\?'.*missing"):
            residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
        assert column in (0, 1)


def test_a_few_words_among_few_numbers_are_a_category(tmp_path) -> None:
    table = people().assign(stage=np.resize(["1", "2", "3a", "3b"], N))
    table.to_csv(tmp_path / "t.csv", index=False)
    summary = residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="stage")
    assert summary.metadata_names == ("stage[T.2]", "stage[T.3a]", "stage[T.3b]")


def test_sites_with_a_zero_in_front_stay_apart(tmp_path) -> None:
    table = people()
    sites = np.resize(["01", "1", "2"], N)
    table.assign(site=sites).to_csv(tmp_path / "t.csv", index=False)
    summary = residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", site="site")
    assert summary.sites == ("01", "1", "2")
    assert read_table_file(tmp_path / "t.csv").column("site").to_pylist() == sites.tolist()


def test_long_identifiers_keep_their_value(tmp_path) -> None:
    ids = [2**53 + 1, 2**53 + 2, 2**63 - 1, 2**64 + 5, 2**64 + 6]
    (tmp_path / "t.csv").write_text("id,short\n" + "\n".join(f"{i},{min(i, 2**63 - 1)}" for i in ids))
    table = read_table_file(tmp_path / "t.csv")
    assert table.column("id").to_pylist() == list(map(str, ids))
    assert table.column("short").to_pylist() == [min(i, 2**63 - 1) for i in ids]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_quote_that_swallows_rows_is_an_error(tmp_path, place) -> None:
    lines = [f"{row['age']},{row['vol']},{row['w']},x" for _, row in people().iterrows()]
    lines = [f"n{i},{line}" for i, line in enumerate(lines)]
    cells = lines[20].split(",")
    cells[0 if place == 0 else -1] = '"' + cells[0 if place == 0 else -1]
    lines[20] = ",".join(cells)
    if place == 3:  # closed many rows later
        lines[60] += '"'
    (tmp_path / "t.csv").write_text("\n".join(["name,age,vol,w,note", *lines]))
    with pytest.raises(TableFileError, match=r"not closed|Expected 5 columns"):
        residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
    assert not (tmp_path / "o.csv").exists()


def test_cells_of_several_lines_are_no_rows(tmp_path) -> None:
    people().assign(note="two\nlines, with a comma").to_csv(tmp_path / "t.csv", index=False)
    residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
    np.testing.assert_allclose(
        pd.read_csv(tmp_path / "o.csv")[["vol", "w"]], expected(people()), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_every_end_of_a_line_is_one(tmp_path, end) -> None:
    text = people().to_csv(index=False, lineterminator=end)
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert open_table(tmp_path / "t.csv").names == ("age", "vol", "w")
    residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
    np.testing.assert_allclose(
        pd.read_csv(tmp_path / "o.csv")[["vol", "w"]], expected(people()), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_names_that_are_there_twice_matter_where_they_are_used(tmp_path, suffix) -> None:
    table = people()
    columns = [table[name].to_numpy() for name in ("age", "vol", "w", "w", "w")]
    arrow = pa.table(columns, names=["age", "vol", "w", "extra", "extra"])
    source, out = tmp_path / f"t{suffix}", tmp_path / f"o{suffix}"
    if suffix == ".csv":
        frame = pd.DataFrame(dict(enumerate(columns)))
        frame.to_csv(source, index=False, header=arrow.column_names)
    else:
        pq.write_table(arrow, source)
    summary = residualize_file(source, out, formula="age")
    assert (summary.feature_names, summary.left_alone) == (
        ("vol", "w"),
        {"extra": "more than one column of this name"},
    )
    result = pq.ParquetFile(out).read() if suffix == ".parquet" else pa.csv.read_csv(out)
    assert result.column_names == arrow.column_names
    for place, column in enumerate((*expected(table).T, table["w"], table["w"]), start=1):
        np.testing.assert_allclose(result.column(place).to_numpy(), column, rtol=1e-7, atol=1e-7)
    with pytest.raises(TableFileError, match="more than one column of the name 'extra'"):
        residualize_file(source, out, formula="age", features=["extra"])
    with pytest.raises(TableFileError, match="more than one column of the name 'extra'"):
        residualize_file(source, out, formula="extra")
    with pytest.raises(TableFileError, match="more than one column"):
        read_table_file(source)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_numbers_that_stand_for_missing_values_warn(tmp_path, suffix) -> None:
    table = people()
    table.loc[::20, "age"] = -9999
    table.loc[::30, "w"] = 999
    source, out = tmp_path / f"t{suffix}", tmp_path / f"o{suffix}"
    write(table, source)
    notes = residualize_file(source, out, formula="age").warnings
    assert any("'age' has -9999 in 6 row(s)" in note for note in notes)
    assert any("'w' has 999 in 4 row(s)" in note for note in notes)
    write(people(), source)
    assert residualize_file(source, out, formula="age").warnings == ()


def test_missing_features_are_an_error_that_names_all_of_them_or_skipped(tmp_path) -> None:
    table = people()
    table.loc[[3, 50], "vol"] = np.nan
    table.loc[60, "w"] = np.nan
    write(table, tmp_path / "t.parquet")
    options = {"formula": "age", "save_model": tmp_path / "c.safetensors"}
    with pytest.raises(TableFileError, match=r"feature\(s\) 'vol', 'w' \(2 of 2\).*missing_features='skip'"):
        residualize_file(tmp_path / "t.parquet", tmp_path / "o.parquet", **options)
    with pytest.raises(ValueError, match="missing_features must be"):
        residualize_file(tmp_path / "t.parquet", tmp_path / "o.parquet", **options, missing_features="drop")
    summary = residualize_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", **options, missing_features="skip"
    )
    assert (summary.num_rows, summary.num_rows_fitted) == (N, N - 3)
    result, complete = pd.read_parquet(tmp_path / "o.parquet"), table.dropna()
    np.testing.assert_array_equal(result.isna(), table.isna())
    np.testing.assert_allclose(result.loc[complete.index, ["vol", "w"]], expected(complete), atol=1e-10)
    model = MetadataModel.load(tmp_path / "c.safetensors")
    residualize_file(tmp_path / "t.parquet", tmp_path / "p.parquet", apply=model, missing_features="skip")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "p.parquet"), result)
    table.loc[70, "w"] = np.inf
    write(table, tmp_path / "t.parquet")
    with pytest.raises(TableFileError, match="infinite"):
        residualize_file(
            tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age", missing_features="skip"
        )


def test_rules_for_new_levels_may_be_given_with_a_fitted_model(tmp_path) -> None:
    table = people().assign(site=np.resize(["a", "b"], N), sex=np.resize(["f", "f", "m"], N))
    write(table, tmp_path / "t.parquet")
    saved = tmp_path / "c.safetensors"
    residualize_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age + sex", site="site", save_model=saved
    )
    model = MetadataModel.load(saved)
    for column in ("site", "sex"):
        write(table.assign(**{column: "new"}), tmp_path / "new.parquet")
        with pytest.raises(TableFileError, match="unseen="):
            residualize_file(tmp_path / "new.parquet", tmp_path / "p.parquet", apply=model)
        residualize_file(tmp_path / "new.parquet", tmp_path / "p.parquet", apply=model, unseen="mean")
    with pytest.raises(ValueError, match="missing must be 'error' or 'mean' for a fitted model"):
        residualize_file(tmp_path / "t.parquet", tmp_path / "p.parquet", apply=model, missing="indicator")


@pytest.mark.parametrize("damage", ["cut", "header", "version", "text"])
def test_a_damaged_array_is_one_sentence(tmp_path, damage) -> None:
    np.save(tmp_path / "t.npy", np.zeros((9, 3)))
    content = (tmp_path / "t.npy").read_bytes()
    damaged = {
        "cut": content[:-8],
        "header": b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (100, 4".ljust(
            128
        ),
        "version": b"\x93NUMPY\x07\x00" + content[8:],
        "text": b"hello",
    }[damage]
    (tmp_path / "t.npy").write_bytes(damaged)
    people(9).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(TableFileError, match=r"t\.npy") as error:
        residualize_file(tmp_path / "t.npy", tmp_path / "o.npy", metadata=tmp_path / "m.csv", formula="age")
    assert "statement" not in str(error.value)
