"""Weights of samples and masks of positions for models as a whole; nested tensors; subclasses of tensors."""

import copy
import warnings

import monai.data
import numpy as np
import pytest
import torch
from torch import nn

import mdnorm
from mdnorm import MetadataNorm, WithMetadata
from mdnorm.integration import DependenceRecorder
from reference import design_matrix, weighted_least_squares

# With any estimator the networks are trained without the loss of "penalty": its fit is what is looked at.
pytestmark = pytest.mark.filterwarnings("ignore:a layer with estimator='penalty' has been in training")


def make_data(n=60, length=6, width=3, seed=0):
    """Padded tokens: everything behind the end of a sequence is zero, and so no token."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    metadata = torch.randn(n, 2, **options)
    lengths = torch.randint(2, length + 1, (n,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    tokens = (torch.randn(n, length, width, **options) + metadata[:, None, :1]) * mask[..., None]
    return tokens, metadata, mask


def token_fit(features, metadata, mask):
    """Slopes of the true tokens on their metadata, each token a row."""
    rows = metadata[:, None].expand(-1, mask.shape[1], -1)[mask]
    return np.linalg.lstsq(design_matrix(rows), features[mask].numpy(), rcond=None)[0][:2]


TOKENS = {"granularity": "channel", "channel_dim": -1, "prior": 0}


class Text(nn.Module):
    """Tokens, then their mean: layers by channel, by element, and behind the pooling."""

    def __init__(self, pooled=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.double()

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens).tanh()).mean(1))


class TestMasks:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("how", ["context", "wrapper"])
    def test_layers_with_these_positions_use_it_and_those_behind_a_pooling_do_not(self, training, how):
        tokens, metadata, mask = make_data()
        model = Text()
        mdnorm.insert(model, "embed", estimator="batch", **TOKENS)
        model.head = nn.Sequential(MetadataNorm(4, 2, dtype=torch.float64, prior=0), model.head)
        twin, outputs = copy.deepcopy(model), []
        model.embed.register_forward_hook(lambda *call: outputs.append(call[2].detach()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(1 if training else 2):
                if how == "context":
                    with mdnorm.metadata(model, metadata, mask=mask):
                        model(tokens)
                else:
                    WithMetadata(model)(tokens, metadata=metadata, mask=mask.long())
                model.train(training)
        layer, pooling, head = twin.embed.metadata_norm, twin.head[0], twin.head[1]
        layer.train(), pooling.train()
        embedded = nn.functional.linear(tokens, twin.embed.weight, twin.embed.bias)
        for _ in range(1 if training else 2):
            expected = layer(embedded, metadata, mask=mask)
            out = head(pooling(twin.mix(expected.tanh()).mean(1), metadata))
            layer.train(training), pooling.train(training)
        torch.testing.assert_close(outputs[-1], expected.detach(), rtol=0, atol=0)
        # True tokens are free of the metadata in training, and padding is as it was.
        if training:
            np.testing.assert_allclose(token_fit(outputs[-1], metadata, mask), 0, atol=1e-10)
        assert torch.equal(outputs[-1][~mask], embedded[~mask].detach())
        assert out.shape == (60, 1)
        for name, value in twin.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_other_positions_and_elements_do_not_use_it_and_say_so(self):
        tokens, metadata, mask = make_data()
        options = {"num_metadata": 2, "dtype": torch.float64}
        for layer, features, message in (
            (MetadataNorm(3, granularity="channel", channel_dim=-1, **options), tokens[:, :4], "4 positions"),
            (MetadataNorm(3, granularity="channel", channel_dim=-1, **options), tokens[:, :1], "1 positions"),
            (MetadataNorm((6, 3), **options), tokens, "for each position.*granularity='channel'"),
        ):
            twin = copy.deepcopy(layer)
            with (
                pytest.warns(UserWarning, match=f"this MetadataNorm.*{message}"),
                mdnorm.metadata(layer, metadata, mask=mask),
            ):
                out = layer(features)
            assert torch.equal(out, twin(features, metadata))

    @pytest.mark.parametrize("shape", [(60, 6), (60, 5), (60, 3, 2, 2), (60, 2, 6)])
    def test_features_of_another_kind_have_nothing_to_do_with_it(self, shape):
        """Pooled ones, also as many as there are tokens; maps of an image beside a text."""
        _, metadata, mask = make_data()
        options = {} if len(shape) == 2 or shape == (60, 2, 6) else {"granularity": "channel"}
        layer, features = MetadataNorm(None, 2, **options), torch.randn(shape)
        twin = copy.deepcopy(layer)
        with warnings.catch_warnings(), mdnorm.metadata(layer, metadata, mask=mask):
            warnings.simplefilter("error")
            out = layer(features)
        assert torch.equal(out, twin(features, metadata))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("estimator", ["batch", "running"])
    def test_compiled_with_mask_and_weights_as_inputs_of_one_graph(self, estimator, training):
        torch._dynamo.reset()
        tokens, metadata, mask = make_data()
        model = Text()
        mdnorm.insert(model, ["embed", "mix"], estimator=estimator, example=tokens, num_metadata=2, **TOKENS)
        WithMetadata(model)(tokens, metadata=metadata, mask=mask)
        wrapper, graphs = WithMetadata(model.train(training)), []
        twin = copy.deepcopy(wrapper)

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(wrapper, fullgraph=True, backend=backend)
        for seed in range(4):
            tokens, metadata, mask = make_data(seed=seed)
            weights = torch.arange(60) % (2 + seed)
            given = {"metadata": metadata, "weights": weights, "mask": mask}
            torch.testing.assert_close(compiled(tokens, **given), twin(tokens, **given))
        # As without: the first call may be a graph of its own.
        assert len(graphs) <= 2
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(wrapper.state_dict()[name], value, msg=name)

    def test_exported_with_the_mask_as_an_input(self):
        tokens, metadata, mask = make_data()
        model = Text()
        mdnorm.insert(model, "embed", example=tokens, num_metadata=2, **TOKENS)
        wrapper = WithMetadata(model)
        wrapper(tokens, metadata=metadata, mask=mask)
        program = torch.export.export(wrapper.eval(), (tokens,), {"metadata": metadata, "mask": mask})
        tokens, metadata, mask = make_data(seed=1)
        given = {"metadata": metadata, "mask": mask}
        torch.testing.assert_close(program.module()(tokens, **given), wrapper(tokens, **given))

    def test_a_mask_of_other_samples_is_an_error(self):
        tokens, metadata, mask = make_data()
        layer = MetadataNorm(3, 2, dtype=torch.float64, **TOKENS)
        for wrong in (mask[1:], mask.T):
            with (
                pytest.raises(ValueError, match=r"mask must have shape \(60, 6\)"),
                mdnorm.metadata(layer, metadata, mask=wrong),
            ):
                layer(tokens)

    def test_a_mask_that_is_an_argument_of_the_model_itself(self):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
        mdnorm.insert(encoder, "layers.0.linear2", num_metadata=2)
        wrapper, tokens = WithMetadata(encoder), torch.randn(5, 3, 4)
        with pytest.raises(ValueError, match=r"mask= may be meant for the layers or for the model"):
            wrapper(tokens, metadata=torch.randn(5, 2), mask=torch.zeros(3, 3, dtype=torch.bool))
        wrapper(tokens, torch.zeros(3, 3, dtype=torch.bool), metadata=torch.randn(5, 2))
        for name in ("mask", "weights"):
            with pytest.raises(ValueError, match=f"{name}= was given without metadata="):
                WithMetadata(nn.Sequential(MetadataNorm(3, 2)))(tokens, **{name: torch.ones(5)})


class TestWeights:
    def test_through_context_and_wrapper(self):
        tokens, metadata, _ = make_data()
        features, weights = tokens[:, 0], torch.arange(60, dtype=torch.float64) % 4
        slopes = weighted_least_squares(features.numpy(), metadata, None, weights)[:2]
        mean = (weights[:, None] * metadata).sum(0) / weights.sum()
        expected = features - (metadata - mean) @ torch.as_tensor(slopes)
        layer = MetadataNorm(3, 2, estimator="batch", prior=0, dtype=torch.float64)
        wrapper = WithMetadata(nn.Sequential(layer))
        with mdnorm.metadata(layer, metadata, weights=weights.numpy()):
            torch.testing.assert_close(layer(features), expected)
        torch.testing.assert_close(wrapper(features, metadata=metadata, weights=weights), expected)

    def test_recalibrate(self):
        """As the rows were there as often as they weigh, with the model's prior."""
        tokens, metadata, _ = make_data()
        features, weights = tokens[:, 0], torch.arange(60) % 3
        nets = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double() for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        for net in nets:
            mdnorm.insert(net, "0", prior=3)
        parts = torch.arange(60).split(25)
        batches = [
            {"input": features[rows], "metadata": metadata[rows], "weights": weights[rows]} for rows in parts
        ]
        mdnorm.recalibrate(nets[0], batches, shrink=False, progress=False)
        rows = torch.arange(60).repeat_interleave(weights)
        mdnorm.recalibrate(nets[1], [(features[rows], metadata[rows])], shrink=False, progress=False)
        found, expected = (net[0].metadata_norm.coefficients for net in nets)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        # The prior shrinks as ridge regression does: by 3 samples beside 60.
        with torch.no_grad():
            f = nn.functional.linear(features, nets[0][0].weight, nets[0][0].bias)[rows].numpy()
        m = metadata[rows].numpy()
        centred = m - m.mean(0)
        gram = centred.T @ centred / len(m)
        ridge = gram + 3 / (len(m) + 3) * np.diag(np.diag(gram))
        slopes = np.linalg.solve(ridge, centred.T @ f / len(m))
        np.testing.assert_allclose(found, slopes, rtol=1e-10, atol=1e-12)


