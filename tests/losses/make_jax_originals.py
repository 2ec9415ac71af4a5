"""Compute losses with tunix and rlax, into jax_originals.npz beside this file.

    pip install jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax chex distrax dm-env
    pip install --no-deps google-tunix==0.1.7 rlax==0.1.9
    python tests/losses/make_jax_originals.py

Run after ``make_originals.py``, whose batches they take. Their code is run, not copied. rlax
computes in float64; tunix computes logprobs in float32, whatever it is given.
"""

from __future__ import annotations

import pathlib
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from make_stubs import Fake, Stubs

jax.config.update("jax_enable_x64", True)

HERE = pathlib.Path(__file__).parent
GOLDEN = np.load(HERE / "originals.npz")
ABSENT = (
    "datasets",
    "grain",
    "huggingface_hub",
    "jaxtyping",
    "jinja2",
    "kagglehub",
    "metrax",
    "numba",
    "omegaconf",
    "orbax",
    "perfetto",
    "pylatexenc",
    "qwix",
    "safetensors",
    "sentencepiece",
    "sympy",
    "tenacity",
    "tensorflow_datasets",
    "tqdm",
    "transformers",
)


def inputs(kind: str) -> dict[str, np.ndarray]:
    """The batches of one kind, in float64."""
    head = f"in_{kind}_"
    found = {n[len(head) :]: GOLDEN[n] for n in GOLDEN.files if n.startswith(head)}
    return {n: v.astype(np.float64) if v.dtype.kind == "f" else v for n, v in found.items()}


PAIRS, TOKENS, CANDIDATES, REWARDS = map(inputs, ("pair", "token", "candidate", "reward"))


def package_without_its_init(name: str) -> None:
    """Make a package importable whose ``__init__`` imports all that it requires."""
    spec = find_spec(name)
    assert spec is not None
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = package


def tunix_policy(algorithm: str, mode: str, **settings: Any) -> Callable[..., Any]:
    """A policy loss of tunix, of the logprobs of one batch."""
    from flax import nnx  # pyright: ignore[reportMissingImports]
    from tunix.rl import algo_core  # pyright: ignore[reportMissingImports]

    function = {"ppo": algo_core.ppo_policy_loss_fn}.get(algorithm, algo_core.grpo_loss_fn)

    def loss(lp: Any, i: int) -> Any:
        logits = jnp.zeros((*lp.shape, 2))
        algo_core.common.compute_per_token_logps = lambda *a, **k: (lp, logits)
        nnx.split = lambda model: (None, None)
        advantages = TOKENS["advantages"][i]
        example = Fake(
            prompt_ids=None,
            completion_ids=None,
            completion_mask=jnp.asarray(TOKENS["mask"][i], float),
            advantages=jnp.asarray(advantages if algorithm == "ppo" else advantages[:, 0]),
            old_per_token_logps=jnp.asarray(TOKENS["sampling"][i]),
            ref_per_token_logps=jnp.asarray(TOKENS["ref"][i]),
        )
        config = Fake(
            beta=0.0,
            epsilon=0.2,
            epsilon_low=0.2,
            epsilon_high=0.2,
            entropy_coef=None,
            kl_coef=0.0,
            loss_algo=algorithm,
            loss_agg_mode=mode,
            temperature=1.0,
            kl_loss_mode="low_var_kl",
            kl_clamp_value=None,
        )
        config.__dict__.update(settings)
        return function(None, example, config, 0, 1)[0]

    return loss


def tunix_kl(method: str) -> Callable[..., Any]:
    """An estimator of tunix, summed over the tokens."""
    from tunix.rl import common  # pyright: ignore[reportMissingImports]

    def loss(lp: Any, i: int) -> Any:
        estimate = common.compute_kl_divergence(lp, jnp.asarray(TOKENS["ref"][i]), method)
        return (estimate * TOKENS["mask"][i]).sum()

    return loss


def tunix_pairs(algorithm: str, **settings: Any) -> Callable[..., Any]:
    """A preference loss of tunix, of the scores of one batch."""
    from tunix.sft.dpo import dpo_trainer  # pyright: ignore[reportMissingImports]

    def loss(scores: Any, i: int) -> Any:
        dpo_trainer.compute_logps = lambda *a, **k: (scores[:3], scores[3:])
        reference = jnp.asarray(np.where(PAIRS["mask"], PAIRS["ref"], 0).sum(-1)[i])
        example = Fake(
            input_ids=None,
            positions=None,
            attention_mask=None,
            logits_to_keep=None,
            images=None,
            completion_mask=jnp.asarray(PAIRS["mask"][i], float),
            ref_chosen_logps=reference[:3],
            ref_rejected_logps=reference[3:],
        )
        return dpo_trainer.dpo_loss_fn(None, example, algorithm, **settings)[0]

    return loss


def tunix_logits(temperature: float) -> Callable[..., Any]:
    """The divergence of tunix's distillation of logits, summed over positions."""
    from tunix.distillation.strategies import logit  # pyright: ignore[reportMissingImports]

    strategy = logit.LogitStrategy(None, None, None, temperature=temperature, alpha=1.0)

    def loss(lp: Any, i: int) -> Any:
        teacher = jnp.asarray(CANDIDATES["teacher"][i])
        positions = lp.shape[0] * lp.shape[1]
        return strategy.compute_loss(lp, teacher, jnp.zeros_like(lp))[0] * positions

    return loss


