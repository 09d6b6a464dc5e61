"""Warnings name the line of the user, whatever lies between it and the code that warns."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mdnorm
from mdnorm.sklearn import MetadataResidualizer


def behind_the_head():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    mdnorm.insert(model, after="2", num_metadata=1, num_labels=2, example=torch.zeros(2, 4))


def no_example_behind_the_head():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    mdnorm.insert(model, after="2", num_metadata=1, num_labels=2)
    with mdnorm.metadata(model, torch.randn(5, 1), torch.tensor([0, 1, 0, 1, 1])):
        model(torch.randn(5, 4))


def mask_of_other_positions():
    layer = mdnorm.MetadataNorm(3, 1, granularity="channel", channel_dim=-1)
    model = nn.Sequential(nn.Identity(), layer)
    with mdnorm.metadata(model, torch.randn(4, 1), mask=torch.ones(4, 7, dtype=torch.bool)):
        model(torch.randn(4, 5, 3))


def without_metadata():
    MetadataResidualizer().fit_transform(np.random.default_rng(0).normal(size=(20, 2)))


def sentinel():
    table = pd.DataFrame({"age": [*np.linspace(20.0, 80, 60), -9999, -9999, -9999]})
    mdnorm.Design("age").fit(table)


@pytest.mark.parametrize(
    "use",
    [behind_the_head, no_example_behind_the_head, mask_of_other_positions, without_metadata, sentinel],
    ids=lambda use: use.__name__,
)
def test_warnings_name_the_line_of_the_user(use):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    assert {warning.filename for warning in caught} == {__file__}
