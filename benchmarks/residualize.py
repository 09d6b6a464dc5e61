"""Speed and memory of `mdnorm residualize` on a table on disk, against copying the file in its own format.

A table of `--rows` × `--features` float32 values with a numeric and a categorical metadata column is made for
each format. Three things are then done to it, each in a process of its own, in turns:

- "copy": read in batches, write in batches. For Parquet in two ways, of which the faster counts: as pyarrow
  writes by default, and without the dictionaries that it tries for the features, as `residualize` writes.
- "residualize": all passes, metadata, fit and write.

All read with the same threads ahead, write in one thread behind, and end with the data on the disk (fsync).
The ratio is the speed of `residualize` relative to that of the faster copy: 0.5 means twice the time.

    python benchmarks/residualize.py --rows 10000000 --features 64 --folder /var/tmp --json residualize.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SITES = ("bern", "oslo", "rome", "york")
FORMATS = ("parquet", "npy", "csv")
CHUNK_ROWS = 2**20
MIB = 2**20


# --------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------


def chunks(rows: int, features: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield age (m,), index of the site (m,) and features (features, m)."""
    rng = np.random.default_rng(0)
    effects = rng.standard_normal((features, 1 + len(SITES)), dtype=np.float32)
    for start in range(0, rows, CHUNK_ROWS):
        count = min(CHUNK_ROWS, rows - start)
        age = rng.normal(50, 10, count).astype(np.float32)
        site = rng.integers(0, len(SITES), count)
        values = np.empty((features, count), np.float32)
        for row, effect in zip(values, effects, strict=True):
            row[:] = (
                rng.standard_normal(count, dtype=np.float32) + effect[0] * (age - 50) / 10 + effect[1:][site]
            )
        yield age, site, values


