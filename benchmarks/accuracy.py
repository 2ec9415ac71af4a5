"""Rounding errors of the losses in float32, beside torch's.

    python -m benchmarks.accuracy [--json FILE]

Needs the ``bench`` extra. Every loss is computed in float32, by mintjax and by torch as its users
write it. The right answer is mintjax's in float64 from the same float32 inputs, which the tests
hold against other implementations to 1e-9; torch's own is not, because ``s * (1 - s)`` and
``1 - s`` lose their digits in float64 too.

Printed is the worst error of values and of gradients, in units in the last place (ulp) of the right
answer, ours and torch's. The inputs range over what a trainer may meet: differences of logprobs
from 1e-7 to 80 nats, margins of up to 10,000 nats, rows of 131,072 tokens.

The first line is the exponential alone. XLA's is off by up to 1.00 ulp on a CPU, torch's by 0.57,
and no loss that is one exponential can be better than it: ``importance_sampling``, ``ppo``,
``sapo``, ``dpo`` and ``apo_zero`` round worse than torch's by 0.02 to 0.43 ulp. A better one needs
``2**n`` exactly, for which JAX has operations on bits only (XLA's own ``exp2`` is right for 13 % of
the integers): one made of them was off by 0.82 ulp at most, and took 2.6 times as long (99 and
38 microseconds for 65,536 numbers, medians of 300, interleaved). With 2**n from
``lax.reduce_precision`` it took 4.2 times as long; with a polynomial near 0 and XLA's beyond, 2.9
times, with the same worst error as XLA's. Losses that are loops over rows are evaluated by NumPy,
whose float32 exponential is off by up to 2.4 ulp.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mintjax import Ragged, losses

COUNT = 100_000
ROW = 131_072


class Case(NamedTuple):
    """A loss twice: with mintjax and with torch.

    Args:
        ours: of arrays by name.
        theirs: the same formula, of torch and of tensors by name, as torch's users write it.
        inputs: which kind of inputs it takes.
        wrt: the input that it is differentiated by.
        terms: the sizes of the terms whose difference the loss is: an error is counted against the
            largest of them, because no float32 formula can do better than to round each.
    """

    ours: Callable[[dict[str, Any]], Any]
    theirs: Callable[[Any, dict[str, Any]], Any]
    inputs: str
    wrt: str
    terms: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None


def tokens(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logprobs whose differences are exact and of every size, and advantages."""
    size = 2.0 ** rng.uniform(-23, 6, COUNT)
    difference = np.where(rng.random(COUNT) < 0.5, size, -size)
    reference = -np.round(2.0 ** rng.uniform(-4, 3, COUNT) * 2**10) / 2**10 - 64
    difference = np.round(difference * 2**16) / 2**16
    made = {"lp": reference + difference, "q": reference, "a": rng.normal(size=COUNT)}
    return {name: value.astype(np.float32) for name, value in made.items()}


def pairs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Scores with margins from 1e-3 to 1e4 nats, whose differences are exact."""
    margin = np.round(2.0 ** rng.uniform(-10, 13.3, COUNT) * 2**10) / 2**10
    sign = np.where(rng.random(COUNT) < 0.5, 1, -1)
    high = -np.round(rng.gamma(1.0, 10.0, COUNT) * 2**10) / 2**10
    made = {
        "c": np.where(sign > 0, high, high - margin),
        "r": np.where(sign > 0, high - margin, high),
    }
    lengths = {"n_c": rng.integers(1, 400, COUNT), "n_r": rng.integers(1, 400, COUNT)}
    return {name: value.astype(np.float32) for name, value in {**made, **lengths}.items()}


def rows(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logprobs of rows of 127 to 129 and of 131,072 tokens, in one array."""
    return {"lp": -rng.gamma(1.0, 1.0, (4, ROW)).astype(np.float32)}


INPUTS = {"tokens": tokens, "pairs": pairs, "rows": rows}


def _ratio(torch: Any, t: dict[str, Any]) -> Any:
    return torch.exp(t["lp"] - t["q"])


def _odds(torch: Any, mean: Any) -> Any:
    return mean - torch.log(-torch.expm1(mean))


def _softplus(torch: Any, x: Any) -> Any:
    return -torch.nn.functional.logsigmoid(-x)


