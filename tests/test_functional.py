import collections
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdnorm import functional
from mdnorm.functional import (
    Gram,
    coefficient_operator,
    coefficients,
    design_columns,
    feature_moments,
    label_columns,
    merge_cross_moments_,
    metadata_norm,
    moment_rows,
    position_dims,
    remove_effect,
    remove_running_regression,
    rescale,
)
from reference import dataset_residual, design_matrix, residual

SHAPES = [(7,), (3, 5), (2, 4, 3), (2, 2, 3, 2)]


def make(n=60, k_m=3, k_y=2, shape=(7,), dtype=torch.float64, seed=0):
    """Features that depend on correlated metadata and labels, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(n, k_y, generator=generator, dtype=torch.float64)
    mixing = torch.randn(k_y, k_m, generator=generator, dtype=torch.float64)
    metadata = 5 + torch.randn(n, k_m, generator=generator, dtype=torch.float64) + 0.5 * labels @ mixing
    design = torch.cat([metadata, labels], 1)
    size = int(np.prod(shape))
    features = design @ torch.randn(k_m + k_y, size, generator=generator, dtype=torch.float64)
    features = features + torch.randn(n, size, generator=generator, dtype=torch.float64) + 3
    return features.reshape(n, *shape).to(dtype), metadata, labels


class TestLeastSquares:
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("with_labels", [False, True])
    def test_batch_form_equals_lstsq(self, shape, center, with_labels):
        features, metadata, labels = make(shape=shape)
        labels = labels if with_labels else None
        out = metadata_norm(features, metadata, labels, center=center)
        np.testing.assert_allclose(out, residual(features, metadata, labels, center), atol=1e-10, rtol=0)

    @pytest.mark.parametrize("center", [False, True])
    def test_dataset_form_equals_normal_equations(self, center):
        features, metadata, labels = make(n=200)
        gram = Gram.from_data(metadata, labels)
        part = slice(0, 23)
        out = metadata_norm(features[part], metadata[part], labels[part], gram, center=center)
        expected = dataset_residual(features[part], metadata[part], labels[part], metadata, labels, center)
        np.testing.assert_allclose(out, expected, atol=1e-10, rtol=0)

    def test_dataset_form_on_the_whole_set_is_the_batch_form(self):
        features, metadata, labels = make()
        out = metadata_norm(features, metadata, labels, Gram.from_data(metadata, labels))
        torch.testing.assert_close(out, metadata_norm(features, metadata, labels), atol=1e-11, rtol=0)

    @given(
        n=st.integers(12, 80),
        k_m=st.integers(1, 5),
        k_y=st.integers(0, 4),
        d=st.integers(1, 9),
        offset=st.sampled_from([0.0, 1.0, 1e3, -1e5]),
        seed=st.integers(0, 10_000),
    )
    def test_against_lstsq_over_shapes(self, n, k_m, k_y, d, offset, seed):
        features, metadata, labels = make(n, k_m, k_y, (d,), seed=seed)
        labels = labels if k_y else None
        out = metadata_norm(features, metadata + offset, labels)
        # The reference works on the centred metadata: lstsq itself loses digits at offset 1e5.
        expected = residual(features, metadata - metadata.mean(0), labels)
        np.testing.assert_allclose(out, expected, atol=1e-9 * max(1, abs(offset) / 1e3), rtol=0)

    def test_residuals_are_orthogonal_to_the_metadata(self):
        features, metadata, _ = make()
        out = metadata_norm(features, metadata)
        centred = metadata - metadata.mean(0)
        assert (centred.T @ out).abs().max() / features.norm() < 1e-12
        torch.testing.assert_close(out.mean(0), features.mean(0))

    def test_with_labels_the_full_residual_is_orthogonal_and_the_label_effect_stays(self):
        features, metadata, labels = make(n=500)
        out = metadata_norm(features, metadata, labels)
        design = design_matrix(metadata, labels)
        before = np.linalg.lstsq(design, features.numpy(), rcond=None)[0]
        after = np.linalg.lstsq(design, out.numpy(), rcond=None)[0]
        np.testing.assert_allclose(after[:3], 0, atol=1e-10)
        np.testing.assert_allclose(after[3:5], before[3:5], atol=1e-10)

    def test_shared_effect_is_kept_with_labels_and_removed_without(self):
        """The paper's collinearity case: the feature follows the label, which the metadata follow."""
        generator = torch.Generator().manual_seed(1)
        label = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
        metadata = label + 0.5 * torch.randn(4000, 1, generator=generator, dtype=torch.float64)
        slope_kept = np.polyfit(label[:, 0], metadata_norm(label.clone(), metadata, label)[:, 0], 1)[0]
        slope_lost = np.polyfit(label[:, 0], metadata_norm(label.clone(), metadata)[:, 0], 1)[0]
        assert slope_kept == pytest.approx(1, abs=1e-10)
        assert slope_lost == pytest.approx(0.2, abs=0.02)

    def test_channel_granularity_is_least_squares_over_all_positions(self):
        features, metadata, labels = make(shape=(3, 4, 5))
        out = metadata_norm(features, metadata, labels, granularity="channel")
        rows = features.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
        repeat = 20
        expected = residual(
            rows, np.repeat(metadata.numpy(), repeat, 0), np.repeat(labels.numpy(), repeat, 0)
        )
        np.testing.assert_allclose(out.permute(0, 2, 3, 1).reshape(-1, 3), expected, atol=1e-10)

    def test_tokens_have_their_channels_last(self):
        features, metadata, labels = make(shape=(6, 4))
        out = metadata_norm(features, metadata, labels, granularity="channel", channel_dim=-1)
        moved = metadata_norm(features.movedim(-1, 1), metadata, labels, granularity="channel")
        torch.testing.assert_close(out, moved.movedim(1, -1))

    def test_ridge_equals_its_textbook_form(self):
        features, metadata, labels = make()
        penalty, n = 0.3, len(features)
        x = design_matrix(metadata, labels)
        x[:, :-1] = (x[:, :-1] - x[:, :-1].mean(0)) / x[:, :-1].std(0)
        shrink = np.diag([penalty] * 3 + [0.0] * 3)
        beta = np.linalg.solve(x.T @ x / n + shrink, x.T @ features.numpy() / n)
        out = metadata_norm(features, metadata, labels, ridge=penalty)
        np.testing.assert_allclose(out, features.numpy() - x[:, :3] @ beta[:3], atol=1e-10)


