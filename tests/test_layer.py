import copy
import io

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from mdnorm import MetadataNorm, fit_gram, penalty_loss
from mdnorm.estimators import BatchEstimator, DatasetEstimator, Estimator
from reference import residual

ESTIMATORS = ["batch", "dataset", "running", "recursive", "penalty"]
AVERAGING = [name for name in ESTIMATORS if name != "penalty"]
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


def prepared(estimator, *args, **options):
    layer = build(estimator, *args, **options)
    _, metadata, labels = inputs(100)
    fit_gram(layer, metadata, labels)
    if estimator == "penalty" and layer.estimator.weight is not None:
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
    layer = MetadataNorm(3, 1, 1, estimator=estimator, momentum=None, dtype=torch.float64)
    fit_gram(layer, metadata, label)
    for part in torch.arange(4000).split(64):
        step(layer, features[part], metadata[part], label[part])
    out = layer.eval()(features, metadata)
    np.testing.assert_allclose(layer.estimator.coefficients, truth, atol=0.02)
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
def test_functional_call_leaves_the_layers_own_state(estimator):
    layer = prepared(estimator)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    torch.func.functional_call(layer, state, inputs())
    assert not layer.estimator.coefficients.any()
    assert state["estimator.coefficients"].any()


def test_averaged_copies_evaluate():
    layer = prepared("dataset")
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    layer(*inputs())
    averaged.update_parameters(layer)
    features, metadata, _ = inputs()
    assert averaged.eval()(features, metadata).shape == features.shape


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_first_batch(estimator):
    layer = prepared(estimator)
    assert layer(*inputs(0)).shape == (0, 6)
    assert estimator == "penalty" or not layer.estimator.coefficients.any()
    layer(*inputs())
    assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


