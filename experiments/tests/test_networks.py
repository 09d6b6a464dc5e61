import pytest
import torch
from torch import nn

from mdnorm import MetadataNorm
from mdnorm_experiments.confounded import get_setting
from mdnorm_experiments.networks import SLOTS, SyntheticNetwork


def test_slots_have_the_shapes_they_say():
    seen = {}

    def normalization(name, shape):
        layer = MetadataNorm(shape, 1, 1, estimator="batch")
        layer.register_forward_hook(lambda module, args, out: seen.update({name: tuple(args[0].shape[1:])}))
        return layer

    network = SyntheticNetwork(normalization)
    logits = network(torch.randn(5, 1, 32, 32), torch.randn(5, 1), torch.randn(5, 1))
    assert logits.shape == (5,)
    assert seen == SLOTS
    assert network.eval()(torch.randn(5, 1, 32, 32), torch.randn(5, 1)).shape == (5,)


def test_identity_slots_need_no_metadata():
    network = SyntheticNetwork(lambda name, shape: nn.Identity())
    assert network(torch.randn(2, 1, 32, 32), None).shape == (2,)


@pytest.mark.parametrize("name", ["image", "digits", "video", "mri"])
def test_a_norm_that_there_is_not(name):
    with pytest.raises(ValueError, match="norm must be one of none, batch, group, got 'layer'"):
        get_setting(name).backbone("layer")
