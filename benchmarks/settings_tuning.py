"""Tuning of faces, digits, video and MRI, on seeds that no table uses: options of methods, rates and sizes.

Accuracy is that on confound-free data; the last lines are means over the seeds. What is best for a setting
stands in its `tuned`.

    python benchmarks/settings_tuning.py mri --method brnet --option adversary.strength 0.1 0.3 1 3 10
    python benchmarks/settings_tuning.py mri --method groupdro --option group_dro.step_size 1e-3 1e-2 1e-1 1
    python benchmarks/settings_tuning.py mri --method dfr --option head.draws 1 10 30
    python benchmarks/settings_tuning.py mri --method none batchnorm --learning-rates 3e-4 1e-3
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mdnorm.files import write_text_atomically
from mdnorm_experiments.confounded import METHOD_NAMES, ConfoundedSetting, evaluate
from mdnorm_experiments.settings import get_setting, plan, train_network

SETTINGS = ("image", "digits", "video", "mri")
SEEDS = range(100, 104)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--method", nargs="+", choices=METHOD_NAMES, default=["brnet"])
    parser.add_argument(
        "--option", nargs="+", metavar=("FIELD.NAME", "VALUE"), help="of the methods; default: the setting's"
    )
    parser.add_argument("--learning-rates", nargs="+", type=float, help="default: the setting's")
    parser.add_argument("--warmup-epochs", nargs="+", type=int, help="default: the setting's")
    parser.add_argument("--sizes", nargs="+", type=int, help="training samples; default: the setting's")
    parser.add_argument("--epochs", nargs="+", type=int, help="default: the setting's")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = get_setting(options.setting)
    assert isinstance(setting, ConfoundedSetting)
    field, name = options.option[0].split(".") if options.option else ("", "")
    values = [json.loads(text) for text in options.option[1:]] if options.option else [None]
    rows: list[dict[str, Any]] = []
    means: dict[str, list[float]] = defaultdict(list)
    names = f"method size epochs rate warm-up {name or 'option'} seed confound-free confounded logits loss"
    print(f"| {' | '.join(names.split())} |")
    print("| --- |" + 10 * " ---: |")
    for seed, size in product(options.seeds, options.sizes or [setting.size]):
        data = setting.make_data(size, seed)
        for chosen, epochs, rate, warmup, value in product(
            options.method,
            options.epochs or [setting.epochs],
            options.learning_rates or [setting.learning_rate],
            options.warmup_epochs or [setting.warmup_epochs],
            values,
        ):
            (run,) = plan(setting, [chosen], 1, first_seed=seed, size=size, epochs=epochs, learning_rate=rate)
            method = setting.method(chosen)
            if field:
                method = replace(method, **{field: getattr(method, field) | {name: value}})
            network, samples, trained = train_network(
                replace(run, warmup_epochs=warmup), method, data, lambda: None
            )
            row = evaluate(network, data, samples) | trained
            rows.append(run.settings() | method.settings() | {"warmup_epochs": warmup} | row)
            cell = f"| {chosen} | {size} | {epochs} | {rate:g} | {warmup} | {value} |"
            means[cell].append(row["bacc"])
            bacc, confounded = 100 * row["bacc"], 100 * row["bacc_confounded"]
            dependence = " / ".join(f"{fmean(found.values()):.3f}" for found in row["dcor2_logits"].values())
            print(
                f"{cell} {seed} | {bacc:.1f} | {confounded:.1f} | {dependence} | {row['train_loss']:.3f} |",
                flush=True,
            )
            if options.json is not None:
                write_text_atomically(options.json, json.dumps(rows, indent=1) + "\n")
    for cell, accuracies in means.items():
        print(f"{cell} mean | {100 * fmean(accuracies):.2f} | | | |")


if __name__ == "__main__":
    main()
