"""The parts of transformers, found by structure, on models of transformers, of torch, and of timm's shape."""

import pytest
import torch
import transformers
from torch import nn

import peft_func as pf
from peft_func.addins.structure import structure_of
from tests.addins.timm_vit import TimmViT
from tests.zoo import ZOO


def t5(decoder=False):
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return (transformers.T5ForConditionalGeneration if decoder else transformers.T5EncoderModel)(config)


def clip():
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=8,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection(config)


def swin():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2
    )
    return transformers.SwinForImageClassification(config)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)


def bert(hidden):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=hidden
    )
    return transformers.BertForSequenceClassification(config)


def llama(hidden):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


# The path of the blocks; in a block the attention, the ends of the feed-forward part, its module, the norms; then the
# norms behind the blocks, the head, the prefix tokens and the values of a patch.
KNOWN = {
    "vit": (ZOO["vit"].build, "vit.layers", "attention", "mlp.fc1", "mlp.fc2", "mlp",
            ["layernorm_before", "layernorm_after"], ("vit.layernorm",), "classifier", 1, 16),
    "bert": (lambda: bert(24), "bert.encoder.layer", "attention.self", "intermediate.dense", "output.dense", None,
             ["attention.output.LayerNorm", "output.LayerNorm"], (), "classifier", None, None),
    "bert of one width": (lambda: bert(16), "bert.encoder.layer", "attention.self", "intermediate.dense",
                          "output.dense", None, ["attention.output.LayerNorm", "output.LayerNorm"], (), "classifier",
                          None, None),
    "bert three times as wide": (lambda: bert(48), "bert.encoder.layer", "attention.self", "intermediate.dense",
                                 "output.dense", None, ["attention.output.LayerNorm", "output.LayerNorm"], (),
                                 "classifier", None, None),
    "gpt2": (ZOO["gpt2"].build, "transformer.h", "attn", "mlp.c_fc", "mlp.c_proj", "mlp", ["ln_1", "ln_2"],
             ("transformer.ln_f",), "lm_head", None, None),
    "llama": (lambda: llama(24), "model.layers", "self_attn", "mlp.gate_proj", "mlp.down_proj", "mlp",
              ["input_layernorm", "post_attention_layernorm"], ("model.norm",), "lm_head", None, None),
    "llama of one width": (lambda: llama(16), "model.layers", "self_attn", "mlp.gate_proj", "mlp.down_proj", "mlp",
                           ["input_layernorm", "post_attention_layernorm"], ("model.norm",), "lm_head", None, None),
    "t5": (t5, "encoder.block", "layer.0.SelfAttention", "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo",
           "layer.1.DenseReluDense", ["layer.0.layer_norm", "layer.1.layer_norm"], ("encoder.final_layer_norm",), None,
           None, None),
    "clip": (clip, "vision_model.encoder.layers", "self_attn", "mlp.fc1", "mlp.fc2", "mlp",
             ["layer_norm1", "layer_norm2"], ("vision_model.post_layernorm",), "visual_projection", 1, 48),
    "torch": (encoder, "layers", "self_attn", "linear1", "linear2", None, ["norm1", "norm2"], (), None, None, None),
    "timm": (lambda: TimmViT(dim=16, depth=2), "blocks", "attn", "mlp.fc1", "mlp.fc2", "mlp", ["norm1", "norm2"],
             ("norm",), "head", 1, 4),
    "timm three times as wide": (lambda: TimmViT(dim=16, depth=2, hidden=48), "blocks", "attn", "mlp.fc1", "mlp.fc2",
                                 "mlp", ["norm1", "norm2"], ("norm",), "head", 1, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_the_parts_of_known_models(name):
    build, at, attention, first, last, mlp, norms, behind, head, prefix, patch = KNOWN[name]
    structure = structure_of(pf.functionalize(build()))
    assert [block.path for block in structure.blocks] == [f"{at}.0", f"{at}.1"]
    for block in structure.blocks:
        inside = lambda path, block=block: path and f"{block.path}.{path}"
        assert block.width == 16
        assert block.attentions == (inside(attention),)
        assert block.attention == inside(attention)
        assert (block.first, block.last, block.mlp) == (inside(first), inside(last), inside(mlp))
        assert block.norms == tuple(map(inside, norms))
        assert block.batch_first
    assert structure.norms == behind
    assert (structure.head, structure.prefix, structure.patch) == (head, prefix, patch)


def test_nested_lists_and_decoders():
    stages = pf.blocks_of(pf.functionalize(swin()))
    assert [(block.path[-21:], block.width) for block in stages] == [
        ("ncoder.layers.0.blocks.0"[-21:], 8), ("ncoder.layers.1.blocks.0"[-21:], 16),
        ("ncoder.layers.1.blocks.1"[-21:], 16),
    ]  # fmt: skip
    both = pf.blocks_of(pf.functionalize(t5(decoder=True)))
    assert [block.path for block in both] == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]
    assert [len(block.attentions) for block in both] == [1, 1, 2, 2]
    first = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 1, enable_nested_tensor=False)
    assert not pf.blocks_of(pf.functionalize(first))[0].batch_first


