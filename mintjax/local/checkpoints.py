"""Checkpoints of the embedded trainer: one safetensors file each, written whole or not at all.

A path is ``tinker://<model>/weights/<name>`` (adapters and optimizer state) or
``tinker://<model>/sampler_weights/<name>`` (adapters only).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from mintjax.errors import DataError, NotFoundError
from mintjax.types import LoraConfig

Kind = Literal["weights", "sampler_weights"]
T = TypeVar("T")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # no separator, no leading dot: never a path
_PATH = re.compile(rf"tinker://({_NAME})/(weights|sampler_weights)/({_NAME})")


class CheckpointPath(NamedTuple):
    """The parts of a ``tinker://`` path, each safe as the name of a file."""

    model_id: str
    kind: Kind
    name: str

    @classmethod
    def parse(cls, path: str, *, field: str) -> CheckpointPath:
        """Read a path that came from a client.

        Args:
            path: anything.
            field: the request's name for it, for the error.

        Raises:
            DataError: it is no such path.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            raise DataError(
                f"{path!r} is no checkpoint; it must read tinker://<model>/weights/<name> or "
                "tinker://<model>/sampler_weights/<name>",
                field=field,
            )
        model_id, kind, name = match.groups()
        return cls(model_id, "weights" if kind == "weights" else "sampler_weights", name)

    def __str__(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"


class Description(msgspec.Struct, frozen=True):
    """What a checkpoint was made from; kept in the file's header."""

    base_model: str
    lora_config: LoraConfig


def check_name(name: str) -> None:
    """Refuse a checkpoint's name that could be anything but the name of a file.

    Raises:
        DataError: it holds other characters than letters, digits, ``.``, ``_`` and ``-``, or begins
            with none of the first two, or is longer than 128.
    """
    if re.fullmatch(_NAME, name) is None:
        raise DataError(
            f"{name!r} is no name for a checkpoint; it may hold up to 128 letters, digits, '.', "
            "'_' and '-', and begins with a letter or digit",
            field="path",
        )


def save(directory: Path, path: CheckpointPath, description: Description, state: Any) -> None:
    """Write a checkpoint, in the place of one of the same path.

    Args:
        directory: where this trainer keeps its checkpoints.
        path: of the new one.
        description: what it was made from.
        state: any pytree of arrays.
    """
    file = _file(directory, path)
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"description": msgspec.json.encode(description).decode()}
    descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    os.close(descriptor)
    try:
        save_file(_named_leaves(jax.device_get(state)), partial, metadata=header)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def describe(directory: Path, path: CheckpointPath) -> Description:
    """What a checkpoint was made from.

    Raises:
        NotFoundError: there is no such checkpoint.
    """
    with _open(directory, path) as file:
        header: dict[str, str] = file.metadata()
    return msgspec.json.decode(header["description"], type=Description)


def load(directory: Path, path: CheckpointPath, like: T) -> T:
    """Read a checkpoint, or the part of it that ``like`` names.

    Args:
        directory: where this trainer keeps its checkpoints.
        path: of the checkpoint.
        like: a pytree of the layout and shapes that were saved.

    Returns:
        The same tree with the saved arrays, bit for bit.

    Raises:
        NotFoundError: there is no such checkpoint.
    """
    with _open(directory, path) as file:
        saved = {name: file.get_tensor(name) for name in _named_leaves(like)}
    leaves = [jnp.asarray(saved[name]) for name in saved]
    return jax.tree.unflatten(cast(Any, jax.tree.structure(like)), leaves)


def _file(directory: Path, path: CheckpointPath) -> Path:
    return directory / path.model_id / path.kind / f"{path.name}.safetensors"


def _open(directory: Path, path: CheckpointPath) -> Any:
    file = _file(directory, path)
    if not file.is_file():
        raise NotFoundError(404, f"there is no checkpoint {path}")
    return safe_open(file, framework="numpy")  # pyright: ignore[reportUnknownVariableType]


def _named_leaves(tree: Any) -> dict[str, npt.NDArray[Any]]:
    leaves = cast(list[tuple[Any, Any]], jax.tree_util.tree_flatten_with_path(tree)[0])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
