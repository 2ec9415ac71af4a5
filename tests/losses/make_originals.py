"""Compute losses with the implementations that others publish, into originals.npz beside this file.

    pip install --no-deps torch==2.13.0 trl==1.16.0 verl==0.9.1 liger-kernel==0.8.5 \
        tinker-cookbook==0.6.1
    pip install --no-deps --ignore-requires-python skyrl==0.4.0
    pip install transformers accelerate datasets omegaconf tensordict pydantic loguru orjson
    python tests/losses/make_originals.py

Their code is run, not copied: what is missing of their other requirements is put in place by empty
modules. All compute in float64, but where a note says otherwise. Batches are random and ragged; the
last ten of each kind are extreme: differences of about 100 nats, equal scores, single tokens.
"""

from __future__ import annotations

import pathlib
import sys
import typing
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from make_stubs import Fake, Stubs

HERE = pathlib.Path(__file__).parent
BATCHES, ROWS, PAIRS, TOKENS = 50, 4, 3, 8
ABSENT = (
    "ray",
    "jaxtyping",
    "tinker",
    "chz",
    "peft",
    "vllm",
    "wandb",
    "torchdata",
    "blobfile",
    "termcolor",
    "tiktoken",
    "PIL",
    "hydra",
    "cloudpathlib",
    "skyrl_gym",
    "aiohttp",
    "fastapi",
    "uvicorn",
    "sqlmodel",
    "sqlalchemy",
    "jax",
    "flax",
    "tml_renderers",
    "pyrage",
    "pylatexenc",
)


class Accelerator:
    """One process."""

    device = "cpu"
    num_processes = 1
    sync_gradients = True

    def gather(self, x: Any) -> Any:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Any, reduction: str = "sum") -> Any:
        return x

    def unwrap_model(self, model: Any) -> Any:
        return model


class Metrics(dict[str, Any]):
    """Takes what is logged."""

    def __missing__(self, key: str) -> Any:
        self[key] = Metrics() if key in ("train", "eval") else []
        return self[key]


def tensors(inputs: dict[str, np.ndarray], i: int, dtype: Any = torch.float64) -> dict[str, Any]:
    """One batch as tensors; those named ``lp`` are leaves."""
    made = {}
    for name, value in inputs.items():
        floats = value.dtype.kind == "f"
        made[name] = torch.tensor(value[i], dtype=dtype if floats else None)
        if name == "lp":
            made[name].requires_grad_(True)
    return made


