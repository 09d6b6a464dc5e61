import copy
import threading

import pytest
import torch
from torch import nn

import mdnorm
from mdnorm import MetadataNorm, WithMetadata


def data(n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    metadata, images = torch.randn(n, 2, generator=generator), torch.randn(n, 6, generator=generator)
    labels = torch.rand(n, 1, generator=generator).round()
    return images + metadata[:, :1] + labels, metadata, labels


def make_model(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), MetadataNorm(4, 2, 1, **options), nn.Linear(4, 3))


class Classifier(nn.Module):
    """As those of transformers: gives its loss if it gets labels."""

    def __init__(self, **options):
        super().__init__()
        self.body = make_model(**options)

    def forward(self, images, labels=None, scale=1.0):
        logits = scale * self.body(images)
        return logits if labels is None else (logits, logits.sum() + labels.sum())


@pytest.mark.parametrize("training", [True, False])
def test_the_same_as_the_context(training):
    images, metadata, labels = data()
    model = make_model().train(training)
    twin = copy.deepcopy(model)
    with torch.set_grad_enabled(training):
        out = WithMetadata(model)(images, metadata=metadata, labels=labels)
    with torch.set_grad_enabled(training), mdnorm.metadata(twin, metadata, labels):
        assert torch.equal(out, twin(images))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@torch.no_grad()
def test_other_arguments_go_to_the_model():
    images, metadata, labels = data()
    model = WithMetadata(Classifier().eval())
    out = model(images, metadata=metadata, labels=labels)
    torch.testing.assert_close(model(images, scale=2.0, metadata=metadata), 2 * out)
    assert torch.equal(model(images=images, metadata=metadata), out)
    logits, loss = WithMetadata(model.model, forward_labels=True)(images, metadata=metadata, labels=labels)
    assert torch.equal(logits, out)
    assert torch.equal(loss, logits.sum() + labels.sum())


def test_without_metadata_the_context_around_it_counts():
    images, metadata, labels = data()
    model = WithMetadata(make_model())
    twin = copy.deepcopy(model)
    with mdnorm.metadata(model, metadata, labels):
        out = model(images)
    assert torch.equal(out, twin(images, metadata=metadata, labels=labels))
    with pytest.raises(RuntimeError, match="got no metadata"):
        model(images)


def test_labels_without_metadata_are_refused():
    """They would have been left out without a word, and their effect removed with the metadata's."""
    images, metadata, labels = data()
    model = WithMetadata(make_model())
    with (
        mdnorm.metadata(model, metadata, labels),
        pytest.raises(ValueError, match="labels= was given without metadata="),
    ):
        model(images, labels=1 - labels)
    # A model that computes its loss from them gets them, the layers those of the context.
    model = WithMetadata(Classifier(), forward_labels=True)
    twin = copy.deepcopy(model)
    with mdnorm.metadata(model, metadata, labels):
        out = model(images, labels=labels)
    for actual, expected in zip(out, twin(images, metadata=metadata, labels=labels), strict=True):
        assert torch.equal(actual, expected)


def test_the_model_keeps_its_state_dict():
    model = make_model()
    names = list(model.state_dict())
    wrapper = WithMetadata(model)
    assert list(wrapper.model.state_dict()) == names
    assert list(wrapper.state_dict()) == [f"model.{name}" for name in names]


def test_errors():
    images, metadata, _ = data()
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        WithMetadata(make_model)
    with pytest.raises(ValueError, match="Linear has no MetadataNorm"):
        WithMetadata(nn.Linear(6, 4))(images, metadata=metadata)
    with pytest.raises(ValueError, match="labels are needed in training"):
        WithMetadata(make_model())(images, metadata=metadata)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_to_one_graph(training):
    wrapper = WithMetadata(make_model().train(training))
    twin, graphs = copy.deepcopy(wrapper), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(wrapper, fullgraph=True, backend=backend)
    for seed in range(4):
        images, metadata, labels = data(seed=seed)
        with torch.set_grad_enabled(training):
            expected = twin(images, metadata=metadata, labels=labels)
            torch.testing.assert_close(compiled(images, metadata=metadata, labels=labels), expected)
    # The first call may be a graph of its own: the thread had no place for metadata before it.
    assert len(graphs) <= 2


def test_exported_with_the_metadata_as_an_input():
    images, metadata, labels = data()
    wrapper = WithMetadata(make_model())
    wrapper(images, metadata=metadata, labels=labels)
    wrapper.eval()
    program = torch.export.export(wrapper, (images,), {"metadata": metadata})
    for seed in range(2):
        images, metadata, _ = data(seed=seed)
        expected = wrapper(images, metadata=metadata)
        torch.testing.assert_close(program.module()(images, metadata=metadata), expected)


def test_replicas_have_their_own_metadata():
    """`nn.DataParallel` copies a model in this way, and runs the copies in threads."""
    images, metadata, _ = data()
    wrapper = WithMetadata(make_model()).eval()
    wrapper.model[1].estimator.coefficients.fill_(1.0)
    expected = wrapper(images, metadata=metadata)

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            replica._modules[name] = replicate(child)
        replica._parameters, replica._buffers = dict(module._parameters), dict(module._buffers)
        return replica

    replicas = [replicate(wrapper) for _ in range(2)]
    parts = [
        (part, {"metadata": rows}) for part, rows in zip(images.chunk(2), metadata.chunk(2), strict=True)
    ]
    inputs, keywords = [(part,) for part, _ in parts], [rows for _, rows in parts]
    outputs = [None, None]

    def run(index):
        outputs[index] = replicas[index](*inputs[index], **keywords[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat(outputs), expected)


@pytest.fixture
def process_group(tmp_path):
    options = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **options)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["inside", "context"])
def test_in_distributed_data_parallel(process_group, wrapped):
    images, metadata, labels = data()
    model, twin = make_model(), make_model()
    if wrapped == "inside":
        parallel = nn.parallel.DistributedDataParallel(WithMetadata(model))
        out = parallel(images, metadata=metadata, labels=labels)
    else:
        parallel = nn.parallel.DistributedDataParallel(model)
        with mdnorm.metadata(parallel, metadata, labels):
            out = parallel(images)
    expected = WithMetadata(twin)(images, metadata=metadata, labels=labels)
    torch.testing.assert_close(out, expected)
    for loss in (out, expected):
        loss.square().mean().backward()
    gradients = [[parameter.grad for parameter in net.parameters()] for net in (model, twin)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))


class TestRecalibrate:
    def test_a_tuple_and_a_dict(self):
        images, metadata, labels = data(100)
        for batch in (
            (images, metadata, labels),
            {"images": images, "metadata": metadata, "labels": labels},
        ):
            wrapper = WithMetadata(Classifier(prior=0.0))
            assert mdnorm.recalibrate(wrapper, [batch], shrink=False).names == ["model.body.1"]
            # Among samples of one label what is left is not exactly uncorrelated; with it in the model it is.
            features = wrapper.model.body[:2].eval()
            with mdnorm.metadata(wrapper, metadata):
                out = features(images).double()
            design = torch.cat([metadata, labels, torch.ones(100, 1)], 1).double()
            slopes = torch.linalg.lstsq(design, out).solution[:2]
            torch.testing.assert_close(slopes, torch.zeros_like(slopes), atol=2e-6, rtol=0)

    def test_a_batch_without_metadata(self):
        images, _, _ = data()
        for batch in (images, (images,), {"images": images}):
            with pytest.raises(ValueError, match=r"must be \(input, metadata\)"):
                mdnorm.recalibrate(WithMetadata(Classifier()), [batch], progress=False)
