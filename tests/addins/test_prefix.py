"""Prefix tuning against HF PEFT with the same prefixes, and against attention written out."""

import pytest
import torch
import transformers
from peft import PrefixTuningConfig

import peft_func as pf
from tests.addins.peers import QUIET, TASKS, labels_for, peer
from tests.addins.small import MASKS, X
from tests.zoo import ZOO, seeded

pytestmark = QUIET


def twins(animal, mlp, **attributes):
    """The same net in HF PEFT and here, with the same prefixes."""
    net = ZOO[animal].build()
    for key, value in attributes.items():
        setattr(net.config, key, value)
    config = PrefixTuningConfig(
        task_type=TASKS[animal], num_virtual_tokens=4, prefix_projection=mlp, encoder_hidden_size=6
    )
    peft = peer(net, config)
    method = pf.prefix_tuning(pf.attentions(), tokens=4, reparameterize="mlp" if mlp else None, hidden=6)
    adapter = pf.bind(method, pf.functionalize(net))
    frozen, trainable = adapter.init(0)
    tree, state = trainable["prefix_tuning"], peft.prompt_encoder.default.state_dict()
    places = [path for path in tree if path != "shared"]
    if not mlp:
        parts = state["embedding.weight"].view(4, 2 * len(places), -1)
        for i, path in enumerate(places):
            tree[path] = {"keys": parts[:, 2 * i].clone(), "values": parts[:, 2 * i + 1].clone()}
    else:
        names = {"prompt": "embedding.weight", "down": "transform.0.weight", "down_bias": "transform.0.bias"}
        tree["shared"] = {leaf: state[key].clone() for leaf, key in names.items()}
        weight = state["transform.2.weight"].view(2 * len(places), -1, 6)
        bias = state["transform.2.bias"].view(2 * len(places), -1)
        for i, path in enumerate(places):
            tree[path] = {
                "keys": weight[2 * i].clone(), "keys_bias": bias[2 * i].clone(),
                "values": weight[2 * i + 1].clone(), "values_bias": bias[2 * i + 1].clone(),
            }  # fmt: skip
    return peft, adapter, adapter.apply(frozen, trainable)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("animal", TASKS)
def test_peft_gives_the_same(animal, mlp, attention):
    peft, adapter, weights = twins(animal, mlp, _attn_implementation=attention)
    labels = labels_for(animal)
    tolerance = 1e-6 if attention == "eager" and animal == "llama" else 1e-10  # that softmax is in float32
    for mask in MASKS.values():
        call = {"input_ids": X, "attention_mask": mask, "labels": labels}
        theirs, ours = peft(**call), adapter.model(weights, **call)
        assert torch.allclose(ours.logits, theirs.logits, atol=tolerance, rtol=tolerance)
        assert torch.allclose(ours.loss, theirs.loss, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("animal", ["gpt2", "llama"])
def test_generation(animal, use_cache):
    peft, adapter, weights = twins(animal, False)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = adapter.model.method("generate")(weights, X, attention_mask=MASKS["left"], use_cache=use_cache, **options)
    for sample in range(2):
        real = X[sample : sample + 1, int(5 - MASKS["left"][sample].sum()) :]
        for _ in range(5):
            real = torch.cat([real, peft(input_ids=real).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(tokens[sample, -5:], real[0, -5:])


def test_a_call_with_a_cache_of_the_users():
    _, adapter, weights = twins("llama", False)
    whole = adapter.model(weights, X).logits
    cache = transformers.DynamicCache()
    first = adapter.model(weights, X[:, :2], past_key_values=cache, use_cache=True)
    second = adapter.model(weights, X[:, 2:], past_key_values=first.past_key_values, use_cache=True)
    assert first.past_key_values.get_seq_length() == 5
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, atol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
def test_bert_attention_written_out(shift):
    """The keys and values of every token, and the prefix before them, of one layer."""
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    net = seeded(lambda: transformers.BertModel(config))()
    adapter = pf.bind(pf.prefix_tuning(pf.attentions(), tokens=3, shift=shift), pf.functionalize(net))
    frozen, tree = adapter.init(2)
    (place,) = tree["prefix_tuning"].values()
    mask = MASKS["right"]
    y = adapter.model(adapter.apply(frozen, tree), X, attention_mask=mask).last_hidden_state
    positions = torch.arange(5)[None] + 3 * shift
    h = net.embeddings(input_ids=X, position_ids=positions)
    block, attention = net.encoder.layer[0], net.encoder.layer[0].attention.self
    mixed = []
    for sample in range(2):
        keys = torch.cat([place["keys"], attention.key(h[sample])])
        values = torch.cat([place["values"], attention.value(h[sample])])
        hidden = torch.cat([torch.ones(3), mask[sample]]) == 0
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            scores = attention.query(h[sample])[:, head] @ keys[:, head].T / 8**0.5
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values[:, head])
        mixed.append(torch.cat(heads, -1))
    h = block.attention.output(torch.stack(mixed), h)
    assert torch.allclose(y, block.output(block.intermediate(h), h), atol=1e-10)


def test_one_layer_of_two():
    net = ZOO["bert"].build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.prefix_tuning(pf.attentions(1), tokens=3, shift=False), model)
    assert list(adapter.init(0)[1]["prefix_tuning"]) == ["bert.encoder.layer.1.attention.self"]
    y = model(adapter.apply(*adapter.init(0)), X, output_hidden_states=True).hidden_states
    plain = net(X, output_hidden_states=True).hidden_states
    assert torch.allclose(y[1], plain[1], atol=1e-10)
    assert not torch.allclose(y[2], plain[2], atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"hidden": 1.5}, {"width": -1}, {"reparameterize": "lstm"}, {"shift": 1}]
)
def test_bad_options(options):
    with pytest.raises(pf.OptionError, match="prefix_tuning"):
        pf.prefix_tuning(pf.attentions(), **options)


