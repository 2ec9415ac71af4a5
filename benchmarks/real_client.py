"""The official clients and mintjax's own drive one trainer through the same training.

    python -m benchmarks.real_client [--sdk-038 PYTHON]  all, on trainers of its own; compares
    python -m benchmarks.real_client URL --client mint   one client, on a trainer that is running

Needs the ``bench`` extra (``mindlab-toolkit==0.2.0``, ``tinker==0.22.0``, torch). What is newer
speaks protocol buffers only and needs an environment of its own, whose Python is passed; without
it, it is left out::

    python -m venv sdk038 && sdk038/bin/pip install tinker==0.38.0 torch

The trainers are three: one that asks for JSON, one that asks for protocol buffers, and one that
asks for them compressed. Each step is printed as one JSON object. Data and seeds are fixed, so that
all runs must agree. Then the messages of ``tinker==0.38.0`` read ours, and the reverse, value for
value.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SDK_MESSAGES = ROOT / "tests" / "protobuf" / "sdk_messages.py"

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

    return sdk_kit(mint.ServiceClient)


def tinker_kit() -> Kit:
    """The official client itself, of whatever version there is."""
    import tinker  # pyright: ignore[reportMissingImports]

    return sdk_kit(tinker.ServiceClient)


def sdk_kit(client: Callable[..., Any]) -> Kit:
    """The official client, made by ``client``."""
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
        return client(base_url=base_url, api_key=api_key)

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


KITS = {"mint": mint_kit, "mintjax": mintjax_kit, "tinker": tinker_kit}


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
    parser.add_argument("--client", choices=KITS, action="append", help="default: all there are")
    parser.add_argument("--sdk-038", help="Python that has tinker 0.38.0")
    parser.add_argument("--api-key", default="tml-local")
    parser.add_argument("--base-model", default="mintjax/tiny")
    options = parser.parse_args(arguments)
    clients: list[str] = options.client or ["mint", "mintjax"]
    runs: dict[str, list[Step]] = {}
    if options.base_url is not None:
        for name in clients:
            runs[name] = _run(name, options.base_url, options)
    else:
        _with_own_trainers(clients, options, runs)
    first = next(iter(runs.values()))
    largest = {name: differences(first, run) for name, run in runs.items()}
    print(json.dumps({"summary": True, "steps": len(first), "largest_difference": largest}))
    if options.base_url is None and options.sdk_038:
        for check in ("ours_read_by_the_sdk", "the_sdk_s_read_here"):
            print(json.dumps({"messages": check, **globals()[check](options.sdk_038)}))
    return 0 if max(largest.values()) <= TOLERANCE else 1


def _with_own_trainers(
    clients: list[str], options: argparse.Namespace, runs: dict[str, list[Step]]
) -> None:
    from mintjax import local
    from mintjax.protocol.messages import ClientConfigResponse

    configs = {
        "json": ClientConfigResponse(),
        "protobuf": ClientConfigResponse(proto_write_fwdbwd=True),
        "zstd": ClientConfigResponse(proto_write_fwdbwd=True, proto_compress_fwdbwd=True),
    }
    for encoding, config in configs.items():
        with local.running_server(api_key=options.api_key, config=config) as base_url:
            for name in clients:
                runs[f"{name}, {encoding}"] = _run(name, base_url, options)
            if encoding == "json":
                continue
            if options.sdk_038:
                runs[f"tinker 0.38, {encoding}"] = _run_apart(base_url, options)
            else:
                print("SKIPPED: tinker==0.38.0; pass --sdk-038 PYTHON of an environment with it")


def _run(name: str, base_url: str, options: argparse.Namespace) -> list[Step]:
    steps: list[Step] = []
    for step in drive(KITS[name](), base_url, options.api_key, options.base_model):
        steps.append(step)
        print(json.dumps({"client": name, **step}), flush=True)
    return steps


def _run_apart(base_url: str, options: argparse.Namespace) -> list[Step]:
    command = [options.sdk_038, "-m", "benchmarks.real_client", base_url, "--client", "tinker"]
    command += ["--api-key", options.api_key, "--base-model", options.base_model]
    done = _python(command)
    print(done, end="", flush=True)
    steps = [json.loads(line) for line in done.splitlines()]
    return [
        {name: value for name, value in step.items() if name != "client"}
        for step in steps
        if "call" in step
    ]


def _python(command: list[str], given: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, input=given, env=environment, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def ours_read_by_the_sdk(python: str) -> dict[str, Any]:
    """Random messages of ours, as the SDK's classes read them.

    Raises:
        AssertionError: a value is another.
    """
    from tests.protobuf import sdk_messages

    from mintjax.protocol import protobuf

    request, output = sdk_messages.request_of_mintjax(), sdk_messages.output_of_mintjax()
    bodies = [protobuf.encode_request(request).hex(), protobuf.encode_output(output).hex()]
    command = [python, str(SDK_MESSAGES), "read"]
    read = json.loads(_python(command, json.dumps(bodies)))
    assert read == [sdk_messages.plain_request(request), sdk_messages.plain_output(output)]
    return {"values": sum(map(sdk_messages.count, read))}


def the_sdk_s_read_here(python: str) -> dict[str, Any]:
    """The SDK's messages, as they are read here.

    Raises:
        AssertionError: a value is another.
    """
    from tests.protobuf import sdk_messages

    from mintjax.protocol import protobuf

    golden = json.loads(_python([python, str(SDK_MESSAGES), "write"]))
    request = protobuf.decode_request(bytes.fromhex(golden["request"]))
    output = protobuf.decode_output(bytes.fromhex(golden["output"]))
    read = [sdk_messages.plain_request(request), sdk_messages.plain_output(output)]
    assert read == [golden["request_values"], golden["output_values"]]
    return {"values": sum(map(sdk_messages.count, read))}


def _sum_of_logprobs(output: Any) -> float:
    return math.fsum(math.fsum(row["logprobs"].data) for row in output.loss_fn_outputs)


if __name__ == "__main__":
    sys.exit(main())
