"""Tuning of faces, digits, video and MRI: BR-Net's strength, learning rates and sizes, by default one seed.

What a setting has is one of the rows; others tell what it is worth. Accuracy is that on confound-free data.

    python benchmarks/settings_tuning.py mri --method brnet --strengths 0.1 0.3 1 3 10
    python benchmarks/settings_tuning.py mri --method none batchnorm --learning-rates 3e-4 1e-3
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mdnorm.experiments.confounded import (
    METHOD_NAMES,
    SETTINGS,
    build,
    evaluate,
    fit,
    get_setting,
    method_of,
    plan,
)
from mdnorm.files import write_text_atomically


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--method", nargs="+", choices=METHOD_NAMES, default=["brnet"])
    parser.add_argument("--strengths", nargs="+", type=float, help="of BR-Net; default: the setting's")
    parser.add_argument("--learning-rates", nargs="+", type=float, help="default: the setting's")
    parser.add_argument("--warmup-epochs", nargs="+", type=int, help="default: the setting's")
    parser.add_argument("--sizes", nargs="+", type=int, help="training samples; default: the setting's")
    parser.add_argument("--epochs", nargs="+", type=int, help="default: the setting's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = get_setting(options.setting)
    rows: list[dict[str, Any]] = []
    names = "method size epochs rate warm-up strength seed confound-free confounded dcor² loss"
    print(f"| {' | '.join(names.split())} |")
    print("| --- |" + 10 * " ---: |")
    for size, seed in product(options.sizes or [setting.size], options.seeds):
        data = setting.make_data(size, seed)
        for name, epochs, rate, warmup, strength in product(
            options.method,
            options.epochs or [setting.epochs],
            options.learning_rates or [None],
            options.warmup_epochs or [setting.warmup_epochs],
            options.strengths or [setting.brnet_strength],
        ):
            (run,) = plan(setting, [name], 1, first_seed=seed, size=size, epochs=epochs, learning_rate=rate)
            network = build(setting, name, data, seed)
            trained = fit(
                network,
                method_of(replace(setting, brnet_strength=strength), name),
                data.train,
                batch_size=run.batch_size,
                epochs=run.epochs,
                learning_rate=run.learning_rate,
                warmup_epochs=warmup,
                seed=seed,
                epoch_done=lambda: None,
            )
            row = evaluate(network, data) | trained
            rows.append(
                {
                    "setting": setting.name,
                    "method": name,
                    "size": size,
                    "epochs": run.epochs,
                    "learning_rate": run.learning_rate,
                    "warmup_epochs": warmup,
                    "strength": strength,
                    "seed": seed,
                }
                | row
            )
            dependence = " / ".join(
                f"{sum(by_class.values()) / len(by_class):.3f}" for by_class in row["dcor2"].values()
            )
            print(
                f"| {name} | {size} | {run.epochs} | {run.learning_rate:g} | {warmup} | {strength:g} "
                f"| {seed} | {100 * row['bacc']:.1f} | {100 * row['bacc_confounded']:.1f} | {dependence} "
                f"| {row['train_loss']:.3f} |",
                flush=True,
            )
            if options.json is not None:
                write_text_atomically(options.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
