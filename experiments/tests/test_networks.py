import pytest
import torch

from mdnorm.layer import MetadataNorm
from mdnorm_experiments.continual import make_samples
from mdnorm_experiments.data.confounded import ConfoundedData
from mdnorm_experiments.settings import build, get_setting
from mdnorm_experiments.training import outputs


def test_layers_of_the_synthetic_network_sit_before_each_relu():
    setting = get_setting("synthetic")
    samples = make_samples(0, 5, 1, seed=0)
    data = ConfoundedData(samples, samples, samples, ("A", "B"), ("A", "B"), {"confounder": (0,)})
    network = build(setting, setting.method("mdn-every-running"), data, 0)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, MetadataNorm)}
    shapes = {name.split(".metadata_norm")[0]: module.num_features for name, module in layers.items()}
    assert shapes == {"backbone.norm1": (16, 28, 28), "backbone.norm2": (32, 24, 24), "hidden": (84,)}
    features, logits = outputs(network, samples)
    assert (features.shape, logits.shape) == ((10, 84), (10,))


def test_a_network_without_layers_needs_no_metadata():
    network = get_setting("synthetic").network("none", 2)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2,)


@pytest.mark.parametrize("name", ["image", "digits", "video", "mri", "synthetic"])
def test_a_norm_that_there_is_not(name):
    with pytest.raises(ValueError, match="norm must be one of none, batch, group, got 'layer'"):
        get_setting(name).network("layer", 2)
