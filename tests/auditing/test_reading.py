import contextlib
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mdnorm.auditing.reading import InputError, read_features, read_table
from mdnorm.design.roles import TableWarning


@pytest.fixture
def values():
    return np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def write(path, values):
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, features=values, other=np.zeros(2))
    elif path.suffix == ".safetensors":
        save_file({"features": torch.from_numpy(values), "labels": torch.zeros(4)}, path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({f"f{i}": values[:, i] for i in range(values.shape[1])}), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        rows = [separator.join(f"{value:.9g}" for value in row) for row in values]
        path.write_text("\n".join([separator.join("abc"), *rows]))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet", ".csv", ".tsv", ".NPY"])
def test_every_format_gives_the_same_features(tmp_path, values, suffix):
    path = tmp_path / f"features{suffix.lower()}"
    write(path, values)
    path = path.rename(tmp_path / f"features{suffix}")
    np.testing.assert_allclose(read_features(path), values, rtol=1e-7)


def test_npy_is_memory_mapped(tmp_path, values):
    np.save(tmp_path / "features.npy", values)
    assert isinstance(read_features(tmp_path / "features.npy"), np.memmap)


def test_half_precision_tensors_are_read(tmp_path, values):
    tensor = torch.from_numpy(values).bfloat16()
    save_file({"hidden": tensor}, tmp_path / "features.safetensors")
    np.testing.assert_array_equal(read_features(tmp_path / "features.safetensors"), tensor.float().numpy())


def test_the_key_chooses_an_array(tmp_path):
    np.savez(tmp_path / "many.npz", a=np.zeros((2, 1)), b=np.ones((2, 1)))
    assert read_features(tmp_path / "many.npz", "b").sum() == 2
    with pytest.raises(InputError, match=r"several arrays or none \('a', 'b'\)"):
        read_features(tmp_path / "many.npz")
    with pytest.raises(InputError, match="no array 'c'; it has 'a', 'b'"):
        read_features(tmp_path / "many.npz", "c")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_files_are_named(tmp_path, values, suffix, damage):
    path = tmp_path / f"features{suffix}"
    write(path, values)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"hello " * 9, "empty": b""}[damage])
    with pytest.raises(InputError, match=f"features{suffix}"):
        read_features(path)


def test_python_objects_are_never_loaded(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}], dtype=object))
    for name in ("objects.npy", "objects.npz"):
        with pytest.raises(InputError, match="never loaded"):
            read_features(tmp_path / name)