class TestRankDeficiency:
    @given(
        mixing=st.lists(st.floats(-3, 3), min_size=9, max_size=9),
        shift=st.lists(st.floats(-100, 100), min_size=3, max_size=3),
        with_labels=st.booleans(),
        given_gram=st.booleans(),
    )
    def test_invariant_under_affine_recoding_of_the_metadata(self, mixing, shift, with_labels, given_gram):
        recoding = torch.tensor(mixing, dtype=torch.float64).reshape(3, 3) + 4 * torch.eye(
            3, dtype=torch.float64
        )
        singular = torch.linalg.svdvals(recoding)
        if singular[-1] < 1e-2:
            return
        features, metadata, labels = make()
        labels = labels if with_labels else None
        recoded = metadata @ recoding + torch.tensor(shift, dtype=torch.float64)
        grams = [Gram.from_data(m, labels) if given_gram else None for m in (metadata, recoded)]
        out = metadata_norm(features, metadata, labels, grams[0])
        again = metadata_norm(features, recoded, labels, grams[1])
        # Rounding grows with the square of the condition number.
        tolerance = 1e-11 * float((singular[0] / singular[-1]) ** 2) + 1e-9
        torch.testing.assert_close(out, again, atol=tolerance, rtol=0)

    @pytest.mark.parametrize("with_labels", [False, True])
    def test_invariant_with_collinear_columns_too(self, with_labels):
        features, metadata, labels = make()
        labels = labels if with_labels else None
        redundant = torch.cat([metadata, metadata @ torch.randn(3, 4).double(), torch.ones(60, 1)], 1)
        expected = residual(features, metadata, labels)
        np.testing.assert_allclose(metadata_norm(features, redundant, labels), expected, atol=1e-9)

    def test_one_hot_labels_are_collinear_with_the_intercept(self):
        features, metadata, _ = make()
        classes = torch.arange(60) % 3
        one_hot = torch.nn.functional.one_hot(classes)
        out = metadata_norm(features, metadata, one_hot)
        np.testing.assert_allclose(out, residual(features, metadata, one_hot[:, :2]), atol=1e-10)

    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e9, -3.3e-7])
    def test_a_constant_column_changes_nothing(self, value):
        features, metadata, labels = make()
        constant = torch.full((60, 1), value, dtype=torch.float64)
        out = metadata_norm(features, torch.cat([metadata, constant], 1), labels)
        torch.testing.assert_close(out, metadata_norm(features, metadata, labels), atol=1e-10, rtol=0)
        torch.testing.assert_close(metadata_norm(features, constant), features)

    def test_metadata_that_the_labels_determine_are_not_removed(self):
        features, metadata, labels = make()
        determined = labels[:, :1] * 2 - 7
        torch.testing.assert_close(metadata_norm(features, determined, labels), features)
        # Beside other metadata: these keep their coefficients, but only for what is not along that direction.
        removed = features - metadata_norm(features, torch.cat([metadata, determined], 1), labels)
        beta = np.linalg.lstsq(design_matrix(metadata, labels), features.numpy(), rcond=None)[0][:3]
        rest = residual(metadata, determined) - metadata.mean(0).numpy()
        np.testing.assert_allclose(removed, rest @ beta, atol=1e-9)
        recoded = torch.cat([metadata + 3 * determined, determined], 1)
        torch.testing.assert_close(features - metadata_norm(features, recoded, labels), removed)

    @pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
    @pytest.mark.parametrize("center", [False, True])
    def test_fewer_samples_than_columns(self, n, center):
        features, metadata, labels = make()
        out = metadata_norm(features[:n], metadata[:n], labels[:n], center=center)
        assert out.shape == features[:n].shape
        assert torch.isfinite(out).all()
        if n <= 1 and not center:
            torch.testing.assert_close(out, features[:n])

    def test_without_labels_fewer_samples_than_columns_leave_the_mean(self):
        features, metadata, _ = make()
        out = metadata_norm(features[:3], metadata[:3])
        torch.testing.assert_close(out, features[:3].mean(0).expand(3, -1))

    def test_scales_far_apart(self):
        features, metadata, labels = make()
        scaled = metadata * torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)
        np.testing.assert_allclose(
            metadata_norm(features, scaled, labels), residual(features, metadata, labels), atol=1e-9
        )


