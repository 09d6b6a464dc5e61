import copy
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mdnorm
from mdnorm import MetadataNorm, fit_gram, insert, recalibrate
from mdnorm.metrics import probe
from reference import design_matrix

# With any estimator the networks are trained without the loss of "penalty": its fit is what is looked at.
pytestmark = pytest.mark.filterwarnings("ignore:a layer with estimator='penalty' has been in training")

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


class Branches(nn.Module):
    """A stem, three branches beside each other, a layer behind two of them; and one that feeds on itself."""

    NAMES = ("stem", "left", "middle", "right", "behind", "recurrent")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, MetadataNorm(3, 2, estimator="batch", prior=0, dtype=torch.float64))
            setattr(self, f"{name}_map", nn.Linear(3, 3, dtype=torch.float64))

    def through(self, name, x, metadata):
        return getattr(self, name)(torch.tanh(getattr(self, f"{name}_map")(x)), metadata)

    def forward(self, x, metadata):
        stem = self.through("stem", x, metadata)
        left, middle, right = (self.through(name, stem, metadata) for name in ("left", "middle", "right"))
        behind = self.through("behind", left * right, metadata)
        once = self.through("recurrent", x, metadata)
        return middle, behind, self.through("recurrent", once, metadata)


class Counted(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def branches_data(rows=200):
    generator = torch.Generator().manual_seed(5)
    metadata = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64) + metadata @ torch.ones(2, 3).double()
    return x, metadata


def test_layers_beside_each_other_share_a_pass():
    torch.manual_seed(3)
    net, (x, metadata) = Branches(), branches_data()
    net(x, metadata)
    loader = Counted(zip(x.split(50), metadata.split(50), strict=True))
    assert set(recalibrate(net, loader, shrink=False).names) == set(net.NAMES)
    # The stem; its three branches; what is behind two of them, and what depends on itself.
    assert loader.passes <= 4
    seen = {name: [] for name in net.NAMES}
    for name in net.NAMES:
        getattr(net, name).register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0]))
    with torch.no_grad():
        net.eval()(x, metadata)
    for name in set(net.NAMES) - {"recurrent"}:
        beta = np.linalg.lstsq(design_matrix(metadata), seen[name][0].numpy(), rcond=None)[0]
        np.testing.assert_allclose(getattr(net, name).coefficients, beta[:2], atol=1e-10, err_msg=name)


@pytest.mark.parametrize("rows", [None, 60])
def test_many_heads_take_one_pass(rows):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(MetadataNorm(3, 2, estimator="batch") for _ in range(100))

        def forward(self, x, metadata):
            return sum(norm(x.float() * number, metadata) for number, norm in enumerate(self.norms, 1))

    net, (x, metadata) = Heads(), branches_data()
    net(x, metadata)
    loader, held_out = (
        Counted([(x, metadata)]),
        None if rows is None else Counted([(x[:rows], metadata[:rows])]),
    )
    assert len(recalibrate(net, loader, held_out=held_out).names) == 100
    assert loader.passes == 1
    assert held_out is None or held_out.passes == 1


def test_a_model_that_refuses_other_values_than_its_own():
    """Then nothing tells what depends on what, and each layer comes behind those that run before it."""

    class Picky(Branches):
        def forward(self, x, metadata):
            if any(getattr(self, name)._forward_hooks for name in self.NAMES):
                raise ValueError("out of range")  # as on values that no layer of the model puts out
            return super().forward(x, metadata)

    net, (x, metadata) = Picky(), branches_data()
    net(x, metadata)
    loader = Counted([(x, metadata)])
    assert len(recalibrate(net, loader, shrink=False).names) == 6
    assert loader.passes == 6


def test_a_forward_that_takes_things_out_of_the_batch():
    net, (x, metadata) = Branches(), branches_data()
    net(x, metadata)

    class Batches:
        def __iter__(self):
            return iter([{"x": x, "metadata": metadata}])

    def forward(model, batch):
        model(batch.pop("x"), batch.pop("metadata"))

    assert len(recalibrate(net, Batches(), forward=forward).names) == 6


