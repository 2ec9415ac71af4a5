"""Compute the golden values of the losses with torch, into golden.npz beside this file.

    pip install 'mintjax[bench]'
    python tests/losses/make_golden.py

The formulas are written here as their papers and trainers write them. Inputs are float32 numbers
whose differences are exact; torch computes in float64 and the results are rounded to float32, so
that what is held against mintjax is the right answer and not one float32 against another. Where
torch in float32 says NaN, ``nan_<loss>_...`` marks the token: those are the rows where mintjax has
the true limit instead.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

TOKENS = 2400
HERE = pathlib.Path(__file__).parent


def exact(values: Any) -> np.ndarray:
    """Round to multiples of 2**-14, so that differences below 512 are exact in float32."""
    return (np.round(np.asarray(values, np.float64) * 2**14) / 2**14).astype(np.float32)


def token_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random tokens, then every pairing of an extreme log-ratio with a sign and a threshold."""
    infinity = np.inf
    corners = [
        0.0,
        1.0,
        -1.0,
        85.0,
        100.0,
        120.0,
        300.0,
        -85.0,
        -120.0,
        -300.0,
        infinity,
        -infinity,
    ]
    rows = []
    for log_ratio in corners:
        for advantage in (1.0, -1.0, 0.0, 2.5, -0.3, 1e-3):
            for low, high in ((0.8, 1.2), (1.0, 1.2), (0.8, 1.0), (0.0, 4.0), (0.0, infinity)):
                rows.append((log_ratio, advantage, low, high))
    corner = np.array(rows)
    plain = TOKENS - len(rows)
    log_ratio = np.concatenate([exact(rng.normal(0, 0.3, plain)), corner[:, 0]])
    target = exact(-rng.gamma(1.0, 2.0, TOKENS)).astype(np.float64)
    with np.errstate(invalid="ignore"):
        sampling = np.where(np.isfinite(log_ratio), target - log_ratio, target)
    target = np.where(log_ratio == -infinity, -infinity, target)  # a token that is forbidden now
    sampling = np.where(log_ratio == infinity, -infinity, sampling)  # one that was, when sampled
    low = np.concatenate([np.full(plain, 0.8), corner[:, 2]])
    high = np.concatenate([np.full(plain, 1.2), corner[:, 3]])
    advantages = np.concatenate([rng.normal(0, 1, plain), corner[:, 1]])
    mask = rng.random(TOKENS) < 0.9
    mask[plain:] = True
    for i, poison in enumerate((np.nan, infinity, -infinity)):  # what a mask must hide
        target[i * 20 : i * 20 + 20], mask[i * 20 : i * 20 + 20] = poison, False
        sampling[i * 20 + 10 : i * 20 + 15] = poison
        advantages[i * 20 + 15 : i * 20 + 20] = poison
    named = {"target": target, "sampling": sampling, "advantages": advantages, "low": low}
    return {**{k: v.astype(np.float32) for k, v in (named | {"high": high}).items()}, "mask": mask}


def pair_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Scores of pairs, the last hundred of them far apart or tied."""
    lengths = {name: rng.integers(1, 400, TOKENS).astype(np.float32) for name in ("n_c", "n_r")}
    scores = {
        "c": exact(-rng.gamma(1, 0.5, TOKENS) * lengths["n_c"] - 2**-6),
        "r": exact(-rng.gamma(1, 0.5, TOKENS) * lengths["n_r"] - 2**-6),
        "ref_c": exact(-rng.gamma(1, 50.0, TOKENS)),
        "ref_r": exact(-rng.gamma(1, 50.0, TOKENS)),
    }
    scores["r"][-50:], lengths["n_r"][-50:] = scores["c"][-50:], lengths["n_c"][-50:]
    scores["ref_r"][-50:] = scores["ref_c"][-50:]
    margins = np.repeat([400.0, -400.0, 80.0, -80.0, 20.0], 10)
    low = np.minimum(scores["c"], scores["r"])[-100:-50] - np.abs(margins)
    high = low + np.abs(margins)
    scores["c"][-100:-50] = exact(np.where(margins > 0, high, low))
    scores["r"][-100:-50] = exact(np.where(margins > 0, low, high))
    return {**scores, **lengths, "good": rng.random(TOKENS) < 0.5}


def candidate_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logprobs over K = 4 candidates, some impossible for student or teacher."""
    shape = (TOKENS // 4, 4)
    logits = rng.normal(0, 2, (2, *shape))
    student, teacher = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) - 0.1
    teacher[:20, 0] = -np.inf
    student[20:40, 1] = -np.inf
    student[40:50, 2] = teacher[40:50, 2] = -np.inf
    outcomes = np.eye(4)[rng.integers(0, 4, shape[0])]
    named = {"student": student, "teacher": teacher, "outcomes": outcomes}
    return {name: value.astype(np.float32) for name, value in named.items()}