def make(folder: Path, kind: str, rows: int, features: int) -> None:
    """Write the table, and beside an array its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import csv

    names = [f"f{index}" for index in range(features)]
    schema = pa.schema(
        [("age", pa.float32()), ("site", pa.string()), *((name, pa.float32()) for name in names)]
    )
    few = pa.schema([schema.field("age"), schema.field("site")])
    path = folder / f"table.{kind}"
    if kind == "npy":
        file = path.open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, features)}
        np.lib.format.write_array_header_1_0(file, header)
        writer = pq.ParquetWriter(folder / "metadata.parquet", few)
    elif kind == "csv":
        writer = csv.CSVWriter(path, schema)
    else:
        writer = pq.ParquetWriter(path, schema)
    for age, site, values in chunks(rows, features):
        metadata = [pa.array(age), pa.array(np.array(SITES, dtype=object)[site], pa.string())]
        if kind == "npy":
            file.write(np.ascontiguousarray(values.T).data)
            writer.write_table(pa.table(metadata, schema=few))
        else:
            writer.write_table(pa.table([*metadata, *map(pa.array, values)], schema=schema))
    writer.close()
    if kind == "npy":
        file.close()


# --------------------------------------------------------------------------------------------------------
# What is measured, in a process of its own
# --------------------------------------------------------------------------------------------------------


def copy(source: Path, out: Path, way: str) -> None:
    from mdnorm.design.files import open_table
    from mdnorm.files import atomic_path
    from mdnorm.tables.files import batch_writer, open_features, prefetched

    with atomic_path(out) as temporary:
        if source.suffix == ".npy":
            array = open_features(source)
            target = array.writer(temporary)
            for block in prefetched(array.blocks(2**16, ())):
                target.write(block)
            target.close()
            return
        table = open_table(source)
        features = [name for name in table.numeric() if name != "age"]
        if way == "as pyarrow":
            copy_parquet_as_pyarrow(table, temporary)
            return
        import pyarrow as pa

        kind = pa.float32() if source.suffix == ".parquet" else pa.float64()
        writer = batch_writer(table, temporary, dict.fromkeys(features, kind))
        for batch in prefetched(table.batches(table.names, 2**16, features)):
            writer.write(batch)
        writer.close()


def copy_parquet_as_pyarrow(table: object, out: Path) -> None:
    """Write with the defaults of pyarrow, in row groups as large as those that `residualize` writes."""
    from concurrent.futures import ThreadPoolExecutor

    import pyarrow as pa
    import pyarrow.parquet as pq

    from mdnorm.tables.files import prefetched

    with pq.ParquetWriter(out, table.schema) as writer, ThreadPoolExecutor(1) as pool:
        pending, writing = [], None
        for batch in prefetched(table.batches(table.names, 2**16)):
            pending.append(batch)
            if sum(part.num_rows for part in pending) >= 2**18:
                if writing is not None:
                    writing.result()
                writing = pool.submit(writer.write_table, pa.Table.from_batches(pending))
                pending = []
        if writing is not None:
            writing.result()
        if pending:
            writer.write_table(pa.Table.from_batches(pending))


def residualize(source: Path, out: Path) -> dict[str, float]:
    from mdnorm.tables.streaming import residualize_file

    metadata = source.with_name("metadata.parquet") if source.suffix == ".npy" else None
    begun = time.perf_counter()
    ends: dict[str, float] = {}

    def progress(stage: str, done: int, total: int | None) -> None:
        ends[stage] = time.perf_counter() - begun

    residualize_file(source, out, formula="age + C(site)", metadata=metadata, progress=progress)
    ends["all"] = time.perf_counter() - begun
    return ends


def check(out: Path, source: Path) -> float:
    """Return the largest correlation of a feature with age in the first rows of the result."""
    import pyarrow.parquet as pq

    if source.suffix != ".parquet":
        return float("nan")
    batch = next(pq.ParquetFile(out).iter_batches(2**16))
    age = batch.column("age").to_numpy()
    columns = [batch.column(name).to_numpy() for name in batch.schema.names if name not in ("age", "site")]
    return float(max(abs(np.corrcoef(age, column)[0, 1]) for column in columns))


def work(what: str, source: Path, out: Path) -> None:
    """Do one of the things and print its seconds and the peak of memory of this process."""
    begun = time.perf_counter()
    stages = residualize(source, out) if what == "residualize" else copy(source, out, what)
    seconds = time.perf_counter() - begun
    peak = peak_bytes() / MIB
    cpu = time.process_time()
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "cpu_seconds": cpu, "stages": stages}))


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: it begins at what the parent had.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured(what: str, source: Path, out: Path) -> dict[str, object]:
    command = [sys.executable, __file__, "--work", what, str(source), str(out)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result["bytes_written"] = out.stat().st_size
    if what == "residualize":
        result["largest_correlation"] = check(out, source)
    out.unlink()
    return result


def measure(folder: Path, kind: str, rows: int, features: int, repeats: int) -> dict[str, object]:
    make(folder, kind, rows, features)
    source, out = folder / f"table.{kind}", folder / f"out.{kind}"
    ways = ["copy", *(["as pyarrow"] if kind == "parquet" else []), "residualize"]
    runs: dict[str, list[dict[str, object]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(measured(way, source, out))
    size = source.stat().st_size
    for path in (source, folder / "metadata.parquet"):
        path.unlink(missing_ok=True)
    seconds = {way: statistics.median(float(run["seconds"]) for run in done) for way, done in runs.items()}
    fastest = min(value for way, value in seconds.items() if way != "residualize")
    peak = max(float(run["peak_mib"]) for run in runs["residualize"])
    ratio = fastest / seconds["residualize"]
    for way, value in seconds.items():
        print(
            f"{kind:8} {rows:>9} × {features}  {way:12} {value:8.1f} s  {size / value / MIB:7.0f} MiB/s  "
            f"peak {max(float(run['peak_mib']) for run in runs[way]):6.0f} MiB",
            flush=True,
        )
    print(f"{kind:8} speed relative to copying: {ratio:.2f}, peak memory {peak:.0f} MiB", flush=True)
    return {
        "format": kind,
        "rows": rows,
        "features": features,
        "bytes": size,
        "seconds": seconds,
        "ratio": ratio,
        "peak_mib": peak,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--csv-rows", type=int, default=500_000, help="CSV is some ten times slower to parse")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the tables are made, for a while")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        what, source, out = arguments.work
        work(what, Path(source), Path(out))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        # A table and one copy of it, and what the file system keeps for itself.
        needed = 2.5 * arguments.rows * arguments.features * 4
        free = shutil.disk_usage(folder).free
        if free < needed:
            parser.error(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: --folder")
        results = [
            measure(
                folder,
                kind,
                arguments.csv_rows if kind == "csv" else arguments.rows,
                arguments.features,
                arguments.repeats,
            )
            for kind in arguments.formats
        ]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()}
        arguments.json.write_text(json.dumps({"facts": facts, "results": results}, indent=2))


if __name__ == "__main__":
    main()