def rlax_ppo(lp: Any, i: int) -> Any:
    """The clipped surrogate of rlax, over the tokens that count, as their sum."""
    import rlax  # pyright: ignore[reportMissingImports]

    kept = np.flatnonzero(TOKENS["mask"][i])
    ratio = jnp.exp(lp.ravel()[kept] - TOKENS["sampling"][i].ravel()[kept])
    advantages = jnp.asarray(TOKENS["advantages"][i].ravel()[kept])
    return rlax.clipped_surrogate_pg_loss(ratio, advantages, 0.2) * len(kept)


def rlax_policy_gradient(lp: Any, i: int) -> Any:
    """REINFORCE of rlax, over the tokens that count, as their sum."""
    import rlax  # pyright: ignore[reportMissingImports]

    kept = np.flatnonzero(TOKENS["mask"][i])
    chosen = lp.ravel()[kept]
    logits = jnp.stack([chosen, jnp.log(-jnp.expm1(chosen))], -1)  # one other action
    advantages = jnp.asarray(TOKENS["advantages"][i].ravel()[kept])
    weights, actions = jnp.ones(len(kept)), np.zeros(len(kept), int)
    return rlax.policy_gradient_loss(logits, actions, advantages, weights) * len(kept)


def losses_by_kind() -> dict[str, dict[str, Callable[..., Any]]]:
    """Each loss by the name its numbers get."""
    return {
        "pair": {
            "tunix_dpo": tunix_pairs("dpo"),
            "tunix_dpo_smoothed": tunix_pairs("dpo", label_smoothing=0.1),
        },
        "token": {
            "tunix_ppo": tunix_policy("ppo", "token-mean"),
            "tunix_dual": tunix_policy("ppo", "token-mean", epsilon_c=3.0),
            "tunix_grpo": tunix_policy("grpo", "sequence-mean-token-mean"),
            "tunix_dapo": tunix_policy("grpo", "token-mean", epsilon_high=0.28),
            "tunix_sequence_sum": tunix_policy("grpo", "seq-mean-token-sum"),
            "tunix_gspo": tunix_policy("gspo-token", "sequence-mean-token-mean"),
            "tunix_k1": tunix_kl("kl"),
            "tunix_k2": tunix_kl("mse_kl"),
            "tunix_k3": tunix_kl("low_var_kl"),
            "rlax_ppo": rlax_ppo,
            "rlax_policy_gradient": rlax_policy_gradient,
        },
        "candidate": {"tunix_logits": tunix_logits(1.0), "tunix_logits_hot": tunix_logits(2.0)},
    }


def advantages() -> dict[str, np.ndarray]:
    """The advantages of tunix and rlax."""
    import rlax  # pyright: ignore[reportMissingImports]
    from tunix.rl import algo_core  # pyright: ignore[reportMissingImports]

    groups = REWARDS["rewards"].reshape(-1)
    made = {
        "tunix_grpo_advantages": algo_core.compute_advantages(groups, 4),
        "tunix_rloo": algo_core.compute_rloo_advantages(jnp.asarray(groups), 4),
        "tunix_dr_grpo": algo_core.compute_drgrpo_advantages(jnp.asarray(groups), 4),
    }
    found = {name: np.asarray(value).reshape(50, 8) for name, value in made.items()}
    tokens, values, mask = (REWARDS[name] for name in ("tokens", "values", "mask"))
    with jax.enable_x64(False):
        given = (jnp.asarray(x, jnp.float32) for x in (tokens, values, mask))
        gae = jax.vmap(lambda r, v, m: algo_core.compute_gae_advantages(r, v, m, 0.9, 0.8)[0])
        found["tunix_gae"] = np.where(mask, np.asarray(gae(*given), np.float64), 0)
    returns, estimates = np.zeros_like(tokens), np.zeros_like(tokens)
    for i, row in np.argwhere(mask.any(-1)):
        count = mask[i, row].sum()
        rewards, value = tokens[i, row, :count], np.append(values[i, row, :count], 0)
        discounts = np.full(count, 0.9)
        discounts[-1] = 0.0
        returns[i, row, :count] = rlax.discounted_returns(rewards, discounts, np.zeros(count))
        estimates[i, row, :count] = rlax.truncated_generalized_advantage_estimation(
            jnp.asarray(rewards), jnp.asarray(discounts), 0.8, jnp.asarray(value)
        )
    return {**found, "rlax_returns": returns, "rlax_gae": estimates}


def main() -> None:
    """Write jax_originals.npz."""
    sys.meta_path.append(Stubs(*ABSENT))
    package_without_its_init("tunix")
    starts = {
        "pair": np.where(PAIRS["mask"], PAIRS["lp"], 0).sum(-1),
        "token": TOKENS["lp"],
        "candidate": CANDIDATES["lp"],
    }
    out: dict[str, np.ndarray] = {}
    for kind, named in losses_by_kind().items():
        for name, loss in named.items():
            pulled = [
                jax.value_and_grad(loss)(jnp.asarray(at), i) for i, at in enumerate(starts[kind])
            ]
            out[f"{name}_value"] = np.array([float(value) for value, _ in pulled])
            out[f"{name}_grad"] = np.stack([np.asarray(grad) for _, grad in pulled])
            print(f"{name}: {out[f'{name}_value'][0]:.6g}")
    out |= advantages()
    np.savez_compressed(HERE / "jax_originals.npz", **out)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