class TestGradient:
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("given_gram", [False, True])
    def test_gradcheck(self, granularity, center, given_gram):
        features, metadata, labels = make(n=9, k_m=2, k_y=1, shape=(2, 3))
        gram = Gram.from_data(metadata[:7], labels[:7]) if given_gram else None

        def function(f):
            return metadata_norm(f, metadata, labels, gram, granularity=granularity, center=center)

        assert torch.autograd.gradcheck(function, features.requires_grad_())
        assert torch.autograd.gradgradcheck(function, features)

    def test_gradient_equals_that_of_the_textbook_form(self):
        features, metadata, _ = make(shape=(4,))
        weight = torch.randn(60, 4, dtype=torch.float64)
        features.requires_grad_()
        x = torch.cat([metadata, torch.ones(60, 1)], 1)
        beta = torch.linalg.solve(x.T @ x, x.T @ features)
        textbook = features - (metadata - metadata.mean(0)) @ beta[:3]
        (expected,) = torch.autograd.grad((textbook.tanh() * weight).sum(), features)
        (actual,) = torch.autograd.grad((metadata_norm(features, metadata).tanh() * weight).sum(), features)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)

    def test_saves_no_activation(self):
        saved = []
        features, metadata, labels = make(n=20, shape=(1000,))
        features.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            metadata_norm(features, metadata, labels)
        assert saved
        assert sum(saved) < 500

    def test_vmap_over_an_ensemble(self):
        features, metadata, labels = make()
        ensemble = torch.stack([features, 2 * features])
        out = torch.func.vmap(lambda f: metadata_norm(f, metadata, labels))(ensemble)
        torch.testing.assert_close(out[1], 2 * metadata_norm(features, metadata, labels))


class TestPrecision:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
    )
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    def test_low_precision_features(self, dtype, tolerance, granularity):
        features, metadata, labels = make(shape=(3, 4))
        low = features.to(dtype).requires_grad_()
        out = metadata_norm(low, metadata, labels, granularity=granularity)
        exact = metadata_norm(low.detach().double(), metadata, labels, granularity=granularity)
        assert out.dtype == dtype
        scale = exact.abs().max()
        assert (out.double() - exact).abs().max() / scale < tolerance
        out.sum().backward()
        assert low.grad.dtype == dtype

    def test_autocast_does_not_lower_the_statistics(self):
        features, metadata, labels = make(dtype=torch.float32)
        features.requires_grad_()
        expected = metadata_norm(features, metadata, labels)
        (gradient,) = torch.autograd.grad(expected.pow(2).sum(), features)
        with torch.autocast("cpu", torch.bfloat16):
            out = metadata_norm(features, metadata, labels)
            (under_autocast,) = torch.autograd.grad(out.pow(2).sum(), features)
        torch.testing.assert_close(out, expected, atol=0, rtol=0)
        torch.testing.assert_close(under_autocast, gradient, atol=0, rtol=0)


