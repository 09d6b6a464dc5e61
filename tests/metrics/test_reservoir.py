"""The keys against integers of any size, the sample against sorting all keys, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mdnorm.metrics import reservoir
from mdnorm.metrics.reservoir import Rows

CPU = torch.device("cpu")


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**20), st.integers(0, 2**10), st.integers(0, 40))
def test_keys_depend_on_the_place_in_the_stream_only(seed: int, rank: int, start: int, count: int) -> None:
    whole = reservoir.sample_keys(0, start + count, seed=seed, rank=rank)
    assert torch.equal(reservoir.sample_keys(start, count, seed=seed, rank=rank), whole[start:])
    assert reservoir.sample_keys(2**40, 5, seed=seed, rank=rank).unique().numel() == 5


def test_streams_of_seeds_and_ranks_have_no_key_in_common() -> None:
    streams = [
        reservoir.sample_keys(0, 500, seed=seed, rank=rank) for seed in range(-3, 4) for rank in range(4)
    ]
    keys = torch.cat(streams)
    assert keys.unique().shape == keys.shape
    assert int(keys.min()) >= 0


def test_every_row_is_as_likely_in_the_sample() -> None:
    num_rows, size, num_seeds = 40, 10, 4000
    counts, first_pair = np.zeros(num_rows), 0
    for seed in range(num_seeds):
        chosen = reservoir.sample_keys(0, num_rows, seed=seed).argsort()[:size].numpy()
        counts[chosen] += 1
        first_pair += {0, 1} <= set(chosen.tolist())
    assert stats.chisquare(counts).pvalue > 1e-3
    # Pairs as well: a sample without replacement, not of neighbours.
    pair = size * (size - 1) / (num_rows * (num_rows - 1))
    assert stats.binomtest(first_pair, num_seeds, pair).pvalue > 1e-3


def _rows(n: int, start: int = 0, *, seed: int = 0) -> Rows:
    index = torch.arange(start, start + n)
    return Rows(
        index[:, None].float(), index[:, None].double(), index, reservoir.sample_keys(start, n, seed=seed)
    )


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    max_samples=st.one_of(st.none(), st.integers(4, 40)),
    seed=st.integers(0, 100),
)
def test_the_sample_is_that_of_the_smallest_keys_in_bounded_memory(
    sizes: list[int], max_samples: int | None, seed: int
) -> None:
    pieces: list[Rows] = []
    start = 0
    for size in sizes:
        pieces = reservoir.add_rows(pieces, _rows(size, start, seed=seed), max_samples)
        start += size
        assert max_samples is None or sum(map(len, pieces)) <= 2 * max_samples
    keys = reservoir.sample_keys(0, start, seed=seed).numpy()
    expected = np.sort(np.argsort(keys)[:max_samples])
    if not pieces:
        assert start == 0
        return
    rows = reservoir.sample(pieces, max_samples)
    assert rows.labels.tolist() == expected.tolist()
    assert rows.features[:, 0].tolist() == expected.tolist()
    assert rows.metadata[:, 0].tolist() == expected.tolist()
    assert rows.keys.tolist() == keys[expected].tolist()


def test_a_batch_larger_than_the_sample() -> None:
    pieces = reservoir.add_rows([], _rows(1000), 5)
    assert sum(map(len, pieces)) == 5


def test_rows_are_copies() -> None:
    features, metadata, labels = torch.randn(5, 2), torch.randn(5, 1).double(), torch.arange(5)
    rows = reservoir.as_rows(features, metadata, labels, CPU)
    expected = [part.clone() for part in (features, metadata, labels)]
    for part in (features, metadata, labels):
        part.zero_()
    assert torch.equal(rows.features, expected[0])
    assert torch.equal(rows.metadata, expected[1])
    assert torch.equal(rows.labels, expected[2])


def test_shapes_and_types_that_rows_take() -> None:
    rows = reservoir.as_rows(torch.ones(3, 2, 4, 5).half(), [True, False, True], [[0.0], [2.0], [-1.0]], CPU)
    assert rows.features.shape == (3, 40)
    assert rows.features.dtype == torch.float32
    assert rows.metadata.tolist() == [[1.0], [0.0], [1.0]]
    assert rows.metadata.dtype == torch.float64
    assert rows.labels.tolist() == [0, 2, -1]
    assert reservoir.as_rows(np.zeros(3), np.zeros((3, 2)), None, CPU).features.shape == (3, 1)
    assert len(reservoir.as_rows(torch.zeros(0, 7), torch.zeros(0, 2), torch.zeros(0), CPU)) == 0
    big = 2.0**40 + 1  # metadata keep what float32 would round
    assert reservoir.as_rows(np.zeros(1), np.array([big]), None, CPU).metadata.item() == big


@pytest.mark.parametrize(
    ("features", "metadata", "labels", "error", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(3), None, ValueError, "got 4 rows in features and 3 in metadata"),
        (torch.zeros(4, 2), torch.zeros(4), [0, 1], ValueError, "got 4 rows in features and 2 in labels"),
        (torch.tensor(1.0), torch.zeros(1), None, ValueError, "features must have one row per sample"),
        (torch.zeros(4, 0), torch.zeros(4), None, ValueError, "features have no values"),
        (
            torch.zeros(4, 2),
            torch.zeros(4, 0),
            None,
            ValueError,
            r"metadata must have at least one column, got shape \(4, 0",
        ),
        (torch.zeros(4, 2), torch.zeros(4, 1, 1), None, ValueError, r"metadata must have .* got \(4, 1, 1\)"),
        (torch.zeros(4, 2), torch.zeros(()), None, ValueError, r"metadata must have .* got \(\)"),
        (
            torch.tensor([[1.0], [torch.nan], [torch.inf]]),
            torch.zeros(3),
            None,
            ValueError,
            r"features has NaN .* in row\(s\) 1, 2 \(2 of 3 rows\): drop these rows from features and",
        ),
        (np.array([1e300, 1.0]), np.zeros(2), None, ValueError, r"features has .* in float32.*row\(s\) 0 "),
        (np.zeros(2), np.array([0, np.nan]), None, ValueError, r"metadata has NaN .* in row\(s\) 1 \("),
        (
            np.zeros(2),
            np.array(["a", "b"]),
            None,
            TypeError,
            "metadata must be real and numeric.*encode categories",
        ),
        (np.zeros(2), None, None, TypeError, "metadata must be a tensor or an array, got None"),
        (np.zeros(2, dtype=complex), np.zeros(2), None, TypeError, "features must be real.*complex"),
        (np.zeros(2), np.zeros(2), [0.0, 0.5], ValueError, r"class indices, got 0.5 in row 1: a continuous"),
        (np.zeros(2), np.zeros(2), [0.0, np.nan], ValueError, r"class indices, got nan in row 1"),
        (np.zeros(2), np.zeros(2), np.eye(2), ValueError, r"got \(2, 2\); one-hot .* labels.argmax\(1\)"),
        (np.zeros(2), np.zeros(2), ["a", "b"], TypeError, "labels must be real and numeric"),
    ],
)
def test_errors_name_the_argument(
    features: Any, metadata: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reservoir.as_rows(features, metadata, labels, CPU)


@pytest.mark.parametrize(
    ("max_samples", "seed", "error", "message"),
    [
        (3, 0, ValueError, "max_samples must be at least 4, got 3"),
        (0, 0, ValueError, "max_samples must be at least 4, got 0"),
        (10.0, 0, TypeError, "max_samples must be an integer or None, got 10.0"),
        (True, 0, TypeError, "max_samples must be an integer or None, got True"),
        (10, None, TypeError, "seed must be an integer, got None"),
        (10, "0", TypeError, "seed must be an integer, got '0'"),
    ],
)
def test_settings_are_checked(max_samples: Any, seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        reservoir.Sampling(False, max_samples, seed, None)


@pytest.mark.parametrize(
    ("column_names", "error", "message"),
    [
        ("age", TypeError, "must be a sequence of strings.*got 'age'"),
        (3, TypeError, "must be a sequence of strings.*got 3"),
        ([], ValueError, "column_names is empty"),
        ({}, ValueError, "column_names is empty"),
        ([1], TypeError, "must be strings, got 1"),
        (["age", "joint"], ValueError, "must not contain 'joint': that is the name of"),
        (["age", "sex", "age"], ValueError, "has 'age' 2 times"),
        ({"age": 0}, TypeError, r"column_names\['age'\] must be a list of column indices, got 0"),
        ({"age": [0.5]}, TypeError, r"column_names\['age'\] must be a list of column indices"),
        ({"age": []}, ValueError, r"column_names\['age'\] is empty"),
    ],
)
def test_column_names_are_checked(column_names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        reservoir.check_column_names(column_names)


def test_groups_of_columns() -> None:
    assert reservoir.column_groups(None, 2) == {"column_0": [0], "column_1": [1]}
    assert reservoir.column_groups(("a", "b"), 2) == {"a": [0], "b": [1]}
    assert reservoir.column_groups({"a": (2,), "b": [0, 1]}, 3) == {"a": [2], "b": [0, 1]}
    with pytest.raises(ValueError, match=r"2 name\(s\) \(a, b\) but the metadata have 3 column"):
        reservoir.column_groups(["a", "b"], 3)
    for column in (3, -1):
        with pytest.raises(ValueError, match=rf"\['b'\] has column {column}, but the metadata have 3"):
            reservoir.column_groups({"a": [0], "b": [1, column]}, 3)
