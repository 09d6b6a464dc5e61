"""Regression of features on metadata: the maths of Metadata Normalization, stateless and differentiable.

Notation (Lu et al., CVPR 2021, section 3). Each of N samples has metadata `m` (K_m columns), label columns
`y` (K_y) and features `f` (D values). The model is ``f = m·β_m + y·β_y + β_0 + r``; only the metadata part
is removed::

    out = f − (m − m̄)·β_m                       (the mean of the features stays)
    out = f − m·β_m − β_0                        (``center=True``, the authors' form)

The label columns are in the regression only so that an effect which label and metadata share is not thrown
away with the metadata.

How the coefficients are computed. With `x = [m, y]`, its covariance `S` and its cross covariance `C` with
the features, the Frisch–Waugh–Lovell theorem gives the metadata rows of the full regression as

    β_m = (S_mm − S_my S_yy⁺ S_ym)⁺ (C_m − S_my S_yy⁺ C_y),

that is, a matrix `Q` that depends on the design alone, times `C`. Everything is a mean over samples, so
nothing depends on the batch size. The pseudo-inverses are taken in the space of whitened metadata columns,
where a direction either varies or does not: constant and collinear columns are handled, the result does not
depend on how the metadata are coded (units, reference category), and where the labels determine a direction
of the metadata exactly, what is removed is uncorrelated with that direction, so the label is protected.

The map from features to output is linear, ``out = (I − B P) f`` with `B` and `P` made of the design, so the
gradient needs no activation: only `B` and `P` (N numbers a column) are saved.
"""

from mdnorm.functional.batch_form import metadata_norm
from mdnorm.functional.coefficients import apply_operator as apply_operator
from mdnorm.functional.coefficients import (
    coefficient_operator,
    effect_basis,
    moment_rows,
    recursive_update,
    removal_operator,
)
from mdnorm.functional.coefficients import column_scale as column_scale
from mdnorm.functional.coefficients import projected_rows as projected_rows
from mdnorm.functional.columns import design_columns
from mdnorm.functional.columns import label_columns as label_columns
from mdnorm.functional.dtypes import check_floating as check_floating
from mdnorm.functional.dtypes import compute_dtype as compute_dtype
from mdnorm.functional.dtypes import full_precision as full_precision
from mdnorm.functional.dtypes import statistics_dtype as statistics_dtype
from mdnorm.functional.gram import Gram
from mdnorm.functional.gram import NoSamplesError as NoSamplesError
from mdnorm.functional.moments import feature_moments, merge_cross_moments_, share_gram, share_moments
from mdnorm.functional.positions import Granularity as Granularity
from mdnorm.functional.positions import position_dims
from mdnorm.functional.removal import (
    remove_effect,
    remove_regression,
    remove_running_regression,
    remove_shared_regression,
    rescale,
)

__all__ = [
    "Gram",
    "coefficient_operator",
    "design_columns",
    "effect_basis",
    "feature_moments",
    "merge_cross_moments_",
    "metadata_norm",
    "moment_rows",
    "position_dims",
    "recursive_update",
    "removal_operator",
    "remove_effect",
    "remove_regression",
    "remove_running_regression",
    "remove_shared_regression",
    "rescale",
    "share_gram",
    "share_moments",
]