class TestGram:
    def test_matrix_is_the_mean_of_outer_products(self):
        _, metadata, labels = make()
        x = design_matrix(metadata, labels)
        np.testing.assert_allclose(Gram.from_data(metadata, labels).matrix, x.T @ x / 60, atol=1e-12)

    @given(cuts=st.lists(st.integers(0, 60), max_size=6), offset=st.sampled_from([0.0, 1e6]))
    def test_streaming_equals_one_pass(self, cuts, offset):
        _, metadata, labels = make()
        metadata = metadata + offset
        edges = [0, *sorted(cuts), 60]
        batches = [(metadata[a:b], labels[a:b]) for a, b in itertools.pairwise(edges)]
        streamed, whole = Gram.from_data(iter(batches)), Gram.from_data(metadata, labels)
        assert float(streamed.count) == 60
        torch.testing.assert_close(streamed.mean, whole.mean, rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(streamed.covariance, whole.covariance, rtol=1e-9, atol=1e-9)

    def test_dict_batches_and_plain_batches(self):
        _, metadata, labels = make()
        whole = Gram.from_data(metadata, labels)
        dicts = Gram.from_data(
            [
                {"metadata": metadata[:20], "labels": labels[:20]},
                {"metadata": metadata[20:], "labels": labels[20:]},
            ]
        )
        torch.testing.assert_close(dicts.covariance, whole.covariance)
        plain = Gram.from_data([metadata[:20], metadata[20:]])
        torch.testing.assert_close(plain.covariance, whole.covariance[:3, :3])

    def test_a_table_as_a_plain_list(self):
        assert float(Gram.from_data([1.0, 2.0, 6.0]).mean) == 3
        assert Gram.from_data([[1.0, 2.0], [3.0, 5.0]]).mean.tolist() == [2, 3.5]

    def test_one_mapping_or_named_pair_is_the_whole_set(self):
        _, metadata, labels = make()
        whole = Gram.from_data(metadata, labels)
        pair = collections.namedtuple("Pair", ["metadata", "labels"])(metadata, labels)
        batch = collections.UserDict(metadata=metadata, labels=labels)
        for data in (pair, batch, [batch], [pair]):
            gram = Gram.from_data(data)
            torch.testing.assert_close(gram.covariance, whole.covariance, rtol=0, atol=0)
            assert (gram.num_metadata, float(gram.count)) == (3, 60)

    def test_two_arrays_are_a_pair_where_labels_are_expected_and_batches_where_not(self):
        _, metadata, labels = make()
        whole = Gram.from_data(metadata, labels)
        pair = Gram.from_data((metadata, labels), num_labels=labels.shape[1])
        torch.testing.assert_close(pair.covariance, whole.covariance)
        batches = Gram.from_data([metadata[:30], metadata[30:]], num_labels=0)
        assert (batches.mean.shape[0], float(batches.count)) == (3, 60)
        assert float(Gram.from_data([metadata[:29], metadata[29:]]).count) == 60
        for data in ((metadata, labels), [metadata.numpy(), labels.numpy()], [metadata[:, 0], labels[:, 0]]):
            with pytest.raises(ValueError, match="may be metadata and labels or two batches"):
                Gram.from_data(data)

    def test_rows_in_a_list_are_not_taken_for_batches(self):
        rows = [np.array([30.0, 1.0]), np.array([40.0, 0.0]), np.array([50.0, 1.0])]
        for data in (rows, tuple(map(torch.from_numpy, rows))):
            with pytest.raises(ValueError, match="3 1-dimensional arrays of 2 values"):
                Gram.from_data(data)
        assert float(Gram.from_data(rows, num_metadata=1).count) == 6
        assert float(Gram.from_data([row[:1] for row in rows]).count) == 3
        assert float(Gram.from_data([rows[0], rows[1], rows[2][:1]]).count) == 5

    def test_a_mapping_without_metadata_names_its_keys(self):
        with pytest.raises(ValueError, match=r"keys \['age', 'labels'\]: metadata must be under 'metadata'"):
            Gram.from_data([{"age": torch.ones(2), "labels": torch.ones(2)}])

    def test_class_indices_are_no_ordinal_column_unless_asked_for(self):
        metadata = torch.randn(9, 1)
        classes = torch.arange(9) % 3
        with pytest.raises(ValueError, match=r"integers from 0 to 2 .* labels.float\(\)"):
            Gram.from_data(metadata, classes)
        with pytest.raises(ValueError, match="integers from 0 to 2"):
            metadata_norm(torch.randn(9, 2), metadata, classes.numpy())
        assert Gram.from_data(metadata, classes, num_labels=3).mean.shape == (4,)
        for labels in (classes.float(), classes.clamp_max(1), classes.bool(), 2 * classes.clamp_max(1) - 1):
            assert Gram.from_data(metadata, labels).mean.shape == (2,)
        assert Gram.from_data(metadata, classes, num_labels=1).mean.shape == (2,)

    @pytest.mark.parametrize("as_weight", [float, lambda weight: torch.tensor([weight]).double()])
    def test_what_weighs_nothing_may_be_nan(self, as_weight):
        _, metadata, labels = make()
        gram = Gram.from_data(metadata, labels)
        nan = Gram(gram.mean * math.nan, gram.covariance * math.nan, torch.zeros(1), gram.num_metadata)
        merged = gram.merge(nan)
        torch.testing.assert_close(merged.covariance, gram.covariance, rtol=0, atol=0)
        before = gram.covariance.clone()
        step, share = gram.merge_(nan, as_weight(0.0), 1.0)
        assert not step.any()
        assert float(share) == 0
        torch.testing.assert_close(gram.covariance, before, rtol=0, atol=0)
        assert float(gram.count) == 60

    def test_operator_rows_of_constant_columns_are_zero(self):
        metadata = torch.stack([torch.arange(9.0), torch.full((9,), 4.0)], 1)
        operator = coefficient_operator(Gram.from_data(metadata))
        assert operator[1].tolist() == [0, 0]
        assert operator[0, 0] == pytest.approx(1 / metadata[:, 0].var(correction=0).item())

    def test_errors(self):
        with pytest.raises(ValueError, match="no samples"):
            Gram.from_data([])
        with pytest.raises(ValueError, match="3 items"):
            Gram.from_data([(torch.ones(2), torch.ones(2), torch.ones(2))])
        with pytest.raises(ValueError, match="2 design columns, the batches before it had 1"):
            Gram.from_data([torch.ones(3), torch.ones(2, 2)])
        with pytest.raises(ValueError, match="labels come with each batch"):
            Gram.from_data([torch.ones(2)], torch.ones(2))


class TestBadInput:
    features = torch.randn(4, 2)

    @pytest.mark.parametrize(
        ("metadata", "labels", "message"),
        [
            (
                torch.tensor([1.0, float("nan"), 3, 4]),
                None,
                r"metadata has NaN.*column\(s\) \[0\], row\(s\) 1 ",
            ),
            (
                torch.ones(4),
                torch.tensor([1.0, 2, float("inf"), 4]),
                r"labels has NaN or infinite.*row\(s\) 2",
            ),
            (torch.ones(3), None, "metadata has 3 rows but there are 4 samples"),
            (torch.ones(4), torch.ones(5, 1), "labels has 5 rows but there are 4 samples"),
            (torch.ones(4, 1, 1), None, "metadata must have shape"),
            (torch.ones(4, 0), None, "no columns"),
        ],
    )
    def test_values_and_shapes(self, metadata, labels, message):
        with pytest.raises(ValueError, match=message):
            metadata_norm(self.features, metadata, labels)

    def test_types(self):
        with pytest.raises(TypeError, match=r"features must have a floating-point dtype, got torch\.int64"):
            metadata_norm(torch.ones(4, 2, dtype=torch.long), torch.ones(4))
        with pytest.raises(TypeError, match="metadata must be real"):
            metadata_norm(self.features, torch.ones(4, dtype=torch.complex64))
        with pytest.raises(TypeError, match="metadata must be real and numeric, got an array of dtype"):
            metadata_norm(self.features, np.array(["a", "b", "c", "d"]))

        with pytest.raises(TypeError, match="metadata must be a tensor or an array, got None"):
            metadata_norm(self.features, None)
        with pytest.raises(TypeError, match=r"features must be a torch\.Tensor, got list"):
            metadata_norm([[1.0, 2.0]], torch.ones(1))

    def test_device(self):
        with pytest.raises(
            ValueError, match=r"metadata is on meta but the features are on cpu.*metadata\.to"
        ):
            metadata_norm(self.features, torch.ones(4, device="meta"))

    def test_gram_of_another_design(self):
        gram = Gram.from_data(torch.randn(9, 2), torch.randn(9, 1))
        with pytest.raises(ValueError, match=r"metadata has 1 column\(s\) but num_metadata=2"):
            metadata_norm(self.features, torch.ones(4), torch.ones(4), gram)
        with pytest.raises(ValueError, match=r"gram was made with 1 label column\(s\), but labels is None"):
            metadata_norm(self.features, torch.ones(4, 2), None, gram)

    def test_granularity(self):
        with pytest.raises(ValueError, match="granularity must be"):
            position_dims(self.features, "pixel")
        with pytest.raises(ValueError, match="channel_dim=5"):
            position_dims(self.features, "channel", 5)
        with pytest.raises(ValueError, match="channel_dim=0"):
            position_dims(self.features, "channel", 0)
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            position_dims(torch.ones(3), "element")

    def test_class_index_out_of_range(self):
        with pytest.raises(ValueError, match="class index 3, but num_labels=3"):
            label_columns(torch.tensor([0, 3]), 3)
        with pytest.raises(ValueError, match="class index -1"):
            label_columns(torch.tensor([-1, 2]), 3)


def test_any_real_dtype_of_metadata_and_labels_counts_the_same():
    features = torch.randn(6, 2, dtype=torch.float64)
    values, flags = [3, 1, 4, 1, 5, 9], [True, False, True, True, False, False]
    expected = metadata_norm(features, torch.tensor(values).double(), torch.tensor(flags).double())
    for metadata in (torch.tensor(values), np.array(values, np.uint8), torch.tensor(values).half(), values):
        for labels in (torch.tensor(flags), np.array(flags), torch.tensor(flags).int()):
            torch.testing.assert_close(metadata_norm(features, metadata, labels), expected)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(6.0)[::-1],
        np.broadcast_to(np.float32(2), 6),
        np.arange(6, dtype=">f8"),
        np.arange(12.0)[::2],
    ],
)
def test_arrays_that_tensors_cannot_share(values):
    features = torch.randn(6, 2, dtype=torch.float64)
    expected = metadata_norm(features, torch.tensor(values.tolist()))
    torch.testing.assert_close(metadata_norm(features, values), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_any_scale_of_metadata_and_features(scale):
    features, metadata, labels = make()
    expected = metadata_norm(features, metadata, labels)
    torch.testing.assert_close(metadata_norm(features, metadata * scale, labels), expected)
    torch.testing.assert_close(metadata_norm(features * scale, metadata, labels) / scale, expected)


def test_class_indices_become_one_hot():
    indices = torch.tensor([2, 0, 1, 2])
    assert label_columns(indices, 3).int().tolist() == torch.nn.functional.one_hot(indices).tolist()
    assert label_columns(indices[:, None], 3).shape == (4, 3)
    assert label_columns(indices, 1) is indices
    columns, width = design_columns(torch.randn(4, 2), indices, num_labels=3)
    assert (columns.shape, width) == ((4, 5), 2)


def test_remove_effect_passes_the_gradient_unchanged():
    features = torch.randn(5, 3, 2, requires_grad=True)
    out = remove_effect(features, torch.randn(5, 2), torch.randn(2, 3), positions=(2,))
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), features)
    assert torch.equal(gradient, weight)


