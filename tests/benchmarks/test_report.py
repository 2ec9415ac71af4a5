"""What stands in README is what was measured."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("benchmarks.report")

from benchmarks.figures import draw
from benchmarks.report import NAMES, Kept, with_numbers
from benchmarks.tables import TABLES
from mintjax import bench

TIMES = (("mintjax", 2.0), ("list", 2.2), ("sdk", 30.0), ("torch", 3.0), ("numpy", 1.0))
ROWS = {
    "gradient_cost": [
        {"loss": loss, "datums": datums, "case": case, "implementation": name, "median_ms": ms}
        for loss in ("ppo", "dpo")
        for datums, case, times in (
            (8, "uniform", TIMES),
            (64, "uniform", TIMES),
            (64, "long_tail", TIMES),
            (64, "callback", (("sdk_loss", 2.0), ("torch_callback", 5.0))),
        )
        for name, ms in times
    ],
    "transport": [
        {"operation": "encode", "implementation": name, "median_ms": ms, "bytes": 2_000_000}
        for name, ms in (("mintjax-json", 4.0), ("sdk-0.22", 50.0))
    ],
    "custom_step": [
        {
            "objective": "ppo",
            "route": route,
            "base_model": "mintjax/nano",
            "datums": 8,
            "forward_ms": 20.0,
            "client_ms": 1.0,
            "backward_ms": 50.0,
            "optimizer_ms": 29.0,
            "step_ms": 100.0,
            "client_share": 0.01,
        }
        for route in ("two_pass", "by_name")
    ],
    "socket_step": [
        {"encoding": "JSON", "datums": 8, "requests": 6.0, "step_ms": 50.0, "rest_ms": 12.5}
    ],
    "real_trainers": [
        {"trainer": "skyrl", "check": "forward", "outcome": "yes", "detail": "off by 0"},
    ],
    "demo": [
        {"step": 1, "loss": 3.0, "pair_accuracy": 0.5},
        {"step": 2, "loss": 1.0, "pair_accuracy": 0.75},
        {
            "loss_first": 3.0,
            "loss_last": 1.0,
            "seconds": 30.2,
            **{f"{part}_pairs": 9 for part in ("train", "heldout")},
            **{
                f"{part}_accuracy_{when}": value
                for part in ("train", "heldout")
                for when, value in (("before", 0.5), ("after", 0.875))
            },
        },
    ],
}


def kept(name):
    return Kept(command=f"measure {name}", machine=bench.machine(), rows=ROWS[name])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gradient_cost", "| 8 | mintjax | 2.00 ms | 2.00 ms |"),
        ("gradient_cost", "| 8 | torch, from NumPy | 3.00 ms (1.5x) | 3.00 ms (1.5x) |"),
        ("gradient_cost", "| 8 | mintjax, the loss as a loop over rows | 2.20 ms (1.1x) |"),
        ("gradient_cost", "| 64, one of 32,768 tokens | mintjax | 2.00 ms |"),
        ("gradient_cost", "as the SDK's callback, beside `sdk_loss`: ppo 2.5x, dpo 2.5x."),
        ("transport", "| encode | mintjax-json | 4.0 ms | 2.0 MB | 12.5 times faster |"),
        ("transport", "| encode | sdk-0.22 | 50.0 ms | 2.0 MB |  |"),
        ("custom_step", "| ppo | by_name | 20.0 | 1.0 | 50.0 | 29.0 | 100.0 | 1.0% |"),
        ("socket_step", "| JSON | 6 | 50.0 | 12.5 |"),
        ("demo", "| pair accuracy, 9 held-out pairs | 0.500 | 0.875 |"),
    ],
)
def test_tables_say_what_was_measured(name, line):
    assert line in TABLES[name](ROWS[name])


@pytest.mark.parametrize("name", TABLES)
def test_numbers_take_the_place_of_older_ones_and_nothing_else_moves(name):
    around = ("before\n<!-- numbers:{} -->\n", "<!-- /numbers -->\nafter <!-- /numbers -->\n")
    before = around[0].format(name) + "old\n" + around[1]
    after = with_numbers(before, name, kept(name))
    assert after is not None
    assert after.startswith(around[0].format(name))
    assert after.endswith(around[1])
    assert "old" not in after
    assert f"`measure {name}`, 20" in after
    assert with_numbers(after, name, kept(name)) == after
    assert with_numbers("no place", name, kept(name)) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_draw_the_same_figure(name, tmp_path):
    first, second = (draw(name, ROWS[name], tmp_path / part).read_bytes() for part in "ab")
    assert first == second
    assert first.startswith(b"<?xml")
