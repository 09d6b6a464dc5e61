"""Is `MetadataResidualizer` the published ComBat? Against stored results of its R, Python and Matlab code.

The ComBatHarmonization repository (Fortin et al.; MIT and Artistic 2.0 licences) keeps a test table of 200
features and 10 people at two sites, and what its implementations made of it in many variants. Here are the
parametric ones: with and without a protected column, with and without empirical Bayes, shifts only, and
with a reference site. The first script below `Testing/` there writes the table, the others the results.

    python benchmarks/combat_reference.py --data DIR

DIR has `combat_testdata.csv` and the folder `combat_reference` of files `VARIANT_LANGUAGE.csv`, such as
`parametric_adjusted_noeb_r.csv`: the files of `Testing/inputData` and `Testing/outputData` there, without
the `testdata_combat_` in front. What is installed of neuroCombat and neuroHarmonize is run on the same table.
The command fails where a stored result differs by more than 1e-10. Matlab's iteration stops earlier than that
of R and Python: it is compared with `fit_location_scale` of the same tolerance, 1e-3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mdnorm.files import write_text_atomically
from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import Moments, fit_location_scale

Floats = NDArray[np.float64]

TOLERANCE = 1e-10
SITE = np.repeat(["first", "second"], 5)
PROTECTED = np.tile([1.0, 2.0], 5)

# Matlab's code stops its iteration at a relative change below this, all others at 1e-4.
MATLAB_TOLERANCE = 1e-3

NOT_COVERED = {"nonparametric": "priors of another form than normal and inverse gamma"}


class DataError(Exception):
    """A file is missing, or is not what it should be."""


@dataclass(frozen=True)
class Variant:
    """What the name of a file says."""

    name: str
    language: str

    @property
    def covered(self) -> bool:
        return not self.name.startswith("nonparametric")

    @property
    def protects(self) -> bool:
        return "_adjusted" in self.name

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "scale": "meanonly" not in self.name,
            "empirical_bayes": "noeb" not in self.name,
            "reference_site": "first" if "batchref" in self.name else None,
        }


def read_people(path: Path, header: bool) -> Floats:
    """Return a file of features by people as people by features."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: --data names the folder with combat_testdata.csv.")
    try:
        values = np.loadtxt(path, delimiter=",", skiprows=int(header), ndmin=2)
    except ValueError as error:
        raise DataError(f"{path} is no table of numbers: {error}") from error
    if values.shape[1] != len(SITE):
        raise DataError(f"{path} has {values.shape[1]} columns: {len(SITE)} people are expected.")
    return np.ascontiguousarray(values.T)


def stored(folder: Path) -> dict[Variant, Floats]:
    """Return the stored results, by variant."""
    results = {}
    for path in sorted(folder.glob("*.csv")):
        name, _, language = path.stem.rpartition("_")
        results[Variant(name, language)] = read_people(path, header=language == "r")
    if not results:
        raise DataError(f"{folder} has no results VARIANT_LANGUAGE.csv.")
    return results


def harmonised(features: Floats, variant: Variant) -> Floats:
    """Return what mdnorm makes of the features."""
    model = MetadataResidualizer(site="site", **variant.settings)
    given = {"metadata": pd.DataFrame({"site": SITE}), "labels": PROTECTED if variant.protects else None}
    result: Floats = model.fit(features, **given).transform(features, **given)
    return result


def harmonised_as_matlab(features: Floats, variant: Variant) -> Floats:
    """Return the same with the tolerance of the Matlab code, from the moments of both sites."""
    protected = PROTECTED[:, None] if variant.protects else np.empty((len(SITE), 0))
    sites = list(dict.fromkeys(SITE.tolist()))
    moments = {
        site: Moments.empty(features.shape[1], 0, protected.shape[1]).update(
            features[site == SITE], protected[site == SITE]
        )
        for site in sites
    }
    model = fit_location_scale(moments, tolerance=MATLAB_TOLERANCE, **variant.settings)
    result: Floats = model.remove(features, protected, np.array([sites.index(site) for site in SITE]))
    return result


