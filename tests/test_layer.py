import collections
import copy
import functools
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from safetensors.torch import load, save
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import mdnorm
from mdnorm import MetadataNorm, fit_gram, metadata_norm, penalty_loss
from mdnorm.estimators import Estimator, LeastSquares, Penalty
from mdnorm.regression import advance
from reference import design_matrix, residual

ESTIMATORS = ["batch", "dataset", "running", "recursive", "penalty"]
LEAST_SQUARES = [name for name in ESTIMATORS if name != "penalty"]
NEED_GRAM = ["dataset", "penalty"]
# Where the gradient is the derivative of one forward pass: "running" has that of many, "recursive" (which
# takes its coefficients for constants) has the state move between the evaluations of a numeric derivative.
ONE_PASS = ["batch", "dataset", "penalty"]
INPUTS = {
    "(N, D)": ((6,), "element", 1),
    "(N, C, L)": ((3, 5), "element", 1),
    "(N, C, H, W)": ((3, 4, 5), "element", 1),
    "(N, C, T, H, W)": ((2, 3, 4, 5), "element", 1),
    "tokens (N, T, D)": ((7, 4), "element", 1),
    "(N, D) by channel": ((6,), "channel", 1),
    "(N, C, L) by channel": ((3, 5), "channel", 1),
    "(N, C, H, W) by channel": ((3, 4, 5), "channel", 1),
    "(N, C, T, H, W) by channel": ((2, 3, 4, 5), "channel", 1),
    "tokens (N, T, D) by channel": ((7, 4), "channel", -1),
}


def inputs(n=30, shape=(6,), k_m=2, k_y=1):
    metadata, labels = torch.randn(n, k_m), torch.randn(n, k_y)
    features = torch.randn(n, *shape) + metadata[:, :1].reshape(n, *[1] * len(shape))
    return features, metadata, labels


def build(estimator, num_features=6, k_m=2, k_y=1, **options):
    return MetadataNorm(num_features, k_m, k_y, estimator=estimator, **options)


def published(estimator):
    """Options for the gradient of the paper, without decay of what is removed."""
    return {} if estimator == "penalty" else {"decay": 0}


def prepared(estimator, *args, **options):
    layer = build(estimator, *args, **options)
    _, metadata, labels = inputs(100)
    fit_gram(layer, metadata, labels)
    if isinstance(layer.estimator, Penalty):
        # As after some steps of the optimiser.
        nn.init.normal_(layer.estimator.weight)
    return layer


def step(layer, features, metadata, labels):
    """A training step: the forward pass, and the optimiser's where coefficients are a parameter."""
    out = layer(features, metadata, labels)
    if list(layer.parameters()):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
        optimizer.zero_grad()
        penalty_loss(layer).backward()
        optimizer.step()
    return out


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_input_shape_and_batch_size(estimator, kind):
    shape, granularity, channel_dim = INPUTS[kind]
    size = shape if granularity == "element" else shape[0 if channel_dim == 1 else -1]
    layer = prepared(estimator, size, granularity=granularity, channel_dim=channel_dim)
    for n in (30, 7, 1, 0, 30):
        features, metadata, labels = inputs(n, shape)
        features.requires_grad_()
        out = layer.train()(features, metadata, labels)
        out.sum().backward()
        assert out.shape == features.shape == features.grad.shape
        assert torch.isfinite(out).all()
        out = layer.eval()(features, metadata)
        assert out.shape == features.shape
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_evaluation_removes_a_known_effect(estimator):
    metadata, label = torch.randn(4000, 1, dtype=torch.float64), torch.randn(4000, 1, dtype=torch.float64)
    metadata = metadata + label
    truth = torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64)
    features = metadata @ truth + 5 * label + 7 + 0.1 * torch.randn(4000, 3).double()
    memory = {} if estimator == "penalty" else {"window": math.inf, "prior": 0}
    layer = MetadataNorm(3, 1, 1, estimator=estimator, dtype=torch.float64, **memory)
    fit_gram(layer, metadata, label)
    for part in torch.arange(4000).split(64):
        step(layer, features[part], metadata[part], label[part])
    out = layer.eval()(features, metadata)
    np.testing.assert_allclose(layer.coefficients, truth, atol=0.02)
    np.testing.assert_allclose(out.mean(0), features.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.polyfit(label[:, 0], out, 1)[0], 5, atol=0.02)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_evaluation_does_not_depend_on_the_batch_or_the_labels(estimator):
    layer = prepared(estimator)
    features, metadata, labels = inputs()
    layer(features, metadata, labels)
    layer.eval()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    whole = layer(features, metadata)
    parts = torch.cat([layer(f, m) for f, m in zip(features.split(7), metadata.split(7), strict=True)])
    torch.testing.assert_close(whole, parts)
    assert torch.equal(layer(features, metadata, torch.full((30, 1), float("nan"))), whole)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_first_batch_under_inference_mode_does_not_spoil_the_state(estimator):
    layer = prepared(estimator, None, None, None)
    with torch.inference_mode():
        layer(*inputs())
    features, metadata, labels = inputs()
    layer(features.requires_grad_(), metadata, labels).sum().backward()
    assert features.grad is not None


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fitted", [True, False])
def test_functional_call_leaves_the_layers_own_state(estimator, fitted):
    if not fitted and estimator in NEED_GRAM:
        return
    layer = prepared(estimator) if fitted else build(estimator)
    state, other = ({key: value.clone() for key, value in layer.state_dict().items()} for _ in range(2))
    torch.func.functional_call(layer, state, inputs())
    assert not layer.estimator.coefficients.any()
    assert state["estimator.coefficients"].any()
    # Another state, and the layer's own, start afresh.
    batch = inputs()
    torch.func.functional_call(layer, other, batch)
    layer(*batch)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, other[key]), key


