"""What each part of the recipe contributes on the synthetic data at small batches: one change at a time.

The recipe is `mdn-last-running` of ``mdnorm-experiments synthetic``: the two-sided running estimator, the
confounder as a cubic polynomial, the intercept kept, recalibration at the end (its own columns of the table).
Finished trainings are kept in the folder.

    python benchmarks/synthetic_ablation.py --out results/ablation
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mdnorm.estimators import ESTIMATORS, LeastSquares
from mdnorm_experiments.methods import METHODS, Method
from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.runner import Runner
from mdnorm_experiments.settings import plan, train
from mdnorm_experiments.synthetic import SETTING, SyntheticSetting

# Running coefficients as constants: the effect is removed, the incentive to use it stays. And running
# coefficients whose gradient comes from the batch at hand alone.
ESTIMATORS |= {
    "forward-only": partial(LeastSquares, adjoint="none"),
    "batch-adjoint": partial(LeastSquares, adjoint="batch"),
}

RECIPE = METHODS["mdn-last-running"]
OPTIONS = RECIPE.options or {}


def changed(title: str, degree: int = 3, **options: Any) -> Method:
    return replace(RECIPE, title=title, degree=degree, options=OPTIONS | options)


VARIANTS = {
    "recipe": replace(RECIPE, title="recipe (window 500)"),
    "recipe-250": changed("window 250", window=250),
    "recipe-1000": changed("window 1000", window=1000),
    "recipe-2000": changed("window 2000", window=2000),
    "recipe-forward": changed("forward half only", estimator="forward-only"),
    "recipe-adjoint": changed("adjoint of the batch", estimator="batch-adjoint"),
    "recipe-linear": changed("confounder linear", degree=1),
    "recipe-center": changed("intercept removed", center=True),
}
# At module level, since worker processes import this file anew.
METHODS.update(VARIANTS)
SyntheticSetting.methods = (*SyntheticSetting.methods, *VARIANTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/ablation"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = plan(SETTING, list(VARIANTS), arguments.seeds, batch_sizes=arguments.batch_sizes)
    store = ResultStore(arguments.out / "results.json")
    try:
        rows = Runner(store, train, os.cpu_count() or 1).run(runs)
    finally:
        store.clear_claims()
    (table,) = SETTING.tables(rows)
    text = table.markdown()
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
