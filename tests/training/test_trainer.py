"""The real Trainer on `pf.Adapted`: what it learns is what the plain module learns, and it saves only the adapter."""

import copy
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

import peft_func as pf
from tests import zoo
from tests.training.nets import copy_of, equal
from tests.training.tiny import CHECKPOINTING, LORA, accuracy, arguments, bert, curve, rows, seeded, trained

ALL = pf.train(".*")
ROUNDED = 2e-7  # Trainer adds losses in float32, whatever the model computes in


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "run"
    shutil.rmtree(tmp_path)  # checkpoints


# What the plain module learns


SAME = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2},
    "smoothed": {"label_smoothing_factor": 0.1},
    "decayed": {"weight_decay": 0.5},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},  # accelerate has no float16 on the CPU: it trains in float32
    "reentrant": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    "not reentrant": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    "adafactor": {"optim": "adafactor"},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("build", [bert, zoo.llama, zoo.gpt2], ids=lambda build: build.__name__)
def test_it_learns_bitwise_what_the_plain_module_learns(build, name):
    options = SAME[name]
    data = rows(64, 0, language=build is not bert)
    net = seeded(build)
    before, plain = copy_of(net), trained(copy.deepcopy(net), data, **options)
    ours = trained(pf.Adapted(net, ALL), data, **options)
    assert curve(ours) == curve(plain)
    assert curve(ours, "grad_norm") == curve(plain, "grad_norm")
    assert equal(ours.model.merged_state_dict(), plain.model.state_dict())
    assert equal(net.state_dict(), before)
    assert len(set(curve(ours))) > 1
    assert ours.state.total_flos == plain.state.total_flos