class TestRecalibrate:
    def slopes(self, net, tokens, metadata, mask):
        with torch.no_grad():
            embedded = nn.functional.linear(tokens, net.embed.weight, net.embed.bias)
        return token_fit(embedded, metadata, mask)

    @pytest.mark.parametrize("form", ["dict", "wrapper", "function"])
    def test_every_true_token_counts_the_same_whatever_the_batches_are_padded_to(self, form):
        tokens, metadata, mask = make_data()
        net = Text()
        mdnorm.insert(net, "embed", **TOKENS)
        batches = []
        for rows in torch.arange(60).split(7):
            longest = int(mask[rows].sum(1).max())
            part = {
                "tokens": tokens[rows, :longest],
                "metadata": metadata[rows],
                "mask": mask[rows, :longest],
            }
            batches.append(part)
        expected = self.slopes(net, tokens, metadata, mask)
        forward = None
        if form == "function":

            def forward(model, batch):
                with mdnorm.metadata(model, batch["metadata"], mask=batch["mask"]):
                    return model(batch["tokens"])

        model = WithMetadata(net) if form == "wrapper" else net
        mdnorm.recalibrate(model, batches, shrink=False, forward=forward)
        np.testing.assert_allclose(net.embed.metadata_norm.coefficients, expected, rtol=0, atol=1e-10)
        # The window counts samples, not tokens.
        assert float(net.embed.metadata_norm.estimator.weight) == pytest.approx(60, abs=1e-9)

    def test_a_mask_goes_to_a_model_that_takes_it(self):
        class Own(Text):
            def forward(self, tokens, mask):
                assert mask.dtype == torch.bool
                return super().forward(tokens * mask[..., None])

        tokens, metadata, mask = make_data()
        net = Own()
        mdnorm.insert(net, "embed", **TOKENS)
        mdnorm.recalibrate(net, [{"tokens": tokens, "metadata": metadata, "mask": mask}], shrink=False)
        # The layers do not get it there: padding counted.
        expected = self.slopes(net, tokens, metadata, torch.ones_like(mask))
        np.testing.assert_allclose(net.embed.metadata_norm.coefficients, expected, rtol=0, atol=1e-10)


class TestNested:
    """`nn.TransformerEncoder` makes nested tensors of padded tokens in evaluation."""

    def encoder(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 2).double()

    def run(self, model, tokens, metadata, mask):
        with torch.no_grad(), mdnorm.metadata(model, metadata):
            return model(tokens, src_key_padding_mask=~mask)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
    @pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
    @pytest.mark.parametrize("scale", [False, True])
    def test_recalibrate(self, scale):
        tokens, metadata, mask = make_data(width=4)
        model = self.encoder()
        mdnorm.insert(model, ["layers.0", "layers.1.linear1"], scale=scale, **TOKENS)
        self.run(model.train(), tokens, metadata, mask)
        inputs = []
        model.layers[0].metadata_norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))

        def forward(model, rows):
            longest = int(mask[rows].sum(1).max())
            return self.run(model, tokens[rows, :longest], metadata[rows], mask[rows, :longest])

        report = mdnorm.recalibrate(model, torch.arange(60).split(9), shrink=False, forward=forward)
        assert report.names == ["layers.0.metadata_norm", "layers.1.linear1.metadata_norm"]
        assert any(features.is_nested for features in inputs)
        outputs = []
        model.layers[0].register_forward_hook(lambda *call: outputs.append(call[2]))
        self.run(model.eval(), tokens, metadata, mask)
        flat = torch.cat(list(outputs[-1].unbind())).numpy()
        rows = metadata[:, None].expand(-1, mask.shape[1], -1)[mask]
        slopes = np.linalg.lstsq(design_matrix(rows), flat, rcond=None)[0][:2]
        np.testing.assert_allclose(slopes, 0, atol=1e-10)

    @pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
    def test_by_element_they_are_an_error(self):
        tokens, metadata, mask = make_data(width=4)
        model = self.encoder()
        mdnorm.insert(model, "layers.0")
        with pytest.raises(ValueError, match="nested features"):
            mdnorm.recalibrate(
                model,
                [0],
                forward=lambda model, _: self.run(model, tokens, metadata, mask),
                progress=False,
            )

    @pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
    def test_the_recorder_measures_the_means_over_the_positions(self):
        tokens, metadata, mask = make_data(width=4)
        model, features = self.encoder().eval(), []
        recorder = DependenceRecorder(model, "layers.0", column_names=["a", "b"])
        model.layers[0].register_forward_hook(lambda *call: features.append(call[2]))
        with torch.no_grad(), recorder:
            for rows in torch.arange(60).split(20):
                model(tokens[rows], src_key_padding_mask=~mask[rows])
                recorder.update(metadata[rows])
        means = torch.cat([torch.stack([part.mean(0) for part in batch.unbind()]) for batch in features])
        assert all(batch.is_nested for batch in features)
        for column, name in enumerate("ab"):
            expected = mdnorm.metrics.distance_correlation_sqr(means.float(), metadata[:, column].float())
            assert recorder.compute()[name] == pytest.approx(float(expected), abs=1e-6)