def by_neurocombat(features: Floats, variant: Variant) -> Floats:
    from neuroCombat import neuroCombat

    people = pd.DataFrame({"site": SITE, "protected": PROTECTED})
    result = neuroCombat(
        features.T.copy(),
        people,
        "site",
        continuous_cols=["protected"] if variant.protects else [],
        eb=variant.settings["empirical_bayes"],
        mean_only=not variant.settings["scale"],
        ref_batch=variant.settings["reference_site"],
    )
    return np.asarray(result["data"]).T


def by_neuroharmonize(features: Floats, variant: Variant) -> Floats | None:
    """Return its result and apply the model to the same rows; None: shifts alone it does not know."""
    from neuroHarmonize import harmonizationApply, harmonizationLearn

    if not variant.settings["scale"]:
        return None
    people = pd.DataFrame({"SITE": SITE} | ({"protected": PROTECTED} if variant.protects else {}))
    model, _ = harmonizationLearn(
        features,
        people,
        eb=variant.settings["empirical_bayes"],
        ref_batch=variant.settings["reference_site"],
        seed=0,
    )
    return np.asarray(harmonizationApply(features, people, model))


PACKAGES = {"neuroCombat": by_neurocombat, "neuroHarmonize": by_neuroharmonize}


def compare(data: Path) -> list[dict[str, Any]]:
    """Return a row for each stored result, and for each installed package and variant."""
    features = read_people(data / "combat_testdata.csv", header=True)
    rows = []
    ours: dict[str, Floats] = {}
    for variant, expected in stored(data / "combat_reference").items():
        row: dict[str, Any] = {"variant": variant.name, "against": f"stored, {variant.language}"}
        if variant.covered:
            if variant.language == "matlab":
                mine = harmonised_as_matlab(features, variant)
            else:
                mine = ours[variant.name] = harmonised(features, variant)
            row["difference"] = _difference(mine, expected)
            row["must_agree"] = True
        else:
            row["not_covered"] = NOT_COVERED["nonparametric"]
        rows.append(row)
    for package, run in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed: skipped", file=sys.stderr)
            continue
        for name, result in ours.items():
            row = {"variant": name, "against": f"{package} {version}", "must_agree": False}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    theirs = _quietly(run, features, Variant(name, "python"))
            except Exception as error:  # whatever another package raises is its result
                row["not_covered"] = f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                if theirs is None:
                    row["not_covered"] = "shifts alone are no option of it"
                else:
                    row["difference"] = _difference(result, theirs)
            rows.append(row)
    return rows


def _quietly(function: Any, *arguments: Any) -> Any:
    """Return what a package returns that prints about its progress."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def _difference(ours: Floats, theirs: Floats) -> float:
    return float(np.abs(ours - theirs).max())


def table(rows: list[dict[str, Any]]) -> str:
    """Return the largest differences, a line for each variant and a column for each source."""
    sources = list(dict.fromkeys(row["against"] for row in rows))
    cells = {(row["variant"], row["against"]): row for row in rows}
    lines = [
        "| variant | " + " | ".join(sources) + " |",
        "| --- |" + " ---: |" * len(sources),
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        shown = []
        for source in sources:
            row = cells.get((variant, source), {})
            shown.append(f"{row['difference']:.0e}" if "difference" in row else "–")
        lines.append(f"| {variant.replace('_', ', ')} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with combat_testdata.csv")
    parser.add_argument("--out", type=Path, help="write every row to this JSON file, too")
    options = parser.parse_args(arguments)
    try:
        rows = compare(options.data)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    for row in rows:
        if "not_covered" in row:
            print(f"not covered: {row['variant']} ({row['against']}): {row['not_covered']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n".join(json.dumps(row) for row in rows)
        write_text_atomically(options.out, f"[\n{text}\n]\n")
    wrong = [row for row in rows if row.get("must_agree") and not row["difference"] <= TOLERANCE]
    for row in wrong:
        print(f"error: {row['variant']}, {row['against']}: {row['difference']:.1e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
