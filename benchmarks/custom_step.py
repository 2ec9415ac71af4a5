"""Measures the parts of a custom step, and the time that one request instead of two saves.

    python -m benchmarks.custom_step [--quick] [--json FILE] [--base-model NAME]

Needs the ``bench`` extra. The embedded trainer runs in a process of its own; every step has a fresh
batch, and its optimizer step is submitted behind it at once. Measured in turn are

- ``bradley_terry``, which takes two passes;
- ``reinforce``, whose gradient does not depend on the logprobs: in two passes, and in one;
- ``ppo``, a loss of the trainer's own: in two passes, and by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mintjax import ServiceClient, objectives
from mintjax.bench import StepTimes, Synthetic, time_steps


def reinforce(data: Any, logprobs: Any) -> Any:
    """Advantages times logprobs: linear in these, so that the gradient is known without them."""
    return -logprobs.dot(data["advantages"]).sum(), {}


CASES = {
    ("bradley_terry", True): objectives.bradley_terry(),
    ("reinforce", False): reinforce,
    ("reinforce", True): reinforce,
    ("ppo", False): objectives.ppo(),
    ("ppo", True): objectives.ppo(),
}
COLUMNS = ("weights", "advantages", "logprobs")
PARTS = ("forward", "client", "backward", "optimizer")


@contextmanager
def trainer() -> Generator[str]:
    """The embedded trainer in a process of its own; yields its address."""
    command = [sys.executable, "-m", "mintjax", "serve", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


def measure(
    base_url: str, base_model: str, datums: int, lengths: tuple[int, int], warm_up: int, steps: int
) -> list[dict[str, Any]]:
    """Medians of every case, each taking one step in turn."""
    source = Synthetic(COLUMNS, lengths)
    taken: dict[tuple[str, bool], list[StepTimes]] = {case: [] for case in CASES}
    with ServiceClient(base_url, "tml-embedded") as service:
        model = service.create_lora_training_client(base_model, rank=32, seed=0)
        for step in range(warm_up + steps):
            batch = source.batch(datums).data
            for case, objective in CASES.items():
                times = time_steps(model, objective, [batch], warm_up=0, single_pass=case[1])
                taken[case].append(times)
            print(f"round {step + 1} of {warm_up + steps}", file=sys.stderr, flush=True)
    return [
        {
            "objective": name,
            "route": taken[name, single_pass][-1].route,
            "base_model": base_model,
            "datums": datums,
            "lengths": lengths,
            **{
                f"{part}_ms": 1e3 * median(taken[name, single_pass][warm_up:], f"{part}_seconds")
                for part in PARTS
            },
            "step_ms": 1e3 * median(taken[name, single_pass][warm_up:], "seconds"),
            "client_share": median(taken[name, single_pass][warm_up:], "client_share"),
        }
        for name, single_pass in CASES
    ]


def median(times: list[StepTimes], field: str) -> float:
    return statistics.median(getattr(each, field) for each in times)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer, smaller steps")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--base-model", default="mintjax/tiny", help="of the embedded trainer")
    options = parser.parse_args()
    datums, lengths = (8, (50, 64)) if options.quick else (32, (50, 256))
    warm_up, steps = (1, 2) if options.quick else (4, 11)
    with trainer() as base_url:
        rows = measure(base_url, options.base_model, datums, lengths, warm_up, steps)
    for row in rows:
        parts = ", ".join(f"{part} {row[f'{part}_ms']:.1f}" for part in PARTS)
        print(
            f"{row['objective']:14s} {row['route']:9s} {row['step_ms']:8.1f} ms: {parts}; "
            f"{row['client_share']:.2%} on the client"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