def test_evaluation_before_training_changes_nothing():
    for layer in (build("batch"), MetadataNorm(None, None, None)):
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

    @pytest.mark.parametrize("estimator", ["dataset", "recursive", "penalty"])
    def test_gram_survives_saving_before_the_first_batch_of_a_lazy_layer(self, estimator):
        layer = prepared(estimator, None, None, None)
        other = build(estimator, None, None, None)
        other.load_state_dict(layer.state_dict())
        batch = inputs()
        assert torch.equal(layer(*batch), other(*batch))

    def test_keys_and_version_are_stable(self):
        state = build("dataset").state_dict()
        assert list(state) == [
            "estimator.num_columns",
            "estimator.gram_mean",
            "estimator.gram_covariance",
            "estimator.gram_count",
            "estimator.coefficients",
            "estimator.weight",
        ]
        assert [key for key in build("batch").state_dict() if key not in state] == [
            "estimator.feature_mean",
            "estimator.cross_covariance",
        ]
        added = {
            "running": [
                "feature_mean",
                "cross_covariance",
                "adjoint",
                "adjoint_weight",
                "coefficients_weight",
            ],
            "recursive": ["factor", "all_coefficients", "column_mean", "column_scale"],
            "penalty": ["weight"],
        }
        base = set(build("batch").state_dict()) & set(state)
        for estimator, names in added.items():
            keys = set(build(estimator).state_dict())
            assert keys == base | {f"estimator.{name}" for name in names}
        scale = [key for key in build("batch", scale=True).state_dict() if key.startswith("scale_estimator")]
        assert [key.removeprefix("scale_estimator.") for key in scale] == [
            "num_columns",
            "gram_mean",
            "gram_covariance",
            "gram_count",
            "coefficients",
            "feature_mean",
            "cross_covariance",
            "log_mean",
            "log_cross_covariance",
            "log_gram_mean",
            "log_gram_covariance",
            "log_gram_count",
        ]
        assert state._metadata["estimator"] == {"version": 1}

    def test_a_checkpoint_from_the_future_is_refused(self):
        layer = build("dataset")
        state = layer.state_dict()
        state._metadata["estimator"]["version"] = 99
        with pytest.raises(RuntimeError, match="version 99"):
            layer.load_state_dict(state)

    def test_another_estimator_or_size_is_refused(self):
        with pytest.raises(RuntimeError, match=r"estimator\.feature_mean"):
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
        layer.estimator.reset()
        for key, value in fresh.state_dict().items():
            assert torch.equal(layer.state_dict()[key], value), key

    @pytest.mark.parametrize("estimator", AVERAGING)
    def test_momentum_is_weighted_by_samples(self, estimator):
        """A last batch of one sample must not count like a whole batch."""
        layer = prepared(estimator)
        for _ in range(5):
            layer(*inputs(1000))
        before = layer.estimator.coefficients.clone()
        features, metadata, labels = inputs(1)
        layer(features + 100, metadata, labels)
        change = (layer.estimator.coefficients - before).abs().max()
        assert change < 0.1

    @pytest.mark.parametrize("estimator", AVERAGING)
    def test_window_is_a_momentum_that_follows_the_batch_size(self, estimator):
        _, metadata, labels = inputs(100)
        layers = [
            build(estimator, **memory) for memory in ({"window": 100}, {"momentum": 0.2}, {"momentum": 1.0})
        ]
        by_window, by_momentum, forgetful = layers
        fit_gram(nn.ModuleList(layers), metadata, labels)
        for _ in range(4):
            batch = inputs(20)
            by_window(*batch)
            by_momentum(*batch)
        for key, value in by_momentum.state_dict().items():
            torch.testing.assert_close(by_window.state_dict()[key], value)
        beyond_the_window = inputs(150)
        by_window(*beyond_the_window)
        forgetful(*beyond_the_window)
        torch.testing.assert_close(by_window.estimator.coefficients, forgetful.estimator.coefficients)
        assert "window=100" in repr(by_window)

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
    whole(features, metadata, labels)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    ruined = metadata.clone()
    ruined[3, 1] = float("nan")
    features.requires_grad_()
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
            outs.append(build("batch", k_y=3)(features, metadata, labels))
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
        with pytest.raises(ValueError, match=r"integers from 0 to 2 .* give num_labels"):
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
            ((4, 1), {"momentum": 0.0}, ValueError, "momentum must be in"),
            ((4, 1), {"momentum": 1.5}, ValueError, "momentum must be in"),
            ((4, 1), {"window": 0}, ValueError, "window must be"),
            ((4, 1), {"window": float("inf")}, ValueError, "window must be"),
            ((4, 1), {"ridge": -1.0}, ValueError, "ridge must be"),
            ((4, 1), {"ridge": float("nan")}, ValueError, "ridge must be"),
            ((4, 1), {"estimator": "magic"}, ValueError, r"one of \['batch', 'dataset', .*\], got 'magic'"),
            ((4, 1), {"momentum": "often"}, ValueError, "momentum must be in"),
            ((4, 1), {"estimator": "recursive", "ridge": 0.1}, ValueError, "takes no ridge"),
            ((4, 1), {"estimator": 3}, TypeError, "estimator must be a name"),
            ((4.0, 1), {}, ValueError, "num_features must be"),
            (("ab", 1), {}, ValueError, "num_features must be"),
            ((True, 1), {}, ValueError, "num_features must be"),
            ((4, 1.0), {}, ValueError, "num_metadata must be an int ≥ 1"),
            ((4, "age"), {}, ValueError, "num_metadata must be an int ≥ 1"),
            ((4, 1), {"channel_dim": "last"}, ValueError, "channel_dim must be an int"),
            ((4, 1), {"momentum": True}, TypeError, "momentum must be a number, None or 'auto', got True"),
            ((4, 1), {"window": "500"}, TypeError, "window must be a number or None, got '500'"),
            ((4, 1), {"ridge": None}, TypeError, "ridge must be a number, got None"),
            ((4, 1), {"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype"),
        ],
    )
    def test_arguments(self, arguments, options, error, message):
        with pytest.raises(error, match=message):
            MetadataNorm(*arguments, **options)


