"""Gated adaption prompts against HF PEFT on a Llama, and against attention written out."""

import types

import peft.tuners.adaption_prompt.layer as peft_layer
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import AdaptionPromptConfig

import peft_func as pf
from tests.addins.peers import QUIET, peer
from tests.addins.small import MASKS, X
from tests.zoo import ZOO, randn, seeded

pytestmark = QUIET


def away(tree):
    return pf.map_leaves(lambda leaf: leaf + 0.5 * randn(*leaf.shape, 1, seed=leaf.numel())[..., 0], tree)


@pytest.mark.parametrize("layers", [1, 2])
def test_peft_gives_the_same_on_a_llama(layers, monkeypatch):
    exact = types.SimpleNamespace(softmax=lambda scores, dim, dtype: F.softmax(scores, dim))
    monkeypatch.setattr(peft_layer, "F", exact)  # PEFT's softmax is in float32
    net = ZOO["llama"].build()
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=layers)
    peft = peer(net, config)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.adaption_prompt(pf.attentions(range(2 - layers, 2)), tokens=4), model)
    frozen, tree = adapter.init(0)
    tree = away(tree)
    theirs = [module for module in peft.modules() if hasattr(module, "adaption_gate")]
    for module, place in zip(theirs, tree["adaption_prompt"].values(), strict=True):
        module.adaption_prompt.data.copy_(place["prompt"][None])
        module.adaption_gate.data.copy_(place["gate"][None])
    for mask in MASKS.values():
        ours = model(adapter.apply(frozen, tree), X, attention_mask=mask).logits
        assert torch.allclose(ours, peft(input_ids=X, attention_mask=mask).logits, atol=1e-10, rtol=1e-10)
        assert not torch.allclose(ours, net(X, attention_mask=mask).logits, atol=1e-2)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("animal", ["gpt2", "bert"])
def test_attention_written_out(animal, tanh):
    """What the projection behind an attention gets grows by the gated attention to the prompts."""
    net = ZOO[animal].build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.adaption_prompt(pf.attentions(), tokens=3, tanh=tanh), model)
    frozen, tree = adapter.init(0)
    tree = away(tree)
    y = model(adapter.apply(frozen, tree), X).logits
    seen = {}

    def project(attention, h):
        if animal == "bert":
            return attention.query(h), attention.key(h), attention.value(h)
        return attention.c_attn(h).split(16, -1)

    for path, place in tree["adaption_prompt"].items():
        attention = net.get_submodule(path)
        after = attention.c_proj if animal == "gpt2" else net.get_submodule(path.removesuffix("self") + "output").dense

        def note(module, args, kwargs, path=path):
            seen[path] = args[0] if args else kwargs["hidden_states"]

        def add(module, args, path=path, attention=attention, place=place):
            query, keys, values = project(attention, seen[path])[0], *project(attention, place["prompt"])[1:]
            heads = []
            for head in (slice(0, 8), slice(8, 16)):
                scores = query[..., head] @ keys[:, head].T / 8**0.5
                heads.append(scores.softmax(-1) @ values[:, head])
            gate = torch.tanh(place["gate"]) if tanh else place["gate"]
            return (args[0] + gate * torch.cat(heads, -1),)

        attention.register_forward_pre_hook(note, with_kwargs=True)
        after.register_forward_pre_hook(add)
    assert torch.allclose(y, net(X).logits, atol=1e-10)


def test_dropout_leaves_the_start_as_it_is():
    """At a gate of zero, train mode is the base's, with the same masks."""
    net = ZOO["gpt2"].build().train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    net.transformer.h[1].attn.resid_dropout.p = 0.5
    model = pf.functionalize(net)
    adapter = pf.bind(pf.adaption_prompt(pf.attentions(0), tokens=3), model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = model(adapter.apply(*adapter.init(0)), X).logits
        torch.manual_seed(0)
        assert torch.allclose(y, net(X).logits, atol=1e-10)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(use_cache):
    net = ZOO["llama"].build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.adaption_prompt(pf.attentions(), tokens=3), model)
    frozen, tree = adapter.init(0)
    weights = adapter.apply(frozen, away(tree))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.method("generate")(weights, X, attention_mask=MASKS["left"], use_cache=use_cache, **options)
    for sample in range(2):
        real = X[sample : sample + 1, int(5 - MASKS["left"][sample].sum()) :]
        for _ in range(5):
            real = torch.cat([real, model(weights, real).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(tokens[sample, -5:], real[0, -5:])


def test_the_first_gradient_is_the_gates():
    model = pf.functionalize(ZOO["llama"].build())
    adapter = pf.bind(pf.adaption_prompt(pf.attentions(), tokens=3), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf.requires_grad_(), tree)
    model(adapter.apply(frozen, tree), X).logits.square().sum().backward()
    for place in tree["adaption_prompt"].values():
        assert place["gate"].grad.abs() > 0
        assert place["prompt"].grad.abs().max() == 0


def test_bad_options_and_places():
    llama, vit = (pf.functionalize(ZOO[name].build()) for name in ("llama", "vit"))
    for options in ({"tokens": 0}, {"tokens": "4"}, {"tanh": 1}):
        with pytest.raises(pf.OptionError, match="adaption_prompt"):
            pf.adaption_prompt(pf.attentions(), **options)
    with pytest.raises(pf.OptionError, match="takes no past_key_values"):
        pf.bind(pf.adaption_prompt(pf.attentions()), vit)
    with pytest.raises(pf.OptionError, match="no projections"):
        pf.bind(pf.adaption_prompt(r".*layers\.0"), llama)
    neox = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    fused = pf.functionalize(seeded(lambda: transformers.GPTNeoXForCausalLM(neox))())
    with pytest.raises(pf.OptionError, match="by head or by kind"):
        pf.bind(pf.adaption_prompt(["attention"]), fused)
    twice = pf.chain(pf.adaption_prompt(pf.attentions()), pf.adaption_prompt(pf.attentions(), name="again"))
    adapter = pf.bind(twice, llama)
    with pytest.raises(pf.AddinError, match="more tokens"):
        llama(adapter.apply(*adapter.init(0)), X)
    net = ZOO["llama"].build()
    net.config._attn_implementation = "flash_attention_2"
    flash = pf.functionalize(net)
    adapter = pf.bind(pf.adaption_prompt(pf.attentions()), flash)
    with pytest.raises(pf.AddinError, match="sdpa or eager"):
        flash.method("forward")(adapter.apply(*adapter.init(0)), X)
