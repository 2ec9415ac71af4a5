"""Checkpoints of the embedded trainer: one safetensors file each, written whole or not at all.

A path is ``tinker://<model>/weights/<name>`` (adapters and optimizer state) or
``tinker://<model>/sampler_weights/<name>`` (adapters only).
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from mintjax.errors import DataError, MintjaxError, NotFoundError
from mintjax.types import LoraConfig

Kind = Literal["weights", "sampler_weights"]
T = TypeVar("T")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # no separator, no leading dot: never a path
_MODEL_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
_PATH = re.compile(rf"tinker://({_MODEL_ID})/(weights|sampler_weights)/({_NAME})")
_SUFFIX = ".safetensors"
_UNFINISHED = ".partial"


class CheckpointPath(NamedTuple):
    """The parts of a ``tinker://`` path, each safe as the name of a file."""

    model_id: str
    kind: Kind
    name: str

    @classmethod
    def parse(cls, path: str, *, field: str) -> CheckpointPath:
        """Reads a path that came from a client.

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
    """The origin of a checkpoint, kept in the file's header.

    Args:
        base_model: of the model.
        lora_config: its adapters.
        user_metadata: what the client said of the checkpoint.
        run_metadata: what the client said of the model.
        created: when, in seconds since 1970; 0 in files that older versions wrote.
        expires: when it may be removed; never if None.
        ephemeral: made for one sampling session, and not listed.
        project_id: that a copy was made for.
        key: of this very checkpoint; another of the same path has another.
    """

    base_model: str
    lora_config: LoraConfig
    user_metadata: dict[str, str] | None = None
    run_metadata: dict[str, Any] | None = None
    created: float = 0.0
    expires: float | None = None
    ephemeral: bool = False
    project_id: str | None = None
    key: str = ""


class Tags(msgspec.Struct, frozen=True):
    """The changes to a checkpoint since it was written, kept in a file beside it.

    Args:
        key: of the checkpoint; tags of another that had its path are void.
        public: whether it was published.
        expires: when it may be removed; never if None.
    """

    key: str
    public: bool = False
    expires: float | None = None


class Found(NamedTuple):
    """A checkpoint that is there.

    Args:
        path: of it.
        description: its origin.
        tags: what holds of it now.
        size: of the file, in bytes.
        created: when it was written, in seconds since 1970.
    """

    path: CheckpointPath
    description: Description
    tags: Tags
    size: int
    created: float


class StorageError(MintjaxError):
    """A checkpoint cannot be written, read or removed; the message says why."""


def check_name(name: str) -> None:
    """Refuses a checkpoint's name that could be anything but the name of a file.

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


def save(
    directory: Path,
    path: CheckpointPath,
    description: Description,
    state: Any,
) -> None:
    """Writes a checkpoint, in the place of one of the same path.

    Args:
        directory: where this trainer keeps its checkpoints.
        path: of the new one.
        description: what it was made from.
        state: any pytree of arrays.

    Raises:
        StorageError: it cannot be written; one of the same path is still there.
    """
    _save(directory, path, description, _named_leaves(jax.device_get(state)))


def _save(
    directory: Path,
    path: CheckpointPath,
    description: Description,
    arrays: dict[str, npt.NDArray[Any]],
) -> None:
    header = {"description": msgspec.json.encode(description).decode()}
    write(_file(directory, path), lambda partial: save_file(arrays, partial, metadata=header))


def copy(
    directory: Path,
    source: CheckpointPath,
    model_id: str,
    *,
    project_id: str | None = None,
    ttl_seconds: int | None = None,
) -> CheckpointPath:
    """Copies a checkpoint; the copy has the same kind, name and content, and its own time to live.

    Args:
        directory: where this trainer keeps its checkpoints.
        source: what to copy.
        model_id: the run that the copy belongs to.
        project_id: kept with it.
        ttl_seconds: when it may be removed, from now on; never if None.

    Returns:
        The path of the copy.

    Raises:
        NotFoundError: there is no such checkpoint.
        StorageError: it cannot be read or written.
    """
    now = time.time()
    description = msgspec.structs.replace(
        find(directory, source).description,
        created=now,
        expires=None if ttl_seconds is None else now + ttl_seconds,
        project_id=project_id,
        key=uuid.uuid4().hex,
    )
    with _opened(directory, source) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    target = CheckpointPath(model_id, source.kind, source.name)
    _save(directory, target, description, arrays)
    return target


def describe(directory: Path, path: CheckpointPath) -> Description:
    """Says what a checkpoint was made from.

    Raises:
        NotFoundError: there is no such checkpoint.
        StorageError: it cannot be read.
    """
    return find(directory, path).description


def find(directory: Path, path: CheckpointPath) -> Found:
    """Finds a checkpoint, if it has not expired.

    Raises:
        NotFoundError: there is no such checkpoint.
        StorageError: it cannot be read.
    """
    found = _find(directory, path)
    if _has_expired(found):
        raise _not_found(path)
    return found


def _find(directory: Path, path: CheckpointPath) -> Found:
    with _opened(directory, path) as file:
        header: dict[str, str] = file.metadata()
        status = _file(directory, path).stat()
    description = msgspec.json.decode(header["description"], type=Description)
    tags = Tags(description.key, expires=description.expires)
    with suppress(OSError, msgspec.MsgspecError):
        changed = msgspec.json.decode(_tags_file(directory, path).read_bytes(), type=Tags)
        tags = changed if changed.key == description.key else tags
    created = description.created or status.st_mtime
    return Found(path, description, tags, status.st_size, created)


