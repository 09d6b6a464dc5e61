import math

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdnorm import metadata_norm
from mdnorm.regression import (
    Memory,
    Standardisation,
    advance,
    coefficient_operator,
    is_eager,
    position_dims,
    regress,
    remove,
)
from reference import design_matrix, residual, weighted_least_squares

SHAPES = [(7,), (3, 5), (2, 4, 3), (2, 2, 3, 2)]
PADDED = {
    "(N, T, D)": ((5, 4), -1),
    "(N, C, L)": ((4, 5), 1),
    "(N, C, H, W)": ((4, 3, 2), 1),
    "(N, H, W, C)": ((3, 2, 4), -1),
}


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


def padded(kind, n=12, seed=0):
    """Features, metadata, labels, and a mask with samples of every length, one of them empty and one full."""
    shape, channel_dim = PADDED[kind]
    features, metadata, labels = make(n, 2, 1, shape, seed=seed)
    positions = shape[:-1] if channel_dim == -1 else shape[1:]
    mask = torch.rand(n, *positions, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0], mask[1] = False, True
    return features, metadata, labels, mask, channel_dim


def tokens(features, mask, channel_dim):
    """The rows (values of all channels) at the true positions, and the sample of each."""
    return features.movedim(channel_dim, -1)[mask], mask.nonzero()[:, 0]


def moments(metadata, labels=None, weights=None):
    """Rows z = [y, 1, m] in units of their deviations, and their mean product."""
    blocks = [torch.ones(len(metadata), 1).double(), metadata.double()]
    columns = torch.cat([labels.double(), *blocks] if labels is not None else blocks, 1)
    num_labels = 0 if labels is None else labels.shape[1]
    units = Standardisation.of(columns, num_labels, weights)
    rows = (columns - units.origin) * units.scale
    weights = torch.ones(len(rows)).double() if weights is None else weights
    return rows, rows.mT * weights @ rows / weights.sum(), num_labels + 1


class TestLeastSquares:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("with_labels", [False, True])
    def test_equals_lstsq(self, shape, with_labels):
        features, metadata, labels = make(shape=shape)
        labels = labels if with_labels else None
        out = metadata_norm(features, metadata, labels)
        np.testing.assert_allclose(out, residual(features, metadata, labels), atol=1e-10, rtol=0)

    @given(
        n=st.integers(12, 80),
        k_m=st.integers(1, 5),
        k_y=st.integers(0, 4),
        d=st.integers(1, 9),
        offset=st.sampled_from([0.0, 1.0, 1e3, -1e5]),
        prior=st.sampled_from([0.0, 1.0, 30.0]),
        seed=st.integers(0, 10_000),
    )
    def test_against_lstsq_over_shapes(self, n, k_m, k_y, d, offset, prior, seed):
        features, metadata, labels = make(n, k_m, k_y, (d,), seed=seed)
        labels = labels if k_y else None
        out = metadata_norm(features, metadata + offset, labels, prior=prior)
        expected = residual(features, metadata, labels, share=prior / (prior + n))
        np.testing.assert_allclose(out, expected, atol=1e-9 * max(1, abs(offset) / 1e3), rtol=0)

    @given(
        spare=st.integers(-8, 5),
        k_m=st.integers(1, 5),
        k_y=st.integers(0, 3),
        prior=st.sampled_from([1e-6, 1e-3, 1.0, 10.0]),
        log_scale=st.integers(-8, 8),
        offset=st.sampled_from([0.0, 1.0, 1e4]),
        kind=st.sampled_from(
            ["normal", "all levels", "twice", "constant", "determined", "nearly determined"]
        ),
        seed=st.integers(0, 10_000),
    )
    def test_with_a_prior_it_is_ridge_regression_at_every_size_and_rank(
        self, spare, k_m, k_y, prior, log_scale, offset, kind, seed
    ):
        n = max(1, k_m + k_y + spare)
        features, metadata, labels = make(n, k_m, k_y, (3,), seed=seed)
        if kind == "all levels":
            metadata = torch.nn.functional.one_hot(torch.arange(n) * 7 % 5 % (k_m + 1), k_m + 1).double()
        elif kind == "twice":
            metadata = torch.cat([metadata, metadata @ torch.ones(k_m, 2).double()], 1)
        elif kind == "constant":
            metadata[:, 0] = 3
        elif k_y and kind.endswith("determined"):
            metadata[:, 0] = labels[:, -1] + (1e-4 * metadata[:, 0] if kind.startswith("nearly") else 0)
        labels = labels if k_y else None
        share = prior / (prior + n)
        out = metadata_norm(features, (metadata + offset) * 10.0**log_scale, labels, prior=prior)
        expected = residual(features, metadata, labels, share=share)
        # Rounding and the tiny prior of the labels are magnified where labels and prior leave little.
        protected = design_matrix(np.zeros((n, 0)), labels)
        protected[:, :-1] -= protected[:, :-1].mean(0)
        values = (
            np.linalg.svd(protected / np.sqrt(np.maximum((protected**2).sum(0), 1e-30)), compute_uv=False)
            ** 2
        )
        size = max(float(features.abs().max()), np.abs(expected).max()) * max(1.0, offset / 10)
        tolerance = 1e-11 * size * (4 + 1 / share) / values[values > 1e-12].min()
        np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)

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
        expected = residual(rows, np.repeat(metadata.numpy(), 20, 0), np.repeat(labels.numpy(), 20, 0))
        np.testing.assert_allclose(out.permute(0, 2, 3, 1).reshape(-1, 3), expected, atol=1e-10)

    def test_tokens_have_their_channels_last(self):
        features, metadata, labels = make(shape=(6, 4))
        out = metadata_norm(features, metadata, labels, granularity="channel", channel_dim=-1)
        moved = metadata_norm(features.movedim(-1, 1), metadata, labels, granularity="channel")
        torch.testing.assert_close(out, moved.movedim(1, -1))


