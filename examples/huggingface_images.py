"""The whole way with the Trainer of transformers: images and a table with gaps to a model in service.

Run it with ``python examples/huggingface_images.py``; it needs
``pip install 'mdnorm[audit,design,huggingface]'`` and takes some seconds. Nothing is downloaded: the model is
a small vision transformer with random weights. The same for texts is in huggingface_text.py.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils.logging import disable_progress_bar

import mdnorm
from mdnorm.integration import MetadataTrainer

disable_progress_bar()
PLACES = ["vit.embeddings", "vit.layernorm"]
"""Behind the embeddings, where the effect of a site still adds up, and where the classifier reads."""


def make_data(num_rows: int, seed: int) -> tuple[Tensor, pd.DataFrame]:
    """Return images 16×16 and their table; the ill are older, and most were scanned in Bern."""
    rng = np.random.default_rng(seed)
    ill = np.arange(num_rows) % 2
    site = np.where(rng.random(num_rows) < 0.25 + 0.5 * ill, "Bern", "Basel")
    age = 60 + 5 * ill + rng.normal(0, 8, num_rows)
    images = rng.normal(0, 1, (num_rows, 1, 16, 16))
    # The disease shows in one corner, the site in another, the age in a third.
    images[:, :, :8, :8] += 0.35 * ill[:, None, None, None]
    images[:, :, 8:, 8:] += 0.8 * (site == "Bern")[:, None, None, None]
    images[:, :, 8:, :8] += 0.05 * (age - 60)[:, None, None, None]
    table = pd.DataFrame({"age": age, "site": site, "dx": np.where(ill, "ill", "healthy")})
    table.loc[rng.random(num_rows) < 0.1, "age"] = np.nan  # nobody asked
    return torch.tensor(images, dtype=torch.float32), table


def as_rows(images: Tensor, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what the model needs of each row, and the metadata as they stand in the table."""
    rows = table.assign(pixel_values=list(images), labels=(table["dx"] == "ill").astype(int))
    return rows[["pixel_values", "labels", "age", "site"]].to_dict("records")


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: tensors for the model, the columns of the table for the layers."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "age": [row["age"] for row in rows],
        "site": [row["site"] for row in rows],
    }


def make_model() -> ViTForImageClassification:
    """Return the plain model: training and service make the same."""
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return ViTForImageClassification(config)


class KeepBest(TrainerCallback):
    """Keeps the weights of the best epoch.

    Not `load_best_model_at_end`: transformers 5 writes the checkpoints of a ViT with the names of earlier
    versions, does not find them again, and goes on with the last weights.
    """

    def __init__(self) -> None:
        self.best, self.weights = -1.0, {}

    def on_evaluate(self, *_: Any, model: Any, metrics: dict[str, float], **__: Any) -> None:
        """Copy the weights where this epoch is better than those before."""
        if metrics["eval_within_sites"] > self.best:
            self.best, self.weights = metrics["eval_within_sites"], copy.deepcopy(model.state_dict())


def train(
    model: ViTForImageClassification, rows: list[Any], val_rows: list[Any], val: pd.DataFrame, folder: Path
) -> None:
    """Train, and keep the epoch that is best within the sites; then take the coefficients of all rows."""
    groups = (val["site"] + val["dx"]).to_numpy()

    def within_sites(output: EvalPrediction) -> dict[str, float]:
        # The mean over sites and diagnoses: who only knows the site gets 50 %.
        right = output.predictions.argmax(1) == output.label_ids
        return {
            "within_sites": float(np.mean([right[groups == group].mean() for group in np.unique(groups)]))
        }

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=5,
        per_device_train_batch_size=25,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=0,
    )
    trainer = MetadataTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=val_rows,
        data_collator=collate,
        compute_metrics=within_sites,
        metadata=["age", "site"],
        callbacks=[best := KeepBest()],
        recalibrate=False,
        evaluate_recalibrated=True,
    )
    trainer.train()
    model.load_state_dict(best.weights)
    print(trainer.recalibrate())


def serve(path: Path, image: Tensor, age: float | None, site: str) -> float:
    """Return the probability of the disease for one new image, from the file alone."""
    model = make_model()
    mdnorm.load(model, path).eval()
    with torch.no_grad(), mdnorm.metadata(model, {"age": age, "site": site}):
        return float(model(image.unsqueeze(0)).logits.softmax(1)[0, 1])


def main() -> dict[str, Any]:
    """Go the whole way; return what came out."""
    (images, table), (val_images, val) = make_data(800, seed=0), make_data(400, seed=1)
    rows, val_rows = as_rows(images, table), as_rows(val_images, val)
    design = mdnorm.Design("age + site", labels="C(dx, levels=['healthy', 'ill'])", missing="mean").fit(table)
    print(design)

    torch.manual_seed(0)
    model = make_model()
    # 16 patches and the class token, each with coefficients of its own.
    print(mdnorm.insert(model, after=PLACES, design=design, num_features=(17, 32)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(model, rows, val_rows, val, folder / "checkpoints")
        mdnorm.save(model, folder / "model.safetensors")
        probability = serve(folder / "model.safetensors", val_images[0], age=None, site="Bern")
    print(f"a new image of a patient of unknown age, from Bern: probability of the disease {probability:.2f}")

    def class_token(output: Tensor) -> Tensor:
        return output[:, 0]

    batches = DataLoader(val_rows, batch_size=100, collate_fn=collate)  # type: ignore[arg-type]
    keys = {"metadata": ["age", "site"], "labels": "labels"}
    features = mdnorm.features(model, "vit.layernorm", batches, output=class_token, keys=keys)
    report = mdnorm.audit(features, val[["age", "site", "dx"]], "dx")
    for finding in report.findings:
        print(f"{finding.level}: {finding.text}")
    return {"probability": probability, "features": features, "report": report}


if __name__ == "__main__":
    main()