def clipped(ratio: Any, t: dict[str, Any]) -> Any:
    """``torch.clamp`` with a bound for each token."""
    return torch.clamp(ratio, t["low"], t["high"])


def ppo(t: dict[str, Any]) -> Any:
    ratio = torch.exp(t["target"] - t["sampling"])
    return -torch.min(ratio * t["advantages"], clipped(ratio, t) * t["advantages"])


def dual_clip(t: dict[str, Any]) -> Any:
    surrogate, floor = -ppo(t), 3.0 * t["advantages"]
    return -torch.where(t["advantages"] < 0, torch.max(surrogate, floor), surrogate)


def cispo(t: dict[str, Any]) -> Any:
    ratio = torch.exp(t["target"] - t["sampling"])
    return -clipped(ratio, t).detach() * t["target"] * t["advantages"]


def truncated(t: dict[str, Any]) -> Any:
    ratio = torch.exp(t["target"] - t["sampling"])
    return -torch.clamp(ratio, max=2.0).detach() * t["target"] * t["advantages"]


def dppo(t: dict[str, Any]) -> Any:
    ratio = torch.exp(t["target"] - t["sampling"])
    shift = torch.exp(t["target"]) - torch.exp(t["sampling"])
    kept = torch.where(t["advantages"] > 0, shift <= 0.15, shift >= -0.15).detach()
    return -(kept * ratio * t["advantages"])


def gspo(t: dict[str, Any]) -> Any:
    """Sequences of 24 tokens, over those that the mask keeps and whose log-ratio is finite."""
    keep = ((t["mask"] != 0) & torch.isfinite(t["target"] - t["sampling"])).reshape(-1, 24)
    target, sampling = (
        torch.where(keep, t[name].reshape(-1, 24), 0.0) for name in ("target", "sampling")
    )
    mean = (target - sampling).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True)
    ratio = torch.exp(mean.detach() + target - target.detach())
    advantages = t["advantages"].reshape(-1, 24)
    value = -torch.min(ratio * advantages, torch.clamp(ratio, 0.9, 1.1) * advantages)
    return torch.where(keep, value, 0.0).reshape(-1)


def dro(t: dict[str, Any]) -> Any:
    quadratic = (t["target"] - t["sampling"]) ** 2
    return -(t["target"] * t["advantages"] - 0.5 * 0.05 * quadratic)


PER_TOKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cross_entropy": lambda t: -t["target"] * t["advantages"],
    "importance_sampling": lambda t: -torch.exp(t["target"] - t["sampling"]) * t["advantages"],
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "dual_clip_ppo": dual_clip,
    "dppo": dppo,
    "truncated_importance_sampling": truncated,
    "gspo": gspo,
    "kl_k1": lambda t: t["target"] - t["sampling"],
    "kl_k2": lambda t: (t["target"] - t["sampling"]) ** 2 / 2,
    "kl_k3": lambda t: torch.expm1(t["sampling"] - t["target"]) - (t["sampling"] - t["target"]),
    "sampled_entropy": lambda t: -t["target"],
    "l2_to_reference": lambda t: (t["target"] - t["sampling"]) ** 2,
}


def odds(mean: Any) -> Any:
    return mean - torch.log(-torch.expm1(mean))


def dpo_margin(t: dict[str, Any]) -> Any:
    return (t["c"] - t["ref_c"]) - (t["r"] - t["ref_r"])