def _has_expired(found: Found) -> bool:
    return found.tags.expires is not None and found.tags.expires <= time.time()


def find_all(directory: Path, model_id: str | None = None) -> list[Found]:
    """Finds the checkpoints that clients have named, of one model or of all, the newest first.

    What cannot be read, or is removed meanwhile, is left out.
    """
    found: list[Found] = []
    for path in _paths(directory, model_id):
        with suppress(NotFoundError, StorageError):
            found.append(find(directory, path))
    listed = (one for one in found if not one.description.ephemeral)
    return sorted(listed, key=lambda one: (-one.created, one.path))


def _paths(directory: Path, model_id: str | None) -> Generator[CheckpointPath]:
    if model_id is not None and re.fullmatch(_MODEL_ID, model_id) is None:
        return
    folder = "*" if model_id is None else quote(model_id, safe="")
    for file in directory.glob(f"{folder}/*/*{_SUFFIX}"):
        owner, name = unquote(file.parents[1].name), file.name.removesuffix(_SUFFIX)
        with suppress(DataError):  # of somebody else
            yield CheckpointPath.parse(f"tinker://{owner}/{file.parent.name}/{name}", field="path")


def change(directory: Path, path: CheckpointPath, make: Callable[[Tags], Tags]) -> None:
    """Changes what holds of a checkpoint; only one thread at a time may.

    Args:
        directory: where this trainer keeps its checkpoints.
        path: of the checkpoint.
        make: makes the new tags of the old.

    Raises:
        NotFoundError: there is no such checkpoint.
        StorageError: it cannot be read or written.
    """
    content = msgspec.json.encode(make(find(directory, path).tags))
    write(_tags_file(directory, path), lambda partial: Path(partial).write_bytes(content))


def remove(directory: Path, path: CheckpointPath) -> None:
    """Removes a checkpoint.

    Raises:
        NotFoundError: there is no such checkpoint.
        StorageError: it cannot be removed.
    """
    file = _file(directory, path)
    if not file.is_file():
        raise _not_found(path)
    with _storage("remove", path):
        file.unlink(missing_ok=True)
        _tags_file(directory, path).unlink(missing_ok=True)


def purge(directory: Path) -> None:
    """Removes the checkpoints that have expired; not while one is written."""
    for path in _paths(directory, None):
        with suppress(NotFoundError, StorageError):
            if _has_expired(_find(directory, path)):
                remove(directory, path)


def load(directory: Path, path: CheckpointPath, like: T) -> T:
    """Reads a checkpoint, or the part of it that ``like`` names.

    Args:
        directory: where this trainer keeps its checkpoints.
        path: of the checkpoint.
        like: a pytree of the layout and shapes that were saved.

    Returns:
        The same tree with the saved arrays, bit for bit.

    Raises:
        NotFoundError: there is no such checkpoint.
        StorageError: it cannot be read.
    """
    find(directory, path)
    with _opened(directory, path) as file:
        saved = {name: file.get_tensor(name) for name in _named_leaves(like)}
    leaves = [jnp.asarray(saved[name]) for name in saved]
    return jax.tree.unflatten(cast(Any, jax.tree.structure(like)), leaves)


def sweep(directory: Path) -> None:
    """Removes the unfinished files of processes that ended while they wrote."""
    for partial in directory.glob(f"*/*/*{_UNFINISHED}"):
        writer = partial.name.removesuffix(_UNFINISHED).rpartition("~")[2]
        if writer != _writer() and not _alive(writer):
            partial.unlink(missing_ok=True)


def write(file: Path, fill: Callable[[str], object]) -> None:
    """Writes a file whole or not at all, by way of another beside it.

    Args:
        file: its path; folders are made.
        fill: writes the other one, given its name.

    Raises:
        StorageError: it cannot be written; what was there before still is.
    """
    partial = file.with_name(f"{uuid.uuid4().hex}~{_writer()}{_UNFINISHED}")
    with _storage("write", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(str(partial))
            os.replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


_PROCESS = uuid.uuid4().hex[:8]


def _writer() -> str:
    """Names this process; in a container its number alone is that of the one before."""
    return f"{os.getpid()}-{_PROCESS}"


def _alive(writer: str) -> bool:
    number = writer.partition("-")[0]
    if not number.isdecimal() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


@contextmanager
def _storage(verb: str, what: object) -> Generator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise StorageError(
            f"cannot {verb} {what}: {why}. The models are as they were; make room on that disk, or "
            "start the trainer with another directory"
        ) from error


def _file(directory: Path, path: CheckpointPath) -> Path:
    return directory / quote(path.model_id, safe="") / path.kind / f"{path.name}{_SUFFIX}"


def _tags_file(directory: Path, path: CheckpointPath) -> Path:
    return _file(directory, path).with_name(f"{path.name}.tags.json")


def _not_found(path: CheckpointPath) -> NotFoundError:
    return NotFoundError(404, f"there is no checkpoint {path}")


@contextmanager
def _opened(directory: Path, path: CheckpointPath) -> Generator[Any]:
    if not _file(directory, path).is_file():
        raise _not_found(path)
    with (
        _storage("read", path),
        safe_open(_file(directory, path), framework="numpy") as file,  # pyright: ignore[reportUnknownVariableType]
    ):
        yield file


def _named_leaves(tree: Any) -> dict[str, npt.NDArray[Any]]:
    leaves = cast(list[tuple[Any, Any]], jax.tree_util.tree_flatten_with_path(tree)[0])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
