"""A store keeps checkpoints until they expire, and a temporary one goes when it is closed."""

import numpy as np
import pytest

from mintjax.errors import DataError, NotFoundError
from mintjax.local import checkpoints, store
from mintjax.local.checkpoints import CheckpointPath, Description
from mintjax.local.store import Note, Store
from mintjax.types import LoraConfig

STATE = {"a": np.ones(2, np.float32)}
ONE, OTHER = (CheckpointPath("model-1", "weights", name) for name in ("one", "other"))


def described(**fields):
    return Description("mintjax/nano", LoraConfig(1), **fields)


@pytest.fixture
def kept():
    made = Store()
    yield made
    made.close()
    assert not made.directory.exists()


def test_a_checkpoint_is_kept_with_its_note(kept):
    kept.check_free(ONE)
    kept.save(ONE, described(), Note({"who": "me"}, {"run": 1}, 60), STATE)
    found = checkpoints.describe(kept.directory, ONE)
    assert (found.user_metadata, found.run_metadata) == ({"who": "me"}, {"run": 1})
    assert found.expires - found.created == 60
    with pytest.raises(DataError, match="pass overwrite=True to replace it"):
        kept.check_free(ONE)
    kept.save(ONE, described(), Note(), STATE)
    assert checkpoints.describe(kept.directory, ONE).key != found.key


def test_what_has_expired_is_removed_at_the_first_save_of_an_hour(kept, monkeypatch):
    kept.save(ONE, described(), Note(ttl_seconds=1), STATE)
    (file,) = kept.directory.rglob("*.safetensors")
    now = checkpoints.time.time()
    monkeypatch.setattr(checkpoints.time, "time", lambda: now + 2)
    kept.save(OTHER, described(), Note(), STATE)
    assert file.exists()  # it cannot be loaded any more, and lies there for a while
    monkeypatch.setattr(checkpoints.time, "time", lambda: now + store.PURGE_SECONDS + 2)
    kept.save(OTHER, described(), Note(), STATE)
    assert not file.exists()


@pytest.mark.parametrize("ephemeral", [True, False])
def test_what_is_listed_stays(kept, ephemeral):
    kept.save(ONE, described(ephemeral=ephemeral), Note(), STATE)
    kept.remove_unlisted(str(ONE))
    if not ephemeral:
        assert checkpoints.load(kept.directory, ONE, STATE)["a"].tolist() == [1, 1]
        return
    with pytest.raises(NotFoundError):
        kept.remove_unlisted(str(ONE))
