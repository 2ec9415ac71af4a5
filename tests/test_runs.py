"""Paths of checkpoints are taken apart, and lists of trainers are read."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.errors import DataError
from mintjax.protocol import messages
from mintjax.runs import CheckpointsListResponse, ParsedCheckpointTinkerPath

NAMES = st.text("abcXYZ019._:-", min_size=1)


@given(
    run=NAMES, kind=st.sampled_from(["weights", "sampler_weights", "external_weights"]), name=NAMES
)
def test_a_path_has_three_parts(run, kind, name):
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(f"tinker://{run}/{kind}/{name}")
    assert parsed.training_run_id == run
    assert parsed.checkpoint_id == f"{kind}/{name}"


@pytest.mark.parametrize(
    "path", ["m/weights/a", "tinker://m/weights", "tinker://m/secrets/a", "tinker://m/weights/a/b"]
)
def test_what_is_no_path(path):
    with pytest.raises(DataError, match="tinker_path"):
        ParsedCheckpointTinkerPath.from_tinker_path(path)


def test_a_list_of_a_newer_trainer_is_read():
    body = b"""{"checkpoints": [{"checkpoint_id": "weights/a", "checkpoint_type": "new",
        "colour": 1, "time": "2026-11-27T20:00:00.5+00:00", "tinker_path": "tinker://m/weights/a"}]}"""
    [found] = messages.decode(body, CheckpointsListResponse).checkpoints
    assert found.time == datetime(2026, 11, 27, 20, 0, 0, 500_000, UTC)
    assert (found.training_run_id, found.public, found.expires_at) == ("m", False, None)