class TestWeights:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("with_labels", [False, True])
    def test_equals_weighted_least_squares_of_statsmodels(self, shape, with_labels):
        features, metadata, labels = make(shape=shape)
        labels = labels if with_labels else None
        weights = torch.rand(60).double() * 3
        out = metadata_norm(features, metadata, labels, weights=weights)
        design = design_matrix(metadata, labels)
        columns = features.flatten(1).numpy().T
        slopes = np.stack([sm.WLS(column, design, weights.numpy()).fit().params[:3] for column in columns], 1)
        effect = (metadata.numpy() - np.average(metadata, 0, weights)) @ slopes
        np.testing.assert_allclose(out, features.numpy() - effect.reshape(features.shape), atol=1e-10, rtol=0)

    @pytest.mark.parametrize("prior", [0.0, 1.0])
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    def test_zero_is_a_row_left_out_and_two_a_row_twice(self, prior, granularity):
        features, metadata, labels = make(shape=(3, 4))
        weights = torch.arange(60) % 3
        rows = torch.arange(60).repeat_interleave(weights)
        last = torch.tensor([list(rows).index(i) for i in range(60) if weights[i]])
        options = {"prior": prior, "granularity": granularity}
        gradients = []
        for index, weight in ((slice(None), weights), (rows, None)):
            leaf = features.clone().requires_grad_()
            out = metadata_norm(leaf[index], metadata[index], labels[index], weights=weight, **options)
            kept = out[weights > 0] if weight is not None else out[last]
            kept.pow(3).sum().backward()
            gradients.append((kept.detach(), leaf.grad))
        torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)
        # What is left out of the fit is corrected all the same.
        left = metadata_norm(features, metadata, labels, weights=weights, **options)[weights == 0]
        assert (left - features[weights == 0]).abs().max() > 1

    @pytest.mark.parametrize("prior", [0.0, 2.0])
    def test_gradient_is_that_of_an_explicit_weighted_regression(self, prior):
        features, metadata, labels = make(shape=(4,))
        weights = torch.rand(60).double() * (torch.arange(60) % 4)
        probe = torch.randn(60, 4, dtype=torch.float64)
        design = torch.cat([metadata - metadata.mean(0), labels, torch.ones(60, 1)], 1)
        gram = design.T * weights @ design
        mean = weights @ metadata / weights.sum()
        variance = weights @ (metadata - mean).square()
        penalty = torch.cat([variance * prior / (prior + weights.sum()), torch.zeros(3)]).diag()
        leaf = features.clone().requires_grad_()
        beta = torch.linalg.solve(gram + penalty, design.T * weights @ leaf)
        explicit = leaf - (metadata - mean) @ beta[:3]
        (expected,) = torch.autograd.grad((explicit.tanh() * probe).sum(), leaf)
        out = metadata_norm(leaf, metadata, labels, weights=weights, prior=prior)
        (actual,) = torch.autograd.grad((out.tanh() * probe).sum(), leaf)
        torch.testing.assert_close(out, explicit, atol=1e-10, rtol=0)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)

    def test_a_common_factor_changes_nothing_without_a_prior(self):
        features, metadata, labels = make()
        weights = torch.rand(60).double()
        expected = metadata_norm(features, metadata, labels, weights=weights)
        for factor in (1e-20, 1e20):
            out = metadata_norm(features, metadata, labels, weights=factor * weights)
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)

    @pytest.mark.parametrize("kind", ["list", "column", "bool", "integers", "half"])
    def test_any_array(self, kind):
        features, metadata, labels = make()
        weights = torch.arange(60) % 2
        made = {
            "list": weights.tolist(),
            "column": weights[:, None],
            "bool": weights.numpy() == 1,
            "integers": weights.numpy().astype(np.uint16),
            "half": weights.half(),
        }
        expected = metadata_norm(features, metadata, labels, weights=weights.double())
        assert torch.equal(metadata_norm(features, metadata, labels, weights=made[kind]), expected)

    @pytest.mark.parametrize("prior", [0.0, 1.0])
    def test_without_any_weight_nothing_changes(self, prior):
        features, metadata, labels = make()
        out = metadata_norm(features, metadata, labels, weights=torch.zeros(60), prior=prior)
        assert torch.equal(out, features)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (torch.tensor([1.0, -1, 1, -2]), r"weights must be finite and not negative: row\(s\) \[1, 3\]"),
            (torch.tensor([1.0, 1, math.nan, 1]), r"weights must be finite and not negative: row\(s\) \[2\]"),
            (torch.tensor([math.inf, 1, 1, 1]), r"weights must be finite and not negative: row\(s\) \[0\]"),
            (torch.ones(3), "weights has 3 rows but there are 4 samples"),
            (torch.ones(4, 2), r"weights must have shape \(num_samples,\), got \(4, 2\)"),
        ],
    )
    def test_errors(self, weights, message):
        with pytest.raises(ValueError, match=message):
            metadata_norm(torch.randn(4, 2), torch.randn(4), weights=weights)


