"""Errors of coefficients, shrinkage, what new rows show again: against statsmodels, scipy and simulation."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mdnorm.integration.recalibration import probability_below
from mdnorm.moments import Moments, NoSamplesError
from mdnorm.shrinkage import Regression, combine, effect, found_again, independent_features, with_change


def moments_of(features, metadata, labels, weights=None):
    moments = Moments.empty(features.shape[1], metadata.shape[1], labels.shape[1])
    return moments.update(features, torch.cat([metadata, labels], 1), weights)


def number_of(features, metadata, labels):
    some = Moments.empty(0, features.shape[1], metadata.shape[1] + labels.shape[1])
    some.update(features[:, :0], torch.cat([features, metadata, labels], 1))
    return independent_features(some, features.shape[1])


def regression(features, metadata, labels, units=None):
    moments = moments_of(features, metadata, labels)
    return Regression.of(moments, len(features), number_of(features, metadata, labels), units)


def groups_of(trained, features, metadata, labels):
    weights = torch.where(trained.deviation > 0, 1 / trained.deviation, 0) * effect(trained)[1]
    projected = features @ weights.mT
    rows = [slice(i, None, 20) for i in range(20)]
    return [moments_of(projected[part], metadata[part], labels[part]) for part in rows if len(metadata[part])]


def draw(generator, rows, slopes, mixing, noise=1.0):
    """Correlated features, with a label that goes with the metadata."""
    options = {"generator": generator, "dtype": torch.float64}
    labels = torch.randint(0, 2, (rows, 1), generator=generator).double()
    metadata = 5 + torch.randn(rows, len(slopes), **options) + labels
    features = noise * torch.randn(rows, len(mixing), **options) @ mixing + metadata @ slopes + labels
    return features, metadata, labels


def sites(rows, number, generator):
    return torch.nn.functional.one_hot(
        torch.randint(0, number, (rows,), generator=generator), number
    ).double()


class TestErrors:
    def test_are_those_of_ordinary_least_squares(self):
        generator = torch.Generator().manual_seed(0)
        slopes, mixing = torch.ones(3, 5).double(), torch.randn(5, 5, generator=generator).double()
        features, metadata, labels = draw(generator, 40, slopes, mixing)
        metadata[:, 1] *= 1000
        fit = regression(features, metadata, labels)
        x = np.column_stack([metadata, labels, np.ones(40)])
        for d in range(5):
            expected = sm.OLS(features[:, d].numpy(), x).fit()
            np.testing.assert_allclose(fit.errors[:, d], expected.bse[:3], rtol=1e-9)
            raw = fit.coefficients[:, d] * fit.units.scale[2:]
            np.testing.assert_allclose(raw, expected.params[:3], rtol=1e-9)
        assert fit.columns == 4
        # In independent directions the coefficients weigh what they do in the F test.
        z = fit.standardised(fit.coefficients)
        for d in range(5):
            test = sm.OLS(features[:, d].numpy(), x).fit().f_test(np.eye(5)[:3])
            assert float(z[:, d].square().sum()) == pytest.approx(3 * test.fvalue * (35 - 2) / 35, rel=1e-8)

    def test_collinear_columns_count_once_and_constant_ones_not(self):
        generator = torch.Generator().manual_seed(0)
        features, labels = torch.randn(50, 3, generator=generator).double(), torch.zeros(50, 0).double()
        metadata = sites(50, 4, generator)
        fit = regression(features, torch.cat([metadata, torch.ones(50, 1)], 1), labels)
        assert fit.columns == 3
        assert fit.root.shape == (5, 3)
        assert not fit.errors[4].any()

    def test_too_few_rows_tell_nothing(self):
        generator = torch.Generator().manual_seed(0)
        features, metadata, labels = draw(generator, 4, torch.ones(2, 3).double(), torch.eye(3).double())
        fit = regression(features, metadata, labels)
        assert fit.errors.isinf().all()
        combined = combine(fit)
        assert not combined.coefficients.any()
        assert combined.kept == 0

    def test_no_rows(self):
        with pytest.raises(NoSamplesError, match="at least one"):
            Regression.of(Moments.empty(2, 1), 0, 1)


def test_the_number_of_independent_features():
    """Against the variance of a mean of squares."""
    generator = torch.Generator().manual_seed(0)
    for distinct, total in ((1, 1), (1, 30), (5, 30), (40, 40)):
        mixing = torch.randn(distinct, total, generator=generator, dtype=torch.float64)
        labels = torch.zeros(2000, 0).double()
        features = torch.randn(2000, distinct, generator=generator, dtype=torch.float64) @ mixing
        metadata = torch.randn(2000, 1, generator=generator, dtype=torch.float64)
        # An effect of the metadata, however large, is no correlation of the noise.
        found = number_of(features + 10 * metadata, metadata, labels)
        correlation = np.corrcoef(features.T)
        expected = total**2 / np.square(correlation).sum()
        assert found == pytest.approx(expected, rel=0.1)


class TestShrinkage:
    def test_one_direction_and_many_features_have_the_factor_of_james_and_stein(self):
        generator = torch.Generator().manual_seed(0)
        slopes = 0.2 * torch.randn(1, 400, generator=generator).double()
        features, metadata, labels = draw(generator, 400, slopes, torch.eye(400).double())
        fit = regression(features, metadata, labels)
        z = fit.standardised(fit.coefficients)
        share = combine(fit).coefficients / fit.coefficients
        assert float(share.std()) < 1e-6
        assert float(share[0, 0]) == pytest.approx(1 - 1 / float(z.square().mean()), abs=0.01)

    @pytest.mark.parametrize("number", [1, 2, 16, 64])
    @pytest.mark.parametrize("strength", [0, 0.05, 0.3, 2])
    def test_the_risk_is_no_larger_than_that_of_least_squares(self, number, strength):
        """With one or two features, whose noise hardly shows, it is up to 1.7 times that."""
        generator = torch.Generator().manual_seed(number)
        risks = []
        for _ in range(200 if number < 3 else 30):
            mixing = torch.randn(number, number, generator=generator, dtype=torch.float64)
            slopes = strength * torch.randn(1, number, generator=generator, dtype=torch.float64)
            slopes = slopes * mixing.norm(dim=0)
            fit = regression(*draw(generator, 100, slopes, mixing))
            truth = slopes / fit.units.scale[2:].unsqueeze(1)
            both = (combine(fit).coefficients, fit.coefficients)
            risks.append([float(fit.standardised(part - truth).square().mean()) for part in both])
        shrunk, plain = np.mean(risks, axis=0)
        assert shrunk < (1.8 if number < 3 else 1.1) * plain
        if strength == 0:
            assert shrunk < 0.35 * plain

    def test_a_large_effect_in_one_of_many_features_stays(self):
        generator = torch.Generator().manual_seed(0)
        slopes = torch.zeros(1, 2000).double()
        slopes[0, 7] = 2
        features, metadata, labels = draw(generator, 300, slopes, torch.eye(2000).double())
        fit = regression(features, metadata, labels)
        combined = combine(fit).coefficients[0] * fit.units.scale[2]
        assert float(combined[7]) == pytest.approx(2, abs=0.5)
        assert float(combined.abs().sort().values[-2]) < 0.02

    def test_the_coding_of_a_category_does_not_matter(self):
        generator = torch.Generator().manual_seed(0)
        metadata, labels = sites(300, 5, generator), torch.randn(300, 1, generator=generator).double()
        features = (
            torch.randn(300, 20, generator=generator).double()
            + 0.4 * metadata @ torch.randn(5, 20, generator=generator).double()
        )
        codings = [metadata[:, 1:], metadata[:, 1:] * torch.tensor([1, 50, 3, 0.1])]
        codings.append(metadata[:, :4] @ torch.randn(4, 4, generator=generator).double())
        removed = []
        for coded in codings:
            fit = regression(features, coded, labels)
            raw = combine(fit).coefficients * fit.units.scale[2:].unsqueeze(1)
            removed.append((coded - coded.mean(0)) @ raw)
        for other in removed[1:]:
            torch.testing.assert_close(other, removed[0], rtol=1e-7, atol=1e-9)

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 60),
        features=st.integers(1, 6),
        columns=st.integers(1, 5),
        labels=st.integers(0, 2),
        constant=st.booleans(),
        zero=st.booleans(),
        exact=st.booleans(),
        others=st.sampled_from(["the same", "one value", "one row differs", "two rows"]),
        seed=st.integers(0, 10**6),
    )
    def test_any_shape(self, rows, features, columns, labels, constant, zero, exact, others, seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        metadata, protected = torch.randn(rows, columns, **options), torch.randn(rows, labels, **options)
        values = torch.randn(rows, features, **options)
        values[:, 0] = 0 if zero else values[:, 0]
        metadata[:, -1] = 3 if constant else metadata[:, -1]
        values[:, -1] = metadata[:, 0] if exact else values[:, -1]
        fit = regression(values, metadata, protected)
        held_out = metadata.clone()
        if others != "the same":
            held_out[others == "one row differs" :] = 2
        some = slice(0, 2 if others == "two rows" else None)
        new_rows = values[some], held_out[some], protected[some]
        new = regression(*new_rows, fit.units)
        for sources in ((fit,), (fit, new, found_again(fit, groups_of(fit, *new_rows)))):
            combined = combine(*sources).coefficients
            assert combined.isfinite().all()
            if fit.deviation.isinf().any() or (len(sources) > 1 and others != "the same"):
                continue
            # The stated bound, feature by feature; an exactly determined one stays as it is.
            moved = fit.standardised(combined - fit.coefficients).norm(dim=0)
            x = math.log(20 * features)
            directions = len(fit.inverse)
            assert (moved <= math.sqrt(directions + 2 * math.sqrt(directions * x) + 2 * x) + 1e-6).all()
            exactly = fit.deviation == 0
            torch.testing.assert_close(combined[:, exactly], fit.coefficients[:, exactly])

    def test_the_moments_of_other_coefficients(self):
        """The labels' coefficients and the intercept are fitted anew, by least squares."""
        generator = torch.Generator().manual_seed(0)
        slopes = torch.randn(2, 4, generator=generator).double()
        features, metadata, labels = draw(generator, 60, slopes, torch.eye(4).double())
        fit = regression(features, metadata, labels)
        combined = combine(fit).coefficients
        change = (combined - fit.coefficients) * fit.units.scale[2:].unsqueeze(1)
        changed = with_change(moments_of(features, metadata, labels), combined - fit.coefficients, fit.units)
        direct = moments_of(features + (metadata - metadata.mean(0)) @ change, metadata, labels)
        found, expected = changed.solve(), direct.solve()
        np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-9)
        raw = combined * fit.units.scale[2:].unsqueeze(1)
        np.testing.assert_allclose(found[:2], raw, rtol=1e-9)
        residual = features - metadata @ raw
        x = torch.cat([labels, torch.ones(60, 1)], 1)
        beside = torch.linalg.lstsq(x, residual).solution[:1]
        np.testing.assert_allclose(found[2:], beside, rtol=1e-9)