def test_ridge_as_a_tensor():
    _, metadata, labels = make()
    gram = Gram.from_data(metadata, labels)
    penalty = torch.tensor([0.3], dtype=torch.float64)
    torch.testing.assert_close(coefficient_operator(gram, penalty), coefficient_operator(gram, 0.3))


class TestRunningMoments:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_feature_moments(self, shape, dtype):
        features, metadata, labels = make(shape=shape, dtype=dtype)
        columns = torch.cat([metadata, labels], 1)
        rows = moment_rows(columns, columns.mean(0))
        for positions in ((), tuple(range(2, len(shape) + 1))):
            if positions == () and len(shape) > 1:
                flat = features.double().flatten(1)
            else:
                flat = features.double().flatten(2).mean(2) if positions else features.double()
            moments = feature_moments(features.requires_grad_(), rows, positions)
            centred = (columns - columns.mean(0)).numpy()
            expected = np.vstack([centred.T @ flat.detach().numpy() / 60, flat.detach().numpy().mean(0)])
            assert not moments.requires_grad
            assert moments.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(moments, expected, atol=tolerance)

    def test_feature_moments_under_autocast(self):
        features, metadata, _ = make(dtype=torch.float32)
        rows = moment_rows(metadata, metadata.mean(0))
        with torch.autocast("cpu", torch.bfloat16):
            moments = feature_moments(features, rows)
        assert torch.equal(moments, feature_moments(features, rows))

    @given(
        cuts=st.lists(st.integers(0, 60), max_size=5),
        decay=st.floats(0.0, 1.0),
        offset=st.sampled_from([0.0, 1e4]),
        seed=st.integers(0, 100),
    )
    def test_merged_cross_moments_are_weighted_moments(self, cuts, decay, offset, seed):
        features, metadata, labels = make(seed=seed)
        columns = torch.cat([metadata + offset, labels], 1)
        gram = Gram(torch.zeros(5).double(), torch.zeros(5, 5).double(), torch.zeros(1).double(), 3)
        cross, mean = torch.zeros(5, 7).double(), torch.zeros(7).double()
        weights, used = np.zeros(0), 0
        for a, b in itertools.pairwise([0, *sorted(cuts), 60]):
            part = slice(a, b)
            batch = Gram.from_columns(columns[part], 3)
            moments = feature_moments(features[part], moment_rows(columns[part], batch.mean))
            merged = gram.merge(batch, decay)
            share = batch.count / merged.count.clamp_min(1e-30)
            merge_cross_moments_(cross, mean, moments, batch.mean - gram.mean, share)
            gram, used = merged, b
            weights = np.concatenate([weights * decay, np.ones(b - a)])
        if weights.sum() < 1e-9:  # all forgotten by an empty batch
            return
        x, f = columns[:used].numpy(), features[:used].numpy()
        mean_x, mean_f = (np.average(v, axis=0, weights=weights) for v in (x, f))
        expected = ((x - mean_x) * weights[:, None]).T @ (f - mean_f) / weights.sum()
        np.testing.assert_allclose(mean, mean_f, atol=1e-10)
        # Subtracting means of 10⁴ costs four digits.
        np.testing.assert_allclose(cross, expected, atol=1e-10 if offset == 0 else 1e-7)
        np.testing.assert_allclose(gram.mean, mean_x, rtol=1e-12, atol=1e-10)


