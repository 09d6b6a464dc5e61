import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mdnorm import Design, MetadataNorm, fit_gram


def test_streams_over_a_loader_into_every_layer():
    metadata, labels = torch.randn(50, 2), torch.randint(0, 3, (50,))
    model = nn.Sequential(
        MetadataNorm(4, 2, 3, estimator="dataset"), nn.Sequential(MetadataNorm(8, 2, 3, estimator="dataset"))
    )
    gram = fit_gram(model, DataLoader(TensorDataset(metadata, labels), batch_size=8))
    whole = fit_gram(MetadataNorm(4, 2, 3, estimator="dataset"), metadata, labels)
    # In units of the columns; the streamed moments have those of their first batch.
    design = np.column_stack([metadata.double(), np.eye(3)[labels]])
    centred = design - design.mean(0)
    for moments in (gram, whole):
        np.testing.assert_allclose(moments.products().gram, centred.T @ centred, rtol=0, atol=1e-12)
    for layer in (model[0], model[1][0]):
        state = layer.estimator
        rows = np.column_stack([np.eye(3)[labels], np.ones(50), metadata.double()])
        rows = (rows - state.origin.numpy()) * state.scale.numpy()
        np.testing.assert_allclose(state.gram, rows.T @ rows / 50, rtol=0, atol=1e-12)
        assert float(state.weight) == 50


def test_leaves_estimators_that_do_not_use_it():
    model = nn.ModuleList([MetadataNorm(4, 1, estimator="batch"), MetadataNorm(4, 1, estimator="dataset")])
    metadata = 3 + torch.randn(9)
    fit_gram(model, metadata)
    assert float(model[0].estimator.weight) == 0
    assert float(model[1].estimator.weight) == 9
    for layer in model:
        torch.testing.assert_close(layer.estimator.origin, torch.tensor([0, metadata.double().mean()]))


def test_lazy_layers_learn_their_columns():
    layer = MetadataNorm(None, None, None, estimator="dataset")
    fit_gram(layer, torch.randn(9, 2), torch.randn(9))
    assert (layer.num_metadata, layer.num_labels, layer.num_features) == (2, 1, None)
    layer(torch.randn(3, 4), torch.randn(3, 2), torch.randn(3))
    assert layer.num_features == (4,)
    assert float(layer.estimator.weight) == 9


def test_weighted_samples_count_as_their_weight():
    """As one table, in batches as tuples and as dicts: what repeated rows give."""
    metadata, labels = 5 + torch.randn(40, 2), torch.randint(0, 2, (40,))
    weights = torch.arange(40) % 3
    rows = torch.arange(40).repeat_interleave(weights)
    expected = fit_gram(MetadataNorm(4, 2, 1, estimator="dataset"), metadata[rows], labels[rows]).products()
    parts = [(metadata[part], labels[part], weights[part]) for part in torch.arange(40).split(12)]
    for given in (
        {"metadata": metadata, "labels": labels, "weights": weights},
        {"metadata": parts},
        {"metadata": [dict(zip(("metadata", "labels", "weights"), part, strict=True)) for part in parts]},
    ):
        layer = MetadataNorm(4, 2, 1, estimator="dataset")
        found = fit_gram(layer, **given)
        assert float(layer.estimator.weight) == found.weight == len(rows)
        for name in ("design_mean", "gram"):
            actual = getattr(found.products(), name)
            np.testing.assert_allclose(actual, getattr(expected, name), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"weights must be finite and not negative: row\(s\) \[1\]"):
        fit_gram(layer, metadata[:3], labels[:3], torch.tensor([1.0, -1.0, 0.0]))
    with pytest.raises(ValueError, match="no samples"):
        fit_gram(layer, metadata, labels, torch.zeros(40))


def test_errors():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fit_gram([MetadataNorm(4, 1)], torch.randn(9))
    with pytest.raises(ValueError, match="Linear has no MetadataNorm layer"):
        fit_gram(nn.Linear(2, 2), torch.randn(9))
    model = nn.Sequential(MetadataNorm(4, 2, estimator="dataset"), MetadataNorm(4, 3, estimator="dataset"))
    with pytest.raises(ValueError, match=r"different num_metadata \(0: 2, 1: 3\)"):
        fit_gram(model, torch.randn(9, 2))
    with pytest.raises(ValueError, match="labels are needed: the layers have num_labels=1"):
        fit_gram(MetadataNorm(4, 2, 1, estimator="dataset"), torch.randn(9, 2))
    with pytest.raises(ValueError, match=r"metadata has 3 column\(s\) but num_metadata=2"):
        fit_gram(MetadataNorm(4, 2, estimator="dataset"), torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"row\(s\) 4 "):
        fit_gram(MetadataNorm(4, 1, estimator="dataset"), torch.tensor([1, 2, 3, 4, float("nan")]))
    for batches, sizes in (  # What no layer knows is what the first batch has.
        ([(torch.randn(9, 3),), (torch.randn(9, 4),)], ("4 .* 0 of labels", "3 and 0")),
        (
            [(torch.randn(9, 3), torch.rand(9)), (torch.randn(9, 2), torch.rand(9, 2))],
            ("2 .* 2 of labels", "3 and 1"),
        ),
    ):
        message = rf"a batch has {sizes[0]}, the batches before it had {sizes[1]}"
        with pytest.raises(ValueError, match=message):
            fit_gram(MetadataNorm(4, None, None, estimator="dataset"), batches)
    with pytest.raises(ValueError, match="labels has 1"):
        fit_gram(MetadataNorm(4, 1, 2, estimator="dataset"), torch.randn(9), torch.randn(9))


def test_what_may_be_rows_or_batches_is_refused():
    """Each form has one meaning; what a design returns is two arguments, or the dict of one batch."""
    table = pd.DataFrame(
        {"age": np.arange(9.0), "site": list("abcabcabc"), "sick": [0, 1, 1, 1, 0, 0, 1, 0, 1]}
    )
    design = Design("age + site", labels="sick").fit(table)
    layer = MetadataNorm(4, 3, 1, estimator="dataset")
    matrices = design.transform(table)
    want = fit_gram(layer, *matrices)
    assert want.num_rows == 9
    for data in (matrices._asdict(), [tuple(matrices)], [matrices]):
        assert torch.equal(fit_gram(layer, data).gram, want.gram)
    for data in (matrices, list(matrices), [1.0, 2.0], [np.ones(3)]):
        with pytest.raises(ValueError, match="which may be rows, metadata and labels, or batches"):
            fit_gram(layer, data)
    plain = MetadataNorm(4, 1, estimator="dataset")
    single = fit_gram(plain, [(torch.arange(4.0),), (torch.arange(5.0),)])
    assert single.num_rows == 9
    with pytest.raises(KeyError, match=r"the batch .* has no key 'metadata': its keys are 'age'"):
        fit_gram(plain, [{"age": torch.arange(4.0)}])