class TestTwoSources:
    @pytest.mark.parametrize(("value", "error", "freedom"), [(0.1, 0.2, 19), (1.3, 0.2, 19), (0.9, 0.5, 4)])
    def test_the_probability(self, value, error, freedom):
        expected = stats.t.cdf((value - 1) / error, freedom)
        assert probability_below(value, 1, error, freedom) == pytest.approx(expected, rel=1e-5)

    def test_a_certain_share(self):
        assert probability_below(0.5, 1, 0.0, 19) == pytest.approx(0, abs=1e-12)
        assert probability_below(1.0, 1, 0.0, 19) == pytest.approx(0.5)

    @pytest.mark.parametrize(("columns", "new_rows", "distinct"), [(1, 400, 32), (3, 200, 4), (2, 1000, 32)])
    def test_without_memorising_it_is_found_in_one_of_twenty_at_most(self, columns, new_rows, distinct):
        generator = torch.Generator().manual_seed(0)
        values, shares, risks = [], [], []
        for _ in range(120):
            mixing = torch.randn(distinct, 32, generator=generator).double()
            slopes = 0.2 * distinct**0.5 * torch.randn(columns, 32, generator=generator).double()
            trained = regression(*draw(generator, 1000, slopes, mixing))
            rows = draw(generator, new_rows, slopes, mixing)
            found = found_again(trained, groups_of(trained, *rows))
            values.append(probability_below(found.share, 1, found.error, 19))
            shares.append(found.share)
            truth = slopes / trained.units.scale[2:].unsqueeze(1)
            new = regression(*rows, trained.units)
            both = combine(trained, new, found).coefficients, trained.coefficients, new.coefficients
            risks.append([float(trained.standardised(part - truth).square().mean()) for part in both])
        # 12 of 120 at 5 % has a probability of 0.02.
        assert np.mean(np.less(values, 0.05)) <= 0.1
        assert np.mean(shares) == pytest.approx(1, abs=0.02)
        combined, of_trained, of_new = np.mean(risks, axis=0)
        assert combined < 1.05 * min(of_trained, of_new)

    @pytest.mark.parametrize("share", [0, 0.4])
    def test_a_memorised_effect(self, share):
        """New rows have less of the effect than training rows, and the share is found within its error."""
        generator = torch.Generator().manual_seed(1)
        outcomes, risks = [], []
        for _ in range(40):
            mixing = torch.randn(32, 32, generator=generator).double()
            slopes = 1.5 * torch.randn(1, 32, generator=generator).double()
            trained = regression(*draw(generator, 1000, slopes, mixing))
            rows = draw(generator, 400, share * slopes, mixing)
            found = found_again(trained, groups_of(trained, *rows))
            outcomes.append([(found.share - share) / found.error, found.share])
            assert probability_below(found.share, 1, found.error, 19) < 1e-4
            new = regression(*rows, trained.units)
            truth = share * slopes / trained.units.scale[2:].unsqueeze(1)
            both = combine(trained, new, found).coefficients, trained.coefficients, new.coefficients
            risks.append([float(new.standardised(part - truth).square().mean()) for part in both])
        deviations, shares = np.transpose(outcomes)
        assert np.mean(shares) == pytest.approx(share, abs=0.02)
        assert 0.6 < np.std(deviations) < 1.4
        combined, of_trained, of_new = np.mean(risks, axis=0)
        assert combined < 0.3 * of_new < of_trained

    def test_nothing_to_find_again(self):
        generator = torch.Generator().manual_seed(0)
        rows = draw(generator, 300, torch.zeros(1, 8).double(), torch.eye(8).double())
        trained = regression(*rows)
        assert found_again(trained, groups_of(trained, *rows)) is None
        few = draw(generator, 2, torch.ones(1, 8).double(), torch.eye(8).double())
        trained = regression(*draw(generator, 300, torch.ones(1, 8).double(), torch.eye(8).double()))
        assert found_again(trained, groups_of(trained, *few)) is None

    def test_a_level_that_only_the_training_rows_have_keeps_its_coefficient(self):
        generator = torch.Generator().manual_seed(0)
        slopes, mixing = torch.randn(3, 6, generator=generator).double(), torch.eye(6).double()
        metadata, labels = sites(600, 3, generator), torch.zeros(600, 0).double()
        features = torch.randn(600, 6, generator=generator).double() @ mixing + metadata @ slopes
        trained = regression(features, metadata, labels)
        new = metadata[:, 2] == 0
        other = regression(features[new], metadata[new], labels[new], trained.units)
        found = found_again(trained, groups_of(trained, features[new], metadata[new], labels[new]))
        combined = combine(trained, other, found).coefficients * trained.units.scale[1:].unsqueeze(1)
        for level in (1, 2):
            expected = slopes[level] - slopes[0]
            torch.testing.assert_close(combined[level] - combined[0], expected, rtol=0, atol=0.4)
