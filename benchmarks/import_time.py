"""Time of `import mdnorm` against `import torch`, each in processes of its own, in turns; wanted: below 1.5.

python benchmarks/import_time.py --repeats 15
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from mdnorm.files import write_text_atomically

CODE = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(name: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(name)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the times")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"torch": [], "mdnorm": []}
    for name in times:  # files into the cache
        seconds(name)
    for _ in range(options.repeats):
        for name, found in times.items():
            found.append(seconds(name))
    ratios = [ours / theirs for ours, theirs in zip(times["mdnorm"], times["torch"], strict=True)]
    for name, found in times.items():
        print(f"import {name}: {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")
    print(f"ratio, median of {options.repeats} pairs: {statistics.median(ratios):.2f} (wanted: below 1.5)")
    if options.json is not None:
        write_text_atomically(options.json, json.dumps(times | {"ratio": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