@pytest.mark.parametrize("kind", PADDED)
class TestMask:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_equals_least_squares_over_the_true_positions(self, kind, weighted):
        features, metadata, labels, mask, channel_dim = padded(kind)
        weights = torch.rand(12).double() + 0.1 if weighted else torch.ones(12).double()
        out = metadata_norm(
            features,
            metadata,
            labels,
            mask=mask,
            weights=weights if weighted else None,
            granularity="channel",
            channel_dim=channel_dim,
        )
        values, sample = tokens(features, mask, channel_dim)
        expected = residual(values, metadata[sample], labels[sample], weights=weights[sample])
        np.testing.assert_allclose(tokens(out, mask, channel_dim)[0], expected, atol=1e-10, rtol=0)
        assert torch.equal(tokens(out, ~mask, channel_dim)[0], tokens(features, ~mask, channel_dim)[0])

    @pytest.mark.parametrize("padding", [1e6, math.inf, math.nan])
    def test_what_stands_in_the_padding_has_no_influence(self, kind, padding):
        features, metadata, labels, mask, channel_dim = padded(kind)
        options = {"mask": mask, "granularity": "channel", "channel_dim": channel_dim}
        results = []
        for value in (0.0, padding):
            filled = features.movedim(channel_dim, -1).clone()
            filled[~mask] = value
            filled = filled.movedim(-1, channel_dim).requires_grad_()
            out = metadata_norm(filled, metadata, labels, **options)
            kept = tokens(out, mask, channel_dim)[0]
            kept.pow(2).sum().backward()
            results.append((kept.detach(), filled.grad))
            np.testing.assert_array_equal(tokens(out.detach(), ~mask, channel_dim)[0], value)
        torch.testing.assert_close(*results, atol=0, rtol=0)

    @pytest.mark.parametrize("prior", [0.0, 1.0])
    def test_gradcheck(self, kind, prior):
        features, metadata, labels, mask, channel_dim = padded(kind, n=6)

        def function(f):
            return metadata_norm(
                f, metadata, labels, mask=mask, prior=prior, granularity="channel", channel_dim=channel_dim
            )

        assert torch.autograd.gradcheck(function, features.requires_grad_())
        assert torch.autograd.gradgradcheck(function, features)

    def test_gradients_at_the_padding_pass_unchanged(self, kind):
        features, metadata, labels, mask, channel_dim = padded(kind)
        features.requires_grad_()
        out = metadata_norm(
            features, metadata, labels, mask=mask, granularity="channel", channel_dim=channel_dim
        )
        probe = torch.randn_like(out)
        gradients = []
        for factor in (1.0, 1e9):
            change = torch.where(mask, 1.0, factor).double().unsqueeze(channel_dim)
            gradients.append(torch.autograd.grad(out, features, probe * change, retain_graph=True)[0])
        at_padding = tokens(gradients[1], ~mask, channel_dim)[0]
        assert torch.equal(at_padding, tokens(1e9 * probe, ~mask, channel_dim)[0])
        assert torch.equal(
            tokens(gradients[0], mask, channel_dim)[0], tokens(gradients[1], mask, channel_dim)[0]
        )

    def test_integers_and_arrays_are_masks_as_well(self, kind):
        features, metadata, labels, mask, channel_dim = padded(kind)
        options = {"granularity": "channel", "channel_dim": channel_dim}
        expected = metadata_norm(features, metadata, labels, mask=mask, **options)
        for other in (mask.long(), mask.numpy(), mask.double(), mask.tolist()):
            assert torch.equal(metadata_norm(features, metadata, labels, mask=other, **options), expected)

    def test_all_true_is_no_mask_and_all_false_changes_nothing(self, kind):
        features, metadata, labels, mask, channel_dim = padded(kind)
        options = {"granularity": "channel", "channel_dim": channel_dim}
        out = metadata_norm(features, metadata, labels, mask=torch.ones_like(mask), **options)
        torch.testing.assert_close(
            out, metadata_norm(features, metadata, labels, **options), atol=1e-12, rtol=0
        )
        out = metadata_norm(features, metadata, labels, mask=torch.zeros_like(mask), **options)
        assert torch.equal(out, features)

    def test_errors(self, kind):
        features, metadata, labels, mask, channel_dim = padded(kind)
        options = {"granularity": "channel", "channel_dim": channel_dim}
        for wrong in (
            mask[1:],
            mask.flatten(1)[:, 1:],
            mask.unsqueeze(-1),
            mask.flatten(),
            torch.ones(features.shape),
        ):
            with pytest.raises(
                ValueError, match=r"mask must have shape \(12, .*\), samples and positions, got"
            ):
                metadata_norm(features, metadata, labels, mask=wrong, **options)
        with pytest.raises(ValueError, match="needs granularity='channel' and features with positions"):
            metadata_norm(features, metadata, labels, mask=mask)
        with pytest.raises(ValueError, match="needs granularity='channel' and features with positions"):
            metadata_norm(features.flatten(1), metadata, labels, mask=mask, granularity="channel")
        with pytest.raises(ValueError, match="mask is on meta but the features are on cpu"):
            metadata_norm(features, metadata, labels, mask=mask.to("meta"), **options)


