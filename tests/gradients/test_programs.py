"""Programs that one process compiled are read by the next."""

import json
import subprocess
import sys

STEP = """
import json, sys
import jax
import numpy as np
import mintjax
from mintjax import Datum, ModelInput, objectives

found = {"cache_hits": 0, "cache_misses": 0}

def note(event, **_):
    name = event.rpartition("/")[2]
    if name in found:
        found[name] += 1

jax.monitoring.register_event_listener(note)
mintjax.gradients.keep_programs(sys.argv[1])
columns = {"target_tokens": [1, 2], "logprobs": [-1.0, -2.0], "advantages": [1.0, -0.5]}
data = [Datum(ModelInput.from_ints([1, 2]), columns)]
result = mintjax.value_and_logprob_grads(objectives.ppo(), data, [np.float32([-1.1, -1.9])])
found["grads"] = result.grads[0].tolist()
print(json.dumps(found))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    first, second = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", STEP, str(tmp_path / "programs")],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(2)
    )
    assert first["cache_misses"] > 0
    assert first["cache_hits"] == 0
    assert second["cache_misses"] == 0
    assert second["cache_hits"] == first["cache_misses"]
    assert second["grads"] == first["grads"]