def test_it_learns_what_a_loop_over_the_functions_learns():
    net, data, steps = bert().double(), rows(48, 0), 6
    ours = trained(pf.Adapted(net, LORA, 3), data, max_steps=steps, train_sampling_strategy="sequential")

    model = pf.functionalize(copy.deepcopy(net).train())
    adapter = pf.bind(LORA, model)
    frozen, tree = adapter.init(3)
    params = [leaf for _, leaf in pf.leaves(tree)]
    first, second = ([torch.zeros_like(leaf) for leaf in params] for _ in range(2))
    losses = []
    for step in range(steps):
        batch = data[8 * step : 8 * step + 8]
        ids, labels = torch.stack([row["input_ids"] for row in batch]), torch.tensor([row["labels"] for row in batch])
        params = [leaf.detach().requires_grad_() for leaf in params]
        count = iter(params)
        tree = pf.map_leaves(lambda leaf: next(count), tree)  # noqa: B023
        loss = nn.functional.cross_entropy(model(adapter.apply(frozen, tree), input_ids=ids).logits, labels)
        grads = torch.autograd.grad(loss, params)
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        grads = [grad * min(1.0, 1 / (norm.item() + 1e-6)) for grad in grads]
        rate = 1e-2 * (steps - step) / steps  # AdamW and the linear schedule, by their definitions
        first = [0.9 * m + 0.1 * grad for m, grad in zip(first, grads, strict=True)]
        second = [0.999 * v + 0.001 * grad**2 for v, grad in zip(second, grads, strict=True)]
        steered = [
            (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            for m, v in zip(first, second, strict=True)
        ]
        params = [leaf.detach() - rate * step_ for leaf, step_ in zip(params, steered, strict=True)]
        losses.append(loss.item())
    np.testing.assert_allclose(curve(ours), losses, rtol=ROUNDED)
    assert losses[-1] != losses[0]
    count = iter(params)
    expected = dict(pf.leaves(pf.map_leaves(lambda leaf: next(count), tree)))
    for keys, leaf in pf.leaves(ours.model.trainable):
        torch.testing.assert_close(leaf.detach(), expected[keys], rtol=1e-9, atol=1e-12)


# PEFT reads an attribute that newer versions of transformers have renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_it_learns_what_peft_learns():
    net, data = bert().double(), rows(64, 0)
    module = pf.Adapted(net, LORA, 7)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    other = peft.get_peft_model(copy.deepcopy(net), config)
    parts = dict(other.base_model.model.named_modules())
    leaves = module.trainable["lora"]
    with torch.no_grad():
        for path, leaf in leaves.items():
            place = parts[path.removesuffix(".weight")]
            place.lora_A["default"].weight.copy_(leaf["A"])
            place.lora_B["default"].weight.copy_(leaf["B"])
    options = {"max_steps": 12, "weight_decay": 0.1}
    theirs = trained(other, data, **options)
    ours = trained(module, data, **options)
    np.testing.assert_allclose(curve(ours), curve(theirs), rtol=ROUNDED)
    np.testing.assert_allclose(curve(ours, "grad_norm"), curve(theirs, "grad_norm"), rtol=1e-9)
    assert curve(ours)[-1] != pytest.approx(curve(ours)[0], rel=1e-3)
    for path, leaf in leaves.items():
        place = parts[path.removesuffix(".weight")]
        torch.testing.assert_close(leaf["A"], place.lora_A["default"].weight, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(leaf["B"], place.lora_B["default"].weight, rtol=1e-8, atol=1e-10)


def test_it_learns_the_task_and_the_merged_weights_predict_the_same():
    net, data, held = bert(dropout=0.1), rows(256, 0), rows(64, 1)
    before = copy_of(net)
    where = pf.of_type(nn.Linear) & ~pf.path("classifier")
    method = pf.chain(pf.lora(where, rank=8), pf.train(r".*(LayerNorm|bias|embeddings|classifier).*"))
    module = pf.Adapted(net, method)
    run = trained(
        module, data, max_steps=200, learning_rate=5e-3, logging_steps=10, per_device_train_batch_size=16,
        eval_strategy="steps", eval_steps=100, more={"eval_dataset": held, "compute_metrics": accuracy},
    )  # fmt: skip
    assert run.label_names == ["labels"]  # by the signature of forward; the column `text` was left out by it, too
    scores = curve(run, "eval_accuracy")
    assert len(scores) == 2
    assert scores[-1] > 0.9
    predicted = run.predict(held)
    assert predicted.metrics["test_accuracy"] == scores[-1]
    fresh = bert(seed=5)
    fresh.load_state_dict(module.merged_state_dict(), strict=True)
    expected = Trainer(model=fresh, args=arguments()).predict(held)
    np.testing.assert_allclose(predicted.predictions, expected.predictions, atol=1e-5)
    assert equal(net.state_dict(), before)


# Saving


def test_the_best_checkpoint_is_loaded_and_checkpoints_hold_the_adapter_only(folder):
    net, held = bert(), rows(64, 1)
    before = copy_of(net)
    run = trained(
        pf.Adapted(net, LORA), rows(64, 0), folder=folder, max_steps=12, learning_rate=0.3,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=3, eval_strategy="steps",
        eval_steps=3, load_best_model_at_end=True,
        more={"eval_dataset": held, "compute_metrics": accuracy},
    )  # fmt: skip
    losses = curve(run, "eval_loss")
    best = losses.index(min(losses))
    assert best < len(losses) - 1  # with this learning rate the last is not the best
    chosen = Path(run.state.best_model_checkpoint)
    assert chosen.name == f"checkpoint-{3 * (best + 1)}"
    saved = load_file(chosen / "model.safetensors")
    assert equal(run.model.state_dict(), saved)
    assert not equal(load_file(folder / "checkpoint-12" / "model.safetensors"), saved)
    assert run.evaluate()["eval_loss"] == min(losses) == run.state.best_metric
    assert saved.keys() == {name for name, _ in run.model.named_parameters()}
    assert {path.name for path in chosen.iterdir()} == {
        "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"
    }  # fmt: skip
    numbers = sum(param.numel() for param in run.model.parameters())
    assert (chosen / "model.safetensors").stat().st_size < 4 * numbers + 3000
    again = pf.Adapted(net, LORA, 9)
    again.load_state_dict(saved, strict=True)
    assert equal(again.merged_state_dict(), run.model.merged_state_dict())
    assert equal(net.state_dict(), before)


@pytest.mark.parametrize("build", ["bert", "batchnorm"])
def test_resuming_is_bitwise_the_run_without_a_break(folder, build):
    data = rows(64, 0)

    def module():
        net = bert(dropout=0.2)  # the state of the global generator has to come back, too
        if build == "batchnorm":
            torch.manual_seed(0)
            net.bert.embeddings.norm = nn.BatchNorm1d(16)
            net.bert.embeddings.__class__ = Normalised
        return pf.Adapted(net, LORA)

    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine"}
    whole = trained(module(), data, folder=folder / "whole", **options)
    assert len(set(curve(whole))) == 10
    resumed = trained(
        module(), data, folder=folder / "resumed", resume=str(folder / "whole" / "checkpoint-4"), **options
    )
    assert curve(resumed) == curve(whole)
    assert equal(resumed.model.state_dict(), whole.model.state_dict())
    assert equal(resumed.model.merged_state_dict(), whole.model.merged_state_dict())
    assert any("net." in name for name in whole.model.state_dict()) is (build == "batchnorm")


class Normalised(transformers.models.bert.modeling_bert.BertEmbeddings):
    def forward(self, *args, **kwargs):
        return self.norm(super().forward(*args, **kwargs).transpose(1, 2)).transpose(1, 2)


def test_save_model_writes_what_load_state_dict_reads_and_what_pf_save_writes(folder):
    net = bert()
    run = trained(pf.Adapted(net, LORA), rows(64, 0))
    run.save_model(folder / "final")
    saved = load_file(folder / "final" / "model.safetensors")
    pf.save(folder / "own.safetensors", run.model.adapter, run.model.trainable)
    assert equal(saved, load_file(folder / "own.safetensors"))
    adapter, _, tree = pf.load(folder / "own.safetensors", pf.functionalize(net))
    again = pf.Adapted.of(adapter, tree)
    assert equal(again.merged_state_dict(), run.model.merged_state_dict())


# Language models, generation


def test_sequence_to_sequence_with_generation(folder):
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        dropout_rate=0.0, initializer_factor=1.0,
    )  # fmt: skip
    net = seeded(lambda: transformers.T5ForConditionalGeneration(config))
    before = copy_of(net)
    data = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"][:4].clone()} for row in rows(64, 0, language=True)
    ]
    settings = GenerationConfig(max_new_tokens=4, num_beams=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    lengths = []

    def measure(prediction):
        lengths.append((prediction.predictions != 0).sum(1).max())
        return {"hits": float((prediction.predictions[:, 1:5] == prediction.label_ids[:, :4]).mean())}

    def run(model):
        return trained(
            model, data, trainer=Seq2SeqTrainer, kind=Seq2SeqTrainingArguments, folder=folder, max_steps=5,
            predict_with_generate=True, generation_config=settings, eval_strategy="steps", eval_steps=5,
            more={"eval_dataset": data[:16], "compute_metrics": measure},
        )  # fmt: skip

    plain = run(copy.deepcopy(net))
    ours = run(pf.Adapted(net, ALL))
    assert curve(ours) == curve(plain)
    assert curve(ours, "eval_hits") == curve(plain, "eval_hits")
    assert ours.label_names == plain.label_names
    assert lengths[0] == lengths[1] <= 4
    assert ours.model.generation_config.num_beams == 2  # the settings reached the net that generates
    assert net.generation_config.num_beams != 2
    ids = torch.stack([row["input_ids"] for row in data[:4]])
    assert torch.equal(ours.model.generate(ids), plain.model.generate(ids))
    assert ours.model.generate(ids).shape[1] == 5
    ours.model.train()
    assert ours.model.generation_config.max_new_tokens == 4
    assert equal(net.state_dict(), before)


# Options


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32():
    seen = []

    class Head(nn.Linear):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    net = bert()
    net.classifier.__class__ = Head
    module, data = pf.Adapted(net, LORA), rows(64, 0)
    full = trained(copy.deepcopy(module), data)
    assert set(seen) == {torch.float32}
    seen.clear()
    run = trained(module, data, bf16=True)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in (*module.state_dict().values(), *module.frozen.values())} == {torch.float32}
    np.testing.assert_allclose(curve(run), curve(full), atol=0.02)
    assert curve(run) != curve(full)
    seen.clear()
    assert run.evaluate(data)["eval_loss"] == pytest.approx(full.evaluate(data)["eval_loss"], abs=0.02)
    assert set(seen) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_below_frozen_embeddings_gives_the_same_gradients(reentrant):
    net, data = bert(dropout=0.1), rows(64, 0)
    plain = trained(pf.Adapted(net, LORA), data)
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    run = trained(pf.Adapted(net, LORA), data, **options)
    np.testing.assert_allclose(curve(run), curve(plain), rtol=1e-6)
    for ours, theirs in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    parts = list(run.model.model._skeleton.root.modules())
    assert any(getattr(part, "gradient_checkpointing", False) for part in parts)
    assert not any(getattr(part, "gradient_checkpointing", False) for part in net.modules())


