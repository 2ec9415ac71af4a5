"""Measures encoding and decoding against the official client's own serialisers.

    python -m benchmarks.transport [--quick] [--sdk-038 PYTHON] [--json FILE]

Needs the ``bench`` extra. ``tinker==0.38.0`` needs an environment of its own, whose Python is
passed; without it, it is left out::

    python -m venv sdk038 && sdk038/bin/pip install tinker==0.38.0 torch

A request or an answer of 256 datums of 2,048 tokens. In one run, in turn, each implementation in a
process of its own, it times

- ``encode``: a ``forward_backward`` request with targets and weights, from datums to the
  bytes of the body;
- ``decode``: the answer of a forward pass, from the bytes to one array of logprobs per datum;
- ``custom_step``: decode, the pairwise loss and its gradient, and encode.

``sdk-0.22`` speaks JSON, ``sdk-0.38`` protocol buffers; ``copy`` is NumPy copying the numbers once.
All get the same numbers, and what comes out is compared. The memory is that of the process, beyond
what it had before; it includes the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import mintjax

OPERATIONS = ("encode", "decode", "custom_step")
BARS = [  # operation, ours, theirs, times as fast
    ("encode", "mintjax-json", "sdk-0.22", 8.0),
    ("decode", "mintjax-json", "sdk-0.22", 4.0),
    ("custom_step", "mintjax-json", "sdk-0.22", 10.0),
    ("encode", "mintjax-protobuf", "sdk-0.38", 3.0),
    ("decode", "mintjax-protobuf", "sdk-0.38", 3.0),
]
MOST_MEMORY = 3.0  # times the body
ABOVE_A_COPY = 1.2


class Worker:
    """An implementation in a process of its own, which does one thing at a time.

    Args:
        name: what it is called in the results.
        python: that has what it needs.
        implementation: as the worker knows it.
        size: of the batch, datums and tokens.
    """

    def __init__(self, name: str, python: str, implementation: str, size: tuple[int, int]) -> None:
        self.name = name
        environment = dict(os.environ)
        if implementation.startswith("mintjax"):
            environment["PYTHONPATH"] = str(Path(mintjax.__file__).parents[1])
        else:
            environment.pop("PYTHONPATH", None)
        script = Path(__file__).with_name("transport_worker.py")
        self._process = subprocess.Popen(
            [python, str(script), implementation, *map(str, size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.operations: list[str] = self._read()

    def ask(self, what: str, operation: str) -> dict[str, Any]:
        """``time`` or ``memory`` of an operation."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {operation}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} has ended, see above")
        return json.loads(line)


def measure(workers: list[Worker], rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds, each implementation in turn in each; the first round warms up."""
    rows: list[dict[str, Any]] = []
    for operation in OPERATIONS:
        able = [worker for worker in workers if operation in worker.operations]
        replies: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in able}
        for turn in range(rounds + 1):
            for i in range(len(able)):
                worker = able[(turn + i) % len(able)]
                replies[worker.name].append(worker.ask("time", operation))
        check(operation, {name: answers[0]["sum"] for name, answers in replies.items()})
        for worker in able:
            counted = replies[worker.name][1:]
            rows.append(
                {
                    "operation": operation,
                    "implementation": worker.name,
                    "median_ms": 1e3 * statistics.median(reply["seconds"] for reply in counted),
                    "cpu_ms": 1e3 * statistics.median(reply["cpu"] for reply in counted),
                    "bytes": replies[worker.name][0]["bytes"],
                    "peak_bytes": worker.ask("memory", operation)["peak"],
                }
            )
        show(rows[-len(able) :])
    return rows


def check(operation: str, sums: dict[str, float]) -> None:
    """Hold what came out against each other."""
    for name, value in sums.items():
        if not math.isclose(value, next(iter(sums.values())), rel_tol=1e-4):
            raise SystemExit(f"{operation}: {name} has other numbers than the rest: {sums}")


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each implementation."""
    by = {row["implementation"]: row["median_ms"] for row in rows}
    for row in rows:
        name, size = row["implementation"], row["bytes"]
        line = f"{row['operation']:12s} {name:17s} {row['median_ms']:9.2f} ms"
        line += f" (processor {row['cpu_ms']:8.2f}) {size / 1e6:7.2f} MB"
        line += f"   peak {row['peak_bytes'] / size:5.2f} x body"
        ratios = [
            f"{by[name] / by[ours]:6.1f} x {ours}"
            for ours in ("mintjax-json", "mintjax-protobuf")
            if name.startswith("sdk") and ours in by
        ]
        print("   ".join([line, *ratios]), flush=True)


def judge(rows: list[dict[str, Any]]) -> None:
    """Print which bars are met."""
    at = {(row["operation"], row["implementation"]): row for row in rows}
    print()
    for operation, ours, theirs, bar in BARS:
        if (operation, ours) not in at or (operation, theirs) not in at:
            print(f"NOT MEASURED: {operation} by {ours} against {theirs}")
            continue
        mine = at[operation, ours]["median_ms"]
        ratio = at[operation, theirs]["median_ms"] / mine
        met, also = ratio >= bar, ""
        if ours == "mintjax-protobuf":
            above = mine / at[operation, "copy"]["median_ms"]
            met |= above <= ABOVE_A_COPY
            also = f", or at most {ABOVE_A_COPY} times a copy: {above:.1f}"
        verdict = "met" if met else "MISSED"
        speed = f"{ratio:.1f} times as fast as {theirs}"
        print(f"{verdict}: {operation} by {ours} {speed} (bar {bar:g}{also})")
    for row in rows:
        if row["implementation"].startswith("mintjax") and row["operation"] != "custom_step":
            times = row["peak_bytes"] / row["bytes"]
            verdict = "met" if times <= MOST_MEMORY else "MISSED"
            print(
                f"{verdict}: {row['operation']} by {row['implementation']} takes {times:.2f} times "
                f"the body in memory (bar {MOST_MEMORY:g})"
            )


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under a minute")
    parser.add_argument("--sdk-022", default=sys.executable, help="Python that has tinker 0.22.0")
    parser.add_argument("--sdk-038", help="Python that has tinker 0.38.0")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--datums", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each datum")
    options = parser.parse_args()
    size = (options.datums, options.length)
    wanted = [
        ("mintjax-json", sys.executable, "mintjax-json"),
        ("mintjax-protobuf", sys.executable, "mintjax-protobuf"),
        ("sdk-0.22", options.sdk_022, "sdk"),
        ("copy", sys.executable, "copy"),
    ]
    if options.sdk_038:
        wanted.append(("sdk-0.38", options.sdk_038, "sdk"))
    else:
        print("SKIPPED: sdk-0.38; pass --sdk-038 PYTHON of an environment with tinker==0.38.0")
    workers = [Worker(*each, size) for each in wanted]
    try:
        rows = measure(workers, 5 if options.quick else 20)
    finally:
        for worker in workers:
            worker.close()
    judge(rows)
    if options.json:
        kept = [row for row in rows if row["implementation"] != "copy"]
        options.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
