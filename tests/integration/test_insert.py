import copy
import dataclasses
import functools
import io
import math
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import mdnorm
from mdnorm import MetadataNorm
from mdnorm.estimators import LeastSquares
from mdnorm.integration import insertions
from reference import residual

# Many of these models have no head behind the layer.
pytestmark = pytest.mark.filterwarnings("ignore:the output of .* is that of the")


class Block(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 2, 3, padding=1, stride=stride), nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(Block(), Block(stride=2), nn.BatchNorm1d(2))
        self.fc1, self.head = nn.Linear(8, 4), nn.Linear(4, 1)
        self.double()

    def forward(self, images):
        return self.head(self.fc1(self.features(images).flatten(1)).tanh())


def data(n=40, seed=0, shape=(2, 8)):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    metadata = torch.randn(n, 2, **options)
    labels = torch.rand(n, 1, **options).round()
    shift = (metadata[:, :1] + labels).reshape(n, *[1] * len(shape))
    return torch.randn(n, *shape, **options) + shift, metadata, labels


def recorded(model, name, run):
    outputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: outputs.append(output))
    run()
    handle.remove()
    return outputs


class TestWhere:
    @pytest.mark.parametrize(
        ("after", "expected"),
        [
            ("fc1", ["fc1"]),
            (["head", "fc1"], ["fc1", "head"]),
            ("features.*", ["features.0", "features.1", "features.2"]),
            ("**.conv2", ["features.0.conv2", "features.1.conv2"]),
            ("features.*.conv2", ["features.0.conv2", "features.1.conv2"]),
            ("features.**", ["features", "features.0", "features.0.conv1", "features.0.conv2", "features.1",
                             "features.1.conv1", "features.1.conv2", "features.2"]),
            ("features.?.conv1", ["features.0.conv1", "features.1.conv1"]),
            ("f*", ["features", "fc1"]),
            (nn.Linear, ["fc1", "head"]),
            (Block, ["features.0", "features.1"]),
            ([nn.BatchNorm1d, "head"], ["features.2", "head"]),
            ("", [""]),
        ],
        ids=str,
    )  # fmt: skip
    def test_names_patterns_and_types(self, after, expected):
        model = Net()
        report = mdnorm.insert(model, after, num_metadata=2)
        assert [row.name for row in report] == expected
        layers = [f"{name}.metadata_norm".lstrip(".") for name in expected]
        assert sorted(row.layer for row in report) == sorted(layers)
        found = [name for name, module in model.named_modules() if isinstance(module, MetadataNorm)]
        assert sorted(found) == sorted(layers)

    def test_a_module(self):
        model = Net()
        assert [row.name for row in mdnorm.insert(model, model.fc1)] == ["fc1"]
        assert mdnorm.remove(model, [model.fc1]) == ["fc1"]

    def test_the_layer_and_its_parts_are_not_matched(self):
        model = Net()
        mdnorm.insert(model, "fc1")
        model.own = MetadataNorm(3, 2)
        with pytest.raises(ValueError, match="no module of type MetadataNorm: its types are"):
            mdnorm.insert(model, MetadataNorm)
        with pytest.raises(ValueError, match=r"no module 'fc1\.metadata_norm'"):
            mdnorm.insert(model, "fc1.metadata_norm")
        with pytest.raises(ValueError, match="it is a MetadataNorm of its own"):
            mdnorm.insert(model, model.own)

    @pytest.mark.parametrize(
        ("after", "message"),
        [
            (
                "fc2",
                r"Net has no module 'fc2': did you mean 'fc1'\? The last of its 10 modules are "
                r"'features\.2', 'fc1', 'head'\.$",
            ),
            ("feature.0.conv2", r"did you mean 'features\.0\.conv2', 'features\.1\.conv2'"),
            ("conv2", r"did you mean .*'features\.0\.conv2'"),
            ("xyz", r"its modules are features, features\.0, features\.0\.conv1"),
            ("head.*", r"no module 'head\.\*'"),
            (
                nn.Conv2d,
                r"no module of type Conv2d: its types are BatchNorm1d, Block, Conv1d, Linear, Sequential",
            ),
            (nn.Linear(2, 2), "a Linear that is not part of the Net"),
            ([], "after is empty"),
        ],
        ids=str,
    )
    def test_nothing_found(self, after, message):
        model = Net()
        with pytest.raises(ValueError, match=message):
            mdnorm.insert(model, after)
        assert len(insertions(model)) == 0

    @pytest.mark.parametrize("after", [3, None, int, [None]])
    def test_what_is_no_place(self, after):
        with pytest.raises(TypeError, match="after must be the name of a module, a pattern"):
            mdnorm.insert(Net(), after)

    def test_containers_that_have_no_output(self):
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(2, 2)])
        with pytest.raises(ValueError, match=r"is an ModuleList, which has no output.*'blocks\.\*'"):
            mdnorm.insert(model, "blocks")
        assert [row.name for row in mdnorm.insert(model, "blocks.*")] == ["blocks.0"]

    def test_a_sequential_with_a_forward_of_its_own(self):
        class Doubled(nn.Sequential):
            def forward(self, x):
                for module in self:
                    x = 2 * module(x)
                return x

        model = nn.Sequential(Doubled(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match=r"a forward of its own \(Doubled\).*'0\.0'"):
            mdnorm.insert(model, "0")

    def test_wrapped_models(self):
        """A graph that has run would not be traced again, and silently leave the layer out."""
        compiled = Net()
        compiled.compile(backend="eager")
        for model in (torch.compile(Net(), backend="eager"), nn.DataParallel(Net()), compiled):
            with pytest.raises(ValueError, match="insert into the plain model first"):
                mdnorm.insert(model, "**.fc1")
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
            mdnorm.insert("model", "fc1")

    def test_wrapped_parts(self):
        model = Net()
        model.features = torch.compile(model.features, backend="eager")
        for after in ("features", "**.conv2", Block):
            with pytest.raises(ValueError, match=r"inside, a compiled or wrapped module \(OptimizedModule\)"):
                mdnorm.insert(model, after)
        assert [row.name for row in mdnorm.insert(model, "fc1")] == ["fc1"]

    def test_a_name_that_is_taken(self):
        model = Net()
        model.fc1.metadata_norm = 3
        with pytest.raises(ValueError, match="'fc1' has something else of the name 'metadata_norm'"):
            mdnorm.insert(model, "fc1")


class TestWhatItDoes:
    def test_against_least_squares_in_numpy(self):
        model = Net()
        images, metadata, labels = data()
        before = recorded(model, "fc1", lambda: model(images))[0].detach()
        mdnorm.insert(model, "fc1", num_metadata=2, num_labels=1, estimator="batch", prior=0)

        def run():
            with mdnorm.metadata(model, metadata, labels):
                model(images)

        after = recorded(model, "fc1", run)[0].detach()
        expected = torch.as_tensor(residual(before.numpy(), metadata.numpy(), labels.numpy()))
        torch.testing.assert_close(after, expected)

    @given(st.integers(5, 40), st.lists(st.integers(1, 4), min_size=0, max_size=3), st.booleans())
    def test_any_shape_against_numpy(self, n, shape, tuple_output):
        class Given(nn.Module):
            def forward(self, features):
                return (features, "rest") if tuple_output else features

        model = Given()
        features, metadata, labels = data(n, shape=(2, *shape))
        mdnorm.insert(model, "", num_labels=1, estimator="batch", prior=0)
        with mdnorm.metadata(model, metadata, labels):
            out = model(features)
        out = out[0] if tuple_output else out
        expected = residual(features.flatten(1).numpy(), metadata.numpy(), labels.numpy())
        torch.testing.assert_close(out.flatten(1), torch.as_tensor(expected), atol=1e-8, rtol=1e-8)

    def test_a_sequential_gets_it_as_its_last_module(self):
        model, twin = Net(), Net()
        mdnorm.insert(model, "features", estimator="batch", num_metadata=2, num_labels=1)
        mdnorm.insert(twin, "features.2", estimator="batch", num_metadata=2, num_labels=1)
        assert model.features[-1] is model.features.metadata_norm
        images, metadata, labels = data()
        with mdnorm.metadata(model, metadata, labels), mdnorm.metadata(twin, metadata, labels):
            assert torch.equal(model(images), twin(images))
        assert insertions(model)[0].output_shape == insertions(twin)[0].output_shape == (40, 2, 4)

    def test_the_gradient_goes_through_the_coefficients(self):
        model = nn.Sequential(nn.Linear(3, 2)).double()
        mdnorm.insert(model, "0", num_labels=1, estimator="batch", decay=0)
        images, metadata, labels = data(12, shape=(3,))

        def function(images):
            with mdnorm.metadata(model, metadata, labels):
                return model(images)

        assert torch.autograd.gradcheck(function, images.requires_grad_())

    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("estimator", ["batch", "dataset", "running", "recursive", "penalty"])
    @pytest.mark.parametrize("training", [True, False])
    def test_an_activation_that_works_in_place_may_follow(self, estimator, granularity, training):
        images, metadata, labels = data()
        results = []
        for inplace in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(inplace), nn.Linear(8, 1)).double()
            options = {"estimator": estimator, "granularity": granularity}
            mdnorm.insert(model, "0", num_metadata=2, num_labels=1, example=images, **options)
            mdnorm.fit_gram(model, metadata, labels)
            with mdnorm.metadata(model.train(training), metadata, labels):
                model(images).square().mean().backward()
            gradients = [parameter.grad for parameter in model[0].parameters() if parameter.grad is not None]
            results.append((gradients, dict(model.state_dict())))
        torch.testing.assert_close(results[1], results[0])

    def test_several_calls_each_corrected_one_state(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Linear(6, 4)

            def forward(self, left, right):
                return self.encoder(left), self.encoder(right)

        model = Twice().double()
        left, metadata, labels = data(shape=(6,))
        right = data(seed=1, shape=(6,))[0] + 2 * metadata[:, 1:]
        before = model(left, right)
        mdnorm.insert(model, "encoder", num_labels=1, estimator="batch", window=math.inf, prior=0)
        with mdnorm.metadata(model, metadata, labels):
            outputs = model(left, right)
        for output, features in zip(outputs, before, strict=True):
            expected = residual(features.detach().numpy(), metadata.numpy(), labels.numpy())
            torch.testing.assert_close(output, torch.as_tensor(expected))
        assert float(model.encoder.metadata_norm.estimator.weight) == 80

    def test_a_module_in_two_places_has_one_layer(self):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"one": nn.Sequential(shared), "other": nn.Sequential(shared)})
        report = mdnorm.insert(model, ["other.0", "one.0"])
        assert [(row.name, row.other_names) for row in report] == [("one.0", ("other.0",))]
        assert "one.0 = other.0" in str(report)

    def test_a_module_that_a_transformer_reads_the_weights_of(self):
        """A container in its place would have no weight; the fast path of torch gives way to it."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
        tokens, metadata, _ = data(shape=(3, 8))
        mdnorm.insert(layer, "linear2", granularity="channel", channel_dim=-1, num_metadata=2, prior=0)
        with torch.no_grad(), mdnorm.metadata(layer, metadata):
            mdnorm.recalibrate(layer, [(tokens, metadata)], shrink=False, progress=False)
            outputs = recorded(layer, "linear2", lambda: layer(tokens))
        assert len(outputs) == 1
        covariance = (metadata - metadata.mean(0)).mT @ outputs[0].mean(1)
        torch.testing.assert_close(covariance, torch.zeros_like(covariance), atol=1e-10, rtol=0)


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor | None = None
    note: str = ""


Pair = namedtuple("Pair", ["first", "second"])


class Plain:
    def __init__(self, features):
        self.features = features


class Giving(nn.Module):
    """Puts out features in some structure."""

    def __init__(self, structure):
        super().__init__()
        self.structure = structure

    def forward(self, features):
        return self.structure(features)


OUTPUTS = [
    (lambda f: (f, "state"), None, lambda o: o[0], tuple),
    (lambda f: [None, f], None, lambda o: o[1], list),
    (lambda f: (f + 1, f), 1, lambda o: o[1], tuple),
    (lambda f: (f + 1, f), -1, lambda o: o[1], tuple),
    (lambda f: Pair(f, 3), None, lambda o: o.first, Pair),
    (lambda f: Pair(f + 1, f), "second", lambda o: o.second, Pair),
    (lambda f: {"a": f + 1, "b": f}, "b", lambda o: o["b"], dict),
    (lambda f: OrderedDict(note="x", b=f), None, lambda o: o["b"], OrderedDict),
    (lambda f: Result(f), None, lambda o: o.logits, Result),
    (lambda f: Result(f + 1, f), "features", lambda o: o.features, Result),
    (lambda f: Result(f + 1, f), lambda o: o.features, lambda o: o.features, Result),
    (lambda f: (f + 1, f), lambda o: o[1], lambda o: o[1], tuple),
    (lambda f: Plain(f), "features", lambda o: o.features, Plain),
]


class TestOutputs:
    @pytest.mark.parametrize(("structure", "selector", "get", "kind"), OUTPUTS)
    def test_structures(self, structure, selector, get, kind):
        model = Giving(structure)
        features, metadata, labels = data(shape=(3,))
        originals = []
        model.register_forward_hook(lambda _, __, output: originals.append((output, get(output))))
        mdnorm.insert(model, "", num_labels=1, estimator="batch", prior=0, output=selector)
        with mdnorm.metadata(model, metadata, labels):
            out = model(features)
        assert type(out) is kind
        expected = residual(features.numpy(), metadata.numpy(), labels.numpy())
        torch.testing.assert_close(get(out), torch.as_tensor(expected))
        # The module may keep what it put out: that is not touched.
        original, value = originals[0]
        assert get(original) is value
        assert torch.equal(value, features)

    def test_what_is_beside_it_stays(self):
        model = Giving(lambda f: Result(f + 1, f, "note"))
        features, metadata, labels = data(shape=(3,))
        mdnorm.insert(model, "", num_labels=1, estimator="batch", output="features")
        with mdnorm.metadata(model, metadata, labels):
            out = model(features)
        assert torch.equal(out.logits, features + 1)
        assert out.note == "note"

    @pytest.mark.parametrize(
        ("structure", "selector", "message"),
        [
            (lambda f: ("a", 1), None, "no tensor to correct. Give output="),
            (lambda f: 3, None, "'' is a int: no tensor"),
            (lambda f: ("a", f), 0, "output= selects a str"),
            (lambda f: (f,), lambda o: o[0] * 2, "must return an entry"),
        ],
    )
    def test_errors(self, structure, selector, message):
        model = Giving(structure)
        features, metadata, _ = data(shape=(3,))
        mdnorm.insert(model, "", output=selector)
        with pytest.raises(TypeError, match=message), mdnorm.metadata(model, metadata):
            model(features)

    def test_keys_and_indices_that_are_not_there(self):
        features, metadata, _ = data(shape=(3,))
        for selector, error, message in (("c", KeyError, "its keys are 'a'"), (4, TypeError, "no entry 4")):
            model = Giving(lambda f: {"a": f})
            mdnorm.insert(model, "", output=selector)
            with pytest.raises(error, match=message), mdnorm.metadata(model, metadata):
                model(features)

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_an_lstm(self, batch_first):
        model = nn.LSTM(3, 4, batch_first=batch_first).double()
        features, metadata, labels = data(shape=(5, 3))
        features = features if batch_first else features.transpose(0, 1)
        before, (hidden, _) = model(features)
        options = {"num_labels": 1, "estimator": "batch", "prior": 0}
        mdnorm.insert(model, "", sample_dim=0 if batch_first else 1, **options)
        with mdnorm.metadata(model, metadata, labels):
            after, (same, _) = model(features)
        assert torch.equal(hidden, same)
        rows = [x if batch_first else x.transpose(0, 1) for x in (before.detach(), after)]
        expected = residual(rows[0].flatten(1).numpy(), metadata.numpy(), labels.numpy())
        torch.testing.assert_close(rows[1].flatten(1), torch.as_tensor(expected))

    def test_an_lstm_whose_second_dimension_counts_the_samples(self):
        model = nn.LSTM(3, 4).double()
        features, metadata, _ = data(shape=(5, 3))
        with pytest.warns(UserWarning, match=r"'' is a LSTM with batch_first=False.*: give sample_dim=1"):
            mdnorm.insert(model, "")
        with (
            pytest.raises(ValueError, match="after '': metadata has 40 rows"),
            mdnorm.metadata(model, metadata),
        ):
            model(features.transpose(0, 1))

    def test_packed_sequences(self):
        model = nn.LSTM(3, 4, batch_first=True).double()
        features, metadata, _ = data(shape=(5, 3))
        packed = pack_padded_sequence(features, torch.full((40,), 5), batch_first=True)
        mdnorm.insert(model, "")
        with pytest.raises(TypeError, match="is a PackedSequence"), mdnorm.metadata(model, metadata):
            model(packed)

    def test_a_sequential_whose_last_module_gives_a_tuple(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, batch_first=True)).double()
        features, metadata, _ = data(shape=(5, 3))
        with pytest.raises(ValueError, match=r"with output= or sample_dim= insert after '0\.1'"):
            mdnorm.insert(nn.Sequential(model), "0", output=0)
        mdnorm.insert(model, "")
        with pytest.raises(TypeError, match="insert after its last module"), mdnorm.metadata(model, metadata):
            model(features)


class TestAgain:
    def test_the_same_options_change_nothing(self):
        model = Net()
        first = mdnorm.insert(model, "fc1", num_metadata=2, window=100)
        layer = model.fc1.metadata_norm
        second = mdnorm.insert(model, ["fc1", "head"], num_metadata=2, window=100)
        assert model.fc1.metadata_norm is layer
        assert len(model.fc1._forward_hooks) == 1
        assert [row.name for row in second] == [row.name for row in first] == ["fc1", "head"]

    def test_each_layer_has_an_estimator_of_its_own(self):
        model, sizes = Net(), {"num_metadata": 2, "example": data(3)[0]}
        own = functools.partial(LeastSquares, window=100)
        for _ in range(2):
            mdnorm.insert(model, ["fc1", "head"], estimator=own, **sizes)
        assert model.fc1.metadata_norm.estimator is not model.head.metadata_norm.estimator

    def test_other_options_are_an_error_that_leaves_the_model(self):
        model = Net()
        mdnorm.insert(model, "fc1", num_metadata=2, window=100)
        message = r"'fc1' has a MetadataNorm already, with other options \(window=100 instead of 200\)"
        with pytest.raises(ValueError, match=message):
            mdnorm.insert(model, ["head", "fc1"], num_metadata=2, window=200)
        assert [row.name for row in insertions(model)] == ["fc1"]

    @pytest.mark.parametrize("sample_dim", [2, 9, -3])
    def test_a_dimension_that_the_output_does_not_have(self, sample_dim):
        model, (images, metadata, _) = Net(), data()
        message = rf"sample_dim={sample_dim}, but the output of 'fc1' has shape \(40, 4\)\."
        with pytest.raises(ValueError, match=message):
            mdnorm.insert(model, "fc1", sample_dim=sample_dim, example=images)
        assert len(insertions(model)) == 0
        mdnorm.insert(model, "fc1", sample_dim=sample_dim)
        with pytest.raises(ValueError, match=message), mdnorm.metadata(model, metadata):
            model(images)

    def test_wrong_options_leave_the_model(self):
        model = Net()
        for options, error in (({"window": -1}, ValueError), ({"windows": 3}, TypeError)):
            with pytest.raises(error, match="after 'fc1': "):
                mdnorm.insert(model, ["fc1", "head"], **options)
        assert len(insertions(model)) == 0


class TestRemove:
    @pytest.mark.parametrize("after", ["fc1", "features", "", nn.Linear, "features.**"], ids=str)
    def test_the_model_is_what_it_was(self, after):
        model, images = Net().eval(), data()[0]
        state, out, text = copy.deepcopy(model.state_dict()), model(images), repr(model)
        children = [(name, id(module)) for name, module in model.named_modules()]
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        mdnorm.insert(model, after, num_metadata=2)
        assert len(model.state_dict()) >= len(state)
        removed = mdnorm.remove(model)
        assert len(removed) == 1 or after in (nn.Linear, "features.**")
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [(name, id(module)) for name, module in model.named_modules()] == children
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert not any(module._forward_hooks for module in model.modules())
        assert repr(model) == text
        assert torch.equal(model(images), out)

    def test_some(self):
        model = Net()
        mdnorm.insert(model, nn.Linear)
        assert mdnorm.remove(model, "fc1") == ["fc1"]
        assert [row.name for row in insertions(model)] == ["head"]
        with pytest.raises(ValueError, match="no MetadataNorm was inserted after 'fc1'"):
            mdnorm.remove(model, "fc1")
        assert mdnorm.remove(Net()) == []

    def test_then_insert_again(self):
        model = Net()
        for window in (100, 200):
            mdnorm.insert(model, "fc1", num_metadata=2, num_features=4, window=window)
            assert model.fc1.metadata_norm.estimator.window == window
            mdnorm.remove(model)


class TestState:
    def trained(self):
        model = Net()
        images, metadata, labels = data()
        mdnorm.insert(model, ["features", "fc1"], num_labels=1)
        with mdnorm.metadata(model, metadata, labels):
            model(images)
        return model.eval(), images, metadata

    def run(self, model, images, metadata):
        with torch.no_grad(), mdnorm.metadata(model, metadata):
            return model(images)

    def test_the_names_of_the_model_stay(self):
        model, _, _ = self.trained()
        names = [name for name in model.state_dict() if "metadata_norm" not in name]
        assert names == list(Net().state_dict())

    def test_round_trip(self):
        model, images, metadata = self.trained()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        twin = Net()
        mdnorm.insert(twin, ["features", "fc1"], num_labels=1)
        twin.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(self.run(twin.eval(), images, metadata), self.run(model, images, metadata))

    def test_an_earlier_checkpoint_loads(self):
        model, _, _ = self.trained()
        layer = copy.deepcopy(model.fc1.metadata_norm.state_dict())
        earlier = {name: torch.full_like(value, 2) for name, value in Net().state_dict().items()}
        assert str(model.load_state_dict(earlier)) == "<All keys matched successfully>"
        assert bool((model.fc1.weight == 2).all())
        assert all(
            torch.equal(value, layer[name]) for name, value in model.fc1.metadata_norm.state_dict().items()
        )

    def test_half_a_layer_does_not(self):
        model, _, _ = self.trained()
        state = model.state_dict()
        del state["fc1.metadata_norm.estimator.coefficients"]
        with pytest.raises(RuntimeError, match=r"Missing key.*fc1\.metadata_norm\.estimator\.coefficients"):
            model.load_state_dict(state)

    def test_copies_and_pickles(self):
        model, images, metadata = self.trained()
        expected = self.run(model, images, metadata)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(self.run(twin, images, metadata), expected)
            twin.fc1.metadata_norm.estimator.coefficients.zero_()
            assert not torch.equal(self.run(twin, images, metadata), expected)
            assert str(insertions(twin)) == str(insertions(model))
            assert mdnorm.remove(twin) == ["features", "fc1"]
            assert torch.equal(twin(images), twin(images))
        assert torch.equal(self.run(model, images, metadata), expected)

    def test_hooks_of_a_new_process_do_not_take_its_place(self, tmp_path):
        """A process counts its hooks from zero, and would overwrite that of a pickled model."""
        model = nn.Linear(2, 2)
        mdnorm.insert(model, "")
        torch.save(model, tmp_path / "model.pt")
        code = (
            "import sys, torch, mdnorm; model = torch.load(sys.argv[1], weights_only=False); "
            "[model.register_forward_hook(lambda *_: None) for _ in range(5)]; "
            "print(len(model._forward_hooks), len(mdnorm.remove(model)), len(model._forward_hooks))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.split() == ["6", "1", "5"]

    def test_a_part_taken_out_keeps_its_layer(self):
        model, images, metadata = self.trained()
        part = copy.deepcopy(model.features)
        with mdnorm.metadata(part, metadata), mdnorm.metadata(model, metadata):
            assert torch.equal(part(images), model.features(images))

    def test_mode_device_and_dtype_are_those_of_the_module(self):
        model = Net().eval()
        mdnorm.insert(model, "fc1", num_metadata=2, num_labels=0, num_features=4)
        layer = model.fc1.metadata_norm
        assert not layer.training
        assert layer.estimator.coefficients.dtype == torch.float64
        assert model.train().fc1.metadata_norm.training
        model.float()
        assert layer.estimator.coefficients.dtype == torch.float32
        on_meta = nn.Linear(2, 2, device="meta")
        mdnorm.insert(on_meta, "", num_metadata=2, num_labels=0, num_features=2)
        assert on_meta.metadata_norm.estimator.coefficients.is_meta


class TestReport:
    def test_shapes_come_with_the_first_batch(self):
        model = Net()
        report = mdnorm.insert(model, ["fc1", "features.*.conv2"], granularity="channel")
        assert "at the first batch" in str(report)
        assert [row.output_shape for row in report] == [None] * 3
        assert [row.num_values for row in report] == [None] * 3
        assert [row.num_coefficients for row in report] == [None] * 3
        images, metadata, _ = data()
        with mdnorm.metadata(model, metadata):
            model(images)
        assert [row.output_shape for row in report] == [(40, 2, 8), (40, 2, 4), (40, 4)]
        assert [row.num_values for row in report] == [16, 8, 4]
        assert [row.num_coefficients for row in report] == [2, 2, 4]
        assert str(report).splitlines() == [
            "after             type    layer                           output     values  coefficients",
            "features.0.conv2  Conv1d  features.0.conv2.metadata_norm  (N, 2, 8)  16      2",
            "features.1.conv2  Conv1d  features.1.conv2.metadata_norm  (N, 2, 4)  8       2",
            "fc1               Linear  fc1.metadata_norm               (N, 4)     4       4",
        ]

    @pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
    def test_shapes_from_an_example(self, kind):
        model, images = Net(), data(5)[0]
        state = copy.deepcopy(model.state_dict())
        example = {"tensor": images, "tuple": (images,), "dict": {"images": images}}[kind]
        options = {"num_metadata": 2, "num_labels": 1}
        report = mdnorm.insert(model, "fc1", example=example, **options)
        assert report[0].output_shape == (5, 4)
        assert model.fc1.metadata_norm.estimator.coefficients.shape == (2, 4)
        # Batch normalisation must not learn from it, and the mode stays.
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        assert all(module.training for module in model.modules())
        # What is there already stands aside.
        report = mdnorm.insert(model, ["fc1", "features"], example=example, **options)
        assert [row.output_shape for row in report] == [(5, 2, 4), (5, 4)]
        _, metadata, labels = data(5)
        with mdnorm.metadata(model, metadata, labels):
            assert model(images).shape == (5, 1)

    def test_an_example_that_does_not_fit_and_is_no_first_forward_pass(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        mdnorm.insert(model, "2", num_metadata=1)
        with pytest.raises(ValueError, match=r"^after '0': features of a sample have shape"):
            mdnorm.insert(model, "0", num_metadata=1, num_features=9, example=torch.randn(5, 3))
        mdnorm.insert(model, "0", num_metadata=1, example=torch.randn(5, 3))
        with (
            mdnorm.metadata(model, torch.randn(20, 1)),
            pytest.warns(UserWarning, match="the output of '2' is"),
        ):
            model(torch.randn(20, 3))

    def test_an_example_that_does_not_reach_it(self):
        model = Net()
        model.unused = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="'unused' did not run on the example"):
            mdnorm.insert(model, ["unused", "fc1"], example=data(3)[0])
        assert len(insertions(model)) == 0
        assert not any(module._forward_hooks for module in model.modules())

    def test_with_sample_dim_and_channels(self):
        model = nn.LSTM(3, 4)
        report = mdnorm.insert(
            model, "", sample_dim=1, granularity="channel", channel_dim=-1, example=torch.randn(7, 5, 3)
        )
        assert report[0].output_shape == (5, 7, 4)
        assert report[0].num_features == (4,)

    def test_an_empty_one(self):
        assert str(insertions(Net())) == "no MetadataNorm was inserted"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_to_one_graph(training):
    model = Net()
    options = {"num_metadata": 2, "num_labels": 1, "example": data(3)[0]}
    mdnorm.insert(model, ["features", "features.0.conv1", "fc1"], **options)
    model.train(training)
    twin, graphs = copy.deepcopy(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        images, metadata, labels = data(seed=seed)
        contexts = mdnorm.metadata(compiled, metadata, labels), mdnorm.metadata(twin, metadata, labels)
        with torch.set_grad_enabled(training), contexts[0], contexts[1]:
            torch.testing.assert_close(compiled(images), twin(images))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_outputs_that_are_no_tensor():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.pair, self.giving = Giving(lambda f: (f, 2 * f)), Giving(lambda f: Result(f + 1, f))

        def forward(self, x):
            return self.giving(self.pair(self.linear(x))[0]).features

    model = Model().double()
    features, metadata, labels = data(shape=(5, 3))
    options = {"num_metadata": 2, "num_labels": 1, "example": features}
    mdnorm.insert(model, "giving", output="features", **options)
    mdnorm.insert(model, "pair", **options)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with mdnorm.metadata(compiled, metadata, labels), mdnorm.metadata(twin, metadata, labels):
        torch.testing.assert_close(compiled(features), twin(features))


def test_recalibrate_feeds_inserted_layers():
    model = Net()
    images, metadata, labels = data(100)
    mdnorm.insert(model, ["features", "fc1"], num_labels=1, prior=0)
    batches = [(images[part], metadata[part], labels[part]) for part in torch.arange(100).split(30)]
    order = mdnorm.recalibrate(model, batches, shrink=False).names
    assert order == ["features.metadata_norm", "fc1.metadata_norm"]

    def run():
        with torch.no_grad(), mdnorm.metadata(model.eval(), metadata):
            model(images)

    out = recorded(model, "fc1", run)[0]
    design = torch.cat([metadata, labels, torch.ones(100, 1)], dim=1)
    slopes = torch.linalg.lstsq(design, out).solution[:2]
    torch.testing.assert_close(slopes, torch.zeros_like(slopes), atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("default")
class TestWarnings:
    """A layer behind the output layer, or where nothing would be corrected."""

    OUTPUT = "the output of {!r} is that of the {}: logits would be corrected"

    def run(self, model, *inputs):
        with mdnorm.metadata(model, torch.randn(len(inputs[0]), 2)):
            return model(*inputs)

    def silent(self, function):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return function()

    @pytest.mark.parametrize("with_example", [True, False])
    @pytest.mark.parametrize(
        ("give", "is_output"),
        [
            (lambda logits: logits, True),
            (lambda logits: logits.squeeze(1), True),
            (lambda logits: {"loss": logits.mean(), "logits": logits[:, 0]}, True),
            (lambda logits: (logits.mean(1), logits), True),
            (lambda logits: Result(logits), True),
            (lambda logits: 2 * logits, False),
            (lambda logits: logits.mean(0), False),
        ],
    )
    def test_any_model_with_an_example_or_at_its_first_forward_pass(self, with_example, give, is_output):
        class Classifier(nn.Module):
            def __init__(self):
                super().__init__()
                # Registered in another order than they run.
                self.head, self.encoder = nn.Sequential(nn.Linear(4, 1)), nn.Linear(3, 4)

            def forward(self, x):
                return give(self.head(self.encoder(x)))

        model, x = Classifier(), torch.randn(6, 3)
        for training in (True, False):
            model.train(training)
            self.silent(lambda: mdnorm.insert(model, "encoder", example=x if with_example else None))
            self.silent(lambda: self.run(model, x))
            for name in ("head", "head.0"):
                options = {"example": x} if with_example else {}

                def both(name=name, options=options):
                    mdnorm.insert(model, name, **options)
                    self.run(model, x)

                if is_output:
                    with pytest.warns(UserWarning, match=self.OUTPUT.format(name, "Classifier")) as caught:
                        both()
                    assert len(caught) == 1
                else:
                    self.silent(both)
                self.silent(lambda: self.run(model, x))
                mdnorm.remove(model, name)
            mdnorm.remove(model)
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_an_encoder_says_that_it_is_one(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.silent(lambda: mdnorm.insert(model, ""))
        self.silent(lambda: self.run(model, torch.randn(5, 3)))

    def test_a_module_that_does_not_run(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.read, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)

            def forward(self, x):
                return self.head(nn.functional.linear(self.used(x), self.read.weight, self.read.bias))

        model = Functional()
        mdnorm.insert(model, ["used", "read"])
        for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), model):
            with pytest.warns(UserWarning, match="'read' did not run in the first forward pass") as caught:
                self.run(twin, torch.randn(5, 3))
            assert len(caught) == 1
            self.silent(lambda twin=twin: self.run(twin, torch.randn(5, 3)))

    def test_a_forward_pass_that_fails_does_not_count(self):
        model = Net()
        mdnorm.insert(model, "head", num_metadata=2)
        with pytest.raises(RuntimeError, match="got no metadata"):
            model(data(5)[0])
        images, metadata, _ = data(5)
        with (
            pytest.warns(UserWarning, match=self.OUTPUT.format("head", "Net")),
            mdnorm.metadata(model, metadata),
        ):
            model(images)
        assert not model.head.metadata_norm._forward_hooks

    def test_the_projection_inside_of_attention(self):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        message = (
            r"'layers\.0\.self_attn\.out_proj' lends its weights .* Insert after 'layers\.0\.self_attn'\."
        )
        for after in ("layers.0.self_attn.out_proj", model.layers[0].self_attn.out_proj):
            with pytest.raises(ValueError, match=message):
                mdnorm.insert(model, after)
        for after in ("**.out_proj", type(model.layers[0].self_attn.out_proj)):
            message = "matches only modules whose weights .*after 'layers.0.self_attn', 'layers.1.self_attn'"
            with pytest.raises(ValueError, match=message):
                mdnorm.insert(model, after)
        # Others of the class have a layer.
        names = [row.name for row in mdnorm.insert(model, nn.Linear)]
        assert names == [f"layers.{index}.linear{number}" for index in (0, 1) for number in (1, 2)]
