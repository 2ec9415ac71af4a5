"""Settings that every test runs under."""

import gc
import os
import sys

import jax
import pytest
from hypothesis import HealthCheck, settings

from . import torch_double
from .foreign import foreign as foreign

settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    max_examples=12,
)
settings.register_profile(
    "thorough",
    deadline=None,
    derandomize=False,  # a profile inherits what it does not say from the one that is loaded
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "5000")),
)
settings.load_profile("default")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Where JAX_COMPILATION_CACHE_DIR is set, small programs are kept too, because the tests have many.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_sessionstart():
    """Lets XLA compile quickly by default, because tests compile much and run it briefly.

    The thorough profile has the programs that users have.
    """
    if settings.default.derandomize:
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_traceback_in_locations_limit", 0)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of tests that start other processes
        flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
        if jax.__version_info__ < (0, 11):  # later ones refuse the flag
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def pytest_collection_finish():
    """Checks that no conftest has asked for the profile before it was loaded.

    It also takes what was imported out of the garbage collector's sight, and lets the collector
    run seldom by default, because it would look through all modules again and again.
    """
    examples = sys.modules.get("tests.examples")
    if examples is not None and settings.default.derandomize == examples.THOROUGH:
        raise pytest.UsageError("tests.examples was imported by a conftest, which is too early")
    if settings.default.derandomize:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish():
    """Collects garbage once, because pytest does it twice at the end, and each takes a second."""
    gc.collect()
    gc.freeze()


collect_ignore_glob = ["**/make_*.py"]  # scripts that write golden files, with what only they need


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """Keeps what is measured in tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def engine():
    """One embedded trainer for all tests."""
    from mintjax.local import Engine  # late: tests of the core run without the extra

    with Engine() as engine:
        yield engine


@pytest.fixture
def x64():
    """Run the test with 64-bit types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_torch(monkeypatch):
    """Let ``import torch`` give a double that knows linear losses."""
    torch = torch_double.module()
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch
