"""Measures the client-side gradient against torch and against NumPy by hand.

    python -m benchmarks.gradient_cost [--quick] [--json FILE]

Needs the ``bench`` extra. Every step has fresh lengths. In one run, interleaved, it times

- ``mintjax``: ``value_and_logprob_grads`` from and to lists of NumPy arrays;
- ``list``: the same with the loss as a loop over a list (``benchmarks.list_forms``);
- ``sdk``: torch as the official SDK does it: ``torch.tensor(list)`` for each row of logprobs, a
  loop over rows, ``loss.backward()`` to a list of leaves;
- ``torch``: the same with ``torch.from_numpy``;
- ``numpy``: value and gradient written by hand on concatenated rows, as the floor.

Then, for 64 datums of the official SDK's, the callback of its ``forward_backward_custom``: ours
(``mintjax.interop.sdk_loss``) against the loss in torch, both with ``backward()`` and without the
SDK's own conversions.

All get the same arrays, in an order drawn anew each step, and their gradients are compared
before anything is timed. JAX computes in the thread that asks, and in that one only
(``jax_cpu_enable_async_dispatch`` off, ``NPROC=1``), as README recommends on a CPU; ``--threads``
leaves both as JAX has them: it hands each computation to another thread, and that one splits it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import mintjax
from benchmarks.list_forms import LISTS
from mintjax import Datum, ModelInput, bench, interop, objectives

BETA = 0.1
OBJECTIVES = {
    "bradley_terry": objectives.bradley_terry(),
    "dpo": objectives.dpo(beta=BETA),
    "ppo": objectives.ppo(),
    "cispo": objectives.cispo(),
    "dro": objectives.dro(),
}
PAIRED = ("bradley_terry", "dpo")
COUNTERPARTS = {loss: bench.counterpart(objective) for loss, objective in OBJECTIVES.items()}
TORCH = {loss: found[0] for loss, found in COUNTERPARTS.items() if found}
COLUMNS = {loss: found[1] for loss, found in COUNTERPARTS.items() if found}
LOW, HIGH, DRO_BETA = 0.8, 1.2, 0.05


class Batch:
    """One step's arrays, in the forms that the four start from."""

    def __init__(self, rng: np.random.Generator, lengths: np.ndarray, loss: str) -> None:
        self.rows = [-rng.exponential(size=n).astype(np.float32) for n in lengths]
        self.lists = [row.tolist() for row in self.rows]  # what the SDK's JSON gives
        self.columns = {
            name: [self.column(rng, name, r) for r in self.rows] for name in COLUMNS[loss]
        }
        self.data = [
            Datum(
                ModelInput.from_ints(np.zeros(n, int)),
                {name: column[i] for name, column in self.columns.items()},
            )
            for i, n in enumerate(lengths)
        ]

    @staticmethod
    def column(rng: np.random.Generator, name: str, row: np.ndarray) -> np.ndarray:
        if name == "weights":
            # Small, so that the sigmoid of a margin of sums is not all zeros and ones.
            return ((rng.random(row.size) < 0.7) / row.size).astype(np.float32)
        if name == "advantages":
            return rng.standard_normal(row.size).astype(np.float32)
        return row + 0.2 * rng.standard_normal(row.size).astype(np.float32)


def with_mintjax(loss: str, batch: Batch) -> list[Any]:
    return mintjax.value_and_logprob_grads(OBJECTIVES[loss], batch.data, batch.rows).grads


def with_list(loss: str, batch: Batch) -> list[Any]:
    return mintjax.value_and_logprob_grads(LISTS[loss], batch.data, batch.rows).grads


def with_torch(loss: str, batch: Batch, leaves: list[torch.Tensor]) -> list[Any]:
    columns = {name: [torch.from_numpy(x) for x in c] for name, c in batch.columns.items()}
    TORCH[loss](leaves, **columns).backward()
    return [leaf.grad for leaf in leaves]


def with_sdk(loss: str, batch: Batch) -> list[Any]:
    leaves = [torch.tensor(row).clone().detach().requires_grad_(True) for row in batch.lists]
    return with_torch(loss, batch, leaves)


def with_torch_from_numpy(loss: str, batch: Batch) -> list[Any]:
    leaves = [torch.from_numpy(row).requires_grad_(True) for row in batch.rows]
    return [grad.numpy() for grad in with_torch(loss, batch, leaves)]


def with_numpy(loss: str, batch: Batch) -> list[Any]:
    starts = np.cumsum([0, *(row.size for row in batch.rows)])
    lp = np.concatenate(batch.rows)
    columns = {name: np.concatenate(column) for name, column in batch.columns.items()}
    _, grad = (numpy_pairs if loss in PAIRED else numpy_tokens)(loss, lp, starts, **columns)
    return np.split(grad, starts[1:-1])


