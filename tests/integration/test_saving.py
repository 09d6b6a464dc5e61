"""One file for a model, its layers and its design; serving needs no `insert` by hand."""

import copy
import functools
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import mdnorm
from mdnorm.estimators import LeastSquares

NETWORK = """
import torch
from torch import nn
class Network(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 6))
        self.head = nn.Linear(6, 1)
    def forward(self, images):
        return self.head(self.encoder(images).relu())
"""
exec(NETWORK)
Network = globals()["Network"]


def make_table(n, seed=0):
    rng = np.random.default_rng(seed)
    table = {
        "age": rng.uniform(20, 80, n),
        "site": rng.choice(["a", "b", "c"], n),
        "ill": rng.random(n) < 0.5,
    }
    return pd.DataFrame(table)


def trained(**options):
    """A network behind two layers, of element and channel, with a design; and new rows without labels."""
    torch.manual_seed(0)
    table = make_table(200)
    model = Network()
    design = mdnorm.Design("poly(age, 2) + site", labels="ill").fit(table)
    mdnorm.insert(model, ["encoder.0", "encoder"], design=design, **options)
    images = torch.randn(200, 5) + torch.tensor(table["age"].to_numpy(), dtype=torch.float32)[:, None] / 20
    mdnorm.fit_gram(model, table)
    for rows in torch.arange(200).split(40):
        with mdnorm.metadata(model, table.iloc[rows.numpy()]):
            model(images[rows])
    for name, parameter in model.named_parameters():
        if name.endswith("estimator.weight"):
            nn.init.normal_(parameter)
    return model.eval(), torch.randn(7, 5), make_table(7, 1).drop(columns="ill")


def predict(model, images, table):
    with torch.no_grad(), mdnorm.metadata(model, table):
        return model(images)


