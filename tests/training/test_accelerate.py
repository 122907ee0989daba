"""`accelerate`: the same loop as for a plain module, on `pf.Adapted`."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import default_data_collator

import peft_func as pf
from tests.training.nets import equal
from tests.training.tiny import LORA, bert, rows

ALL = pf.train(".*")


@pytest.fixture(autouse=True)
def _state():
    """Accelerate keeps its settings for the whole process."""
    reset()
    yield
    reset()


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batches(count=48, seed=0):
    data = [{name: value for name, value in row.items() if name != "text"} for row in rows(count, seed)]
    return DataLoader(data, batch_size=8, collate_fn=default_data_collator)


def loop(accelerator, module, optimizer, scheduler, loader, *, steps=6, clip=0.2):
    """Train for some steps; return losses and the norms of the gradients."""
    losses, norms = [], []
    for _, batch in zip(range(steps), loader, strict=False):
        with accelerator.accumulate(module):
            loss = module(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(module.parameters(), clip)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def prepared(module, **options):
    accelerator = Accelerator(cpu=True, **options)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return accelerator, *accelerator.prepare(module, optimizer, scheduler, batches())


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_loop_is_bitwise_that_of_the_plain_module(options):
    net = bert(dropout=0.1).train()
    before, twin = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    results = []
    for module in (twin, pf.Adapted(net, ALL)):
        torch.manual_seed(3)
        accelerator, *parts = prepared(module, **options)
        results.append(loop(accelerator, *parts))
        reset()
    assert results[0] == results[1]
    assert max(results[0][1]) > 0.2  # some were clipped
    assert equal(module.merged_state_dict(), twin.state_dict())
    assert equal(net.state_dict(), before)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


def test_unwrap_gives_the_module_back_without_the_wrapper_of_its_forward():
    module = pf.Adapted(bert(), LORA).eval()
    batch = next(iter(batches()))
    expected = module(**batch).logits
    accelerator, wrapped, *_ = prepared(module, mixed_precision="bf16")
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.dtype) or tensor, lambda t: t):
        mixed = wrapped(**batch).logits
    assert torch.bfloat16 in seen
    assert mixed.dtype == torch.float32  # converted back
    assert not torch.equal(mixed, expected)
    assert accelerator.unwrap_model(wrapped) is module
    plain = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert plain is module
    assert torch.equal(plain(**batch).logits, expected)


def test_state_is_saved_and_loaded_bitwise(tmp_path):
    net = bert(dropout=0.1).train()
    whole, resumed = (pf.Adapted(net, LORA, key).train() for key in (0, 5))
    torch.manual_seed(1)
    accelerator, *parts = prepared(whole)
    loop(accelerator, *parts, steps=3)
    accelerator.save_state(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert equal(saved, whole.state_dict())
    expected = loop(accelerator, *parts)
    reset()

    torch.manual_seed(2)
    accelerator, *parts = prepared(resumed)
    accelerator.load_state(str(tmp_path))
    assert equal(resumed.state_dict(), saved)
    assert loop(accelerator, *parts) == expected
    assert equal(resumed.merged_state_dict(), whole.merged_state_dict())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 12_000  # the net has more: 30 kB
    assert sum(value.numel() for value in net.parameters()) * 4 > 20_000


def test_save_model_and_get_state_dict(tmp_path):
    module = pf.Adapted(bert(), LORA)
    accelerator, wrapped, *_ = prepared(module)
    accelerator.save_model(wrapped, str(tmp_path))
    assert equal(load_file(tmp_path / "model.safetensors"), module.state_dict())
    assert equal(accelerator.get_state_dict(wrapped), module.state_dict())


def test_half_of_a_prepared_module_can_be_held():
    module = pf.Adapted(bert(), LORA)
    module.get_submodule("lora").requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    accelerator, *parts = prepared(module)
    loop(accelerator, *parts)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"train.classifier.weight", "train.classifier.bias"}
