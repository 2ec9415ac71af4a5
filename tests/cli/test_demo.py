import collections
import sys

import numpy as np
import pytest

from mintjax.cli import preference_demo as demo
from mintjax.errors import DataError, MintjaxError
from mintjax.local import trainer

from ..examples import some


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def line(prompt, chosen="yes, 4", rejected="no"):
    return f'{{"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}}'


def test_the_packaged_pairs_are_many_varied_and_tell_nothing_by_length():
    pairs = demo.read_pairs(demo.packaged_pairs())
    assert len(pairs) >= 120
    assert len({pair.prompt.lower() for pair in pairs}) == len(pairs)
    assert len({answer for pair in pairs for answer in (pair.chosen, pair.rejected)}) == 2 * len(
        pairs
    )
    longer = collections.Counter(np.sign(len(p.chosen) - len(p.rejected)) for p in pairs)
    assert 0.8 < longer[1] / longer[-1] < 1.25


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 3: Input data was truncated"),
        ('{"prompt": "a", "chosen": "b"}', "line 3: .*missing required field `rejected`"),
        ('{"prompt": 1, "chosen": "b", "rejected": "c"}', r"line 3: Expected `str`.*\$\.prompt"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": 1}', "line 3: .*unknown field `x`"),
        (line("a", chosen=""), "line 3: prompt, chosen and rejected must not be empty"),
        (line("a", chosen="no"), "line 3: chosen and rejected are the same"),
        ("[]", "line 3: Expected `object`"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, message):
    path = write(tmp_path / "pairs.jsonl", line("1"), "", bad, line("2"), line("3"), line("4"))
    with pytest.raises(DataError, match=message):
        demo.read_pairs(path)


def test_bytes_that_are_no_utf8_are_named_by_their_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DataError, match="line 1"):
        demo.read_pairs(path)


def test_too_few_pairs_are_refused(tmp_path):
    path = write(tmp_path / "pairs.jsonl", line("1"), line("2"), line("3"))
    with pytest.raises(DataError, match="has 3 pairs"):
        demo.read_pairs(path)


def test_only_the_answer_has_weight():
    pair = demo.Pair("Hi", "yes", "no")
    chosen, rejected = demo.as_data([pair], lambda text: list(text.encode()))
    assert bytes(chosen.model_input.to_ints()) == b"Hi\nyes"
    targets, weights = (chosen.loss_fn_inputs[n] for n in ("target_tokens", "weights"))
    assert bytes(targets.tolist()) == b"i\nyes\n"
    assert bytes(targets[weights == 1].tolist()) == b"yes\n"
    assert bytes(rejected.loss_fn_inputs["target_tokens"].tolist()) == b"i\nno\n"


def test_the_split_is_a_partition_that_the_seed_decides():
    pairs = demo.read_pairs(demo.packaged_pairs())
    train, held = demo.split(pairs, demo.Settings(seed=1))
    assert sorted(map(repr, train + held)) == sorted(map(repr, pairs))
    assert len(held) == round(len(pairs) / 4)
    assert (train, held) == demo.split(pairs, demo.Settings(seed=1))
    assert held != demo.split(pairs, demo.Settings(seed=2))[1]


@pytest.mark.parametrize("loss", some(["dpo", "bradley_terry"], 2))
def test_a_short_run_learns_its_few_pairs(loss):
    pairs = demo.read_pairs(demo.packaged_pairs())[:8]
    settings = demo.Settings(loss=loss, steps=12, batch_pairs=6, rank=8, learning_rate=1e-2)
    with trainer() as service:
        *steps, summary = demo.run(service, "mintjax/nano", pairs, settings)
    assert [step.step for step in steps] == list(range(1, 13))
    assert all(step.seconds > 0 for step in steps)
    assert summary.loss_first == steps[0].loss
    assert summary.loss_last == steps[-1].loss < steps[0].loss
    assert summary.train_accuracy_after == 1.0
    assert (summary.train_pairs, summary.heldout_pairs) == (6, 2)
    assert 0 < summary.client_share < 1
    if loss == "dpo":  # against itself the untrained model prefers nothing
        assert steps[0].loss == pytest.approx(np.log(2), rel=1e-4)


class Tokenized:
    """A model of which only its tokenizer is asked."""

    def __init__(self, tokenizer_id, model_name="tiny"):
        self.tokenizer_id = tokenizer_id
        self.model_name = model_name

    def get_info(self):
        return self

    @property
    def model_data(self):
        return self


def test_the_embedded_trainer_reads_bytes():
    assert demo.encoder(Tokenized("/a/folder/mintjax/bytes"))("é") == [195, 169]


def test_a_trainer_that_names_no_tokenizer_has_the_base_model_s(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"tinker": 3, "sky": 4, "?": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert demo.encoder(Tokenized(None, str(tmp_path)))("sky tinker sea") == [4, 3, 0]
    missing = str(tmp_path / "not here")
    with pytest.raises(MintjaxError, match=r"no tokenizer of .*not here.* can be read"):
        demo.encoder(Tokenized(None, missing))


def test_a_tokenizer_of_another_trainer_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MintjaxError, match="'Qwen/Qwen3-8B': pip install tokenizers"):
        demo.encoder(Tokenized("Qwen/Qwen3-8B"))
