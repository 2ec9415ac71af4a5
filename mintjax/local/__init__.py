"""The embedded trainer: a small transformer with LoRA that speaks the protocol, for one machine."""

try:
    from mintjax.local.engine import Engine
    from mintjax.local.scripted import (
        ScriptedPass,
        ScriptedStep,
        ScriptedTrainer,
        scripted_trainer,
    )
    from mintjax.local.server import running_server, serve, trainer
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("safetensors", "starlette", "uvicorn"):
        raise
    raise ImportError(
        f'the embedded trainer needs {missing}: pip install "mintjax[local]"', name=missing
    ) from error

from mintjax.local import tokenizer
from mintjax.local.dialects import DIALECTS, Dialect
from mintjax.local.limits import Limits
from mintjax.local.model import BASE_MODELS

__all__ = [
    "BASE_MODELS",
    "DIALECTS",
    "Dialect",
    "Engine",
    "Limits",
    "ScriptedPass",
    "ScriptedStep",
    "ScriptedTrainer",
    "running_server",
    "scripted_trainer",
    "serve",
    "tokenizer",
    "trainer",
]
