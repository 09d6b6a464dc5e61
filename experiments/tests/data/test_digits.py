"""Coloured digits: the pixels are scikit-learn's, labels and colours as documented."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from mdnorm.extras import MissingExtraError
from mdnorm_experiments.data.digits import COUNT, LABEL_NOISE, colour_digits


def test_there_are_as_many_digits():
    assert len(load_digits().target) == COUNT


@given(st.lists(st.integers(0, COUNT - 1), max_size=12), st.integers(0, 1000), st.floats(0, 1))
def test_pixels_are_the_digit_times_its_colour(rows, seed, correlation):
    coloured = colour_digits(torch.tensor(rows, dtype=torch.int64), seed=seed, correlation=correlation)
    grey = load_digits().images[rows].reshape(-1, 8, 8) / 16
    grey = np.kron(grey, np.ones((1, 2, 2)))
    colour = coloured.confounders[:, 0].double().numpy()
    tint = np.stack([1 - colour, colour, np.full_like(colour, 0.2)], 1)
    expected = grey[:, None] * tint[:, :, None, None]
    assert coloured.inputs.dtype == torch.float32
    assert coloured.inputs.shape == expected.shape
    np.testing.assert_allclose(coloured.inputs.numpy(), expected, atol=1e-6)
    assert bool(((coloured.confounders[:, 0] >= 0) & (coloured.confounders[:, 0] <= 1)).all())


def test_a_quarter_of_the_labels_is_wrong():
    coloured = colour_digits(torch.arange(COUNT), seed=0)
    wrong = (coloured.labels != torch.from_numpy(load_digits().target > 4)).double().mean()
    assert float(wrong) == pytest.approx(
        LABEL_NOISE, abs=4 * (LABEL_NOISE * (1 - LABEL_NOISE) / COUNT) ** 0.5
    )


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8, 1.0])
def test_the_colour_goes_with_the_label_as_it_stands(correlation):
    coloured = colour_digits(torch.arange(COUNT), seed=1, correlation=correlation)
    agrees = ((coloured.confounders[:, 0] > 0.5) == (coloured.labels == 1)).double().mean()
    share = 0.5 + correlation / 2
    assert float(agrees) == pytest.approx(share, abs=4 * (share * (1 - share) / COUNT) ** 0.5)
    # The colour knows no more of the digit than the noisy label tells.
    digits = torch.from_numpy(load_digits().target)
    for label in (0, 1):
        inside = coloured.labels == label
        high, low = (coloured.confounders[:, 0][inside & side].double() for side in (digits > 4, digits <= 4))
        error = (high.var() / len(high) + low.var() / len(low)) ** 0.5
        assert abs(float(high.mean() - low.mean())) < 4 * float(error)


def test_the_seed_decides():
    rows = torch.arange(50)
    first, again, other = (colour_digits(rows, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.confounders, other.confounders)


@pytest.mark.parametrize(
    ("rows", "correlation", "message"),
    [
        ([0, COUNT], 0.5, "rows must be between 0 and 1796, got 0 to 1797"),
        ([-1, 3], 0.5, "rows must be between 0 and 1796, got -1 to 3"),
        ([0], -0.1, "correlation must be between 0 and 1, got -0.1"),
        ([0], float("nan"), "correlation must be between 0 and 1, got nan"),
    ],
)
def test_values_out_of_range(rows, correlation, message):
    with pytest.raises(ValueError, match=message):
        colour_digits(torch.tensor(rows), seed=0, correlation=correlation)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"mdnorm-experiments\[image\]"):
        colour_digits(torch.arange(3), seed=0)
