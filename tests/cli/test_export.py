"""The exported checkpoint, and the check of it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_func as pf
from peft_func.cli.demo import Adaptation, method_for
from peft_func.cli.export import compare_merged, export_merged
from peft_func.cli.vit import VisionTransformer, vision_transformer


@pytest.fixture
def exported(tmp_path):
    model = pf.functionalize(vision_transformer(1, 5))
    adapter = pf.bind(method_for(Adaptation.BOTH), model)
    frozen, trainable = adapter.init(0)
    generator = torch.Generator().manual_seed(0)
    weights = adapter.apply(
        frozen, pf.map_leaves(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), trainable)
    )
    export_merged(tmp_path / "merged.safetensors", model, weights)
    return tmp_path / "merged.safetensors", model, weights


def test_the_same_predictions(exported):
    path, model, weights = exported
    found = compare_merged(path, VisionTransformer(5), model, weights, torch.rand(20, 8, 8))
    assert found.equal
    assert 0 < found.difference < 1e-3


def test_another_checkpoint_is_noticed(exported):
    path, model, weights = exported
    state = load_file(path)
    save_file(state | {"head.weight": -state["head.weight"]}, path)
    assert not compare_merged(path, VisionTransformer(5), model, weights, torch.rand(20, 8, 8)).equal
    save_file(state | {"head.bias": torch.full_like(state["head.bias"], torch.nan)}, path)
    assert not compare_merged(path, VisionTransformer(5), model, weights, torch.rand(20, 8, 8)).equal


def test_a_missing_name_is_an_error(exported):
    path, model, weights = exported
    state = load_file(path)
    del state["head.bias"]
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        compare_merged(path, VisionTransformer(5), model, weights, torch.rand(2, 8, 8))
