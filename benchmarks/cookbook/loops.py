"""Runs tinker-cookbook's own loops on a trainer, with a renderer and a tokenizer of bytes.

    PYTHON loops.py URL FOLDER [LOOP ...]

Run by :mod:`benchmarks.cookbook` with the Python of an environment that holds tinker-cookbook and
not mintjax. Each loop prints one line of JSON: its name and what it measured.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chz
import datasets
import tinker
from tinker_cookbook import model_info, renderers
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.renderers.base import (
    Message,
    ParseTermination,
    RenderContext,
    RenderedMessage,
    Renderer,
)
from tinker_cookbook.rl import train as rl
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import RLDataset, RLDatasetBuilder
from tinker_cookbook.supervised import train as sft
from tinker_cookbook.supervised.data import SupervisedDatasetFromHFDataset, conversation_to_datum
from tinker_cookbook.supervised.types import ChatDatasetBuilder, ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import register_tokenizer
from tinker_cookbook.utils import cost_estimation

BASE_MODEL = "mintjax/tiny"
RENDERER = "bytes/plain"
END = 10  # a newline ends a message
WORD = "yes"


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    name_or_path = BASE_MODEL
    eos_token_id = END

    def encode(self, text: str, add_special_tokens: bool = False, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Any, **_: Any) -> str:
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        return bytes(int(one) for one in ids if one < 256).decode(errors="replace")


class Plain(Renderer):
    """Writes ``u:`` or ``a:``, the text of a message, and a newline."""

    has_extension_property = True

    def get_stop_sequences(self) -> list[int]:
        return [END]

    def render_message(self, message: Message, ctx: RenderContext) -> RenderedMessage:
        text = renderers.get_text_content(message)
        return RenderedMessage(
            header=tinker.EncodedTextChunk(tokens=list(f"{message['role'][0]}:".encode())),
            output=[tinker.EncodedTextChunk(tokens=[*text.encode(), END])],
        )

    def parse_response(self, response: list[int]) -> tuple[Message, ParseTermination]:
        ended = bool(response) and response[-1] == END
        text = self.tokenizer.decode(response[:-1] if ended else response)
        kind = ParseTermination.STOP_SEQUENCE if ended else ParseTermination.MALFORMED
        return Message(role="assistant", content=text), kind


QUESTIONS = ["Sky blue?", "Is 2+2 4?", "Wet rain?", "Hot sun?", "Cold ice?", "Sour lemon?"]


def turn(role: str, text: str) -> Message:
    """Makes a message of a conversation."""
    return Message(role=role, content=text)


@chz.chz
class Comparisons(ComparisonDatasetBuilder):
    """Pairs of a short answer, which is preferred, and a long one."""

    def get_train_and_test_datasets(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        rows = datasets.Dataset.from_list([{"question": one} for one in QUESTIONS])
        return rows, rows.select(range(2))

    def example_to_labeled_comparison(self, example: dict[str, str]) -> LabeledComparison:
        prompt = [turn("user", example["question"])]
        answers = [turn("assistant", WORD)], [turn("assistant", "perhaps not")]
        return LabeledComparison(Comparison(prompt, *answers), "A")


@chz.chz
class Conversations(ChatDatasetBuilder):
    """Questions, each with the same answer."""

    def __call__(self) -> Any:
        rows = datasets.Dataset.from_list([{"question": one} for one in QUESTIONS])

        def datum(row: dict[str, str]) -> tinker.Datum:
            talk = [turn("user", row["question"]), turn("assistant", WORD)]
            return conversation_to_datum(talk, self.renderer, 64)

        return SupervisedDatasetFromHFDataset(rows, batch_size=3, map_fn=datum), None


class SaysLetter(ProblemEnv):
    """Rewards an answer by whether it holds a letter."""

    def get_question(self) -> str:
        return QUESTIONS[0]

    def check_answer(self, sample_str: str) -> bool:
        return any(one.isascii() and one.isalpha() for one in sample_str)

    def check_format(self, sample_str: str) -> bool:
        return True

    def get_reference_answer(self) -> str:
        return "a"


class Problems(RLDataset):
    """The same problem, twice in each batch."""

    def get_batch(self, index: int) -> Sequence[ProblemGroupBuilder]:
        renderer = Plain(Bytes())  # type: ignore[arg-type]
        return [ProblemGroupBuilder(lambda: SaysLetter(renderer), 8) for _ in range(2)]

    def __len__(self) -> int:
        return 8


@chz.chz
class ProblemsBuilder(RLDatasetBuilder):
    """Makes :class:`Problems`, for training and for evaluation."""

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        return Problems(), None


COMMON = ChatDatasetBuilderCommonConfig(
    model_name_for_tokenizer=BASE_MODEL, renderer_name=RENDERER, max_length=64, batch_size=3
)


def supervised(url: str, folder: Path) -> dict[str, Any]:
    """Trains on conversations, then goes on from the checkpoint."""

    def run(epochs: int) -> None:
        asyncio.run(
            sft.main(
                sft.Config(
                    log_path=str(folder),
                    model_name=BASE_MODEL,
                    recipe_name="bytes",
                    renderer_name=RENDERER,
                    dataset_builder=Conversations(common_config=COMMON),
                    base_url=url,
                    learning_rate=1e-3,
                    lora_rank=8,
                    num_epochs=epochs,
                    save_every=2,
                    eval_every=0,
                )
            )
        )

    run(2)
    run(3)
    rows = metrics_of(folder)
    losses = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
    assert len(losses) == 6, losses
    assert losses[-1] < losses[0], losses
    return {"steps": len(losses), "nll": [losses[0], losses[-1]]}


def preference(url: str, folder: Path) -> dict[str, Any]:
    """Trains by DPO, with evaluations, then goes on from the checkpoint."""

    def run(epochs: int) -> None:
        train_dpo.main(
            train_dpo.Config(
                log_path=str(folder),
                model_name=BASE_MODEL,
                recipe_name="bytes",
                renderer_name=RENDERER,
                dataset_builder=DPODatasetBuilderFromComparisons(
                    common_config=COMMON, comparison_builder=Comparisons()
                ),
                base_url=url,
                learning_rate=1e-3,
                lr_schedule="constant",
                dpo_beta=0.5,
                lora_rank=8,
                num_epochs=epochs,
                save_every=2,
                eval_every=2,
                rolling_save_every=1,
            )
        )

    run(2)
    run(3)
    rows = [row for row in metrics_of(folder) if "dpo_loss" in row]
    losses = [row["dpo_loss"] for row in rows]
    assert len(losses) == 6, losses
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-5), losses  # both models are the same
    assert losses[3] < losses[0], losses
    return {"steps": len(losses), "dpo_loss": losses[:4], "accuracy": rows[3]["accuracy"]}


def reinforcement(url: str, folder: Path) -> dict[str, Any]:
    """Trains by rewards in each way that the loop has."""
    ways: dict[str, dict[str, Any]] = {
        "sync": {"num_substeps": 2},
        "ppo": {"loss_fn": "ppo", "loss_fn_config": {"clip_low_threshold": 0.7}},
        "kl": {
            "kl_penalty_coef": 0.1,
            "kl_reference_config": rl.KLReferenceConfig(base_model=BASE_MODEL),
            "compute_post_kl": True,
        },
        "stream": {
            "stream_minibatch_config": rl.StreamMinibatchConfig(
                groups_per_batch=2, num_minibatches=2
            )
        },
        "async": {
            "async_config": rl.AsyncConfig(
                max_steps_off_policy=1, groups_per_batch=2, loss_fn="ppo"
            )
        },
    }
    found: dict[str, Any] = {}
    for name, options in ways.items():
        for steps in (2, 3):  # the second goes on from the checkpoint of the first
            config = rl.Config(
                log_path=str(folder / name),
                model_name=BASE_MODEL,
                recipe_name="bytes",
                renderer_name=RENDERER,
                dataset_builder=ProblemsBuilder(),
                base_url=url,
                learning_rate=3e-3,
                lora_rank=8,
                max_tokens=3,
                max_steps=steps,
                save_every=2,
                eval_every=0,
                **options,
            )
            asyncio.run(rl.main(config))
        rows = [row for row in metrics_of(folder / name) if "env/all/reward/total" in row]
        assert len(rows) == 3, rows
        drift = [row["optim/kl_sample_train_v1"] for row in rows]
        assert max(row["env/all/reward/total"] for row in rows) > -0.1, rows  # that of no letter
        if name in ("ppo", "kl"):  # elsewhere the model has moved on since it was sampled from
            assert max(map(abs, drift)) < 1e-4, (name, drift)
        found[name] = {"reward": [row["env/all/reward/total"] for row in rows], "kl": drift}
    return found


def refused(url: str, folder: Path) -> dict[str, Any]:
    """Asks for the loss that reads what a hosted trainer has kept of each sample."""
    config = rl.Config(
        log_path=str(folder),
        model_name=BASE_MODEL,
        recipe_name="bytes",
        renderer_name=RENDERER,
        dataset_builder=ProblemsBuilder(),
        base_url=url,
        learning_rate=1e-3,
        lora_rank=8,
        max_tokens=3,
        max_steps=1,
        async_config=rl.AsyncConfig(max_steps_off_policy=1, groups_per_batch=2),
    )
    try:
        asyncio.run(rl.main(config))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    raise AssertionError("stable_reinforce was served")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Reads what a loop has logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LOOPS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "supervised": supervised,
    "preference": preference,
    "reinforcement": reinforcement,
    "refused": refused,
}


def main(url: str, folder: str, *names: str) -> None:
    """Runs the loops."""
    register_tokenizer(BASE_MODEL, Bytes)  # type: ignore[arg-type]
    renderers.register_renderer(RENDERER, lambda tokenizer, *_, **__: Plain(tokenizer))
    cost_estimation.load_model_pricing = lambda **_: None  # it would be asked for over the network
    model_info.warn_if_renderer_not_recommended = lambda *_: None
    for name in names or LOOPS:
        began = time.perf_counter()
        found = LOOPS[name](url, Path(folder) / name)
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({"loop": name, "seconds": seconds, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
