"""Erasers: the theorems that they stand on, on training rows, and erasers inside of models."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

import mdnorm
from mdnorm.erasure import Eraser, EraserFitter, fit
from mdnorm.moments import NoSamplesError


def confounded(seed=0, num_rows=300, num_features=8, num_metadata=2, num_classes=3):
    """Features in which metadata, labels and noise are mixed, all correlated; labels one-hot. float64."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    classes = torch.randint(num_classes, (num_rows,), generator=rng)
    labels = nn.functional.one_hot(classes, num_classes).double()
    metadata = normal(num_rows, num_metadata) + labels @ normal(num_classes, num_metadata)
    features = normal(num_rows, num_features) @ normal(num_features, num_features)
    features += metadata @ normal(num_metadata, num_features) + labels @ normal(num_classes, num_features)
    return features, metadata, labels


def partialled_out(values, labels):
    """What least squares on labels and an intercept leaves."""
    rows = np.column_stack([np.ones(len(values)), labels])
    values = np.asarray(values, dtype=np.float64)
    return values - rows @ np.linalg.lstsq(rows, values, rcond=None)[0]


def unit(values):
    """The standard deviations of columns, the size of constant ones."""
    size = np.abs(values).max(0, initial=0)
    return np.where(values.std(0) > 1e-9 * size, values.std(0), np.where(size > 0, size, 1))


def largest_covariance(left, right):
    return np.abs((left - left.mean(0)).T @ (right - right.mean(0))).max(initial=0) / len(left)


