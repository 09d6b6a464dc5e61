"""`features`, and batches whose parts are at keys of the user."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import mdnorm
from mdnorm import features, fit_gram, recalibrate, recalibrated

pytestmark = pytest.mark.filterwarnings("ignore:The design is confounded")


def rows(n=50):
    generator = torch.Generator().manual_seed(0)
    age = 60 + 10 * torch.randn(n, generator=generator, dtype=torch.float64)
    diagnosis = torch.randint(0, 2, (n,), generator=generator)
    image = torch.randn(n, 6, generator=generator) + 0.1 * (age[:, None].float() - 60)
    return image, age, diagnosis


def make_model(num_labels=1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, 2))
    mdnorm.insert(model, "0", num_labels=num_labels, **{"num_metadata": 1, "prior": 0} | options)
    return model


class TestFeatures:
    def test_all_rows_in_order_and_in_evaluation(self):
        image, age, diagnosis = rows()
        model = make_model()
        loader = DataLoader(TensorDataset(image, age, diagnosis), batch_size=16)
        recalibrate(model, loader)
        model.train()[3].eval()
        modes = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        found = features(model, "0", loader)
        assert (found.shape, found.dtype, found.device.type) == ((50, 4), torch.float32, "cpu")
        assert not found.requires_grad
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        twin = copy.deepcopy(model).eval()
        with torch.no_grad(), mdnorm.metadata(twin, age):
            corrected = twin[0](image)
        # Before the ReLU, which works in place.
        torch.testing.assert_close(found, corrected)
        for layer in (model[0], "0.metadata_norm"):
            assert torch.equal(features(model, layer, (batch for batch in loader)), found)

    def test_a_model_without_layers_gets_the_inputs(self):
        image, age, diagnosis = rows()
        plain = make_model().eval()
        mdnorm.remove(plain)
        expected = plain[0](image)
        for batch in (
            (image, age, diagnosis),
            [image, diagnosis],
            image,
            {"input": image, "metadata": age, "labels": diagnosis},
            {"image": image, "label": diagnosis, "age": age},
        ):
            torch.testing.assert_close(features(plain, "0", [batch]), expected.detach())

    def test_keys_forward_and_output(self):
        image, age, diagnosis = rows()
        model = make_model()
        batches = [{"scan": image, "years": age, "ill": diagnosis}]

        def forward(model, batch):
            with mdnorm.metadata(model, batch["years"]):
                model(batch["scan"])

        keys = {"inputs": "scan", "metadata": "years", "labels": "ill"}
        found = features(model, "0", batches, keys=keys)
        assert torch.equal(features(model, "0", batches, forward=forward), found)
        halves = features(model, "0", batches, forward=forward, output=lambda out: out[:, :2].bfloat16())
        assert halves.dtype == torch.float32
        torch.testing.assert_close(halves, found[:, :2], rtol=1e-2, atol=1e-2)

    def test_order_and_completeness_are_warned_of(self):
        dataset = TensorDataset(*rows())
        subset = SubsetRandomSampler(range(50))
        for options in (
            {"batch_size": 16, "shuffle": True},
            {"batch_size": 16, "sampler": subset},
            {"batch_sampler": BatchSampler(subset, 16, False)},
        ):
            with pytest.warns(UserWarning, match="takes its samples by a .*RandomSampler: the features"):
                features(make_model(), "0", DataLoader(dataset, **options))
        for options in (
            {"batch_size": 16, "drop_last": True},
            {"batch_sampler": BatchSampler(SequentialSampler(dataset), 16, True)},
        ):
            with pytest.warns(UserWarning, match="drop_last=True"):
                assert len(features(make_model(), "0", DataLoader(dataset, **options))) == 48

    def test_samples_in_the_second_dimension(self):
        """Behind a layer that says so, rows are samples and not the steps of sequences."""

        class Recurrent(nn.Sequential):
            def forward(self, sequences):
                return self[1](self[0](sequences)[0])

        model = Recurrent(nn.LSTM(3, 4), nn.Linear(4, 2))
        mdnorm.insert(model, "0", num_metadata=1, sample_dim=1)
        sequences, age = torch.randn(5, 20, 3), torch.randn(20)
        batches = [(sequences[:, part], age[part]) for part in (slice(0, 12), slice(12, 20))]
        found = features(model, "0", batches, output=0)
        with torch.no_grad(), mdnorm.metadata(model.eval(), age):
            torch.testing.assert_close(found, model[0](sequences)[0].transpose(0, 1))

    def test_errors(self):
        image, age, _ = rows()
        model = make_model()
        with pytest.raises(ValueError, match=r"no module '0\.metadata_nrm'.* did you mean '0.metadata_norm'"):
            features(model, "0.metadata_nrm", [(image, age)])
        with pytest.raises(ValueError, match="no samples"):
            features(model, "0", [])
        with pytest.raises(ValueError, match="different shapes"):
            features(
                model, "0", [(image, age), (image, age)], output=lambda out, seen=[4, 2]: out[:, seen.pop() :]
            )
        with pytest.raises(TypeError, match="is a tuple of Tensor, not a tensor"):
            features(model, "0", [(image, age)], output=lambda out: (out,))
        model.append(nn.Linear(2, 2))
        unused = nn.Sequential(model)
        unused.spare = nn.Linear(2, 2)
        unused.forward = lambda x: unused[0](x)
        with pytest.raises(ValueError, match="'spare' ran 0 times"):
            features(unused, "spare", [(image, age)])
        with pytest.raises(ValueError, match="keys has 'label', but its names are 'inputs'"):
            features(model, "0", [(image, age)], keys={"label": "diagnosis"})
        with pytest.raises(ValueError, match="give one of them"):
            features(model, "0", [(image, age)], keys={"metadata": 1}, forward=lambda *_: None)
        with pytest.raises(TypeError, match="keys must be a dict"):
            features(model, "0", [(image, age)], keys=["image"])


def same_coefficients(*models):
    for model in models[1:]:
        torch.testing.assert_close(
            model[0].metadata_norm.coefficients, models[0][0].metadata_norm.coefficients
        )


class TestKeys:
    def test_dictionaries_of_monai(self):
        image, age, diagnosis = rows()
        models = [make_model() for _ in range(5)]
        recalibrate(models[0], [(image, age, diagnosis)])
        batch = {"image": image, "label": diagnosis, "metadata": age, "image_meta_dict": {"a": 1}}
        recalibrate(models[1], [batch])
        recalibrate(mdnorm.WithMetadata(models[2]), [batch])
        batch |= {"age": age}
        keys = {"metadata": "age", "labels": "label"}
        recalibrate(models[3], [batch], keys=keys)
        recalibrate(models[4], [{"age": age, "label": diagnosis, "input": image}], keys=keys)
        same_coefficients(*models)
        with recalibrated(make_model(), [batch], keys=keys), pytest.raises(KeyError, match="no key 'years'"):
            recalibrate(models[1], [batch], keys={"metadata": "years"})

    def test_indices_and_weights(self):
        image, age, diagnosis = rows()
        models = [make_model() for _ in range(2)]
        batch = {"image": image, "metadata": age, "labels": diagnosis, "weights": diagnosis + 1.0}
        recalibrate(models[0], [batch])
        keys = {"inputs": [2], "metadata": 0, "labels": [1], "weights": lambda entries: entries[1] + 1.0}
        recalibrate(models[1], [[age, diagnosis, image]], keys=keys)
        same_coefficients(*models)

    def test_columns_of_the_design(self):
        image, age, diagnosis = rows()
        table = {
            "age": age,
            "site": ["ab"[i % 3 == 0] for i in range(50)],
            "dx": ["AD" if ill else "CN" for ill in diagnosis],
        }
        design = mdnorm.Design("age + site", labels="C(dx, reference='CN')").fit(table)
        models = [make_model(None, num_metadata=None, design=design) for _ in range(6)]
        recalibrate(models[0], [(image, table)])
        parts = torch.arange(50).split(16)

        def batches(*names):
            for part in parts:
                chosen = {name: [table[name][i] for i in part] for name in names}
                yield {"image": image[part], **chosen, "age": age[part], "label": diagnosis[part]}

        full, bare = list(batches("site", "dx")), list(batches("site"))
        recalibrate(models[1], full, keys={"metadata": ["age", "site"], "labels": "dx"})
        recalibrate(models[2], full, keys={"metadata": ["age", "site"], "labels": ["dx"]})
        # The columns and the label of the design, without a word.
        recalibrate(models[3], [{k: v for k, v in batch.items() if k != "label"} for batch in full])
        # Labels beside the table, as numbers.
        recalibrate(models[4], bare)
        recalibrate(models[5], bare, keys={"metadata": ["age", "site"], "labels": "label"})
        same_coefficients(*models)
        assert features(models[0], "0", bare).shape == (50, 4)

    def test_a_forward_that_takes_metadata(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.body, self.norm = nn.Linear(6, 4), mdnorm.MetadataNorm(4, 1, 1)

            def forward(self, scan, metadata, labels=None):
                return self.norm(self.body(scan), metadata, labels)

        image, age, diagnosis = rows()
        nets = [Net(), Net(), Net()]
        recalibrate(nets[0], [(image, age, diagnosis)])
        batch = {"image": image, "age": age, "label": diagnosis}
        recalibrate(nets[1], [batch], keys={"metadata": "age", "labels": "label"})
        recalibrate(nets[2], [batch | {"metadata": age}])
        for net in nets[1:]:
            assert torch.equal(net.norm.coefficients, nets[0].norm.coefficients)

    def test_nothing_says_where_the_metadata_are(self):
        image, age, diagnosis = rows()
        with pytest.raises(ValueError, match="nothing says where the metadata are"):
            recalibrate(make_model(), [{"image": image, "age": age, "label": diagnosis}])

    def test_fit_gram(self):
        image, age, diagnosis = rows()
        models = [make_model(estimator="dataset") for _ in range(2)]
        expected = fit_gram(models[0], age, diagnosis)
        batches = ({"image": image[p], "age": age[p], "dx": diagnosis[p]} for p in torch.arange(50).split(16))
        found = fit_gram(models[1], batches, keys={"inputs": "image", "metadata": ["age"], "labels": "dx"})
        torch.testing.assert_close(found.gram, expected.gram)
        with pytest.raises(ValueError, match=r"labels= and weights= are for one table.*by keys="):
            fit_gram(models[1], [], diagnosis, keys={"metadata": "age"})
