"""The whole way with the Trainer of transformers: reports and a table with gaps to a model in service.

Run it with ``python examples/huggingface_text.py``; it needs
``pip install 'mdnorm[audit,design,huggingface]'`` and takes some seconds. Nothing is downloaded: the model is
a small BERT with random weights. The same for images is in huggingface_images.py.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, TrainingArguments
from transformers.utils.logging import disable_progress_bar

import mdnorm
from mdnorm.integration import MetadataTrainer

disable_progress_bar()
FILLERS = ["pain", "cough", "sleep", "weight", "appetite", "letter", "phone", "home"]
WORDS = ["[PAD]", "[CLS]", *FILLERS, "fever", "stairs", "clinic"]
LAYER = "bert.pooler.dense"
"""The last hidden layer, before its tanh: what the classifier is about to read."""


def make_table(num_rows: int, seed: int) -> pd.DataFrame:
    """Return reports with age, site and diagnosis; the ill are older, and most were seen in Bern."""
    rng = np.random.default_rng(seed)
    ill = np.arange(num_rows) % 2
    site = np.where(rng.random(num_rows) < 0.25 + 0.5 * ill, "Bern", "Basel")
    age = 60 + 5 * ill + rng.normal(0, 8, num_rows)
    # How often a word is written: fever tells the disease, stairs the age, clinic the habit of a site.
    often = np.ones((num_rows, len(WORDS) - 2))
    often[:, -3] += 1.0 * ill
    often[:, -2] += np.clip((age - 50) / 10, 0, None)
    often[:, -1] += 2.0 * (site == "Bern")
    reports = [" ".join(rng.choice(WORDS[2:], 40, p=weights / weights.sum())) for weights in often]
    table = pd.DataFrame({"report": reports, "age": age, "site": site, "dx": np.where(ill, "ill", "healthy")})
    table.loc[rng.random(num_rows) < 0.1, "age"] = np.nan  # nobody asked
    return table


def tokens_of(report: str) -> list[int]:
    """Return the numbers of the words; stands for the tokenizer of your model."""
    return [WORDS.index(word) for word in ["[CLS]", *report.split()]]


def as_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what the model needs of each row, and the metadata as they stand in the table."""
    rows = table.assign(input_ids=table["report"].map(tokens_of), labels=(table["dx"] == "ill").astype(int))
    return rows[["input_ids", "labels", "age", "site"]].to_dict("records")


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: padded tokens for the model, the columns of the table for the layer."""
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "age": [row["age"] for row in rows],
        "site": [row["site"] for row in rows],
    }


def make_model() -> BertForSequenceClassification:
    """Return the plain model: training and service make the same."""
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def train(model: BertForSequenceClassification, table: pd.DataFrame, val: pd.DataFrame, folder: Path) -> None:
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
        num_train_epochs=6,
        per_device_train_batch_size=20,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="within_sites",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=0,
    )
    trainer = MetadataTrainer(
        model,
        arguments,
        train_dataset=as_rows(table),
        eval_dataset=as_rows(val),
        data_collator=collate,
        compute_metrics=within_sites,
        metadata=["age", "site"],
    )
    trainer.train()


def serve(path: Path, report: str, age: float | None, site: str) -> float:
    """Return the probability of the disease for one new report, from the file alone."""
    model = make_model()
    mdnorm.load(model, path).eval()
    with torch.no_grad(), mdnorm.metadata(model, {"age": age, "site": site}):
        return float(model(torch.tensor([tokens_of(report)])).logits.softmax(1)[0, 1])


def main() -> dict[str, Any]:
    """Go the whole way; return what came out."""
    table, val = make_table(400, seed=0), make_table(300, seed=1)
    design = mdnorm.Design("age + site", labels="C(dx, levels=['healthy', 'ill'])", missing="mean").fit(table)
    print(design)

    torch.manual_seed(0)
    model = make_model()
    print(mdnorm.insert(model, after=LAYER, design=design, num_features=32))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(model, table, val, folder / "checkpoints")
        mdnorm.save(model, folder / "model.safetensors")
        new = "pain fever fever clinic cough sleep fever home fever clinic letter fever weight"
        probability = serve(folder / "model.safetensors", new, age=None, site="Bern")
    print(
        f"a new report of a patient of unknown age, from Bern: probability of the disease {probability:.2f}"
    )

    batches = DataLoader(as_rows(val), batch_size=100, collate_fn=collate)  # type: ignore[arg-type]
    features = mdnorm.features(model, LAYER, batches, keys={"metadata": ["age", "site"], "labels": "labels"})
    report = mdnorm.audit(features, val[["age", "site", "dx"]], "dx")
    # dcor² of the site given dx is near 0 (without the layer: 0.18). What a probe may still find of it is in
    # directions of tiny variance.
    for finding in report.findings:
        print(f"{finding.level}: {finding.text}")
    return {"probability": probability, "features": features, "report": report}


if __name__ == "__main__":
    main()
