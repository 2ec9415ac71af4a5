"""What the checks of real trainers are made of; no real trainer is started here."""

import io
import json
import os
import re
import select
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("benchmarks.real_trainers")  # which the package on PyPI leaves out
pytest.importorskip("safetensors")

from safetensors.numpy import save

from benchmarks.real_trainers import checks, environments, kept, trainers
from benchmarks.real_trainers.checks import CHECKS, State, WrongError, compare
from benchmarks.real_trainers.environments import NoEnvironmentError, Recipe
from benchmarks.real_trainers.trainers import Adapters, NotStartedError, Running, Trainer
from benchmarks.tables import real_trainers as table
from mintjax import local

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@given(
    gradient=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    scale=st.sampled_from([1.0, 1e14]),
)
def test_a_step_of_adam_shows_its_gradient(gradient, scale):
    g = np.array(gradient)
    update = scale * g / (np.abs(g) + scale)
    before, after = (Adapters({"A/x": w}, 1.0) for w in (np.zeros_like(g), -update))
    found = checks.gradient_of_update(before, after, scale)["A/x"]
    np.testing.assert_allclose(found, g, rtol=1e-9, atol=1e-12)


def test_gradients_are_told_apart():
    rng = np.random.default_rng(0)
    expected = {"A/x": rng.normal(size=(3, 4)), "B/x": rng.normal(size=(5, 3))}
    assert "cosine 1.00000000" in compare(expected, expected)
    longer = {name: 1.002 * value for name, value in expected.items()}
    with pytest.raises(WrongError, match=r"norm \+2.0e-03"):
        compare(longer, expected)
    turned = {**expected, "B/x": expected["B/x"] + 0.1 * rng.normal(size=(5, 3))}
    with pytest.raises(WrongError, match=r"cosine 0\.99"):
        compare(turned, expected)
    with pytest.raises(WrongError, match="adapters of"):
        compare({"A/x": expected["A/x"]}, expected)
    with pytest.raises(WrongError, match="norm nan"):
        compare({name: np.nan * value for name, value in expected.items()}, expected)