class TestRankDeficiency:
    @given(
        mixing=st.lists(st.floats(-3, 3), min_size=9, max_size=9),
        shift=st.lists(st.floats(-100, 100), min_size=3, max_size=3),
        with_labels=st.booleans(),
    )
    def test_invariant_under_affine_recoding_of_the_metadata(self, mixing, shift, with_labels):
        recoding = torch.tensor(mixing, dtype=torch.float64).reshape(3, 3) + 4 * torch.eye(
            3, dtype=torch.float64
        )
        singular = torch.linalg.svdvals(recoding)
        if singular[-1] < 1e-2:
            return
        features, metadata, labels = make()
        labels = labels if with_labels else None
        recoded = metadata @ recoding + torch.tensor(shift, dtype=torch.float64)
        out, again = metadata_norm(features, metadata, labels), metadata_norm(features, recoded, labels)
        # Rounding grows with the square of the condition number.
        tolerance = 1e-11 * float((singular[0] / singular[-1]) ** 2) + 1e-9
        torch.testing.assert_close(out, again, atol=tolerance, rtol=0)

    @pytest.mark.parametrize("with_labels", [False, True])
    def test_collinear_columns_change_nothing(self, with_labels):
        features, metadata, labels = make()
        labels = labels if with_labels else None
        redundant = torch.cat([metadata, metadata @ torch.randn(3, 4).double(), torch.ones(60, 1)], 1)
        expected = residual(features, metadata, labels)
        np.testing.assert_allclose(metadata_norm(features, redundant, labels), expected, atol=1e-9)

    def test_one_hot_labels_are_collinear_with_the_intercept(self):
        features, metadata, _ = make()
        one_hot = torch.nn.functional.one_hot(torch.arange(60) % 3)
        out = metadata_norm(features, metadata, one_hot)
        np.testing.assert_allclose(out, residual(features, metadata, one_hot[:, :2]), atol=1e-10)

    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e9, -3.3e-7])
    @pytest.mark.parametrize("prior", [0.0, 1.0])
    def test_a_constant_column_changes_nothing(self, value, prior):
        features, metadata, labels = make()
        constant = torch.full((60, 1), value, dtype=torch.float64)
        out = metadata_norm(features, torch.cat([metadata, constant], 1), labels, prior=prior)
        torch.testing.assert_close(
            out, metadata_norm(features, metadata, labels, prior=prior), atol=1e-10, rtol=0
        )
        torch.testing.assert_close(metadata_norm(features, constant, prior=prior), features)

    def test_metadata_that_the_labels_determine_are_not_removed(self):
        features, metadata, labels = make()
        determined = labels[:, :1] * 2 - 7
        torch.testing.assert_close(metadata_norm(features, determined, labels), features)
        # The other columns keep their coefficients.
        out = metadata_norm(features, torch.cat([metadata, determined], 1), labels)
        np.testing.assert_allclose(out, residual(features, metadata, labels), atol=1e-9)

    @pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
    def test_fewer_samples_than_columns(self, n):
        features, metadata, labels = make()
        out = metadata_norm(features[:n], metadata[:n], labels[:n])
        assert out.shape == features[:n].shape
        assert torch.isfinite(out).all()
        if n <= 1:
            assert torch.equal(out, features[:n])

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


