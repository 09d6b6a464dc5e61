"""The whole way: NIfTI files and a table of participants to a corrected model in service, and an audit of it.

Run it with ``python examples/nifti_to_service.py`` (it makes its own files), or with a folder of yours::

    folder/participants.tsv                      participant_id, age, site, dx ("n/a" is missing)
    folder/sub-001/anat/sub-001_T1w.nii.gz       volumes of one size

It needs ``pip install 'mdnorm[audit,design,monai]' nibabel`` and takes less than a minute.
"""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader, Dataset
from monai.networks.nets import DenseNet
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, LoadImaged, NormalizeIntensityd
from torch import Tensor, nn

import mdnorm

# Where the parts of a batch are. The metadata are columns of the design, and the label is its label.
KEYS = {"inputs": "image", "metadata": ["age", "site"], "labels": "dx"}


def make_files(folder: Path, num_subjects: int = 48) -> None:
    """Write volumes 16³ and their table. Patients are older, and most were scanned in Bern."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(1, num_subjects + 1):
        ill = number % 2
        age = 62 + 6 * ill + rng.normal(0, 6)
        site = "Bern" if rng.random() < 0.3 + 0.4 * ill else "Basel"
        volume = rng.normal(0, 1, (16, 16, 16))
        volume[:8] += 0.5 * ill
        volume[8:] += 0.05 * (age - 65) + 0.5 * (site == "Bern")
        name = f"sub-{number:03}"
        path = folder / name / "anat" / f"{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(volume.astype(np.float32), np.eye(4)), path)
        known = "n/a" if number % 11 == 0 else f"{age:.1f}"
        rows.append({"participant_id": name, "age": known, "site": site, "dx": "AD" if ill else "CN"})
    pd.DataFrame(rows).to_csv(folder / "participants.tsv", sep="\t", index=False)


def read_table(folder: Path) -> pd.DataFrame:
    """Return the participants that have a volume, with its path."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t", na_values="n/a")
    table["image"] = [str(folder / name / "anat" / f"{name}_T1w.nii.gz") for name in table["participant_id"]]
    return table[[Path(path).is_file() for path in table["image"]]].reset_index(drop=True)


def make_loader(table: pd.DataFrame, shuffle: bool = False) -> Any:
    """Return batches of 4: dicts with the columns of the table, the images loaded."""
    transforms = Compose(
        [
            LoadImaged("image", image_only=True),
            EnsureChannelFirstd("image"),
            NormalizeIntensityd("image"),
            EnsureTyped("image", dtype=torch.float32, track_meta=False),
        ]
    )
    return DataLoader(Dataset(table.to_dict("records"), transforms), batch_size=4, shuffle=shuffle)


def make_model() -> DenseNet:
    """Return the plain network: training and service make the same."""
    return DenseNet(
        spatial_dims=3, in_channels=1, out_channels=1, init_features=8, growth_rate=4, block_config=(2, 2)
    )


def metadata_of(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that the design of the model turns into numbers, and its label."""
    return {name: batch[name] for name in ("age", "site", "dx")}


def accuracy_within_sites(model: nn.Module, loader: Any) -> float:
    """Return the mean over sites and diagnoses: what a model that only knows the site gets is 50 %."""
    hits: dict[tuple[str, str], list[bool]] = {}
    with torch.no_grad():
        for batch in loader:
            with mdnorm.metadata(model, metadata_of(batch)):
                is_ill = model(batch["image"])[:, 0] > 0
            for site, dx, found in zip(batch["site"], batch["dx"], is_ill.tolist(), strict=True):
                hits.setdefault((site, dx), []).append(found == (dx == "AD"))
    return float(np.mean([np.mean(values) for values in hits.values()]))


def train(model: nn.Module, design: mdnorm.Design, table: pd.DataFrame, val: pd.DataFrame) -> None:
    """Train, and keep the epoch that is best on validation subjects with exact coefficients."""
    ordered, shuffled, val_loader = make_loader(table), make_loader(table, shuffle=True), make_loader(val)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    best, best_state = -1.0, copy.deepcopy(model.state_dict())
    for epoch in range(2):
        model.train()
        for batch in shuffled:
            # The label as the design has it: AD is 1.
            truth = design.transform(metadata_of(batch)).labels
            with mdnorm.metadata(model, metadata_of(batch)):
                loss = nn.functional.binary_cross_entropy_with_logits(model(batch["image"]), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with mdnorm.recalibrated(model, ordered, keys=KEYS):
            accuracy = accuracy_within_sites(model, val_loader)
        print(f"epoch {epoch}: accuracy within sites {accuracy:.0%}")
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    print(mdnorm.recalibrate(model, ordered, keys=KEYS))


def serve(path: Path, image: Tensor, age: float | None, site: str) -> float:
    """Return the probability of AD of one new subject, from the file alone."""
    model = make_model()
    mdnorm.load(model, path).eval()
    with torch.no_grad(), mdnorm.metadata(model, {"age": age, "site": site}):
        return float(model(image.unsqueeze(0)).sigmoid())


def main(folder: Path | None = None) -> dict[str, Any]:
    """Go the whole way; return what came out."""
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            folder = Path(made) / "study"
            make_files(folder)
        table = read_table(folder)
        # By subjects: each has one row here.
        is_val = np.random.default_rng(0).permutation(len(table)) < len(table) // 3
        train_table, val_table = table[~is_val], table[is_val]

        design = mdnorm.Design("age + site", labels="C(dx, levels=['CN', 'AD'])", missing="mean")
        design.fit(train_table)
        print(design)
        print(design.diagnose(train_table))

        torch.manual_seed(0)
        model = make_model()
        example = next(iter(make_loader(train_table)))["image"]
        print(mdnorm.insert(model, after="class_layers.flatten", design=design, window=40, example=example))
        train(model, design, train_table, val_table)

        path = Path(made) / "model.safetensors"
        mdnorm.save(model, path)
        image = make_loader(val_table).dataset[0]["image"]
        probability = serve(path, image, age=None, site="Bern")
        print(f"a new subject of unknown age, scanned in Bern: probability of AD {probability:.2f}")

        features = mdnorm.features(model, "class_layers.flatten", make_loader(table), keys=KEYS)
        report = mdnorm.audit(features, table[["age", "site", "dx"]], "dx")
        for finding in report.findings:
            print(f"{finding.level}: {finding.text}")
        return {"probability": probability, "features": features, "report": report, "design": design}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
