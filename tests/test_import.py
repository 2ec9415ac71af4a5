import subprocess
import sys

import pytest

LOOK = """
import socket, sys, threading

def refuse(*args, **kwargs):
    raise AssertionError("import mintjax opened a socket")

socket.socket.connect = socket.socket.bind = refuse
import mintjax
import mintjax.client.service
from jax._src import xla_bridge

assert threading.active_count() == 1, threading.enumerate()
assert not xla_bridge.backends_are_initialized()
unwanted = {"torch", "starlette", "uvicorn", "typer", "safetensors", "hypothesis"}
unwanted |= {"mintjax.local", "mintjax.cli", "mintjax.testing", "mintjax.cli.preference_demo"}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
print(sorted(name for name in dir(mintjax) if not name.startswith("_")))
assert threading.active_count() == 1, threading.enumerate()
print(mintjax.losses.ppo.__name__, mintjax.objectives.ppo())
for name in "bench", "interop", "local":
    assert name in dir(mintjax)
    assert f"mintjax.{name}" not in sys.modules, f"{name} came with those before"
    print(getattr(mintjax, name).__name__)
mintjax.interop.sdk_loss(lambda data, logprobs: (logprobs.total(), {}))
assert not {"torch", "tinker"} & set(sys.modules)
mintjax.loses
"""


@pytest.fixture(scope="module")
def bare():
    """An import of the package and nothing else, in a process of its own."""
    return subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)


def test_import_starts_nothing_and_brings_no_extra(bare):
    assert "'ServiceClient'" in bare.stdout, bare.stderr


def test_modules_come_when_they_are_used_and_torch_with_none(bare):
    _, loss, *modules = bare.stdout.splitlines()
    assert loss.startswith("ppo ppo(")
    assert modules == ["mintjax.bench", "mintjax.interop", "mintjax.local"], bare.stderr
    assert "module 'mintjax' has no attribute 'loses'" in bare.stderr


def test_the_version_is_that_of_the_package():
    import importlib.metadata

    import mintjax

    try:
        expected = importlib.metadata.version("mintjax")
    except importlib.metadata.PackageNotFoundError:
        expected = "0.0.0"
    assert mintjax.__version__ == expected
