"""Measures a whole custom step over a real socket, and the part of it in which nothing is computed.

    python -m benchmarks.socket_step [--quick] [--json FILE]

The embedded trainer listens on the loopback interface, in a thread of this process. A step is a
forward pass, the gradient of ``bradley_terry`` here, a backward pass and an optimizer step, of 8
datums on ``mintjax/nano``. What is left of it beside the trainer's own computations is the client's
gradient, encoding, HTTP and waiting. JSON and protocol buffers take steps in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from mintjax import ServiceClient, objectives
from mintjax.bench import Synthetic
from mintjax.client import TrainingClient
from mintjax.local import Engine, running_server
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.types import AdamParams, Datum

ENCODINGS = {"JSON": False, "protocol buffers": True}
DATUMS = 8
MEDIANS = ("requests", "step_ms", "rest_ms")


class ClockedEngine(Engine):
    """The trainer, which counts the seconds that it computes."""

    seconds = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._clocked(super().forward, *args, **kwargs)

    def forward_backward(self, *args: Any, **kwargs: Any) -> Any:
        return self._clocked(super().forward_backward, *args, **kwargs)

    def optim_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._clocked(super().optim_step, *args, **kwargs)

    def _clocked(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return compute(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


class CountingTransport(httpx.AsyncHTTPTransport):
    """The network, with a count of the requests."""

    requests = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        return await super().handle_async_request(request)


def step(
    model: TrainingClient, data: list[Datum], engine: ClockedEngine, network: CountingTransport
) -> dict[str, float]:
    """Takes a step; returns its requests and milliseconds."""
    requests, computed, start = network.requests, engine.seconds, time.perf_counter()
    update = model.forward_backward_custom(data, objectives.bradley_terry())
    stepped = model.optim_step(AdamParams(learning_rate=1e-6))
    update.result()
    stepped.result()
    seconds = time.perf_counter() - start
    return {
        "requests": network.requests - requests,
        "step_ms": 1e3 * seconds,
        "rest_ms": 1e3 * (seconds - (engine.seconds - computed)),
    }


def measure(warm_up: int, steps: int) -> list[dict[str, Any]]:
    """Medians of each encoding, after the steps that warm up."""
    source = Synthetic(("weights",), (50, 64))
    taken: dict[str, list[dict[str, float]]] = {encoding: [] for encoding in ENCODINGS}
    with ExitStack() as stack:
        trainers: dict[str, tuple[TrainingClient, ClockedEngine, CountingTransport]] = {}
        for encoding, protobuf in ENCODINGS.items():
            engine = stack.enter_context(ClockedEngine())
            config = ClientConfigResponse(proto_write_fwdbwd=protobuf)
            url = stack.enter_context(running_server(engine, config=config))
            network = CountingTransport()
            service = stack.enter_context(ServiceClient(url, "tml-loopback", transport=network))
            model = service.create_lora_training_client("mintjax/nano", rank=8, seed=0)
            trainers[encoding] = model, engine, network
        for _ in range(warm_up + steps):
            data = source.batch(DATUMS).data
            for encoding, (model, engine, network) in trainers.items():
                taken[encoding].append(step(model, data, engine, network))
    return [
        {
            "encoding": encoding,
            "datums": DATUMS,
            "steps": steps,
            **{
                name: statistics.median(each[name] for each in taken[encoding][warm_up:])
                for name in MEDIANS
            },
        }
        for encoding in ENCODINGS
    ]


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = measure(*((1, 3) if options.quick else (5, 20)))
    for row in rows:
        print(
            f"{row['encoding']:16s} {row['requests']:g} requests, {row['step_ms']:.1f} ms, "
            f"of which {row['rest_ms']:.1f} ms are not the trainer's computing"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