def test_adapters_that_are_one_parameter_have_one_gradient():
    rng = np.random.default_rng(1)
    shared, other = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    weights = {"A/q": shared, "A/k": shared.copy(), "A/o": other}
    weights |= {"B/q": np.zeros((3, 2)), "B/k": np.zeros((3, 2))}
    grads = {name: rng.normal(size=value.shape) for name, value in weights.items()}
    found = checks.tied(weights, grads)
    for name in ("A/q", "A/k"):
        np.testing.assert_allclose(found[name], grads["A/q"] + grads["A/k"])
    for name in ("A/o", "B/q", "B/k"):  # zeros are equal and still not one
        np.testing.assert_array_equal(found[name], grads[name])


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_are_read_from_a_folder_and_from_a_tar(packed, tmp_path):
    a, b = np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    files = {
        "adapter_config.json": json.dumps({"r": 2, "lora_alpha": 16}).encode(),
        "adapter_model.safetensors": save(
            {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        ),
    }
    place = tmp_path / "saved"
    if packed:
        with tarfile.open(place, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        place.mkdir()
        for name, content in files.items():
            place.joinpath(name).write_bytes(content)
    found = trainers.read_adapters(place)
    assert found.scale == 8.0
    np.testing.assert_array_equal(found.weights["A/model.layers.0.self_attn.q_proj"], a)
    np.testing.assert_array_equal(found.weights["B/model.layers.0.self_attn.q_proj"], b)


def test_torch_comes_in_one_release_and_once():
    recipes = [trainers.REFERENCE, *(one.recipe for one in trainers.TRAINERS.values())]
    assert environments.TORCH == "torch==2.13.0"
    for recipe in recipes:
        words = [word for step in recipe.steps for word in step]
        assert not any(re.match(r"torch\b", word) for word in words), words
        assert not any("://" in word for word in words), words


def test_each_trainer_is_installed_in_the_version_that_is_told():
    for trainer in trainers.TRAINERS.values():
        (last,) = [step for step in trainer.recipe.steps if step[0] == "--no-deps"]
        assert last[-1] == f"{trainer.name}=={trainer.version}"


def test_another_recipe_is_another_environment():
    keys = {one.key for one in (Recipe("3.11", (("a",),)), Recipe("3.12", (("a",),)))}
    keys |= {one.key for one in (Recipe("3.11", (("b",),)), Recipe("3.11", (("a",),), True))}
    assert len(keys) == 4


def test_a_python_that_is_not_here_is_told():
    with pytest.raises(NoEnvironmentError, match=r"no Python 2\.4 here"):
        environments.interpreter("2.4")
    assert environments.interpreter(PYTHON)


SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("child", "w").write(str(child.pid))
print("ready to serve", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def trainer(code: str) -> Trainer:
    def command(setting: trainers.Setting) -> list[str]:
        return [str(setting.python), "-c", code, str(setting.port)]

    return Trainer("double", "1.0", Recipe(PYTHON, ()), command, "ready to serve")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux, to wait for a grandchild")
def test_a_trainer_is_ended_with_its_children(tmp_path):
    with trainers.started(trainer(SERVER), Path(sys.executable), tmp_path, tmp_path) as running:
        child = os.pidfd_open(int((tmp_path / "child").read_text()))
        assert running.base_url.startswith("http://127.0.0.1:")
        assert not select.select([child], [], [], 0)[0]  # it runs
    assert select.select([child], [], [], 20)[0]  # it has ended
    os.close(child)


def test_a_trainer_that_ends_by_itself_says_why(tmp_path):
    given = trainer("raise ValueError('no such model')")
    with (
        pytest.raises(NotStartedError, match="it ended with 1: ValueError: no such model"),
        trainers.started(given, Path(sys.executable), tmp_path, tmp_path),
    ):
        pass


def test_the_list_passes_on_the_embedded_trainer_as_far_as_a_toy_goes(tmp_path):
    toy = Trainer("embedded", "0", Recipe(PYTHON, ()), lambda _: [], "", toy="no files to read")
    wanted = ("capabilities", "probe", "forward", "`ppo` by name", "load", "checkpoint", "sample")
    wanted += ("compute_logprobs", "vocabulary", "unload")
    with local.running_server(api_key=trainers.API_KEY) as url:
        running = Running(toy, url, "mintjax/nano", tmp_path, lambda: None, lambda: False)
        with checks.client(running) as service:
            rows = checks.run(State(running, None, service), wanted, lambda row: None)
    assert {row.check: row.outcome for row in rows if row.outcome == "no"} == {}
    assert [row.check for row in rows if row.outcome == "left out"] == ["probe"]
    assert len(rows) == len(wanted) + 1  # the model is made anyway


def test_a_check_that_fails_does_not_keep_the_others_from_running(tmp_path):
    toy = Trainer("embedded", "0", Recipe(PYTHON, ()), lambda _: [], "", toy="no files to read")
    with local.running_server(api_key=trainers.API_KEY) as url:
        running = Running(toy, url, "mintjax/huge", tmp_path, lambda: None, lambda: False)
        with checks.client(running) as service:
            rows = checks.run(
                State(running, None, service), ("capabilities", "checkpoint"), lambda row: None
            )
    assert [row.outcome for row in rows] == ["yes", "left out", "no", "no"]
    assert "mintjax/huge" in rows[2].detail


def test_no_check_waits_for_a_trainer_that_has_ended(tmp_path):
    given = Trainer("embedded", "0", Recipe(PYTHON, ()), lambda _: [], "")
    running = Running(given, "http://127.0.0.1:9", "a", tmp_path, lambda: None, lambda: True)
    rows = checks.run(State(running, None, None), (), lambda row: None)
    assert len(rows) == len(CHECKS)
    assert {row.outcome for row in rows} == {"no"}
    assert "has ended" in rows[0].detail


ROWS = [
    {"trainer": "one", "check": "versions", "outcome": "yes", "detail": "one 1.0", "seconds": 1.0},
    {"trainer": "one", "check": "forward", "outcome": "yes", "detail": "off by 0", "seconds": 1.0},
    {"trainer": "one", "check": "sample", "outcome": "no", "detail": "E: a|b", "seconds": 1.0},
    {"trainer": "two", "check": "starts", "outcome": "no", "detail": "no GPU", "seconds": 1.0},
    {"trainer": "two", "check": "sample", "outcome": "refused", "detail": "501", "seconds": 1.0},
]


def test_the_table_has_a_column_per_trainer_and_says_why_not():
    text = table(ROWS)
    assert "|  | one | two |" in text
    assert "| forward | off by 0 |  |" in text
    assert "| sample | **no** (1) | refused (2) |" in text
    assert "1. E: a\\|b\n2. 501" in text
    assert "one: one 1.0.<br>two: no GPU." in text


def test_what_was_not_tried_again_stays_in_the_table():
    new = [{**ROWS[3], "check": "sample", "outcome": "yes"}]
    assert kept.merged(ROWS, new) == ROWS[:3] + new


def test_no_check_has_the_name_of_another():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
