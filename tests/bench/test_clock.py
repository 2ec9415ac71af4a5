import importlib.metadata

import jax.numpy as jnp
import numpy as np
import pytest

import mintjax
from mintjax import bench, local


def test_implementations_take_turns_on_the_same_batches():
    seen = []
    implementations = {
        "a": lambda batch: seen.append(("a", batch)),
        "b": lambda batch: seen.append(("b", batch)),
    }
    steps = []
    timings = bench.interleaved(
        implementations, range(20), warm_up=1, on_step=lambda: steps.append(len(seen))
    )
    turns = [seen[i : i + 2] for i in range(0, 40, 2)]
    assert [sorted(turn) for turn in turns] == [[("a", i), ("b", i)] for i in range(20)]
    assert {turn[0][0] for turn in turns} == {"a", "b"}
    assert steps == list(range(2, 42, 2))
    assert [len(timing.seconds) for timing in timings.values()] == [20, 20]
    assert all(second >= 0 for timing in timings.values() for second in timing.seconds)


def test_quantiles_leave_out_the_warm_up():
    timing = bench.Timing(seconds=[100.0, 1.0, 2.0, 3.0], compilations=[1, 0, 0, 0], warm_up=1)
    assert timing.quantile(0.5) == 2.0
    assert timing.quantile(1.0) == 3.0


def test_compilations_are_counted_where_they_happen():
    def squares(data, logprobs):
        return jnp.sum(logprobs.map(jnp.square).sum()), {}

    arrays = bench.Synthetic(lengths=(3, 3)).batch(2)
    timings = bench.interleaved(
        {
            "compiles": lambda a: mintjax.value_and_logprob_grads(squares, a.data, a.logprobs),
            "does not": lambda a: np.concatenate(a.logprobs),
        },
        [arrays, arrays],
        warm_up=0,
    )
    assert timings["compiles"].compilations == [1, 0]
    assert timings["does not"].compilations == [0, 0]


def test_a_machine_says_what_a_reader_needs():
    machine = bench.machine()
    assert machine.cores >= 1
    assert machine.cpu
    assert machine.packages["jax"] == importlib.metadata.version("jax")
    assert len(machine.date) == len("2000-01-31")


@pytest.mark.parametrize("single_pass", [True, False])
def test_steps_on_a_trainer_add_up(single_pass):
    source = bench.Synthetic(["weights"], lengths=(3, 6))
    with local.trainer() as service:
        model = service.create_lora_training_client("mintjax/nano", rank=4, seed=0)
        batches = [source.batch(2).data for _ in range(2)]
        objective = mintjax.objectives.cross_entropy()
        times = bench.time_steps(model, objective, batches, single_pass=single_pass)
    assert times.route == ("by_name" if single_pass else "two_pass")
    assert (times.steps, times.datums) == (1, 2)
    parts = (times.forward_seconds, times.client_seconds, times.backward_seconds)
    assert 0 < sum(parts) + times.optimizer_seconds <= times.seconds * 1.01
    assert (times.forward_seconds == 0) == single_pass
    assert times.client_share == pytest.approx(times.client_seconds / times.seconds)
