import copy
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mdnorm import MetadataNorm, fit_gram, recalibrate
from reference import design_matrix

ESTIMATORS = ["batch", "dataset", "running", "recursive", "penalty"]


class Net(nn.Module):
    """Three layers, registered in another order than they run."""

    def __init__(self, estimator="batch", num_labels=0, sizes=(2, True), center=False, **options):
        super().__init__()
        k_m, known = sizes
        options = {"prior": 0.0} | options | {"estimator": estimator, "center": center}
        labels = num_labels if known else None
        self.head_norm = MetadataNorm(3 if known else None, k_m if known else None, labels, **options)
        self.conv_norm = MetadataNorm(
            4 if known else None, k_m if known else None, labels, granularity="channel", **options
        )
        self.fc_norm = MetadataNorm(5 if known else None, k_m if known else None, labels, **options)
        self.conv, self.fc, self.head = nn.Conv1d(1, 4, 3), nn.Linear(16, 5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images, metadata, labels=None):
        x = torch.relu(self.conv_norm(self.conv(images), metadata, labels))
        x = self.dropout(torch.tanh(self.fc_norm(self.fc(x.flatten(1)), metadata, labels)))
        return self.head_norm(self.head(x), metadata, labels)


ORDER = ["conv_norm", "fc_norm", "head_norm"]


def data(n=120, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    options = {"generator": generator, "dtype": torch.float64}
    metadata = 3 + torch.randn(n, 2, **options)
    labels = (torch.randn(n, 1, **options) + metadata[:, :1] > 3).double()
    images = torch.randn(n, 1, 6, **options) + metadata[:, :1, None] + labels[:, :, None]
    return images.to(dtype), metadata, labels


def trained(estimator, images, metadata, labels, dtype=torch.float32, **options):
    """A network whose coefficients are some steps old: they do not fit its features exactly."""
    torch.manual_seed(0)
    net = Net(estimator, **options).to(dtype)
    blocks = (metadata, labels) if options.get("num_labels") else (metadata,)
    fit_gram(net, *blocks)
    for part in torch.arange(len(images)).split(40):
        net(images[part], *(block[part] for block in blocks))
    return net


def residuals(net, *batch):
    """What each layer put out in evaluation, by name."""
    outs = {}
    handles = [
        getattr(net, name).register_forward_hook(lambda _, __, out, name=name: outs.update({name: out}))
        for name in ORDER
    ]
    with torch.no_grad():
        net.eval()(*batch)
    for handle in handles:
        handle.remove()
    return {name: out.mean(-1) if out.ndim == 3 else out for name, out in outs.items()}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [False, True])
def test_residuals_are_orthogonal_to_the_metadata(estimator, dtype, center):
    images, metadata, labels = data(dtype=dtype)
    net = trained(estimator, images, metadata, labels, dtype, center=center)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    centred = (metadata - metadata.mean(0)).numpy()

    def dependence():
        worst = {}
        for name, out in residuals(net, images, metadata).items():
            f = out.double().numpy()
            scale = np.linalg.norm(centred, axis=0)[:, None] * np.linalg.norm(f - f.mean(0), axis=0)
            worst[name] = np.abs(centred.T @ f / scale).max()
            if center:
                assert worst[name] > tolerance or np.abs(f.mean(0)).max() < 10 * tolerance
        return worst

    assert min(dependence().values()) > 1e-3
    loader = [(images[part], metadata[part]) for part in torch.arange(120).split(50)]
    assert recalibrate(net, loader, shrink=False).names == ORDER
    for name, value in dependence().items():
        # Float32 features round the residual itself: a few roundings of the features against the residual.
        assert value < tolerance, name


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [False, True])
def test_coefficients_are_those_of_lstsq_layer_after_layer(estimator, dtype, center):
    """With labels: the metadata rows of the full regression on the layer's own input after recalibration."""
    images, metadata, labels = data(dtype=dtype)
    net = trained(estimator, images, metadata, labels, dtype, num_labels=1, center=center)
    recalibrate(net, DataLoader(TensorDataset(images, metadata, labels), batch_size=32), shrink=False)
    inputs = {}
    for name in ORDER:
        getattr(net, name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].detach().double()})
        )
    outs = residuals(net, images, metadata)
    x = design_matrix(metadata - metadata.mean(0), labels)
    for name in ORDER:
        f = inputs[name].mean(-1) if inputs[name].ndim == 3 else inputs[name]
        beta = np.linalg.lstsq(x, f.numpy(), rcond=None)[0]
        layer = getattr(net, name)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-11
        np.testing.assert_allclose(layer.coefficients, beta[:2], rtol=0, atol=tolerance * np.abs(beta).max())
        if center:
            intercept = layer.estimator.coefficients[2]
            np.testing.assert_allclose(intercept, beta[3], rtol=0, atol=tolerance * np.abs(beta).max())
        partial = np.linalg.lstsq(x, outs[name].double().numpy(), rcond=None)[0][:2]
        assert np.abs(partial).max() < tolerance * np.abs(f.numpy()).max()


