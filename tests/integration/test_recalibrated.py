"""`recalibrated`: exact coefficients inside the block, the state of the training bit for bit behind it."""

import copy
import random

import numpy as np
import pytest
import torch
from test_recalibrate import ESTIMATORS, InContext, Net, data, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import mdnorm
from mdnorm import recalibrate, recalibrated

# With any estimator the networks are trained without the loss of "penalty": its fit is what is looked at.
pytestmark = pytest.mark.filterwarnings("ignore:a layer with estimator='penalty' has been in training")


def bits(model):
    """All that a model holds, to be compared bit for bit."""
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: (value.requires_grad, value.grad) for name, value in model.named_parameters()}
    attributes = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in model.named_modules()
    }
    return state, modes, flags, attributes


def assert_same(model, before):
    after = bits(model)
    assert list(after[0]) == list(before[0])
    for name, (identity, value) in before[0].items():
        assert after[0][name][0] == identity, name
        assert torch.equal(after[0][name][1], value), name
    assert after[1:] == before[1:]


def loader_of(*blocks, batch_size=32):
    return DataLoader(TensorDataset(*blocks), batch_size=batch_size)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("options", [{}, {"scale": True}, {"center": True}])
@pytest.mark.parametrize("training", [True, False])
def test_as_a_copy_that_was_recalibrated_and_back_bit_for_bit(estimator, options, training):
    images, metadata, labels = data()
    net = trained(estimator, images, metadata, labels, num_labels=1, **options).train(training)
    net.fc.eval()
    loader = loader_of(images, metadata, labels)
    twin = copy.deepcopy(net)
    expected = recalibrate(twin, loader)
    before = bits(net)
    stale = copy.deepcopy(net).eval()(images, metadata)
    with recalibrated(net, loader) as report, torch.no_grad():
        assert not any(module.training for module in net.modules())
        assert str(report) == str(expected)
        exact = net(images, metadata)
        assert torch.equal(exact, twin.eval()(images, metadata))
        assert not torch.allclose(exact, stale)
    assert_same(net, before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_goes_on_as_without_it(estimator):
    images, metadata, labels = data()
    nets = [trained(estimator, images, metadata, labels, num_labels=1).train() for _ in range(2)]
    loader = loader_of(images, metadata, labels)
    for index, net in enumerate(nets):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for rows in torch.arange(len(images)).split(40):
            optimizer.zero_grad()
            loss = net(images[rows], metadata[rows], labels[rows]).square().mean()
            (loss + mdnorm.penalty_loss(net) if estimator == "penalty" else loss).backward()
            optimizer.step()
            if index:
                with recalibrated(net, loader):
                    pass
    for name, value in nets[0].state_dict().items():
        assert torch.equal(value, nets[1].state_dict()[name]), name


def test_blocks_nest():
    images, metadata, _ = data()
    net = trained("running", images, metadata, None)
    outer, inner = loader_of(images, metadata), loader_of(images[:60], metadata[:60])
    before = bits(net)
    seen = []
    with recalibrated(net, outer) as report:
        assert report.layers[0].rows == 120
        seen.append(net.fc_norm.coefficients)
        with recalibrated(net, inner) as report:
            assert report.layers[0].rows == 60
            assert not torch.equal(net.fc_norm.coefficients, seen[0])
        assert torch.equal(net.fc_norm.coefficients, seen[0])
        with recalibrated(net, outer):
            torch.testing.assert_close(net.fc_norm.coefficients, seen[0])
        assert torch.equal(net.fc_norm.coefficients, seen[0])
    assert_same(net, before)


def test_an_exception_in_the_block():
    images, metadata, _ = data()
    net = trained("penalty", images, metadata, None).train()
    before = bits(net)
    with pytest.raises(KeyboardInterrupt), recalibrated(net, loader_of(images, metadata)):
        raise KeyboardInterrupt
    assert_same(net, before)


def test_an_exception_on_the_way_into_the_block():
    images, metadata, labels = data()
    net = trained("running", images, metadata, labels).train()
    before = bits(net)
    bad = metadata.clone()
    bad[100] = torch.nan
    with pytest.raises(ValueError, match="NaN"), recalibrated(net, loader_of(images, bad)):
        pass
    assert_same(net, before)


def test_the_errors_of_recalibrate():
    for model in (nn.Linear(2, 2), "net"):
        messages = []
        for function in (recalibrate, lambda *a: recalibrated(*a).__enter__()):
            with pytest.raises((TypeError, ValueError)) as caught:
                function(model, [torch.randn(3, 2)])
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("estimator", ["batch", "running", "recursive"])
def test_layers_of_open_sizes_are_open_again(estimator):
    images, metadata, labels = data()
    net = Net(estimator, sizes=(2, False))
    before = bits(net)
    with recalibrated(net, loader_of(images, metadata, labels)), torch.no_grad():
        assert net.fc_norm.num_features == (5,)
        net(images, metadata)
    assert net.fc_norm.estimator is None
    assert net.fc_norm.num_features is None
    assert_same(net, before)
    net.train()(images, metadata, labels)


def test_buffers_that_the_pass_changes_and_those_that_the_block_changes():
    class Counting(InContext):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("best", torch.zeros(1))

        def forward(self, images):
            self.calls += 1
            return super().forward(images)

    images, metadata, labels = data()
    net = Counting()
    with recalibrated(net, [(images, metadata, labels)]):
        assert net.calls == 0
        net.best += 1
    assert (net.calls, net.best) == (0, 1)


class Noisy(Dataset):
    """Its transforms draw random numbers of every kind."""

    shared = np.random.RandomState(3)

    def __init__(self, images, metadata):
        self.rows = list(zip(images, metadata, strict=True))
        self.transforms = [{"numpy": np.random.default_rng(0)}, random.Random(0)]
        self.torch = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image, metadata = self.rows[index]
        return image + 0.1 * self.draw(), metadata

    def draw(self):
        own = self.transforms[0]["numpy"].normal(), self.transforms[1].random(), self.shared.rand()
        drawn = torch.rand(1, generator=self.torch).item(), torch.rand(1).item(), random.random()
        return sum((*own, *drawn, np.random.rand()))  # noqa: NPY002


@pytest.mark.parametrize("has_generator", [True, False])
def test_random_numbers_are_those_without_it(has_generator):
    images, metadata, _ = data()
    net = trained("running", images, metadata, None)
    generator = torch.Generator().manual_seed(0) if has_generator else None
    orders = []
    for is_entered in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        Noisy.shared.seed(0)
        dataset = Noisy(images, metadata)
        if generator is not None:
            generator.manual_seed(0)
        sampler = RandomSampler(dataset, generator=generator)
        loader = DataLoader(dataset, batch_size=16, sampler=sampler, generator=generator)
        seen = []
        for image, _ in loader:
            seen.append(image)
            if is_entered:
                with recalibrated(net, loader):
                    pass
        orders.append(torch.cat([*seen, next(iter(loader))[0]]))
    assert torch.equal(*orders)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_that_are_kept_go_on_with_their_epoch():
    images, metadata, _ = data()
    net = trained("running", images, metadata, None)
    dataset = TensorDataset(images, metadata)
    loader = DataLoader(dataset, batch_size=16, num_workers=1, persistent_workers=True)
    seen = []
    for index, (image, _) in enumerate(loader):
        seen.append(image)
        if index == 2:
            with recalibrated(net, loader) as report:
                assert report.layers[0].rows == 120
    assert torch.equal(torch.cat(seen), images)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    images, metadata, _ = data()
    images = images.flatten(1)
    mdnorm.insert(model, "0", num_metadata=2, example=images[:2])
    compiled = torch.compile(model, backend="eager")
    with mdnorm.metadata(model, metadata):
        compiled(images)
    before = bits(model)
    with recalibrated(compiled, [(images, metadata)]), torch.no_grad(), mdnorm.metadata(model, metadata):
        exact = compiled(images)
        twin = copy.deepcopy(model)
    assert_same(model, before)
    with torch.no_grad(), mdnorm.metadata(twin, metadata):
        torch.testing.assert_close(exact, twin(images))
