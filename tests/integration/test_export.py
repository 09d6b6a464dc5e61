"""torch.compile of whole models, torch.export and ONNX, with the metadata as an input.

That every estimator compiles to one graph is tested in tests/test_layer.py.
"""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from feature_models import ESTIMATORS, loss_of, make_data, make_model, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import mdnorm

# Raised inside torch, while it traces an autograd function or lists the outputs of a program.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
]


def trained(estimator, **options):
    model = make_model(estimator, **options)
    for seed in range(3):
        loss_of(model, *make_data(32, seed)).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("estimator.weight"):
            nn.init.normal_(parameter)
    model.zero_grad()
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_graph_breaks_in_a_model(estimator, training):
    torch._dynamo.reset()
    model = trained(estimator).train(training)
    wrapper = mdnorm.WithMetadata(model)
    images, metadata, labels = make_data(16, seed=4)
    found = torch._dynamo.explain(wrapper)(images, metadata=metadata, labels=labels)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


def test_inductor_trains_and_evaluates_as_eager():
    """One estimator, the default: the C++ compiler takes its time."""
    torch._dynamo.reset()
    # While the decay rises, that of compiled code is ahead by a batch.
    model = trained("running", rise=0)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(2):
        batch = make_data(16, seed)
        expected, actual = loss_of(twin, *batch), loss_of(compiled, *batch)
        torch.testing.assert_close(actual, expected)
        expected.backward()
        actual.backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
    for name, value in state_of(model).items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=1e-6)
    compiled.eval()
    twin.eval()
    images, metadata, _ = make_data(16, seed=5)
    with torch.no_grad(), mdnorm.metadata(compiled, metadata), mdnorm.metadata(twin, metadata):
        torch.testing.assert_close(compiled(images), twin(images))


class Checkpointed(nn.Module):
    """A layer behind, or inside, a part that is run again in the backward pass."""

    def __init__(self, estimator, inside, scale=False):
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.part = nn.Sequential(nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 4))
        # While the decay rises, that of compiled code is ahead by a batch.
        options = {} if estimator == "penalty" else {"rise": 0}
        self.norm = mdnorm.MetadataNorm(4, 2, 1, estimator=estimator, scale=scale, **options)
        self.head = nn.Linear(4, 1)
        self.checkpointed = True

    def forward(self, images):
        part = nn.Sequential(self.part, self.norm) if self.inside else self.part
        features = images.flatten(1)
        features = checkpoint(part, features, use_reentrant=False) if self.checkpointed else part(features)
        return self.head((features if self.inside else self.norm(features)).tanh())


@pytest.mark.parametrize(
    ("estimator", "inside"), [*((name, False) for name in ESTIMATORS), ("batch", True), ("dataset", True)]
)
def test_compiled_with_checkpointing(estimator, inside):
    """The layer beside the part; inside of it where the coefficients do not come from the state."""
    torch._dynamo.reset()
    plain, model = Checkpointed(estimator, inside), Checkpointed(estimator, inside)
    plain.checkpointed = False
    for each in (plain, model):
        mdnorm.fit_gram(each, *make_data(200, seed=100)[1:])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        batch = make_data(16, seed)
        loss_of(plain, *batch).backward()
        loss_of(compiled, *batch).backward()
    for name, value in state_of(plain).items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(("estimator", "scale"), [("running", False), ("recursive", False), ("batch", True)])
def test_compiled_inside_a_checkpoint_is_refused(estimator, scale, fullgraph):
    """The coefficients come from the state, which a second run would find changed; evaluation works."""
    torch._dynamo.reset()
    model = Checkpointed(estimator, True, scale)
    loss_of(model, *make_data(16, 0)).backward()
    before = {name: value.clone() for name, value in state_of(model).items()}
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    message = "'running', 'recursive' and scale=True cannot train inside of an activation-checkpointed part"
    with pytest.raises(RuntimeError, match=message):
        loss_of(compiled, *make_data(16, 1))
    for name, value in state_of(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)
    compiled.eval()
    images, metadata, _ = make_data(16, 2)
    with mdnorm.metadata(model, metadata):
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [False, True])
def test_exported_program_takes_any_batch_size_and_writes_nothing(estimator, scale):
    wrapper = mdnorm.WithMetadata(trained(estimator, scale=scale)).eval()
    images, metadata, _ = make_data(5, seed=6)
    samples = torch.export.Dim("samples")
    program = torch.export.export(
        wrapper,
        (images,),
        {"metadata": metadata},
        dynamic_shapes={"args": ({0: samples},), "metadata": {0: samples}},
    )
    assert program.graph_signature.buffers_to_mutate == {}
    for num_samples in (2, 17):
        images, metadata, _ = make_data(num_samples, seed=num_samples)
        expected = wrapper(images, metadata=metadata)
        torch.testing.assert_close(program.module()(images, metadata=metadata), expected)


# The name of the batch dimension serves both inputs.
@pytest.mark.filterwarnings("ignore:.*axis name.*will not be used:UserWarning")
@pytest.mark.parametrize(
    ("estimator", "scale"),
    [("running", True), ("dataset", False), ("penalty", False)],
)
def test_onnx_equals_torch(estimator, scale, tmp_path):
    """A layer by channel behind the convolution, one by element behind the hidden layer."""
    wrapper = mdnorm.WithMetadata(trained(estimator, scale=scale)).eval()
    images, metadata, _ = make_data(5, seed=6)
    samples = torch.export.Dim("samples")
    program = torch.onnx.export(
        wrapper,
        (images,),
        kwargs={"metadata": metadata},
        input_names=["images", "metadata"],
        dynamic_shapes={"args": ({0: samples},), "metadata": {0: samples}},
        dynamo=True,
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["images", "metadata"]
    for num_samples in (5, 1, 17):
        images, metadata, _ = make_data(num_samples, seed=num_samples)
        (found,) = session.run(None, {"images": images.numpy(), "metadata": metadata.numpy()})
        with torch.no_grad():
            expected = wrapper(images, metadata=metadata).numpy()
            shifted = wrapper(images, metadata=metadata + 1).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        # The metadata do matter: they are an input, not a constant of the graph.
        assert np.abs(shifted - found).max() > 1e-3


class Explicit(nn.Module):
    """Hands the metadata to its layer."""

    def __init__(self, model):
        super().__init__()
        self.model = mdnorm.WithMetadata(model)

    def forward(self, images, metadata):
        return self.model(images, metadata=metadata)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [False, True])
def test_traced_as_for_the_graph_of_tensorboard(estimator, scale):
    """``SummaryWriter.add_graph`` runs torch.jit.trace; metadata and batch size are not part of the trace."""
    net = Explicit(trained(estimator, scale=scale)).eval()
    images, metadata, _ = make_data(5, seed=6)
    traced = torch.jit.trace(net, (images, metadata))
    for num_samples in (1, 17):
        images, metadata, _ = make_data(num_samples, seed=num_samples)
        torch.testing.assert_close(traced(images, metadata), net(images, metadata))
        assert not torch.allclose(traced(images, metadata + 1), net(images, metadata), atol=1e-3)