def lengths(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of rows: ragged, and single tokens in the last batches."""
    made = rng.integers(1, TOKENS + 1, shape)
    made[-3:] = 1
    return made


def pair_batches(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logprobs ``[BATCHES, 2 * PAIRS, TOKENS]``, the chosen answers first."""
    shape = (BATCHES, 2 * PAIRS, TOKENS)
    mask = np.arange(TOKENS) < lengths(rng, shape[:2])[..., None]
    lp = -rng.gamma(1.0, 1.0, shape)
    ref = lp + rng.normal(0, 0.5, shape)
    lp[-10:-6] -= rng.gamma(1.0, 20.0, (4, *shape[1:]))
    ref[-6:-3] = lp[-6:-3]
    rounded = {"lp": lp.astype(np.float32), "ref": np.minimum(ref, -1e-3).astype(np.float32)}
    made = {name: np.where(mask, value, 0).astype(np.float64) for name, value in rounded.items()}
    return {**made, "mask": mask, "label": rng.random((BATCHES, 2 * PAIRS)) < 0.5}


def token_batches(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logprobs ``[BATCHES, ROWS, TOKENS]`` of model, sampler and reference."""
    shape = (BATCHES, ROWS, TOKENS)
    mask = np.arange(TOKENS) < lengths(rng, shape[:2])[..., None]
    lp = -rng.gamma(1.0, 1.0, shape) - 1e-2
    sampling = np.minimum(lp + rng.normal(0, 0.4, shape), -1e-3)
    sampling[:5] = lp[:5]  # on-policy
    far = lp - 100 * rng.choice([-1, 1], shape) * rng.random(shape)
    advantages = np.repeat(rng.normal(0, 1, (*shape[:2], 1)), TOKENS, -1)
    advantages[5:8] = 0
    named = {"lp": lp, "sampling": sampling, "far": far, "advantages": advantages}
    named["ref"] = np.minimum(lp + rng.normal(0, 0.4, shape), -1e-3)
    made = {k: v.astype(np.float32).astype(np.float64) for k, v in named.items()}
    for name in ("lp", "sampling", "far", "ref"):
        made[name] = np.where(mask, made[name], 0)
    return {**made, "mask": mask}


def candidate_batches(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Logits over eight candidates, for student and teacher: ``[BATCHES, 2, TOKENS, 8]``."""
    shape = (BATCHES, 2, TOKENS, 8)
    scale = np.where(np.arange(BATCHES) < BATCHES - 10, 1.5, 15.0)[:, None, None, None]
    made = {name: (scale * rng.normal(size=shape)).astype(np.float32) for name in ("lp", "teacher")}
    return {name: value.astype(np.float64) for name, value in made.items()}


def reward_batches(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rewards of groups, some of which agree: ``[BATCHES, 2, 4]``; and of tokens."""
    rewards = rng.normal(size=(BATCHES, 2, 4)).round(2)
    rewards[:10] = rng.integers(0, 2, (10, 2, 4))
    rewards[10:15, 0] = 250.25
    shape = (BATCHES, 8, TOKENS)
    count = lengths(rng, shape[:2])
    mask = np.arange(TOKENS) < count[..., None]
    tokens = np.where(mask, rng.normal(size=shape).round(2), 0)
    values = np.where(mask, rng.normal(size=shape).round(2), 0)
    return {"rewards": rewards, "lengths": count, "tokens": tokens, "values": values, "mask": mask}


def trl_dpo(loss_type: str, **options: Any) -> Callable[[dict[str, Any]], Any]:
    """A loss of TRL's DPO trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

    def loss(t: dict[str, Any]) -> Any:
        rows = t["mask"].shape[0]
        first = torch.ones(rows, 1, dtype=torch.long)
        outputs = Fake(
            log_probs=t["lp"] * t["mask"],
            log_sum_sq_probs=torch.zeros_like(t["lp"]),
            entropy=torch.zeros_like(t["lp"]),
            mean_logits=torch.zeros_like(t["lp"]),
            is_top1=torch.zeros_like(t["mask"]),
        )

        class Model:
            training = False

            def __call__(self, **_: Any) -> Any:
                return outputs

        reference = (t["ref"] * t["mask"]).sum(1).chunk(2)
        defaults = {
            "beta": 0.1,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "use_weighting": False,
        }
        me = Fake(
            model=Model(),
            accelerator=Accelerator(),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            loss_types=[loss_type],
            loss_weights=[1.0],
            args=Fake(discopop_tau=0.05),
            _metrics=Metrics(),
            _total_train_tokens=0,
            _tp_size=1,
            **{**defaults, **options},
        )
        inputs = {
            "input_ids": torch.zeros(rows, TOKENS + 1, dtype=torch.long),
            "attention_mask": torch.ones(rows, TOKENS + 1),
            # TRL divides by the length of this mask and by that of its tail alike: the first
            # position is a prompt's.
            "completion_mask": torch.cat([0 * first, t["mask"].long()], 1),
            "ref_chosen_logps": reference[0],
            "ref_rejected_logps": reference[1],
        }
        return DPOTrainer._compute_loss(me, me.model, inputs, False)

    return loss


def trl_cpo(loss_type: str, mean: bool, **options: Any) -> Callable[[dict[str, Any]], Any]:
    """A loss of TRL's CPO trainer, without the likelihood beside it."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer  # pyright: ignore

    def loss(t: dict[str, Any]) -> Any:
        defaults = {"beta": 0.1, "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 1.0}
        me = Fake(accelerator=Accelerator(), loss_type=loss_type, **{**defaults, **options})
        scores = (t["lp"] * t["mask"]).sum(1)
        scores = scores / t["mask"].sum(1) if mean else scores
        return CPOTrainer.cpo_loss(me, *scores.chunk(2))[0].mean()

    return loss


def trl_orpo(t: dict[str, Any]) -> Any:
    """TRL's odds ratio, whose input must be float32, beside the likelihood of each answer."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer  # pyright: ignore

    me = Fake(accelerator=Accelerator(), beta=0.1)
    chosen, rejected = ((t["lp"] * t["mask"]).sum(1) / t["mask"].sum(1)).chunk(2)
    return (-chosen - ORPOTrainer.odds_ratio_loss(me, chosen, rejected)[0]).mean()


def trl_kto(t: dict[str, Any]) -> Any:
    """TRL's KTO, at a KL of 0, with a weight for bad answers."""
    from trl.trainer.kto_trainer import KTOTrainer  # pyright: ignore[reportMissingImports]

    outputs = Fake(
        log_probs=t["lp"] * t["mask"],
        entropy=torch.zeros_like(t["lp"]),
        mean_logits=torch.zeros_like(t["lp"]),
        is_top1=torch.zeros_like(t["mask"]),
    )

    class Model:
        training = False

        def __call__(self, **_: Any) -> Any:
            return outputs

    me = Fake(
        model=Model(),
        accelerator=Accelerator(),
        _compute_kl_logps=lambda *a: None,
        calculate_KL=False,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.5,
        _metrics=Metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    rows = t["mask"].shape[0]
    inputs = {
        "label": t["label"],
        "input_ids": torch.zeros(rows, TOKENS + 1, dtype=torch.long),
        "attention_mask": torch.ones(rows, TOKENS + 1),
        "completion_mask": torch.cat([torch.zeros(rows, 1, dtype=torch.long), t["mask"].long()], 1),
        "ref_logps": (t["ref"] * t["mask"]).sum(1),
    }
    return KTOTrainer._compute_loss(me, me.model, inputs, False)


def trl_grpo(loss_type: str, level: str = "token", **options: Any) -> Callable[..., Any]:
    """A loss of TRL's GRPO trainer, in its own aggregation."""
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    sampler = options.pop("sampler", "sampling")

    def loss(t: dict[str, Any]) -> Any:
        zeros = torch.zeros_like(t["lp"])
        args = {
            "delta": None,
            "use_bias_correction_kl": False,
            "sapo_temperature_pos": 1.0,
            "sapo_temperature_neg": 1.05,
            "vespo_k_pos": 2.0,
            "vespo_lambda_pos": 3.0,
            "vespo_k_neg": 3.0,
            "vespo_lambda_neg": 2.0,
        }
        mine = {
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "off_policy_mask_threshold": None,
        }
        given = {k: options.get(k, v) for k, v in args.items()}
        me = Fake(
            model=Fake(training=False),
            accelerator=Accelerator(),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            loss_type=loss_type,
            importance_sampling_level=level,
            args=Fake(**given),
            use_vllm=False,
            vllm_importance_sampling_correction=False,
            max_completion_length=20,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            _metrics=Metrics(),
            _get_per_token_logps_and_entropies=lambda *a, **k: (t["lp"], zeros, None),
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            **{k: options.get(k, v) for k, v in mine.items()},
        )
        ids = torch.zeros(t["lp"].shape, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": t["mask"].to(t["lp"].dtype),
            "advantages": t["advantages"][:, 0],
            "old_per_token_logps": t[sampler],
            "ref_per_token_logps": t["ref"],
            "num_items_in_batch": t["mask"].sum(),
        }
        return GRPOTrainer._compute_loss(me, me.model, inputs)

    return loss


def verl_policy(name: str, mode: str = "token-sum", **options: Any) -> Callable[..., Any]:
    """A policy loss of verl."""
    from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]
    from verl.workers.config import ActorConfig  # pyright: ignore[reportMissingImports]

    def loss(t: dict[str, Any]) -> Any:
        config = object.__new__(ActorConfig)
        settings = {
            "clip_ratio": 0.2,
            "clip_ratio_low": None,
            "clip_ratio_high": None,
            "clip_ratio_c": 3.0,
            "tau_pos": 1.0,
            "tau_neg": 1.05,
            "global_batch_info": {},
            "policy_loss": Fake(
                dro_beta=0.05,
                clip_cov_ratio=1.0,
                clip_cov_lb=0.0,
                clip_cov_ub=5.0,
                kl_cov_ratio=0.2,
                ppo_kl_coef=1.0,
            ),
        }
        for key, value in {**settings, **options}.items():
            object.__setattr__(config, key, value)
        function = core_algos.get_policy_loss_fn(name)
        mask = t["mask"].to(t["lp"].dtype)
        return function(t["sampling"], t["lp"], t["advantages"], mask, mode, config)[0]

    return loss


def verl_kl(kind: str) -> Callable[[dict[str, Any]], Any]:
    """An estimator of verl, summed over the tokens."""
    from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]

    return lambda t: (core_algos.kl_penalty(t["lp"], t["ref"], kind) * t["mask"]).sum()


def skyrl_policy(name: str, **options: Any) -> Callable[[dict[str, Any]], Any]:
    """A policy loss of SkyRL's train backend, summed."""
    from skyrl.backends.skyrl_train.utils import ppo_utils  # pyright: ignore

    def loss(t: dict[str, Any]) -> Any:
        off = Fake(
            tis_ratio_type=None,
            sequence_mask_metric=None,
            outlier_token_is_threshold_low=None,
            outlier_token_is_threshold_high=None,
            token_mask_is_threshold_low=None,
            token_mask_is_threshold_high=None,
        )
        config = Fake(
            policy_loss_type="regular",
            loss_reduction="sequence_mean",
            eps_clip_low=0.2,
            eps_clip_high=0.2,
            clip_ratio_c=3.0,
            cispo=Fake(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.2, cispo_anchor="old"),
            off_policy_correction=off,
            sapo=Fake(tau_pos=1.0, tau_neg=1.05),
            dppo=Fake(dppo_type="binary_kl", delta_low=0.05, delta_high=0.05),
            clip_cov=Fake(clip_ratio=1.0, clip_cov_lb=0.0, clip_cov_ub=5.0),
            kl_cov=Fake(kl_cov_frac=0.2, ppo_kl_coef=1.0),
        )
        config.__dict__.update(options)
        function = getattr(ppo_utils, name)
        mask = t["mask"].to(t["lp"].dtype)
        return function(t["lp"], t["sampling"], t["advantages"], config, mask, t["sampling"])[0]

    return loss


def skyrl_kl(kind: str) -> Callable[[dict[str, Any]], Any]:
    """An estimator of SkyRL's train backend, summed over the tokens."""
    from skyrl.backends.skyrl_train.utils import ppo_utils  # pyright: ignore

    def loss(t: dict[str, Any]) -> Any:
        mask = t["mask"].to(t["lp"].dtype)
        return ppo_utils.compute_approx_kl(t["lp"], t["ref"], mask, kind).sum()

    return loss


def skyrl_reduced(reduction: str) -> Callable[[dict[str, Any]], Any]:
    """PPO of SkyRL's train backend, reduced by its scaling of the advantages."""
    from skyrl.backends.skyrl_train.utils import ppo_utils  # pyright: ignore

    loss = skyrl_policy("ppo_policy_loss")

    def reduced(t: dict[str, Any]) -> Any:
        scaled = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
            t["advantages"], t["mask"].to(t["lp"].dtype), reduction, ROWS, 20, [(0, 2), (2, 4)]
        )
        return loss({**t, "advantages": scaled})

    return reduced


def liger(module: str, name: str, mean: bool, **options: Any) -> Callable[[dict[str, Any]], Any]:
    """A preference loss of Liger, over the mean of pairs."""
    import importlib

    function = getattr(importlib.import_module(f"liger_kernel.chunked_loss.{module}"), name)

    def loss(t: dict[str, Any]) -> Any:
        scores = (t["lp"] * t["mask"]).sum(1)
        scores = scores / t["mask"].sum(1) if mean else scores
        chosen, rejected = scores.chunk(2)
        target = torch.zeros(2 * chosen.shape[0], TOKENS)
        return function.preference_loss_fn(chosen, rejected, target, **options)[0]

    return loss


def cookbook_dpo(t: dict[str, Any]) -> Any:
    """The DPO loss of the Tinker cookbook."""
    from tinker_cookbook.preference.train_dpo import compute_dpo_loss  # pyright: ignore

    scores, reference = ((t[name] * t["mask"]).sum(1).chunk(2) for name in ("lp", "ref"))
    return compute_dpo_loss(*map(list, (*scores, *reference)), dpo_beta=0.1)[0]


def gkd(beta: float, temperature: float = 1.0) -> Callable[[dict[str, Any]], Any]:
    """The loss of TRL's GKD trainer, summed over positions."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer  # pyright: ignore

    return lambda t: GKDTrainer.generalized_jsd_loss(
        t["lp"], t["teacher"], beta=beta, temperature=temperature, reduction="sum"
    )


def losses_by_kind() -> dict[str, dict[str, Callable[[], Callable[[dict[str, Any]], Any]]]]:
    """Each loss by the name its numbers get; made late, so that one that fails is skipped."""
    norm = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    return {
        "pair": {
            **{
                f"trl_{name}": (lambda name=name: trl_dpo(name))
                for name in (
                    "sigmoid",
                    "hinge",
                    "ipo",
                    "nca_pair",
                    "bco_pair",
                    "sppo_hard",
                    "aot",
                    "aot_unpaired",
                    "apo_zero",
                    "apo_down",
                    "discopop",
                    "sigmoid_norm",
                )
            },
            "trl_exo_pair": lambda: trl_dpo("exo_pair", label_smoothing=1e-3),
            "trl_robust": lambda: trl_dpo("robust", label_smoothing=0.1),
            "trl_aot_smoothed": lambda: trl_dpo("aot", label_smoothing=0.1),
            "trl_beta_0": lambda: trl_dpo("sigmoid", beta=0.0),
            "trl_wpo": lambda: trl_dpo("sigmoid", use_weighting=True),
            "trl_forward_kl": lambda: trl_dpo("sigmoid", f_divergence_type="forward_kl"),
            "trl_js": lambda: trl_dpo("sigmoid", f_divergence_type="js_divergence"),
            "trl_cpo": lambda: trl_cpo("sigmoid", False),
            "trl_cpo_smoothed": lambda: trl_cpo("sigmoid", False, label_smoothing=0.1),
            "trl_simpo": lambda: trl_cpo("simpo", True, beta=2.0),
            "trl_alphapo": lambda: trl_cpo("simpo", True, beta=2.0, alpha=0.25),
            "trl_orpo": lambda: trl_orpo,
            "trl_kto": lambda: trl_kto,
            "liger_simpo": lambda: liger(
                "simpo_loss", "LigerFusedLinearSimPOFunction", True, beta=2.0, gamma=1.0
            ),
            "liger_cpo": lambda: liger(
                "cpo_loss", "LigerFusedLinearCPOFunction", False, label_smoothing=0.1
            ),
            "cookbook_dpo": lambda: cookbook_dpo,
        },
        "token": {
            "trl_grpo": lambda: trl_grpo("grpo"),
            "trl_grpo_far": lambda: trl_grpo("grpo", sampler="far"),
            "trl_bnpo": lambda: trl_grpo("bnpo"),
            "trl_dr_grpo": lambda: trl_grpo("dr_grpo"),
            "trl_dapo": lambda: trl_grpo("dapo", epsilon_high=0.28),
            "trl_dual": lambda: trl_grpo("dapo", delta=3.0),
            "trl_cispo": lambda: trl_grpo("cispo", epsilon_high=1.2),
            "trl_gspo": lambda: trl_grpo("grpo", "sequence"),
            "trl_luspo": lambda: trl_grpo("luspo", "sequence"),
            "trl_sapo": lambda: trl_grpo("sapo"),
            "trl_sapo_far": lambda: trl_grpo("sapo", sampler="far"),
            "trl_vespo": lambda: trl_grpo("vespo"),
            "trl_vespo_far": lambda: trl_grpo("vespo", sampler="far"),
            "trl_off_policy": lambda: trl_grpo("bnpo", off_policy_mask_threshold=0.05),
            "trl_kl": lambda: trl_grpo("bnpo", beta=0.1),
            "trl_kl_corrected": lambda: trl_grpo("bnpo", beta=0.1, use_bias_correction_kl=True),
            "verl_vanilla": lambda: verl_policy("vanilla"),
            "verl_dppo_tv": lambda: verl_policy("dppo_tv", clip_ratio=0.05, clip_ratio_c=20.0),
            "verl_dppo_kl": lambda: verl_policy("dppo_kl", clip_ratio=0.05, clip_ratio_c=20.0),
            "verl_gspo": lambda: verl_policy("gspo"),
            "verl_sapo": lambda: verl_policy("sapo"),
            "verl_gpg": lambda: verl_policy("gpg"),
            "verl_clip_cov": lambda: verl_policy("clip_cov"),
            "verl_kl_cov": lambda: verl_policy("kl_cov"),
            "verl_geo_mean": lambda: verl_policy("geo_mean", **norm),
            "verl_dro": lambda: verl_policy("dro"),
            "verl_cispo": lambda: verl_policy("cispo"),
            "verl_token_mean": lambda: verl_policy("vanilla", "token-mean"),
            "verl_seq_mean_token_sum": lambda: verl_policy("vanilla", "seq-mean-token-sum"),
            "verl_seq_mean_token_mean": lambda: verl_policy("vanilla", "seq-mean-token-mean"),
            **{
                f"verl_{kind}": (lambda kind=kind: verl_kl(kind))
                for kind in ("k1", "k2", "k3", "abs", "k3+")
            },
            "skyrl_ppo": lambda: skyrl_policy("ppo_policy_loss"),
            "skyrl_sapo": lambda: skyrl_policy("sapo_policy_loss"),
            "skyrl_gspo": lambda: skyrl_policy("gspo_policy_loss"),
            "skyrl_cispo": lambda: skyrl_policy("compute_policy_loss_cispo"),
            "skyrl_rollout_is": lambda: skyrl_policy("rollout_is_policy_loss"),
            "skyrl_dppo_kl": lambda: skyrl_policy("dppo_policy_loss"),
            "skyrl_dppo_tv": lambda: skyrl_policy(
                "dppo_policy_loss",
                dppo=Fake(dppo_type="binary_tv", delta_low=0.05, delta_high=0.05),
            ),
            "skyrl_dual": lambda: skyrl_policy("ppo_policy_loss", policy_loss_type="dual_clip"),
            "skyrl_clip_cov": lambda: skyrl_policy("compute_policy_loss_clip_cov"),
            "skyrl_kl_cov": lambda: skyrl_policy("compute_policy_loss_kl_cov"),
            "skyrl_importance_sampling": lambda: skyrl_policy("importance_sampling_loss"),
            "skyrl_cross_entropy": lambda: skyrl_policy("cross_entropy_loss"),
            **{
                f"skyrl_{kind}": (lambda kind=kind: skyrl_kl(kind))
                for kind in ("k1", "k2", "k3", "abs")
            },
            **{
                f"skyrl_{how}": (lambda how=how: skyrl_reduced(how))
                for how in (
                    "token_mean",
                    "sequence_mean",
                    "seq_mean_token_sum_norm",
                    "prompt_mean",
                )
            },
        },
        "candidate": {
            "trl_gkd_0": lambda: gkd(0.0),
            "trl_gkd_half": lambda: gkd(0.5),
            "trl_gkd_0.9_hot": lambda: gkd(0.9, 2.0),
            "trl_gkd_1": lambda: gkd(1.0),
        },
    }


def advantages(batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The advantages of verl and SkyRL, whose rewards stand at the last token."""
    from skyrl.backends.skyrl_train.utils import ppo_utils as skyrl  # pyright: ignore
    from verl.trainer.ppo import core_algos as verl  # pyright: ignore[reportMissingImports]

    found: dict[str, list[Any]] = {}
    for i in range(BATCHES):
        rewards = torch.tensor(batches["rewards"][i].reshape(-1, 1))
        one = torch.ones_like(rewards)
        index = np.repeat(["a", "b"], 4)
        config = Fake(gamma=0.9, norm_adv_by_std_in_grpo=True)
        mask = torch.tensor(batches["mask"][i], dtype=torch.float64)
        tokens, values = (torch.tensor(batches[name][i]) for name in ("tokens", "values"))
        last = torch.zeros_like(mask)
        count = torch.tensor(batches["lengths"][i])
        last[torch.arange(8), count - 1] = rewards[:, 0]
        given = {"token_level_rewards": rewards.clone(), "response_mask": one, "index": index}
        made = {
            "grpo": verl.compute_grpo_outcome_advantage(**given)[0],
            "grpo_unscaled": verl.compute_grpo_outcome_advantage(
                **{**given, "token_level_rewards": rewards.clone()}, norm_adv_by_std_in_grpo=False
            )[0],
            "rloo": verl.compute_rloo_outcome_advantage(
                **{**given, "token_level_rewards": rewards.clone()}
            )[0],
            "pass_at_k": verl.compute_grpo_passk_outcome_advantage(
                **{**given, "token_level_rewards": rewards.clone()}, config=config
            )[0],
            "opo": verl.compute_opo_outcome_advantage(last.clone(), mask, index)[0][:, :1],
            "reinforce_pp": verl.compute_reinforce_plus_plus_outcome_advantage(
                tokens.clone(), mask, config=config
            )[0],
            "gae": verl.compute_gae_advantage_return(tokens, values, mask, 0.9, 0.8)[0] * mask,
            "rewards": verl.compute_rewards(tokens, values, -values, 0.1),
        }
        for name, value in made.items():
            found.setdefault(f"verl_{name}", []).append(value.numpy())
        theirs = {
            "maxrl": skyrl.compute_maxrl_advantage,
            "grpo": skyrl.compute_grpo_outcome_advantage,
            "rloo": skyrl.compute_rloo_outcome_advantage,
        }
        for name, function in theirs.items():
            value = function(rewards.clone(), one, index)[0]
            found.setdefault(f"skyrl_{name}", []).append(value.numpy())
    return {name: np.stack(values) for name, values in found.items()}


def main() -> None:
    """Write originals.npz."""
    warnings.simplefilter("ignore")
    # TRL looks for what is installed, and finds the truth only before there are stubs.
    import trl.experimental.cpo.cpo_trainer  # pyright: ignore
    import trl.experimental.gkd.gkd_trainer  # pyright: ignore
    import trl.experimental.orpo.orpo_trainer  # pyright: ignore
    import trl.trainer.dpo_trainer  # pyright: ignore
    import trl.trainer.grpo_trainer  # pyright: ignore
    import trl.trainer.kto_trainer  # pyright: ignore # noqa: F401
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict  # as pydantic wants it before Python 3.12
    sys.meta_path.append(Stubs(*ABSENT))
    torch.manual_seed(0)
    rng = np.random.default_rng(20261)
    batches = {
        "pair": pair_batches(rng),
        "token": token_batches(rng),
        "candidate": candidate_batches(rng),
    }
    rewards = reward_batches(rng)
    out: dict[str, np.ndarray] = {f"in_reward_{k}": v for k, v in rewards.items()}
    for kind, inputs in batches.items():
        out |= {
            f"in_{kind}_{k}": v.astype(np.float32) if v.dtype.kind == "f" else v
            for k, v in inputs.items()
        }
        for name, make in losses_by_kind()[kind].items():
            try:
                loss = make()
                values, grads = [], []
                for i in range(BATCHES):
                    t = tensors(inputs, i)
                    value = loss(t)
                    value.backward()
                    values.append(value.item())
                    grads.append(t["lp"].grad.numpy())
            except Exception as error:
                print(f"skipped {name}: {type(error).__name__}: {error}")
                continue
            grad = np.stack(grads)
            # Of a sum of logprobs, every token has the slope of the sum.
            out[f"{name}_value"] = np.array(values)
            out[f"{name}_grad"] = grad[..., 0] if kind == "pair" else grad
            print(f"{name}: {values[0]:.6g}")
    out |= advantages(rewards)
    np.savez_compressed(HERE / "originals.npz", **out)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