class TestRunningRegression:
    def call(self, features, positions=(), *, adjoint=None, weight=0.0, count=8.0, decay=0.9):
        n, d = features.shape[0], features.shape[1] if positions else features[0].numel()
        generator = torch.Generator().manual_seed(7)
        options = {"generator": generator, "dtype": torch.float64}
        basis, beta = torch.randn(n, 2, **options), torch.randn(2, d, **options)
        projector = torch.randn(2, n, **options) / n
        adjoint = torch.zeros(2, d, dtype=torch.float64) if adjoint is None else adjoint
        state = adjoint, torch.tensor([weight], dtype=torch.float64)
        out = remove_running_regression(
            features,
            basis,
            beta,
            projector,
            *state,
            count=torch.tensor([count], dtype=torch.float64),
            decay=torch.tensor([decay], dtype=torch.float64),
            positions=positions,
        )
        return out, basis, beta, projector, state

    @pytest.mark.parametrize("positions", [(), (2,)])
    def test_forward_and_backward_in_numpy(self, positions):
        features = torch.randn(8, 3, 4, dtype=torch.float64, requires_grad=True)
        d = 3 if positions else 12
        old = torch.randn(2, d, dtype=torch.float64)
        out, basis, beta, projector, state = self.call(features, positions, adjoint=old.clone(), weight=40.0)
        effect = basis.numpy() @ beta.numpy()
        effect = effect[:, :, None] if positions else effect.reshape(8, 3, 4)
        np.testing.assert_allclose(out.detach(), features.detach().numpy() - effect, atol=1e-12)
        assert torch.equal(state[0], old)

        gradient = torch.randn(8, 3, 4, dtype=torch.float64)
        out.backward(gradient)
        g = gradient.numpy()
        summed = g.sum(2) if positions else g.reshape(8, 12)
        weight = 40 * 0.9 + 8
        adjoint = old.numpy() + (basis.numpy().T @ summed - old.numpy()) * 8 / weight
        np.testing.assert_allclose(state[0], adjoint, atol=1e-12)
        assert float(state[1]) == pytest.approx(weight)
        shared = projector.numpy().T @ adjoint
        expected = g - (shared[:, :, None] / 4 if positions else shared.reshape(8, 3, 4))
        np.testing.assert_allclose(features.grad, expected, atol=1e-12)

    def test_without_history_the_gradient_is_that_of_the_regression(self):
        """g − Pᵀ Bᵀ g: what `remove_regression` computes from one batch."""
        features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        out, basis, _, projector, _ = self.call(features)
        weight = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, features, weight)
        expected = torch.autograd.functional.vjp(
            lambda f: f - basis @ (projector @ f), features.detach(), weight
        )[1]
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_an_overflowed_gradient_leaves_the_state(self, bad):
        features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        old = torch.randn(2, 3, dtype=torch.float64)
        out, *_, state = self.call(features, adjoint=old.clone(), weight=40.0)
        gradient = torch.ones_like(out)
        gradient[1, 2] = bad
        out.backward(gradient)
        assert torch.equal(state[0], old)
        assert float(state[1]) == 40
        assert not torch.isfinite(features.grad).all()

    def test_saves_no_activation(self):
        saved = []
        features = torch.randn(8, 1000, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            self.call(features)
        assert saved
        assert max(saved) < 100

    def test_can_be_differentiated_once(self):
        features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        out, *_ = self.call(features)
        (first,) = torch.autograd.grad(out.pow(3).sum(), features, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()

    def test_dtype_follows_the_features(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            features = torch.randn(8, 3).to(dtype).requires_grad_()
            out, *_, state = self.call(features)
            out.float().sum().backward()
            assert out.dtype == features.grad.dtype == dtype
            assert state[0].dtype == torch.float64
            assert state[0].any()


class TestRescale:
    @pytest.mark.parametrize("positions", [(), (2,)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_equals_numpy(self, positions, dtype):
        features = torch.randn(6, 3, 4).to(dtype)
        d = 3 if positions else 12
        basis, effect, mean = torch.randn(6, 2).double(), torch.randn(2, d).double(), torch.randn(d).double()
        out = rescale(features, basis, effect, mean, positions)
        factor = np.exp(-0.5 * basis.numpy() @ effect.numpy())
        factor = factor[:, :, None] if positions else factor.reshape(6, 3, 4)
        centre = mean.numpy()[:, None] if positions else mean.numpy().reshape(3, 4)
        expected = centre + (features.double().numpy() - centre) * factor
        assert out.dtype == dtype
        np.testing.assert_allclose(
            out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * np.abs(expected).max()
        )

    def test_no_effect_changes_nothing(self):
        features = torch.randn(6, 3)
        assert torch.equal(rescale(features, torch.randn(6, 2), torch.zeros(2, 3), torch.randn(3)), features)

    def test_a_wild_effect_does_not_overflow(self):
        features, basis = torch.randn(6, 3), torch.full((6, 1), 1e6)
        for sign in (1, -1):
            out = rescale(features, basis, torch.full((1, 3), sign * 1e6), torch.zeros(3))
            torch.testing.assert_close(out, features * float(np.exp(-sign * 15)))

    def test_gradient(self):
        features = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
        basis, effect, mean = (
            torch.randn(4, 1).double(),
            torch.randn(1, 2).double(),
            torch.randn(2).double(),
        )
        assert torch.autograd.gradcheck(lambda f: rescale(f, basis, effect, mean, (2,)), features)


class TestWellConditionedDesigns:
    """One inverse instead of three eigendecompositions, where nothing has to be dropped."""

    @staticmethod
    def both(gram, ridge, monkeypatch):
        fast = coefficient_operator(gram, ridge)
        with monkeypatch.context() as patch:
            patch.setattr(coefficients, "can_read", lambda tensor: False)
            return fast, coefficient_operator(gram, ridge)

    @pytest.mark.parametrize("ridge", [0.0, 0.3])
    @pytest.mark.parametrize("k_y", [0, 1, 3])
    def test_same_as_by_eigenvectors(self, k_y, ridge, monkeypatch):
        _, metadata, labels = make(k_m=4, k_y=max(k_y, 1))
        gram = Gram.from_data(metadata * 10.0 ** torch.arange(4), labels[:, :k_y] if k_y else None)
        fast, slow = self.both(gram, ridge, monkeypatch)
        unit = gram.covariance.diagonal().sqrt()
        scale = torch.outer(unit, unit)
        torch.testing.assert_close(fast * scale, slow * scale, atol=1e-11, rtol=0)
        if not ridge:
            expected = np.linalg.inv(gram.covariance.numpy() / scale.numpy())
            np.testing.assert_allclose(fast * scale, expected, atol=1e-11)

    @pytest.mark.parametrize("case", ["constant", "collinear", "label twice", "nearly collinear"])
    def test_others_take_the_eigenvectors(self, case, monkeypatch):
        _, metadata, labels = make(k_m=3, k_y=2)
        if case == "constant":
            metadata[:, 1] = 7
        elif case == "collinear":
            metadata[:, 1] = metadata[:, 0] - 2 * metadata[:, 2]
        elif case == "label twice":
            labels[:, 1] = labels[:, 0]
        else:
            metadata[:, 1] = metadata[:, 0] + 1e-4 * metadata[:, 1]
        gram = Gram.from_data(metadata, labels)
        assert coefficients._well_conditioned_inverse(gram, 0.0) is None
        fast, slow = self.both(gram, 0.0, monkeypatch)
        assert torch.equal(fast, slow)


def test_merging_in_place_is_merging():
    _, metadata, labels = make()
    first, second = Gram.from_data(metadata[:25], labels[:25]), Gram.from_data(metadata[25:], labels[25:])
    expected = first.merge(second, 0.7)
    for weight, decay in ((float(second.count), 0.7), (second.count, torch.tensor([0.7]).double())):
        gram = Gram(first.mean.clone(), first.covariance.clone(), first.count.clone(), first.num_metadata)
        step, share = gram.merge_(second, weight, decay)
        torch.testing.assert_close(gram.mean, expected.mean)
        torch.testing.assert_close(gram.covariance, expected.covariance)
        torch.testing.assert_close(gram.count, expected.count)
        torch.testing.assert_close(step, second.mean - first.mean)
        assert float(share) == pytest.approx(float(second.count / expected.count))


def test_projected_rows_are_the_operator_times_the_rows():
    _, metadata, labels = make()
    columns = torch.cat([metadata, labels], 1)
    gram = Gram.from_columns(columns, metadata.shape[1])
    for center in (False, True):
        operator = functional.removal_operator(gram, center=center)
        for count in (None, torch.tensor([90.0]).double()):
            expected = operator @ moment_rows(columns, gram.mean, count)
            actual = functional.projected_rows(operator, columns, gram.mean, count)
            torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-12)


def test_in_vmap_with_design_and_features():
    """Nothing is read inside a transform, by either form of the function."""
    features, metadata, labels = make(shape=(4,))
    stacked = torch.stack([features, features.flip(0)]), torch.stack([metadata, metadata.roll(3, 0)])
    out = torch.func.vmap(lambda f, m: metadata_norm(f, m, labels, check_finite=False))(*stacked)
    for one, f, m in zip(out, *stacked, strict=True):
        torch.testing.assert_close(one, metadata_norm(f, m, labels), atol=1e-10, rtol=0)