class TestCoefficientOperator:
    @pytest.mark.parametrize("share", [0.0, 0.03, torch.tensor([0.03], dtype=torch.float64)])
    @pytest.mark.parametrize("every", [False, True])
    @pytest.mark.parametrize("with_labels", [False, True])
    def test_takes_cross_moments_to_coefficients(self, share, every, with_labels):
        features, metadata, labels = make()
        labels = labels if with_labels else None
        rows, gram, p = moments(metadata, labels)
        operator = coefficient_operator(gram, p, share, every=every)
        assert operator.shape == (len(gram) if every else 3, len(gram))
        coefficients = operator @ (rows.mT @ features / 60)
        expected = weighted_least_squares(features, rows[:, p:], rows[:, : p - 1], np.ones(60), float(share))
        expected = np.vstack([expected[3:], expected[:3]])
        np.testing.assert_allclose(coefficients, expected if every else expected[p:], atol=1e-12)

    def test_of_a_constant_column_is_zero(self):
        metadata = torch.stack([torch.arange(9.0), torch.full((9,), 4.0)], 1)
        _, gram, p = moments(metadata)
        for share in (0.0, 0.1):
            operator = coefficient_operator(gram, p, share)
            np.testing.assert_allclose(operator[1], 0, atol=1e-25)
            np.testing.assert_allclose(operator[:, 2], 0, atol=1e-25)
            assert operator[0, 1] == pytest.approx(1 / (1 + share))

    @given(
        values=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6),
        n=st.integers(1, 6),
        share=st.sampled_from([0.0, 1e-12, 1e-3, 0.5]),
    )
    def test_columns_that_are_constant_away_from_the_origin(self, values, n, share):
        """As in a batch of one sample: what rounding leaves of their variance is no variance."""
        rows = torch.cat([torch.ones(n, 1), torch.tensor(values).expand(n, -1)], 1).double()
        operator = coefficient_operator(rows.mT @ rows / n, 1, share)
        assert (operator @ rows.mT).abs().max() < 1e-9

    @pytest.mark.parametrize(("dtype", "left"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
    def test_what_rounding_could_have_made_counts_as_collinear(self, dtype, left):
        """Of the second column the first leaves a variance above, or below, what is resolved."""
        _, metadata, _ = make(k_m=1)
        noise = torch.randn(60, 1, dtype=torch.float64)
        for variance, is_resolved in ((left, True), (left * 1e-4, False)):
            _, gram, p = moments(torch.cat([metadata, metadata + math.sqrt(variance) * noise], 1))
            size = float(coefficient_operator(gram, p, dtype=dtype).abs().max())
            assert (size > 0.05 / variance) == is_resolved
            assert size < 30 / variance if is_resolved else size < 1

    def test_labels_of_one_value_do_no_harm(self):
        features, metadata, labels = make()
        rows, gram, p = moments(metadata, torch.cat([labels, torch.zeros(60, 1)], 1))
        plain_rows, plain_gram, plain_p = moments(metadata, labels)
        for share in (0.0, 0.1):
            actual = coefficient_operator(gram, p, share) @ rows.mT @ features
            expected = coefficient_operator(plain_gram, plain_p, share) @ plain_rows.mT @ features
            torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


class TestStandardisation:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_mean_and_deviation(self, weighted):
        _, metadata, labels = make()
        columns = torch.cat([labels, torch.ones(60, 1), metadata], 1)
        weights = torch.rand(60).double() if weighted else None
        units = Standardisation.of(columns, 2, weights)
        rows = ((columns - units.origin) * units.scale).numpy()
        np.testing.assert_allclose(np.average(rows, 0, weights), [0, 0, 1, 0, 0, 0], atol=1e-13)
        spread = np.average((rows - np.average(rows, 0, weights)) ** 2, 0, weights)
        np.testing.assert_allclose(spread, [1, 1, 0, 1, 1, 1], atol=1e-13)

    def test_a_constant_column_is_in_units_of_itself(self):
        columns = torch.tensor([[1.0, 0.0, 1e-5, -40.0]] * 5, dtype=torch.float64)
        origin, scale = Standardisation.of(columns, 0)
        np.testing.assert_allclose(origin, [0, 0, 1e-5, -40])
        np.testing.assert_allclose(1 / scale, [1, 1, 1e-5, 40])

    @pytest.mark.parametrize("case", ["no rows", "no weight", "NaN"])
    def test_is_unknown_without_values(self, case):
        columns = torch.ones(0 if case == "no rows" else 3, 2, dtype=torch.float64)
        if case == "NaN":
            columns[1, 1] = math.nan
        weights = torch.zeros(3).double() if case == "no weight" else None
        assert not any(part.any() for part in Standardisation.of(columns, 0, weights))


class TestGradient:
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("prior", [0.0, 1.0])
    def test_gradcheck(self, granularity, prior):
        features, metadata, labels = make(n=9, k_m=2, k_y=1, shape=(2, 3))

        def function(f):
            return metadata_norm(f, metadata, labels, prior=prior, granularity=granularity)

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

    def test_an_in_place_activation_may_follow(self):
        features, metadata, labels = make()
        features.requires_grad_()
        (expected,) = torch.autograd.grad(metadata_norm(features, metadata, labels).relu().sum(), features)
        out = torch.nn.functional.relu(metadata_norm(features, metadata, labels), inplace=True)
        assert torch.equal(torch.autograd.grad(out.sum(), features)[0], expected)

    def test_vmap_over_an_ensemble(self):
        features, metadata, labels = make()
        ensemble = torch.stack([features, 2 * features])
        out = torch.func.vmap(lambda f: metadata_norm(f, metadata, labels))(ensemble)
        torch.testing.assert_close(out[1], 2 * metadata_norm(features, metadata, labels))

    @pytest.mark.parametrize("prior", [0.0, 1.0])
    def test_vmap_over_designs_and_features(self, prior):
        features, metadata, labels = make(shape=(4,))
        stacked = torch.stack([features, features.flip(0)]), torch.stack([metadata, metadata.roll(3, 0)])
        function = torch.func.vmap(lambda f, m: metadata_norm(f, m, labels, prior=prior, check_finite=False))
        for one, f, m in zip(function(*stacked), *stacked, strict=True):
            torch.testing.assert_close(one, metadata_norm(f, m, labels, prior=prior), atol=1e-10, rtol=0)


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
        assert torch.equal(out, expected)
        assert torch.equal(under_autocast, gradient)

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30, 1e150])
    def test_any_scale_of_metadata_and_features(self, scale):
        features, metadata, labels = make()
        expected = metadata_norm(features, metadata, labels)
        torch.testing.assert_close(metadata_norm(features, metadata * scale, labels), expected)
        torch.testing.assert_close(metadata_norm(features * scale, metadata, labels) / scale, expected)