def test_selectors_of_modules():
    model = pf.functionalize(TimmViT())
    scale = lambda where: pf.bind(pf.ssf(where, form="activations"), model).parts[0].modules
    assert scale(pf.blocks()) == ("blocks.0", "blocks.1", "blocks.2")
    assert scale(pf.blocks(0, -1)) == ("blocks.0", "blocks.2")
    assert scale(pf.blocks(range(1, 3))) == ("blocks.1", "blocks.2")
    assert scale(pf.attentions(1)) == ("blocks.1.attn",)
    assert scale(pf.mlps(1) | pf.head()) == ("blocks.1.mlp", "head")
    assert scale(pf.blocks() & ~pf.index(1)) == ("blocks.0", "blocks.2")
    assert scale([pf.head(), "norm1"]) == ("blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1", "head")
    pieces = pf.bind(pf.ssf(pf.mlps(0), form="activations"), pf.functionalize(encoder())).parts[0].modules
    assert pieces == ("layers.0.linear1", "layers.0.linear2")


def test_selectors_of_parameters():
    model = pf.functionalize(TimmViT())
    chosen = lambda where: pf.bind(pf.train(where), model).parts[0].paths
    assert chosen(pf.head()) == ("head.weight", "head.bias")
    inside = [name for name in model.params if name.startswith("blocks.1.")]
    assert chosen(pf.blocks(1)) == tuple(inside)
    assert chosen(pf.blocks(1) & pf.path(r".*norm\d")) == tuple(name for name in inside if "norm" in name)
    lora = pf.bind(pf.lora(pf.attentions(-1), rank=2), model).parts[0].paths
    assert lora == ("blocks.2.attn.qkv.weight", "blocks.2.attn.proj.weight")
    with pytest.raises(pf.SelectorError, match="fewer than two dimensions"):
        pf.bind(pf.lora(pf.blocks(0) & pf.suffix("bias"), rank=1), model)
    tied = pf.functionalize(ZOO["gpt2"].build())
    assert pf.bind(pf.train(pf.head()), tied).parts[0].paths == ("transformer.wte.weight",)


def test_selectors_say_what_is_missing():
    model = pf.functionalize(TimmViT())
    with pytest.raises(pf.SelectorError, match=r"blocks\(3\): there is no layer 3; the model has 3"):
        pf.bind(pf.train(pf.blocks(3)), model)
    with pytest.raises(pf.SelectorError, match="no linear map behind its blocks"):
        pf.bind(pf.train(pf.head()), pf.functionalize(encoder()))
    with pytest.raises(pf.SelectorError, match="no list of modules of one class"):
        pf.bind(pf.train(pf.blocks()), pf.functionalize(nn.Linear(2, 2)))
    with pytest.raises(pf.SelectorError, match="numbers of layers"):
        pf.blocks("0")
    with pytest.raises(pf.SelectorError, match="asks the whole model"):
        pf.partition({"a": torch.ones(1)}, pf.blocks())
