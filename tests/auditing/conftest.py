"""An audit of the example, made once."""

import pytest
from audit_example import QUICK, example

import mdnorm


@pytest.fixture(scope="session")
def report():
    before, after, metadata = example()
    return mdnorm.audit(
        {"the old network": before, "the new network": after},
        metadata,
        "diagnosis",
        predictions={"the old network": "predicted", "the new network": "predicted later"},
        positive="ill",
        settings=QUICK,
    )
