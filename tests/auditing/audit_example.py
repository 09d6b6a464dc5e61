"""Features with a known dependence on known metadata."""

import numpy as np

from mdnorm.auditing import Settings

QUICK = Settings(num_permutations=100, num_bootstrap=50)
# Where no test looks at a p-value or an interval.
QUICKEST = Settings(num_permutations=20, num_bootstrap=0)


def example(num_rows=240, seed=0):
    """Features before (know site and age) and after (know neither), metadata, and what was predicted.

    The label goes with the site: 80 % of the positive cases are from site a.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num_rows)
    site = np.where(rng.random(num_rows) < 0.2 + 0.6 * label, "a", "b")
    age = rng.uniform(20, 80, num_rows)
    noise = rng.standard_normal((num_rows, 6))
    after = noise.copy()
    after[:, 0] += 2.0 * label
    before = after.copy()
    before[:, 1] += 3.0 * (site == "a")
    before[:, 2] += age / 8
    metadata = {
        "diagnosis": np.where(label == 1, "ill", "well"),
        "site": site,
        "age": age,
        "shoe size": rng.standard_normal(num_rows),
        "predicted": np.where(before[:, 0] + before[:, 1] / 2 > 1.5, "ill", "well"),
        "predicted later": np.where(after[:, 0] > 1, "ill", "well"),
    }
    return before, after, metadata
