"""Small real training: data that can be learned, and the Trainer over it."""

import dataclasses
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainingArguments

import peft_func as pf
from tests import zoo

QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
# Activation checkpointing has a new name in the newer versions.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"

LORA = pf.chain(pf.lora(["query", "value"], rank=4, alpha=8), pf.train(r"classifier\..*"))


def rows(count, seed, *, language=False, length=8):
    """Sentences of numbers under 32, and whether a 3 is in them; or the sentences themselves, for a language model."""
    draw, made = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        ids = torch.randint(1, 32, (length,), generator=draw)
        ids = torch.where(ids == 3, 4, ids)
        label = int(torch.randint(2, (), generator=draw))
        if label:
            ids[int(torch.randint(length, (), generator=draw))] = 3
        mask = torch.ones(length, dtype=torch.long)
        labels = ids.clone() if language else label
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "text": "is not for the model"})
    return made


def bert(*, dropout=0.0, seed=0):
    """A BERT that classifies, with weights large enough to learn something within a few steps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = zoo.bert().config
        config.initializer_range = 0.2
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        return transformers.BertForSequenceClassification(config)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def arguments(kind=TrainingArguments, folder=None, **options):
    folder = folder or Path(tempfile.gettempdir(), "peft_func-trainer")  # nothing is written to it
    base = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2}
    return kind(output_dir=str(folder), **{**QUIET, **base, **options})


def trained(model, data, *, trainer=Trainer, kind=TrainingArguments, folder=None, resume=None, more=None, **options):
    """Run the Trainer; return it."""
    made = trainer(model=model, args=arguments(kind, folder, **options), train_dataset=data, **(more or {}))
    made.train(resume_from_checkpoint=resume)
    return made


def curve(trainer, what="loss"):
    return [entry[what] for entry in trainer.state.log_history if what in entry]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
