"""The trainers: what they are installed from, and how each is started on a CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load as read_safetensors

from benchmarks.real_trainers.environments import Recipe

API_KEY = "tml-loopback"
HERE = Path(__file__).parent

REFERENCE = Recipe("3.11", (("transformers>=5.5,<6", "tokenizers", "numpy"),), with_torch=True)
"""What :mod:`benchmarks.real_trainers.reference` runs in."""


class NotStartedError(RuntimeError):
    """A trainer does not start here; the message says why."""


@dataclass(frozen=True)
class Adapters:
    """A model's adapters, as a sampler checkpoint holds them.

    Args:
        weights: ``A/<module>`` of shape ``[rank, inputs]`` and ``B/<module>`` ``[outputs, rank]``.
        scale: of ``B @ A``.
    """

    weights: dict[str, np.ndarray]
    scale: float


@dataclass(frozen=True)
class Setting:
    """Where a trainer is started.

    Args:
        python: its environment's.
        directory: of its own, for checkpoints, data base and log.
        model: the folder of the base model.
        port: on the loopback address.
    """

    python: Path
    directory: Path
    model: Path
    port: int


@dataclass(frozen=True)
class Trainer:
    """A trainer.

    Args:
        name: on PyPI.
        version: the one that is tried.
        recipe: of its environment.
        command: starts it; a function of the :class:`Setting`.
        ready: what its log says once it works.
        packages: those whose versions are told beside its own.
        adam_scale: the learning rate, and the eps, of the step that shows the gradient.
        reads: what writes the adapters to a file, ``"save_weights_for_sampler"`` or
            ``"save_state"``.
        canned: why its samples are no model's, if they are not.
        toy: why it trains no model whose gradient could be held against torch's, if it does not.
    """

    name: str
    version: str
    recipe: Recipe
    command: Callable[[Setting], list[str]]
    ready: str
    packages: tuple[str, ...] = ()
    adam_scale: float = 1e14
    reads: str = "save_weights_for_sampler"
    canned: str = ""
    toy: str = ""


@dataclass(frozen=True)
class Running:
    """A trainer that runs.

    Args:
        trainer: which.
        base_url: its address.
        base_model: the name of the base model there.
        directory: its own.
        end: ends it, and all that it started.
        has_ended: whether it is gone.
    """

    trainer: Trainer
    base_url: str
    base_model: str
    directory: Path
    end: Callable[[], object]
    has_ended: Callable[[], bool]

    def adapters(self, path: str) -> Adapters:
        """Reads a sampler checkpoint that the trainer wrote.

        Raises:
            FileNotFoundError: there is no such file.
        """
        name = path.rpartition("/")[2]
        found = sorted(
            (one for one in self.directory.rglob("*") if one.name in (name, f"{name}.tar.gz")),
            key=lambda one: "sampler" not in str(one),
        )
        if not found:
            raise FileNotFoundError(f"no file of {path} under {self.directory}")
        return read_adapters(found[0])


def read_adapters(place: Path) -> Adapters:
    """Reads adapters in PEFT's layout, from a folder or a tar of one."""
    if place.is_dir():
        files = {one.name: one.read_bytes() for one in place.rglob("*") if one.is_file()}
    else:
        with tarfile.open(place) as archive:
            files = {
                Path(member.name).name: archive.extractfile(member).read()  # pyright: ignore
                for member in archive
                if member.isfile()
            }
    config = json.loads(files["adapter_config.json"])
    weights: dict[str, np.ndarray] = {}
    for key, value in read_safetensors(files["adapter_model.safetensors"]).items():
        module, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if not kind:  # PEFT keeps the matrix beside the adapter of an embedding
            continue
        weights[f"{kind[0]}/{module}"] = np.asarray(value, np.float64)
    return Adapters(weights, config["lora_alpha"] / config["r"])


