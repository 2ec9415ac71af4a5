"""The main job from end to end: preference pairs in a file to a model that prefers as they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import optax

from mintjax import objectives
from mintjax.client import ServiceClient, TrainingClient
from mintjax.errors import DataError, MintjaxError
from mintjax.gradients import Objective, loss_and_metrics
from mintjax.types import AdamParams, Datum, ModelInput

Encode = Callable[[str], list[int]]


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt and two answers to it.

    Args:
        prompt: what was asked.
        chosen: the better answer.
        rejected: the worse one.
    """

    prompt: str
    chosen: str
    rejected: str


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the training.

    Args:
        loss: ``"bradley_terry"``, or ``"dpo"`` against the untrained model.
        steps: optimizer steps.
        batch_pairs: pairs in a step.
        learning_rate: its peak; it rises over the first tenth of the steps and falls to zero.
        rank: of the adapters.
        seed: of the adapters, the split and the batches.
        heldout: the share of the pairs that is kept from training.
    """

    loss: Literal["bradley_terry", "dpo"] = "bradley_terry"
    steps: int = 60
    batch_pairs: int = 16
    learning_rate: float = 3e-3
    rank: int = 32
    seed: int = 0
    heldout: float = 0.25


class Step(msgspec.Struct, kw_only=True):
    """One step.

    Args:
        step: its number, from 1.
        loss: before the update, in nats, mean over the pairs of the batch.
        pair_accuracy: the share of the batch's pairs whose chosen answer scores higher.
        mean_margin: by how much, in nats (for dpo times beta).
        seconds: from submission until the weights were updated.
    """

    step: int
    loss: float
    pair_accuracy: float
    mean_margin: float
    seconds: float


class Summary(msgspec.Struct, kw_only=True):
    """The results of the training.

    Args:
        loss_first: the first step's loss.
        loss_last: the last step's.
        train_accuracy_before: pair accuracy of the untrained model on the pairs trained with.
        train_accuracy_after: that of the trained one.
        heldout_accuracy_before: the same on pairs that were kept from training.
        heldout_accuracy_after: the same.
        train_pairs: how many.
        heldout_pairs: how many.
        client_share: the part of the steps' time that went into loss, gradient and encoding here.
        seconds: for everything.
        summary: tells this line from those of the steps.
    """

    loss_first: float
    loss_last: float
    train_accuracy_before: float
    train_accuracy_after: float
    heldout_accuracy_before: float
    heldout_accuracy_after: float
    train_pairs: int
    heldout_pairs: int
    client_share: float
    seconds: float
    summary: Literal[True] = True


def packaged_pairs() -> Path:
    """Finds the file of pairs that comes with the package."""
    return Path(str(files("mintjax") / "data" / "preferences.jsonl"))


def read_pairs(path: Path) -> list[Pair]:
    """Reads pairs from JSON lines: ``{"prompt": ..., "chosen": ..., "rejected": ...}``.

    Args:
        path: the file, in UTF-8; blank lines are skipped.

    Raises:
        DataError: a line is not such an object; the message gives its number. Nothing is returned
            of a file that has one. Also if there are fewer than four pairs.
        OSError: the file cannot be read.
    """
    pairs: list[Pair] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            pair = msgspec.json.decode(line, type=Pair)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        if not (pair.prompt and pair.chosen and pair.rejected):
            raise DataError(f"{path}, line {number}: prompt, chosen and rejected must not be empty")
        if pair.chosen == pair.rejected:
            raise DataError(f"{path}, line {number}: chosen and rejected are the same")
        pairs.append(pair)
    if len(pairs) < 4:
        raise DataError(f"{path} has {len(pairs)} pairs; to train and to hold some out takes four")
    return pairs


def split(pairs: Sequence[Pair], settings: Settings) -> tuple[list[Pair], list[Pair]]:
    """Shuffles by the seed, and parts into what is trained with and what is held out."""
    order = np.random.default_rng(settings.seed).permutation(len(pairs))
    held = max(1, round(len(pairs) * settings.heldout))
    return [pairs[i] for i in order[held:]], [pairs[i] for i in order[:held]]


def as_data(pairs: Sequence[Pair], encode: Encode) -> list[Datum]:
    """Pairs as datums, chosen and rejected in turn; only the answer's tokens have weight."""
    return [
        _datum(encode(f"{pair.prompt}\n"), encode(f"{answer}\n"))
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]


def _datum(prompt: list[int], answer: list[int]) -> Datum:
    tokens = prompt + answer
    weights = np.zeros(len(tokens) - 1, np.float32)
    weights[len(prompt) - 1 :] = 1
    return Datum(
        ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights}
    )