class Stream(torch.utils.data.IterableDataset):
    """Goes on where it was, however often it is asked to begin."""

    def __init__(self, parts):
        self.rows = iter(parts)

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("wrap", [lambda stream: stream, lambda stream: DataLoader(stream, batch_size=None)])
def test_a_stream_that_cannot_begin_anew_loses_no_batch(wrap):
    rows, age = branches_data(60)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    insert(model, "0", num_metadata=2)
    streamed = copy.deepcopy(model)
    recalibrate(model, [(rows, age)])
    recalibrate(streamed, wrap(Stream(zip(rows.split(20), age.split(20), strict=True))))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[name], value)


def test_a_forward_that_changes_its_batch_in_place():
    rows, age = branches_data(60)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    insert(model, "0", num_metadata=2)
    twin = copy.deepcopy(model)

    def forward(net, batch):
        with mdnorm.metadata(net, batch[1]):
            net(batch[0].mul_(2))

    recalibrate(model, [(2 * rows, age)])
    recalibrate(twin, [(rows.clone(), age)], forward=forward)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


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


class OneLayer(nn.Module):
    """Features of a linear map, and the layer behind it."""

    def __init__(self, num_features, num_metadata, num_labels=1, **options):
        super().__init__()
        self.body = nn.Linear(32, num_features).double()
        self.norm = MetadataNorm(num_features, num_metadata, num_labels, dtype=torch.float64, **options)

    def forward(self, x, metadata, labels=None):
        return self.norm(self.body(x), metadata, labels)


def numbers(rows, seed=0, num_metadata=1, effect=0.0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    labels = torch.randint(0, 2, (rows, 1), generator=generator).double()
    metadata = 40 + 10 * torch.randn(rows, num_metadata, **options) + 10 * labels
    x = torch.randn(rows, 32, **options) + labels
    x[:, 0] += effect * (metadata[:, 0] - 40) / 10
    return x, metadata, labels


class TestShrinkage:
    @pytest.mark.parametrize("rows", [200, 1600])
    @pytest.mark.parametrize("num_features", [16, 256])
    def test_few_rows_do_not_write_the_metadata_into_features(self, rows, num_features):
        """12 levels that the features know nothing of; exact least squares on 200 rows writes 63 %."""
        generator = torch.Generator().manual_seed(1)

        def draw(number):
            levels = torch.randint(0, 12, (number,), generator=generator)
            x = torch.randn(number, 32, generator=generator).double()
            labels = torch.randint(0, 2, (number, 1), generator=generator).double()
            return x, nn.functional.one_hot(levels, 12).double(), labels, [f"level {i}" for i in levels]

        torch.manual_seed(0)
        net, train, new = OneLayer(num_features, 12), draw(rows), draw(1500)
        recalibrate(net, [train[:3]], progress=False)
        with torch.no_grad():
            before, after = net.body(new[0]), net.eval()(*new[:2])
        scores = [probe(values.numpy(), new[3], num_permutations=0) for values in (before, after)]
        assert scores[1].score <= max(scores[1].chance + 0.02, scores[0].score)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("options", [{}, {"center": True}, {"scale": True}], ids=str)
    def test_every_estimator_removes_the_shrunk_coefficients(self, estimator, options):
        """What is left of the effect is what shrinkage leaves; a strong one is hardly touched."""
        torch.manual_seed(0)
        net = OneLayer(6, 2, estimator=estimator, prior=0, **options)
        x, metadata, labels = numbers(300, num_metadata=2, effect=4)
        fit_gram(net, metadata, labels)
        net(x, metadata, labels)
        exact = copy.deepcopy(net)
        recalibrate(exact, [(x, metadata, labels)], shrink=False)
        layer = recalibrate(net, [(x, metadata, labels)]).layers[0]
        assert 0.5 < layer.kept < 1
        coefficients = net.norm.coefficients
        assert (coefficients - exact.norm.coefficients).norm() < 0.2 * exact.norm.coefficients.norm()
        # What is removed is nothing at the mean, or with `center` the features' mean there.
        with torch.no_grad():
            mean = metadata.mean(0, keepdim=True).expand(300, -1)
            moved = net.eval()(x, mean) - exact.eval()(x, mean)
            if options.get("center"):
                # Of the label 0: it follows from the labels' coefficients beside the shrunk ones.
                residual = net.body(x) - metadata @ coefficients
                rest = torch.linalg.lstsq(torch.cat([labels, torch.ones(300, 1)], 1), residual).solution[1]
                expected = net.body(x) - (mean @ coefficients + rest)
                torch.testing.assert_close(net(x, mean), expected)
            else:
                torch.testing.assert_close(moved, torch.zeros_like(moved), rtol=0, atol=1e-9)

    def test_weights_count_as_many_rows_as_they_are_worth(self):
        """The unit of the weights does not matter, and a few rows of large weight are few rows."""
        x, metadata, labels = numbers(200, effect=0.3)
        kept = []
        for weights in (torch.ones(200), torch.full((200,), 7.0), 1 + 50.0 * (torch.arange(200) % 20 == 0)):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(32, 8), nn.ReLU()).double()
            insert(net, after="0", num_metadata=1, num_labels=1, prior=0, example=x[:2])
            batch = {"input": x, "metadata": metadata, "labels": labels, "weights": weights}
            layer = recalibrate(net, [batch], progress=False).layers[0]
            kept.append((layer.kept, layer.standard_errors))
        assert kept[1][0] == pytest.approx(kept[0][0], rel=1e-9)
        np.testing.assert_allclose(kept[1][1], kept[0][1], rtol=1e-9)
        assert (kept[2][1] > 2 * kept[0][1]).all()

    def test_too_few_rows(self):
        net = OneLayer(4, 3)
        with pytest.warns(UserWarning, match=r"'norm' was .* on 19 row\(s\) of loader for 4 column"):
            recalibrate(net, [numbers(19, num_metadata=3)])
        with pytest.warns(UserWarning, match=r"on 5 row\(s\) of held_out for 4 column"):
            recalibrate(net, [numbers(100, num_metadata=3)], held_out=[numbers(5, num_metadata=3)])


