"""What each part of the recipe contributes on the synthetic data: one change at a time, three seeds a row.

The recipe is `mdn-last` of ``mdnorm experiment synthetic``: the paper's estimator, the confounder as a cubic
polynomial, the intercept kept, running coefficients over one epoch. Finished trainings are kept in the
folder.

    python benchmarks/synthetic_ablation.py --out results/ablation
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from mdnorm.experiments.report import synthetic_table
from mdnorm.experiments.results import ResultStore
from mdnorm.experiments.runner import Runner
from mdnorm.experiments.synthetic import METHODS, plan, train

RECIPE = METHODS["mdn-last"]
OPTIONS = RECIPE.options or {}
VARIANTS = {
    "recipe": replace(RECIPE, title="recipe"),
    "recipe-linear": replace(RECIPE, title="confounder linear", degree=1),
    "recipe-center": replace(RECIPE, title="intercept removed", options=OPTIONS | {"center": True}),
    "recipe-linear-center": replace(
        RECIPE, title="both (the authors' form)", degree=1, options=OPTIONS | {"center": True}
    ),
    "recipe-momentum": replace(
        RECIPE, title="momentum 0.1 instead of a window", options={"estimator": "dataset", "momentum": 0.1}
    ),
}
# At module level, since worker processes import this file anew.
METHODS.update(VARIANTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/ablation"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[20, 200, 2000])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = plan(list(VARIANTS), arguments.batch_sizes, arguments.seeds)
    store = ResultStore(arguments.out / "results.json")
    rows = Runner(store, train, os.cpu_count() or 1).run(runs)
    table = synthetic_table(rows, {name: method.title for name, method in VARIANTS.items()}).markdown()
    (arguments.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