@pytest.mark.slow
def test_compiled():
    net, data = bert(), rows(64, 0)
    plain = trained(pf.Adapted(net, LORA), data)
    run = trained(pf.Adapted(net, LORA), data, torch_compile=True, torch_compile_backend="inductor")
    assert isinstance(run.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    np.testing.assert_allclose(curve(run), curve(plain), rtol=1e-4)
    assert run.model.state_dict().keys() == plain.model.state_dict().keys()


def test_model_init_and_early_stopping(folder):
    net, made = bert(), []

    def build():
        made.append(pf.Adapted(net, LORA))
        return made[-1]

    run = Trainer(
        model_init=build,
        args=arguments(
            folder=folder, max_steps=40, learning_rate=0.5, eval_strategy="steps", eval_steps=2, save_strategy="steps",
            save_steps=2, load_best_model_at_end=True, save_total_limit=1,
        ),
        train_dataset=rows(64, 0), eval_dataset=rows(64, 1), callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    run.train()
    assert run.model is made[-1]
    assert run.state.global_step < 40
    assert run.evaluate()["eval_loss"] == run.state.best_metric


def test_evaluation_in_bfloat16_casts_the_module_and_not_the_net():
    net, held = bert(), rows(16, 1)
    before = copy_of(net)
    module = pf.Adapted(net, LORA)
    full = Trainer(model=module, args=arguments()).evaluate(held)["eval_loss"]
    half = Trainer(model=module, args=arguments(bf16_full_eval=True)).evaluate(held)["eval_loss"]
    assert half == pytest.approx(full, abs=0.05)
    assert half != full
    assert {value.dtype for value in (*module.parameters(), *module.frozen.values())} == {torch.bfloat16}
    assert equal(net.state_dict(), before)


def test_noise_on_embeddings_is_put_on_the_net_before():
    """NEFTune: a hook on the embedding, which is copied with the net."""
    net, data = bert(), rows(64, 0)
    plain = trained(pf.Adapted(net, LORA), data)
    noisy = copy.deepcopy(net)
    transformers.integrations.neftune.activate_neftune(noisy, 5.0)
    run = trained(pf.Adapted(noisy, LORA), data)
    assert curve(run) != curve(plain)
    fresh = pf.Adapted(net, LORA)
    fresh.load_state_dict(run.model.state_dict())
    held = rows(16, 1)
    batch = {"input_ids": torch.stack([row["input_ids"] for row in held])}
    assert torch.equal(run.model.eval()(**batch).logits, fresh.eval()(**batch).logits)  # in train mode only
    with pytest.raises(pf.AttributeRefusedError, match=r"get_input_embeddings.*before"):
        trained(pf.Adapted(net, LORA), data, neftune_noise_alpha=5.0)


def test_weights_of_norms_are_told_by_their_class():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4))
    module = pf.Adapted(net, pf.chain(pf.lora("0", rank=2), pf.train("1|2")))
    assert set(Trainer(model=module, args=arguments()).get_decay_parameter_names(module)) == {
        "lora.0.weight.A", "lora.0.weight.B", "train.2.weight"
    }  # fmt: skip
    assert "LayerNorm" not in repr(module)
    assert module(torch.ones(1, 4)).shape == (1, 4)


def test_an_attribute_that_is_none_is_none():
    class Net(nn.Linear):
        hf_device_map = None

    module = pf.Adapted(Net(2, 2), pf.train("bias"))
    assert module.hf_device_map is None
    assert not hasattr(module, "is_parallelizable")


def test_attributes_that_are_set_reach_the_net_that_runs_or_are_refused():
    net = seeded(zoo.llama)
    module = pf.Adapted(net, pf.lora(["q_proj"], rank=2))
    module.note = "mine"
    assert module.note == "mine"
    module.loss_function = lambda *args, **kwargs: torch.tensor(7.0)  # a property of the net
    ids = torch.ones(1, 4, dtype=torch.long)
    for mode in (True, False):
        assert module.train(mode)(input_ids=ids, labels=ids).loss == 7.0
    assert net(input_ids=ids, labels=ids).loss != 7.0
    with pytest.raises(pf.AttributeRefusedError, match="lm_head"):
        module.lm_head = nn.Linear(16, 32)