def numpy_pairs(
    loss: str, lp: np.ndarray, starts: np.ndarray, weights: np.ndarray, ref_logprobs: Any = None
) -> tuple[float, np.ndarray]:
    scale = 1.0 if ref_logprobs is None else BETA
    shifted = lp if ref_logprobs is None else lp - ref_logprobs
    scores = scale * np.add.reduceat(shifted * weights, starts[:-1])
    margins = scores[::2] - scores[1::2]
    slope = -scale / (1 + np.exp(margins)) / margins.size
    slopes = np.stack([slope, -slope], 1).ravel().astype(np.float32)
    return float(np.logaddexp(0, -margins).mean()), np.repeat(slopes, np.diff(starts)) * weights


def numpy_tokens(
    loss: str, lp: np.ndarray, starts: np.ndarray, logprobs: np.ndarray, advantages: np.ndarray
) -> tuple[float, np.ndarray]:
    if loss == "dro":
        d = lp - logprobs
        return float((0.5 * DRO_BETA * d * d - lp * advantages).sum()), DRO_BETA * d - advantages
    ratio = np.exp(lp - logprobs)
    clipped = np.clip(ratio, LOW, HIGH)
    if loss == "cispo":
        grad = -clipped * advantages
        return float((grad * lp).sum()), grad
    plain, bounded = ratio * advantages, clipped * advantages
    return -float(np.minimum(plain, bounded).sum()), np.where(plain <= bounded, -plain, 0)


IMPLEMENTATIONS = {
    "mintjax": with_mintjax,
    "list": with_list,
    "sdk": with_sdk,
    "torch": with_torch_from_numpy,
    "numpy": with_numpy,
}


def uniform(rng: np.random.Generator, datums: int) -> np.ndarray:
    return rng.integers(50, 2049, datums)


def long_tail(rng: np.random.Generator, datums: int) -> np.ndarray:
    lengths = rng.integers(50, 1001, datums)
    lengths[rng.integers(datums)] = 32768
    return lengths


CASES = {"uniform": uniform, "long_tail": long_tail}


def measure(
    loss: str, datums: int, case: str, warm_up: int, steps: int, names: list[str]
) -> list[dict[str, Any]]:
    """Medians over ``steps``, each implementation in turn on each step's batch."""
    rng = np.random.default_rng(datums)

    def batches() -> Iterator[Batch]:
        for step in range(warm_up + steps):
            batch = Batch(rng, CASES[case](rng, datums), loss)
            if step == 0:
                check(loss, batch, names)
            yield batch

    compiled = mintjax.gradients.stats().compilations
    timings = bench.interleaved(
        {name: partial(IMPLEMENTATIONS[name], loss) for name in names}, batches(), warm_up=warm_up
    )
    compiled = mintjax.gradients.stats().compilations - compiled
    return [
        {
            "loss": loss,
            "datums": datums,
            "case": case,
            "implementation": name,
            "median_ms": 1e3 * timing.quantile(0.5),
            "compilations": compiled if name == "mintjax" else 0,
        }
        for name, timing in timings.items()
    ]


