"""An audit of the example, made once."""

import pytest
from audit_example import QUICK, example

import mdnorm


@pytest.fixture(scope="session")
def report():
    before, after, metadata = example()
    return mdnorm.audit(
        before,
        metadata,
        "diagnosis",
        after=after,
        predictions="predicted",
        predictions_after="predicted later",
        positive="ill",
        names=("the old network", "the new network"),
        settings=QUICK,
    )
