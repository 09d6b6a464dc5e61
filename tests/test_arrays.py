"""Arrays and DataFrames of all kinds of numbers; what is not numeric, finite or rightly shaped is named."""

from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

import mdnorm
from mdnorm import metadata_norm
from mdnorm.arrays import as_real_tensor, check_finite_columns, columns_of, label_columns, plain_tensor
from mdnorm.design.reader import read_column

AGES = [20.5, 30.0, 40.25]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (pd.DataFrame({"age": AGES, "sick": [True, False, True]}), torch.float64),
        (pd.DataFrame({"count": pd.array([1, 2, 3], "Int64"), "age": AGES}), torch.float64),
        (pd.DataFrame({"count": pd.array([1, 2, 3], "Int64"), "sick": [True, False, True]}), torch.int64),
        (pd.DataFrame({"a": pd.array([True, False, True], "boolean"), "b": [True, True, False]}), torch.bool),
        (pd.DataFrame({"age": AGES, "dose": [Decimal("0.5"), Decimal(1), Decimal(2)]}), torch.float64),
        (pl.DataFrame({"age": AGES, "sick": [True, False, True]}), torch.float64),
        ([[1, 2.5], [Decimal(3), 4]], torch.float64),
        ([2**70, 1], torch.float64),
    ],
)
def test_numbers_of_several_types(table, expected):
    tensor = as_real_tensor(table, "metadata")
    assert tensor.dtype == expected
    rows = table.to_numpy().tolist() if hasattr(table, "to_numpy") else table
    assert tensor.double().tolist() == np.array(rows, dtype=np.float64).tolist()


def test_categories_of_numbers_are_classes_as_labels():
    assert label_columns(pd.Series([1, 0, 2], dtype="category"), 3).long().argmax(1).tolist() == [1, 0, 2]


@pytest.mark.parametrize("values", [AGES, [20, 30, 40]])
def test_what_is_masked_is_missing(values):
    masked = np.ma.masked_array(values, [False, True, False])
    assert as_real_tensor(masked, "metadata").isnan().tolist() == [False, True, False]
    assert read_column("age", masked).missing.tolist() == [False, True, False]
    assert as_real_tensor(np.ma.masked_array(values), "metadata").tolist() == values


def test_missing_values_are_named_by_who_looks_at_them():
    table = pd.DataFrame({"count": pd.array([1, None, 3], "Int64"), "age": AGES})
    tensor = as_real_tensor(table, "metadata")
    assert tensor.isnan().nonzero().tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"metadata has NaN or infinite values in column\(s\) \[0\]"):
        mdnorm.MetadataNorm(2, 2)(torch.randn(3, 2), table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"age": AGES, "site": list("abc")}), r"the column\(s\) 'site' are not: encode categ"),
        (pd.DataFrame({"age": AGES, 3: pd.Categorical(list("aba"))}), r"the column\(s\) 3 are not"),
        (pl.DataFrame({"age": AGES, "site": list("abc")}), r"the column\(s\) 'site' are not"),
        (
            pd.DataFrame({"sex": list("mfm"), "day": [pd.Timestamp(0)] * 3}),
            r"the column\(s\) 'sex', 'day' are",
        ),
        (pd.DataFrame({"age": AGES, "site": pd.Categorical([1, 2, 1])}), r"the column\(s\) 'site' are not"),
        (pd.Series([1, 2, 1], dtype="category"), r"the column\(s\) 'metadata' are not: encode categories"),
        (np.array([None, None]), "got an array of dtype object: encode"),
        (np.array(["a", "b"]), "got an array of dtype <U1: encode"),
        ([1 + 2j], "got an array of dtype complex128"),
    ],
)
def test_what_is_not_numeric_is_named(table, message):
    with pytest.raises(TypeError, match=f"metadata must be real and numeric, (but )?{message}"):
        as_real_tensor(table, "metadata")


