"""Raw tables of metadata where columns were wanted: a design inside the model turns them into these."""

import copy
import zlib

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from torch import nn

import mdnorm
from mdnorm import Design, MetadataNorm, WithMetadata
from mdnorm.integration.design import AttachedDesign


def make_table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "age": rng.uniform(20, 80, n),
        "site": rng.choice(["a", "b", "c"], n),
        "ill": rng.choice([False, True], n),
    }


FORMS = {
    "dict": lambda table: table,
    "lists": lambda table: {name: values.tolist() for name, values in table.items()},
    "tensors": lambda table: table | {"age": torch.as_tensor(table["age"])},
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "arrow": pa.table,
}


def make_model(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    design = Design("poly(age, 2) + site", labels="ill").fit(make_table(300, 9))
    mdnorm.insert(model, "0", design=design, **options)
    return model, design


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_table_is_what_its_columns_are(form, training):
    model, design = make_model()
    twin, plain = copy.deepcopy(model), make_table()
    columns, labels = design.transform(plain, dtype=torch.float64)
    images = torch.randn(60, 5)
    for net, given in ((model, (FORMS[form](plain),)), (twin, (columns, labels))):
        with mdnorm.metadata(net, *given):
            net(images)
    model.train(training), twin.train(training)
    out = WithMetadata(model)(images, metadata=FORMS[form](plain))
    expected = WithMetadata(twin)(images, metadata=columns, labels=labels)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_insert_takes_the_numbers_of_columns_from_the_design():
    model, design = make_model(example=torch.randn(3, 5))
    layer = model[0].metadata_norm
    assert (layer.num_metadata, layer.num_labels) == (4, 1) == (design.num_metadata, design.num_labels)
    assert layer.estimator.gram.shape == (6, 6)
    assert mdnorm.design_of(model).to_json() == design.to_json()
    # Again, with the same design: nothing new, and one design.
    assert [row.name for row in mdnorm.insert(model, "0", design=design)] == ["0"]
    assert model[0].metadata_norm is layer
    assert [row.name for row in mdnorm.insert(model, "1", design=design)] == ["0", "1"]
    assert sum(isinstance(module, AttachedDesign) for module in model.modules()) == 1


def test_single_rows_and_rows_without_labels_in_evaluation():
    model, design = make_model()
    with mdnorm.metadata(model, make_table()):
        model(torch.randn(60, 5))
    model.eval()
    image, row = torch.randn(1, 5), {"age": 33.0, "site": "c"}
    with mdnorm.metadata(model, row):
        out = model(image)
    with mdnorm.metadata(model, design.transform(row).metadata):
        torch.testing.assert_close(model(image), out)
    # Labels of a table are not looked at in evaluation: they may be missing.
    with mdnorm.metadata(model, row | {"ill": None}):
        assert torch.equal(model(image), out)


def test_labels_that_are_given_come_first():
    model, design = make_model()
    twin, table, images = copy.deepcopy(model), make_table(), torch.randn(60, 5)
    columns, labels = design.transform(table, dtype=torch.float64)
    with mdnorm.metadata(model, table, 1 - labels), mdnorm.metadata(twin, columns, 1 - labels):
        assert torch.equal(model(images), twin(images))
    del table["ill"]
    with mdnorm.metadata(model, table), pytest.raises(ValueError, match="labels are needed in training"):
        model(images)


def test_columns_are_taken_as_they_are():
    """Tensors and arrays are columns, with a design in the model as without."""
    model, design = make_model()
    twin, images = copy.deepcopy(model), torch.randn(60, 5)
    columns, labels = design.transform(make_table(), dtype=torch.float64)
    with mdnorm.metadata(model, columns, labels), mdnorm.metadata(twin, columns.numpy(), labels.numpy()):
        assert torch.equal(model(images), twin(images))


@pytest.mark.parametrize("estimator", ["dataset", "running"])
def test_fit_gram_and_recalibrate_take_tables(estimator):
    nets = [make_model(estimator=estimator)[0] for _ in range(4)]
    design = mdnorm.design_of(nets[0])
    table, images = make_table(), torch.randn(60, 5)
    columns, labels = design.transform(table, dtype=torch.float64)
    parts = [slice(0, 25), slice(25, 60)]
    tables = [pd.DataFrame(table).iloc[rows] for rows in parts]
    mdnorm.fit_gram(nets[0], columns, labels)
    mdnorm.fit_gram(nets[1], table)
    mdnorm.fit_gram(nets[2], pl.DataFrame(table))
    mdnorm.fit_gram(nets[3], iter([tables[0], {"metadata": tables[1]}]))
    loaders = (
        [(images, columns, labels)],
        [(images, table)],
        [{"input": images, "metadata": pl.DataFrame(table)}],
        [(images[rows], part) for rows, part in zip(parts, tables, strict=True)],
    )
    for net, loader in zip(nets, loaders, strict=True):
        assert mdnorm.recalibrate(net, loader, progress=False).names == ["0.metadata_norm"]
        for name, value in nets[0].state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_recalibrate_with_a_function_of_ones_own():
    """The labels of the table are there, as they are in training."""
    nets, table, images = [make_model()[0] for _ in range(2)], make_table(), torch.randn(60, 5)

    def forward(model, batch):
        with mdnorm.metadata(model, batch[1]):
            return model(batch[0])

    mdnorm.recalibrate(nets[0], [(images, table)], forward=forward, progress=False)
    mdnorm.recalibrate(nets[1], [(images, table)], progress=False)
    assert torch.equal(*(net[0].metadata_norm.coefficients for net in nets))
    del table["ill"]
    with pytest.raises(ValueError, match="num_labels=1 but got no labels"):
        mdnorm.recalibrate(nets[0], [(images, table)], forward=forward, progress=False)


def test_remove_takes_the_design_of_insert_along():
    model, design = make_model()
    assert mdnorm.remove(model) == ["0"]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(model) == 3
    # One that was attached by hand stays.
    mdnorm.attach_design(model, design)
    mdnorm.insert(model, "0", design=design)
    mdnorm.remove(model)
    assert mdnorm.design_of(model).to_json() == design.to_json()


def test_a_design_that_comes_with_a_checkpoint_replaces_the_one_that_was_read():
    model, _ = make_model()
    other = Design("poly(age, 2) + site", labels="ill").fit(make_table(300, 10))
    twin = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    mdnorm.insert(twin, "0", design=other)
    images, table = torch.randn(60, 5), make_table()
    for net in (model, twin):
        with mdnorm.metadata(net, table):
            net(images)
    model.load_state_dict(twin.state_dict())
    with mdnorm.metadata(model.eval(), table), mdnorm.metadata(twin.eval(), table):
        assert torch.equal(model(images), twin(images))
    # In place, too.
    text = other.to_json()
    digit = text.index(".", text.rindex('"scale"')) + 1
    changed_text = text[:digit] + str((int(text[digit]) + 5) % 10) + text[digit + 1 :]
    encoded = b"%08x" % zlib.crc32(changed_text.encode()) + changed_text.encode()
    model.metadata_design.json.copy_(torch.tensor(list(encoded), dtype=torch.uint8))
    with mdnorm.metadata(model, table):
        changed = model(images)
    with mdnorm.metadata(twin, table):
        assert not torch.equal(changed, twin(images))


def test_an_average_of_buffers_is_seen():
    """As of an EMA of buffers whose decay is near 1; some of such bytes are a design, but another one."""
    model, _ = make_model()
    model.metadata_design.json[20:30] -= 1
    with pytest.raises(
        ValueError, match=r"design in this model is damaged.*attach_design\(model, design\) again"
    ):
        mdnorm.design_of(model)


def test_to_empty_leaves_the_design():
    model, design = make_model()
    model.to_empty(device="cpu")
    assert mdnorm.design_of(model).to_json() == design.to_json()


class TestErrors:
    def test_a_table_and_no_design(self):
        model, images = nn.Sequential(nn.Linear(5, 4), MetadataNorm(4, 1)), torch.randn(3, 5)
        with (
            pytest.raises(TypeError, match="a dict of columns, but Sequential has no design"),
            mdnorm.metadata(model, {"age": [1, 2, 3]}),
        ):
            pass
        # A frame of numbers is an array, as ever.
        with mdnorm.metadata(model, pd.DataFrame({"age": [1, 2, 3]})):
            model(images)
        mdnorm.attach_design(model)
        with (
            pytest.raises(RuntimeError, match="has no design yet"),
            mdnorm.metadata(model, pd.DataFrame({"age": [1, 2, 3]})),
        ):
            pass

    def test_several_designs(self):
        model = nn.Sequential(make_model()[0], make_model()[0])
        with pytest.raises(ValueError, match="2 designs"), mdnorm.metadata(model, make_table()):
            pass
        with mdnorm.metadata(model[0], make_table()):
            model[0](torch.randn(60, 5))

    def test_what_the_design_refuses(self):
        model, _ = make_model()
        with pytest.raises(ValueError, match="no column 'site': "), mdnorm.metadata(model, {"age": [3.0]}):
            pass
        message = "'d'"
        with (
            pytest.raises(ValueError, match=message),
            mdnorm.metadata(model, make_table() | {"site": ["d"] * 60}),
        ):
            pass

    def test_numbers_and_designs_that_do_not_fit(self):
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
        design = Design("age", labels="ill").fit(make_table())
        for options, message in (
            ({"num_metadata": 2}, r"num_metadata=2, but the design has 1 column"),
            ({"num_labels": 2}, r"num_labels=2, but the design has 1 column"),
        ):
            with pytest.raises(ValueError, match=message):
                mdnorm.insert(model, "0", design=design, **options)
        with pytest.raises(TypeError, match=r"design must be a fitted mdnorm\.Design, got dict"):
            mdnorm.insert(model, "0", design=make_table())
        with pytest.raises(RuntimeError, match="the design is not fitted"):
            mdnorm.insert(model, "0", design=Design("age"))
        assert len(mdnorm.insertions(model)) == 0
        mdnorm.insert(model, "0", design=design, num_metadata=1, num_labels=1)
        with pytest.raises(ValueError, match="the model has another design already"):
            mdnorm.insert(model, "1", design=Design("site", labels="ill").fit(make_table()))
        taken = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
        taken.metadata_design = 3
        with pytest.raises(ValueError, match="something else of the name 'metadata_design'"):
            mdnorm.insert(taken, "0", design=design)
        assert len(mdnorm.insertions(taken)) == 0
