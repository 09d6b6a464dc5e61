"""Tables of features: streamed regression on metadata, harmonisation of sites, the scikit-learn estimator.

`Moments` are the additive statistics behind it all, `fit_location_scale` is ComBat from them; both need only
NumPy and torch. `MetadataResidualizer` needs scikit-learn, `residualize_file` (tables larger than memory) and
`MetadataModel` need pyarrow, `residualize_dask` (a cluster) needs Dask.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mdnorm.moments import Moments
from mdnorm.tables.combat import LocationScale, fit_location_scale

if TYPE_CHECKING:
    from mdnorm.tables.distributed import residualize_dask
    from mdnorm.tables.model import MetadataModel
    from mdnorm.tables.residualizer import MetadataResidualizer
    from mdnorm.tables.streaming import residualize_file

__all__ = [
    "LocationScale",
    "MetadataModel",
    "MetadataResidualizer",
    "Moments",
    "fit_location_scale",
    "residualize_dask",
    "residualize_file",
]

# A subclass of scikit-learn's classes cannot be defined without importing scikit-learn; and who only wants
# moments need not wait for the rest.
_MODULES = {
    "MetadataModel": "mdnorm.tables.model",
    "MetadataResidualizer": "mdnorm.sklearn",
    "residualize_dask": "mdnorm.tables.distributed",
    "residualize_file": "mdnorm.tables.streaming",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
