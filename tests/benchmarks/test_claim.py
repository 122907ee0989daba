"""The claim's script: real sentences, members that are those trained alone, a table and a picture of its data."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peft_func as pf
from benchmarks.claim import docstrings, figure
from benchmarks.claim.__main__ import chosen_rate, markdown
from benchmarks.claim.methods import METHODS
from benchmarks.claim.train import Classifier, train
from benchmarks.many import minilm


def tokenizer(texts, *, max_length, **options):
    """Words as numbers, by their letters."""
    rows = [[1 + sum(map(ord, word)) % 60 for word in text.split()[:max_length]] for text in texts]
    ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="module")
def task():
    return docstrings.load(tokenizer, length=8, most=12)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pf.functionalize(Classifier(minilm._tiny().eval(), len(docstrings.packages())).eval())


def test_the_sentences_are_real_and_do_not_name_their_package():
    for package in docstrings.packages():
        texts = docstrings.sentences(package)
        assert len(texts) >= 60
        assert not any(package in text.lower().split() for text in texts)


def test_a_package_that_this_python_lacks_is_left_out(monkeypatch):
    there = docstrings.packages()
    assert set(docstrings.PACKAGES) - set(there) <= {"tkinter"}
    monkeypatch.setattr(docstrings, "PACKAGES", ("asyncio", "nowhere", "turtle"))
    assert docstrings.load(tokenizer, length=8, most=12).names == ("asyncio", "turtle")


def test_no_sentence_is_in_both_parts(task):
    rows = [{tuple(row) for row in part[0].tolist()} for part in (task.train, task.test)]
    assert 90 < len(task.train[2]) + len(task.test[2]) <= 144
    assert len(rows[0]) == len(task.train[2]) > 2 * len(task.test[2])
    assert not rows[0] & rows[1]


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_method_fits_and_trains_what_it_says(model, task, entry):
    found = train(model, entry.method, task, seeds=2, epochs=1, rate=entry.rates[0])
    assert len(found.accuracies) == 2
    assert (found.trained == 0) == (entry.name == "linear probe")


def test_a_member_is_the_one_trained_alone(model, task):
    method = METHODS[1].method
    together = train(model, method, task, seeds=2, epochs=1, rate=1e-2).accuracies
    assert train(model, method, task, seeds=1, epochs=1, rate=1e-2).accuracies == together[:1]


def test_the_rate_is_one_of_the_candidates(model, task):
    entry = SimpleNamespace(name="probe", method=METHODS[0].method, rates=(1e-3, 1e-2))
    assert chosen_rate(model, entry, task) in entry.rates


def test_the_table_and_the_picture_are_the_data(tmp_path):
    results = [
        {"name": name, "rate": 1e-3, "accuracies": [0.5, 0.7], "trained": trained, "seconds": 3.0, "peak_mib": 9.0}
        for name, trained in (("linear probe", 0), ("GIFT r16, q v", 1234))
    ]
    assert "| GIFT r16, q v | 1,234 | 60.0 | 14.1 | 0.001 | 3 | 9 |" in markdown(results)
    figure.draw(results, tmp_path / "claim.svg")
    assert "<svg" in (tmp_path / "claim.svg").read_text()


def test_the_head_reads_the_mean_of_what_is_not_masked():
    class Encoder(nn.Module):
        config = SimpleNamespace(hidden_size=2)

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=torch.stack([input_ids, 2 * input_ids], -1).float())

    net = Classifier(Encoder(), 2)
    with torch.no_grad():
        net.head.weight.copy_(torch.eye(2))
    mask = torch.tensor([[1, 1, 0]])
    assert net(torch.tensor([[1, 3, 9]]), mask).tolist() == [[2.0, 4.0]]


def test_the_docs_show_the_recorded_table():
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks" / "results" / "claim.json").read_text(encoding="utf-8"))
    assert markdown(record["results"]).strip() in (root / "docs" / "claim.md").read_text(encoding="utf-8")
