"""EMA and SWA copies, torch.func over ensembles, and loaders with workers."""

import copy

import pytest
import torch
from feature_models import ESTIMATORS, loss_of, make_data, make_model, make_optimizer, state_of
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import mdnorm
from mdnorm import MetadataNorm


def train(model, seeds=range(4), watch=None):
    optimizer = make_optimizer(model)
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, *make_data(32, seed)).backward()
        optimizer.step()
        if watch is not None:
            watch()


class TestAveraged:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("kind", ["swa", "ema"])
    def test_state_and_weights_are_the_averages(self, estimator, kind):
        """With use_buffers=True: the averages of what was there, in float64; origin and units do not move."""
        model = make_model(estimator)
        options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if kind == "ema" else {}
        averaged = AveragedModel(model, use_buffers=True, **options)
        states = []

        def watch():
            averaged.update_parameters(model)
            states.append(state_of(model))

        train(model, watch=watch)
        weights = [0.25] * 4 if kind == "swa" else [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
        for name, value in averaged.module.state_dict().items():
            expected = sum(
                weight * state[name].double() for weight, state in zip(weights, states, strict=True)
            )
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
            if name.endswith(("origin", "scale")):
                torch.testing.assert_close(value, states[0][name], rtol=1e-14, atol=0)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("use_buffers", [True, False])
    def test_recalibrated_it_removes_the_effect_on_its_own_features(self, estimator, use_buffers):
        """The averaged weights give other features: their exact coefficients, against least squares."""
        model = make_model(estimator, prior=0.0).double()
        averaged = AveragedModel(model, use_buffers=use_buffers)
        optimizer = make_optimizer(model)
        for seed in range(4):
            optimizer.zero_grad()
            loss_of(model, *(part.double() for part in make_data(32, seed))).backward()
            optimizer.step()
            averaged.update_parameters(model)
        images, metadata, labels = (part.double() for part in make_data(150, seed=7))
        mdnorm.recalibrate(averaged, [(images, metadata, labels)], shrink=False, progress=False)
        outputs = []
        hook = averaged.module[3].metadata_norm.register_forward_hook(lambda *call: outputs.append(call[2]))
        # An inserted layer is a child: the hook of its module runs it, and this one sees what it returned.
        with torch.no_grad(), mdnorm.metadata(averaged.eval(), metadata):
            averaged(images)
        hook.remove()
        design = torch.cat([metadata, labels, torch.ones_like(labels)], 1)
        slopes = torch.linalg.lstsq(design, outputs[0]).solution[:2]
        torch.testing.assert_close(slopes, torch.zeros_like(slopes), rtol=0, atol=1e-7)

    def test_the_training_model_is_left_alone(self):
        model, alone = make_model("running"), make_model("running")
        averaged = AveragedModel(model, use_buffers=True)
        train(model, watch=lambda: averaged.update_parameters(model))
        train(alone)
        for name, value in state_of(alone).items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_made_before_the_sizes_are_known_it_cannot_follow(self):
        """torch pairs the buffers by position, and the copy has none yet: an error, no wrong average."""
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), MetadataNorm(None, None, None))
        averaged = AveragedModel(model)
        with mdnorm.metadata(model, torch.randn(9, 2)):
            model(torch.randn(9, 6))
        with pytest.raises(ValueError, match="argument 2 is longer"):
            averaged.update_parameters(model)
        AveragedModel(model).update_parameters(model)

    def test_a_deepcopy_in_the_middle_of_accumulation(self):
        """Between forward and backward pass of the original: the copy's state stays its own."""
        model = make_model("running")
        loss = loss_of(model, *make_data(32, 0))
        loss_of(model, *make_data(32, 1)).backward()
        twin = copy.deepcopy(model)
        before = state_of(twin)
        loss.backward()
        assert all(torch.equal(value, before[name]) for name, value in state_of(twin).items())