@pytest.mark.parametrize("estimator", ["batch", "dataset", "running", "recursive", "penalty"])
@pytest.mark.parametrize("scale", [False, True])
def test_the_plain_model_becomes_the_one_that_was_saved(tmp_path, estimator, scale):
    model, images, table = trained(estimator=estimator, scale=scale)
    expected = predict(model, images, table)
    assert not torch.allclose(expected, predict(model, images, table.assign(age=table["age"] + 5)))
    mdnorm.save(model, tmp_path / "model.safetensors")
    plain = Network().eval()
    fresh = mdnorm.load(plain, str(tmp_path / "model.safetensors"))
    assert fresh is plain
    for given in (table, pl.from_pandas(table), table.to_dict("list")):
        assert torch.equal(predict(fresh, images, given), expected)
    state = model.state_dict()
    assert list(fresh.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    # It trains on as the other would, and the layers can be asked for and taken out.
    assert [row.name for row in mdnorm.insertions(fresh)] == ["encoder", "encoder.0"]
    gradients = []
    for net in (model, fresh):
        with mdnorm.metadata(net.train(), make_table(30, 2)):
            net(torch.randn(30, 5, generator=torch.Generator().manual_seed(3))).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    mdnorm.remove(fresh)
    assert list(fresh.state_dict()) == list(Network().state_dict())


def test_in_a_fresh_process(tmp_path):
    model, images, _ = trained()
    path = tmp_path / "model.safetensors"
    mdnorm.save(model, path)
    row = {"age": 33.5, "site": "b"}
    code = NETWORK + (
        "import mdnorm\n"
        f"model = mdnorm.load(Network().eval(), {str(path)!r})\n"
        f"with mdnorm.metadata(model, {row!r}):\n    print(model(torch.tensor({images[:1].tolist()})).item())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(predict(model, images[:1], row).item(), rel=1e-6)


def test_the_header_says_what_is_where_and_other_programs_read_the_weights(tmp_path):
    model, _, _ = trained(window=math.inf, prior=2, granularity="element")
    path = tmp_path / "model.safetensors"
    mdnorm.save(model, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mdnorm"])
    assert [layer["after"] for layer in header["layers"]] == ["encoder", "encoder.0"]
    for layer in header["layers"]:
        assert layer["options"] == {
            "num_metadata": 4,
            "num_labels": 1,
            "sample_dim": 0,
            "window": {"float": "inf"},
            "prior": 2,
            "granularity": "element",
        }
    design = header["designs"]["metadata_design"]["design"]
    assert mdnorm.Design.from_json(json.dumps(design)).to_json() == mdnorm.design_of(model).to_json()
    weights = safetensors.torch.load_file(path)
    assert weights.keys() == model.state_dict().keys() - {"metadata_design.json"}
    assert torch.equal(weights["head.weight"], model.head.weight)
    fresh = mdnorm.load(Network(), path)
    assert fresh.encoder.metadata_norm.estimator.window == math.inf
    # The same options again: nothing new.
    layer, design = fresh.encoder.metadata_norm, mdnorm.design_of(model)
    mdnorm.insert(fresh, "encoder", design=design, window=math.inf, prior=2, granularity="element")
    assert fresh.encoder.metadata_norm is layer


class Pair(nn.Module):
    """Puts out two tensors, of which the first dimension counts positions."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(3, 4), nn.Linear(4, 2)
        self.split = Split()

    def forward(self, x):
        return self.rest(self.split(self.first(x))["tokens"]).mean(0)


class Split(nn.Module):
    def forward(self, x):
        return {"whole": x + 1, "tokens": x * 2}


def test_options_of_every_kind(tmp_path):
    """Sequences with a key, other dimensions, a dtype and a tuple."""
    torch.manual_seed(0)
    model, tokens, metadata = Pair(), torch.randn(5, 30, 3), torch.randn(30, 2)
    options = {
        "granularity": "channel",
        "channel_dim": -1,
        "dtype": torch.float64,
        "num_features": np.int64(4),
    }
    mdnorm.insert(model, "split", output="tokens", sample_dim=1, check_finite=False, **options)
    with mdnorm.metadata(model, metadata):
        model(tokens)
    mdnorm.save(model, tmp_path / "model")
    fresh = mdnorm.load(Pair().eval(), tmp_path / "model")
    assert torch.equal(predict(fresh, tokens, metadata), predict(model.eval(), tokens, metadata))
    layer = fresh.split.metadata_norm
    assert layer.estimator.coefficients.dtype == torch.float64
    assert not layer.check_finite
    mdnorm.insert(model, "first", num_features=(30, 4), num_metadata=2)
    mdnorm.save(model, tmp_path / "model")
    assert mdnorm.load(Pair(), tmp_path / "model").first.metadata_norm.num_features == (30, 4)


@pytest.mark.parametrize("wrap", [mdnorm.WithMetadata, nn.DataParallel, torch.compile])
def test_what_is_around_the_model_is_not_in_the_file(tmp_path, wrap):
    model, images, table = trained()
    mdnorm.save(wrap(model), tmp_path / "model")
    fresh = Network().eval()
    if wrap is mdnorm.WithMetadata:
        wrapper = wrap(fresh)
        assert mdnorm.load(wrapper, tmp_path / "model") is wrapper
    else:
        with pytest.raises(ValueError, match="insert into the plain model first"):
            mdnorm.load(wrap(Network()), tmp_path / "model")
        mdnorm.load(fresh, tmp_path / "model")
    assert torch.equal(predict(fresh, images, table), predict(model, images, table))


def test_models_with_layers_of_their_own_tied_weights_and_no_design(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = (
                nn.Linear(4, 4),
                mdnorm.MetadataNorm(None, None),
                nn.Linear(4, 4),
            )
            self.last.weight = self.first.weight
            self.register_buffer("nothing", torch.empty(0, 3))

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    model, x, metadata = Own(), torch.randn(20, 4), torch.randn(20, 3)
    with mdnorm.metadata(model, metadata):
        model(x)
    mdnorm.save(model, tmp_path / "model")
    assert "last.weight" not in safetensors.torch.load_file(tmp_path / "model")
    fresh = mdnorm.load(Own(), tmp_path / "model")
    assert fresh.last.weight is fresh.first.weight
    assert fresh.norm.num_metadata == 3
    assert torch.equal(predict(fresh.eval(), x, metadata), predict(model.eval(), x, metadata))


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList([self.first, self.second])

    def forward(self, images):
        return self.layers[1](self.layers[0](images).relu())


@pytest.mark.parametrize("after", ["first", "layers.0"])
def test_a_module_that_has_two_names(tmp_path, after):
    torch.manual_seed(0)
    model, images, age = TwoNames(), torch.randn(20, 6), torch.randn(20)
    mdnorm.insert(model, after, num_metadata=1, example=images)
    mdnorm.recalibrate(model, [(images, age)], shrink=False)
    mdnorm.save(model, tmp_path / "model.safetensors")
    loaded = mdnorm.load(TwoNames(), tmp_path / "model.safetensors")
    outputs = []
    for each in (model.eval(), loaded.eval()):
        with torch.no_grad(), mdnorm.metadata(each, age):
            outputs.append(each(images))
    assert torch.equal(*outputs)


def test_a_layer_that_has_not_run_has_no_state_yet(tmp_path):
    model = Network()
    mdnorm.insert(model, "encoder.0", window=70)
    mdnorm.save(model, tmp_path / "model")
    fresh = mdnorm.load(Network(), tmp_path / "model")
    assert fresh.encoder[0].metadata_norm.estimator is None
    with mdnorm.metadata(fresh, torch.randn(9, 2)):
        fresh(torch.randn(9, 5))
    assert fresh.encoder[0].metadata_norm.estimator.window == 70


def test_another_device_dtype_and_mode_are_those_of_the_plain_model(tmp_path):
    model, images, table = trained()
    mdnorm.save(model.double(), tmp_path / "model")
    fresh = mdnorm.load(Network().bfloat16(), tmp_path / "model")
    assert fresh.training
    assert fresh.encoder.metadata_norm.training
    assert fresh.head.weight.dtype == torch.bfloat16
    assert fresh.encoder.metadata_norm.estimator.coefficients.dtype == torch.float32
    out = predict(fresh.eval(), images.bfloat16(), table).float()
    torch.testing.assert_close(out, predict(model.float(), images, table), rtol=0.05, atol=0.05)


def test_no_warning_of_insert_is_repeated(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="is that of the Sequential"):
        mdnorm.insert(model, "0", num_metadata=1, example=torch.randn(4, 3))
    mdnorm.save(model, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = mdnorm.load(nn.Sequential(nn.Linear(3, 2)), tmp_path / "model")
        with mdnorm.metadata(fresh, torch.randn(4, 1)):
            fresh(torch.randn(4, 3))


class TestErrors:
    def saved(self, tmp_path, **options):
        model, _, _ = trained(**options)
        mdnorm.save(model, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    def refused(self, path, message, plain=None, error=ValueError):
        model = Network() if plain is None else plain
        before, text = copy.deepcopy(model.state_dict()), repr(model)
        with pytest.raises(error, match=message) as caught:
            mdnorm.load(model, path)
        assert str(path) in str(caught.value)
        assert repr(model) == text
        assert list(model.state_dict()) == list(before)
        assert all(after.is_meta or torch.equal(after, before[n]) for n, after in model.state_dict().items())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"output": lambda value: value}, "output=<function .*a key or an index"),
            ({"estimator": functools.partial(LeastSquares, window=3)}, "estimator=functools.*a name"),
            ({"estimator": type("Own", (LeastSquares,), {})}, "estimator=<class .*a name"),
        ],
    )
    def test_options_that_no_file_can_hold(self, tmp_path, options, message):
        model = Network()
        mdnorm.insert(model, "encoder.2", **options)
        with pytest.raises(ValueError, match=f"the layer after 'encoder.2' has {message}"):
            mdnorm.save(model, tmp_path / "model")
        assert not any(tmp_path.iterdir())

    def test_the_class_behind_a_name_is_that_name(self, tmp_path):
        model = Network()
        mdnorm.insert(model, "encoder.2", estimator=LeastSquares)
        mdnorm.save(model, tmp_path / "model")
        mdnorm.insert(mdnorm.load(Network(), tmp_path / "model"), "encoder.2", estimator="running")

    def test_states_that_no_file_can_hold(self, tmp_path):
        class WithExtra(nn.Linear):
            def get_extra_state(self):
                return {"code": print}

        for model in (WithExtra(2, 2), nn.Linear(2, 2, device="meta")):
            with pytest.raises(TypeError, match="not a dense tensor"):
                mdnorm.save(model, tmp_path / "model")
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
            mdnorm.save("model", tmp_path / "model")
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            mdnorm.save(nn.Linear(2, 2), tmp_path / "absent" / "model")

    def test_every_truncation(self, tmp_path):
        path = self.saved(tmp_path)
        data = path.read_bytes()
        for length in [0, 1, 7, 8, 9, 100, *range(200, len(data), len(data) // 40), len(data) - 1]:
            path.write_bytes(data[:length])
            self.refused(path, "no safetensors file, or damaged or truncated")

    def test_every_kind_of_damage(self, tmp_path):
        """A bit of any byte: in the length, the header or the values."""
        path = self.saved(tmp_path)
        data = path.read_bytes()
        for position in [*range(0, 200, 3), *range(200, len(data), len(data) // 80), len(data) - 1]:
            damaged = bytearray(data)
            damaged[position] ^= 4
            path.write_bytes(damaged)
            self.refused(path, "damaged|was not written by|has version")

    def test_files_of_others(self, tmp_path):
        path = tmp_path / "other.safetensors"
        self.refused(path, "does not exist", error=FileNotFoundError)
        self.refused(tmp_path, "is no file", error=FileNotFoundError)
        safetensors.torch.save_file(Network().state_dict(), path)
        self.refused(path, "was not written by mdnorm.save")
        safetensors.torch.save_file(Network().state_dict(), path, metadata={"mdnorm": '{"format": "other"}'})
        self.refused(path, "was not written by mdnorm.save")
        torch.save(Network().state_dict(), path)
        self.refused(path, "no safetensors file")
        path.write_text("a,b\n1,2\n")
        self.refused(path, "no safetensors file")

    def test_of_another_model(self, tmp_path):
        path = self.saved(tmp_path)
        self.refused(path, r"encoder\.0\.bias is \(8,\) and not \(9,\).*Build the model as", Network(9))
        self.refused(path, "Sequential has no module 'encoder'", nn.Sequential(nn.Linear(3, 2)))
        more = Network()
        more.tail = nn.Linear(2, 2)
        self.refused(path, r"it has no 'tail\.bias', 'tail\.weight'", more)
        fewer = Network()
        fewer.head = nn.Identity()
        self.refused(path, r"the model has no 'head\.", fewer)
        self.refused(path, "device meta", Network().to("meta"))
        model = Network()
        mdnorm.insert(model, "encoder.0", window=3, num_metadata=4, num_labels=1, num_features=8)
        self.refused(path, r"'encoder\.0' has a MetadataNorm already, with other options", model)

    def test_a_file_from_elsewhere_runs_nothing(self, tmp_path):
        """Well-formed, with a right checksum, and nonsense in its header."""
        from mdnorm.integration.saving import _checksum

        path = tmp_path / "model.safetensors"
        tensors = dict(Network().state_dict())
        right = {"format": "mdnorm.model", "version": 1, "layers": [], "designs": {}, "same_as": {}}
        layer = {"after": "head", "options": {}}
        for change, message in (
            ({"layers": None}, "does not fit"),
            ({"layers": [3]}, "does not fit"),
            ({"layers": [layer | {"after": "tail"}]}, "no module 'tail': its modules are encoder"),
            ({"layers": [layer | {"options": {"estimator": "os.system"}}]}, "estimator must be one of"),
            ({"layers": [layer | {"options": {"estimator": {"class": "os"}}}]}, "an unknown kind 'class'"),
            ({"layers": [layer | {"options": {"dtype": {"dtype": "load"}}}]}, "unknown dtype 'load'"),
            ({"layers": [layer | {"options": {"colour": 3}}]}, "colour"),
            ({"designs": {"head": {"design": None, "is_inserted": False}}}, "where the model has something"),
            ({"designs": {"d": {"design": {"a": 1}, "is_inserted": True}}}, "not a saved design"),
            ({"same_as": {"head.weight": "nothing"}}, "nothing"),
            ({"version": 2}, "version 2, this mdnorm reads 1"),
        ):
            text = json.dumps(right | change)
            header = {"mdnorm": text, "crc32": _checksum(text, tensors)}
            safetensors.torch.save_file(tensors, path, metadata=header)
            self.refused(path, message)

    def test_a_crash_leaves_the_file_that_was_there(self, tmp_path, monkeypatch):
        path = self.saved(tmp_path)
        before = path.read_bytes()
        monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            mdnorm.save(Network(), path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