def _row_sums(t: dict[str, Any]) -> Any:
    return Ragged.from_rows(list(t["lp"])).sum()


CASES: dict[str, Case] = {
    "exp": Case(
        lambda t: jnp.exp(t["lp"] - t["q"]),
        lambda torch, t: _ratio(torch, t),
        "tokens",
        "lp",
    ),
    "importance_sampling": Case(
        lambda t: losses.importance_sampling(t["lp"], t["q"], t["a"]),
        lambda torch, t: -_ratio(torch, t) * t["a"],
        "tokens",
        "lp",
    ),
    "ppo": Case(
        lambda t: losses.ppo(t["lp"], t["q"], t["a"]),
        lambda torch, t: (
            -torch.min(_ratio(torch, t) * t["a"], torch.clamp(_ratio(torch, t), 0.8, 1.2) * t["a"])
        ),
        "tokens",
        "lp",
    ),
    "cispo": Case(
        lambda t: losses.cispo(t["lp"], t["q"], t["a"]),
        lambda torch, t: -torch.clamp(_ratio(torch, t), 0.8, 1.2).detach() * t["lp"] * t["a"],
        "tokens",
        "lp",
    ),
    "dro": Case(
        lambda t: losses.dro(t["lp"], t["q"], t["a"]),
        lambda torch, t: -(t["lp"] * t["a"] - 0.5 * 0.05 * (t["lp"] - t["q"]) ** 2),
        "tokens",
        "lp",
        lambda t: np.maximum(np.abs(t["lp"] * t["a"]), np.abs(t["a"])),
    ),
    "sapo": Case(
        lambda t: losses.sapo(t["lp"], t["q"], t["a"]),
        lambda torch, t: (
            -4 * torch.sigmoid(_tau(torch, t) * (_ratio(torch, t) - 1)) / _tau(torch, t) * t["a"]
        ),
        "tokens",
        "lp",
    ),
    "kl_k2": Case(
        lambda t: losses.kl_k2(t["lp"], t["q"]),
        lambda torch, t: 0.5 * (t["lp"] - t["q"]) ** 2,
        "tokens",
        "lp",
    ),
    "kl_k3": Case(
        lambda t: losses.kl_k3(t["lp"], t["q"]),
        lambda torch, t: torch.exp(t["q"] - t["lp"]) - 1 - (t["q"] - t["lp"]),
        "tokens",
        "lp",
    ),
    "unlikelihood": Case(
        lambda t: losses.unlikelihood(t["lp"]),
        lambda torch, t: -torch.log1p(-torch.exp(t["lp"])),
        "tokens",
        "lp",
    ),
    "bradley_terry": Case(
        lambda t: losses.bradley_terry(t["c"], t["r"]),
        lambda torch, t: -torch.nn.functional.logsigmoid(t["c"] - t["r"]),
        "pairs",
        "c",
    ),
    "dpo": Case(
        lambda t: losses.dpo(t["c"], t["r"], 0.0, 0.0, beta=0.125),
        lambda torch, t: -torch.nn.functional.logsigmoid(0.125 * (t["c"] - t["r"])),
        "pairs",
        "c",
    ),
    "ipo": Case(
        lambda t: losses.ipo(t["c"], t["r"], 0.0, 0.0, beta=0.125),
        lambda torch, t: (t["c"] - t["r"] - 4.0) ** 2,
        "pairs",
        "c",
    ),
    "apo_zero": Case(
        lambda t: losses.apo_zero(t["c"], t["r"], 0.0, 0.0, beta=0.125),
        lambda torch, t: 1 - torch.sigmoid(0.125 * t["c"]) + torch.sigmoid(0.125 * t["r"]),
        "pairs",
        "c",
    ),
    "kto": Case(
        lambda t: losses.kto(t["c"], t["r"], 1, 0.0, beta=0.125),
        lambda torch, t: 1 - torch.sigmoid(0.125 * (t["c"] - t["r"])),
        "pairs",
        "c",
    ),
    "discopop": Case(
        lambda t: losses.discopop(t["c"], t["r"], 0.0, 0.0, beta=0.0078125, temperature=0.0625),
        lambda torch, t: _discopop(torch, 0.0078125 * (t["c"] - t["r"])),
        "pairs",
        "c",
    ),
    "orpo": Case(
        lambda t: losses.orpo(t["c"], t["r"], t["n_c"], t["n_r"]),
        lambda torch, t: (
            -t["c"] / t["n_c"]
            + 0.1
            * _softplus(torch, _odds(torch, t["r"] / t["n_r"]) - _odds(torch, t["c"] / t["n_c"]))
        ),
        "pairs",
        "c",
        lambda t: np.abs(t["c"] / t["n_c"]) + 0.1 * np.abs(t["r"] / t["n_r"]),
    ),
    "token_mean": Case(
        lambda t: jnp.stack([losses.token_mean(row) for row in t["lp"]]),
        lambda torch, t: t["lp"].mean(1),
        "rows",
        "lp",
    ),
    "row sums": Case(_row_sums, lambda torch, t: t["lp"].sum(1), "rows", "lp"),
}


