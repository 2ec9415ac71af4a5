"""Torch's gradient of a loss through the same model and adapters, as the reference.

Runs in an environment with torch, transformers and tokenizers, and without mintjax::

    python reference.py write DIRECTORY   writes a tiny random Qwen3 with a byte-level tokenizer
    python reference.py serve DIRECTORY   reads jobs from standard input, one JSON object a line

A job names a ``.npz`` with the adapters (``A/<module>``, ``B/<module>``), their ``scale``, and the
data. Its answer is the loss, and a second ``.npz`` with the loss's gradient by each adapter. All is
computed in float64. Losses are written here once more, in torch, from their formulas.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid

VOCAB_SIZE = 512


def write(directory: Path) -> None:
    """Writes the model and its tokenizer, in the layout of the Hugging Face hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=257,
        eos_token_id=256,
    )
    Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|begin|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>", pad_token="<|end|>"
    ).save_pretrained(directory)
    # Transformers 4 knows neither 5's name of this tokenizer, nor where 5 keeps theta.
    _amend(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _amend(directory / "config.json", rope_theta=10_000.0)


def _amend(path: Path, **words: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **words}))


class Reference:
    """The model, and the gradient of losses by adapters in it."""

    def __init__(self, directory: Path) -> None:
        from transformers import Qwen3ForCausalLM

        model = Qwen3ForCausalLM.from_pretrained(directory, attn_implementation="eager")
        self.model = model.to(torch.float64).eval()
        named = self.model.named_parameters(remove_duplicate=False)
        self.weights = {name: value.detach() for name, value in named}

    def logprobs(
        self, adapters: dict[str, Tensor], scale: float, data: list[dict[str, Any]]
    ) -> list[Tensor]:
        """Computes the logprobs of the target tokens of each datum.

        An adapter of the output projection leaves the embedding as it is, though both are one
        matrix in this model.
        """
        weights = dict(self.weights)
        for module in sorted({name.partition("/")[2] for name in adapters}):
            update = adapters[f"B/{module}"] @ adapters[f"A/{module}"]
            name = f"{module}.weight"
            weights[name] = weights[name] + scale * update
        rows: list[Tensor] = []
        for datum in data:
            tokens = torch.tensor([datum["tokens"]])
            logits = functional_call(self.model, weights, (tokens,), tie_weights=False).logits[0]
            targets = torch.tensor(datum["targets"])[:, None]
            rows.append(torch.log_softmax(logits, -1).gather(1, targets)[:, 0])
        return rows

    def gradient(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answers a job."""
        with np.load(job["adapters"]) as arrays:
            adapters = {
                name: torch.tensor(arrays[name], dtype=torch.float64, requires_grad=True)
                for name in arrays.files
            }
        rows = self.logprobs(adapters, job["scale"], job["data"])
        columns: dict[str, list[Tensor]] = {
            name: [torch.tensor(datum[name], dtype=torch.float64) for datum in job["data"]]
            for name in job["data"][0]
            if name not in ("tokens", "targets")
        }
        loss = LOSSES[job["loss"]](rows, columns, **job["settings"])
        names = list(adapters)
        grads = torch.autograd.grad(loss, [adapters[name] for name in names])
        np.savez(
            job["gradient"], **{name: grad.numpy() for name, grad in zip(names, grads, strict=True)}
        )
        return {"loss": loss.item(), "logprobs": [row.tolist() for row in rows]}


Rows = list[Tensor]
Columns = dict[str, Rows]


def cross_entropy(rows: Rows, columns: Columns, divisors: list[float]) -> Tensor:
    return _summed([-w * row for row, w in zip(rows, columns["weights"], strict=True)], divisors)


def importance_sampling(rows: Rows, columns: Columns, divisors: list[float]) -> Tensor:
    ratios = [torch.exp(row - q) for row, q in zip(rows, columns["logprobs"], strict=True)]
    return _policy([-r * a for r, a in _with(ratios, columns)], columns, divisors)


def ppo(rows: Rows, columns: Columns, divisors: list[float], low: float, high: float) -> Tensor:
    ratios = [torch.exp(row - q) for row, q in zip(rows, columns["logprobs"], strict=True)]
    losses = [
        -torch.minimum(r * a, torch.clamp(r, low, high) * a) for r, a in _with(ratios, columns)
    ]
    return _policy(losses, columns, divisors)


def cispo(rows: Rows, columns: Columns, divisors: list[float], low: float, high: float) -> Tensor:
    losses = [
        -torch.clamp(torch.exp(row - q), low, high).detach() * a * row
        for row, q, a in zip(rows, columns["logprobs"], columns["advantages"], strict=True)
    ]
    return _policy(losses, columns, divisors)


def dro(rows: Rows, columns: Columns, divisors: list[float], beta: float) -> Tensor:
    losses = [
        -(row * a - beta / 2 * (row - q) ** 2)
        for row, q, a in zip(rows, columns["logprobs"], columns["advantages"], strict=True)
    ]
    return _policy(losses, columns, divisors)


def bradley_terry(rows: Rows, columns: Columns) -> Tensor:
    scores = [(w * row).sum() for row, w in zip(rows, columns["weights"], strict=True)]
    return -logsigmoid(torch.stack(scores[0::2]) - torch.stack(scores[1::2])).mean()


def dpo(rows: Rows, columns: Columns, beta: float) -> Tensor:
    parts = zip(rows, columns["ref_logprobs"], columns["weights"], strict=True)
    scores = [beta * (w * (row - reference)).sum() for row, reference, w in parts]
    return -logsigmoid(torch.stack(scores[0::2]) - torch.stack(scores[1::2])).mean()


def mean_square(rows: Rows, columns: Columns) -> Tensor:
    """A loss that no trainer has: the mean over datums of the mean square of the logprobs."""
    return torch.stack([row.square().mean() for row in rows]).mean()


def _with(ratios: Rows, columns: Columns) -> list[tuple[Tensor, Tensor]]:
    return list(zip(ratios, columns["advantages"], strict=True))


def _policy(losses: Rows, columns: Columns, divisors: list[float]) -> Tensor:
    weights = columns.get("weights")
    if weights is not None:
        losses = [w * loss for loss, w in zip(losses, weights, strict=True)]
    return _summed(losses, divisors)


def _summed(losses: Rows, divisors: list[float]) -> Tensor:
    return torch.stack(
        [loss.sum() / divisor for loss, divisor in zip(losses, divisors, strict=True)]
    ).sum()


LOSSES = {
    fn.__name__: fn
    for fn in (
        cross_entropy,
        importance_sampling,
        ppo,
        cispo,
        dro,
        bradley_terry,
        dpo,
        mean_square,
    )
}


def main(what: str, directory: Path) -> None:
    """Writes the model, or answers jobs until standard input ends."""
    torch.set_num_threads(1)
    if what == "write":
        return write(directory)
    reference = Reference(directory)
    print(json.dumps({"ready": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(reference.gradient(json.loads(line))), flush=True)
    return None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