def test_uneven_batches_equal_one_batch():
    images, metadata, labels = data(dtype=torch.float64)
    metadata = metadata + 1e4
    nets = [trained("batch", images, metadata, labels, torch.float64, num_labels=1)]
    nets.append(copy.deepcopy(nets[0]))
    whole = [(images, metadata, labels)]
    pieces = [tuple(b[p] for b in whole[0]) for p in torch.arange(120).split([1, 50, 0, 2, 67])]
    for net, loader in zip(nets, (whole, pieces), strict=True):
        recalibrate(net, loader)
    for name, value in nets[0].state_dict().items():
        torch.testing.assert_close(nets[1].state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_dict_batches_a_single_tensor_and_a_forward_of_ones_own():
    images, metadata, labels = data(dtype=torch.float64)
    net = trained("batch", images, metadata, labels, torch.float64, num_labels=1)
    expected = copy.deepcopy(net)
    recalibrate(expected, [(images, metadata, labels)])

    for loader, forward in (
        ([{"images": images, "metadata": metadata, "labels": labels}], None),
        ([[images, metadata, labels]], None),
        ([(labels, (images, metadata))], lambda model, b: model(*b[1], labels=b[0])),
    ):
        twin = copy.deepcopy(net)
        recalibrate(twin, loader, forward=forward)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[name], value)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = MetadataNorm(4, 1, estimator="batch")

        def forward(self, table):
            return self.norm(features=table[:, 1:], metadata=table[:, :1])

    own, table = Own(), torch.randn(30, 5)
    assert recalibrate(own, [table], shrink=False).names == ["norm"]
    assert own.norm.estimator.coefficients.any()


def test_a_layer_alone_has_no_name():
    layer = MetadataNorm(4, 1, estimator="batch")
    assert recalibrate(layer, [(torch.randn(9, 4), torch.randn(9, 1))]).names == [""]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_lazy_layers(estimator):
    images, metadata, labels = data(dtype=torch.float64)
    net = Net(estimator, sizes=(None, False)).double()
    assert recalibrate(net, [(images, metadata, labels)], shrink=False).names == ORDER
    for name in ORDER:
        layer = getattr(net, name)
        assert (layer.num_metadata, layer.num_labels) == (2, 1)
    x = design_matrix(metadata, labels)
    for out in residuals(net, images, metadata).values():
        np.testing.assert_allclose(np.linalg.lstsq(x, out.numpy(), rcond=None)[0][:2], 0, atol=1e-11)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_goes_on_afterwards(estimator):
    """The state behind the coefficients is that of the fit, not the one before it."""
    images, metadata, labels = data(600, dtype=torch.float64)
    net = trained(estimator, images, metadata, labels, torch.float64)
    recalibrate(net, [(images, metadata)])
    before = net.conv_norm.estimator.coefficients.clone()
    net.train()(images[:1], metadata[:1])
    after = net.conv_norm.estimator.coefficients
    # One sample among 600.
    assert (after - before).abs().max() < 0.02 * before.abs().max()


def test_a_layer_that_runs_twice_gets_the_fit_over_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = MetadataNorm(3, 1, estimator="batch", prior=0, dtype=torch.float64)

        def forward(self, first, second, metadata):
            return self.norm(first, metadata), self.norm(second, metadata)

    net = Twice()
    first, second = torch.randn(2, 40, 3, dtype=torch.float64)
    metadata = torch.randn(40, 1, dtype=torch.float64)
    recalibrate(net, [(first, second, metadata)], shrink=False)
    x = design_matrix(torch.cat([metadata, metadata]))
    beta = np.linalg.lstsq(x, torch.cat([first, second]).numpy(), rcond=None)[0]
    np.testing.assert_allclose(net.norm.coefficients, beta[:1], atol=1e-12)