def test_other_mistakes_with_features(tmp_path):
    with pytest.raises(InputError, match=r"from \.npy, .*, not from \.pt"):
        read_features(tmp_path / "features.pt")
    with pytest.raises(InputError, match="does not exist"):
        read_features(tmp_path / "features.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        read_features(tmp_path / "folder.npy")
    np.save(tmp_path / "texts.npy", np.array(["a", "b"]))
    with pytest.raises(InputError, match="must be real numbers"):
        read_features(tmp_path / "texts.npy")
    (tmp_path / "mixed.csv").write_text("a,b,c\n1,x,2\n3,y,4\n")
    with pytest.warns(TableWarning, match=r"not taken as features: b \(text\)"):
        np.testing.assert_array_equal(read_features(tmp_path / "mixed.csv"), [[1, 2], [3, 4]])
    with pytest.raises(InputError, match=r"the feature\(s\) 'b' are not numeric"):
        read_features(tmp_path / "mixed.csv", columns=["b"])


def test_missing_values_of_a_table_of_features_are_nan(tmp_path):
    (tmp_path / "features.csv").write_text("a,b\n1,2\n,4\n")
    np.testing.assert_array_equal(read_features(tmp_path / "features.csv"), [[1, 2], [np.nan, 4]])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_missing_values(tmp_path, separator):
    rows = [["age", "site"], ["40", "n/a"], ["", "Graz"], ["51.5", ""]]
    (tmp_path / "metadata.csv").write_text("\n".join(separator.join(row) for row in rows))
    assert read_table(tmp_path / "metadata.csv").to_pydict() == {
        "age": [40.0, None, 51.5],
        "site": [None, "Graz", None],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "no rows"),
        ("a,a\n1,2\n", "more than one column of the name"),
        ("a,b\n1,2,3\n", "cannot be read as CSV"),
        ("", "empty"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "metadata.csv")


def test_a_table_in_another_encoding_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("Ort\nK\xf6ln\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8: save it as UTF-8"):
        read_table(tmp_path / "metadata.csv")


def test_columns_of_a_table_are_chosen_by_name_and_pattern(tmp_path):
    (tmp_path / "table.csv").write_text("subject,roi_1,age,roi_2\ns1,1,40,2\ns2,3,50,4\n")
    np.testing.assert_array_equal(read_features(tmp_path / "table.csv", columns=["roi_*"]), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(read_features(tmp_path / "table.csv", columns=["age"]), [[40], [50]])
    with pytest.raises(InputError, match=r"table.csv has no column 'voxel_\*'.*'subject'"):
        read_features(tmp_path / "table.csv", columns=["roi_*", "voxel_*"])


def test_paths_may_be_texts(tmp_path, values):
    write(tmp_path / "features.csv", values)
    np.testing.assert_allclose(read_features(str(tmp_path / "features.csv")), values, rtol=1e-7)
    assert read_table(str(tmp_path / "features.csv")).num_rows == len(values)


def test_options_that_say_nothing_of_the_file_are_errors(tmp_path, values):
    for suffix in (".npy", ".csv"):
        write(tmp_path / f"features{suffix}", values)
        with pytest.raises(InputError, match="no named arrays, so a key"):
            read_features(tmp_path / f"features{suffix}", "features")
    write(tmp_path / "features.npz", values)
    for suffix in (".npy", ".npz"):
        with pytest.raises(InputError, match="no named columns"):
            read_features(tmp_path / f"features{suffix}", columns=["roi_*"])


def test_long_rows_and_headers_of_text_tables(tmp_path):
    names = [f"a_feature_with_a_long_name_{i:0300}" for i in range(6_000)]
    path = tmp_path / "wide.csv"
    first = ",".join([f"0.{25:0300}"] * 6_000)
    path.write_text(",".join(names) + "\n" + first + "\n" + ",".join(["1"] * 6_000))
    assert read_features(path).shape == (2, 6_000)
    (tmp_path / "notes.csv").write_text('age,note\n40,"two\nlines"\n50,one\n')
    assert read_table(tmp_path / "notes.csv")["note"].to_pylist() == ["two\nlines", "one"]


def test_decimal_commas_are_not_taken_for_categories(tmp_path):
    (tmp_path / "metadata.csv").write_text("alter;ort\n40,5;Graz\n38,25;Linz\n")
    with pytest.raises(InputError, match="column 'alter' has numbers with a comma, such as 40,5"):
        read_table(tmp_path / "metadata.csv")


def test_a_header_in_another_encoding_is_said(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("K\xf6rpergr\xf6\xdfe,Ort\n180,Linz\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8: save it as UTF-8"):
        read_table(tmp_path / "metadata.csv")


def test_damaged_arrays_are_one_sentence(tmp_path):
    features = np.random.default_rng(0).standard_normal((100, 4))
    np.savez_compressed(tmp_path / "good.npz", features=features)
    content = bytearray((tmp_path / "good.npz").read_bytes())
    for start in range(30, len(content) - 8, 97):
        damaged = content.copy()
        damaged[start : start + 8] = b"\0" * 8
        (tmp_path / "damaged.npz").write_bytes(bytes(damaged))
        # Some damage lies where nothing is read; all other is an error of ours.
        with contextlib.suppress(InputError):
            assert read_features(tmp_path / "damaged.npz").shape == (100, 4)
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (100, 4"
    (tmp_path / "short.npy").write_bytes(header.ljust(128, b" "))
    with pytest.raises(InputError, match=r"short\.npy cannot be read as an array"):
        read_features(tmp_path / "short.npy")
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("features", b"hello")
    with pytest.raises(InputError, match="holds a file 'features' that is no array"):
        read_features(tmp_path / "member.npz")


def test_the_index_of_a_frame_is_no_feature_and_metadata_only_with_a_name(tmp_path):
    table = pd.DataFrame({"age": [40.5, 50.5, 61.5], "volume": [1.5, 2.5, 3.5]}, index=[3, 7, 9])
    for path, write_table in (("t.parquet", table.to_parquet), ("t.csv", table.to_csv)):
        write_table(tmp_path / path)
        assert read_table(tmp_path / path).column_names == ["age", "volume"]
        with pytest.warns(TableWarning, match="the index of a DataFrame"):
            assert read_features(tmp_path / path).shape == (3, 2)
    table.rename_axis("subject").to_parquet(tmp_path / "named.parquet")
    assert read_table(tmp_path / "named.parquet").column_names == ["age", "volume", "subject"]
    with pytest.warns(TableWarning, match=r"subject \(the index of a DataFrame\)"):
        assert read_features(tmp_path / "named.parquet").shape == (3, 2)


def test_texts_that_stand_for_missing_values_are_an_error_or_an_option(tmp_path):
    rows = [f"{row + 0.5},{row * 1.5 + 0.25}" for row in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["age,volume", *rows[:7], "?,?", *rows[7:]]))
    for read in (read_table, read_features):
        with pytest.raises(InputError, match=r"'(age|volume)' has numbers, but '\?' in row 7 .*--missing-"):
            read(tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv", ["?"]).column("age").null_count == 1
    values = read_features(tmp_path / "t.csv", missing_values=["?"])
    assert np.isnan(values[7]).all()
    assert np.isfinite(np.delete(values, 7, axis=0)).all()
