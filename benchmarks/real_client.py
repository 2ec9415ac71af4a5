"""The official client and mintjax's own drive one trainer through the same training, step by step.

    python -m benchmarks.real_client                     both, on a trainer of its own; compares
    python -m benchmarks.real_client URL --client mint   one client, on a trainer that is running

Needs the extra ``bench`` (``mindlab-toolkit==0.2.0``, ``tinker==0.22.0``, torch) for the official
client. Each step is printed as one JSON object. Data and seeds are fixed, so that two runs against
fresh models of the same trainer must agree.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-4
"""How far two clients' numbers may differ, relative to the larger, or to 1."""

CONFIGS: dict[str, dict[str, float] | None] = {
    "cross_entropy": None,
    "importance_sampling": None,
    "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3},
    "dro": {"beta": 0.1},
}

Step = dict[str, Any]


@dataclass(frozen=True)
class Kit:
    """A client library: its types, its service client, and a pairwise loss in its framework."""

    types: Any
    service: Callable[[str, str], Any]
    pairwise: Callable[[Any, Any], tuple[Any, dict[str, Any]]]


def mint_kit() -> Kit:
    """The official client under MinT's compatibility layer, which lets ``sk-`` keys pass."""
    import mint  # pyright: ignore[reportMissingImports]
    import tinker  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    def pairwise(data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, Any]]:
        scores = [
            torch.dot(row, datum.loss_fn_inputs["weights"].to_torch())
            for datum, row in zip(data, logprobs, strict=True)
        ]
        margins = torch.stack(scores[0::2]) - torch.stack(scores[1::2])
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        return loss, {"loss": loss.item(), "margin": margins.mean().item()}

    def service(base_url: str, api_key: str) -> Any:
        return mint.ServiceClient(base_url=base_url, api_key=api_key)

    return Kit(tinker.types, service, pairwise)


def mintjax_kit() -> Kit:
    """This package."""
    import jax
    import jax.numpy as jnp

    import mintjax
    from mintjax.client import ServiceClient

    def pairwise(data: Any, logprobs: Any) -> tuple[Any, dict[str, Any]]:
        scores = [
            jnp.dot(row, datum.loss_fn_inputs["weights"])
            for datum, row in zip(data, logprobs, strict=True)
        ]
        margins = jnp.stack(scores[0::2]) - jnp.stack(scores[1::2])
        return -jax.nn.log_sigmoid(margins).mean(), {"margin": margins.mean()}

    return Kit(mintjax, ServiceClient, pairwise)


KITS = {"mint": mint_kit, "mintjax": mintjax_kit}


def batch(types: Any, seed: int, columns: tuple[str, ...]) -> list[Any]:
    """Six datums of random bytes, 5 to 40 tokens long, with the columns asked for."""
    source = random.Random(seed)
    data: list[Any] = []
    for _ in range(6):
        tokens = [source.randrange(256) for _ in range(source.randint(6, 41))]
        length = len(tokens) - 1
        values = {
            "target_tokens": ("int64", tokens[1:]),
            "weights": ("float32", [(t >= length // 3) / length for t in range(length)]),
            "logprobs": ("float32", [source.uniform(-6.5, -5.0) for _ in range(length)]),
            "advantages": ("float32", [source.gauss(0, 1) for _ in range(length)]),
        }
        inputs = {
            name: types.TensorData(data=values[name][1], dtype=values[name][0], shape=[length])
            for name in columns
        }
        data.append(
            types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
        )
    return data


def drive(kit: Kit, base_url: str, api_key: str, base_model: str) -> Iterator[Step]:
    """Train a fresh model through every kind of call, yielding what each returns."""
    types = kit.types
    service = kit.service(base_url, api_key)
    client = service.create_lora_training_client(base_model=base_model, rank=8, seed=7)
    weighted = batch(types, 1, ("target_tokens", "weights"))
    adam = types.AdamParams(learning_rate=3e-3, weight_decay=0.01, grad_clip_norm=100.0)

    def forward() -> float:
        return _sum_of_logprobs(client.forward(weighted, "cross_entropy").result())

    yield {"call": "forward", "logprobs": forward()}
    for loss_fn, config in CONFIGS.items():
        columns = ("weights",) if loss_fn == "cross_entropy" else ("logprobs", "advantages")
        data = batch(types, 2, ("target_tokens", *columns))
        output = client.forward_backward(data, loss_fn, config).result()
        client.optim_step(adam).result()
        yield {
            "call": f"forward_backward {loss_fn}",
            "loss": output.metrics["loss:sum"],
            "logprobs": _sum_of_logprobs(output),
        }
    for step in range(3):
        output = client.forward_backward_custom(weighted, kit.pairwise).result()
        client.optim_step(adam).result()
        yield {
            "call": f"forward_backward_custom {step}",
            "loss": output.metrics["loss"],
            "margin": output.metrics["margin"],
        }
    saved, before = client.save_state("kept").result().path, forward()
    client.forward_backward(weighted, "cross_entropy").result()
    client.optim_step(adam).result()
    yield {"call": "trained on", "logprobs": forward()}
    client.load_state(saved).result()
    after = forward()
    if after != before:
        raise SystemExit(f"load_state gave {after}, where save_state had {before}")
    yield {"call": "load_state", "logprobs": after}
    sampler = client.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints(list(b"to be or not "))
    greedy = types.SamplingParams(max_tokens=8, temperature=0.0)
    answer = sampler.sample(prompt=prompt, num_samples=1, sampling_params=greedy).result()
    yield {"call": "sample", "tokens": [int(token) for token in answer.sequences[0].tokens]}
    logprobs = sampler.compute_logprobs(prompt).result()
    yield {"call": "compute_logprobs", "logprobs": sum(logprobs[1:])}


def differences(first: list[Step], second: list[Step]) -> float:
    """The largest difference between two runs, relative to the larger number, or to 1."""
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                scale = max(1.0, abs(value), abs(other[name]))
                largest = max(largest, abs(value - other[name]) / scale)
            elif value != other[name]:
                largest = math.inf
    return largest


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns 0 if it passes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base_url", nargs="?", help="a running trainer; starts its own if left out")
    parser.add_argument("--client", choices=KITS, action="append", help="default: both")
    parser.add_argument("--api-key", default="sk-local")
    parser.add_argument("--base-model", default="mintjax/tiny")
    options = parser.parse_args(arguments)
    if options.base_url is not None:
        return _compare(options.base_url, options)
    from mintjax import local

    with local.running_server(api_key=options.api_key) as base_url:
        return _compare(base_url, options)


def _compare(base_url: str, options: argparse.Namespace) -> int:
    runs: list[list[Step]] = []
    for name in options.client or KITS:
        runs.append([])
        for step in drive(KITS[name](), base_url, options.api_key, options.base_model):
            runs[-1].append(step)
            print(json.dumps({"client": name, **step}), flush=True)
    largest = max((differences(runs[0], run) for run in runs[1:]), default=None)
    print(json.dumps({"summary": True, "steps": len(runs[0]), "largest_difference": largest}))
    return 0 if largest is None or largest <= TOLERANCE else 1


def _sum_of_logprobs(output: Any) -> float:
    return math.fsum(math.fsum(row["logprobs"].data) for row in output.loss_fn_outputs)


if __name__ == "__main__":
    sys.exit(main())
