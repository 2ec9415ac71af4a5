"""The trainer itself, without HTTP: models, their accumulated gradients, optimizer, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import optax  # pyright: ignore[reportMissingTypeStubs]

from mintjax.errors import DataError, NonFiniteError, NotFoundError
from mintjax.local import checkpoints, compute, loss_fns, model, optimizer, sampling
from mintjax.local.checkpoints import CheckpointPath, Description
from mintjax.local.jax_settings import own_settings
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.local.model import BASE_MODELS, ModelConfig, Weights
from mintjax.local.sampling import NOTHING, Wanted
from mintjax.local.slices import Slices, each_under, finish
from mintjax.local.store import NO_NOTE, Note, Store
from mintjax.local.tokenizer import VOCAB_SIZE
from mintjax.step.carrier import carrier
from mintjax.step.reduction import SUM, Reduction, amount
from mintjax.tensors import TensorData
from mintjax.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """One model in training. A step makes a new one, so that a step that fails changes nothing.

    Args:
        config: the base model.
        lora_config: as the client asked.
        lora: the adapters.
        optimizer: optax's state.
        gradient: accumulated by sum since the last optimizer step, in the layout of ``lora``.
        num_datums: how many datums are in ``gradient``.
        amount: the amount of ``Reduction.per_step`` in it, by which it is divided in the end.
    """

    config: ModelConfig
    lora_config: LoraConfig
    lora: Weights
    optimizer: Any
    gradient: Weights
    num_datums: int = 0
    amount: float = 0.0


class Engine:
    """The embedded trainer as a Python object.

    One thread at a time may use it; :func:`mintjax.local.trainer` and
    :func:`mintjax.local.running_server` see to that.

    Args:
        reduction: what losses are divided by. ``Reduction("weights", per_step="datums")`` is that
            of SkyRL's JAX backend, ``Reduction(per_request="weights")`` that of hatchery. Sums of
            weights of a datum are at least 1e-9 there, all other amounts at least 1.
        directory: where checkpoints are kept; a temporary one, removed by :meth:`close`, if None.
    """

    def __init__(self, *, reduction: Reduction = SUM, directory: str | Path | None = None) -> None:
        self.reduction = reduction
        self.store = Store(directory)
        self._models: dict[str, Model] = {}
        self._sampler: tuple[str, ModelConfig, Weights] | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets every model, and removes the checkpoints of a temporary directory."""
        self._models.clear()
        self._sampler = None
        self.store.close()

    @property
    def directory(self) -> Path:
        """The folder of the checkpoints."""
        return self.store.directory

    @property
    def models(self) -> Mapping[str, Model]:
        """The models in training, by id."""
        return MappingProxyType(self._models)

    def model(self, model_id: str) -> Model:
        """Finds a model by its ``model_id``.

        Raises:
            NotFoundError: there is none of that id.
        """
        try:
            return self._models[model_id]
        except KeyError:
            raise NotFoundError(404, f"model_id: there is no model {model_id!r}") from None

    @own_settings()
    def gradient(self, model_id: str) -> Weights:
        """Returns the gradient that the next step of ``model_id`` would use, before clipping.

        Raises:
            NotFoundError: there is no such model.
        """
        state = self.model(model_id)
        return optimizer.divided(state.gradient, self._divisor(state))

    @own_settings()
    def create_model(
        self, base_model: str, lora_config: LoraConfig, model_id: str | None = None
    ) -> str:
        """Makes a model with fresh adapters, from what :func:`check_create` let pass.

        Args:
            base_model: one of ``mintjax.local.BASE_MODELS``.
            lora_config: the adapters, and the seed of their first values.
            model_id: a name that no model has yet; one is made up if None.

        Returns:
            Its id.
        """
        config = BASE_MODELS[base_model]
        model_id = model_id or f"model-{uuid.uuid4().hex}"
        lora = model.lora_weights(config, lora_config)
        self._models[model_id] = _fresh(config, lora_config, lora, optimizer.init(lora))
        return model_id

    def unload_model(self, model_id: str) -> None:
        """Forgets the model ``model_id``; its checkpoints stay.

        Raises:
            NotFoundError: there is none of that id.
        """
        self.model(model_id)
        del self._models[model_id]

    def check_pass(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Checks what :meth:`forward` and :meth:`forward_backward` would be given.

        Args:
            model_id: which model.
            data: the datums, with the inputs that the loss reads.
            loss_fn: name of a built-in loss.
            loss_fn_config: its thresholds, where they are not to be the defaults.
            limits: bounds on the data.

        Raises:
            NotFoundError: there is no such model.
            DataError: naming the datum, the field, and what to do.
            BadRequestError: the data are beyond one of the limits.
        """
        context = self.model(model_id).config.max_context_length
        loss_fns.check_request(
            data,
            loss_fn,
            loss_fn_config,
            vocab_size=VOCAB_SIZE,
            max_context_length=context,
            limits=limits,
        )

    @own_settings()
    def forward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> ForwardBackwardOutput:
        """Computes the logprobs of the targets, and the loss; nothing is accumulated.

        The arguments are those that :meth:`check_pass` let pass.

        Raises:
            NotFoundError: there is no such model.
            NonFiniteError: the loss is not finite.
        """
        return self._pass(model_id, data, loss_fn, loss_fn_config, backward=False)

    @own_settings()
    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> ForwardBackwardOutput:
        """Does as :meth:`forward`, and adds the loss's gradient to what has accumulated.

        Raises:
            NotFoundError: there is no such model.
            NonFiniteError: the loss or its gradient is not finite; nothing was added.
        """
        return self._pass(model_id, data, loss_fn, loss_fn_config, backward=True)

    @own_settings()
    def accumulate(
        self, model_id: str, data: Sequence[Datum], grads: Sequence[npt.NDArray[np.float32]]
    ) -> float:
        """Adds a gradient with respect to logprobs to what has accumulated, divided by nothing.

        Args:
            model_id: which model.
            data: the datums; ``target_tokens`` is read.
            grads: the derivative of a loss by each logprob, in the shape of ``target_tokens``.

        Returns:
            The sum of gradients times logprobs.

        Raises:
            NotFoundError: there is no such model.
            NonFiniteError: a gradient is not finite; nothing was added.
        """
        carried = carrier(SUM, data, None, grads, len(data))
        return self._pass(
            model_id, carried, "cross_entropy", None, backward=True, reduction=SUM
        ).metrics["loss:sum"]

    @own_settings()
    def pull_back(
        self,
        model_id: str,
        data: Sequence[Datum],
        derivative: Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    ) -> ForwardBackwardOutput:
        """Adds the gradient of a function of logprobs to what has accumulated, by one pass.

        Args:
            model_id: which model.
            data: the datums; ``target_tokens`` is read.
            derivative: of the function by a datum's logprobs, given its place and these. What it
                raises is raised here, and nothing is added.

        Returns:
            The logprobs.

        Raises:
            NotFoundError: there is no such model.
            NonFiniteError: the gradient is not finite; nothing was added.
        """
        state = self.model(model_id)
        logprobs, gradient = compute.pull_back(state.config, state.lora, data, derivative)
        self._add(model_id, gradient, data, "that loss")
        return ForwardBackwardOutput(
            loss_fn_outputs=[{"logprobs": TensorData(row)} for row in logprobs], metrics={}
        )

    @own_settings()
    def optim_step(self, model_id: str, params: AdamParams) -> OptimStepResponse:
        """Takes one AdamW step on the accumulated gradient, which is then zero again.

        Without any accumulated gradient it is a step on a zero gradient, as in torch: momentum
        and weight decay still move the weights.

        Args:
            model_id: which model.
            params: those that :func:`mintjax.local.optimizer.check_params` let pass.

        Returns:
            The gradient's norm before clipping, as ``"grad_norm"``.

        Raises:
            NotFoundError: there is no such model.
            NonFiniteError: the new weights would not be finite; nothing was changed.
        """
        state = self.model(model_id)
        lora, moments, norm = optimizer.step(
            state.lora, state.optimizer, state.gradient, self._divisor(state), params
        )
        if not (optimizer.all_finite(lora) and optimizer.all_finite(moments)):
            raise NonFiniteError(
                "this optimizer step would make weights that are not finite; nothing was changed. "
                "Lower learning_rate, raise eps, or set grad_clip_norm"
            )
        self._models[model_id] = _fresh(state.config, state.lora_config, lora, moments)
        return OptimStepResponse(metrics={"grad_norm": norm})

    @own_settings()
    def save_weights(
        self,
        model_id: str,
        name: str | None = None,
        *,
        note: Note = NO_NOTE,
        overwrite: bool = True,
    ) -> str:
        """Writes adapters and optimizer state.

        Args:
            model_id: which model.
            name: of the checkpoint; one is made up if None.
            note: what to keep with it.
            overwrite: replace a checkpoint of the same name.

        Returns:
            Its path, ``tinker://<model>/weights/<name>``.

        Raises:
            NotFoundError: there is no such model.
            DataError: the name is none, or a checkpoint has it that must not be replaced.
        """
        state = self.model(model_id)
        path = CheckpointPath(model_id, "weights", _checked_name(name))
        if not overwrite:
            self.store.check_free(path)
        whole = {"lora": state.lora, "optimizer": state.optimizer}
        self.store.save(path, _describe(state), note, whole)
        return str(path)

    @own_settings()
    def save_weights_for_sampler(
        self,
        model_id: str,
        name: str | None = None,
        *,
        note: Note = NO_NOTE,
        listed: bool = True,
    ) -> str:
        """Writes the adapters, to sample from; replaces a checkpoint of the same name.

        Args:
            model_id: which model.
            name: of the checkpoint; one is made up if None.
            note: what to keep with it.
            listed: list it with the others; False for one that serves a sampling session only.

        Returns:
            Its path, ``tinker://<model>/sampler_weights/<name>``.

        Raises:
            NotFoundError: there is no such model.
            DataError: the name is none.
        """
        state = self.model(model_id)
        path = CheckpointPath(model_id, "sampler_weights", _checked_name(name))
        description = msgspec.structs.replace(_describe(state), ephemeral=not listed)
        self.store.save(path, description, note, {"lora": state.lora})
        self._sampler = None  # it may hold the checkpoint that was replaced
        return str(path)

    @own_settings()
    def load_weights(self, model_id: str, path: str, *, with_optimizer: bool = False) -> None:
        """Goes on from a checkpoint; the accumulated gradient, of other weights, is dropped.

        Args:
            model_id: the model that takes it; it must have the checkpoint's base and adapters.
            path: ``tinker://<model>/weights/<name>``.
            with_optimizer: take the optimizer's state too; else that starts afresh.

        Raises:
            NotFoundError: there is no such model or checkpoint.
            DataError: it is no training checkpoint, or one of a model of another shape.
        """
        state = self.model(model_id)
        parsed = CheckpointPath.parse(path, field="path")
        if parsed.kind != "weights":
            raise DataError(
                "a sampler checkpoint cannot be trained on; load one made by save_weights",
                field="path",
            )
        saved = checkpoints.describe(self.directory, parsed)
        if _shape(saved) != _shape(_describe(state)):
            raise DataError(
                f"{path} holds {_shape(saved)}, where this model is {_shape(_describe(state))}",
                field="path",
            )
        like: dict[str, Any] = {"lora": state.lora}
        if with_optimizer:
            like["optimizer"] = state.optimizer
        loaded = checkpoints.load(self.directory, parsed, like)
        moments = loaded["optimizer"] if with_optimizer else optimizer.init(loaded["lora"])
        self._models[model_id] = _fresh(state.config, state.lora_config, loaded["lora"], moments)

    def describe_checkpoint(self, path: str, *, field: str) -> Description:
        """Reads the origin of a checkpoint.

        Args:
            path: of the checkpoint.
            field: the request's name for it, for the error.

        Raises:
            NotFoundError: there is no such checkpoint.
            DataError: it is no path.
        """
        return checkpoints.describe(self.directory, CheckpointPath.parse(path, field=field))

    def sample(
        self,
        source: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        wanted: Wanted = NOTHING,
    ) -> SampleResponse:
        """Continues a prompt.

        Args:
            source: the path of a checkpoint, or the name of a base model.
            prompt: token ids; they and the rest are what
                :func:`mintjax.local.sampling.check_request` let pass.
            params: how to sample.
            num_samples: how many continuations.
            wanted: what is asked for of tokens, beside the samples.

        Returns:
            The continuations with the logprobs of their tokens, in nats.

        Raises:
            NotFoundError: there is no such checkpoint.
        """
        return finish(
            self.sample_in_slices(
                source,
                prompt,
                params,
                num_samples=num_samples,
                wanted=wanted,
            )
        )

    def sample_in_slices(
        self,
        source: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        wanted: Wanted = NOTHING,
    ) -> Slices[SampleResponse]:
        """Does what :meth:`sample` does, a token of some samples at a time.

        The weights are those that the checkpoint has when this begins.

        Args:
            source: as :meth:`sample` has it, like those that follow.
            prompt: token ids.
            params: how to sample.
            num_samples: how many continuations.
            wanted: what is asked for of tokens, beside the samples.
        """
        with own_settings():
            config, weights = self._sampler_weights(source)
        slices = sampling.sample_in_slices(
            config,
            weights,
            prompt,
            params,
            num_samples=num_samples,
            wanted=wanted,
        )
        return (yield from each_under(own_settings, slices))

    def _pass(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        *,
        backward: bool,
        reduction: Reduction | None = None,
    ) -> ForwardBackwardOutput:
        reduction = reduction or self.reduction
        state = self.model(model_id)
        result = compute.run(
            state.config,
            state.lora,
            data,
            loss_fn,
            loss_fn_config,
            per_sequence=reduction.per_sequence,
            backward=backward,
        )
        if result.gradient is not None:
            weights = [_weights(datum) for datum in data]
            divisor = max(1.0, amount(reduction.per_request, weights))
            self._add(model_id, optimizer.divided(result.gradient, divisor), data, loss_fn)
        total = float(result.losses.sum(dtype="float64"))
        return ForwardBackwardOutput(
            loss_fn_outputs=[{"logprobs": TensorData(logprobs)} for logprobs in result.logprobs],
            metrics={"loss:sum": total} if reduction.per_sequence is None else {},
        )

    def _add(self, model_id: str, new: Weights, data: Sequence[Datum], what: str) -> None:
        """Adds a gradient to what has accumulated.

        Raises:
            NonFiniteError: the sum is not finite; nothing was added.
        """
        state = self.model(model_id)
        gradient = compute.add(state.gradient, new)
        if not math.isfinite(optimizer.norm(gradient)):
            raise NonFiniteError(
                f"the gradient of {what} is not finite, or too large to be squared, though "
                "the loss is not; nothing was applied. Look for very large weights, advantages "
                "or log-ratios"
            )
        weights = [_weights(datum) for datum in data]
        self._models[model_id] = dataclasses.replace(
            state,
            gradient=gradient,
            num_datums=state.num_datums + len(data),
            amount=state.amount + amount(self.reduction.per_step, weights),
        )

    def _divisor(self, state: Model) -> float:
        return 1.0 if self.reduction.per_step is None else max(1.0, state.amount)

    def _sampler_weights(self, source: str) -> tuple[ModelConfig, Weights]:
        if self._sampler is None or self._sampler[0] != source:
            if source in BASE_MODELS:
                config = BASE_MODELS[source]
                weights = model.base_weights(config)
            else:
                path = CheckpointPath.parse(source, field="model_path")
                description = checkpoints.describe(self.directory, path)
                config = BASE_MODELS[description.base_model]
                like = {"lora": model.lora_weights(config, description.lora_config)}
                lora = checkpoints.load(self.directory, path, like)["lora"]
                weights = model.adapt(model.base_weights(config), lora)
            self._sampler = (source, config, weights)
        return self._sampler[1:]


def check_create(base_model: str, lora_config: LoraConfig, limits: Limits = DEFAULT_LIMITS) -> None:
    """Checks what :meth:`Engine.create_model` would be given.

    Raises:
        NotFoundError: there is no such base model.
        DataError: the adapters cannot be made so.
        BadRequestError: the rank is beyond the limit.
    """
    if base_model not in BASE_MODELS:
        raise NotFoundError(
            404, f"base_model: {base_model!r} is none of {', '.join(sorted(BASE_MODELS))}"
        )
    if lora_config.rank < 1:
        raise DataError(f"{lora_config.rank} is below 1", field="lora_config.rank")
    limits.check("max_rank", lora_config.rank, f"lora_config.rank is {lora_config.rank}")
    if not (lora_config.train_attn or lora_config.train_mlp or lora_config.train_unembed):
        raise DataError(
            "nothing to train; set one of train_attn, train_mlp and train_unembed",
            field="lora_config",
        )


def _fresh(config: ModelConfig, lora_config: LoraConfig, lora: Weights, moments: Any) -> Model:
    return Model(config, lora_config, lora, moments, optax.tree.zeros_like(lora))


def _checked_name(name: str | None) -> str:
    if name is None:
        return f"unnamed-{uuid.uuid4().hex}"
    checkpoints.check_name(name)
    return name


def _weights(datum: Datum) -> npt.NDArray[Any]:
    """Returns the weights of a datum's targets, which are 1 where none are given."""
    inputs = datum.loss_fn_inputs
    return inputs.get("weights", np.ones(inputs["target_tokens"].shape, np.float32))


def _describe(state: Model) -> Description:
    return Description(state.config.name, state.lora_config)


def _shape(description: Description) -> str:
    lora = description.lora_config
    parts = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    trained = "+".join(name for name, on in parts.items() if on)
    return f"{description.base_model} with rank {lora.rank} on {trained}"
