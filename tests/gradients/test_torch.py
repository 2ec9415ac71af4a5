import contextlib
import functools

import numpy as np
import pytest

import mintjax
from mintjax import Datum, ModelInput, objectives
from mintjax.errors import ObjectiveError
from mintjax.gradients.evaluate import constant_logprob_grads
from mintjax.gradients.torch import torch_if_written_for_it, torch_objective


def make(sizes):
    rng = np.random.default_rng(0)
    data = [
        Datum(
            ModelInput.from_ints(range(n)),
            {"target_tokens": np.arange(n), "weights": np.ones(n, np.float32) / n},
        )
        for n in sizes
    ]
    return data, [-rng.exponential(size=n).astype(np.float32) for n in sizes]


def test_it_refuses_to_be_traced_and_says_where_to_pass_it():
    objective = torch_objective(make)
    assert repr(objective) == "torch_objective(make)"
    with pytest.raises(ObjectiveError, match="pass it to forward_backward_custom"):
        objective([], [])
    assert constant_logprob_grads(objective, make([2])[0]) is None


def test_a_torch_loss_gives_what_the_jax_one_gives():
    torch = pytest.importorskip("torch", reason='needs torch: pip install "mintjax[bench]"')

    def pairwise(data, logprobs_list):
        scores = [
            torch.dot(lp, datum.loss_fn_inputs["weights"].to_torch())
            for datum, lp in zip(data, logprobs_list, strict=True)
        ]
        margins = torch.stack(scores[::2]) - torch.stack(scores[1::2])
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        return loss, {"loss": loss.item(), "mean_margin": margins.mean()}

    data, logprobs = make([3, 50, 7, 4])
    theirs = mintjax.value_and_logprob_grads(torch_objective(pairwise), data, logprobs)
    ours = mintjax.value_and_logprob_grads(objectives.bradley_terry(), data, logprobs)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-6)
    assert theirs.metrics["mean_margin"] == pytest.approx(ours.metrics["mean_margin"], rel=1e-5)
    for a, b in zip(theirs.grads, ours.grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)

    def first_only(data, logprobs_list):
        return logprobs_list[0].sum(), {"text": "fast"}

    with pytest.raises(ObjectiveError, match="metric 'text'"):
        mintjax.value_and_logprob_grads(torch_objective(first_only), data, logprobs)
    with pytest.raises(ObjectiveError, match="must be a torch scalar"):
        mintjax.value_and_logprob_grads(torch_objective(lambda d, lps: (1.0, {})), data, logprobs)
    ignoring = torch_objective(lambda d, lps: (lps[0].sum(), {}))
    grads = mintjax.value_and_logprob_grads(ignoring, data, logprobs).grads
    assert [float(g.sum()) for g in grads] == [3, 0, 0, 0]


def test_the_gradient_is_what_backward_leaves_in_the_rows(small_torch):
    def cross_entropy(data, rows):
        weights = [small_torch.tensor(datum.loss_fn_inputs["weights"]) for datum in data]
        scores = [small_torch.dot(row, w) for row, w in zip(rows, weights, strict=True)]
        return -small_torch.stack(scores).sum(), {"first": scores[0], "datums": len(data)}

    data, logprobs = make([3, 5])
    theirs = mintjax.value_and_logprob_grads(torch_objective(cross_entropy), data, logprobs)
    ours = mintjax.value_and_logprob_grads(objectives.cross_entropy(), data, logprobs)
    assert theirs.loss == theirs.metrics["loss"] == pytest.approx(ours.loss, rel=1e-6)
    assert theirs.metrics["first"] == pytest.approx(logprobs[0].mean(), rel=1e-6)
    assert theirs.metrics["datums"] == 2
    for a, b in zip(theirs.grads, ours.grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("reads_the_first", [False, True])
def test_a_row_that_a_torch_loss_does_not_read_has_a_gradient_of_zeros(
    small_torch, reads_the_first
):
    def loss(data, rows):
        return (rows[0] if reads_the_first else small_torch.tensor([2.0])).sum(), {}

    data, logprobs = make([3, 5])
    told = contextlib.nullcontext() if reads_the_first else pytest.warns(match="is 0 whatever")
    with told:
        result = mintjax.value_and_logprob_grads(torch_objective(loss), data, logprobs)
    assert result.loss == pytest.approx(logprobs[0].sum() if reads_the_first else 2.0)
    assert [grad.tolist() for grad in result.grads] == [[float(reads_the_first)] * 3, [0.0] * 5]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: loss, r"must return \(loss, metrics\)"),
        (lambda loss: (loss, {}, 1), r"must return \(loss, metrics\)"),
        (lambda loss: (loss, None), "metrics of .* must be a dict, not None"),
    ],
)
def test_a_torch_loss_that_returns_something_else_is_refused(small_torch, returned, message):
    objective = torch_objective(lambda data, rows: returned(rows[0].sum()))
    with pytest.raises(ObjectiveError, match=message):
        mintjax.value_and_logprob_grads(objective, *make([3]))


@pytest.mark.parametrize("kind", ["row", "float"])
def test_a_torch_loss_that_is_no_scalar_is_refused(small_torch, kind):
    objective = torch_objective(lambda data, rows: (rows[0] if kind == "row" else 1.0, {}))
    with pytest.raises(ObjectiveError, match="must be a torch scalar"):
        mintjax.value_and_logprob_grads(objective, *make([3]))


def test_a_loss_that_names_torch_is_known_for_one(small_torch):
    torch = small_torch

    def helper(row):
        return torch.stack([row])

    def reads_torch(data, logprobs):
        return helper(logprobs[0]).sum(), {}

    def imports_it(data, logprobs):
        import torch

        return torch.stack(logprobs).sum(), {}

    def converts(data, logprobs):
        return sum((row * d["w"].to_torch()).sum() for d, row in zip(data, logprobs)), {}  # noqa: B905

    class Callable:
        def __call__(self, data, logprobs):
            return helper(logprobs[0]), {}

    def in_jax(data, logprobs):
        return logprobs.total(), {"torch": np.zeros(())}

    torch_losses = [reads_torch, imports_it, converts, Callable(), functools.partial(reads_torch)]
    for loss in torch_losses:
        assert isinstance(torch_if_written_for_it(loss), torch_objective), loss
    given = torch_objective(reads_torch)
    for loss in (in_jax, objectives.ppo(), given, lambda d, lp: in_jax(d, lp), np.sum, print):
        assert torch_if_written_for_it(loss) is loss
