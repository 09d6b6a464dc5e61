import copy
import pickle
import threading

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mdnorm
from mdnorm import MetadataNorm
from reference import design_matrix


def data(n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    metadata = torch.randn(n, 2, **options)
    labels = torch.rand(n, 1, **options).round()
    images = torch.randn(n, 6, **options) + metadata[:, :1] + labels
    return images, metadata, labels


def make_model(**options):
    torch.manual_seed(0)
    norm = MetadataNorm(4, 2, 1, dtype=torch.float64, **{"estimator": "batch"} | options)
    return nn.Sequential(nn.Linear(6, 4), norm, nn.Linear(4, 3)).double()


def explicit(model, images, metadata, labels=None):
    return model[2](model[1](model[0](images), metadata, labels))


@pytest.mark.parametrize("training", [True, False])
def test_the_context_gives_what_arguments_give(training):
    images, metadata, labels = data()
    model, twin = make_model().train(training), make_model().train(training)
    with torch.set_grad_enabled(training), mdnorm.metadata(model, metadata, labels):
        out = model(images)
    assert torch.equal(out, explicit(twin, images, metadata, labels))
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_against_least_squares_in_numpy():
    images, metadata, labels = data()
    model = make_model(prior=0.0)
    with mdnorm.metadata(model, metadata.numpy(), labels.numpy()):
        out = model[:2](images)
    features = model[0](images).detach()
    design = torch.as_tensor(design_matrix(metadata, labels))
    coefficients = torch.linalg.lstsq(design, features).solution[:2]
    expected = features - (metadata - metadata.mean(0)) @ coefficients
    torch.testing.assert_close(out, expected)


def test_no_metadata_is_an_error_that_says_which_layer():
    images, metadata, labels = data()
    model = make_model()
    with pytest.raises(
        RuntimeError, match=r"this MetadataNorm\(4, num_metadata=2.* got no metadata: run the"
    ):
        model(images)
    mdnorm.insert(model, "0", num_metadata=2, num_labels=1)
    with pytest.raises(RuntimeError, match=r"MetadataNorm inserted after '0' got no metadata"):
        model[1](model[0](images), metadata, labels)


def test_nothing_is_left_after_the_block_or_after_an_error_in_it():
    images, metadata, labels = data()
    model = make_model()
    with mdnorm.metadata(model, metadata, labels):
        model(images)
    with pytest.raises(RuntimeError, match="got no metadata"):
        model(images)
    with pytest.raises(KeyError, match="inside"), mdnorm.metadata(model, metadata, labels):
        raise KeyError("inside")
    with pytest.raises(RuntimeError, match="got no metadata"):
        model(images)


def test_blocks_nest():
    images, metadata, _ = data()
    model = make_model().eval()
    model[1].estimator.coefficients.fill_(1.0)
    expected = [explicit(model, images, metadata + shift) for shift in (0, 1)]
    with mdnorm.metadata(model, metadata):
        assert torch.equal(model(images), expected[0])
        with mdnorm.metadata(model, metadata + 1):
            assert torch.equal(model(images), expected[1])
            with mdnorm.metadata(model, metadata + 1):
                pass
            assert torch.equal(model(images), expected[1])
        assert torch.equal(model(images), expected[0])


def test_two_models_have_their_own():
    images, metadata, _ = data()
    one, other = make_model().eval(), make_model().eval()
    for model in (one, other):
        model[1].estimator.coefficients.fill_(1.0)
    with mdnorm.metadata(one, metadata), mdnorm.metadata(other, metadata + 1):
        assert torch.equal(one(images), explicit(one, images, metadata))
        assert torch.equal(other(images), explicit(other, images, metadata + 1))


def test_labels_go_to_the_layers_that_use_them():
    images, metadata, labels = data()
    model = nn.Sequential(
        MetadataNorm(6, 2, 0, estimator="batch"), nn.Linear(6, 4), MetadataNorm(4, 2, 1, estimator="batch")
    ).double()
    twin = copy.deepcopy(model)
    with mdnorm.metadata(model, metadata, labels):
        out = model(images)
    assert torch.equal(out, twin[2](twin[1](twin[0](images, metadata)), metadata, labels))


def test_explicit_arguments_come_first():
    images, metadata, labels = data()
    layer, twin = make_model()[1], make_model()[1]
    features = images[:, :4]
    with mdnorm.metadata(layer, metadata + 5, 1 - labels):
        assert torch.equal(layer(features, metadata, labels), twin(features, metadata, labels))
        assert torch.equal(layer(features, labels=labels), twin(features, metadata + 5, labels))
        with pytest.raises(ValueError, match="labels are needed in training"):
            layer(features, metadata)


def test_errors():
    images, metadata, labels = data()
    with (
        pytest.raises(ValueError, match="Linear has no MetadataNorm"),
        mdnorm.metadata(nn.Linear(2, 2), metadata),
    ):
        pass
    with pytest.raises(TypeError, match="got None"), mdnorm.metadata(make_model(), None):
        pass
    with (
        pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"),
        mdnorm.metadata("model", metadata),
    ):
        pass
    unlabelled = nn.Sequential(MetadataNorm(6, 2))
    with pytest.raises(ValueError, match="num_labels=0"), mdnorm.metadata(unlabelled, metadata, labels):
        pass
    with torch.no_grad(), mdnorm.metadata(unlabelled.eval(), metadata, labels):
        assert torch.equal(unlabelled(images), images)
    model = make_model()
    with (
        pytest.raises(ValueError, match="29 rows but there are 30"),
        mdnorm.metadata(model, metadata[1:], labels),
    ):
        model(images)
    with pytest.raises(ValueError, match="NaN"), mdnorm.metadata(model, metadata * float("nan"), labels):
        model(images)


class TestThreads:
    def test_each_sees_its_own(self):
        images, metadata, _ = data()
        model = make_model().eval()
        model[1].estimator.coefficients.fill_(1.0)
        expected = [explicit(model, images, metadata + shift) for shift in range(4)]
        barrier, equal = threading.Barrier(4), [False] * 4

        def work(shift):
            with mdnorm.metadata(model, metadata + shift):
                barrier.wait()
                equal[shift] = torch.equal(model(images), expected[shift])
                barrier.wait()

        threads = [threading.Thread(target=work, args=(shift,)) for shift in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert equal == [True] * 4
        with pytest.raises(RuntimeError, match="got no metadata"):
            model(images)

    def in_thread(self, function):
        result = []

        def work():
            try:
                result.append(function())
            except RuntimeError as error:
                result.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return result[0]

    def test_one_without_any_does_not_take_those_of_another(self):
        images, metadata, _ = data()
        model = make_model().eval()
        with mdnorm.metadata(model, metadata):
            assert "got no metadata" in str(self.in_thread(lambda: model(images)))

    def test_a_backward_pass_in_another_thread(self):
        """As on a GPU: it repeats the checkpointed part, with the metadata of the block or the last one."""
        gradients = []
        for reentrant, elsewhere, inside in ((None, False, True), (False, True, True), (False, True, False)):
            images, metadata, labels = data()
            model = Checkpointed(reentrant)
            images.requires_grad_()
            with mdnorm.metadata(model, metadata, labels):
                loss = model(images).square().mean()
                if inside and elsewhere:
                    self.in_thread(loss.backward)
            if not elsewhere:
                loss.backward()
            elif not inside:
                self.in_thread(loss.backward)
            gradients.append(images.grad)
        assert torch.equal(gradients[0], gradients[1])
        assert torch.equal(gradients[0], gradients[2])

    def test_a_backward_pass_that_cannot_know_whose(self):
        images, metadata, labels = data()
        model = Checkpointed(False)

        def inside(loss):
            with mdnorm.metadata(model, metadata + 1, labels):
                return self.in_thread(loss.backward)

        with mdnorm.metadata(model, metadata, labels):
            loss = model(images).square().mean()
            assert "2 threads have given metadata" in str(self.in_thread(lambda: inside(loss)))


class TestCopies:
    def test_have_none(self):
        images, metadata, labels = data()
        model = make_model()
        with mdnorm.metadata(model, metadata, labels):
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                with pytest.raises(RuntimeError, match="got no metadata"):
                    twin(images)

    def test_have_a_slot_of_their_own(self):
        images, metadata, _ = data()
        model = make_model().eval()
        model[1].estimator.coefficients.fill_(1.0)
        twin = copy.deepcopy(model)
        with mdnorm.metadata(model, metadata), mdnorm.metadata(twin, metadata + 1):
            assert torch.equal(model(images), explicit(model, images, metadata))
            assert torch.equal(twin(images), explicit(twin, images, metadata + 1))


class Checkpointed(nn.Module):
    """Two layers, of which the first is in a part that is (or is not) run again in the backward pass."""

    def __init__(self, reentrant, **options):
        super().__init__()
        torch.manual_seed(0)
        self.part = nn.Sequential(nn.Linear(6, 4), MetadataNorm(4, 2, 1, **options), nn.Tanh())
        self.head = nn.Linear(4, 1)
        self.reentrant = reentrant
        self.double()

    def forward(self, images):
        if self.reentrant is None:
            return self.head(self.part(images))
        return self.head(checkpoint(self.part, images, use_reentrant=self.reentrant))


def steps(reentrant, inside, **options):
    model, gradients = Checkpointed(reentrant, **options), []
    _, metadata, labels = data(100, seed=9)
    mdnorm.fit_gram(model, metadata, labels)
    for seed in range(4):
        images, metadata, labels = data(20, seed)
        images.requires_grad_()
        with mdnorm.metadata(model, metadata, labels):
            loss = model(images).square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append(images.grad)
    return gradients, dict(model.state_dict())


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("estimator", ["batch", "dataset", "running", "recursive", "penalty"])
def test_activation_checkpointing_changes_neither_gradients_nor_state(estimator, scale, reentrant, inside):
    options = {"estimator": estimator, "scale": scale}
    expected, actual = steps(None, inside, **options), steps(reentrant, inside, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_the_metadata_are_inputs_of_one_graph(training):
    images, _, _ = data()
    model = make_model(estimator="running").train(training)
    model[1].estimator.coefficients.fill_(1.0)
    twin, graphs = copy.deepcopy(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        _, metadata, labels = data(seed=seed)
        contexts = mdnorm.metadata(compiled, metadata, labels), mdnorm.metadata(twin, metadata, labels)
        with torch.set_grad_enabled(training), contexts[0], contexts[1]:
            torch.testing.assert_close(compiled(images), twin(images))
    assert len(graphs) == 1


# -- what is easily overlooked ----------------------------------------------------------------------------


def test_a_layer_in_evaluation_while_the_model_trains_is_warned_of():
    images, metadata, labels = data()
    model = make_model(estimator="running")
    model[1].eval()
    with (
        pytest.warns(UserWarning, match="is in evaluation mode and has seen no data"),
        mdnorm.metadata(model, metadata),
    ):
        pass
    with (
        pytest.warns(UserWarning, match=r"Call model\.train\(\)"),
        mdnorm.metadata(model.eval(), metadata, labels),
    ):
        pass
    # Neither where it knows coefficients that are to stay, nor in an evaluation.
    with torch.no_grad(), mdnorm.metadata(model, metadata, labels):
        pass
    with mdnorm.metadata(model.train(), metadata, labels):
        model(images)
    model[1].eval()
    with mdnorm.metadata(model, metadata, labels):
        pass


@pytest.mark.parametrize("name", ["labels", "weights"])
@pytest.mark.parametrize("of_metadata", [pd.DataFrame, lambda values: pd.Series(values[:, 0])])
def test_labels_and_weights_in_another_order_than_the_metadata_are_refused(name, of_metadata):
    _, metadata, labels = data()
    shuffled = pd.Series(labels[:, 0].numpy()).sample(frac=1, random_state=0)
    with (
        pytest.raises(ValueError, match=f"{name} has the same row labels as metadata, but in another order"),
        mdnorm.metadata(make_model(), of_metadata(metadata.numpy()), **{name: shuffled}),
    ):
        pass
