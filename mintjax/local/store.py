"""The folder in which a trainer keeps its checkpoints and its tokenizer."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mintjax.errors import DataError, NotFoundError
from mintjax.local import checkpoints
from mintjax.local.checkpoints import CheckpointPath, Description
from mintjax.local.tokenizer import TOKENIZER_ID, transformers_files


class Note(NamedTuple):
    """The things that a client wants kept with a checkpoint.

    Args:
        user_metadata: what it says of the checkpoint.
        run_metadata: what it said of the model.
        ttl_seconds: after which it may be removed; never if None.
    """

    user_metadata: dict[str, str] | None = None
    run_metadata: dict[str, Any] | None = None
    ttl_seconds: int | None = None


NO_NOTE = Note()
PURGE_SECONDS = 3600.0
"""Checkpoints that have expired are removed this often at most, where others are saved."""


class Store:
    """A folder of checkpoints, from which those that have expired are removed now and then.

    Args:
        directory: the folder; a temporary one, removed by :meth:`close`, if None.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._temporary = None
        if directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mintjax-")
            directory = self._temporary.name
        self.directory = Path(directory)
        checkpoints.sweep(self.directory)
        checkpoints.purge(self.directory)
        self._purged = time.time()

    def close(self) -> None:
        """Removes the folder if it is a temporary one."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def check_free(self, path: CheckpointPath) -> None:
        """Checks that there is no checkpoint of a path yet.

        Raises:
            DataError: there is one.
        """
        try:
            checkpoints.find(self.directory, path)
        except NotFoundError:
            return
        raise DataError(
            f"there is a checkpoint {path} already; pass overwrite=True to replace it, or "
            "another name",
            field="path",
        )

    def save(self, path: CheckpointPath, description: Description, note: Note, state: Any) -> None:
        """Writes a checkpoint, in the place of one of the same path.

        Args:
            path: of the new one.
            description: what it was made from.
            note: what to keep with it.
            state: any pytree of arrays.

        Raises:
            StorageError: it cannot be written.
        """
        now = time.time()
        whole = msgspec.structs.replace(
            description,
            user_metadata=note.user_metadata,
            run_metadata=note.run_metadata,
            created=now,
            expires=None if note.ttl_seconds is None else now + note.ttl_seconds,
            key=uuid.uuid4().hex,
        )
        if now - self._purged > PURGE_SECONDS:
            checkpoints.purge(self.directory)
            self._purged = now
        checkpoints.save(self.directory, path, whole, state)

    def remove_unlisted(self, path: str) -> None:
        """Removes a checkpoint that serves a sampling session only; leaves any other alone.

        Args:
            path: of the checkpoint.

        Raises:
            NotFoundError: there is no such checkpoint.
            StorageError: it cannot be removed.
        """
        parsed = CheckpointPath.parse(path, field="path")
        if checkpoints.describe(self.directory, parsed).ephemeral:
            checkpoints.remove(self.directory, parsed)

    def tokenizer_folder(self) -> Path:
        """Returns a folder from which transformers reads the tokenizer; it is written if need be.

        Raises:
            StorageError: it cannot be written.
        """
        folder = self.directory / TOKENIZER_ID
        for name, content in transformers_files().items():
            if not (folder / name).is_file():
                checkpoints.write(
                    folder / name,
                    lambda partial, content=content: Path(partial).write_bytes(content),
                )
        return folder.resolve()
