import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mintjax import cli
from mintjax.local import running_server


def run(*arguments, **environment):
    return CliRunner().invoke(cli.app, arguments, env=environment, catch_exceptions=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} + {b}?", "chosen": f"It is {a + b}.", "rejected": f"Who knows {a}!"}
        for a in range(3)
        for b in range(3)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "serve", "losses"):
        assert command in result.output


def test_losses_prints_formulas_and_what_each_trainer_makes_of_them():
    result = run("losses")
    assert result.exit_code == 0
    for word in ("cispo", "clip_low_threshold", "SkyRL", "loss:sum"):
        assert word in result.output


def test_the_demo_in_json_is_a_line_for_each_step_and_a_summary(pairs):
    options = ("--steps", "2", "--batch-pairs", "3", "--base-model", "mintjax/nano", "--lr", "0.01")
    with running_server(api_key="tml-secret-key") as url:
        demo = ("demo", "--data", str(pairs), "--base-url", url, *options)
        result = run(*demo, "--json", TINKER_API_KEY="tml-secret-key")
        pretty = run(*demo, "--loss", "dpo", TINKER_API_KEY="tml-secret-key")
        refused = run(*demo, "--json", TINKER_API_KEY="tml-wrong-key")
    assert result.exit_code == 0, result.output
    *steps, summary = map(json.loads, result.output.splitlines())
    assert [step["step"] for step in steps] == [1, 2]
    assert set(steps[0]) == {"step", "loss", "pair_accuracy", "mean_margin", "seconds"}
    assert summary["summary"] is True
    assert {
        "loss_first",
        "loss_last",
        "train_accuracy_before",
        "train_accuracy_after",
        "heldout_accuracy_before",
        "heldout_accuracy_after",
        "client_share",
    } <= set(summary)
    assert pretty.exit_code == 0, pretty.output
    assert "held-out pairs" in pretty.output
    assert refused.exit_code != 0
    for output in (result.output, pretty.output, refused.output):
        assert "secret-key" not in output


def mintjax(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from mintjax.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mistake_is_a_message_and_not_a_traceback(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    for arguments, message in (
        (("demo", "--data", str(bad)), "bad.jsonl, line 1: Object missing required field"),
        (("demo", "--data", str(tmp_path / "none")), "No such file or directory"),
        (("demo", "--base-url", "http://127.0.0.1:9", "--data", str(bad)), "line 1"),
    ):
        done = mintjax(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert mintjax("demo", "--steps", "0").returncode == 2


def test_serve_runs_until_it_is_interrupted():
    import signal

    command = [sys.executable, "-c", "from mintjax.cli import main; main()", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        announced = server.stdout.readline()
        server.send_signal(signal.SIGINT)
        assert server.wait(20) in (0, 130)
    assert announced.startswith("mintjax trainer at http://127.0.0.1:")
