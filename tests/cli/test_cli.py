import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
from typer.testing import CliRunner

from mintjax import cli
from mintjax.errors import ConfigError
from mintjax.local import DIALECTS, Engine, running_server
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.step.reduction import SUM, Reduction


def run(*arguments, **environment):
    return CliRunner().invoke(cli.app, arguments, env=environment, catch_exceptions=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} + {b}?", "chosen": f"It is {a + b}.", "rejected": f"Who knows {a}!"}
        for a in range(2)
        for b in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_help_names_the_commands_and_shows_how_they_are_used():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "serve", "probe", "bench", "losses"):
        assert f"mintjax {command}" in result.output
    assert run().exit_code == 2


@pytest.mark.parametrize("command", ["demo", "serve", "probe", "bench", "losses"])
def test_every_command_explains_itself_and_speaks_json(command):
    result = run(command, "-h", TERM="dumb", COLUMNS="200")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_version():
    result = run("--version")
    assert re.match(r"mintjax \d+\.\d+\.\d+", result.output)


def test_losses_prints_formulas_and_what_each_trainer_makes_of_them():
    result = run("losses")
    assert result.exit_code == 0
    for word in ("cispo", "clip_low_threshold", "SkyRL", "loss:sum"):
        assert word in result.output


def test_losses_in_json_say_the_same():
    found = json.loads(run("losses", "--json").output)
    formulas = {row["loss"]: row for row in found["losses"]}
    assert formulas["ppo"]["config"] == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert set(formulas) == set(found["trainers"][0]["losses"])
    assert set(formulas["gspo"]["config"]) == set(formulas["ppo"]["config"])
    assert "TuFT" in [row["trainer"] for row in found["trainers"]]


def test_the_demo_in_json_is_a_line_for_each_step_and_a_summary(pairs):
    options = ("--steps", "2", "--batch-pairs", "2", "--base-model", "mintjax/nano", "--lr", "0.01")
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


def test_the_demo_brings_its_own_trainer(pairs):
    options = ("--steps", "1", "--batch-pairs", "2", "--base-model", "mintjax/nano", "--json")
    result = run("demo", "--data", str(pairs), *options)
    assert result.exit_code == 0, result.output
    assert [json.loads(line).get("step") for line in result.output.splitlines()] == [1, None]


def test_the_package_runs_as_a_program_and_does_nothing_when_imported(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mintjax.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["mintjax", "--version"])
    importlib.import_module("mintjax.__main__")
    assert capsys.readouterr().out == ""
    monkeypatch.delitem(sys.modules, "mintjax.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mintjax", run_name="__main__")
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.startswith("mintjax ")


def test_probe_says_what_a_trainer_is():
    config = ClientConfigResponse(proto_write_fwdbwd=True, proto_compress_fwdbwd=True)
    with (
        Engine(reduction=Reduction("weights", per_step="datums")) as engine,
        running_server(engine, api_key="tml-secret-key", config=config) as url,
    ):
        probe = ("probe", "--base-url", url, "--base-model", "mintjax/nano")
        measured = run(*probe, "--json", TINKER_API_KEY="tml-secret-key")
        pretty = run(*probe, "--no-measure", TINKER_API_KEY="tml-secret-key")
        in_words = run(*probe, TINKER_API_KEY="tml-secret-key", COLUMNS="120")
    assert measured.exit_code == 0, measured.output
    found = json.loads(measured.stdout)
    divisors = {"per_sequence": "weights", "per_request": None, "per_step": "datums"}
    assert found["reduction"] == divisors
    assert found["carried_by"] == "importance_sampling"
    assert "mintjax/nano" in [model["model_name"] for model in found["models"]]
    assert found["flags"]["proto_write_fwdbwd"] is True
    assert pretty.exit_code == 0
    for words in ("mintjax/tiny, 2048 tokens", "protocol buffers, compressed", "not measured"):
        assert words in pretty.output
    words = " ".join(in_words.output.split())
    assert "the sum, divided by the sum of weights of the sequence and by the number of" in words
    assert "secret-key" not in measured.output + pretty.output + in_words.output


def test_probe_says_which_encoding_was_found():
    with running_server(like="tuft-0.2") as url:
        found = run("probe", "--base-url", url, "--base-model", "mintjax/nano", COLUMNS="120")
    words = " ".join(found.output.split())
    assert "wants passes in protocol buffers" in words
    assert "a loss is the sum" in words


