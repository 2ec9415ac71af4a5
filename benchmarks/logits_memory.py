"""Memory and time of the logprobs of a model's tokens: all logits at once, and in chunks.

    python -m benchmarks.logits_memory [--json FILE] [--quick]

Needs only mintjax. From hidden states ``[B, T, 256]`` and an unembedding ``[256, 150,000]``, value
and gradient of the sum of the target tokens' logprobs are computed in a process for each way and
each number of tokens. Printed are the memory that XLA plans for intermediate values, the largest
resident memory of the process less that before the computation (both without arguments and
results that both ways have), and the median time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mintjax import losses

WIDTH, VOCABULARY, REPEATS = 256, 150_000, 3


def plain(hidden: Any, unembedding: Any, targets: Any) -> Any:
    """Holds all logits."""
    return losses.target_logprobs(hidden @ unembedding, targets).sum()


def fused(hidden: Any, unembedding: Any, targets: Any) -> Any:
    """Holds those of 64 positions."""
    return losses.fused_target_logprobs(hidden, unembedding, targets, chunk_size=64).sum()


WAYS: dict[str, Callable[..., Any]] = {"plain": plain, "fused": fused}


def measure(way: str, tokens: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Computes value and gradient one way; peak memory wants a process of its own."""
    hidden = jax.random.normal(jax.random.key(0), (2, tokens // 2, WIDTH))
    unembedding = jax.random.normal(jax.random.key(1), (WIDTH, vocabulary)) / WIDTH**0.5
    targets = jax.random.randint(jax.random.key(2), (2, tokens // 2), 0, vocabulary)
    step: Any = jax.jit(jax.value_and_grad(WAYS[way], argnums=(0, 1)))
    compiled = step.lower(hidden, unembedding, targets).compile()
    planned = compiled.memory_analysis().temp_size_in_bytes
    jax.block_until_ready((hidden, unembedding, targets))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: list[float] = []
    value: Any = 0.0
    slopes: Any = ()
    for _ in range(REPEATS):
        start = time.perf_counter()
        value, slopes = compiled(hidden, unembedding, targets)
        jax.block_until_ready(slopes)
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = sum(slope.nbytes for slope in slopes)
    return {
        "way": way,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "planned_mb": planned / 1e6,
        "resident_mb": max(0.0, (after - before) * 1024 - results) / 1e6,
        "seconds": statistics.median(seconds),
        "value": float(value),
        "gradient_norm": sum(float(jnp.vdot(slope, slope)) for slope in slopes) ** 0.5,
    }


def main() -> None:
    """Measures each way, in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    rows: list[dict[str, Any]] = []
    for tokens in (128,) if options.quick else (512, 1024, 2048):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.logits_memory", "--one", way, str(tokens)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout))
            row = rows[-1]
            print(
                f"{row['tokens']} tokens, {way}: {row['planned_mb']:.0f} MB planned, "
                f"{row['resident_mb']:.0f} MB resident, {row['seconds']:.1f} s",
                flush=True,
            )
        one, other = rows[-2:]
        assert abs(one["value"] - other["value"]) <= 1e-4 * abs(one["value"])
        assert abs(one["gradient_norm"] / other["gradient_norm"] - 1) <= 1e-4
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
