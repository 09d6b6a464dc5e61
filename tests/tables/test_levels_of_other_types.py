"""Sites and subjects that are numbers in one table and texts in another; those that the fit did not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mdnorm.design.roles import TableWarning
from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import MetadataModel, residualize_file


def data(rows: int = 240) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    site = random.integers(1, 4, rows)
    return random.standard_normal((rows, 3)) + 2.0 * site[:, None], site


def centred(features: np.ndarray, site: np.ndarray) -> np.ndarray:
    """Features with the mean of all in each site, as numpy says it."""
    out = features.copy()
    for level in np.unique(site):
        out[site == level] += features.mean(0) - features[site == level].mean(0)
    return out


@pytest.mark.parametrize(("fitted", "new"), [(int, str), (str, int), (float, str)])
def test_a_whole_number_and_its_text_are_one_site(fitted: type, new: type) -> None:
    features, site = data()
    model = MetadataResidualizer(site=0).fit(features, metadata=list(map(fitted, site)))
    out = model.transform(features, metadata=list(map(new, site.tolist())))
    np.testing.assert_allclose(out, centred(features, site))
    both = MetadataResidualizer(site=0).partial_fit(features[:120], metadata=list(map(fitted, site[:120])))
    both.partial_fit(features[120:], metadata=list(map(new, site[120:].tolist())))
    assert len(both.sites_) == 3
    np.testing.assert_allclose(both.transform(features, metadata=site), centred(features, site))
    pairs = pd.DataFrame({"a": site, "b": (features[:, 0] > features[:, 0].mean()).astype(int)})
    wanted = centred(features, site + 10 * pairs["b"].to_numpy())
    combined = MetadataResidualizer(site=["a", "b"]).fit(features, metadata=pairs.astype(fitted))
    np.testing.assert_allclose(combined.transform(features, metadata=pairs.astype(new)), wanted)


def test_texts_that_only_look_like_a_number_are_other_sites_and_are_reported() -> None:
    features, site = data()
    texts = np.where(np.arange(240) < 5, "0", "") + site.astype(str).astype(object)
    texts[5] = "new"
    with pytest.raises(ValueError, match=r"site\(s\) \['01'.* were not in fit"):
        MetadataResidualizer(site=0).fit(features, metadata=site).transform(features, metadata=texts)
    model = MetadataResidualizer(site=0, unseen="mean").fit(features, metadata=site)
    with pytest.warns(TableWarning, match=r"6 of 240 rows have a site that was not in the fit \('01'"):
        out = model.transform(features, metadata=texts)
    np.testing.assert_array_equal(out[:6], features[:6])
    np.testing.assert_allclose(out[6:], centred(features, site)[6:])


def test_a_column_of_a_file_that_one_cell_makes_texts_of(tmp_path: Path) -> None:
    features, site = data()
    frame = pd.DataFrame(features, columns=list("xyz")).assign(site=site)
    frame.to_csv(tmp_path / "train.csv", index=False)
    model = tmp_path / "fit.safetensors"
    residualize_file(tmp_path / "train.csv", tmp_path / "out.csv", site="site", save_model=model)
    wanted = centred(features, site)
    frame = frame.astype({"site": str})
    frame.loc[7, "site"] = "new"
    frame.to_csv(tmp_path / "new.csv", index=False)
    options: Any = {"apply": MetadataModel.load(model), "unseen": "mean"}
    for rows in (7, 1000):
        said = residualize_file(tmp_path / "new.csv", tmp_path / "out.csv", batch_rows=rows, **options)
        out = pd.read_csv(tmp_path / "out.csv")[list("xyz")].to_numpy()
        np.testing.assert_allclose(np.delete(out, 7, 0), np.delete(wanted, 7, 0))
        np.testing.assert_allclose(out[7], features[7])
        assert said.warnings == (
            "1 of 240 rows have a site that was not in the fit ('new'): they are taken as the average site.",
        )
    with pytest.warns(TableWarning, match="1 of 240 rows have a site"):
        MetadataModel.load(model).with_rules(unseen="mean").remove(features, frame)
    # Fitted to the file of texts, the numbers are still its sites.
    residualize_file(tmp_path / "new.csv", tmp_path / "out.csv", site="site", save_model=model)
    residualize_file(tmp_path / "train.csv", tmp_path / "out.csv", apply=MetadataModel.load(model))


def test_a_subject_is_known_by_its_number_and_by_its_text() -> None:
    random = np.random.default_rng(4)
    who, age = np.repeat(np.arange(40), 6), random.uniform(20, 80, 240)
    features = random.standard_normal((240, 3)) + 3 * random.standard_normal((40, 3))[who] + age[:, None]
    frame = pd.DataFrame({"age": age, "who": who})
    model = MetadataResidualizer("age", subject="who", scale=True, site="site", unseen="mean")
    frame["site"] = np.arange(240) % 2
    model.fit(features, metadata=frame)
    wanted = model.transform(features, metadata=frame)
    np.testing.assert_array_equal(model.transform(features, metadata=frame.astype({"who": str})), wanted)
    strangers = frame.assign(who=frame["who"].astype(str).where(frame["who"] > 1, "x"))
    with pytest.warns(TableWarning, match=r"12 of 240 rows have a subject that was not in the fit \('x'\)"):
        out = model.transform(features, metadata=strangers)
    np.testing.assert_array_equal(out[12:], wanted[12:])