def measure_callbacks(loss: str, datums: int, warm_up: int, steps: int) -> list[dict[str, Any]]:
    """Measures the callback that the official SDK is given, ours and the one in torch."""
    from tinker import types

    rng, ours = np.random.default_rng(datums), interop.sdk_loss(OBJECTIVES[loss])

    def theirs(data: list[Any], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        names = COLUMNS[loss]
        columns = {name: [d.loss_fn_inputs[name].to_torch() for d in data] for name in names}
        return TORCH[loss](leaves, **columns), {}

    def steps_of_the_sdk() -> Iterator[Any]:
        for step in range(warm_up + steps):
            batch = Batch(rng, uniform(rng, datums), loss)
            data = [
                types.Datum(
                    model_input=types.ModelInput.from_ints([0] * len(row)),
                    loss_fn_inputs={
                        name: types.TensorData.from_numpy(column[i])
                        for name, column in batch.columns.items()
                    },
                )
                for i, row in enumerate(batch.rows)
            ]
            # Each gets leaves of its own, because a leaf's gradient adds up.
            leaves = {
                name: [torch.tensor(row, requires_grad=True) for row in batch.rows]
                for name in ("sdk_loss", "torch_callback")
            }
            yield data, leaves
            if step == 0:
                both = [torch.cat([leaf.grad for leaf in one]).numpy() for one in leaves.values()]
                scale = np.abs(both[0]).max()
                np.testing.assert_allclose(both[1], both[0], rtol=2e-3, atol=2e-4 * scale)

    def run(name: str, callback: Any, step: Any) -> None:
        data, leaves = step
        callback(data, leaves[name])[0].backward()

    timings = bench.interleaved(
        {
            "sdk_loss": partial(run, "sdk_loss", ours),
            "torch_callback": partial(run, "torch_callback", theirs),
        },
        steps_of_the_sdk(),
        warm_up=warm_up,
    )
    return [
        {
            "loss": loss,
            "datums": datums,
            "case": "callback",
            "implementation": name,
            "median_ms": 1e3 * timing.quantile(0.5),
            "compilations": 0,
        }
        for name, timing in timings.items()
    ]


def check(loss: str, batch: Batch, names: list[str]) -> None:
    """Holds the gradients against each other."""
    results = [
        np.concatenate([np.asarray(g) for g in IMPLEMENTATIONS[n](loss, batch)]) for n in names
    ]
    for name, result in zip(names[1:], results[1:], strict=True):
        scale = np.abs(results[0]).max()
        np.testing.assert_allclose(result, results[0], rtol=2e-3, atol=2e-4 * scale, err_msg=name)


def count_compilations(steps: int = 200) -> list[dict[str, Any]]:
    """Programs compiled, and seconds in all, for random lengths.

    A function of a user's at one B, one of ours with B random, and its loop with B random.
    """

    def users_own(data: Any, logprobs: Any) -> Any:
        scores = logprobs.dot(data["weights"])
        return -((scores[0::2] - scores[1::2]) ** 2).mean(), {}

    found = []
    random_sizes = "B random in 48..64, 200 steps"
    for case, name, objective, low, high in (
        ("a user's function, 200 steps", "mintjax", users_own, 64, 64),
        (random_sizes, "mintjax", objectives.bradley_terry(), 48, 64),
        (random_sizes, "list", LISTS["bradley_terry"], 48, 64),
    ):
        rng = np.random.default_rng(1)
        before = mintjax.gradients.stats().compilations
        seconds = []
        for _ in range(steps):
            batch = Batch(
                rng, uniform(rng, 2 * int(rng.integers(low // 2, high // 2 + 1))), "bradley_terry"
            )
            start = time.perf_counter()
            mintjax.value_and_logprob_grads(objective, batch.data, batch.rows)
            seconds.append(time.perf_counter() - start)
        found.append(
            {
                "loss": "bradley_terry",
                "datums": high,
                "case": case,
                "implementation": name,
                "median_ms": 1e3 * statistics.median(seconds),
                "total_s": sum(seconds),
                "compilations": mintjax.gradients.stats().compilations - before,
            }
        )
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each case, with the ratios of the others' medians to mintjax's."""
    by = {row["implementation"]: row for row in rows}
    ours = by["mintjax"]
    line = f"{ours['loss']:14s} B={ours['datums']:<5d} {ours['case']:10s}"
    line += f" {ours['median_ms']:8.3f} ms {ours['compilations']:3d} compiled"
    for name in ("list", "sdk", "torch", "numpy"):
        if name in by:
            theirs = by[name]["median_ms"]
            line += f"   {name} {theirs:8.2f} ms, {theirs / ours['median_ms']:5.1f}x"
    print(line, flush=True)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps and sizes: under a minute"
    )
    parser.add_argument(
        "--threads", action="store_true", help="let JAX use the threads that it uses by itself"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if not options.threads:
        os.environ["NPROC"] = "1"  # before JAX's first computation
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    warm_up, steps = (5, 10) if options.quick else (5, 20)
    sizes = (8, 64, 256) if options.quick else (8, 64, 256, 1024)
    rows: list[dict[str, Any]] = []
    names = list(IMPLEMENTATIONS)
    for loss in OBJECTIVES:
        for datums in sizes:
            rows += measure(loss, datums, "uniform", warm_up, steps, names)
            show(rows[-len(names) :])
        rows += measure(loss, 64, "long_tail", warm_up, steps, names)
        show(rows[-len(names) :])
        rows += measure_callbacks(loss, 64, warm_up, steps)
        ours, theirs = (row["median_ms"] for row in rows[-2:])
        print(
            f"{loss:14s} callback of the SDK, B=64: {ours:.3f} ms, torch {theirs:.3f} ms, "
            f"{theirs / ours:.1f}x",
            flush=True,
        )
    if not options.quick:
        for datums in (64, 4096):
            rows += measure("ppo", datums, "uniform", 2, 5, ["mintjax"])
            show(rows[-1:])
        first, last = rows[-2:]
        flat = (last["median_ms"] / 4096) / (first["median_ms"] / 64)
        print(f"cost per token at B=4096 over that at B=64: {flat:.2f}")
        for row in count_compilations():
            rows.append(row)
            print(
                f"{row['case']}, {row['implementation']}: {row['compilations']} compilations, "
                f"{row['total_s']:.1f} s in all"
            )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