class TestHeldOut:
    def memorising(self, epochs=30):
        """A network for which x tells nothing of m given y, trained until it knows its rows by heart."""
        generator = torch.Generator().manual_seed(0)

        def draw(rows):
            y = torch.randint(0, 2, (rows,), generator=generator)
            m = torch.randn(rows, 1, generator=generator) + 0.96 * (2 * y[:, None] - 1)
            x = torch.randn(rows, 32, generator=generator)
            x[:, :4] += 0.45 * (2 * y[:, None] - 1)
            return x, m, y

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        x, m, y = draw(1200)
        insert(net, after="2", num_metadata=1, num_labels=1, example=x[:2], decay=0)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(1200, generator=generator).split(32):
                with mdnorm.metadata(net, m[rows], y[rows]):
                    loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return net, (x, m, y), draw(1200), draw(8000)

    def test_what_a_network_memorised_is_not_added_to_new_rows(self):
        net, train, new, test = self.memorising()
        outcomes = {}
        for rows in (None, 1200, 400, 200):
            twin = copy.deepcopy(net)
            held_out = None if rows is None else [tuple(part[:rows] for part in new)]
            if rows is None:
                layer = recalibrate(twin, [train], progress=False).layers[0]
                assert not layer.memorised
                assert layer.verdict == "unknown whether it memorised: no held_out"
            else:
                with pytest.warns(UserWarning, match=r"'2.metadata_norm': this network memorised: new rows"):
                    layer = recalibrate(twin, [train], held_out=held_out, progress=False).layers[0]
                assert layer.memorised
                assert abs(layer.found_again) < 2.5 * layer.found_again_error
            x, m, y = test
            logits, accuracies = [], []
            shuffled = m[torch.randperm(len(m), generator=torch.Generator().manual_seed(0))]
            for metadata in (m, shuffled):
                with torch.no_grad(), mdnorm.metadata(twin.eval(), metadata):
                    out = twin(x)
                logits.append((out[:, 1] - out[:, 0]).numpy())
                accuracies.append(np.mean((logits[-1] > 0) == y.numpy()))
            line = np.linalg.lstsq(design_matrix(m, y[:, None]), logits[0], rcond=None)[0]
            outcomes[rows] = (line[0] / line[1], accuracies[0] - accuracies[1])
        # Training rows alone hand the metadata over.
        assert outcomes[None][0] > 0.15
        assert outcomes[None][1] > 0.05
        for rows in (1200, 400, 200):
            assert abs(outcomes[rows][0]) <= 0.03, rows
            assert abs(outcomes[rows][1]) <= 0.02, rows

    def test_a_network_that_memorised_nothing(self):
        torch.manual_seed(0)
        net = OneLayer(16, 1)
        report = recalibrate(net, [numbers(800, 0, effect=1)], held_out=[numbers(400, 1, effect=1)])
        layer = report.layers[0]
        assert abs(layer.found_again - 1) < 3 * layer.found_again_error < 0.4
        assert layer.p_value > 0.05
        assert layer.verdict.startswith("no sign of memorising: new rows show ")

    def test_batches_do_not_matter_and_every_layer_gets_both(self):
        images, metadata, labels = data(300, dtype=torch.float64)
        nets = [trained("running", images, metadata, labels, torch.float64, num_labels=1)]
        nets.append(copy.deepcopy(nets[0]))
        whole = tuple(part[200:] for part in (images, metadata, labels))
        for net, sizes in zip(nets, ([100], [1, 50, 0, 49]), strict=True):
            held_out = [tuple(part[rows] for part in whole) for rows in torch.arange(100).split(sizes)]
            loader = [tuple(part[:200] for part in (images, metadata, labels))]
            report = recalibrate(net, loader, held_out=held_out, progress=False)
            assert [(layer.name, layer.rows, layer.new_rows) for layer in report.layers] == [
                (name, 200, 100) for name in ORDER
            ]
        for name, value in nets[0].state_dict().items():
            torch.testing.assert_close(nets[1].state_dict()[name], value, rtol=1e-7, atol=1e-9)
        # The metadata at which nothing is removed stay those of the training rows.
        mean = metadata[:200].mean(0)
        for name in ORDER:
            part = getattr(nets[0], name).estimator
            found = part.mean / part.scale[part.num_protected :] + part.origin[part.num_protected :]
            torch.testing.assert_close(found, mean)

    def test_exact_coefficients_are_compared_only(self):
        nets = [OneLayer(8, 1) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        train, new = numbers(300, 0, effect=1), numbers(200, 1)
        recalibrate(nets[0], [train], shrink=False)
        with pytest.warns(UserWarning, match="memorised"):
            layer = recalibrate(nets[1], [train], held_out=[new], shrink=False).layers[0]
        assert layer.memorised
        assert torch.equal(*(net.norm.coefficients for net in nets))

    def test_the_report(self):
        torch.manual_seed(0)
        net = OneLayer(16, 1)
        text = str(recalibrate(net, [numbers(800, 0, effect=1)], held_out=[numbers(400, 1, effect=1)]))
        head, row, _, verdict, *_ = text.splitlines()
        assert head.split() == ["layer", "rows", "new", "rows", "columns", "noise", "kept", "found", "again"]
        assert row.split()[:4] == ["norm", "800", "400", "2"]
        assert verdict.startswith("norm: no sign of memorising")
        lines = str(recalibrate(net, [numbers(300)])).splitlines()
        assert lines[1].split()[2] == lines[1].split()[-1] == "–"

    def test_errors(self):
        net, train = OneLayer(4, 1), numbers(50)
        with pytest.raises(ValueError, match="held_out is exhausted after one pass"):
            recalibrate(net, [train], held_out=iter([train]))
        with pytest.raises(ValueError, match="no samples: held_out is empty"):
            recalibrate(net, [train], held_out=[])


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
        assert len(started) == len(ORDER)

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
