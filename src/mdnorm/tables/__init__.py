"""Tables of features: streamed regression on metadata, harmonisation of sites, the scikit-learn estimator.

`Moments` are the additive statistics behind it all, `fit_location_scale` is ComBat from them; both need only
NumPy and torch. `MetadataResidualizer` needs scikit-learn.
"""

from typing import TYPE_CHECKING, Any

from mdnorm.tables.combat import LocationScale, fit_location_scale
from mdnorm.tables.moments import Moments

if TYPE_CHECKING:
    from mdnorm.tables.residualizer import MetadataResidualizer

__all__ = ["LocationScale", "MetadataResidualizer", "Moments", "fit_location_scale"]


def __getattr__(name: str) -> Any:
    # A subclass of scikit-learn's classes cannot be defined without importing scikit-learn.
    if name == "MetadataResidualizer":
        from mdnorm.sklearn import MetadataResidualizer

        return MetadataResidualizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
