"""Where in a network the layer does most good: a vision transformer and a convolutional network on faces.

The data are those of ``mdnorm-experiments image``, and so is everything but the network and the places of its
layers. Each network is recalibrated on its training data and measured on faces that it was not trained on,
whose shade says nothing about the label. "Recovered": the share of the way from no correction to the oracle.

    python benchmarks/placement.py --json results/placement.json
    python benchmarks/placement.py --networks vit --seeds 100 101 --places none oracle   # to choose epochs
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from mdnorm import insert
from mdnorm_experiments.confounded import evaluate
from mdnorm_experiments.image import SETTING
from mdnorm_experiments.methods import METHODS
from mdnorm_experiments.networks import BackboneNetwork
from mdnorm_experiments.report import mean_with_deviation
from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.training import fit, recalibrate_on


class VisionTransformer(nn.Module):
    """Patches of 8 × 8 pixels and a class token through pre-norm blocks; it returns the class token's.

    As usual, what follows is linear: no non-linearity between the last features and the logits.
    """

    def __init__(self, width: int = 64, depth: int = 3, patches: int = 16) -> None:
        super().__init__()
        self.num_features = width
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))
        self.embedding = nn.Identity()  # a place for a layer: all tokens, as they enter the first block
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = self.patch(inputs).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(inputs), -1, -1), patches], 1) + self.position
        return self.norm(self.blocks(self.embedding(tokens))[:, 0])


@dataclass(frozen=True)
class Architecture:
    """A backbone, its schedule, and the places of layers: title → modules → options of the layer behind."""

    backbone: Any
    activation: type[nn.Module]
    size: int
    epochs: int
    learning_rate: float
    warmup_epochs: int
    places: dict[str, dict[str, dict[str, Any]]]


CHANNELS: dict[str, Any] = {"granularity": "channel"}
TOKENS = CHANNELS | {"channel_dim": -1}
HIDDEN: dict[str, dict[str, Any]] = {"hidden": {}}
BLOCKS = [f"backbone.blocks.{block}" for block in range(3)]
CONVOLUTIONS = [f"backbone.conv{number}" for number in (1, 2, 3)]

# Beside a layer, or without one: what else keeps the shade out of the outputs.
METHOD_OF_PLACE = {
    "no layer, balancing weights": "weights",
    "last features, balancing weights": "mdn-last-running+weights",
    "last features, decay 0.1, balancing weights": "mdn-last-running+weights",
    "last features, balancing weights and dependence loss": "mdn-last-running+weights+loss",
}
# A tenth was chosen for the transformer on the seeds 100 and 101.
MILD: dict[str, dict[str, Any]] = {"hidden": {"decay": 0.1}}
MORE: dict[str, dict[str, dict[str, Any]]] = {
    name: (MILD if "decay" in name else HIDDEN) if name.startswith("last") else {} for name in METHOD_OF_PLACE
} | {"last features, decay 0.1": MILD}

NETWORKS = {
    "vit": Architecture(
        VisionTransformer,
        activation=nn.Identity,
        size=12_000,
        epochs=10,
        learning_rate=1e-3,
        warmup_epochs=2,
        places={
            "embedding, each channel": {"backbone.embedding": TOKENS},
            "embedding, each token": {"backbone.embedding": {}},
            "every block, each channel": dict.fromkeys(BLOCKS, TOKENS),
            "every block, each token": {block: {} for block in BLOCKS},
            "last features": HIDDEN,
            "embedding (each token) and last features": {"backbone.embedding": {}} | HIDDEN,
            "every block (each channel) and last features": dict.fromkeys(BLOCKS, TOKENS) | HIDDEN,
        }
        | MORE,
    ),
    "cnn": Architecture(
        lambda: SETTING.backbone("group"),
        activation=nn.ReLU,
        size=SETTING.size,
        epochs=SETTING.epochs,
        learning_rate=SETTING.learning_rate,
        warmup_epochs=SETTING.warmup_epochs,
        places={
            "first convolution, each channel": {"backbone.conv1": CHANNELS},
            "first convolution, each value": {"backbone.conv1": {}},
            "last convolution, each channel": {"backbone.conv3": CHANNELS},
            "every convolution, each channel": dict.fromkeys(CONVOLUTIONS, CHANNELS),
            "last features": HIDDEN,
            "every convolution (each channel) and last features": dict.fromkeys(CONVOLUTIONS, CHANNELS)
            | HIDDEN,
        }
        | MORE,
    ),
}


def train(architecture: Architecture, place: str, seed: int) -> dict[str, Any]:
    """Return the measures of one network."""
    data = SETTING.make_data(architecture.size, seed)
    assert data.unconfounded is not None
    samples = data.unconfounded() if place == "oracle" else data.train
    torch.manual_seed(seed)
    network = BackboneNetwork(architecture.backbone(), len(data.classes))
    network.activation = architecture.activation()
    method = METHODS[METHOD_OF_PLACE.get(place, "none")]
    if method.dependence is not None:
        method = replace(method, dependence=method.dependence | {"variables": data.confounders})
    for module, options in architecture.places.get(place, {}).items():
        insert(
            network,
            after=module,
            num_metadata=samples.metadata.shape[1],
            num_labels=len(data.classes),
            example=samples.inputs[:2],
            **options,
        )
    trained = fit(
        network,
        method,
        samples,
        batch_size=SETTING.batch_size,
        epochs=architecture.epochs,
        learning_rate=architecture.learning_rate,
        warmup_epochs=architecture.warmup_epochs,
        seed=seed,
        epoch_done=lambda: None,
    )
    if architecture.places.get(place):
        recalibrate_on(network, samples, method)
    return evaluate(network, data, samples) | trained


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table, over seeds, of one network."""

    def values(place: str, name: str) -> list[float]:
        found = [row[name] for row in rows if row["place"] == place]
        if found and isinstance(found[0], dict):
            found = [
                fmean(value for by_class in each.values() for value in by_class.values()) for each in found
            ]
        return [value for value in found if value is not None]

    def cell(place: str, name: str, factor: float = 100, digits: int = 1) -> str:
        return mean_with_deviation([factor * value for value in values(place, name)], digits)

    lines = [
        "| layer behind | confound-free | recovered | metadata shuffled | as in training | dcor² of logits |",
        "| --- |" + 5 * " ---: |",
    ]
    ends = [fmean(values(place, "bacc")) for place in ("none", "oracle") if values(place, "bacc")]
    for place in dict.fromkeys(row["place"] for row in rows):
        recovered = "–"
        if len(ends) == 2 and place not in ("none", "oracle"):
            recovered = f"{100 * (fmean(values(place, 'bacc')) - ends[0]) / (ends[1] - ends[0]):.0f} %"
        cells = [
            place,
            cell(place, "bacc"),
            recovered,
            cell(place, "bacc_shuffled"),
            cell(place, "bacc_confounded"),
        ]
        cells.append(cell(place, "dcor2_logits", 1, 3))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--places", nargs="+", help="default: all, and none and the oracle")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--size", type=int, help="faces; default: the network's")
    parser.add_argument("--epochs", type=int, help="default: the network's")
    parser.add_argument("--learning-rate", type=float, help="default: the network's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("results/placement.json"),
        help="where the rows are kept; those that are there are not run again",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    store = ResultStore(options.json)
    try:
        for seed, name in product(options.seeds, options.networks):
            architecture = NETWORKS[name]
            architecture = replace(
                architecture,
                size=options.size or architecture.size,
                epochs=options.epochs or architecture.epochs,
                learning_rate=options.learning_rate or architecture.learning_rate,
            )
            for place in options.places or ["none", "oracle", *architecture.places]:
                key = {"network": name, "place": place, "seed": seed}
                key |= {field: getattr(architecture, field) for field in ("size", "epochs", "learning_rate")}
                if store.find(key):
                    continue
                row = store.add(key, train(architecture, place, seed))
                result = f"{100 * row['bacc']:.1f} %, {row['seconds_per_epoch']:.1f} s"
                print(f"{name} {place}, seed {seed}: {result}", flush=True)
    finally:
        store.clear_claims()
    for name in options.networks:
        print("", name, "", *summary([row for row in store.rows if row["network"] == name]), sep="\n")


if __name__ == "__main__":
    main()