@contextmanager
def started(trainer: Trainer, python: Path, directory: Path, model: Path) -> Iterator[Running]:
    """Starts a trainer, and ends it and all its children when the block ends.

    Raises:
        NotStartedError: it ended by itself, or was not ready in time; with the end of its log.
    """
    directory.mkdir(parents=True, exist_ok=True)
    setting = Setting(python, directory, model, _free_port())
    log = directory / "log"
    environment = {
        "PATH": f"{_uv(setting)}:{python.parent}:/usr/bin:/bin",
        "HOME": str(directory),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **{name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ},
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["nice", *trainer.command(setting)],
            cwd=directory,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    base_url = f"http://127.0.0.1:{setting.port}"
    try:
        _wait_until_ready(trainer, process, base_url, log)
        end, has_ended = partial(_end, process), lambda: process.poll() is not None
        yield Running(trainer, base_url, str(model), directory, end, has_ended)
    finally:
        _end(process)


def _wait_until_ready(
    trainer: Trainer, process: subprocess.Popen[bytes], base_url: str, log: Path, limit: float = 240
) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if process.poll() is not None:
            raise NotStartedError(f"it ended with {process.returncode}: {_end_of(log)}")
        with suppress(httpx.HTTPError):
            headers = {"X-API-Key": API_KEY}
            answer = httpx.get(f"{base_url}/api/v1/get_server_capabilities", headers=headers)
            if answer.status_code == 200 and trainer.ready in log.read_text(errors="replace"):
                return
        time.sleep(0.5)
    raise NotStartedError(f"it was not ready within {limit:.0f} s: {_end_of(log)}")


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a process and all that it started, which are of its session."""
    for kind, seconds in ((signal.SIGTERM, 8), (signal.SIGKILL, 8)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with suppress(ProcessLookupError):  # the first child may be gone and its children not
        os.killpg(process.pid, signal.SIGKILL)


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return "; ".join(errors[-1:] or lines[-3:])[-600:]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _uv(setting: Setting) -> Path:
    """Writes a stand-in for uv, which runs a module with the environment that there is."""
    place = setting.directory / "bin" / "uv"
    place.parent.mkdir(exist_ok=True)
    place.write_text(
        f'#!/bin/sh\nwhile [ "$1" != "-m" ]; do shift; done\n"{setting.python}" "$@"\nexit $?\n'
    )
    place.chmod(0o755)
    return place.parent


def _skyrl(module: str) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        limits = {"max_lora_adapters": 8, "max_lora_rank": 32, "loss_chunk_size": 0}
        return [
            str(setting.directory / "bin" / "uv"),
            *("run", "--extra", "tinker", "-m", module),
            *("--base-model", str(setting.model)),
            *("--backend", "jax", "--backend-config", json.dumps(limits)),
            *("--checkpoints-base", str(setting.directory / "checkpoints")),
            *("--database-url", f"sqlite:///{setting.directory / 'trainer.db'}"),
            *("--host", "127.0.0.1", "--port", str(setting.port)),
        ]

    return command


def _hatchery(setting: Setting) -> list[str]:
    launcher, checkpoints = (
        HERE / "launch" / "hatchery_on_cpu.py",
        setting.directory / "checkpoints",
    )
    words = (setting.python, launcher, setting.model, setting.port, API_KEY, checkpoints)
    return list(map(str, words))


def _tuft(setting: Setting) -> list[str]:
    config = setting.directory / "tuft.yaml"
    config.write_text(
        json.dumps(  # JSON is YAML
            {
                "checkpoint_dir": str(setting.directory / "checkpoints"),
                "model_owner": "benchmark",
                "authorized_users": {API_KEY: "benchmark"},
                "supported_models": [
                    {
                        "model_name": str(setting.model),
                        "model_path": str(setting.model),
                        "max_model_len": 512,
                        "max_lora_rank": 32,
                        "max_loras": 8,
                    }
                ],
            }
        )
    )
    return [
        str(setting.python),
        str(HERE / "launch" / "tuft_on_cpu.py"),
        *("launch", "--config", str(config), "--host", "127.0.0.1", "--port", str(setting.port)),
    ]


TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer(
            name="skyrl-tx",
            version="0.3.0",
            recipe=Recipe(
                "3.11",
                (
                    (
                        "jax==0.10.2",
                        "jaxlib==0.10.2",
                        "flax==0.12.8",
                        "optax==0.2.8",
                        "transformers==4.57.6",
                        "peft",
                        "fastapi[standard]",
                        "sqlmodel",
                        "sqlalchemy[asyncio]",
                        "aiosqlite",
                        "safetensors",
                        "tokenizers",
                        "datasets",
                        "pillow",
                        "rich",
                        "typer",
                        "cloudpathlib>=0.23",
                        "hf_transfer",
                    ),
                    ("--no-deps", "skyrl-tx==0.3.0"),
                ),
                with_torch=True,
            ),
            command=_skyrl("tx.tinker.api"),
            ready="Starting background engine",
            packages=("jax", "flax", "transformers"),
        ),
        Trainer(
            name="skyrl",
            version="0.4.0",
            recipe=Recipe(
                "3.12",
                (
                    (
                        "jax>=0.8",
                        "jaxlib",
                        "flax>=0.12.10",
                        "optax",
                        "transformers>=5.6.1,<=5.16.1",
                        "tokenizers>=0.23.1",
                        "aiohttp",
                        "fastapi[standard]",
                        "sqlmodel",
                        "sqlalchemy[asyncio]",
                        "aiosqlite",
                        "asyncpg",
                        "psycopg2-binary",
                        "safetensors",
                        "datasets",
                        "pillow",
                        "rich",
                        "typer",
                        "cloudpathlib",
                        "hf_transfer",
                        "zstandard",
                        "xxhash",
                        "tinker>=0.25,<0.26",
                    ),
                    ("--no-deps", "peft==0.18.1", "accelerate", "skyrl==0.4.0"),
                ),
                with_torch=True,
            ),
            command=_skyrl("skyrl.tinker.api"),
            ready="Starting background engine",
            packages=("jax", "flax", "transformers", "tinker"),
        ),
        Trainer(
            name="hatchery-core",
            version="0.3.0",
            recipe=Recipe(
                "3.12",
                (
                    (
                        "fastapi",
                        "uvicorn[standard]",
                        "pydantic",
                        "msgpack",
                        "aiosqlite",
                        "structlog",
                        "httpx",
                        "transformers",
                        "zstandard",
                        "brotli",
                        "psutil",
                        "pyyaml",
                    ),
                    ("--no-deps", "peft", "accelerate", "hatchery-client", "hatchery-core==0.3.0"),
                ),
                with_torch=True,
            ),
            command=_hatchery,
            ready="the worker is ready",
            packages=("torch", "transformers", "peft"),
            adam_scale=1.0,  # it takes no eps above 1
            reads="save_state",
        ),
        Trainer(
            name="tuft",
            version="0.2.2",
            recipe=Recipe(
                "3.11",
                (
                    (
                        "fastapi>=0.133,<0.137",
                        "httpx",
                        "numpy",
                        "nvidia-ml-py",
                        "omegaconf",
                        "opentelemetry-api",
                        "opentelemetry-sdk",
                        "opentelemetry-exporter-otlp",
                        "opentelemetry-instrumentation-fastapi>=0.41b0",
                        "opentelemetry-instrumentation-logging>=0.41b0",
                        "protobuf",
                        "psutil",
                        "ray>=2.50",
                        "tinker>=0.25,<0.26",
                        "transformers>=5.5.3,<6",
                        "typer",
                        "uvicorn[standard]",
                    ),
                    ("--no-deps", "accelerate", "peft==0.20.0", "tuft==0.2.2"),
                ),
                with_torch=True,
            ),
            command=_tuft,
            ready="",
            packages=("torch", "tinker", "ray"),
            canned="sampling needs vLLM; TuFT's canned answers stand in",
        ),
    )
}