def _tau(torch: Any, t: dict[str, Any]) -> Any:
    return torch.where(t["a"] > 0, torch.ones_like(t["a"]), torch.full_like(t["a"], 1.05))


def _discopop(torch: Any, z: Any) -> Any:
    gate = torch.sigmoid(z / 0.0625)
    return -(1 - gate) * torch.nn.functional.logsigmoid(z) + gate * torch.exp(-z)


def with_mintjax(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Values and gradients in the dtype of the inputs."""

    @jax.jit
    def both(x: Any, others: dict[str, Any]) -> Any:
        value, back = jax.vjp(lambda y: case.ours({**others, case.wrt: y}), x)
        return value, back(jnp.ones_like(value))[0]

    return [np.asarray(x) for x in both(inputs[case.wrt], inputs)]


def with_torch(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Values and gradients by torch, in the dtype of the inputs."""
    import torch

    given = {name: torch.tensor(value) for name, value in inputs.items()}
    given[case.wrt].requires_grad_(True)
    value = case.theirs(torch, given)
    value.sum().backward()
    return [value.detach().numpy(), given[case.wrt].grad.numpy()]


def worst(
    found: np.ndarray, right: np.ndarray, terms: np.ndarray | None = None
) -> tuple[float, float]:
    """The largest error and its 99th percentile, in ulp of the right answer, or of its terms.

    Numbers below 1e-30 count as 0, because XLA flushes what is subnormal to 0, and what is computed
    from it is wrong in every digit, to no effect.
    """
    smallest = 1e-30
    size = np.abs(right) if terms is None else np.maximum(np.abs(right), terms)
    ulp = np.spacing(np.maximum(size, smallest).astype(np.float32)).astype(np.float64)
    known = np.isfinite(right) & (np.abs(right) < np.finfo(np.float32).max)
    error = np.abs(found[known].astype(np.float64) - right[known]) / ulp[known]
    error = np.where(np.isfinite(error), error, np.inf)
    error = np.maximum(error - smallest / ulp[known], 0)
    return float(error.max(initial=0)), float(np.quantile(error, 0.99))


def measure(name: str, *, against_torch: bool = True) -> dict[str, Any]:
    """The worst errors of a loss and its gradient, ours and torch's.

    Args:
        name: one of :data:`CASES`.
        against_torch: whether torch is there to be measured too.
    """
    case = CASES[name]
    inputs = INPUTS[case.inputs](np.random.default_rng(7))
    terms = None if case.terms is None else case.terms(inputs)
    with jax.enable_x64(True):
        right = with_mintjax(case, {name: v.astype(np.float64) for name, v in inputs.items()})
    answers = {"ours": with_mintjax(case, inputs)}
    if against_torch:
        answers["torch"] = with_torch(case, inputs)
    row: dict[str, Any] = {"loss": name}
    for who, (value, grad) in answers.items():
        row[f"{who}_value"], row[f"{who}_value_99"] = worst(value, right[0], terms)
        row[f"{who}_gradient"], row[f"{who}_gradient_99"] = worst(grad, right[1])
    return row


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    print(f"{'worst error in ulp of':22s} {'value':>10s} {'torch':>10s} {'gradient':>10s} torch")
    found = []
    for name in CASES:
        row = measure(name)
        found.append(row)
        print(
            f"{name:22s} {row['ours_value']:10.1f} {row['torch_value']:10.1f} "
            f"{row['ours_gradient']:10.1f} {row['torch_gradient']:10.1f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