def test_a_list_of_tensors_is_refused():
    """What a loader makes of several columns; where there are as many as rows, both would be possible."""
    with pytest.raises(TypeError, match=r"labels is a list of tensors.*torch\.stack\(columns, 1\)"):
        as_real_tensor([torch.zeros(2), torch.ones(2)], "labels")
    assert as_real_tensor([torch.tensor(1.0), torch.tensor(2.0)], "labels").tolist() == [1, 2]


class TestColumns:
    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float64]
    )
    def test_any_real_dtype(self, dtype):
        values = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=dtype)
        assert columns_of(values, "metadata") is values
        assert columns_of(values[:, 0], "labels", num_samples=3, num_columns=1).tolist() == [[1], [0], [1]]

    @pytest.mark.parametrize(
        "kind",
        [
            "f2",
            "f4",
            "f8",
            "longdouble",
            "i1",
            "i8",
            "u1",
            "u2",
            "u4",
            "u8",
            "bool",
            ">f4",
            ">f8",
            ">i4",
            "<i2",
        ],
    )
    def test_arrays_of_any_dtype_count_the_same(self, kind):
        features, values = torch.randn(6, 2, dtype=torch.float64), np.array([1, 0, 1, 1, 0, 0])
        expected = metadata_norm(
            features, torch.tensor(values).double(), torch.tensor(values[::-1].copy()).double()
        )
        array = values.astype(kind)
        assert torch.equal(metadata_norm(features, array, array[::-1]), expected)
        layer = mdnorm.MetadataNorm(2, 1, 1, estimator="batch", prior=0, dtype=torch.float64)
        torch.testing.assert_close(layer(features, array, array[::-1]), expected)
        torch.testing.assert_close(layer.eval()(features, array), expected)

    @pytest.mark.parametrize(
        "values",
        [
            np.arange(6.0)[::-1],
            np.arange(12.0).reshape(6, 2)[:, ::-1],
            np.broadcast_to(np.float32(2), 6),
            np.arange(6, dtype=">f8"),
            np.arange(12.0)[::2],
            np.asfortranarray(np.arange(12.0).reshape(6, 2)),
        ],
    )
    def test_arrays_that_tensors_cannot_share(self, values):
        features = torch.randn(6, 2, dtype=torch.float64)
        expected = metadata_norm(features, torch.tensor(values.tolist()))
        torch.testing.assert_close(metadata_norm(features, values), expected)

    @pytest.mark.parametrize("estimator", ["batch", "running", "recursive"])
    @pytest.mark.parametrize("as_tensors", [False, True])
    def test_nothing_is_written_to(self, estimator, as_tensors):
        """In the dtype that the design is computed in, where a copy could be saved."""
        arrays = {
            "metadata": np.arange(18.0).reshape(9, 2) ** 1.5,
            "labels": np.arange(9.0)[:, None] % 4,
            "weights": np.arange(9.0) + 1,
        }
        before = {name: array.copy() for name, array in arrays.items()}
        for array in arrays.values():
            array.flags.writeable = as_tensors
        given = {name: torch.from_numpy(array) for name, array in arrays.items()} if as_tensors else arrays
        layer = mdnorm.MetadataNorm(3, 2, 1, estimator=estimator, scale=True)
        features = torch.randn(9, 3)
        kept = features.clone()
        for _ in range(2):
            layer(features, **given)
        layer.eval()(features, given["metadata"])
        metadata_norm(features, **given)
        mdnorm.fit_gram(layer, **given)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, before[name])
        assert torch.equal(features, kept)

    def test_lists_and_tables(self):
        assert columns_of([1, 2.5], "metadata").tolist() == [[1], [2.5]]
        assert columns_of(pd.DataFrame({"age": AGES, "sick": [True, False, True]}), "metadata").shape == (
            3,
            2,
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_samples": 4}, "metadata has 3 rows but there are 4 samples"),
            (
                {"num_columns": 1},
                r"metadata has 2 column\(s\) but num_metadata=1 was expected",
            ),
            (
                {"device": torch.device("meta")},
                r"metadata is on cpu but the features are on meta.*metadata\.to\('meta'\)",
            ),
        ],
    )
    def test_what_is_expected(self, options, message):
        with pytest.raises(ValueError, match=message):
            columns_of(torch.ones(3, 2), "metadata", **options)

    def test_dimensions(self):
        with pytest.raises(
            ValueError, match=r"labels must have shape \(num_samples,\) or .* got \(3, 1, 1\)"
        ):
            columns_of(torch.ones(3, 1, 1), "labels")
        with pytest.raises(ValueError, match="metadata has no columns"):
            columns_of(torch.ones(3, 0), "metadata")
        assert columns_of(torch.ones(3, 0), "labels").shape == (3, 0)