class Member(torch.nn.Module):
    """One of an ensemble."""

    def __init__(self, estimator, scale, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.hidden = torch.nn.Linear(36, 4)
        self.norm = MetadataNorm(4, 2, 1, estimator=estimator, scale=scale, dtype=torch.float64)
        self.double()

    def forward(self, images, metadata, labels):
        return self.norm(self.hidden(images.flatten(1)), metadata, labels).tanh()


def ensemble(estimator, scale=False):
    members = [Member(estimator, scale, seed) for seed in range(3)]
    for member in members:
        mdnorm.fit_gram(member, *(part.double() for part in make_data(100, seed=8)[1:]))
        member(*(part.double() for part in make_data(32, seed=9)))
        for parameter in member.norm.parameters():
            torch.nn.init.normal_(parameter)
    return members


class TestTransforms:
    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    # Some in-place operations have no batching rule: right, but one member after the other.
    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    def test_vmap_over_an_ensemble(self, estimator, training, scale):
        """Each member's output and state are what it would have alone; "running" in training is an error."""
        members = [member.train(training) for member in ensemble(estimator, scale)]
        base = copy.deepcopy(members[0])
        parameters, buffers = stack_module_state(members)
        batch = tuple(part.double() for part in make_data(20, seed=10))

        def run(parameters, buffers):
            return functional_call(base, (parameters, buffers), batch)

        if estimator == "running" and training:
            with pytest.raises(RuntimeError, match=r"'running' cannot train inside torch\.func"):
                vmap(run)(parameters, buffers)
            return
        out = vmap(run)(parameters, buffers)
        torch.testing.assert_close(out, torch.stack([member(*batch) for member in members]))
        for index, member in enumerate(members):
            for name, value in member.named_buffers():
                torch.testing.assert_close(buffers[name][index], value, msg=name)

    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_grad_in_evaluation(self, estimator, scale):
        member = ensemble(estimator, scale)[0].eval()
        batch = tuple(part.double() for part in make_data(20, seed=11))

        def loss(parameters):
            return functional_call(member, parameters, batch).square().mean()

        gradients = grad(loss)({name: value.detach() for name, value in member.named_parameters()})
        loss({}).backward()
        torch.testing.assert_close(gradients["hidden.weight"], member.hidden.weight.grad)

    @pytest.mark.parametrize("estimator", ["batch", "dataset"])
    def test_grad_in_training_with_the_buffers_as_an_argument(self, estimator):
        member = ensemble(estimator)[0]
        twin = copy.deepcopy(member)
        batch = tuple(part.double() for part in make_data(20, seed=11))

        def loss(parameters, buffers):
            return functional_call(member, (parameters, buffers), batch).square().mean()

        parameters = {name: value.detach() for name, value in member.named_parameters()}
        buffers = {name: value.clone() for name, value in member.named_buffers()}
        gradients = grad(loss)(parameters, buffers)
        twin(*batch).square().mean().backward()
        torch.testing.assert_close(gradients["hidden.weight"], twin.hidden.weight.grad)


class TestWorkers:
    """Loaders hand out rows; how many processes read them does not matter."""

    def loader(self, num_workers):
        data = TensorDataset(*make_data(70, seed=12))
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).tolist()
        return DataLoader(data, batch_size=16, sampler=order, num_workers=num_workers)

    @pytest.mark.parametrize("estimator", ["running", "dataset"])
    def test_training_and_recalibration_are_the_same(self, estimator):
        states = []
        for num_workers in (0, 2):
            model = make_model(estimator)
            mdnorm.fit_gram(model, ((metadata, labels) for _, metadata, labels in self.loader(num_workers)))
            optimizer = make_optimizer(model)
            for batch in self.loader(num_workers):
                optimizer.zero_grad()
                loss_of(model, *batch).backward()
                optimizer.step()
            mdnorm.recalibrate(model, self.loader(num_workers), progress=False)
            states.append(state_of(model))
        for name, value in states[0].items():
            assert torch.equal(states[1][name], value), name

    @pytest.mark.parametrize("context", ["fork", "spawn"])
    def test_a_model_with_layers_inside_a_dataset(self, context):
        """A frozen encoder that corrects what the workers read."""
        model = make_model("running")
        train(model)
        model.eval()
        images, metadata, _ = make_data(8, seed=13)
        data = Corrected(model, images, metadata)
        workers = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=context)
        with torch.no_grad(), mdnorm.metadata(model, metadata):
            expected = model(images)
        torch.testing.assert_close(torch.cat(list(workers)), expected)


class Corrected(torch.utils.data.Dataset):
    """The outputs of a model, computed where they are read."""

    def __init__(self, model, images, metadata):
        self.model, self.images, self.metadata = model, images, metadata

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad(), mdnorm.metadata(self.model, self.metadata[index : index + 1]):
            return self.model(self.images[index : index + 1])[0]