def test_bad_places_and_calls():
    with pytest.raises(pf.OptionError, match="takes no past_key_values"):
        pf.bind(pf.prefix_tuning(pf.attentions()), pf.functionalize(ZOO["vit"].build()))
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    t5 = pf.functionalize(seeded(lambda: transformers.T5ForConditionalGeneration(config))())
    with pytest.raises(pf.OptionError, match="relative position"):
        pf.bind(pf.prefix_tuning(r".*SelfAttention"), t5)
    bert = pf.functionalize(ZOO["bert"].build())
    with pytest.raises(pf.OptionError, match="width="):
        pf.bind(pf.prefix_tuning([r"attention"]), bert)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    across = pf.functionalize(seeded(lambda: transformers.BertModel(config))())
    adapter = pf.bind(pf.prefix_tuning(r".*crossattention\.self"), across)
    with pytest.raises(pf.AddinError, match="self-attentions only"):
        across(
            adapter.apply(*adapter.init(0)), X, encoder_hidden_states=torch.zeros(2, 3, 16).double(), use_cache=False
        )


@pytest.mark.parametrize("animal", TASKS)
def test_gradients_are_those_of_peft(animal):
    peft, adapter, _ = twins(animal, False)
    state = peft.prompt_encoder.default.embedding.weight
    tree = {"prefix_tuning": {}}
    paths = adapter.parts[0].modules
    parts = state.detach().view(4, 2 * len(paths), -1)
    for i, path in enumerate(paths):
        keys, values = parts[:, 2 * i].clone(), parts[:, 2 * i + 1].clone()
        tree["prefix_tuning"][path] = {"keys": keys.requires_grad_(), "values": values.requires_grad_()}
    call = {"input_ids": X, "attention_mask": MASKS["left"]}
    adapter.model(adapter.apply(adapter.frozen, tree), **call).logits.square().sum().backward()
    peft(**call).logits.square().sum().backward()
    grads = state.grad.view(4, 2 * len(paths), -1)
    for i, place in enumerate(tree["prefix_tuning"].values()):
        assert torch.allclose(place["keys"].grad, grads[:, 2 * i], atol=1e-10, rtol=1e-8)
        assert torch.allclose(place["values"].grad, grads[:, 2 * i + 1], atol=1e-10, rtol=1e-8)
        assert place["keys"].grad.abs().max() > 1e-6