def kto(t: dict[str, Any]) -> Any:
    gain = 0.1 * (t["c"] - t["ref_c"] - 3.0)
    # torch.sigmoid has the derivative s * (1 - s), which is 0 too early even in float64.
    good, bad = torch.exp(F.logsigmoid(-gain)), 1.5 * torch.exp(F.logsigmoid(gain))
    return torch.where(t["good"] != 0, good, bad)


PER_PAIR: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bradley_terry": lambda t: -F.logsigmoid(t["c"] - t["r"]),
    "dpo": lambda t: (
        -0.9 * F.logsigmoid(0.1 * dpo_margin(t)) - 0.1 * F.logsigmoid(-0.1 * dpo_margin(t))
    ),
    "ipo": lambda t: (dpo_margin(t) - 1 / (2 * 0.125)) ** 2,
    "simpo": lambda t: -F.logsigmoid(2.0 * (t["c"] / t["n_c"] - t["r"] / t["n_r"]) - 1.0),
    "orpo": lambda t: (
        -t["c"] / t["n_c"] - 0.1 * F.logsigmoid(odds(t["c"] / t["n_c"]) - odds(t["r"] / t["n_r"]))
    ),
    "kto": kto,
}


def normalised(t: dict[str, Any]) -> tuple[Any, Any]:
    return F.log_softmax(t["student"], -1), F.log_softmax(t["teacher"], -1)


def kl(p: Any, q: Any) -> Any:
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)


PER_POSITION: dict[str, Callable[[dict[str, Any]], Any]] = {
    "distillation_forward_kl": lambda t: F.kl_div(
        t["student"], t["teacher"], log_target=True, reduction="none"
    ).sum(-1),
    "distillation_forward_kl_renormalised": lambda t: kl(*normalised(t)[::-1]),
    "distillation_reverse_kl": lambda t: kl(t["student"], t["teacher"]),
    "distillation_reverse_kl_renormalised": lambda t: kl(*normalised(t)),
    "brier_score": lambda t: ((t["student"].exp() - t["outcomes"]) ** 2).sum(-1),
}


def evaluate(
    loss: Callable[[dict[str, Any]], Any],
    inputs: dict[str, np.ndarray],
    wrt: list[str],
    dtype: Any,
) -> list[np.ndarray]:
    """The unreduced loss, and the gradient of its sum with respect to each input of ``wrt``."""
    mask = inputs.get("mask")
    tensors: dict[str, Any] = {}
    for name, value in inputs.items():
        if mask is not None and name in ("target", "sampling", "advantages"):
            value = np.where(mask, value, 0)
        tensors[name] = torch.tensor(value, dtype=dtype, requires_grad=name in wrt)
    values = loss(tensors)
    if mask is not None:
        values = torch.where(tensors["mask"] != 0, values, 0.0)
    values.sum().backward()
    grads = [
        torch.zeros_like(tensors[n]) if tensors[n].grad is None else tensors[n].grad for n in wrt
    ]
    return [tensor.detach().numpy() for tensor in (values, *grads)]


def main() -> None:
    """Write golden.npz."""
    rng = np.random.default_rng(20240)
    kinds = [
        (PER_TOKEN, token_inputs(rng), ["target"]),
        (PER_PAIR, pair_inputs(rng), ["c", "r"]),
        (PER_POSITION, candidate_inputs(rng), ["student"]),
    ]
    out: dict[str, np.ndarray] = {}
    for losses, inputs, wrt in kinds:
        out |= {f"in_{name}": value for name, value in inputs.items()}
        for name, loss in losses.items():
            exactly = evaluate(loss, inputs, wrt, torch.float64)
            plainly = evaluate(loss, inputs, wrt, torch.float32)
            with np.errstate(over="ignore"):
                rounded = [array.astype(np.float32) for array in exactly]
            for key, array in zip(("value", *(f"grad_{n}" for n in wrt)), rounded, strict=True):
                out[f"{name}_{key}"] = array
            for key, array in zip(("value", *(f"grad_{n}" for n in wrt)), plainly, strict=True):
                out[f"nan_{name}_{key}"] = np.isnan(array)
    np.savez_compressed(HERE / "golden.npz", **out)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
