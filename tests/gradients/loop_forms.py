"""Losses as loops over rows, in the forms in which people write them, some with their columns."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Form(NamedTuple):
    """One way to write a loop.

    Args:
        loop: the objective.
        columns: the same loss in columns, if it has such a form.
        block: how many datums belong together.
        candidates: whether it takes rows ``[T, K]``.
        traced: whether it has to be traced anew for each batch.
        if_short: whether only for a batch in which a row is short.
    """

    loop: Callable[[Any, Any], Any]
    columns: Callable[[Any, Any], Any] | None = None
    block: int = 1
    candidates: bool = False
    traced: bool = False
    if_short: bool = False


def weights(datum: Any) -> Any:
    return datum.loss_fn_inputs["weights"]


def elementwise(data: Any, logprobs: Any) -> Any:
    total, clipped = 0.0, []
    for datum, lp in zip(data, logprobs, strict=True):
        ratio = jnp.exp(lp - datum.loss_fn_inputs["logprobs"])
        advantages = datum.loss_fn_inputs["advantages"]
        bounded = jnp.clip(ratio, 0.8, 1.2)
        total = total - jnp.minimum(ratio * advantages, bounded * advantages).sum() / lp.shape[0]
        clipped.append((ratio != bounded).mean())
    return total, {"clipped": jnp.stack(clipped).mean()}


def elementwise_columns(data: Any, logprobs: Any) -> Any:
    ratio = (logprobs - data["logprobs"]).map(jnp.exp)
    bounded = ratio.map(lambda r: jnp.clip(r, 0.8, 1.2))
    surrogate = (ratio * data["advantages"]).map(jnp.minimum, bounded * data["advantages"])
    return -surrogate.mean().sum(), {"clipped": (ratio != bounded).mean().mean()}


def slices(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        total = total + (lp[1:] * weights(datum)[:-1]).sum() * 2 + lp[-1] ** 2 + jnp.exp(lp[0])
        total = total + ((lp[1:] - lp[:-1]) ** 2).sum()
    return total, {"first": logprobs[0][0]}


def masks(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        w = weights(datum)
        # The logarithm is infinite where the mask is zero.
        total += jnp.where(w > 0, jnp.log(jnp.where(w > 0, w, 1)) * lp + lp**2, 0).sum()
        total += jnp.where(datum.loss_fn_inputs["target_tokens"] == 3, lp, 0.0).sum()
    return total, {}


def masks_columns(data: Any, logprobs: Any) -> Any:
    on = data["weights"] > 0
    safe = data["weights"].map(lambda w: jnp.where(w > 0, w, 1))
    total = (safe.map(jnp.log) * logprobs + logprobs**2).total(where=on)
    return total + logprobs.total(where=data["target_tokens"] == 3), {}


def cumulative(data: Any, logprobs: Any) -> Any:
    scores = [
        (jnp.cumsum(lp) * weights(datum)).sum() + jnp.cumsum(lp[::-1])[0]
        for datum, lp in zip(data, logprobs, strict=True)
    ]
    return sum(score**2 for score in scores) / len(scores), {}


def cumulative_columns(data: Any, logprobs: Any) -> Any:
    scores = (logprobs.cumsum() * data["weights"]).sum() + logprobs.last()
    return (scores**2).mean(), {}


def running(data: Any, logprobs: Any) -> Any:
    return sum((jnp.cumsum(lp) ** 2).mean() + jax.nn.logsumexp(lp) for lp in logprobs), {}


def running_columns(data: Any, logprobs: Any) -> Any:
    return (logprobs.cumsum() ** 2).mean().sum() + logprobs.logsumexp().sum(), {}


def rows_twice(data: Any, logprobs: Any) -> Any:
    n = len(logprobs)
    means = [lp.mean() for lp in logprobs]
    ring = [means[i] * logprobs[(i + 1) % n].max() for i in range(n)]
    again = [jnp.exp(lp).mean() * means[0] for lp in logprobs]
    return jnp.stack(ring + again).sum(), {}


def rows_unused(data: Any, logprobs: Any) -> Any:
    scores = [jnp.log(-lp).sum() for i, lp in enumerate(logprobs) if i % 2 == 0]
    return jnp.asarray(scores).mean(), {}


def pairs(data: Any, logprobs: Any) -> Any:
    chosen, rejected = [], []
    for chosen_datum, rejected_datum, chosen_lp, rejected_lp in zip(
        data[::2], data[1::2], logprobs[::2], logprobs[1::2], strict=True
    ):
        chosen.append(jnp.dot(chosen_lp.flatten().astype(jnp.float32), weights(chosen_datum)))
        rejected.append(jnp.dot(rejected_lp.flatten().astype(jnp.float32), weights(rejected_datum)))
    margins = jnp.stack(chosen) - jnp.stack(rejected)
    metrics = {"accuracy": (margins > 0).astype(jnp.float32).mean(), "margin": margins.mean()}
    return -jax.nn.log_sigmoid(margins).mean(), metrics


def pairs_columns(data: Any, logprobs: Any) -> Any:
    scores = logprobs.dot(data["weights"])
    margins = scores[::2] - scores[1::2]
    metrics = {"accuracy": (margins > 0).mean(), "margin": margins.mean()}
    return -jax.nn.log_sigmoid(margins).mean(), metrics


def groups_of_four(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for start in range(0, len(data), 4):
        scores = [lp.mean() for lp in logprobs[start : start + 4]]
        mean = sum(scores) / 4
        total += sum((score - mean) ** 2 for score in scores)
        total -= jax.nn.logsumexp(jnp.stack(scores))
    return total, {}


def groups_of_four_columns(data: Any, logprobs: Any) -> Any:
    scores = logprobs.mean().reshape(-1, 4)
    centred = scores - scores.mean(1, keepdims=True)
    return (centred**2).sum() - jax.nn.logsumexp(scores, axis=1).sum(), {}


def nested(data: Any, logprobs: Any) -> Any:
    scores = [lp.mean() for lp in logprobs]
    margins = [a - b for i, a in enumerate(scores) for b in scores[i + 1 :]]
    return sum(jax.nn.softplus(m) for m in margins) + sum(scores), {}


def reduced(data: Any, logprobs: Any) -> Any:
    scores = [lp.sum() * (1 + i) for i, lp in enumerate(logprobs)]
    best = functools.reduce(jnp.maximum, scores)
    return functools.reduce(lambda a, b: a + b * b, scores, 0.0) + best, {"best": best}


def by_datum(data: Any, logprobs: Any) -> Any:
    scores = {id(datum): (lp**2).sum() for datum, lp in zip(data, logprobs, strict=True)}
    return sum(scores[id(d)] * d.loss_fn_inputs["reward"] for d in reversed(list(data))), {}


def by_datum_columns(data: Any, logprobs: Any) -> Any:
    return ((logprobs**2).sum() * data["reward"]).sum(), {}


def mapped(data: Any, logprobs: Any) -> Any:
    def one(x: Any) -> Any:
        return jax.nn.log_sigmoid(x) * x

    return jnp.array([jax.vmap(one)(lp).sum() for lp in logprobs]).mean(), {}


def early(data: Any, logprobs: Any) -> Any:
    if len(data) == 1:
        return logprobs[0].sum(), {"alone": 1.0}
    return jnp.stack([(lp * lp).mean() for lp in logprobs]).max(), {"alone": 0.0}


COEFFICIENTS = np.array([0.5, -1.0, 2.0, 0.25, 1.5, 3.0, -0.5, 1.0])


def closure(data: Any, logprobs: Any) -> Any:
    scores = [lp.sum() * COEFFICIENTS[i % 8] for i, lp in enumerate(logprobs)]
    scores = jnp.stack(scores) ** 2
    return (scores * COEFFICIENTS[: len(data)]).sum(), {}


def metrics(data: Any, logprobs: Any) -> Any:
    entropies, tokens = [], []
    total = jnp.zeros(())
    for i, (datum, lp) in enumerate(zip(data, logprobs, strict=True)):
        total = total + (lp * weights(datum)).sum() / jnp.maximum(weights(datum).sum(), 1)
        entropies.append(-(jnp.exp(lp) * lp).sum() + i)
        tokens.append((weights(datum) > 0).sum())
    found = {"entropy": jnp.stack(entropies).mean(), "tokens": jnp.stack(tokens).sum()}
    return -total / len(data), {**found, "worst": jnp.stack(entropies).max()}


def candidates(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        kl = (jnp.exp(lp) * (lp - lp.mean(-1, keepdims=True))).sum(-1)
        total = total + (kl * weights(datum)).sum() + lp.max(1).mean() + (lp[:, 0] ** 2).sum()
        total = total + (lp * weights(datum)[:, None]).mean()
    return total, {}


def candidates_too(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for lp in logprobs:
        entropy = -(jax.nn.softmax(lp, -1) * jax.nn.log_softmax(lp, -1)).sum(-1)
        total = total + entropy.mean() + (lp.sum(0) ** 2).sum() * 0.01 + lp[-1].max()
        total = total + lp[1:, 0].sum() + (lp @ jnp.array([1.0, 2.0, -1.0])).mean()
        total = total + (lp[:, 1:] ** 2).sum() + (jnp.cumsum(lp, 0) * lp).sum() + lp.flatten()[-1]
    return total, {}


def spread_over_candidates(data: Any, logprobs: Any) -> Any:
    """Gives a gradient that is one number per token and nothing else."""
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        total = total - (lp * weights(datum)[:, None]).sum()
    return total, {}


def spread_over_tokens(data: Any, logprobs: Any) -> Any:
    """Gives a gradient that is one number per candidate and nothing else."""
    shares = jnp.asarray([[0.5, 2.0, 1.0]])
    return sum((lp * shares).sum() for lp in logprobs), {}


def left_out(data: Any, logprobs: Any) -> Any:
    total, worst = 0.0, []
    for datum, lp in zip(data, logprobs, strict=True):
        w = weights(datum)
        some = w.sum() > 1
        total = total + jnp.where(some, (lp * w).sum() / jnp.where(some, w.sum(), 1), 0)
        total = total + jnp.where(w > 0, jnp.exp(jnp.where(w > 0, lp, 0)), 0).sum()
        worst.append(jnp.where(w > 0, lp / w, -jnp.inf).max())  # -inf where no weight is
    return total, {"worst": jnp.stack([jnp.where(jnp.isfinite(x), x, 0) for x in worst]).min()}


def outer(data: Any, logprobs: Any) -> Any:
    """Meets rows of different lengths, each pair in both orders."""
    n = len(logprobs)
    return sum(jnp.outer(logprobs[i], logprobs[i - 1])[0].sum() for i in range(n)), {}


def concatenated(data: Any, logprobs: Any) -> Any:
    lp, w = jnp.concatenate(logprobs), jnp.concatenate([weights(datum) for datum in data])
    return (lp * w).sum() / jnp.maximum(w.sum(), 1) + (lp**2).mean(), {}


def concatenated_columns(data: Any, logprobs: Any) -> Any:
    w = data["weights"]
    total = jnp.maximum(w.total(), 1)
    return (logprobs * w).total() / total + (logprobs**2).total() / w.lengths.sum(), {}


def indexed(data: Any, logprobs: Any) -> Any:
    scores = jnp.stack([lp.mean() for lp in logprobs])
    centred = jax.lax.stop_gradient(scores - scores.mean())
    total = 0.0
    for i, (datum, lp) in enumerate(zip(data, logprobs, strict=True)):
        total = total - (centred[i] * lp * weights(datum)).sum() + scores[i] ** 2
    return total + jnp.sort(scores)[0], {"last": centred[-1]}


def strided(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for lp in logprobs:
        total = total + (lp[::2] ** 2).sum() + (lp[:-1] * lp[1:]).sum() + jnp.roll(lp, 1)[0]
        total = total + (jnp.pad(lp, (1, 2)) ** 2).sum() + lp[::-1].cumsum().max() + jnp.var(lp)
    return total, {}


def counted(data: Any, logprobs: Any) -> Any:
    discounted = [(lp * 0.9 ** jnp.arange(lp.shape[0])).sum() for lp in logprobs]
    scaled = [(lp * float(i + 1)).sum() + (lp + 0.5 * i).max() for i, lp in enumerate(logprobs)]
    return sum(discounted) - sum(scaled), {}


def running_totals(data: Any, logprobs: Any) -> Any:
    total, level, seen = 0.0, 0.0, []
    for lp in logprobs:
        total = total + lp.sum() - (lp.mean() - level) ** 2
        level = 0.9 * level + 0.1 * jax.lax.stop_gradient(lp.mean())
        seen.append(total)
    return jnp.stack(seen).max() + sum(s * s for s in seen) / 100, {"level": level}


def vectors(data: Any, logprobs: Any) -> Any:
    found = [jnp.stack([lp.sum(), lp.max(), lp[0]]) for lp in logprobs]
    total = sum(found)
    return (total * total).sum() / 10 + sum(v @ jnp.array([1.0, 2.0, 3.0]) for v in found), {}


def of_lengths(data: Any, logprobs: Any) -> Any:
    total, tokens = 0.0, jnp.array(list(map(len, logprobs)))
    for datum, lp in zip(data, logprobs, strict=True):
        total = total + lp.sum() / len(lp) + (lp * jnp.arange(len(weights(datum)))).max()
        total = total + lp.max() * datum.model_input.length + lp[0] * (len(lp) // 2 + len(lp) % 3)
    metrics = {"tokens": sum(len(lp) for lp in logprobs), "longest": tokens.max()}
    return total / sum(len(lp) for lp in logprobs), metrics


def of_lengths_columns(data: Any, logprobs: Any) -> Any:
    lengths, position = logprobs.lengths, (logprobs * 0 + 1).cumsum() - 1
    total = logprobs.mean() + (logprobs * position).max() + logprobs.max() * lengths
    total = (total + logprobs.first() * (lengths // 2 + lengths % 3)).sum()
    return total / lengths.sum(), {"tokens": lengths.sum(), "longest": lengths.max()}


def containers(data: Any, logprobs: Any) -> Any:
    total, by_parity, rows = [0.0], {}, list(logprobs)
    for i, lp in enumerate(logprobs):
        total[0] = total[0] + lp.sum()
        by_parity.setdefault(i % 2, []).append(lp.max())
    for parity, found in by_parity.items():
        total.append(jnp.stack(found).mean() * parity)
    for a, b in itertools.zip_longest(logprobs[::2], logprobs[1::3]):
        total.append(a.mean() * (1.0 if b is None else b.max()))
    rows[0] = rows[0] * 2
    rows.reverse()
    last = rows.pop()
    total += [jax.nn.softplus(a.mean() - b.mean()) for a, b in itertools.combinations(rows, 2)]
    return sum(total) + (last**2).mean(), {}


def dtypes(data: Any, logprobs: Any) -> Any:
    rewards = jnp.array([datum.loss_fn_inputs["reward"] for datum in data])
    order, total = jnp.argsort(rewards), 0.0
    for datum, lp, reward in zip(data, logprobs, rewards - rewards.mean(), strict=True):
        half = jnp.round(lp * 8).astype(jnp.bfloat16) * weights(datum).astype(jnp.float16)
        total = total + half.astype(jnp.float32).sum() / 8 * reward + (lp > -1).sum() * lp[0]
        total = total + jnp.where(reward > 0, lp.max(), (lp * (lp < 0)).mean())
    scores = jnp.stack([lp.mean() for lp in logprobs])
    return total + (scores[order] * jnp.arange(len(data))).sum(), {}


def by_reward(data: Any, logprobs: Any) -> Any:
    rewards = [float(datum.loss_fn_inputs["reward"]) for datum in data]
    order = sorted(range(len(data)), key=rewards.__getitem__)
    return sum(logprobs[i].sum() * k for k, i in enumerate(order)) + logprobs[0].sum(), {}


def indexed_tokens(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        at = datum.loss_fn_inputs["target_tokens"]  # beyond the end of a short row
        total = (
            total + (lp[at] ** 2).sum() + (jnp.take(lp, -at, mode="clip") * weights(datum)).sum()
        )
        total = total + (jnp.nan_to_num(jnp.take(lp, at)) * lp).sum()
        total = total + lp[jnp.argmax(weights(datum))] ** 2
        total = total + (jax.ops.segment_sum(lp, at, 5) ** 2).sum() + jnp.bincount(at, length=5)[1]
        total = total + (lp[jnp.array([0, -1, 2])] ** 2).sum() + lp[lp.argmin()] ** 2
    return total, {}


def changed_tokens(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        at = datum.loss_fn_inputs["target_tokens"]
        total = total + (lp.at[0].set(0.5) ** 2).sum() + (lp.at[-1].multiply(3.0) ** 2).sum()
        total = total + (lp.at[at].add(lp) ** 2).sum() + (lp.at[1:].set(1.0) * lp).sum()
        total = total + (lp.at[:-1].add(lp[1:]) ** 2).sum() + (lp.at[at].max(-0.5) * lp).sum()
    return total, {}


def chosen_candidates(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        at = datum.loss_fn_inputs["target_tokens"] % 3
        total = total + (jnp.take_along_axis(lp, at, 1) ** 2).sum()
        total = total + (jnp.take_along_axis(lp, at[:, :1], axis=1)[:, 0] * weights(datum)).sum()
        total = total + (lp[jnp.arange(lp.shape[0]), at[:, 0]] ** 2).sum() + (lp[:, at[0]]).sum()
        total = (
            total
            + (jnp.take(lp, at[:, 0], axis=0, mode="clip") ** 2).sum()
            + jnp.sort(lp, 1)[:, 0].sum()
        )
    return total, {}


def ordered(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        total = total + (jnp.sort(lp) * weights(datum)).sum() + jnp.median(lp) ** 2
        total = total + (lp[jnp.argsort(-lp)] * jnp.arange(lp.shape[0])).sum()
        total = total + jax.lax.top_k(lp, 1)[0].sum() + jnp.quantile(lp, 0.3)
    return total, {}


def special_functions(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        total = total + (jax.scipy.special.erf(lp) + jax.nn.gelu(lp, approximate=False)).sum()
        total = total + (jax.scipy.special.gammaln(1 - lp) + jnp.mod(lp, 0.7)).sum()
        total = total + (jnp.round(4 * lp) * lp + jnp.arctan2(lp, 1 + weights(datum))).sum()
        total = total + (jnp.sinh(lp / 9) + jnp.cbrt(lp - 1) + jnp.arcsin(jnp.exp(lp) / 2)).sum()
    return total, {}


def whole_numbers(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        token = datum.loss_fn_inputs["target_tokens"]
        total = total + ((token * 2 - 7) // 3 * lp).sum() / (token % 3 + 1).sum()
        total = total + jnp.where(token[1:] == token[:-1], lp[1:], 0).sum() * jnp.cumsum(token)[-1]
        total = (
            total
            + (lp * jnp.isin(token, jnp.array([1, 4]))).sum()
            + lp[0] * (lp * 9).astype(int)[0]
        )
    return total, {}


def long_enough(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for lp in logprobs:
        if lp.shape[0] < 2:
            continue
        total = total + lp[1:].max() / max(len(lp) - 1, 1) + (jnp.roll(lp[1:], 1) * lp[1:]).sum()
        total = total + jnp.cumsum(lp[1:])[-1] / min(len(lp), 10)
    return total + 0.0 * logprobs[0].sum(), {}


def alone_is_dear(data: Any, logprobs: Any) -> Any:
    return sum(lp.sum() * (5.0 if lp.shape[0] == 1 else 1.0) for lp in logprobs), {}


def odd_is_dear(data: Any, logprobs: Any) -> Any:
    return sum(lp.sum() * (5.0 if len(lp) % 2 else 1.0) for lp in logprobs), {}


def long_is_dear(data: Any, logprobs: Any) -> Any:
    return sum(lp.sum() * (5.0 if lp.shape[0] - 1 else 1.0) for lp in logprobs), {}


def counted_down(data: Any, logprobs: Any) -> Any:
    short = [lp[:6] for lp in logprobs]
    return sum(lp[t] * 0.9 ** (len(lp) - t) for lp in short for t in range(len(lp))), {}


def by_value(data: Any, logprobs: Any) -> Any:
    used = [lp.sum() for d, lp in zip(data, logprobs, strict=True) if weights(d).sum() > 1]
    return sum(used, jnp.zeros(())), {}


def big_numbers(data: Any, logprobs: Any) -> Any:
    rows = zip(data, logprobs, strict=True)
    hashes = [(d.loss_fn_inputs["target_tokens"] + 2**33) % 5 * lp for d, lp in rows]
    return sum(h.sum() for h in hashes), {}


FORMS = {
    "elementwise": Form(elementwise, elementwise_columns),
    "slices": Form(slices),
    "masks": Form(masks, masks_columns),
    "cumulative": Form(cumulative, cumulative_columns),
    "running": Form(running, running_columns),
    "rows used twice": Form(rows_twice),
    "rows unused": Form(rows_unused),
    "pairs": Form(pairs, pairs_columns, block=2),
    "groups of four": Form(groups_of_four, groups_of_four_columns, block=4),
    "nested": Form(nested),
    "reduced": Form(reduced),
    "by datum": Form(by_datum, by_datum_columns),
    "mapped": Form(mapped),
    "early": Form(early),
    "closure": Form(closure),
    "metrics": Form(metrics),
    "candidates": Form(candidates, candidates=True),
    "candidates, too": Form(candidates_too, candidates=True),
    "spread over candidates": Form(spread_over_candidates, candidates=True),
    "spread over tokens": Form(spread_over_tokens, candidates=True),
    "left out": Form(left_out),
    "outer": Form(outer),
    "concatenated": Form(concatenated, concatenated_columns),
    "indexed": Form(indexed),
    "strided": Form(strided),
    "counted": Form(counted),
    "running totals": Form(running_totals),
    "vectors": Form(vectors),
    "of lengths": Form(of_lengths, of_lengths_columns),
    "containers": Form(containers),
    "dtypes": Form(dtypes),
    "by reward": Form(by_reward, traced=True),
    "indexed tokens": Form(indexed_tokens),
    "changed tokens": Form(changed_tokens),
    "chosen candidates": Form(chosen_candidates, candidates=True),
    "ordered": Form(ordered),
    "special functions": Form(special_functions),
    "whole numbers": Form(whole_numbers),
    "long enough": Form(long_enough, traced=True, if_short=True),
    "a length compared": Form(alone_is_dear, traced=True, if_short=True),
    "the truth of a length": Form(long_is_dear, traced=True, if_short=True),
    "the truth of a remainder": Form(odd_is_dear, traced=True),
    "counted down": Form(counted_down, traced=True, if_short=True),
    "by value": Form(by_value, traced=True),
    "big numbers": Form(big_numbers, traced=True),
}