def test_averaged_copies_evaluate():
    layer = prepared("dataset")
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    layer(*inputs())
    averaged.update_parameters(layer)
    features, metadata, _ = inputs()
    assert averaged.eval()(features, metadata).shape == features.shape


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("case", ["empty", "weightless", "masked"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_first_batch_without_anything_leaves_no_trace(estimator, case, scale):
    """The origin and the units of the columns, too, are those of the first batch that has some."""
    make = prepared if estimator in NEED_GRAM else build
    layer = make(estimator, granularity="channel", channel_dim=-1, scale=scale)
    twin = copy.deepcopy(layer)
    features, metadata, labels = inputs(0 if case == "empty" else 30, (5, 6))
    weights = torch.zeros(30) if case == "weightless" else None
    mask = torch.zeros(30, 5) if case == "masked" else None
    out = layer(features, metadata, labels, weights, mask)
    assert torch.equal(out, features) or (estimator == "penalty" and case == "weightless")
    batch = inputs(30, (5, 6))
    torch.testing.assert_close(layer(*batch), twin(*batch))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, msg=key)


def test_evaluation_before_training_changes_nothing():
    for layer in (
        build("batch"),
        build("running", scale=True),
        build("penalty"),
        MetadataNorm(None, None, None),
    ):
        features, metadata, _ = inputs()
        assert torch.equal(layer.eval()(features, metadata), features)


class TestState:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize("route", ["torch", "safetensors"])
    def test_survives_saving_bit_exactly(self, estimator, lazy, route):
        layer = prepared(estimator, (3, 4), center=True)
        for n in (20, 3):
            features, metadata, labels = inputs(n, (3, 4))
            step(layer, features.requires_grad_(), metadata, labels).pow(2).mean().backward()
        if route == "torch":
            buffer = io.BytesIO()
            torch.save(layer.state_dict(), buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        else:
            state = load(save(layer.state_dict()))
        sizes = (None, None, None) if lazy else ((3, 4), 2, 1)
        other = build(estimator, *sizes, center=True)
        other.load_state_dict(state)
        assert (other.num_features, other.num_metadata, other.num_labels) == ((3, 4), 2, 1)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
            assert value.dtype == other.state_dict()[key].dtype
        batch = inputs(9, (3, 4))
        assert torch.equal(layer(*batch), other(*batch))
        assert torch.equal(layer.eval()(*batch), other.eval()(*batch))

    def test_keys_are_stable(self):
        base = ["origin", "scale", "mean", "coefficients"]
        moments = [*base, "gram", "weight", "coefficients_weight", "seen"]
        expected = {
            "batch": [*moments, "cross"],
            "dataset": moments,
            "running": [*moments, "cross", "adjoint", "adjoint_weight"],
            "recursive": [*moments, "cross", "prior_weight"],
            "penalty": [*base, "gram", "gram_weight", "weight"],
        }
        for estimator, names in expected.items():
            assert sorted(build(estimator).state_dict()) == sorted(f"estimator.{name}" for name in names)
        spread = [key for key in build("batch", scale=True).state_dict() if key.startswith("spread")]
        names = [*moments, "cross", "squares", "log_gram", "log_cross", "log_weight"]
        assert sorted(spread) == sorted(f"spread.{name}" for name in names)

    def test_another_estimator_or_size_is_refused(self):
        with pytest.raises(RuntimeError, match=r"estimator\.cross"):
            build("batch").load_state_dict(build("dataset").state_dict())
        with pytest.raises(RuntimeError, match=r"size mismatch for estimator\.coefficients"):
            build("dataset", 5).load_state_dict(build("dataset", 6).state_dict())

    @pytest.mark.parametrize("center", [True, False])
    def test_a_lazy_layer_with_another_center_is_refused(self, center):
        """The rows of the coefficients alone do not tell metadata columns from an intercept."""
        state = build("dataset", center=center).state_dict()
        with pytest.raises(RuntimeError, match=r"size mismatch for estimator\.coefficients"):
            MetadataNorm(None, None, None, center=not center).load_state_dict(state)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_deepcopy_goes_its_own_way(self, estimator):
        layer = prepared(estimator)
        twin = copy.deepcopy(layer)
        batch = inputs()
        assert torch.equal(layer(*batch), twin(*batch))
        step(layer, *inputs())
        layer(*batch)
        assert not torch.equal(layer.estimator.coefficients, twin.estimator.coefficients)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_parameters(self, estimator):
        names = [name for name, _ in build(estimator, scale=True).named_parameters()]
        assert names == (["estimator.weight"] if estimator == "penalty" else [])

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_reset_forgets_everything(self, estimator):
        layer, fresh = prepared(estimator), build(estimator)
        step(layer, *inputs())
        layer.reset_parameters()
        for key, value in fresh.state_dict().items():
            assert torch.equal(layer.state_dict()[key], value), key

    @pytest.mark.parametrize("estimator", LEAST_SQUARES)
    def test_a_batch_counts_by_its_samples(self, estimator):
        """A last batch of one sample must not count like a whole batch."""
        layer = prepared(estimator)
        for _ in range(5):
            layer(*inputs(1000))
        before = layer.estimator.coefficients.clone()
        features, metadata, labels = inputs(1)
        layer(features + 100, metadata, labels)
        change = (layer.estimator.coefficients - before).abs().max()
        assert change < 0.1

    @pytest.mark.parametrize("estimator", LEAST_SQUARES)
    def test_a_batch_beyond_the_window_replaces_all(self, estimator):
        layer, fresh = (build(estimator, window=100, prior=0) for _ in range(2))
        fit_gram(nn.ModuleList([layer, fresh]), *inputs(100)[1:])
        for _ in range(4):
            layer(*inputs(20))
        if estimator != "dataset":
            weight = functools.reduce(lambda weight, n: weight * (1 - n / 100) + n, [20] * 4, 0)
            assert float(layer.estimator.weight) == pytest.approx(weight)
        batch = inputs(150)
        layer(*batch)
        fresh(*batch)
        expected = fresh.state_dict() | {"estimator.seen": layer.estimator.seen}
        for key, value in expected.items():
            torch.testing.assert_close(layer.state_dict()[key], value, msg=key)
        assert "window=100" in repr(layer)

    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_reset_parameters_after_to_empty(self, estimator, scale):
        """What torch's own delayed initialisation does: build on meta, take memory, reset."""
        with torch.device("meta"):
            layer = build(estimator, device="meta", scale=scale).half()
        layer.to_empty(device="cpu")
        for tensor in layer.state_dict().values():
            tensor.fill_(float("nan"))
        layer.reset_parameters()
        fresh = build(estimator, scale=scale)
        for (key, have), want in zip(layer.state_dict().items(), fresh.state_dict().values(), strict=True):
            assert have.dtype == want.dtype, key
            assert torch.equal(have, want), key
        data = inputs()
        for each in (layer, fresh):
            fit_gram(each, *data[1:])
        assert torch.equal(layer(*data), fresh(*data))

    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_a_half_precision_checkpoint_that_is_assigned(self, estimator, scale):
        layer, data = prepared(estimator, scale=scale), inputs()
        step(layer, *data)
        half = {key: value.half() for key, value in layer.state_dict().items()}
        assigned, copied = build(estimator, scale=scale), build(estimator, scale=scale)
        assigned.load_state_dict(half, assign=True)
        copied.load_state_dict(half)
        for _ in range(2):
            for (key, have), want in zip(
                assigned.state_dict().items(), copied.state_dict().values(), strict=True
            ):
                assert have.dtype == want.dtype, key
                assert torch.equal(have, want), key
            assert torch.equal(step(assigned, *data), step(copied, *data))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unchecked_nan_metadata_do_not_stay_in_the_state(estimator, scale, is_compiled):
    torch._dynamo.reset()
    layer = prepared(estimator, scale=scale, check_finite=False)
    whole = torch.compile(layer, fullgraph=True, backend="eager") if is_compiled else layer
    features, metadata, labels = inputs()
    # From the first batch on, so that the layer is compiled once.
    features.requires_grad_()
    whole(features, metadata, labels)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    ruined = metadata.clone()
    ruined[3, 1] = float("nan")
    whole(features, ruined, labels).sum().backward()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    # And goes on as if that batch had not been.
    assert torch.isfinite(whole(features, metadata, labels)).all()


class TestPrecision:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_leaves_the_statistics(self, estimator, dtype):
        layer = prepared(estimator)
        layer(*inputs())
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        layer.to(dtype)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key])
            assert value.dtype == before[key].dtype
        features, metadata, labels = inputs()
        for mode in (True, False):
            assert layer.train(mode)(features.to(dtype), metadata, labels).dtype == dtype

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_float_leaves_the_statistics_of_the_design(self, estimator):
        """`model.float()` is often called to be sure; the design is regressed in float64 all the same."""
        layer = prepared(estimator, scale=True)
        twin = copy.deepcopy(layer).float()
        for _ in range(2):
            batch = inputs()
            assert torch.equal(twin(*batch), layer(*batch))
        for key, value in layer.state_dict().items():
            assert torch.equal(twin.state_dict()[key], value), key
            assert twin.state_dict()[key].dtype == value.dtype, key

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_double(self, estimator):
        layer = prepared(estimator).double()
        assert all(value.dtype == torch.float64 for value in layer.state_dict().values())
        assert layer(*(x.double() for x in inputs())).dtype == torch.float64

    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_autocast_does_not_lower_the_state(self, estimator, scale):
        layer = build(estimator, scale=scale)
        fit_gram(layer, *inputs(100)[1:])
        twin = copy.deepcopy(layer)
        for _ in range(2):
            batch = inputs()
            expected = step(layer, *batch)
            with torch.autocast("cpu", torch.bfloat16):
                out = twin(*batch)
            if estimator == "penalty":
                twin.zero_grad()
                penalty_loss(twin).backward()
                torch.optim.SGD(twin.parameters(), lr=0.3).step()
            assert torch.equal(out, expected)
        layer.eval()(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            twin.eval()(*batch)
        for key, value in layer.state_dict().items():
            assert torch.equal(twin.state_dict()[key], value), key

    def test_lazy_layer_remembers_its_dtype(self):
        layer = MetadataNorm(None, None, None, estimator="batch").double()
        layer(*inputs())
        assert layer.estimator.coefficients.dtype == torch.float64

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_channels_last(self, estimator):
        """`model.to(memory_format=…)` restrides 4-d buffers, too: updates must not be lost."""
        plain = prepared(estimator, (3, 4, 5))
        moved = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        features, metadata, labels = inputs(shape=(3, 4, 5))
        expected = plain(features, metadata, labels)
        out = moved(features.to(memory_format=torch.channels_last), metadata, labels)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(moved.estimator.coefficients, plain.estimator.coefficients)
        assert moved.estimator.coefficients.any()

    @pytest.mark.gpu
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_gpu_equals_cpu(self, estimator):
        layer = prepared(estimator, (3, 4))
        twin = copy.deepcopy(layer).cuda()
        batch = inputs(shape=(3, 4))
        torch.testing.assert_close(layer(*batch), twin(*(x.cuda() for x in batch)).cpu())
        torch.testing.assert_close(layer.eval()(*batch), twin.eval()(*(x.cuda() for x in batch)).cpu())


class TestLabels:
    def test_class_indices_equal_one_hot(self):
        features, metadata, _ = inputs()
        classes = torch.arange(30) % 3
        outs = []
        for labels in (classes, nn.functional.one_hot(classes), classes[:, None], classes.numpy()):
            outs.append(build("batch", k_y=3, prior=0)(features, metadata, labels))
        for out in outs[1:]:
            assert torch.equal(out, outs[0])
        expected = residual(features, metadata, nn.functional.one_hot(classes)[:, :2])
        np.testing.assert_allclose(outs[0], expected, atol=1e-5)

    def test_binary_indices_stay_one_column(self):
        features, metadata, _ = inputs()
        labels = torch.arange(30) % 2
        out = build("batch")(features, metadata, labels)
        torch.testing.assert_close(out, build("batch")(features, metadata, labels.float()[:, None]))

    def test_class_indices_with_an_open_number_of_labels(self):
        classes = torch.arange(9) % 3
        layer = build("batch", k_y=None)
        with pytest.raises(ValueError, match=r"integers from 0 to 2: give num_labels"):
            layer(torch.randn(9, 6), torch.randn(9, 2), classes)
        layer(torch.randn(9, 6), torch.randn(9, 2), classes % 2)
        assert layer.num_labels == 1
        with pytest.raises(ValueError, match="integers from 0 to 2"):
            layer(torch.randn(9, 6), torch.randn(9, 2), classes)
        layer(torch.randn(9, 6), torch.randn(9, 2), classes.float())
        with pytest.raises(ValueError, match=r"labels has 2 column\(s\) but num_labels=1 was expected"):
            layer(torch.randn(9, 6), torch.randn(9, 2), torch.randn(9, 2))
        with pytest.raises(ValueError, match=r"float32 but num_labels=3 .*labels.long\(\)"):
            build("batch", k_y=3)(torch.randn(9, 6), torch.randn(9, 2), classes.float())

    def test_errors(self):
        features, metadata, labels = inputs()
        with pytest.raises(ValueError, match=r"labels are needed in training.*num_labels=1"):
            build("batch")(features, metadata)
        with pytest.raises(ValueError, match="labels were given but the layer has num_labels=0"):
            build("batch", k_y=0)(features, metadata, labels)
        with pytest.raises(ValueError, match="num_labels=3"):
            build("batch", k_y=3)(features, metadata, labels)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_new_gram_matrix_does_not_move_what_is_removed_with_the_intercept(estimator):
    layer = prepared(estimator, center=True)
    features, metadata, labels = inputs()
    layer(features, metadata, labels)
    before = layer.eval()(features, metadata)
    fit_gram(layer, metadata + 10, labels)
    torch.testing.assert_close(layer(features, metadata), before, atol=1e-4, rtol=1e-4)


class TestBadInput:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("lazy", [False, True])
    def test_nan_metadata(self, training, lazy):
        layer = build("batch", *((None, None, None) if lazy else ())).train(training)
        features, metadata, labels = inputs()
        metadata[3, 1] = float("nan")
        with pytest.raises(
            ValueError, match=r"metadata has NaN.*column\(s\) \[1\], row\(s\) 3 \(1 of 30 rows\)"
        ):
            layer(features, metadata, labels)
        assert not lazy or layer.num_features is None

    def test_the_check_can_be_left_out(self):
        layer = build("batch", k_y=0, check_finite=False)
        features, metadata, _ = inputs()
        metadata[3, 1] = float("nan")
        assert torch.isnan(layer(features, metadata)).any()

    def test_shapes(self):
        layer = build("batch", (3, 4))
        features, metadata, labels = inputs(shape=(3, 4))
        with pytest.raises(ValueError, match=r"features of a sample have shape \(3, 5\).*built for \(3, 4\)"):
            layer(torch.randn(30, 3, 5), metadata, labels)
        with pytest.raises(ValueError, match="metadata has 29 rows but there are 30 samples"):
            layer(features, metadata[1:], labels)
        with pytest.raises(ValueError, match=r"metadata has 1 column\(s\) but num_metadata=2"):
            layer(features, metadata[:, :1], labels)
        with pytest.raises(ValueError, match=r"features have 4 channels.*built for 3"):
            build("batch", 3, granularity="channel")(torch.randn(30, 4, 5), metadata, labels)
        with pytest.raises(ValueError, match="features have no values"):
            MetadataNorm(None, 2, 1, estimator="batch")(torch.randn(30, 0), metadata, labels)
        with pytest.raises(TypeError, match="floating-point"):
            layer(features.int(), metadata, labels)

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((0, 1), {}, ValueError, "num_features must be"),
            (((3, -1), 1), {}, ValueError, "num_features must be"),
            (((3, 4), 1), {"granularity": "channel"}, ValueError, r"positive int \(channels\)"),
            ((4, 0), {}, ValueError, "num_metadata must be an int ≥ 1"),
            ((4, 1, -1), {}, ValueError, "num_labels must be an int ≥ 0"),
            ((4, 1), {"granularity": "pixel"}, ValueError, "granularity must be"),
            ((4, 1), {"window": 0}, ValueError, "window must be a positive number of samples, got 0"),
            ((4, 1), {"window": math.nan}, ValueError, "window must be a positive number"),
            (
                (4, 1),
                {"prior": -1.0},
                ValueError,
                "prior must be a finite number, at least 0, got -1",
            ),
            ((4, 1), {"prior": math.nan}, ValueError, "prior must be a finite number"),
            ((4, 1), {"prior": math.inf}, ValueError, "prior must be a finite number"),
            ((4, 1), {"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum'"),
            ((4, 1), {"estimator": "magic"}, ValueError, r"one of \['batch', 'dataset', .*\], got 'magic'"),
            ((4, 1), {"estimator": 3}, TypeError, "estimator must be a name"),
            ((4.0, 1), {}, ValueError, "num_features must be"),
            (("ab", 1), {}, ValueError, "num_features must be"),
            ((True, 1), {}, ValueError, "num_features must be"),
            ((4, 1.0), {}, ValueError, "num_metadata must be an int ≥ 1"),
            ((4, "age"), {}, ValueError, "num_metadata must be an int ≥ 1"),
            ((4, 1), {"channel_dim": "last"}, ValueError, "channel_dim must be an int"),
            ((4, 1), {"window": True}, TypeError, "window must be a number, got True"),
            ((4, 1), {"window": "500"}, TypeError, "window must be a number, got '500'"),
            ((4, 1), {"prior": "weak"}, TypeError, "prior must be a number, got 'weak'"),
            ((4, 1), {"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype"),
        ],
    )
    def test_arguments(self, arguments, options, error, message):
        with pytest.raises(error, match=message):
            MetadataNorm(*arguments, **options)


class TestEstimatorArgument:
    def test_a_class_and_a_partial_bring_their_settings(self):
        layer = MetadataNorm(4, 1, estimator=LeastSquares, center=True)
        assert layer.estimator.coefficients.shape == (2, 4)
        make = functools.partial(LeastSquares, gram="batch", adjoint="batch", averaging=0, window=50)
        assert MetadataNorm(4, 1, estimator=make).estimator.window == 50
        assert MetadataNorm(4, 1, estimator=make, window=70).estimator.window == 70

    def test_further_options_are_the_estimators(self):
        assert MetadataNorm(4, 1, reduction="sum", averaging=0).estimator.reduction == "sum"

    @pytest.mark.parametrize("sizes", [(4, 1), (None, None)])
    def test_settings_that_an_estimator_does_not_have_are_errors_at_once(self, sizes):
        for estimator, option in (("penalty", "window"), ("running", "ridge"), ("batch", "momentum")):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
                MetadataNorm(*sizes, estimator=estimator, **{option: 0.5})

    def test_an_instance_is_refused(self):
        with pytest.raises(TypeError, match=r"must be a name, a subclass .* \(each layer makes its own\)"):
            MetadataNorm(4, 1, estimator=LeastSquares(1, 0, (4,)))

    def test_own_subclass(self):
        class Frozen(Estimator):
            """Removes a coefficient known beforehand."""

            def forward(self, features, batch):
                self.standardise(batch)
                self.coefficients.fill_(2.0)
                return self.evaluate(features, batch.columns[:, self.num_protected :], batch.dims, batch.mask)

        layer = MetadataNorm(4, 1, estimator=Frozen)
        features, metadata = torch.randn(3, 4), torch.randn(3, 1)
        expected = features - 2 * (metadata - metadata.mean()) / metadata.std(correction=0)
        torch.testing.assert_close(layer(features, metadata), expected)
        torch.testing.assert_close(layer.eval()(features, metadata), expected)

    def test_own_subclass_with_state_of_its_own(self):
        """More state is allocated, saved, moved and kept precise."""

        class Extremes(Estimator):
            """Removes the running average of the slope through the batch's extreme metadata."""

            def __init__(self, *sizes, window, **options):
                super().__init__(*sizes, **options)
                self.window = window
                self.add_state("seen", 1, precise=True)

            def forward(self, features, batch):
                self.standardise(batch)
                column = self.rows(batch.columns)[:, self.num_protected]
                low, high = column.argmin(), column.argmax()
                slope = (features[high] - features[low]) / (column[high] - column[low])
                kept, pair = 1 - len(column) / self.window, (self.coefficients, slope.detach().unsqueeze(0))
                advance(self.seen, kept, len(column), pair, eager=True)
                return self.evaluate(features, batch.columns[:, self.num_protected :], batch.dims)

        make = functools.partial(Extremes, window=20)
        layer = MetadataNorm(None, None, None, estimator=make)
        metadata = torch.arange(10.0)
        features = metadata[:, None, None] * torch.ones(3, 2)
        torch.testing.assert_close(layer(features, metadata), torch.full((10, 3, 2), 4.5))
        layer(2 * features, metadata)
        torch.testing.assert_close(layer.coefficients, torch.full((1, 3, 2), 5 / 3))
        other = MetadataNorm(None, None, None, estimator=make).half()
        other.load_state_dict(layer.state_dict())
        assert other.estimator.seen.dtype == torch.float64
        assert torch.equal(other.eval()(features, metadata), layer.eval()(features, metadata))


@pytest.mark.parametrize("estimator", LEAST_SQUARES)
def test_default_window_and_prior(estimator):
    layer = build(estimator, scale=True)
    assert (layer.estimator.window, layer.estimator.prior, layer.spread.window) == (500, 1, 2000)
    layer = build(estimator, scale=True, window=50, prior=0)
    assert (layer.estimator.window, layer.estimator.prior, layer.spread.window) == (50, 0, 50)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sizes", [((6,), None, None), (6, 2, None), (None, 2, 1)])
def test_sizes_known_in_part_with_scale(estimator, sizes):
    layer = prepared(estimator, *sizes, scale=True)
    batch = inputs()
    assert layer(*batch).shape == (30, 6)
    assert layer.eval()(*batch).shape == (30, 6)


def test_sizes_of_numpy_are_ints():
    layer = MetadataNorm((np.int64(3), np.int32(2)), np.int64(1), np.int64(0), channel_dim=np.int64(1))
    assert repr(layer) == repr(MetadataNorm((3, 2), 1, 0))
    assert MetadataNorm(np.int64(4), 1, window=np.float32(50)).num_features == (4,)


def test_repr_names_the_sizes_and_settings():
    text = repr(build("dataset", (3, 4), window=200))
    assert "(3, 4), num_metadata=2, num_labels=1, granularity='element'" in text
    assert "LeastSquares(gram='dataset', adjoint='batch', window=200, prior=1, center=False)" in text
    assert "None, num_metadata=2" in repr(MetadataNorm(None, 2))


def test_metadata_as_numpy_array():
    features, metadata, labels = inputs()
    out = build("batch")(features, metadata.numpy(), labels.numpy())
    torch.testing.assert_close(out, build("batch")(features, metadata, labels))


@pytest.mark.parametrize("estimator", ONE_PASS)
def test_gradcheck_through_the_layer(estimator):
    layer = prepared(estimator, 3, **published(estimator)).double()
    features, metadata, labels = inputs(8, (3,))
    assert torch.autograd.gradcheck(
        lambda f: layer(f, metadata, labels), features.double().requires_grad_(), nondet_tol=0
    )


@pytest.mark.parametrize(("estimator", "scale"), [*((name, False) for name in ESTIMATORS), ("running", True)])
@pytest.mark.parametrize("training", [True, False])
# Raised inside torch while it traces any autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph(estimator, scale, training):
    torch._dynamo.reset()
    # While the decay rises, that of compiled code is ahead by a batch.
    options = {} if estimator == "penalty" else {"rise": 0}
    layer = prepared(estimator, scale=scale, **options).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for n in (30, 7):
        features, metadata, labels = inputs(n)
        a, b = features.clone().requires_grad_(), features.clone().requires_grad_()
        expected, actual = layer(a, metadata, labels), compiled(b, metadata, labels)
        torch.testing.assert_close(actual, expected)
        expected.pow(2).sum().backward()
        actual.pow(2).sum().backward()
        torch.testing.assert_close(b.grad, a.grad)
    # Features of a frozen network.
    torch.testing.assert_close(compiled(features, metadata, labels), layer(features, metadata, labels))
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_numbers_and_tensors_give_the_same(estimator, scale, monkeypatch):
    """Weights that can be read at once are numbers, as on no GPU."""
    layer = prepared(estimator, granularity="channel", scale=scale, dtype=torch.float64)
    twin, results = copy.deepcopy(layer), []
    batches = [inputs(n, (6, 3)) for n in (30, 7, 0, 1)]
    for each, eager in ((layer, True), (twin, False)):
        torch.manual_seed(1)
        monkeypatch.setattr("mdnorm.layer.is_eager", lambda tensor, eager=eager: eager)
        for features, metadata, labels in batches:
            leaf, count = features.double().requires_grad_(), len(features)
            out = each(leaf, metadata, labels, torch.rand(count), torch.rand(count, 3) > 0.3)
            out.backward(torch.randn_like(out))
            results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[4:], results[:4], rtol=1e-9, atol=1e-12)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unchecked_nan_in_the_first_batch(estimator, scale):
    layer = (prepared if estimator in NEED_GRAM else build)(estimator, scale=scale, check_finite=False)
    twin = copy.deepcopy(layer)
    features, metadata, labels = inputs()
    metadata[3, 1] = math.nan
    layer(features, metadata, labels)
    batch = inputs()
    assert torch.equal(layer(*batch), twin(*batch))
    for key, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