def test_behind_a_scale():
    """The running scale stays, and the fit is made behind it."""
    images, metadata, labels = data(dtype=torch.float64)
    net = trained("batch", images, metadata, labels, torch.float64, scale=True)
    scales = {name: getattr(net, name).spread.coefficients.clone() for name in ORDER}
    recalibrate(net, [(images, metadata)], shrink=False)
    x = design_matrix(metadata)
    for name, out in residuals(net, images, metadata).items():
        assert torch.equal(getattr(net, name).spread.coefficients, scales[name])
        np.testing.assert_allclose(np.linalg.lstsq(x, out.numpy(), rcond=None)[0][:2], 0, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    images, metadata, labels = data()
    net = trained("batch", images, metadata, labels).train(training)
    net.fc.train(not training)
    modes = [module.training for module in net.modules()]
    recalibrate(net, [(images, metadata)])
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(ValueError, match="NaN"):
        recalibrate(net, [(images, metadata * float("nan"))])
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_dropout_is_off_and_nothing_is_recorded_for_gradients():
    images, metadata, labels = data()
    nets = [trained("batch", images, metadata, labels)]
    nets.append(copy.deepcopy(nets[0]))
    for net in nets:
        recalibrate(net, [(images, metadata)])
    for name, value in nets[0].state_dict().items():
        assert torch.equal(nets[1].state_dict()[name], value), name
        assert not value.requires_grad


@pytest.mark.parametrize("estimator", ["batch", "dataset", "running", "recursive"])
def test_what_comes_afterwards_outweighs_it_within_some_windows(estimator):
    """A data set of 50 000 samples must not hold a window of 500 for as long as it took to see them."""
    generator = torch.Generator().manual_seed(0)
    layer = MetadataNorm(1, 1, estimator=estimator, window=500, prior=0, dtype=torch.float64)
    metadata = torch.randn(50_000, 1, generator=generator, dtype=torch.float64)
    fit_gram(layer, metadata)
    recalibrate(layer, [(metadata, metadata)], progress=False)
    torch.testing.assert_close(layer.coefficients, torch.ones(1, 1, dtype=torch.float64))
    # Three windows for the average of "running", and some to forget.
    for part in metadata[:8000].split(20):
        layer.train()(5 * part, part)
    assert float(layer.coefficients) == pytest.approx(5, abs=0.15)


def test_a_layer_that_runs_in_later_batches_only():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.always = MetadataNorm(2, 1, estimator="batch")
            self.rarely = MetadataNorm(2, 1, estimator="batch")

        def forward(self, x, metadata):
            x = self.always(x, metadata)
            return self.rarely(x, metadata) if len(x) > 10 else x

    net = Sometimes()
    loader = [(torch.randn(n, 2), torch.randn(n, 1)) for n in (5, 20)]
    assert recalibrate(net, loader, shrink=False, progress=False).names == ["always", "rarely"]
    assert net.rarely.estimator.coefficients.any()


def test_a_compiled_model_that_has_run():
    """Its graph knows nothing of hooks that came later."""
    net = Net("batch").eval()
    images, metadata, _ = data()
    compiled = torch.compile(net, backend="eager")
    compiled(images, metadata)
    order = recalibrate(compiled, [(images, metadata)], progress=False).names
    assert [name.removeprefix("_orig_mod.") for name in order] == ORDER
    after = compiled(images, metadata)
    torch.testing.assert_close(after, net(images, metadata))
    assert net.fc_norm.estimator.coefficients.any()


class InContext(nn.Module):
    """Its forward takes no metadata: the layer finds them in a context."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = nn.Linear(6, 4), MetadataNorm(4, 2, 1, prior=0)

    def forward(self, images):
        return self.norm(self.body(images.flatten(1)))


class TestHowTheModelIsCalled:
    def test_a_layer_called_without_metadata_takes_those_of_the_context(self):
        images, metadata, labels = data()
        models = [InContext() for _ in range(4)]
        for model, batch in zip(
            models,
            [
                (images, metadata, labels),
                [images, metadata, labels],
                {"images": images, "metadata": metadata, "labels": labels},
                UserDict(images=images, metadata=metadata, labels=labels),
            ],
            strict=True,
        ):
            assert recalibrate(model, [batch], shrink=False).names == ["norm"]
        with torch.no_grad():
            features = models[0].body(images.flatten(1)).double()
        x = design_matrix(metadata - metadata.mean(0), labels)
        expected = np.linalg.lstsq(x, features.numpy(), rcond=None)[0][:2]
        for model in models:
            np.testing.assert_allclose(model.norm.coefficients, expected, rtol=0, atol=1e-5)

    def test_a_mapping_that_is_no_dict(self):
        """The batches of transformers' tokenizers are such mappings."""
        images, metadata, labels = data()
        nets = [trained("batch", images, metadata, labels, num_labels=1) for _ in range(2)]
        recalibrate(nets[0], [UserDict(images=images, metadata=metadata, labels=labels)])
        recalibrate(nets[1], [(images, metadata, labels)])
        for name, value in nets[1].state_dict().items():
            assert torch.equal(nets[0].state_dict()[name], value), name

    def test_a_mapping_without_metadata(self):
        images, metadata, _ = data()
        with pytest.raises(ValueError, match="a dict with the keys 'images', 'age', without 'metadata'"):
            recalibrate(InContext(), [{"images": images, "age": metadata}])


class TestErrors:
    @pytest.mark.parametrize("model", [Net, None, "net"])
    def test_no_module(self, model):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got (type|NoneType|str)"):
            recalibrate(model, [(torch.ones(3, 2), torch.ones(3, 2))])

    def test_a_generator(self):
        images, metadata, labels = data()
        net = trained("batch", images, metadata, labels)
        with pytest.raises(ValueError, match="loader is exhausted after one pass"):
            recalibrate(net, ((images, metadata) for _ in range(2)))
        with pytest.raises(ValueError, match="loader is exhausted after one pass"):
            recalibrate(net, iter([(images, metadata)]))

    def test_the_check_draws_nothing_from_a_loader(self):
        """Starting a loader's iterator would draw a seed and start its workers."""
        images, metadata, labels = data()
        net, started = trained("batch", images, metadata, labels), []

        class Loader:
            def __iter__(self):
                started.append(True)
                return iter([(images, metadata)])

        recalibrate(net, Loader())
        assert len(started) == 1 + len(ORDER)

    def test_an_empty_loader(self):
        images, metadata, labels = data()
        net = trained("batch", images, metadata, labels)
        with pytest.raises(ValueError, match="no samples: the loader is empty"):
            recalibrate(net, [])
        with pytest.raises(ValueError, match="no samples"):
            recalibrate(net, [(images[:0], metadata[:0])])

    def test_missing_labels(self):
        images, metadata, labels = data()
        net = trained("batch", images, metadata, labels, num_labels=1)
        with pytest.raises(ValueError, match="'conv_norm' has num_labels=1 but got no labels"):
            recalibrate(net, [(images, metadata)])

    def test_labels_that_the_layers_do_not_use(self):
        images, metadata, labels = data()
        net = trained("batch", images, metadata, labels)
        assert recalibrate(net, [(images, metadata, labels)]).names == ORDER

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_features_that_are_not_finite(self, bad):
        images, metadata, labels = data()
        net = trained("batch", images, metadata, labels)
        images[3, 0, 2] = bad
        with pytest.raises(ValueError, match="'conv_norm': features has NaN or infinite values in column"):
            recalibrate(net, [(images, metadata)])

    def test_no_layer(self):
        with pytest.raises(ValueError, match="Linear has no MetadataNorm layer"):
            recalibrate(nn.Linear(2, 2), [torch.randn(3, 2)])

        class Unused(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = MetadataNorm(2, 1, estimator="batch")

            def forward(self, x):
                return x

        with pytest.raises(ValueError, match="no MetadataNorm layer ran"):
            recalibrate(Unused(), [torch.randn(3, 2)])


class TestProgress:
    def bars(self, monkeypatch, terminal, **options):
        images, metadata, labels = data()
        net = trained("batch", images, metadata, labels)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        recalibrate(net, [(images, metadata)] * 3, **options)

    def test_shown_on_a_terminal(self, monkeypatch, capsys):
        self.bars(monkeypatch, True)
        shown = capsys.readouterr().err
        for index, name in enumerate(ORDER):
            assert f"recalibrate {name} ({index + 1}/3)" in shown

    def test_hidden_elsewhere_and_on_request(self, monkeypatch, capsys):
        self.bars(monkeypatch, False)
        self.bars(monkeypatch, True, progress=False)
        assert capsys.readouterr().err == ""

    def test_works_without_tqdm(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
        self.bars(monkeypatch, True)
        assert capsys.readouterr().err == ""
