import os
import platform
import sys
import textwrap
import types

import pytest

from mintjax import bench, objectives
from mintjax.errors import ConfigError, MintjaxError


def small(objective, **settings):
    source = bench.Synthetic(lengths=(3, 9))
    given = {"objective": "it", "datums": (2, 4), "steps": 3, "warm_up": 1, **settings}
    return bench.run(objective, source, bench.Settings(**given))


def test_a_report_has_a_result_for_each_size():
    steps = []
    source = bench.Synthetic(lengths=(3, 9))
    settings = bench.Settings(objective="bt", datums=(2, 4), steps=3, warm_up=1)
    report = bench.run(objectives.bradley_terry(), source, settings, lambda: steps.append(1))
    assert [result.datums for result in report.results] == [2, 4]
    assert len(steps) == 8
    assert report.columns == ("weights",)
    assert report.gradient_difference is None
    first = report.results[0]
    assert len(first.step_ms) == 4
    assert first.first_ms == first.step_ms[0]
    assert min(first.step_ms[1:]) <= first.median_ms <= first.p90_ms <= max(first.step_ms[1:])
    fastest = 2 * 9 / (1e-3 * min(first.step_ms[1:]))
    assert 0 < first.tokens_per_second <= fastest


def test_an_objective_has_its_compilation_counted():
    def mine(data, logprobs):
        return (logprobs * data["weights"]).total() * 3, {}

    assert small(mine, datums=(2,)).results[0].compilations >= 1


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the working directory; its names are taken back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_objectives_are_found_by_name(module):
    assert bench.load_objective("ppo") == objectives.ppo()
    assert bench.load_objective("mintjax.objectives:dpo") == objectives.dpo()
    name = module("found_losses", "class Losses:\n    def mine(data, logprobs): return 1, {}\n")
    assert bench.load_objective(f"{name}:Losses.mine")(None, None) == (1, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ppq", "'ppq' is neither one of the built-in objectives .*ppo.* nor module:function"),
        ("LossObjective", "neither"),
        ("no_such_module:loss", "there is no module 'no_such_module'"),
        ("mintjax.nothing:loss", "there is no module 'mintjax.nothing'"),
        ("mintjax.objectives:nothing", "has no attribute 'nothing'"),
        ("mintjax.bench:__doc__", "is str, which cannot be called"),
        (":loss", "module:function"),
        ("mintjax:", "module:function"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(name, message):
    with pytest.raises(ConfigError, match=message):
        bench.load_objective(name)


def test_what_a_module_lacks_itself_is_not_blamed_on_its_name(module):
    name = module("needs_another", "import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        bench.load_objective(f"{name}:loss")


def test_there_is_nothing_to_compare_with():
    with pytest.raises(ConfigError, match="no torch counterpart"):
        small(objectives.gspo(), against="torch")


@pytest.mark.parametrize(
    "objective",
    [
        objectives.cross_entropy(),
        objectives.importance_sampling(),
        objectives.ppo(clip_high_threshold=1.1),
        objectives.cispo(clip_low_threshold=0.9),
        objectives.dro(beta=0.2),
        objectives.bradley_terry(),
        objectives.dpo(beta=0.3, label_smoothing=0.1),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_counterparts_have_the_same_gradient(objective):
    pytest.importorskip("torch")
    report = small(objective, against="torch")
    assert report.gradient_difference is not None
    assert report.gradient_difference < 1e-5
    assert [result.implementation for result in report.results[:2]] == ["mintjax", "torch"]


def test_another_loss_does_not_compare(module):
    pytest.importorskip("torch")
    name = module("other_loss", "def loss(data, rows): return sum(r.sum() for r in rows), {}\n")
    with pytest.raises(
        MintjaxError, match="other_loss:loss computes another loss: its gradient at"
    ):
        small(objectives.cross_entropy(), against=f"{name}:loss", datums=(2,))


@pytest.mark.parametrize("sizes", [(2,), (2, 4)])
def test_a_figure(tmp_path, sizes):
    pytest.importorskip("matplotlib")
    report = small(objectives.bradley_terry(), datums=sizes)
    bench.plot(report, tmp_path / "cost.svg")
    assert (tmp_path / "cost.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"cost\.abc"):
        bench.plot(report, tmp_path / "cost.abc")


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    report = small(objectives.bradley_terry(), datums=(2,))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        bench.plot(report, tmp_path / "cost.svg")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="pip install torch"):
        small(objectives.bradley_terry(), against="torch")


def test_a_torch_loss_stands_beside_ours(small_torch):
    report = small(objectives.cross_entropy(), against="torch")
    implementations = [(result.datums, result.implementation) for result in report.results]
    assert implementations == [(2, "mintjax"), (2, "torch"), (4, "mintjax"), (4, "torch")]
    assert report.gradient_difference is not None
    assert report.gradient_difference < 1e-5


def test_a_torch_loss_of_ones_own_is_taken_by_name(small_torch, module):
    """The columns that it reads are made up for both."""
    name = module(
        "own_loss",
        """
        import torch
        from mintjax.gradients.torch import torch_objective

        def loss(data, rows):
            weights = [torch.tensor(datum.loss_fn_inputs["weights"]) for datum in data]
            return -torch.stack(list(map(torch.dot, rows, weights))).sum(), {}

        wrapped = torch_objective(loss)
        """,
    )
    wrapped = bench.load_objective(f"{name}:wrapped")
    report = small(wrapped, against=f"{name}:loss", datums=(2,))
    assert report.columns == ("weights",)
    assert report.results[1].implementation == "own_loss:loss"
    assert report.gradient_difference == 0
    name = module("no_such_loss", "def loss(data, rows): return sum(r.sum() for r in rows), {}\n")
    with pytest.raises(
        MintjaxError, match="no_such_loss:loss computes another loss: its gradient at"
    ):
        small(objectives.cross_entropy(), against=f"{name}:loss", datums=(2,))


@pytest.mark.parametrize("info", [None, "processor : 0\nBogoMIPS : 50.00\n"])
def test_a_machine_that_does_not_name_its_processor(tmp_path, monkeypatch, info):
    place = tmp_path / "cpuinfo"
    if info is not None:
        place.write_text(info)
    monkeypatch.setattr("mintjax.bench._machine.Path", lambda _: place)
    monkeypatch.setattr("mintjax.bench._machine.sys", types.SimpleNamespace(platform="darwin"))
    found = small(objectives.bradley_terry(), datums=(2,)).machine
    assert found.cpu == (platform.processor() or platform.machine())
    assert found.cores == os.cpu_count()