class TestMetaTensor:
    """What MONAI's loader yields is a subclass of Tensor, metadata and labels included."""

    def loader(self, batch_size):
        generator = torch.Generator().manual_seed(0)
        data = []
        for index in range(8):
            metadata = torch.randn(2, generator=generator)
            image = torch.randn(1, 4, 4, generator=generator) + metadata[0]
            data.append(
                {
                    "image": monai.data.MetaTensor(image),
                    "metadata": monai.data.MetaTensor(metadata),
                    "labels": index % 2,
                }
            )
        return monai.data.DataLoader(monai.data.Dataset(data), batch_size=batch_size)

    def model(self, estimator):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 1))
        options = {"num_metadata": 2, "num_labels": 2, "estimator": estimator}
        mdnorm.insert(model, "0", granularity="channel", **options)
        mdnorm.insert(model, "2", **options)
        return model

    @pytest.mark.parametrize("batch_size", [1, 2, 4])
    @pytest.mark.parametrize("estimator", ["batch", "dataset", "running", "recursive", "penalty"])
    @pytest.mark.filterwarnings("ignore:.* was recalibrated on 8 row")
    def test_training_evaluation_and_recalibration(self, estimator, batch_size):
        model, twin = self.model(estimator), self.model(estimator)
        batches = list(self.loader(batch_size))
        given = [(batch["image"], batch["metadata"], batch["labels"]) for batch in batches]
        assert isinstance(given[0][0], monai.data.MetaTensor)
        plain = [(torch.Tensor(images), torch.Tensor(rows), labels) for images, rows, labels in given]
        for net, data in ((model, given), (twin, plain)):
            mdnorm.fit_gram(net, [batch[1:] for batch in data])
            for images, metadata, labels in data:
                with mdnorm.metadata(net, metadata, labels):
                    net(images).sum().backward()
        rename = [{"input": batch.pop("image"), **batch} for batch in batches]
        mdnorm.recalibrate(model, rename, progress=False)
        mdnorm.recalibrate(twin, plain, progress=False)
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
        images, metadata, _ = plain[0]
        with torch.no_grad():
            with mdnorm.metadata(model.eval(), rename[0]["metadata"]):
                out = model(rename[0]["input"])
            with mdnorm.metadata(twin.eval(), metadata):
                torch.testing.assert_close(torch.Tensor(out), twin(images), rtol=1e-5, atol=1e-6)