def test_bench_in_json():
    result = run("bench", "dpo", "--datums", "2,4", "--lengths", "3:9", "--steps", "2", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert sorted(report["columns"]) == ["ref_logprobs", "weights"]
    assert [row["datums"] for row in report["results"]] == [2, 4]
    assert report["results"][0]["median_ms"] > 0
    assert report["machine"]["cores"] >= 1


def test_bench_tells_the_share_of_a_step():
    bench = ("bench", "cross_entropy", "--datums", "2", "--lengths", "3:9", "--steps", "2")
    options = ("--trainer", "embedded", "--base-model", "mintjax/nano", "--trainer-steps", "1")
    result = run(*bench, *options, COLUMNS="120")
    assert result.exit_code == 0, result.output
    assert "a custom step of 2 datums on embedded (by_name)" in result.output
    assert "%" in result.output


def test_bench_beside_torch(small_torch):
    bench = ("bench", "cross_entropy", "--datums", "2", "--lengths", "3:9", "--steps", "2")
    result = run(*bench, "--against", "torch", COLUMNS="120")
    assert result.exit_code == 0, result.output
    assert re.search(r"torch takes \d+\.\d times as long for 2 datums", result.output)
    assert "mintjax takes" not in result.output
    assert re.search(r"gradients differ by \d\.\de[+-]\d\d of the largest", result.output)
    assert "--trainer embedded, or a base URL, measures it" in result.output


def test_bench_takes_steps_on_a_trainer_somewhere(engine):
    bench = ("bench", "cross_entropy", "--datums", "2", "--lengths", "3:9", "--steps", "2")
    options = ("--base-model", "mintjax/nano", "--trainer-steps", "1", "--json")
    with running_server(engine) as url:
        result = run(*bench, "--trainer", url, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["trainer"] == url
    assert [step["datums"] for step in report["custom_steps"]] == [2]


def test_bench_says_what_a_figure_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench = ("bench", "cross_entropy", "--datums", "2", "--lengths", "3:9", "--steps", "1")
    result = run(*bench, "--plot", str(tmp_path / "cost.svg"))
    assert isinstance(result.exception, ConfigError)
    assert "pip install matplotlib" in str(result.exception)


@pytest.mark.parametrize("option", [("--datums", "x"), ("--datums", "0"), ("--lengths", "9:3")])
def test_bench_refuses_what_it_does_not_understand(option):
    result = run("bench", "ppo", *option)
    assert result.exit_code == 2
    assert option[1] in result.output


@pytest.fixture
def mintjax(monkeypatch, capsys):
    """Runs the whole program in this process; gives its exit status, output and errors."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the program has its own

    def run_program(*arguments):
        monkeypatch.setattr(sys, "argv", ["mintjax", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run_program


def test_a_terminal_may_know_no_more_than_ascii():
    script = textwrap.dedent("""
        import sys
        from mintjax.cli import main
        for arguments in ["--help"], ["losses"], ["losses", "--help"]:
            sys.argv = ["mintjax", *arguments]
            try:
                main()
            except SystemExit as ended:
                assert not ended.code
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("ascii")
    assert text.count("Usage:") == 2
    assert "clip_low_threshold" in text


def test_a_mistake_is_a_message_and_not_a_traceback(mintjax, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    for arguments, message in (
        (("demo", "--data", str(bad)), "bad.jsonl, line 1: Object missing required field"),
        (("demo", "--data", str(tmp_path / "none")), "No such file or directory"),
        (("demo", "--base-url", "http://127.0.0.1:9", "--data", str(bad)), "line 1"),
    ):
        code, _, errors = mintjax(*arguments)
        assert code == 1
        assert message in errors
        assert "Traceback" not in errors
    assert mintjax("demo", "--steps", "0")[0] == 2


def test_a_mistake_in_a_loss_of_ones_own_is_named_with_its_line(mintjax, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the program puts the folder first in it
    broken = "def broken(data, logprobs):\n    return 1 + None, {}\n"
    (tmp_path / "of_a_mistake.py").write_text(broken)
    code, output, errors = mintjax("bench", "of_a_mistake:broken", "--datums", "2")
    assert (code, output) == (1, "")
    assert "of_a_mistake:broken: TypeError: unsupported operand" in errors
    assert "of_a_mistake.py, line 2" in errors
    assert "Traceback" not in errors


def test_a_loss_that_is_traced_for_each_batch_is_measured_with_a_warning_of_one_line(tmp_path):
    loss = "sum(row.sum() * (2 if len(row) % 2 else 1) for row in logprobs)"
    (tmp_path / "mine.py").write_text(f"def rows(data, logprobs):\n    return {loss}, {{}}\n")
    options = ("--datums", "2", "--lengths", "3:5", "--steps", "1", "--warm-up", "0")
    done = subprocess.run(
        [sys.executable, "-m", "mintjax", "bench", "mine:rows", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "mine:rows: 3 to 5 tokens" in done.stdout
    assert done.stderr.startswith("mintjax: rows takes rows one by one")
    assert len(done.stderr.splitlines()) == 1


def test_serve_runs_until_it_is_interrupted():
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script = heed + "from mintjax.cli import main; main()"  # SIGINT may be ignored here
    command = [sys.executable, "-c", script, "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            announced = server.stdout.readline()
            server.send_signal(signal.SIGINT)
            assert server.wait(20) in (0, 130)
        finally:
            server.kill()
    assert announced.startswith("mintjax trainer at http://127.0.0.1:")


def test_serve_asks_clients_for_what_it_is_told(monkeypatch):
    seen = {}

    def serve(host, port, *, announce, **options):
        seen.update(options, address=(host, port))
        announce("http://127.0.0.1:1")

    monkeypatch.setattr("mintjax.local.serve", serve)
    options = ("--port", "1", "--protobuf", "--compress", "--like", "skyrl-tx-0.3")
    result = run("serve", *options, "--json", MINTJAX_SERVE_API_KEY="tml-secret-key")
    assert json.loads(result.output) == {"url": "http://127.0.0.1:1"}
    assert seen["address"] == ("127.0.0.1", 1)
    assert (seen["config"].proto_write_fwdbwd, seen["config"].proto_compress_fwdbwd) == (True, True)
    assert seen["like"] == "skyrl-tx-0.3"
    assert seen["engine"].reduction == Reduction("weights", per_step="datums")
    assert seen["api_key"] == "tml-secret-key"
    assert run("serve").output == "mintjax trainer at http://127.0.0.1:1\n"
    assert seen["like"] is None
    assert seen["engine"].reduction == SUM


def test_serve_names_every_trainer_that_it_plays(mintjax):
    told = " ".join(run("serve", "--help", COLUMNS="200").output.split())
    assert all(name in told for name in DIALECTS)
    code, _, errors = mintjax("serve", "--like", "skyrl-9")
    assert code == 1
    assert "'skyrl-9' is none of skyrl-tx-0.3, " in errors


def test_an_interrupted_command_ends_quietly(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mintjax.cli.preference_demo.read_pairs", interrupted)
    result = run("demo")
    assert result.exit_code == 130
    assert result.output == ""