@pytest.mark.parametrize("estimator", ["dataset", "batch", "running", "recursive"])
@pytest.mark.parametrize("huge", [1e30, 1e200])
def test_unchecked_overflow_is_silent(estimator, huge):
    layer = build(estimator, 4, 1, 0, check_finite=False)
    fit_gram(layer, torch.arange(10.0))
    # A warning would be an error here.
    assert layer(torch.randn(4, 4), np.array([huge, -huge, 0.0, 1.0])).shape == (4, 4)
    layer(torch.randn(9, 4), torch.randn(9))
    assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


@pytest.mark.parametrize("prior", [0, 1])
@pytest.mark.parametrize("estimator", ["batch", "running"])
def test_one_sample_that_all_else_is_forgotten_for_stays_as_it_is(estimator, prior):
    """Wherever the first batch put the origin of the columns."""
    layer = build(estimator, k_m=4, k_y=2, window=1, prior=prior, dtype=torch.float64)
    layer(*(part.double() for part in inputs(30, k_m=4, k_y=2)))
    for _ in range(20):
        features, metadata, labels = (part.double() for part in inputs(1, k_m=4, k_y=2))
        out = layer(features, 10 * metadata, 10 * labels)
        torch.testing.assert_close(out, features, atol=1e-9, rtol=0)


