"""Many threads and asyncio tasks on one service client, each of which knows its own answers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from mintjax.client import APIFuture, SamplingClient, ServiceClient, TrainingClient
from mintjax.types import AdamParams, Datum, ModelInput, SamplingParams

from .double import Answer, Trainer

Life = Generator[APIFuture[Any], Any, None]
"""What one thread or task does: yields futures, and is sent their results."""


class Forgetful(Trainer):
    """The double, made to run for long: it keeps nothing that is over.

    Its answers are functions of what it was asked, no two alike, so that an answer to somebody else
    is seen to be one.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number = 0
        self.keys: dict[str, tuple[str, tuple[str, int] | None]] = {}
        self.steps: Counter[str] = Counter()
        self._another = threading.Condition()

    def wait_for(self, requests: int) -> None:
        """Wait until so many requests have come, or none for a minute: who asks may have failed."""
        with self._another:
            while self.number < requests and self._another.wait(60):
                pass

    def accept(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        self.requests.clear()
        if not body:  # the client was closed while it was being sent
            return Answer(400)
        key, model, seq = headers["x-idempotency-key"], body.get("model_id"), body.get("seq_id")
        if key in self.by_key:
            return Answer(200, {"request_id": self.by_key[key]})
        request_id = f"request-{self.number}"
        with self._another:
            self.number += 1
            self._another.notify_all()
        self.by_key[key] = request_id
        self.keys[request_id] = (key, None)
        if model is None or seq is None:
            self.results[request_id] = self.run(path, body)
            return Answer(200, {"request_id": request_id})
        assert seq >= self.next_seq[model], f"number {seq} of {model} came twice"
        self.waiting[model][seq] = (request_id, path, body)
        while self.next_seq[model] in self.waiting[model]:
            ready, at, what = self.waiting[model].pop(self.next_seq[model])
            self.results[ready] = self.run(at, what)
            self.next_seq[model] += 1
        return Answer(200, {"request_id": request_id})

    def retrieve(self, body: dict[str, Any]) -> Answer:
        answer = super().retrieve(body)
        if self.results.pop(body["request_id"], None) is not None:
            key, _ = self.keys.pop(body["request_id"])
            del self.by_key[key]
        return answer

    def run(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "asample":
            [chunk] = body["prompt"]["chunks"]
            logprobs = [own_logprob(chunk["tokens"][0], i) for i in range(len(chunk["tokens"]))]
            sequence = {"tokens": chunk["tokens"], "logprobs": logprobs, "stop_reason": "length"}
            return {"sequences": [sequence]}
        result = super().run(path, body)
        if path in ("forward", "forward_backward"):
            for one, given in zip(
                result["loss_fn_outputs"], body[f"{path}_input"]["data"], strict=True
            ):
                [chunk] = given["model_input"]["chunks"]
                targets = given["loss_fn_inputs"]["target_tokens"]["data"]
                pairs = zip(chunk["tokens"], targets, strict=True)
                one["logprobs"]["data"] = [own_logprob(*pair) for pair in pairs]
            del result["metrics"]["loss:sum"]  # which is of other logprobs
        if path == "optim_step":
            self.steps[body["model_id"]] += 1
        self.models.get(body.get("model_id", ""), []).clear()
        return result


def own_logprob(token: int, target: int) -> float:
    """Of a token and its target, and of no others; a float32 to the bit."""
    return -((token * 40_503 + target * 30_011) % 2**20 + 1) / 2**16


@contextmanager
def serving(trainer: Trainer) -> Iterator[str]:
    """The double on a socket; its address."""
    config = uvicorn.Config(trainer, port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    with contextlib.closing(config.bind_socket()) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def fingerprint(data: Any, logprobs: Any) -> tuple[Any, dict[str, Any]]:
    """An objective that needs two passes, and says whose data it saw."""
    return (logprobs.sum() ** 2).mean(), {"who": data["who"].max().max()}


def own_data(rng: random.Random, who: int) -> list[Datum]:
    """Two datums that nobody else has."""

    def one() -> Datum:
        tokens = [rng.randrange(2**20) for _ in range(rng.randint(1, 9))]
        targets = [rng.randrange(2**20) for _ in tokens]
        columns = {
            "target_tokens": targets,
            "weights": [1.0] * len(tokens),
            "who": [float(who)] * len(tokens),
        }
        return Datum(ModelInput.from_ints(tokens), columns)

    return [one(), one()]


def check(data: list[Datum], output: Any) -> None:
    """Hold the logprobs of a pass against what only these data can have."""
    for datum, row in zip(data, output.logprobs, strict=True):
        pairs = zip(datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"], strict=True)
        np.testing.assert_array_equal(row, [own_logprob(a, int(b)) for a, b in pairs])


def life(
    client: TrainingClient, sampler: SamplingClient, who: int, until: Callable[[], bool]
) -> Life:
    """Passes, custom steps, optimizer steps and samples, as they come, each checked."""
    rng = random.Random(who)
    while not until():
        data = own_data(rng, who)
        kind = rng.randrange(4)
        if kind == 0:
            check(data, (yield client.forward(data)))
        elif kind == 1:
            output = yield client.forward_backward_custom(data, fingerprint)
            check(data, output)
            sums = [float(row.sum()) for row in output.logprobs]
            assert output.metrics["who"] == who
            np.testing.assert_allclose(output.metrics["loss"], np.square(sums).mean(), rtol=1e-5)
        elif kind == 2:
            passed = client.forward_backward(data)
            stepped = client.optim_step(AdamParams())
            check(data, (yield passed))
            assert (yield stepped).metrics is None
        else:
            prompt = data[0].model_input
            [sequence] = (yield sampler.sample(prompt, 1, SamplingParams(max_tokens=1))).sequences
            assert sequence.tokens == prompt.to_ints()
            first = sequence.tokens[0]
            assert sequence.logprobs == [own_logprob(first, i) for i in range(len(sequence.tokens))]


@dataclass
class Report:
    """How it went."""

    seconds: float = 0.0
    requests: int = 0
    steps: int = 0
    errors: list[BaseException] = field(default_factory=list)
    warm: int = 0
    end: int = 0
    futures_left: int = 0

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s, {self.requests:,} requests, {self.steps:,} optimizer steps, "
            f"{len(self.errors)} errors; resident memory {self.warm / 2**20:.1f} MiB after the "
            f"warm-up, {self.end / 2**20:.1f} MiB at the end; {self.futures_left} futures left"
        )


class Crowd:
    """Threads and asyncio tasks that share a service client, and the models that they train."""

    def __init__(self, service: ServiceClient, threads: int, tasks: int, models: int) -> None:
        self._clients = [service.create_lora_training_client("tiny") for _ in range(models)]
        self._sampler = service.create_sampling_client(base_model="tiny")
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self._members = [
            threading.Thread(target=self._thread, args=(who,)) for who in range(threads)
        ]
        crowd = range(threads, threads + tasks)
        self._members.append(threading.Thread(target=lambda: asyncio.run(self._tasks(crowd))))

    def compile(self) -> None:
        """Have the objective compiled, which would hold up everybody."""
        self._clients[0].forward_backward_custom(
            own_data(random.Random(0), 0), fingerprint
        ).result()

    def start(self) -> None:
        """Let them live."""
        for member in self._members:
            member.start()

    def join(self) -> None:
        """Ask them to end, and wait until they have."""
        self._stop.set()
        for member in self._members:
            member.join()

    def _life(self, who: int) -> Life:
        client = self._clients[who % len(self._clients)]
        return life(client, self._sampler, who, self._stop.is_set)

    def _thread(self, who: int) -> None:
        try:
            mine, result = self._life(who), None
            with contextlib.suppress(StopIteration):
                while True:
                    result = mine.send(result).result(30)
        except BaseException as error:
            self.errors.append(error)

    async def _task(self, who: int) -> None:
        try:
            mine, result = self._life(who), None
            with contextlib.suppress(StopIteration):
                while True:
                    result = await asyncio.wait_for(mine.send(result), 30)
        except BaseException as error:
            self.errors.append(error)

    async def _tasks(self, crowd: range) -> None:
        await asyncio.gather(*(self._task(who) for who in crowd))


def resident() -> int:
    """The memory of this process, in bytes (Linux; elsewhere 0)."""
    try:
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0


def stress(
    seconds: float = 0.0,
    requests: int = 0,
    *,
    threads: int = 64,
    tasks: int = 64,
    models: int = 8,
) -> Report:
    """Let a crowd live for so long and for so many requests; a third of both is the warm-up."""
    trainer, report, before = Forgetful(), Report(), _futures()
    with serving(trainer) as address, ServiceClient(address, "tml-stress") as service:
        crowd = Crowd(service, threads, tasks, models)
        crowd.compile()
        idle = threading.Event()
        begin = time.monotonic()
        crowd.start()
        idle.wait(seconds / 3)
        trainer.wait_for(requests // 3)
        report.warm = resident()
        idle.wait(seconds * 2 / 3)
        trainer.wait_for(requests)
        report.end = resident()
        crowd.join()
        report.seconds = time.monotonic() - begin
        report.errors = crowd.errors
        report.requests = trainer.number
        report.steps = sum(trainer.steps.values())
        del crowd
        others = set(map(id, before))
        report.futures_left = sum(id(future) not in others for future in _futures())
    return report


def _futures() -> list[Any]:
    """All futures of this process, those of earlier tests among them."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), APIFuture)]
