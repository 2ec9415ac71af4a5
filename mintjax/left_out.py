"""The names of the official SDK that mintjax leaves out, with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mintjax.errors import DataError

_ADMINISTRATION = (
    "accounts, archives and external weights are administered with the official SDK or the "
    "trainer's own command line; RestClient lists and changes runs, checkpoints and sessions"
)
_ADAM = "AdamParams are the one kind of optimizer parameters"
_NO_TEXT = (
    "this client sends text and the bytes of images; for others take the official SDK, and pass it "
    "mintjax.interop.sdk_loss(objective)"
)
_WIRE = "the client makes its requests itself; call the client's methods"
_OBJECTIVE = "pass an objective, (data, logprobs) -> (loss, metrics), to forward_backward_custom"
_PROVENANCE = "this client sends no provenance of tokens"
_TOKENIZER = (
    "transformers.AutoTokenizer.from_pretrained(client.get_info().model_data.tokenizer_id); the "
    "embedded trainer's is mintjax.local.tokenizer"
)
_CONSOLE = "the trainer's console lists a run under client.model_id"

NAMES: Mapping[str, str] = {
    "AdamOptimizerConfig": _ADAM,
    "AdminClient": _ADMINISTRATION,
    "BackcompatSamplingClientFuture": "SamplingClient, which is made when the call returns",
    "BackcompatTrainingClientFuture": "TrainingClient, which is made when the call returns",
    "DimuonOptimizerConfig": _ADAM,
    "DimuonParams": _ADAM,
    "DmelChunk": _NO_TEXT,
    "ExperimentalWarning": "nothing here warns so",
    "ImageAssetPointerChunk": _NO_TEXT,
    "LossHandle": _OBJECTIVE,
    "OptimParams": _ADAM,
    "OptimStepRequest": _WIRE,
    "PerDatumLossFn": _OBJECTIVE,
    "PromptProvenanceSpan": _PROVENANCE,
    "RequestOptions": "ServiceClient(timeout=..., retry_policy=RetryPolicy(...))",
    "SampleRequest": _WIRE,
    "SampledProvenanceSpan": _PROVENANCE,
    "SidecarDiedError": "there is no sidecar",
    "SidecarError": "there is no sidecar",
    "SidecarIPCError": "there is no sidecar",
    "SidecarStartupError": "there is no sidecar",
    "Timeout": "ServiceClient(timeout=...) takes seconds",
    "auth": "the key is an argument, or TINKER_API_KEY",
    "resources": _WIRE,
}
"""Names of the SDK's modules ``tinker`` and ``tinker.types``."""

_OF_ACCOUNTS = (
    *("export_session_trace", "get_audit_log", "get_billing_usage"),
    *("get_checkpoint_archive_url", "get_checkpoint_archive_url_from_tinker_path"),
    *("get_current_checkpoint_storage_usage", "get_external_weights_urls", "search_sessions"),
    "whoami",
)

METHODS: Mapping[str, str] = {
    **{f"{name}{end}": _ADMINISTRATION for name in _OF_ACCOUNTS for end in ("", "_async")},
    "create_custom_loss": _OBJECTIVE,
    "from_sampler_handle": "ServiceClient.create_sampling_client(model_path=...)",
    "get_base_model": "the name that the sampling client was made with",
    "get_base_model_async": "the name that the sampling client was made with",
    "get_console_url": _CONSOLE,
    "get_sampler_handle": "ServiceClient.create_sampling_client(model_path=...) in each process",
    "get_telemetry": "nothing is reported to anybody",
    "get_tokenizer": _TOKENIZER,
    "holder": "the connection is the client's own",
    "on_queue_state_change": "ServiceClient(on_progress=...) is called with each wait",
    "save_weights_external": _ADMINISTRATION,
    "save_weights_external_async": _ADMINISTRATION,
}
"""Methods of the SDK's clients."""

ARGUMENTS: Mapping[str, str] = {
    "kind": '"snapshot" and "inflight" are the kinds of samplers',
    "loss_type_input": "an objective gets logprobs",
    "optimizer": "the trainer's optimizer is AdamW, set by AdamParams in each optim_step",
    "record_stability_info": "take an objective of mintjax.objectives",
    "retry_config": "ServiceClient(retry_policy=RetryPolicy(...)) holds for all requests",
}
"""Arguments of methods that mintjax has."""


def refuse(**given: Any) -> None:
    """Refuses arguments of the SDK's that mintjax does not carry out.

    Args:
        given: what the caller passed; None and False are the SDK's defaults, and are accepted.

    Raises:
        DataError: one is something else; says what to do instead.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise DataError(
                f"mintjax leaves this argument of the official SDK out: {ARGUMENTS[name]}",
                field=name,
            )


def missing(owner: str, name: str, table: Mapping[str, str]) -> AttributeError:
    """Makes the error of a name that is not there; says what to use instead, if it is the SDK's.

    Args:
        owner: the module or class that was asked.
        name: what was asked for.
        table: one of this module's.
    """
    words = f"{owner} has no attribute {name!r}"
    if name in table:
        words += f". The official SDK has it; here, {table[name]}"
    return AttributeError(words, name=name)


class SdkMethods:
    """Answers for the methods of the SDK's clients that are left out."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise missing(type(self).__name__, name, METHODS)