class TestEstimatorArgument:
    def test_instance_brings_its_settings(self):
        layer = MetadataNorm(4, 1, estimator=BatchEstimator(momentum=0.5, ridge=0.1, center=True))
        assert layer.estimator.coefficients.shape == (2, 4)
        assert layer.estimator.momentum == 0.5

    def test_instance_goes_where_the_layer_is_asked_to_be(self):
        layer = MetadataNorm(4, 1, estimator=BatchEstimator(), dtype=torch.float64, device="meta")
        assert layer.estimator.coefficients.dtype == torch.float64
        assert layer.estimator.coefficients.is_meta

    def test_instance_of_a_layer_of_unknown_sizes_is_taken_too(self):
        estimator = BatchEstimator()
        first = MetadataNorm(None, None, estimator=estimator)
        with pytest.raises(ValueError, match="already serves a layer"):
            MetadataNorm(None, None, estimator=estimator)
        assert copy.deepcopy(first).estimator is not estimator

    def test_instance_serves_one_layer(self):
        estimator = DatasetEstimator()
        MetadataNorm(4, 1, estimator=estimator)
        with pytest.raises(ValueError, match="an instance of its own"):
            MetadataNorm(4, 1, estimator=estimator)

    def test_own_subclass(self):
        class Frozen(Estimator):
            """Removes a coefficient known beforehand."""

            name = "frozen"

            def forward(self, features, columns, positions):
                self.coefficients.fill_(2.0)
                return self.evaluate(features, columns[:, : self.num_metadata], positions)

        layer = MetadataNorm(4, 1, estimator=Frozen())
        features, metadata = torch.randn(3, 4), torch.randn(3, 1)
        torch.testing.assert_close(layer(features, metadata), features - 2 * metadata)
        torch.testing.assert_close(layer.eval()(features, metadata), features - 2 * metadata)

    def test_own_subclass_with_state_of_its_own(self):
        """What CONTRIBUTING.md promises: more state is allocated, saved, moved and kept precise."""

        class Median(Estimator):
            """Removes the running average of the slope through the batch's extreme metadata."""

            name = "extremes"
            precise = Estimator.precise | {"seen"}

            def state_shapes(self, num_metadata, num_labels, feature_shape):
                return super().state_shapes(num_metadata, num_labels, feature_shape) | {"seen": (1,)}

            def forward(self, features, columns, positions):
                low, high = columns[:, 0].argmin(), columns[:, 0].argmax()
                rise = (features[high] - features[low]) / (columns[high, 0] - columns[low, 0])
                slope, count = self.usable(rise.detach().flatten().unsqueeze(0), len(columns))
                self.seen.mul_(self.decay(count)).add_(count)
                self.coefficients.flatten(1).lerp_(slope, (count / self.seen).to(slope.dtype))
                return self.evaluate(features, columns[:, : self.num_metadata], positions)

        layer = MetadataNorm(None, None, None, estimator=Median(window=20))
        metadata = torch.arange(10.0)
        features = metadata[:, None, None] * torch.ones(3, 2)
        assert layer(features, metadata).abs().max() == 0
        layer(2 * features, metadata)
        torch.testing.assert_close(layer.estimator.coefficients, torch.full((1, 3, 2), 5 / 3))
        other = MetadataNorm(None, None, None, estimator=Median(window=20)).half()
        other.load_state_dict(layer.state_dict())
        assert other.estimator.seen.dtype == torch.float64
        assert torch.equal(other.eval()(features, metadata), layer.eval()(features, metadata))


@pytest.mark.parametrize(
    ("estimator", "momentum", "window"),
    [
        ("batch", 0.1, None),
        ("dataset", 0.1, None),
        ("running", None, 500),
        ("recursive", None, 500),
    ],
)
def test_auto_momentum(estimator, momentum, window):
    chosen = build(estimator).estimator
    assert (chosen.momentum, chosen.window) == (momentum, window)
    assert build(estimator, window=50).estimator.window == 50
    cumulative = build(estimator, momentum=None).estimator
    assert (cumulative.momentum, cumulative.window) == (None, None)
    assert build(estimator, momentum=0.3).estimator.window is None


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
    assert MetadataNorm(np.int64(4), 1, momentum=np.float32(0.5)).num_features == (4,)


def test_repr_names_the_sizes_and_settings():
    text = repr(build("dataset", (3, 4), momentum=0.2))
    assert "(3, 4), num_metadata=2, num_labels=1, granularity='element'" in text
    assert "DatasetEstimator(momentum=0.2, ridge=0.0, center=False)" in text
    assert "None, num_metadata=2" in repr(MetadataNorm(None, 2))


def test_metadata_as_numpy_array():
    features, metadata, labels = inputs()
    out = build("batch")(features, metadata.numpy(), labels.numpy())
    torch.testing.assert_close(out, build("batch")(features, metadata, labels))


@pytest.mark.parametrize("estimator", ONE_PASS)
def test_gradcheck_through_the_layer(estimator):
    layer = prepared(estimator, 3).double()
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
    layer = prepared(estimator, scale=scale).train(training)
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
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value)


def test_settings_that_would_be_ignored_are_errors():
    with pytest.raises(ValueError, match=r"momentum=0\.1 and window=100 both say"):
        MetadataNorm(3, 1, estimator="batch", momentum=0.1, window=100)
    with pytest.raises(ValueError, match="brings its own settings: give window, center to it"):
        MetadataNorm(3, 1, estimator=BatchEstimator(), window=100, center=True)
    layer = MetadataNorm(3, 1, estimator="batch", scale=True, momentum=0.2)
    assert layer.scale_estimator.momentum == 0.2
    assert layer.scale_estimator.window is None