# --------------------------------------------------------------------------------------------------------
# The theorems
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_metadata", [1, 3])
def test_without_labels_it_is_the_leace_of_its_authors(num_metadata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from concept_erasure import LeaceEraser

    features, metadata, _ = confounded(num_metadata=num_metadata)
    exact = {"shrinkage": False, "constrain_cov_trace": False, "svd_tol": 1e-12}
    theirs = LeaceEraser.fit(features, metadata, **exact)
    new = 100 + torch.randn(50, 8, dtype=torch.float64)
    for rows in (features, new):
        torch.testing.assert_close(fit(features, metadata)(rows), theirs(rows), atol=1e-8, rtol=0)
    # Within labels: theirs of the metadata less their means in the classes.
    features, metadata, labels = confounded(num_metadata=num_metadata)
    within = torch.from_numpy(partialled_out(metadata, labels))
    theirs = LeaceEraser.fit(features, within, **exact)
    torch.testing.assert_close(fit(features, metadata, labels)(new), theirs(new), atol=1e-8, rtol=0)


@given(
    num_rows=st.integers(2, 40),
    num_features=st.integers(1, 50),
    num_metadata=st.integers(1, 4),
    num_classes=st.integers(0, 4),
    rank=st.integers(0, 50),
    scales=st.lists(st.integers(-5, 5), min_size=1, max_size=4),
    collinear=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_covariance_with_the_metadata_is_left_within_labels(
    num_rows, num_features, num_metadata, num_classes, rank, scales, collinear, seed
):
    rng = np.random.default_rng(seed)
    units = 10.0 ** np.resize(scales, num_features)
    # Of any rank, also below the number of metadata columns, and above that of the rows.
    features = rng.standard_normal((num_rows, rank)) @ rng.standard_normal((rank, num_features))
    metadata = rng.standard_normal((num_rows, num_metadata))
    features = (features + metadata @ rng.standard_normal((num_metadata, num_features))) * units
    if collinear:
        metadata = np.column_stack([metadata, 3 * metadata[:, :1], np.full(num_rows, 7.0)])
    metadata *= 10.0 ** np.resize(scales[::-1], metadata.shape[1])
    labels = np.eye(num_classes)[rng.integers(num_classes, size=num_rows)] if num_classes else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        eraser = fit(features, metadata, labels)
    within = partialled_out(metadata, np.zeros((num_rows, 0)) if labels is None else labels)
    assert eraser.rank <= np.linalg.matrix_rank(within / unit(metadata), tol=1e-9)
    erased = eraser(torch.from_numpy(features)).numpy()
    assert np.isfinite(erased).all()
    assert largest_covariance(erased / unit(features), within / unit(metadata)) < 1e-7
    np.testing.assert_allclose(erased.mean(0), features.mean(0), atol=1e-9 * np.abs(features).max())


@pytest.mark.parametrize("options", [{}, {"preserve_labels": True}])
def test_no_linear_probe_gains_anything_from_the_erased_features(options):
    features, metadata, labels = confounded()
    site = (metadata[:, 0] > metadata[:, 0].median()).long()
    erased = fit(features, torch.column_stack([metadata, site]), labels, **options)(features)
    # A number, by least squares on rows without what the labels explain.
    left, right = partialled_out(erased, labels), partialled_out(metadata, labels)
    assert LinearRegression().fit(left, right).score(left, right) == pytest.approx(0, abs=1e-9)
    before = partialled_out(features, labels)
    assert LinearRegression().fit(before, right).score(before, right) > 0.3
    # A category, by the log-loss with an intercept for each class.
    losses = []
    for rows in (torch.zeros(len(features), 1), erased, features):
        rows = torch.column_stack([(rows - rows.mean(0)) / rows.std(0).clamp_min(1e-9), labels]).numpy()
        probe = LogisticRegression(C=1e10, tol=1e-10, max_iter=10_000, fit_intercept=False).fit(rows, site)
        losses.append(log_loss(site, probe.predict_proba(rows)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] < losses[0] - 0.1


def test_columns_for_each_class_are_erased_in_each_class_alone():
    features, metadata, labels = confounded(num_features=12)
    # An effect that differs between the classes.
    features += 3 * metadata[:, :1] * (labels @ torch.randn(3, 12, dtype=torch.float64))
    pooled = fit(features, metadata, labels)(features)
    products = (metadata.unsqueeze(2) * labels.unsqueeze(1)).flatten(1)
    eraser = fit(features, products, labels)
    assert eraser.rank == 6
    for column in range(3):
        inside = labels[:, column] == 1
        assert largest_covariance(eraser(features)[inside].numpy(), metadata[inside].numpy()) < 1e-10
        assert largest_covariance(pooled[inside].numpy(), metadata[inside].numpy()) > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_no_other_affine_map_without_that_covariance_moves_the_features_less(seed):
    features, metadata, labels = confounded(seed, num_features=5)
    eraser = fit(features, metadata, labels)
    within = torch.from_numpy(partialled_out(metadata, labels))
    cross = features.mT @ within / len(features)
    # All linear maps that take these columns to zero are products with this one.
    free = torch.eye(5, dtype=torch.float64) - cross @ torch.linalg.pinv(cross)
    ours = torch.eye(5, dtype=torch.float64) - eraser.left @ eraser.right.mT
    norm = torch.randn(5, 5, dtype=torch.float64)
    others = [torch.randn(5, 5, dtype=torch.float64) @ free for _ in range(200)]
    others += [ours + 10.0 ** -(k % 6) * other for k, other in enumerate(others)] + [free]
    centred = features - features.mean(0)

    def moved(matrix, shift):
        return (centred @ matrix.mT + shift - centred).pow(2).mean(), (
            (centred @ matrix.mT + shift - centred) @ norm
        ).pow(2).mean()

    least = moved(ours, 0)
    torch.testing.assert_close(centred @ ours.mT + features.mean(0), eraser(features))
    for other in others:
        assert largest_covariance((centred @ other.mT).numpy(), within.numpy()) < 1e-10
        shift = 0.1 * torch.randn(5, dtype=torch.float64)
        # In any quadratic norm.
        for of_other, of_ours in zip(moved(other, shift), least, strict=True):
            assert of_other > of_ours


@pytest.mark.parametrize("within_labels", [True, False])
@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_preserved_labels_covary_with_the_features_exactly_as_before(within_labels, kind):
    features, metadata, labels = confounded()
    if kind == "numbers":
        labels = labels @ torch.tensor([[1.0], [2.5], [-4.0]], dtype=torch.float64) + metadata[:, :1]
    eraser = fit(features, metadata, labels, within_labels=within_labels, preserve_labels=True)
    erased = eraser(features)
    centred = (labels - labels.mean(0)).mT
    torch.testing.assert_close(centred @ erased, centred @ features, rtol=1e-10, atol=1e-9)
    concept = partialled_out(metadata, labels) if within_labels else metadata.numpy()
    assert largest_covariance(erased.numpy(), concept) < 1e-10
    if kind == "classes":
        for column in range(3):
            inside = labels[:, column] == 1
            torch.testing.assert_close(erased[inside].mean(0), features[inside].mean(0))
        # Without it class means move.
        moved = fit(features, metadata, labels)(features)
        assert (centred @ (moved - features)).abs().max() > 1


def test_of_all_that_preserve_the_labels_it_moves_the_features_least():
    features, metadata, labels = confounded(num_features=6)
    eraser = fit(features, metadata, labels, preserve_labels=True)
    identity = torch.eye(6, dtype=torch.float64)
    ours = identity - eraser.left @ eraser.right.mT
    centred = features - features.mean(0)
    fixed = torch.column_stack(
        [centred.mT @ torch.from_numpy(partialled_out(metadata, labels)), centred.mT @ labels]
    )
    free = identity - fixed @ torch.linalg.pinv(fixed)
    least = (centred @ (ours - identity).mT).pow(2).mean()
    for k in range(100):
        other = ours + 10.0 ** -(k % 6) * torch.randn(6, 6, dtype=torch.float64) @ free
        assert (centred @ (other - identity).mT).pow(2).mean() > least


def test_a_linear_head_fitted_after_it_does_not_see_where_the_rest_is_put():
    features, metadata, labels = confounded()
    heads = []
    for preserve_labels in (False, True):
        erased = fit(features, metadata, labels, preserve_labels=preserve_labels)(features).numpy()
        heads.append(LinearRegression().fit(erased, labels).predict(erased))
    np.testing.assert_allclose(*heads, atol=1e-9)


def test_float32_far_from_zero():
    features, metadata, labels = confounded()
    features, metadata = (features + 1000).float(), (metadata + 2000).float()
    erased = fit(features, metadata, labels)(features)
    assert erased.dtype == torch.float32
    assert largest_covariance(erased.double().numpy(), partialled_out(metadata, labels)) < 1e-3
    assert largest_covariance(features.double().numpy(), partialled_out(metadata, labels)) > 1


def test_rounding_is_not_magnified_where_features_are_collinear():
    features, metadata, labels = confounded()
    features = torch.column_stack([features, features @ torch.randn(8, 8, dtype=torch.float64)]) + 10
    eraser, features = fit(features.float(), metadata, labels), features.float().double()
    assert largest_covariance(eraser(features).numpy(), partialled_out(metadata, labels)) < 1e-9
    rough = features.bfloat16().double()
    # A network may be fitted in float32 and run in half precision.
    assert (eraser(rough) - eraser(features)).abs().max() < 10 * (rough - features).abs().max()


# --------------------------------------------------------------------------------------------------------
# The fit
# --------------------------------------------------------------------------------------------------------


def assert_same(first, second, features):
    torch.testing.assert_close(first(features), second(features), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [(300,), (1, 2, 297), (0, 100, 200), (150, 150, 0)])
def test_batches_give_what_all_rows_at_once_give(sizes):
    features, metadata, labels = confounded()
    fitter = EraserFitter(preserve_labels=True)
    for block in zip(*(part.split(sizes) for part in (features, metadata, labels)), strict=True):
        assert fitter.update(*block) is fitter
    assert_same(fitter.eraser(), fit(features, metadata, labels, preserve_labels=True), features)
    assert fitter.moments.num_rows == 300


def test_moments_of_two_fitters_can_be_merged():
    features, metadata, labels = confounded()
    first = EraserFitter().update(features[:100], metadata[:100], labels[:100])
    second = EraserFitter().update(features[100:], metadata[100:], labels[100:])
    first.moments = first.moments.merge(second.moments)
    assert_same(first.eraser(), fit(features, metadata, labels), features)


def test_weights_are_numbers_of_rows():
    features, metadata, labels = confounded()
    weights = torch.randint(0, 4, (300,))
    weighted = fit(features, metadata, labels, weights)
    repeated = [part.repeat_interleave(weights, 0) for part in (features, metadata, labels)]
    assert_same(weighted, fit(*repeated), features)
    # What has no weight may be anything.
    features[weights == 0], metadata[weights == 0] = float("nan"), float("inf")
    assert_same(fit(features, metadata, labels, weights), weighted, repeated[0])


def test_positions_are_rows():
    features, metadata, labels = confounded()
    images = torch.randn(300, 3, 2, 8, dtype=torch.float64) + features[:, None, None]
    flat = fit(images.flatten(0, 2), *(part.repeat_interleave(6, 0) for part in (metadata, labels)))
    last = fit(images, metadata, labels, channel_dim=-1)
    first = fit(images.movedim(-1, 1), metadata, labels)
    assert (last.channel_dim, first.channel_dim) == (-1, 1)
    expected = flat(images.flatten(0, 2)).view_as(images)
    torch.testing.assert_close(last(images), expected)
    torch.testing.assert_close(first(images.movedim(-1, 1).contiguous()), expected.movedim(-1, 1))
    assert first(images.movedim(-1, 1).contiguous()).is_contiguous()
    # Padding of tokens has no weight.
    tokens, mask = images[:, :, 0], torch.rand(300, 3) < 0.7
    rows = [tokens[mask], *(part.unsqueeze(1).expand(-1, 3, -1)[mask] for part in (metadata, labels))]
    padded = torch.where(mask.unsqueeze(2), tokens, float("nan"))
    assert_same(fit(padded, metadata, labels, mask, channel_dim=-1), fit(*rows), rows[0])
    twice = fit(tokens, metadata, labels, torch.full((300,), 2.0), channel_dim=-1)
    assert_same(twice, fit(tokens, metadata, labels, channel_dim=-1), tokens)


def test_class_indices_become_columns_and_arrays_are_taken():
    features, metadata, labels = confounded()
    eraser = fit(features, metadata, labels.argmax(1), num_labels=3)
    assert_same(eraser, fit(features.numpy(), metadata.numpy(), labels.numpy()), features)
    with pytest.raises(ValueError, match="give num_labels or one-hot columns"):
        fit(features, metadata, labels.argmax(1))


@pytest.mark.parametrize("what", ["constant", "determined", "one row", "rows as classes"])
def test_where_nothing_can_be_erased_it_says_so_and_changes_nothing(what):
    features, metadata, labels = confounded()
    rows = {"one row": 1, "rows as classes": 3}.get(what, 300)
    features, metadata, labels = features[:rows], metadata[:rows], labels[:rows]
    if what == "constant":
        metadata = torch.full_like(metadata, 1e6 / 3)
    elif what == "determined":
        metadata = labels @ torch.randn(3, 2, dtype=torch.float64) + 5
    elif what == "rows as classes":
        labels = torch.eye(3)
    with pytest.warns(UserWarning, match="nothing to erase"):
        eraser = fit(features, metadata, labels)
    assert eraser.rank == 0
    torch.testing.assert_close(eraser(features), features, rtol=0, atol=0)


def test_what_labels_determine_is_left_and_the_rest_erased():
    features, metadata, labels = confounded()
    both = torch.column_stack([labels @ torch.randn(3, 1, dtype=torch.float64), metadata])
    assert_same(fit(features, both, labels), fit(features, metadata, labels), features)


def refused(match, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=match):
        fit(*arguments, **options)


def test_bad_input_is_refused():
    features, metadata, labels = confounded()
    broken = features.clone()
    broken[4, 2] = float("nan")
    refused(r"features has NaN or infinite values in column\(s\) \[2\], row\(s\) 4", broken, metadata)
    refused(r"metadata has NaN .* row\(s\) 4", features, broken)
    refused(r"labels has NaN .* row\(s\) 4", features, metadata, broken)
    refused("metadata has 299 rows but there are 300", features, metadata[1:])
    refused("labels has 299 rows but there are 300", features, metadata, labels[1:])
    refused("metadata has no columns", features, metadata[:, :0])
    refused("0, 2 columns of features, metadata: none is no use", features[:, :0], metadata)
    refused("at least 2 dimensions", features[:, 0], metadata)
    refused("channel_dim=2 is not a feature dimension", features, metadata, channel_dim=2)
    refused(r"weights must have shape \(300,\), one a sample, got", features, metadata, weights=torch.ones(3))
    refused("finite and not negative", features, metadata, weights=-torch.ones(300))
    refused("no rows", features, metadata, weights=torch.zeros(300))
    refused("no rows", features[:0], metadata[:0], error=NoSamplesError)
    refused("preserve_labels=True needs labels", features, metadata, preserve_labels=True)
    refused("nothing uses them", features, metadata, labels, within_labels=False)
    refused("metadata must be real and numeric", features, np.array(["a"] * 300), error=TypeError)
    refused("cannot be had", features[:, :3], metadata, labels, preserve_labels=True, within_labels=False)
    with pytest.raises(NoSamplesError, match="at least one update"):
        EraserFitter().eraser()


def test_a_refused_batch_leaves_the_fit_as_it_was():
    features, metadata, labels = confounded()
    fitter = EraserFitter()
    with pytest.raises(ValueError, match="NaN"):
        fitter.update(features * float("nan"), metadata)
    fitter.update(features, metadata, labels)
    before = fitter.eraser()
    for wrong in (
        (features[:, 1:], metadata, labels),
        (features, metadata),
        (features, metadata, labels[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"those before had 8, 2, 3\."):
            fitter.update(*wrong)
    with pytest.raises(ValueError, match="NaN"):
        fitter.update(features, metadata * float("nan"), labels)
    assert_same(fitter.eraser(), before, features)


# --------------------------------------------------------------------------------------------------------
# The module
# --------------------------------------------------------------------------------------------------------


def test_it_is_a_module_like_others(tmp_path):
    features, metadata, labels = confounded()
    eraser = fit(features, metadata, labels)
    assert (eraser.left.shape, eraser.right.shape, eraser.rank) == ((8, 2), (8, 2), 2)
    again = Eraser(8, rank=2)
    torch.testing.assert_close(again(features), features)
    again.load_state_dict(eraser.state_dict())
    for other in (again, copy.deepcopy(eraser), pickle.loads(pickle.dumps(eraser))):
        torch.testing.assert_close(other(features), eraser(features))
    # Erased once, nothing is left to erase.
    torch.testing.assert_close(eraser(eraser(features)), eraser(features))
    compiled = torch.compile(eraser, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), eraser(features))
    assert torch.autograd.gradcheck(eraser, features[:3].clone().requires_grad_())
    assert eraser(features[:0]).shape == (0, 8)
    assert nn.Sequential(nn.Linear(4, 8), eraser)(torch.randn(5, 4)).shape == (5, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_keep_their_dtype_and_are_computed_above_half(dtype):
    features, metadata, labels = confounded()
    eraser, rough = fit(features, metadata, labels), features.to(dtype)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            erased = eraser(rough)
        assert erased.dtype == dtype
        exact = eraser(rough.double())
        assert (erased - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps * 4


def test_features_that_do_not_fit_are_refused():
    eraser = Eraser(8, rank=1)
    with pytest.raises(ValueError, match=r"features have 7 values in dimension 1 .* fitted on 8"):
        eraser(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        eraser(torch.zeros(8))
    with pytest.raises(TypeError, match="floating-point dtype"):
        eraser(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        eraser(np.zeros((3, 8)))


# --------------------------------------------------------------------------------------------------------
# Inside a model
# --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, 6)
        # In place, on what the encoder puts out.
        self.relu = nn.ReLU(inplace=True)
        self.cell = nn.LSTM(6, 5, batch_first=True)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(5, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs, scale=1.0):
        hidden = self.relu(self.encoder(inputs * scale))
        return self.head(self.drop(self.cell(hidden.unsqueeze(1))[0][:, 0]))


def batches(size=60):
    features, metadata, labels = confounded()
    parts = (features.float(), metadata.float(), labels)
    return list(zip(*(part.split(size) for part in parts), strict=True))


def output_of(model, name, inputs):
    found = []

    def note(*call):
        found.append((call[2] if isinstance(call[2], torch.Tensor) else call[2][0]).clone())

    handle = model.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return found[0].flatten(1)


@pytest.mark.parametrize("name", ["encoder", "cell"])
def test_a_model_is_fitted_in_one_pass_and_needs_no_metadata_then(name):
    model = Net().train()
    loader = batches()
    keys = set(model.state_dict())
    # One pass: a generator will do.
    options = {"channel_dim": -1, "output": 0} if name == "cell" else {}
    eraser = mdnorm.erase(model, name, (batch for batch in loader), **options)
    assert (model.training, eraser.training, eraser.rank) == (True, True, 2)
    assert keys < set(model.state_dict())
    features, metadata, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    model.eval()
    erased = output_of(model, name, features)
    metadata = partialled_out(metadata, labels)
    assert largest_covariance(erased.double().numpy(), metadata) < 1e-5
    assert largest_covariance(output_of(Net(), name, features).double().numpy(), metadata) > 1e-3
    # Copies and pickles take it along.
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(features), model(features))
        other.get_submodule(name).eraser.left.zero_()
    assert model.get_submodule(name).eraser.left.abs().max() > 0
    # Taken out, and put in again.
    with pytest.raises(ValueError, match="has an eraser already"):
        mdnorm.erase(model, name, loader)
    expected = model(features)
    del model.get_submodule(name).eraser
    assert set(model.state_dict()) == keys
    assert not torch.allclose(model(features), expected)
    mdnorm.insert_eraser(model, name, eraser)
    torch.testing.assert_close(model(features), expected)


def test_batches_of_names_and_of_several_inputs():
    loader = batches()
    expected = mdnorm.erase(Net(), "encoder", [((x, 2.0), m, y) for x, m, y in loader])
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    named = [
        {"inputs": x, "scale": 2.0, "metadata": m, "labels": y, "weights": torch.ones(60)}
        for x, m, y in loader
    ]
    first = mdnorm.erase(model, model.encoder, named)
    second = mdnorm.erase(plain, "encoder", [({"inputs": x, "scale": 2.0}, m, y) for x, m, y in loader])
    torch.testing.assert_close(first.state_dict(), second.state_dict())
    assert expected.rank == 2


def test_keys_say_where_the_parts_of_a_batch_are():
    loader = batches()
    torch.manual_seed(0)
    model = Net()
    expected = mdnorm.erase(copy.deepcopy(model), "encoder", loader).state_dict()
    named = [
        {"scan": x, "age": m[:, 0], "site": m[:, 1].tolist(), "dx": y, "path": ["a.nii"]}
        for x, m, y in loader
    ]
    keys = {"inputs": "scan", "metadata": ["age", "site"], "labels": "dx"}
    found = mdnorm.erase(copy.deepcopy(model), "encoder", named, keys=keys)
    torch.testing.assert_close(found.state_dict(), expected)
    several = keys | {"inputs": ["scan", lambda batch: 1.0]}
    found = mdnorm.erase(copy.deepcopy(model), "encoder", named, keys=several)
    torch.testing.assert_close(found.state_dict(), expected)
    placed = [(m, "a.nii", x, y) for x, m, y in loader]
    found = mdnorm.erase(
        copy.deepcopy(model), "encoder", placed, keys={"inputs": 2, "metadata": 0, "labels": 3}
    )
    torch.testing.assert_close(found.state_dict(), expected)
    monai = [{"image": x, "metadata": m, "label": y} for x, m, y in loader]
    torch.testing.assert_close(mdnorm.erase(copy.deepcopy(model), "encoder", monai).state_dict(), expected)
    doubled = [batch | {"weight": torch.full((len(batch["dx"]),), 2.0)} for batch in named]
    found = mdnorm.erase(copy.deepcopy(model), "encoder", doubled, keys=keys | {"weights": "weight"})
    torch.testing.assert_close(found.state_dict(), expected)
    for wrong, error, message in (
        (keys | {"mask": "age"}, ValueError, "give padding weight 0"),
        ({"input": "scan"}, ValueError, "its names are 'inputs', 'metadata'"),
        (keys | {"metadata": "years"}, KeyError, "years"),
    ):
        with pytest.raises(error, match=message):
            mdnorm.erase(model, "encoder", named, keys=wrong)
        assert not hasattr(model.encoder, "eraser")


def test_a_design_in_the_model_turns_tables_into_columns():
    features, metadata, labels = confounded()
    table = {"age": metadata[:, 0].numpy(), "site": np.where(metadata[:, 1] > 0, "a", "b")}
    table["ill"] = labels[:, 0].numpy() == 1
    design = mdnorm.Design("age + C(site)", labels="ill").fit(table)
    model = Net()
    mdnorm.attach_design(model, design)
    eraser = mdnorm.erase(copy.deepcopy(model), "encoder", [(features.float(), table)])
    columns = mdnorm.erase(
        model, "encoder", [(features.float(), *design.transform(table, dtype=torch.float64))]
    )
    torch.testing.assert_close(eraser.state_dict(), columns.state_dict())
    assert eraser.rank == 2


def test_a_sequential_gets_it_as_its_last_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 2))
    loader = batches()
    mdnorm.erase(model, "0", loader)
    assert list(dict(model[0].named_children())) == ["0", "1", "eraser"]
    features, metadata, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    erased = model[0](features).detach().double().numpy()
    assert largest_covariance(erased, partialled_out(metadata, labels)) < 1e-5


def test_a_checkpoint_is_loaded_into_an_empty_eraser(tmp_path):
    model, other = Net(), Net()
    features = torch.cat([batch[0] for batch in batches()])
    eraser = mdnorm.erase(model, "encoder", batches())
    mdnorm.insert_eraser(other, "encoder", Eraser(6, eraser.rank))
    other.load_state_dict(model.state_dict())
    mdnorm.save(model, tmp_path / "model.safetensors")
    loaded = Net()
    mdnorm.insert_eraser(loaded, "encoder", Eraser(6, eraser.rank))
    mdnorm.load(loaded, tmp_path / "model.safetensors")
    for again in (other, loaded):
        torch.testing.assert_close(again.eval()(features), model.eval()(features))


def test_models_that_cannot_have_one_are_told_why():
    loader = batches()
    for error, match, after, data in (
        (ValueError, "has no module 'encoda': did you mean", "encoda", loader),
        (ValueError, r"are 3 modules, encoder, head, unused: name one", nn.Linear, loader),
        (ValueError, "'unused' did not run", "unused", loader),
        (ValueError, r"a batch is .*, but must be \(input, metadata\)", "encoder", [loader[0][0]]),
        (ValueError, "after 'encoder': metadata has 59 rows", "encoder", [(loader[0][0], loader[0][1][1:])]),
        (NoSamplesError, "the loader is empty", "encoder", []),
    ):
        model = Net()
        with pytest.raises(error, match=match):
            mdnorm.erase(model, after, data)
        assert set(model.state_dict()) == set(Net().state_dict())
        assert (len(model.encoder._forward_hooks), model.training) == (0, True)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        mdnorm.erase("model", "encoder", loader)
    model = Net()
    model.encoder.eraser = nn.Identity()
    with pytest.raises(ValueError, match="something else of the name 'eraser'"):
        mdnorm.erase(model, "encoder", loader)
    with pytest.warns(UserWarning, match="the output of 'head' is that of the Net"):
        mdnorm.erase(Net(), "head", loader)
