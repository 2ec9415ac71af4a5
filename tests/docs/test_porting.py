"""The guide's table of torch's idioms and ours: both columns give the same numbers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import Ragged

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "guides" / "porting.md"
SECTION = PAGE.read_text().partition("## Line by line")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| `(.+)` \| `(.+?)`", SECTION, re.M)
RNG = np.random.default_rng(0)
ARRAYS = {
    "lp": -3 * RNG.random((4, 5)),
    "old": -3 * RNG.random((4, 5)),
    "ratio": 2 * RNG.random((4, 5)),
    "weights": RNG.random((4, 5)),
    "mask": RNG.random((4, 5)) < 0.6,
    "advantages": RNG.normal(size=4),
}
ARRAYS = {name: np.asarray(x, x.dtype if x.dtype == bool else "f4") for name, x in ARRAYS.items()}


def test_the_table_is_read():
    assert len(ROWS) >= 20


@pytest.mark.parametrize(("torch_code", "code"), ROWS)
def test_a_row(torch_code, code):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    names = {"torch": torch, "F": torch.nn.functional}
    expected = eval(torch_code, names | tensors).numpy()

    ours = {
        name: Ragged.from_rows([*array]) if array.ndim == 2 else jnp.asarray(array)
        for name, array in ARRAYS.items()
    }
    found = eval(code, {"jax": jax, "jnp": jnp} | ours)
    if isinstance(found, Ragged):
        found = np.stack([np.asarray(row) for row in found.to_rows()])
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)