class TestLabelColumns:
    def test_class_indices_become_one_hot(self):
        indices = torch.tensor([2, 0, 1, 2])
        expected = torch.nn.functional.one_hot(indices).tolist()
        for labels in (
            indices,
            indices[:, None],
            indices.numpy().astype(np.uint16),
            indices.tolist(),
            indices.to(torch.int8),
        ):
            assert label_columns(labels, 3).int().tolist() == expected
        assert label_columns(indices, 1) is indices

    def test_class_index_out_of_range(self):
        with pytest.raises(ValueError, match="class index 3, but num_labels=3 allows 0 to 2 only"):
            label_columns(torch.tensor([0, 3]), 3)
        with pytest.raises(ValueError, match="class index -1"):
            label_columns(torch.tensor([-1, 2]), 3)

    def test_class_indices_are_no_ordinal_column_unless_asked_for(self):
        classes = torch.arange(9) % 3
        with pytest.raises(ValueError, match=r"integers from 0 to 2: .*labels.float\(\)"):
            label_columns(classes, None)
        for labels in (
            classes.float(),
            classes.clamp_max(1),
            classes.bool(),
            2 * classes.clamp_max(1) - 1,
            classes[:0],
        ):
            assert label_columns(labels, None) is labels

    def test_what_is_a_column_already_stays(self):
        one_hot = torch.eye(3)
        assert label_columns(one_hot, 3) is one_hot
        assert label_columns(one_hot[:, 0], 0) is not None
        with pytest.raises(
            ValueError, match=r"1 column\(s\) of torch\.float32 but num_labels=3 .*labels\.long\(\)"
        ):
            label_columns(one_hot[:, 0], 3)


class TestFiniteColumns:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_the_block_its_columns_and_rows_are_named(self, value):
        metadata, labels = torch.ones(9, 3), torch.ones(9, 1)
        metadata[2:8, 1] = value
        columns = torch.cat([labels, metadata], 1).double()
        message = (
            r"metadata has NaN or infinite.*column\(s\) \[1\], row\(s\) 2, 3, 4, 5, 6, … \(6 of 9 rows\)"
        )
        with pytest.raises(ValueError, match=message):
            check_finite_columns(columns, metadata=metadata, labels=labels)

    def test_squares_that_overflow(self):
        labels = torch.tensor([[1.0, 2.0], [3.0, -1e160]], dtype=torch.float64)
        with pytest.raises(
            ValueError, match=r"labels has values up to 1e\+160 in column 1, whose squares overflow"
        ):
            check_finite_columns(labels, metadata=torch.ones(2, 1), labels=labels)
        check_finite_columns(labels * 1e-10, labels=labels * 1e-10)

    def test_columns_with_a_gradient(self):
        columns = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
        check_finite_columns(columns, metadata=columns)


def test_a_plain_tensor_is_not_copied():
    tensor, parameter = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    assert plain_tensor(tensor) is tensor

    class Tagged(torch.Tensor):
        pass

    for subclass in (tensor.as_subclass(Tagged), parameter):
        assert type(plain_tensor(subclass)) is torch.Tensor
        assert plain_tensor(subclass).data_ptr() == subclass.data_ptr()
        assert plain_tensor(subclass).requires_grad == subclass.requires_grad