def encoder(model: TrainingClient) -> Encode:
    """Finds the tokenizer of a model: bytes for the embedded trainer's, else the one that it names.

    Trainers that name none take the base model's name for it, as SkyRL does. A name that is a
    folder of this machine is read from there, else it is asked of the Hugging Face hub.

    Raises:
        MintjaxError: there is no such tokenizer, or the package ``tokenizers`` is missing.
    """
    info = model.get_info().model_data
    name = info.tokenizer_id or info.model_name
    if name.endswith("mintjax/bytes"):
        return lambda text: list(text.encode())
    try:
        from tokenizers import Tokenizer  # pyright: ignore
    except ModuleNotFoundError:
        raise MintjaxError(
            f"this base model needs the tokenizer {name!r}: pip install tokenizers"
        ) from None
    file = Path(name) / "tokenizer.json"
    try:
        read = Tokenizer.from_file if file.is_file() else Tokenizer.from_pretrained  # pyright: ignore
        tokenizer = read(str(file) if file.is_file() else name)  # pyright: ignore
    except Exception as error:  # the package raises plain ones
        raise MintjaxError(f"no tokenizer of {name!r} can be read: {error}") from None
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # pyright: ignore


def run(
    service: ServiceClient, base_model: str, pairs: Sequence[Pair], settings: Settings
) -> Iterator[Step | Summary]:
    """Trains, one step at a time, and sums up.

    Args:
        service: a trainer.
        base_model: what to start from.
        pairs: at least four.
        settings: how.

    Yields:
        A :class:`Step` for each, then the :class:`Summary`.
    """
    began = time.perf_counter()
    objective: Objective = getattr(objectives, settings.loss)()
    with service.create_lora_training_client(
        base_model, settings.rank, seed=settings.seed
    ) as model:
        encode = encoder(model)
        train, held = (as_data(part, encode) for part in split(pairs, settings))
        if settings.loss == "dpo":
            train, held = _with_reference(model, train), _with_reference(model, held)
        before = [_accuracy(model, part, objective) for part in (train, held)]
        steps: list[Step] = []
        share: list[float] = []
        for step, client_seconds in _train(model, train, objective, settings):
            steps.append(step)
            share.append(client_seconds)
            yield step
        after = [_accuracy(model, part, objective) for part in (train, held)]
    yield Summary(
        loss_first=steps[0].loss,
        loss_last=steps[-1].loss,
        train_accuracy_before=before[0],
        train_accuracy_after=after[0],
        heldout_accuracy_before=before[1],
        heldout_accuracy_after=after[1],
        train_pairs=len(train) // 2,
        heldout_pairs=len(held) // 2,
        client_share=sum(share) / sum(step.seconds for step in steps),
        seconds=time.perf_counter() - began,
    )


def _train(
    model: TrainingClient, train: list[Datum], objective: Objective, settings: Settings
) -> Iterator[tuple[Step, float]]:
    schedule: Any = optax.warmup_cosine_decay_schedule(
        settings.learning_rate / 10,
        settings.learning_rate,
        warmup_steps=max(1, settings.steps // 10),
        decay_steps=max(2, settings.steps),
    )
    batches = _batches(len(train) // 2, settings)
    for number in range(1, settings.steps + 1):
        chosen = next(batches)
        data = [train[2 * i + side] for i in chosen for side in (0, 1)]
        start = time.perf_counter()
        custom = model.forward_backward_custom(data, objective)
        update = model.optim_step(AdamParams(learning_rate=float(schedule(number - 1))))
        output = custom.result()
        update.result()
        metrics = output.metrics
        step = Step(
            step=number,
            loss=metrics["loss"],
            pair_accuracy=metrics["pair_accuracy"],
            mean_margin=metrics["mean_margin"],
            seconds=time.perf_counter() - start,
        )
        yield step, output.client_seconds


def _batches(pairs: int, settings: Settings) -> Iterator[list[int]]:
    """Numbers of pairs, each epoch in an order of its own."""
    rng = np.random.default_rng(settings.seed + 1)
    size = min(settings.batch_pairs, pairs)
    waiting: list[int] = []
    while True:
        if len(waiting) < size:
            waiting += rng.permutation(pairs).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def _with_reference(model: TrainingClient, data: list[Datum]) -> list[Datum]:
    logprobs = model.forward(data, "cross_entropy").result().logprobs
    return [
        Datum(datum.model_input, {**datum.loss_fn_inputs, "ref_logprobs": row})
        for datum, row in zip(data, logprobs, strict=True)
    ]


def _accuracy(model: TrainingClient, data: list[Datum], objective: Objective) -> float:
    sent = [
        Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in ("target_tokens", "weights")})
        for d in data
    ]
    logprobs = model.forward(sent, "cross_entropy").result().logprobs
    return loss_and_metrics(objective, data, logprobs)[1]["pair_accuracy"]
