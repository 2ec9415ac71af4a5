import subprocess
import sys

import pytest

LOOK = """
import socket, sys, threading

def refuse(*args, **kwargs):
    raise AssertionError("import mintjax opened a socket")

socket.socket.connect = socket.socket.bind = refuse
import mintjax
from jax._src import xla_bridge

assert threading.active_count() == 1, threading.enumerate()
assert not xla_bridge.backends_are_initialized()
unwanted = {"torch", "starlette", "uvicorn", "typer", "safetensors", "hypothesis"}
unwanted |= {"mintjax.local", "mintjax.cli", "mintjax.testing", "mintjax.cli.preference_demo"}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
print(sorted(name for name in dir(mintjax) if not name.startswith("_")))
"""


def test_import_starts_nothing_and_brings_no_extra():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'ServiceClient'" in done.stdout


def test_the_libraries_of_losses_come_when_they_are_used():
    used = "import mintjax; print(mintjax.losses.ppo.__name__, mintjax.objectives.ppo())"
    done = subprocess.run(
        [sys.executable, "-c", f"{used}; mintjax.loses"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("ppo ppo(")
    assert "module 'mintjax' has no attribute 'loses'" in done.stderr


@pytest.mark.parametrize("name", ["bench", "interop", "local"])
def test_modules_can_be_reached_after_a_bare_import(name):
    used = f"import mintjax; assert {name!r} in dir(mintjax); print(mintjax.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", used], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"mintjax.{name}"


def test_the_version_is_that_of_the_package():
    import importlib.metadata

    import mintjax

    try:
        expected = importlib.metadata.version("mintjax")
    except importlib.metadata.PackageNotFoundError:
        expected = "0.0.0"
    assert mintjax.__version__ == expected