def test_in_place_changes_of_the_state_are_counted():
    """What autograd and functionalisation go by."""
    layer = build("running", 4, 1, 0)
    buffers = dict(layer.named_buffers())
    before = {name: buffer._version for name, buffer in buffers.items()}
    layer(torch.randn(9, 4), torch.randn(9))
    for name in ("coefficients", "mean", "gram", "cross", "weight"):
        assert buffers[f"estimator.{name}"]._version > before[f"estimator.{name}"]


@pytest.mark.parametrize("scale", [False, True])
def test_evaluation_in_a_recorded_graph(scale):
    layer = build("running", 4, 1, 0, scale=scale, check_finite=False)
    layer(torch.randn(9, 4), torch.randn(9, 1))
    layer.eval()
    features, one, two = torch.randn(5, 4), torch.randn(5, 1), torch.randn(5, 1)
    graph = make_fx(lambda f, m: layer(f, m))(features, one)
    torch.testing.assert_close(graph(features, two), layer(features, two))


class TestTracing:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize(
        "kind", ["(N, D)", "(N, C, H, W)", "(N, C, L) by channel", "tokens (N, T, D) by channel"]
    )
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_of_evaluation_serves_another_batch_size(self, estimator, kind):
        shape, granularity, channel_dim = INPUTS[kind]
        size = shape if granularity == "element" else shape[0 if channel_dim == 1 else -1]
        layer = prepared(estimator, size, granularity=granularity, channel_dim=channel_dim, scale=True)
        layer(*inputs(30, shape))
        traced = torch.jit.trace(layer.eval(), inputs(9, shape)[:2])
        for n in (9, 4, 1):
            features, metadata, _ = inputs(n, shape)
            torch.testing.assert_close(traced(features, metadata), layer(features, metadata), atol=0, rtol=0)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_of_a_model_that_takes_its_metadata(self):
        """As for the graph of TensorBoard."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.norm, self.last = nn.Linear(5, 6), build("running", k_y=0), nn.Linear(6, 1)

            def forward(self, features, metadata):
                return self.last(self.norm(self.first(features), metadata))

        model = Model()
        model(torch.randn(20, 5), torch.randn(20, 2))
        traced = torch.jit.trace(model.eval(), (torch.randn(7, 5), torch.randn(7, 2)))
        batch = torch.randn(3, 5), torch.randn(3, 2)
        torch.testing.assert_close(traced(*batch), model(*batch))


class TestWeights:
    @pytest.mark.parametrize("estimator", LEAST_SQUARES)
    def test_evaluation_is_weighted_least_squares_over_all_batches(self, estimator):
        """Of statsmodels, where nothing is forgotten and there is no prior."""
        layer = build(estimator, 3, window=math.inf, prior=0, dtype=torch.float64)
        features, metadata, labels = (part.double() for part in inputs(100, (3,)))
        weights = torch.rand(100).double() * (torch.arange(100) % 5)
        features[weights == 0] = 1e6
        fit_gram(layer, metadata, labels, weights)
        for batch in torch.arange(100).split([40, 8, 1, 51]):
            out = layer(features[batch], metadata[batch], labels[batch], weights[batch])
            if estimator == "batch" and len(batch) > 1:
                expected = self.expected(*(part[batch] for part in (features, metadata, labels, weights)))
                np.testing.assert_allclose(out, expected, atol=1e-10, rtol=1e-12)
        expected = self.expected(features, metadata, labels, weights)
        out = layer.eval()(features, metadata)
        np.testing.assert_allclose(out, expected, atol=1e-10, rtol=1e-12)

    @staticmethod
    def expected(features, metadata, labels, weights):
        design = design_matrix(metadata, labels)
        fits = [sm.WLS(column, design, weights.numpy()).fit().params[:2] for column in features.numpy().T]
        return features.numpy() - (metadata.numpy() - np.average(metadata, 0, weights)) @ np.stack(fits, 1)

    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_zero_is_a_row_left_out_and_two_a_row_twice(self, estimator, scale):
        layer = prepared(estimator, scale=scale, dtype=torch.float64, **published(estimator))
        twin = copy.deepcopy(layer)
        for n in (30, 9):
            features, metadata, labels = (part.double() for part in inputs(n))
            weights, probe = torch.arange(n) % 3, torch.randn(n, 6).double()
            rows = torch.arange(n).repeat_interleave(weights)
            last = rows.diff(append=torch.tensor([n])) > 0
            one, two = (features.clone().requires_grad_() for _ in range(2))
            weighted = layer(one, metadata, labels, weights)
            repeated = twin(two[rows], metadata[rows], labels[rows])
            torch.testing.assert_close(weighted[weights > 0], repeated[last], atol=1e-10, rtol=1e-10)
            (weighted * probe)[weights > 0].sum().backward()
            (repeated[last] * probe[weights > 0]).sum().backward()
            torch.testing.assert_close(one.grad, two.grad, atol=1e-10, rtol=1e-10)
            if estimator == "penalty":
                losses = [penalty_loss(each) for each in (layer, twin)]
                torch.testing.assert_close(*losses)
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value, atol=1e-9, rtol=1e-9, msg=key)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_errors_leave_the_state(self, estimator):
        layer = prepared(estimator)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        features, metadata, labels = inputs(4)
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=r"weights must be finite and not negative: row\(s\) \[2\]"):
                layer(features, metadata, labels, torch.tensor([1, 1, bad, 1]))
        with pytest.raises(ValueError, match="weights has 3 rows but there are 4 samples"):
            layer(features, metadata, labels, torch.ones(3))
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


PADDED = {
    "(N, T, D)": ((5, 6), -1, slice(1, -1)),
    "(N, C, L)": ((6, 5), 1, slice(2, None)),
    "(N, C, H, W)": ((6, 2, 3), 1, slice(2, None)),
}


@pytest.mark.parametrize("kind", PADDED)
class TestMask:
    def padded(self, kind, n=20):
        """A batch in which one sample has no true position and one has all."""
        shape, _, positions = PADDED[kind]
        features, metadata, labels = (part.double() for part in inputs(n, shape))
        mask = torch.rand(n, *features.shape[positions]) > 0.4
        mask[0], mask[1] = False, True
        return features, metadata, labels, mask

    def layer(self, kind, estimator, **options):
        return prepared(
            estimator, granularity="channel", channel_dim=PADDED[kind][1], dtype=torch.float64, **options
        )

    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_true_positions_are_rows(self, kind, estimator, scale):
        """Each weighs its share of a sample; the layer for rows gets them without any position."""
        channel_dim = PADDED[kind][1]
        options = {"scale": scale, **published(estimator)}
        layer = self.layer(kind, estimator, **options)
        by_row = MetadataNorm(6, 2, 1, estimator=estimator, dtype=torch.float64, **options)
        by_row.load_state_dict(layer.state_dict())
        for _ in range(2):
            features, metadata, labels, mask = self.padded(kind)
            sample = mask.nonzero()[:, 0]
            weights = torch.full((len(sample),), 1 / mask[0].numel(), dtype=torch.float64)
            one, two = (features.clone().requires_grad_() for _ in range(2))
            out = layer(one, metadata, labels, mask=mask)
            rows = by_row(two.movedim(channel_dim, -1)[mask], metadata[sample], labels[sample], weights)
            torch.testing.assert_close(out.movedim(channel_dim, -1)[mask], rows, atol=1e-10, rtol=1e-10)
            probe = torch.randn_like(rows)
            (out.movedim(channel_dim, -1)[mask] * probe).sum().backward()
            (rows * probe).sum().backward()
            torch.testing.assert_close(one.grad, two.grad, atol=1e-10, rtol=1e-10)
            if estimator == "penalty" and not scale:
                torch.testing.assert_close(penalty_loss(layer), penalty_loss(by_row))
        for key, value in by_row.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value, atol=1e-9, rtol=1e-9, msg=key)
        out = layer.eval()(features, metadata, mask=mask).movedim(channel_dim, -1)
        rows = by_row.eval()(features.movedim(channel_dim, -1)[mask], metadata[sample])
        torch.testing.assert_close(out[mask], rows, atol=1e-10, rtol=1e-10)
        assert torch.equal(out[~mask], features.movedim(channel_dim, -1)[~mask])

    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_nan_in_the_padding_reaches_nothing(self, kind, estimator, scale):
        channel_dim = PADDED[kind][1]
        layer = self.layer(kind, estimator, scale=scale)
        twin = copy.deepcopy(layer)
        features, metadata, labels, mask = self.padded(kind)
        outs = []
        for each, value in ((layer, 0.0), (twin, math.nan)):
            filled = torch.where(mask.unsqueeze(channel_dim), features, value).requires_grad_()
            out = each(filled, metadata, labels, mask=mask).movedim(channel_dim, -1)
            loss = out[mask].square().sum() + (penalty_loss(each) if estimator == "penalty" else 0)
            loss.backward()
            evaluated = each.eval()(filled, metadata, mask=mask).movedim(channel_dim, -1)
            for padding in (out[~mask], evaluated[~mask]):
                np.testing.assert_array_equal(padding.detach(), value)
            outs.append((out[mask].detach(), filled.grad, evaluated[mask].detach()))
        torch.testing.assert_close(outs[1], outs[0], atol=0, rtol=0)
        for key, value in layer.state_dict().items():
            assert torch.equal(twin.state_dict()[key], value), key

    @pytest.mark.parametrize("training", [True, False])
    def test_errors(self, kind, training):
        layer = self.layer(kind, "running").train(training)
        features, metadata, labels, mask = self.padded(kind)
        for wrong in (mask[1:], mask[..., 1:], mask.unsqueeze(-1), torch.ones(features.shape)):
            with pytest.raises(ValueError, match=r"mask must have shape \(20, .*\), samples and positions"):
                layer(features, metadata, labels, mask=wrong)
        by_element = prepared("running", PADDED[kind][0], dtype=torch.float64).train(training)
        with pytest.raises(ValueError, match="needs granularity='channel' and features with positions"):
            by_element(features, metadata, labels, mask=mask)


class TestTensorsOfOthers:
    class Tagged(torch.Tensor):
        """Like MONAI's MetaTensor: what is computed from it carries something about each of its samples."""

        @staticmethod
        def of(tensor):
            tagged = tensor.as_subclass(TestTensorsOfOthers.Tagged)
            tagged.tags = list(range(len(tensor)))
            return tagged

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            tags = [arg.tags for arg in args if isinstance(arg, cls)]
            if isinstance(out, cls) and tags:
                # One for each sample of a batch; anything of another length has lost them.
                out.tags = [tags[0][i] for i in range(len(out))] if out.ndim else []
            return out

    @staticmethod
    def meta_tensor(tensor):
        data = pytest.importorskip("monai.data")
        volumes = [
            data.MetaTensor(row, affine=torch.eye(4), meta={"filename_or_obj": "a.nii"}) for row in tensor
        ]
        return data.list_data_collate(volumes)

    @pytest.mark.parametrize("kind", ["subclass", "parameter", "MONAI"])
    @pytest.mark.parametrize("n", [1, 2, 4])
    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_are_taken_as_plain_ones(self, estimator, scale, n, kind):
        wrap = {"subclass": self.Tagged.of, "parameter": nn.Parameter, "MONAI": self.meta_tensor}[kind]
        layer = prepared(estimator, (2, 3, 2), scale=scale)
        twin = copy.deepcopy(layer)
        for _ in range(2):
            features, metadata, labels = inputs(n, (2, 3, 2))
            plain, wrapped = features.clone().requires_grad_(), wrap(features.clone()).requires_grad_()
            weights = torch.rand(n)
            given = metadata if kind == "parameter" else wrap(metadata)
            expected = twin(plain, metadata, labels, weights)
            out = layer(wrapped, given, wrap(labels), wrap(weights))
            assert type(out) is torch.Tensor
            assert torch.equal(out, expected)
            out.square().sum().backward()
            expected.square().sum().backward()
            assert torch.equal(torch.as_tensor(wrapped.grad).as_subclass(torch.Tensor), plain.grad)
        for key, value in layer.state_dict().items():
            assert type(value) is torch.Tensor
            assert torch.equal(value, twin.state_dict()[key]), key
        out = layer.eval()(wrapped, given)
        assert type(out) is torch.Tensor
        assert torch.equal(out, twin.eval()(plain, metadata))

    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_masks_and_stateless(self, n):
        features, metadata, _ = inputs(n, (5, 3))
        mask, options = torch.rand(n, 5) > 0.3, {"granularity": "channel", "channel_dim": -1}
        expected = metadata_norm(features, metadata, mask=mask, **options)
        wrap = self.Tagged.of
        out = metadata_norm(wrap(features), wrap(metadata), mask=wrap(mask), **options)
        assert type(out) is torch.Tensor
        assert torch.equal(out, expected)

    @pytest.mark.parametrize("n", [1, 2, 4])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*was recalibrated on:UserWarning")
    def test_a_batch_of_monais_own_loader(self, n):
        data = pytest.importorskip("monai.data")
        generator = torch.Generator().manual_seed(0)
        rows = [
            {
                "image": data.MetaTensor(torch.randn(1, 4, 4, 4, generator=generator), affine=torch.eye(4)),
                "age": torch.rand(1, generator=generator),
                "label": torch.tensor([float(i % 2)]),
            }
            for i in range(8)
        ]
        model = nn.Sequential(nn.Conv3d(1, 3, 3), nn.Flatten(), nn.Linear(24, 5))
        mdnorm.insert(model, after="0", num_metadata=1, num_labels=1)
        plain = copy.deepcopy(model)
        loader = data.DataLoader(data.Dataset(rows), batch_size=n)
        for batch in loader:
            assert isinstance(batch["image"], data.MetaTensor)
            age, label = batch["age"], batch["label"]
            with mdnorm.metadata(model, age, label), mdnorm.metadata(plain, age, label):
                out = model(batch["image"])
                expected = plain(batch["image"].as_tensor())
            assert torch.equal(torch.as_tensor(out), expected)
            out.sum().backward()
        for recalibrated in (False, True):
            if recalibrated:
                batches = [(batch["image"], batch["age"], batch["label"]) for batch in loader]
                mdnorm.recalibrate(model, batches, progress=False)
                mdnorm.recalibrate(
                    plain, [(image.as_tensor(), *rest) for image, *rest in batches], progress=False
                )
            with mdnorm.metadata(model.eval(), age), mdnorm.metadata(plain.eval(), age):
                out, expected = model(batch["image"]), plain(batch["image"].as_tensor())
            assert torch.equal(torch.as_tensor(out), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestNested:
    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_each_sequence_is_corrected(self, estimator, layout, scale):
        layer = prepared(estimator, 4, granularity="channel", channel_dim=-1, scale=scale)
        layer(*inputs(30, (5, 4)))
        layer.eval()
        sequences, metadata = [torch.randn(length, 4) for length in (3, 5, 1)], torch.randn(3, 2)
        nested = torch.nested.nested_tensor(sequences, layout=layout)
        out = layer(nested, metadata)
        assert out.layout == layout
        for part, sequence, row in zip(out.unbind(), sequences, metadata, strict=True):
            torch.testing.assert_close(part, layer(sequence[None], row[None])[0])
        # As behind a residual connection.
        assert (out + nested).is_nested

    def test_in_the_encoder_of_torch(self):
        """Which makes nested tensors of padded ones in evaluation."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 3)})
        mdnorm.insert(model, after="encoder.layers.1", num_metadata=1, granularity="channel", channel_dim=-1)
        encoder, kinds = model["encoder"], []
        features, metadata = torch.randn(6, 5, 8), torch.randn(6)
        padding = torch.arange(5) >= torch.tensor([5, 2, 3, 4, 5, 1])[:, None]
        with mdnorm.metadata(model, metadata, mask=~padding):
            encoder(features, src_key_padding_mask=padding)
        model.eval()
        layer = next(module for module in model.modules() if isinstance(module, MetadataNorm))
        layer.register_forward_hook(lambda module, arguments, out: kinds.append(arguments[0].is_nested))
        with mdnorm.metadata(model, metadata, mask=~padding):
            padded = encoder(features, src_key_padding_mask=padding)
            with torch.no_grad():
                nested = encoder(features, src_key_padding_mask=padding)
        assert kinds == [False, True]
        torch.testing.assert_close(nested[~padding], padded[~padding])

    def test_errors(self):
        nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.strided)
        layer = MetadataNorm(4, 1, granularity="channel", channel_dim=-1)
        with pytest.raises(ValueError, match=r"need .*eval.* and granularity='channel'; .* mask="):
            layer(nested, torch.randn(2))
        with pytest.raises(ValueError, match=r"need .*eval.* and granularity='channel'"):
            MetadataNorm(4, 1).eval()(nested, torch.randn(2))
        with pytest.raises(ValueError, match="metadata has 3 rows but there are 2 samples"):
            layer.eval()(nested, torch.randn(3))


class TestGradientOfMetadata:
    @pytest.mark.parametrize(
        "kind", ["(N, D)", "(N, C, L)", "(N, C, L) by channel", "tokens (N, T, D) by channel"]
    )
    @pytest.mark.parametrize(("scale", "center"), [(False, False), (True, False), (False, True)])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_in_evaluation(self, estimator, scale, center, kind):
        shape, granularity, channel_dim = INPUTS[kind]
        size = shape if granularity == "element" else shape[0 if channel_dim == 1 else -1]
        options = {"granularity": granularity, "channel_dim": channel_dim, "center": center}
        layer = prepared(estimator, size, scale=scale, **options).double()
        layer(*(part.double() for part in inputs(30, shape)))
        features, metadata, _ = (part.double() for part in inputs(3, shape))
        leaves = features.requires_grad_(), metadata.requires_grad_()
        assert torch.autograd.gradcheck(layer.eval(), leaves)
        (gradient,) = torch.autograd.grad(layer(*leaves).square().sum(), metadata)
        assert gradient.abs().max() > 1e-3

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_in_training_is_an_error(self, estimator):
        layer = prepared(estimator)
        features, metadata, labels = inputs()
        metadata.requires_grad_()
        with pytest.raises(ValueError, match=r"metadata\.requires_grad is True.*metadata\.detach\(\)"):
            layer(features, metadata, labels)
        with torch.no_grad():
            assert not layer(features, metadata, labels).requires_grad
        labels.requires_grad_()
        assert not layer(features, metadata.detach(), labels).requires_grad


class TestLargeMetadata:
    @pytest.mark.parametrize("estimator", ["batch", "running", "recursive"])
    @pytest.mark.parametrize("name", ["metadata", "labels"])
    def test_whose_squares_overflow_are_an_error(self, estimator, name):
        layer = build(estimator)
        batch = dict(zip(["features", "metadata", "labels"], inputs(), strict=True))
        layer(**batch)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        batch[name] = batch[name].double()
        batch[name][7, 0] = -1e160
        message = rf"{name} has values up to 1e\+160 in column 0, whose squares overflow.* larger unit"
        with pytest.raises(ValueError, match=message):
            layer(**batch)
        if name == "metadata":
            with pytest.raises(ValueError, match=message):
                layer.eval()(**batch)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("estimator", LEAST_SQUARES)
    @pytest.mark.parametrize("unit", [1e-150, 1e150])
    def test_the_unit_does_not_matter(self, estimator, unit, dtype):
        layer, twin = (build(estimator, dtype=dtype, scale=True) for _ in range(2))
        parts = [part.to(dtype) for part in inputs()]
        for each, factor in ((layer, 1.0), (twin, unit)):
            fit_gram(each, parts[1].double() * factor, parts[2])
        for training in (True, True, False):
            features, metadata, labels = (part.to(dtype) for part in inputs())
            expected = layer.train(training)(features, metadata, labels)
            out = twin.train(training)(features, metadata.double() * unit, labels)
            torch.testing.assert_close(out, expected)
        if dtype == torch.float64:
            torch.testing.assert_close(twin.coefficients * unit, layer.coefficients)


class TestSizes:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_there_is_no_estimator_until_all_are_known(self, estimator):
        layer = build(estimator, None, None, None, scale=True)
        assert layer.estimator is None
        assert layer.spread is None
        assert not layer.state_dict()
        with pytest.raises(RuntimeError, match="has no coefficients before its first batch"):
            layer.coefficients  # noqa: B018
        features, metadata, labels = inputs()
        fit_gram(layer, metadata, labels)
        assert (layer.num_features, layer.num_metadata, layer.num_labels, layer.estimator) == (
            None,
            2,
            1,
            None,
        )
        layer(features, metadata, labels)
        assert layer.num_features == (6,)
        assert layer.estimator.origin.shape == (4,)
        assert layer.spread.num_features == (6,)

    def test_all_given_make_it_at_birth(self):
        layer = MetadataNorm((3, 4), 2)
        assert layer.num_labels == 0
        assert layer.estimator.coefficients.shape == (2, 3, 4)
        assert layer.coefficients.shape == (2, 3, 4)

    def test_no_labels_in_the_first_batch_are_no_label_columns(self):
        layer = MetadataNorm(None, None, None)
        layer(torch.randn(9, 4), torch.randn(9, 2))
        assert layer.num_labels == 0
        with pytest.raises(ValueError, match="num_labels=0"):
            layer(torch.randn(9, 4), torch.randn(9, 2), torch.randn(9))

    def test_an_error_in_the_first_batch_leaves_them_open(self):
        layer = MetadataNorm(None, None, None)
        with pytest.raises(ValueError, match="metadata has 8 rows"):
            layer(torch.randn(9, 4), torch.randn(8, 2))
        assert layer.estimator is None
        assert layer.num_features is None

    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("how", ["deepcopy", "torch.save", "half", "to_empty"])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_of_a_layer_that_moves(self, estimator, how, granularity, trained):
        layer = build(estimator, None, None, None, granularity=granularity, center=True, scale=True)
        fit_gram(layer, *inputs(100)[1:])
        if trained:
            step(layer, *inputs(shape=(6, 2)))
        other = copy.deepcopy(layer)
        if how == "torch.save":
            buffer = io.BytesIO()
            torch.save(layer, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        elif how == "half":
            other.half()
        elif how == "to_empty":
            other.to("meta").to_empty(device="cpu")
            other.reset_parameters()
            other.load_state_dict(layer.state_dict())
        assert (other.num_features, other.num_metadata, other.num_labels) == (layer.num_features, 2, 1)
        assert (other.estimator is None) == (not trained)
        batch = inputs(shape=(6, 2))
        assert torch.equal(other(*batch), layer(*batch))
        for key, value in layer.state_dict().items():
            assert other.state_dict()[key].dtype == value.dtype, key
            assert torch.equal(other.state_dict()[key], value), key


def test_calls_of_a_training_step():
    """Of a warm default layer: beside its small products, calls are most of what a step costs."""
    layer = MetadataNorm(64, 3, 1)
    features, metadata, labels = (
        torch.randn(32, 64, requires_grad=True),
        torch.randn(32, 3),
        torch.randn(32, 1),
    )

    def train():
        layer(features, metadata, labels).sum().backward()

    for _ in range(3):
        train()
    package, calls = str(Path(mdnorm.__file__).parent), collections.Counter()

    def look(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls[frame.f_code.co_filename] += 1

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        train()
    finally:
        sys.setprofile(before)
    assert 10 < calls.total() <= 60, calls
    assert len(calls) <= 5, calls