class TestBadInput:
    features = torch.randn(4, 2)

    @pytest.mark.parametrize(
        ("metadata", "labels", "message"),
        [
            (torch.tensor([1.0, math.nan, 3, 4]), None, r"metadata has NaN.*column\(s\) \[0\], row\(s\) 1 "),
            (torch.ones(4), torch.tensor([1.0, 2, math.inf, 4]), r"labels has NaN or infinite.*row\(s\) 2"),
            (
                torch.tensor([1.0, 2, 3, 1e160], dtype=torch.float64),
                None,
                r"metadata has values up to 1e\+160 in column 0",
            ),
            (torch.ones(3), None, "metadata has 3 rows but there are 4 samples"),
            (torch.ones(4), torch.ones(5, 1), "labels has 5 rows but there are 4 samples"),
            (torch.ones(4), torch.tensor([0, 1, 2, 0]).numpy(), "integers from 0 to 2"),
            (torch.ones(4, 1, 1), None, "metadata must have shape"),
            (torch.ones(4, 0), None, "no columns"),
            (
                torch.ones(4, requires_grad=True),
                None,
                r"metadata\.requires_grad is True.*metadata\.detach\(\)",
            ),
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

    def test_positions(self):
        with pytest.raises(ValueError, match="granularity must be"):
            position_dims(self.features, "pixel")
        with pytest.raises(ValueError, match="channel_dim=5"):
            position_dims(self.features, "channel", 5)
        with pytest.raises(ValueError, match="channel_dim=0"):
            position_dims(self.features, "channel", 0)
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            position_dims(torch.ones(3), "element")


def test_position_dims():
    features = torch.ones(2, 3, 4, 5)
    assert position_dims(features, "element") == ()
    assert position_dims(features, "channel") == (2, 3)
    assert position_dims(features, "channel", -1) == (1, 2)
    assert position_dims(features, "channel", -3) == (2, 3)
    assert position_dims(torch.ones(2, 3), "channel") == ()


class TestRemove:
    @pytest.mark.parametrize("dims", [(), (2,)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equals_numpy(self, dims, dtype):
        features = torch.randn(5, 3, 2).to(dtype)
        basis, beta = torch.randn(5, 2).double(), torch.randn(2, 3 if dims else 6).double()
        out = remove(features, basis, beta, dims)
        effect = basis.numpy() @ beta.numpy()
        expected = features.double().numpy() - (effect[:, :, None] if dims else effect.reshape(5, 3, 2))
        assert out.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps * np.abs(expected).max()
        np.testing.assert_allclose(out.double(), expected, atol=tolerance, rtol=0)

    def test_where_the_mask_is_true(self):
        features, mask = torch.randn(5, 3, 2), torch.rand(5, 1, 2) > 0.5
        basis, beta = torch.randn(5, 2), torch.randn(2, 3)
        out = remove(features, basis, beta, (2,), mask)
        assert torch.equal(out, torch.where(mask, remove(features, basis, beta, (2,)), features))

    @pytest.mark.parametrize("dims", [(), (2,)])
    def test_gradient_reaches_features_basis_and_coefficients(self, dims):
        arguments = torch.randn(5, 3, 2), torch.randn(5, 2), torch.randn(2, 3 if dims else 6)
        leaves = [argument.double().requires_grad_() for argument in arguments]
        assert torch.autograd.gradcheck(lambda *tensors: remove(*tensors, dims), leaves)


class TestRunningRegression:
    """`regress` with the running mean of the gradient that reaches the coefficients."""

    def call(
        self,
        features,
        dims=(),
        *,
        adjoint=None,
        weight=0.0,
        count=8.0,
        kept=0.9,
        samples=1,
        mask=None,
        eager=True,
    ):
        n, d = features.shape[0], features.shape[1] if dims else features[0].numel()
        options = {"generator": torch.Generator().manual_seed(7), "dtype": torch.float64}
        basis, beta = torch.randn(n, 2, **options), torch.randn(2, d, **options)
        rows = torch.randn(2, n, **options) / n
        adjoint = torch.zeros(2, d, dtype=torch.float64) if adjoint is None else adjoint
        memory = Memory(adjoint, torch.tensor([weight], dtype=torch.float64), count, kept, samples, eager)
        return regress(features, basis, beta, rows, dims, mask, memory=memory), basis, beta, rows, memory

    @pytest.mark.parametrize(("as_tensors", "eager"), [(False, True), (False, False), (True, False)])
    @pytest.mark.parametrize("samples", [1, 3])
    @pytest.mark.parametrize("dims", [(), (2,)])
    def test_forward_and_backward_in_numpy(self, dims, samples, as_tensors, eager):
        features = torch.randn(8, 3, 4, dtype=torch.float64, requires_grad=True)
        d = 3 if dims else 12
        old = torch.randn(2, d, dtype=torch.float64)
        make_ = (
            (lambda value: torch.tensor([value], dtype=torch.float64))
            if as_tensors
            else (lambda value: value)
        )
        options = {"count": make_(8.0), "kept": make_(0.9), "samples": make_(samples), "eager": eager}
        out, basis, beta, rows, memory = self.call(
            features, dims, adjoint=old.clone(), weight=40.0, **options
        )
        effect = basis.numpy() @ beta.numpy()
        effect = effect[:, :, None] if dims else effect.reshape(8, 3, 4)
        np.testing.assert_allclose(out.detach(), features.detach().numpy() - effect, atol=1e-12)
        assert torch.equal(memory.adjoint, old)

        gradient = torch.randn(8, 3, 4, dtype=torch.float64)
        out.backward(gradient)
        g = gradient.numpy()
        summed = g.sum(2) if dims else g.reshape(8, 12)
        weight = 40 * 0.9 + 8
        adjoint = old.numpy() + (basis.numpy().T @ summed / samples - old.numpy()) * 8 / weight
        np.testing.assert_allclose(memory.adjoint, adjoint, atol=1e-12)
        assert float(memory.weight) == pytest.approx(weight)
        shared = rows.numpy().T @ adjoint * samples
        expected = g - (shared[:, :, None] / 4 if dims else shared.reshape(8, 3, 4))
        np.testing.assert_allclose(features.grad, expected, atol=1e-12)

    @pytest.mark.parametrize("dims", [(), (2,)])
    def test_without_history_the_gradient_is_that_of_the_regression(self, dims):
        """g − rowsᵀ basisᵀ g."""
        features = torch.randn(8, 3, 4, dtype=torch.float64, requires_grad=True)
        mask = torch.rand(8, 1, 4) > 0.3 if dims else None
        out, basis, _, rows, _ = self.call(features, dims, mask=mask)

        def explicit(f):
            if not dims:
                return f - (basis @ rows @ f.flatten(1)).reshape(f.shape)
            matrix = torch.where(mask, f, 0).sum(2) / mask.sum(2).clamp_min(1)
            return f - torch.where(mask, (basis @ rows @ matrix).unsqueeze(2), 0)

        probe = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, features, probe)
        expected = torch.autograd.functional.vjp(explicit, features.detach(), probe)[1]
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_an_overflowed_gradient_leaves_the_state(self, bad):
        features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        old = torch.randn(2, 3, dtype=torch.float64)
        out, *_, memory = self.call(features, adjoint=old.clone(), weight=40.0)
        gradient = torch.ones_like(out)
        gradient[1, 2] = bad
        out.backward(gradient)
        assert torch.equal(memory.adjoint, old)
        assert float(memory.weight) == 40
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
        with pytest.raises(RuntimeError, match=r"differentiated only once: take 'batch'"):
            torch.autograd.grad(out.pow(3).sum(), features, create_graph=True)

    def test_dtype_follows_the_features(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            features = torch.randn(8, 3).to(dtype).requires_grad_()
            out, *_, memory = self.call(features)
            out.float().sum().backward()
            assert out.dtype == features.grad.dtype == dtype
            assert memory.adjoint.dtype == torch.float64
            assert memory.adjoint.any()


@pytest.mark.parametrize("eager", [False, True])
class TestAdvance:
    @pytest.mark.parametrize("as_tensors", [False, True])
    def test_weighted_averages(self, as_tensors, eager):
        """In numbers where they can be read at once, in tensors elsewhere."""
        batches, counts, kept = torch.randn(5, 3, 2).double(), [4.0, 0.0, 7.0, 2.0, 9.0], 0.8
        average, doubled, weight = torch.zeros(3, 2).double(), torch.zeros(3, 2), torch.zeros(1).double()
        for batch, count in zip(batches, counts, strict=True):
            numbers = (torch.tensor([x]).double() for x in (kept, count)) if as_tensors else (kept, count)
            assert advance(weight, *numbers, (average, batch), (doubled, 2 * batch), eager=eager)
        shares = np.array(counts) * kept ** np.arange(4, -1, -1)
        assert float(weight) == pytest.approx(shares.sum())
        np.testing.assert_allclose(average, np.average(batches, 0, shares), atol=1e-14)
        np.testing.assert_allclose(doubled, 2 * np.average(batches, 0, shares), atol=1e-6)

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_a_batch_that_is_not_finite_is_left_out(self, bad, eager):
        average, weight = torch.ones(2).double(), torch.full((1,), 3.0).double()
        assert not advance(weight, 0.5, 2.0, (average, torch.tensor([1.0, bad]).double()), eager=eager)
        assert average.tolist() == [1, 1]
        assert float(weight) == 3

    def test_nothing_is_the_average_of_nothing(self, eager):
        average, weight = torch.zeros(2), torch.zeros(1)
        advance(weight, 1.0, 0.0, (average, torch.ones(2)), eager=eager)
        assert not average.any()
        assert not weight.any()


def test_values_are_read_where_that_costs_nothing():
    """On the CPU, not in transforms and not while a graph is traced."""
    assert is_eager(torch.ones(1))
    assert not is_eager(torch.ones(1, device="meta"))
    seen = []
    torch.func.vmap(lambda x: seen.append(is_eager(x)) or x)(torch.ones(3, 2))
    assert seen == [False]
    traced = torch.compile(lambda x: x * 2 if is_eager(x) else x * 3, backend="eager", fullgraph=True)
    assert torch.equal(traced(torch.ones(2)), torch.full((2,), 3.0))
