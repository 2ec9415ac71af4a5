"""Names that come from clients, and files that are whole or not there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mintjax.errors import DataError, NotFoundError
from mintjax.local import checkpoints
from mintjax.local.checkpoints import CheckpointPath, Description, StorageError
from mintjax.types import LoraConfig

DESCRIPTION = Description("mintjax/nano", LoraConfig(4, train_mlp=False))
PATH = CheckpointPath("model-1", "weights", "step.10")
STATE = {"lora": {"a": jnp.arange(3.0)}, "count": jnp.asarray(2)}

WICKED = [
    "",
    ".",
    "..",
    "../up",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\x00",
    ".hidden",
    "-option",
    "a\n",
    "é",
    "a" * 129,
    "con:",
    "%2e%2e",
]


@pytest.mark.parametrize("name", WICKED)
def test_wicked_names(name):
    with pytest.raises(DataError, match="path"):
        checkpoints.check_name(name)


@pytest.mark.parametrize(
    "path",
    [
        *(f"tinker://model-1/weights/{name}" for name in WICKED),
        *(f"tinker://{name}/weights/a" for name in WICKED if name != "con:"),
        "tinker://model-1/secrets/a",
        "tinker://model-1/a",
        "model-1/weights/a",
        "https://model-1/weights/a",
        "tinker://model-1/weights/a/b",
    ],
)
def test_wicked_paths(path):
    with pytest.raises(DataError, match="my_field"):
        CheckpointPath.parse(path, field="my_field")


@given(st.text())
def test_a_name_that_passes_stays_in_the_directory(name):
    try:
        checkpoints.check_name(name)
    except DataError:
        return
    assert not set(name) & set("/\\\0")
    assert name not in (".", "..")
    assert CheckpointPath.parse(f"tinker://m/weights/{name}", field="path").name == name


def test_paths_read_as_they_are_written():
    assert CheckpointPath.parse(str(PATH), field="path") == PATH


def test_what_was_saved_is_loaded(tmp_path):
    checkpoints.save(tmp_path, PATH, DESCRIPTION, STATE)
    assert checkpoints.describe(tmp_path, PATH) == DESCRIPTION
    loaded = checkpoints.load(tmp_path, PATH, STATE)
    np.testing.assert_array_equal(loaded["lora"]["a"], [0, 1, 2])
    assert loaded["count"] == 2
    assert loaded["count"].dtype == STATE["count"].dtype


def test_a_part_can_be_loaded(tmp_path):
    checkpoints.save(tmp_path, PATH, DESCRIPTION, STATE)
    part = checkpoints.load(tmp_path, PATH, {"lora": STATE["lora"]})
    assert list(part) == ["lora"]


def test_one_that_is_not_there(tmp_path):
    with pytest.raises(NotFoundError, match=re.escape(str(PATH))):
        checkpoints.describe(tmp_path, PATH)
    with pytest.raises(NotFoundError):
        checkpoints.load(tmp_path, PATH, STATE)


def test_a_write_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, PATH, DESCRIPTION, STATE)

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(StorageError, match="disk full"):
        checkpoints.save(tmp_path, PATH, DESCRIPTION, STATE)
    np.testing.assert_array_equal(checkpoints.load(tmp_path, PATH, STATE)["lora"]["a"], [0, 1, 2])
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 1


def test_a_directory_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "a file"
    blocked.touch()
    with pytest.raises(StorageError, match=r"cannot write .*a file.*another directory"):
        checkpoints.save(blocked, PATH, DESCRIPTION, STATE)


def test_files_that_cannot_grow(tmp_path):
    """The system's own refusal, which is that of a full disk but for its number."""
    resource = pytest.importorskip("resource")
    large = {"lora": {"a": np.zeros(1 << 16, np.float32)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*File too large"):
            checkpoints.save(tmp_path, PATH, DESCRIPTION, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_files_that_a_killed_process_left_are_swept(tmp_path):
    checkpoints.save(tmp_path, PATH, DESCRIPTION, STATE)
    folder = tmp_path / PATH.model_id / PATH.kind
    (folder / "left~999999999-dead.partial").write_bytes(b"half")
    mine = folder / f"mine~{checkpoints._writer()}.partial"
    mine.write_bytes(b"under way")
    checkpoints.sweep(tmp_path)
    assert {file.name for file in folder.iterdir()} == {f"{PATH.name}.safetensors", mine.name}
    assert checkpoints.describe(tmp_path, PATH) == DESCRIPTION


def test_one_of_an_older_version_was_made_when_its_file_was(tmp_path):
    checkpoints.save(tmp_path, PATH, DESCRIPTION, STATE)
    [file] = tmp_path.glob("*/*/*.safetensors")
    os.utime(file, (0, 1e9))
    [found] = checkpoints.find_all(tmp_path)
    assert found.created == 1e9
    assert found.tags == checkpoints.Tags("")


class Kept(RuleBasedStateMachine):
    """Checkpoints as files against a table of what holds of them, on a clock of its own."""

    names = st.sampled_from([PATH, PATH._replace(name="b"), PATH._replace(model_id="model:2")])
    seconds = st.none() | st.sampled_from([10.0, 20.0])

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="mintjax-test-"))
        self.now, self.number = 0.0, 0
        self.patched = patch("mintjax.local.checkpoints.time.time", lambda: self.now)
        self.patched.start()
        self.table = {}

    def teardown(self):
        self.patched.stop()
        shutil.rmtree(self.directory)

    def expires(self, seconds):
        return None if seconds is None else self.now + seconds

    def alive(self, path):
        expires = self.table[path][1] if path in self.table else -1
        return expires is None or expires > self.now

    @rule(path=names, seconds=seconds)
    def save(self, path, seconds):
        self.number += 1
        made = Description(
            "mintjax/nano",
            LoraConfig(4),
            created=self.number,
            expires=self.expires(seconds),
            key=str(self.number),
        )
        checkpoints.save(self.directory, path, made, {"a": jnp.zeros(1)})
        self.table[path] = (False, self.expires(seconds), self.number)

    @rule(path=names, public=st.booleans(), seconds=seconds)
    def change(self, path, public, seconds):
        tags = {"public": public, "expires": self.expires(seconds)}

        def make(old):
            return msgspec.structs.replace(old, **tags)

        if self.alive(path):
            checkpoints.change(self.directory, path, make)
            self.table[path] = (public, self.expires(seconds), self.table[path][2])
            return
        with pytest.raises(NotFoundError):
            checkpoints.change(self.directory, path, make)

    @rule(path=names)
    def remove(self, path):
        if path in self.table:
            checkpoints.remove(self.directory, path)
            del self.table[path]
            return
        with pytest.raises(NotFoundError):
            checkpoints.remove(self.directory, path)

    @rule()
    def purge(self):
        checkpoints.purge(self.directory)
        self.table = {path: kept for path, kept in self.table.items() if self.alive(path)}

    @rule(seconds=st.sampled_from([1.0, 10.0]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def what_is_listed_is_what_is_kept(self):
        listed = {
            one.path: (one.tags.public, one.tags.expires, one.description.created)
            for one in checkpoints.find_all(self.directory)
        }
        assert listed == {path: self.table[path] for path in self.table if self.alive(path)}
        files = {file.name.partition(".s")[0] for file in self.directory.glob("*/*/*.safetensors")}
        assert files == {path.name for path in self.table}


TestKept = Kept.TestCase
TestKept.settings = settings(stateful_step_count=12)
