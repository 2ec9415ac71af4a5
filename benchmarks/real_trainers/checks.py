"""One list of checks that every trainer is put through with mintjax's own client."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import optax

import mintjax
from benchmarks.real_trainers.trainers import API_KEY, Adapters, Running
from mintjax import objectives
from mintjax.client import RetryPolicy
from mintjax.step.reduction import amount

VOCAB_SIZE = 512
"""Of the base model, as :mod:`benchmarks.real_trainers.reference` writes it."""
LEAST_COSINE = 0.9999
LARGEST_NORM_ERROR = 1e-3
LOGPROB_ERROR = 1e-3
"""How far a logprob may be from torch's, in nats; trainers compute in float32."""

MANY_MODELS = 10
POLICY = RetryPolicy(
    deadline=60.0, first_contact=20.0, poll_timeout=30.0, silence=60.0, result=180.0, blocking=240.0
)
BUILTIN: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "dro": {"beta": 0.05},
}


class WrongError(AssertionError):
    """A trainer's answer is not what the check wants."""


class RefusedError(Exception):
    """The trainer does not serve this, and said so at once and in words."""


class DiffersError(Exception):
    """The trainer does it in a way of its own, which is known and told."""


class Torch:
    """The reference, in a process of its own.

    Args:
        python: of its environment.
        model: the folder of the base model.
    """

    def __init__(self, python: Path, model: Path) -> None:
        script = Path(__file__).with_name("reference.py")
        self._process = subprocess.Popen(
            [str(python), str(script), "serve", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lock = threading.Lock()
        self.version = self._line()["ready"]

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reference ended with {self._process.wait()}")
        return json.loads(line)

    def __call__(
        self, adapters: Adapters, data: Sequence[mintjax.Datum], loss: str, **settings: Any
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Computes a loss, the logprobs, and the gradient by each adapter."""
        with self._lock, tempfile.TemporaryDirectory() as directory:
            given, got = Path(directory) / "adapters.npz", Path(directory) / "gradient.npz"
            np.savez(given, **adapters.weights)
            job = {
                "adapters": str(given),
                "gradient": str(got),
                "scale": adapters.scale,
                "data": [_plain(datum) for datum in data],
                "loss": loss,
                "settings": settings,
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._line()
            with np.load(got) as arrays:
                return answer, {name: arrays[name] for name in arrays.files}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class State:
    """What the checks of one trainer share.

    Args:
        running: the trainer.
        torch: the reference.
        service: a client of it.
        model: a model in training, and adapters that are not zero.
        names: for checkpoints.
    """

    running: Running
    torch: Torch
    service: mintjax.ServiceClient
    model: Any = None
    reduction: Any = None
    names: Iterator[int] = field(default_factory=itertools.count)

    def adapters(self, model: Any) -> Adapters:
        """Saves a model and reads what was saved."""
        save = getattr(model, self.running.trainer.reads)
        saved = save(f"read-{next(self.names)}").result()
        return self.running.adapters(saved.path)


def client(running: Running) -> mintjax.ServiceClient:
    """A client of a running trainer, which gives up in minutes."""
    return mintjax.ServiceClient(running.base_url, API_KEY, retry_policy=POLICY)


def pairs(seed: int, number: int = 3) -> list[mintjax.Datum]:
    """Draws pairs of answers, with every column that a loss reads; weights of 0 among others."""
    rng = np.random.default_rng(seed)
    data: list[mintjax.Datum] = []
    for _ in range(2 * number):
        length = int(rng.integers(5, 24))
        tokens = rng.integers(1, 250, length + 1).tolist()
        weights = np.where(rng.random(length) < 0.3, 0.0, rng.uniform(0.5, 1.5, length))
        weights[-1] = 1.0
        data.append(_datum(tokens, weights=weights.astype(np.float32)))
    return data


def with_policy_columns(
    data: Sequence[mintjax.Datum], logprobs: Sequence[np.ndarray], seed: int
) -> list[mintjax.Datum]:
    """Puts sampling logprobs near the model's own, and advantages, in place of the weights."""
    rng = np.random.default_rng(seed)
    return [
        _with(
            datum,
            logprobs=(row + rng.normal(0, 0.3, row.shape)).astype(np.float32),
            advantages=rng.normal(0, 1, row.shape).astype(np.float32),
        )
        for datum, row in zip(data, logprobs, strict=True)
    ]


def with_reference(
    data: Sequence[mintjax.Datum], logprobs: Sequence[np.ndarray], seed: int
) -> list[mintjax.Datum]:
    """Puts a reference model's logprobs beside the weights."""
    rng = np.random.default_rng(seed)
    return [
        _with(
            datum,
            weights=datum.loss_fn_inputs["weights"],
            ref_logprobs=(row + rng.normal(0, 0.2, row.shape)).astype(np.float32),
        )
        for datum, row in zip(data, logprobs, strict=True)
    ]


def gradient_of_update(
    before: Adapters, after: Adapters, adam_scale: float
) -> dict[str, np.ndarray]:
    """Finds the gradient that a step of Adam without memory has followed.

    With ``learning_rate = eps = s`` the update is ``u = s * g / (|g| + s)``, so ``g = s * u / (s -
    |u|)``; with ``s = 1e14`` it is ``u``.
    """
    updates = {name: before.weights[name] - after.weights[name] for name in before.weights}
    return {name: adam_scale * u / (adam_scale - np.abs(u)) for name, u in updates.items()}


def tied(
    weights: Mapping[str, np.ndarray], grads: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Adds up the gradients of adapters that are one parameter to the trainer.

    SkyRL 0.4 fuses the projections that read one input, so query, key and value have one ``A``,
    and so have gate and up. A checkpoint holds a copy for each.

    Returns:
        The gradients, in which each copy has the parameter's own.
    """
    same: dict[bytes, list[str]] = {}
    for name, value in weights.items():
        own = name.encode() if not np.any(value) else value.tobytes()
        same.setdefault(own, []).append(name)
    return {
        name: sum((grads[other] for other in names), np.zeros_like(grads[name]))
        for names in same.values()
        for name in names
    }


def compare(measured: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> str:
    """Compares two gradients.

    Returns:
        The cosine between them, and by how much the norm differs.

    Raises:
        WrongError: they differ by more than is allowed.
    """
    names = sorted(expected)
    if sorted(measured) != names:
        raise WrongError(f"adapters of {sorted(set(measured) ^ set(names))}")
    one, two = (np.concatenate([x[name].ravel() for name in names]) for x in (measured, expected))
    lengths = float(np.linalg.norm(one)), float(np.linalg.norm(two))
    if not (np.isfinite(lengths[0]) and lengths[0] > 0):
        raise WrongError(f"the measured gradient has norm {lengths[0]}")
    cosine, ratio = float(one @ two) / (lengths[0] * lengths[1]), lengths[0] / lengths[1]
    words = f"cosine {cosine:.8f}, norm {ratio - 1:+.1e}"
    if not (cosine >= LEAST_COSINE and abs(ratio - 1) <= LARGEST_NORM_ERROR):
        raise WrongError(words)
    return words


@contextmanager
def adapted(state: State, seed: int = 1) -> Iterator[Any]:
    """Makes a model whose adapters are not zero and still small, and unloads it at the end."""
    base, data = state.running.base_model, _only(pairs(0), "weights")
    with state.service.create_lora_training_client(base, rank=8, seed=seed) as model:
        _ordinary_step(model, data)
        yield model


def held_against_torch(
    state: State,
    model: Any,
    passes: Callable[[Any], object],
    data: Sequence[mintjax.Datum],
    loss: str,
    step: Callable[[Any], object] | None = None,
    factor: float = 1.0,
    **settings: Any,
) -> str:
    """Takes one step whose update is the gradient, and compares it with torch's.

    Args:
        state: of the trainer.
        model: to step with.
        passes: accumulates the gradient.
        data: of all passes together.
        loss: in :mod:`benchmarks.real_trainers.reference`.
        step: takes the optimizer step, if not this.
        factor: by which the loss is multiplied.
        settings: of the loss.
    """
    scale = state.running.trainer.adam_scale
    before = state.adapters(model)
    passes(model)
    if step is None:
        model.optim_step(
            mintjax.AdamParams(learning_rate=scale, beta1=0.0, beta2=0.0, eps=scale)
        ).result()
    else:
        step(model)
    after = state.adapters(model)
    _, expected = state.torch(before, data, loss, **settings)
    expected = tied(before.weights, {name: factor * grad for name, grad in expected.items()})
    return compare(gradient_of_update(before, after, scale), expected)


def capabilities(state: State) -> str:
    """The base models that the trainer offers can be read."""
    offered = [one.model_name for one in state.service.get_server_capabilities().supported_models]
    if not offered:
        raise WrongError("it offers nothing")
    if state.running.base_model not in offered:
        return f"{len(offered)} names, without this model's"
    return "yes"


def probe(state: State) -> str:
    """The trainer's reduction can be measured."""
    state.reduction = state.service.probe(state.running.base_model)
    return str(state.reduction)


def create(state: State) -> str:
    """A model is made, and trains by one ordinary step, so that no adapter is zero any more."""
    state.model = state.service.create_lora_training_client(
        state.running.base_model, rank=8, seed=1
    )
    _ordinary_step(state.model, _only(pairs(0), "weights"))
    info = state.model.get_info()
    if info.model_data.model_name != state.running.base_model:
        raise WrongError(f"get_info names {info.model_data.model_name!r}")
    return "yes"


def forward(state: State) -> str:
    """The logprobs are torch's, through the same base model and adapters."""
    data = pairs(1)
    rows = state.model.forward(_only(data, "weights"), "cross_entropy").result().logprobs
    if state.running.trainer.toy:
        return "shapes only"
    answer, _ = state.torch(
        state.adapters(state.model), data, "cross_entropy", divisors=[1.0] * len(data)
    )
    error = _largest_difference(rows, answer["logprobs"])
    if error > LOGPROB_ERROR:
        raise WrongError(f"off by {error:.1e} nats")
    return _off(error)


def by_name(name: str) -> Callable[[State], str]:
    """Makes the check of a loss that the trainer computes, with its own reduction."""

    def check(state: State) -> str:
        """The trainer's loss has the gradient that its reduction says, or is refused in words."""
        data, columns = pairs(2), ("weights",)
        with adapted(state) as model:
            if name != "cross_entropy":
                data = with_policy_columns(data, model.logprobs(_only(data, "weights")), 3)
                columns = ("logprobs", "advantages")
            sent = _only(data, *columns)

            def passes(model: Any) -> None:
                began = time.perf_counter()
                try:
                    model.forward_backward(sent, name, BUILTIN[name] or None).result()
                except mintjax.errors.APIError as error:
                    if time.perf_counter() - began < 10:
                        raise RefusedError(str(error)) from None
                    raise

            if state.running.trainer.toy:
                passes(model)
                return "served, a toy"
            settings = {**_settings(name), "divisors": _divisors(state, sent)}
            return held_against_torch(state, model, passes, sent, name, **settings)

    return check


def gspo(state: State) -> str:
    """GSPO by name is served, or refused in words; trainers differ in what it is."""
    with state.service.create_lora_training_client(state.running.base_model, rank=8) as model:
        data = pairs(2)
        data = with_policy_columns(data, model.logprobs(_only(data, "weights")), 3)
        began = time.perf_counter()
        try:
            model.forward_backward(_only(data, "logprobs", "advantages"), "gspo").result()
        except mintjax.errors.APIError as error:
            if time.perf_counter() - began > 10:
                raise
            raise RefusedError(str(error)) from None
    return "served, not compared"


def as_objective(name: str) -> Callable[[State], str]:
    """Makes the check of an objective that is computed here."""

    def check(state: State) -> str:
        """The parameter gradient of the objective is torch's."""
        with adapted(state) as model:
            data, objective, settings = _objective(model, name)

            def passes(model: Any) -> None:
                model.forward_backward_custom(data, objective).result()

            return held_against_torch(state, model, passes, data, name, **settings)

    return check


def accumulation(state: State) -> str:
    """Three custom passes before one optimizer step give the gradient of their sum."""
    data = pairs(5, number=6)
    objective = objectives.cross_entropy()
    parts = [data[:2], data[2:8], data[8:]]

    def own(batch: Any, logprobs: Any) -> tuple[Any, dict[str, Any]]:
        return objective(batch, logprobs)

    def passes(model: Any) -> None:
        futures = [
            model.forward_backward_custom(part, own, datums_in_step=len(data)) for part in parts
        ]
        for future in futures:
            future.result()

    divisors = [1.0] * len(data)
    with adapted(state) as model:
        return held_against_torch(state, model, passes, data, "cross_entropy", divisors=divisors)


def two_clients(state: State) -> str:
    """Two clients, which nobody has told of a reduction, train models at the same time."""
    found: list[str | BaseException] = []

    def one(seed: int) -> None:
        try:
            with client(state.running) as service:
                mine = replace(state, service=service)
                data, routes = pairs(seed), []

                def passes(model: Any) -> None:
                    done = model.forward_backward_custom(data, objectives.bradley_terry()).result()
                    routes.append(done.route)

                with adapted(mine, seed) as model:
                    held = held_against_torch(mine, model, passes, data, "bradley_terry")
                    found.append(f"{held} ({routes[0]})")
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=one, args=(seed,), daemon=True) for seed in (21, 22)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    if len(found) < 2:
        raise WrongError("a client did not come to its end")
    return "; ".join(map(str, found))


def schedules(state: State) -> str:
    """A schedule of an objective is read at the step that is given."""
    schedule = optax.linear_schedule(0.5, 2.5, 10)
    with adapted(state) as model:
        data, dpo, settings = _objective(model, "dpo")
        objective = objectives.weighted_sum({"dpo": dpo}, {"dpo": schedule})

        def passes(model: Any) -> None:
            model.forward_backward_custom(data, objective, step=5).result()

        factor = float(schedule(5))
        return held_against_torch(state, model, passes, data, "dpo", factor=factor, **settings)


def bridge(state: State) -> str:
    """The remote model as a function under ``jax.jit``, and its optimizer as optax's."""
    data = pairs(7)
    objective, scale = objectives.bradley_terry(), state.running.trainer.adam_scale
    with adapted(state) as model:
        remote = mintjax.remote_logprobs(model, data)
        optimizer = mintjax.remote_optimizer(
            model, learning_rate=scale, beta1=0.0, beta2=0.0, eps=scale
        )
        kept: dict[str, Any] = {"state": optimizer.init(remote.params)}
        value_and_grad = jax.jit(
            jax.value_and_grad(lambda p: objective(data, remote(p)), has_aux=True)
        )

        def passes(model: Any) -> None:
            _, kept["grads"] = value_and_grad(remote.params)
            jax.block_until_ready(kept["grads"])

        def step(model: Any) -> None:
            updates, _ = optimizer.update(kept["grads"], kept["state"], remote.params)
            jax.block_until_ready(optax.apply_updates(remote.params, updates))

        return held_against_torch(state, model, passes, data, "bradley_terry", step)


def save_and_load(state: State) -> str:
    """A model that is loaded again is the one that was saved."""
    data = _only(pairs(8), "weights")
    saved = state.model.save_state(f"kept-{next(state.names)}").result().path
    before = state.model.forward(data, "cross_entropy").result().logprobs
    _ordinary_step(state.model, data)
    moved = _largest_difference(
        before, state.model.forward(data, "cross_entropy").result().logprobs
    )
    if not moved > 1e-3:
        raise WrongError(f"an optimizer step moved the logprobs by {moved:.1e}")
    try:
        state.model.load_state(saved).result()
    except mintjax.errors.BadRequestError as error:
        raise RefusedError(str(error)) from None
    after = state.model.forward(data, "cross_entropy").result().logprobs
    error = _largest_difference(before, after)
    if error > 1e-5:
        raise WrongError(f"loaded logprobs are off by {error:.1e} nats")
    return _off(error)


def from_state(state: State) -> str:
    """A new model is made of a checkpoint, with the optimizer's state."""
    data = _only(pairs(8), "weights")
    saved = state.model.save_state(f"kept-{next(state.names)}").result().path
    before = state.model.forward(data, "cross_entropy").result().logprobs
    make = state.service.create_training_client_from_state_with_optimizer
    with make(saved) as model:
        after = model.forward(data, "cross_entropy").result().logprobs
        error = _largest_difference(before, after)
    if error > 1e-5:
        raise WrongError(f"loaded logprobs are off by {error:.1e} nats")
    return _off(error)


def sample(state: State) -> str:
    """Samples have as many tokens as asked for, with logprobs that a forward pass gives too."""
    sampler = state.model.save_weights_and_get_sampling_client()
    prompt = list(b"The sky is ")

    def error_with(top_k: int) -> float:
        params = mintjax.SamplingParams(max_tokens=8, temperature=1.0, top_k=top_k, seed=3)
        answer = sampler.sample(mintjax.ModelInput.from_ints(prompt), 2, params).result()
        if any(not one.tokens for one in answer.sequences):
            raise WrongError("an empty sample")
        if state.running.trainer.canned or state.running.trainer.toy:
            return 0.0
        rows = state.model.logprobs([_datum(prompt + list(s.tokens)) for s in answer.sequences])
        ends = [row[len(prompt) - 1 :] for row in rows]
        return _largest_difference(ends, [one.logprobs for one in answer.sequences])

    error = error_with(-1)
    if state.running.trainer.canned or state.running.trainer.toy:
        return "2 samples, canned"
    if error > 0.02 and error_with(VOCAB_SIZE) < 0.02:
        raise DiffersError(
            f"logprobs of samples with top_k=-1 are off by {error:.1f} nats, and right with "
            f"top_k={VOCAB_SIZE}: it keeps the 50 likeliest tokens, as transformers do by default"
        )
    if error > 0.02:
        raise WrongError(f"logprobs of samples are off a forward pass by {error:.1e} nats")
    return f"logprobs {_off(error)}"


def prompt_logprobs(state: State) -> str:
    """``compute_logprobs`` gives what a forward pass gives."""
    sampler = state.model.save_weights_and_get_sampling_client()
    tokens = list(b"Two and two are four.")
    found = sampler.compute_logprobs(mintjax.ModelInput.from_ints(tokens)).result()
    if state.running.trainer.canned or state.running.trainer.toy:
        return f"{len(found)} logprobs, canned"
    row = state.model.logprobs([_datum(tokens)])[0]
    error = _largest_difference([row], [found[1:]])
    if error > 0.02:
        raise WrongError(f"off by {error:.1e} nats")
    return _off(error)


def unknown_token(state: State) -> str:
    """A token beyond the vocabulary is an error within a minute, and the model stays usable."""
    data = pairs(9, number=1)
    bad = [_datum([1, 2, 3, 100_000], weights=np.ones(3, np.float32))]
    began = time.perf_counter()
    try:
        state.model.forward(_only(bad, "weights"), "cross_entropy").result()
    except mintjax.errors.MintjaxError as error:
        words = str(error).splitlines()[0][:160]
    else:
        words = "accepted in silence"
    seconds = time.perf_counter() - began
    state.model.forward(_only(data, "weights"), "cross_entropy").result()
    if seconds > 60:
        raise WrongError(f"after {seconds:.0f} s: {words}")
    return f"{words} ({seconds:.1f} s)"


def no_room(state: State) -> str:
    """A trainer that has no room for another model says so in words, and has room again later."""
    made: list[Any] = []
    try:
        for _ in range(MANY_MODELS):
            made.append(state.service.create_lora_training_client(state.running.base_model, rank=8))
        words = f"room for {MANY_MODELS} more"
    except mintjax.errors.APIError as error:
        words = str(error).splitlines()[0]
    for model in made:
        model.unload().result(60)
    state.service.create_lora_training_client(state.running.base_model, rank=8).unload().result(60)
    return words


def demo(state: State) -> str:
    """``mintjax demo --base-url`` runs to its end."""
    command = [sys.executable, "-m", "mintjax", "demo", "--json", "--steps", "2"]
    command += ["--batch-pairs", "2", "--base-url", state.running.base_url]
    command += ["--base-model", state.running.base_model]
    environment = {**os.environ, "MINT_API_KEY": API_KEY}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise WrongError("; ".join(words[-4:])[-400:])
    end = json.loads(done.stdout.splitlines()[-1])
    return f"loss {end['loss_first']:.3f} to {end['loss_last']:.3f}"


def unload(state: State) -> str:
    """A model is given up, so that its place is free."""
    state.model.unload().result(30)
    return "yes"


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Args:
        name: of the line.
        run: raises if the check fails, and returns what to show.
        real: it needs a real model, so a toy is left out.
    """

    name: str
    run: Callable[[State], str]
    real: bool = False


CHECKS: list[Check] = [
    Check("capabilities", capabilities),
    Check("probe", probe, real=True),
    Check("create_model, a step, get_info", create),
    Check("forward", forward),
    *(Check(f"`{name}` by name, gradient", by_name(name)) for name in BUILTIN),
    Check("`gspo` by name", gspo),
    Check("pairwise (Bradley-Terry), gradient", as_objective("bradley_terry"), real=True),
    Check("DPO, gradient", as_objective("dpo"), real=True),
    Check("a loss of one's own, gradient", as_objective("mean_square"), real=True),
    *(
        Check(f"`{name}` as an objective, gradient", as_objective(name), real=True)
        for name in BUILTIN
    ),
    Check("three passes before a step, gradient", accumulation, real=True),
    Check("a schedule, gradient", schedules, real=True),
    Check("the bridge under `jit`, gradient", bridge, real=True),
    Check("two clients at once, gradients", two_clients, real=True),
    Check("save_state, load_state", save_and_load),
    Check("a model from a checkpoint", from_state),
    Check("sample", sample),
    Check("compute_logprobs", prompt_logprobs),
    Check("a token beyond the vocabulary", unknown_token),
    Check("more models than there is room for", no_room),
    Check("`mintjax demo --base-url`", demo),
    Check("unload_model", unload),
]


@dataclass(frozen=True)
class Row:
    """The outcome of a check.

    Args:
        trainer: which.
        check: which.
        outcome: ``"yes"``, ``"refused"`` (the trainer's own choice, told at once), ``"differs"``
            (the trainer's own way), ``"no"``, or ``"left out"``.
        detail: what was measured, or why not.
        seconds: how long it took.
    """

    trainer: str
    check: str
    outcome: str
    detail: str
    seconds: float


def run(state: State, only: Sequence[str] = (), told: Callable[[Row], object] = print) -> list[Row]:
    """Runs the checks, one after the other; one that fails does not keep the others from it."""
    rows: list[Row] = []
    for check in CHECKS:
        if (
            only
            and not any(word in check.name for word in only)
            and check.run not in (probe, create)
        ):
            continue
        began = time.perf_counter()
        if check.real and state.running.trainer.toy:
            outcome, detail = "left out", state.running.trainer.toy
        elif state.running.has_ended():
            outcome, detail = "no", "the trainer has ended, or was ended because its time was up"
        else:
            try:
                outcome, detail = "yes", check.run(state)
            except RefusedError as refusal:
                outcome, detail = "refused", str(refusal)
            except DiffersError as difference:
                outcome, detail = "differs", str(difference)
            except Exception as error:
                outcome, detail = "no", f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - began
        name = state.running.trainer.name
        rows.append(Row(name, check.name, outcome, " ".join(detail.split())[:400], seconds))
        told(rows[-1])
    return rows


def _objective(model: Any, name: str) -> tuple[list[mintjax.Datum], Any, dict[str, Any]]:
    data = pairs(4)
    if name == "bradley_terry":
        return data, objectives.bradley_terry(), {}
    if name == "mean_square":
        return data, _mean_square, {}
    logprobs = model.logprobs(_only(data, "weights"))
    if name == "dpo":
        return with_reference(data, logprobs, 5), objectives.dpo(beta=0.2), {"beta": 0.2}
    settings = {**_settings(name), "divisors": [1.0] * len(data)}
    if name != "cross_entropy":
        data = with_policy_columns(data, logprobs, 5)
    return data, getattr(objectives, name)(**BUILTIN[name]), settings


def _mean_square(batch: Any, logprobs: Any) -> tuple[Any, dict[str, Any]]:
    """A loss that no trainer has."""
    return (logprobs * logprobs).mean().mean(), {}


def _settings(name: str) -> dict[str, float]:
    words = {"clip_low_threshold": "low", "clip_high_threshold": "high"}
    return {words.get(key, key): value for key, value in BUILTIN[name].items()}


def _divisors(state: State, data: Sequence[mintjax.Datum]) -> list[float]:
    """The trainer's divisors of each datum's loss, as they were measured."""
    ones = [np.ones(len(datum.loss_fn_inputs["target_tokens"])) for datum in data]
    weights = [
        np.asarray(datum.loss_fn_inputs.get("weights", row))
        for datum, row in zip(data, ones, strict=True)
    ]
    found = state.reduction
    whole = amount(found.per_request, weights) * amount(found.per_step, weights)
    return [whole * amount(found.per_sequence, [row]) for row in weights]


def _ordinary_step(model: Any, data: Sequence[mintjax.Datum]) -> None:
    model.forward_backward(data, "cross_entropy").result()
    model.optim_step(mintjax.AdamParams(learning_rate=1e-2)).result()


def _datum(tokens: Sequence[int], **columns: np.ndarray) -> mintjax.Datum:
    inputs = {"target_tokens": list(tokens[1:]), **columns}
    return mintjax.Datum(mintjax.ModelInput.from_ints(list(tokens[:-1])), inputs)


def _with(datum: mintjax.Datum, **columns: Any) -> mintjax.Datum:
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], **columns}
    return mintjax.Datum(datum.model_input, inputs)


def _only(data: Sequence[mintjax.Datum], *columns: str) -> list[mintjax.Datum]:
    return [
        _with(datum, **{name: datum.loss_fn_inputs[name] for name in columns}) for datum in data
    ]


def _plain(datum: mintjax.Datum) -> dict[str, Any]:
    columns = {
        name: np.asarray(value).tolist()
        for name, value in datum.loss_fn_inputs.items()
        if name != "target_tokens"
    }
    targets = np.asarray(datum.loss_fn_inputs["target_tokens"]).tolist()
    return {"tokens": datum.model_input.to_ints(), "targets": targets, **columns}


def _off(error: float) -> str:
    return f"off by {error:.0e} nats" if error else "the same to the bit"


def _largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    both = list(zip(ours, theirs, strict=True))
    if any(len(one) != len(other) for one, other in both):
        raise WrongError(f"lengths {[(len(one), len(other)) for one, other in both]}")
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in both)
