"""Weights give the same numbers as Python floats and as tensors, small values as arrays and as tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mdnorm import weights
from mdnorm.weights import (
    all_finite,
    at_least,
    can_leave_torch,
    can_read,
    is_small,
    is_transforming,
    positive,
    product,
    ratio,
    read,
    write_,
)

NUMBERS = st.floats(0, 1e6)


def as_tensor(value):
    return torch.tensor([value], dtype=torch.float64)


class TestNumbersAndTensors:
    @given(NUMBERS, NUMBERS)
    def test_same_formulas(self, a, b):
        assert float(at_least(as_tensor(a), b)) == at_least(a, b)
        assert float(positive(as_tensor(a), 0.25, 1.0)) == positive(a, 0.25, 1.0)
        assert float(ratio(as_tensor(a), as_tensor(b), torch.float64)) == ratio(a, b, torch.float64)

    def test_share_of_nothing_is_nothing(self):
        assert ratio(0.0, 0.0, torch.float32) == 0
        share = ratio(as_tensor(0.0), as_tensor(0.0), torch.float32)
        assert share.dtype == torch.float32
        assert float(share) == 0

    @pytest.mark.parametrize("value", [2.5, as_tensor(2.5)])
    def test_written_and_read_in_place(self, value):
        buffer = torch.zeros(1, dtype=torch.float64)
        assert write_(buffer, value) is buffer
        assert read(buffer) == 2.5
        assert isinstance(read(buffer), float)


class TestCanRead:
    def test_on_the_cpu_alone(self):
        assert can_read(torch.ones(1))
        assert can_read(nn.Parameter(torch.ones(1)))
        assert not can_read(torch.ones(1, device="meta"))
        meta = torch.ones(1, device="meta")
        assert read(meta) is meta

    def test_not_in_transforms(self):
        seen = []

        def look(x):
            seen.append((is_transforming(), can_read(x), isinstance(all_finite(x), torch.Tensor)))
            return x

        torch.func.vmap(look)(torch.ones(3, 2))
        assert seen == [(True, False, True)]
        assert not is_transforming()

    def test_not_while_a_graph_is_traced(self):
        def double(x):
            return x * 2 if can_read(x) else x * 3

        traced = torch.compile(double, backend="eager", fullgraph=True)
        assert torch.equal(traced(torch.ones(2)), torch.full((2,), 3.0))

    def test_matrices_stay_where_operations_are_recorded(self):
        class Counter(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        values = torch.ones(2)
        assert can_leave_torch(values)
        assert is_small(values)
        with Counter():
            assert can_read(values)
            assert not can_leave_torch(values)
            assert not is_small(values)
        assert not can_leave_torch(torch.ones(2, device="meta"))

    def test_not_of_a_subclass(self):
        class Wrapped(torch.Tensor):
            pass

        assert not can_read(torch.ones(1).as_subclass(Wrapped))


class TestAllFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_of_values(self, bad):
        values = torch.ones(4, 3)
        assert all_finite(values) is True
        values[2, 1] = bad
        assert all_finite(values) is False

    def test_opposite_infinities_do_not_cancel(self):
        assert all_finite(torch.tensor([math.inf, -math.inf])) is False

    def test_empty(self):
        assert all_finite(torch.ones(0, 3)) is True

    @pytest.mark.parametrize("shape", [(4, 3), (4000, 3)])
    def test_squares_may_overflow(self, shape):
        values = torch.full(shape, 1e30)
        assert all_finite(values) is True
        assert all_finite(values.T) is True
        values[-1, -1] = math.nan
        assert all_finite(values) is False
        assert all_finite(values.T) is False


class TestSmall:
    def test_by_number_dtype_and_device(self):
        assert is_small(torch.ones(weights._SMALL))
        assert not is_small(torch.ones(weights._SMALL + 1))
        assert not is_small(torch.ones(2, dtype=torch.float16))
        assert not is_small(torch.ones(2, device="meta"))

    @pytest.mark.parametrize("n", [3, 200, 5000])
    def test_product_by_either(self, n):
        generator = np.random.default_rng(0)
        left, right = generator.normal(size=(8, n)), generator.normal(size=(n, 8))
        assert (left.size * 8 > weights._FEW_MULTIPLICATIONS) == (n == 5000)
        np.testing.assert_allclose(product(left, right), np.einsum("ij,jk->ik", left, right), atol=1e-10)
        np.testing.assert_allclose(product(right.T, left.T), right.T @ left.T, atol=1e-10)
