"""Prompt tuning against HF PEFT with the same prompts, and against embeddings that are put together by hand."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import PromptEncoderConfig, PromptTuningConfig
from torch import nn

import peft_func as pf
from tests.addins.peers import QUIET, TASKS, labels_for, peer
from tests.addins.small import MASKS, X
from tests.zoo import ZOO, ids, randn, seeded

pytestmark = QUIET

EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens", "bert": "word_embeddings"}


def twins(animal, config, **options):
    """The same net in HF PEFT and here."""
    net = ZOO[animal].build()
    peft = peer(net, config)
    adapter = pf.bind(pf.prompt_tuning([EMBEDDINGS[animal]], tokens=4, **options), pf.functionalize(net))
    frozen, tree = adapter.init(0)
    (place,) = tree["prompt_tuning"].values()
    state = peft.prompt_encoder.default.state_dict()
    place["prompt"] = state["embedding.weight"].clone()
    for leaf, number in {"down": 0, "mid": 2, "up": 4}.items():
        if leaf in place:
            place[leaf] = state[f"mlp_head.{number}.weight"].clone()
            place[f"{leaf}_bias"] = state[f"mlp_head.{number}.bias"].clone()
    return peft, adapter, adapter.apply(frozen, tree)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("animal", EMBEDDINGS)
@pytest.mark.parametrize("mlp", [False, True])
def test_peft_gives_the_same(animal, mask, mlp):
    if mlp:
        config = PromptEncoderConfig(
            task_type=TASKS[animal], num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type="MLP"
        )
        options = {"reparameterize": "mlp", "hidden": 6}
    else:
        config, options = PromptTuningConfig(task_type=TASKS[animal], num_virtual_tokens=4), {}
    peft, adapter, weights = twins(animal, config, keep=True, **options)
    call = {"input_ids": X, "attention_mask": MASKS[mask], "labels": labels_for(animal)}
    theirs, ours = peft(**call), adapter.model(weights, **call)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-10, rtol=1e-10)
    assert torch.allclose(ours.loss, theirs.loss, atol=1e-10, rtol=1e-10)
    _, adapter, weights = twins(animal, config, **options)
    short = adapter.model(weights, X, attention_mask=MASKS[mask]).logits
    kept = theirs.logits if animal == "bert" else theirs.logits[:, 4:]
    assert torch.allclose(short, kept, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("animal", ["gpt2", "llama"])
def test_embeddings_put_together_by_hand(animal):
    """Positions that are given count on behind the prompts, and a mask covers them."""
    net = ZOO[animal].build()
    adapter = pf.bind(pf.prompt_tuning([EMBEDDINGS[animal]], tokens=3, after=2), pf.functionalize(net))
    frozen, tree = adapter.init(4)
    (place,) = tree["prompt_tuning"].values()
    mask, positions = MASKS["left"], torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    y = adapter.model(adapter.apply(frozen, tree), X, attention_mask=mask, position_ids=positions, labels=X)
    embedded = net.get_input_embeddings()(X)
    rows = []
    for sample in range(2):
        rows.append(torch.cat([embedded[sample, :2], place["prompt"], embedded[sample, 2:]]))
    long_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    long_positions = torch.tensor([[0, 0, 2, 3, 4, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]])
    hidden = net(inputs_embeds=torch.stack(rows), attention_mask=long_mask, position_ids=long_positions).logits
    expected = torch.cat([hidden[:, :2], hidden[:, 5:]], 1)
    assert torch.allclose(y.logits, expected, atol=1e-10)
    loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1).float(), X[:, 1:].flatten())
    assert torch.allclose(y.loss, loss, atol=1e-6)
    given = adapter.model(
        adapter.apply(frozen, tree), inputs_embeds=embedded, attention_mask=mask, position_ids=positions
    )
    assert torch.allclose(given.logits, expected, atol=1e-10)


def test_bert_pools_its_class_token():
    net = ZOO["bert"].build()
    adapter = pf.bind(pf.prompt_tuning(["word_embeddings"], tokens=3, after=1), pf.functionalize(net))
    frozen, tree = adapter.init(4)
    (place,) = tree["prompt_tuning"].values()
    types = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    y = adapter.model(adapter.apply(frozen, tree), X, token_type_ids=types, output_hidden_states=True)
    embedded = net.bert.embeddings.word_embeddings(X)
    long = torch.cat([embedded[:, :1], place["prompt"].expand(2, -1, -1), embedded[:, 1:]], 1)
    long_types = torch.cat([types[:, :1], types.new_zeros(2, 3), types[:, 1:]], 1)
    expected = net(inputs_embeds=long, token_type_ids=long_types, output_hidden_states=True)
    assert torch.allclose(y.logits, expected.logits, atol=1e-10)
    for own, theirs in zip(y.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(own, torch.cat([theirs[:, :1], theirs[:, 4:]], 1), atol=1e-10)


def test_a_classifier_that_finds_its_last_token_still_does():
    """PEFT's pools the last position, which is padding in the first sample here."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    net = seeded(lambda: transformers.LlamaForSequenceClassification(config))()
    x = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    adapter = pf.bind(pf.prompt_tuning(["embed_tokens"], tokens=3), pf.functionalize(net))
    weights = adapter.apply(*adapter.init(0))
    both = adapter.model(weights, x, attention_mask=(x != 0).long()).logits
    assert torch.allclose(both[:1], adapter.model(weights, x[:1, :3]).logits, atol=1e-10)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("animal", ["gpt2", "llama"])
def test_generation(animal, use_cache):
    net = ZOO[animal].build()
    adapter = pf.bind(pf.prompt_tuning([EMBEDDINGS[animal]], tokens=3), pf.functionalize(net))
    frozen, tree = adapter.init(1)
    (place,) = tree["prompt_tuning"].values()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generate = adapter.model.method("generate")
    mask = MASKS["left"]
    tokens = generate(adapter.apply(frozen, tree), X, attention_mask=mask, use_cache=use_cache, **options)
    for sample in range(2):
        real = X[sample : sample + 1, int(5 - mask[sample].sum()) :]
        for _ in range(5):
            embedded = net.get_input_embeddings()(real)
            long = torch.cat([place["prompt"][None], embedded], 1)
            real = torch.cat([real, net(inputs_embeds=long).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(tokens[sample, -5:], real[0, -5:])


def t5():
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))()


def test_t5_has_prompts_in_its_encoder():
    net = t5()
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=1)
    peft = peer(net, config)
    adapter = pf.bind(pf.prompt_tuning(["shared"], tokens=4), pf.functionalize(net))
    frozen, tree = adapter.init(0)
    (place,) = tree["prompt_tuning"].values()
    place["prompt"] = peft.prompt_encoder.default.embedding.weight.detach().clone()
    weights = adapter.apply(frozen, tree)
    for mask in MASKS.values():
        call = {"input_ids": X, "attention_mask": mask, "labels": ids(2, 3, high=32, seed=1)}
        theirs, ours = peft(**call), adapter.model(weights, **call)
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-10, rtol=1e-10)
        assert torch.allclose(ours.loss, theirs.loss, atol=1e-10, rtol=1e-10)
    options = {"max_new_tokens": 4, "do_sample": False}
    mask = MASKS["right"]
    tokens = adapter.model.method("generate")(weights, X, attention_mask=mask, **options)
    decoder = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(4):
        logits = peft(input_ids=X, attention_mask=mask, decoder_input_ids=decoder).logits
        decoder = torch.cat([decoder, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, decoder[:, : tokens.shape[1]])


def test_labels_and_spans_move_where_prompts_stay():
    config = ZOO["bert"].build().config
    for build, call in {
        transformers.BertForTokenClassification: {"labels": torch.tensor([[0, 1, 1, 0, 1]] * 2)},
        transformers.BertForQuestionAnswering: {
            "start_positions": torch.tensor([0, 2]), "end_positions": torch.tensor([3, 9])
        },
    }.items():  # fmt: skip
        net = seeded(lambda build=build: build(config))()
        model = pf.functionalize(net)
        losses = []
        for keep in (False, True):
            adapter = pf.bind(pf.prompt_tuning(["word_embeddings"], tokens=3, keep=keep, after=1), model)
            output = model(adapter.apply(*adapter.init(0)), X, **call)
            losses.append((output, output.loss))
        (short, loss), (long, long_loss) = losses
        if "labels" in call:
            assert torch.allclose(loss, long_loss, atol=1e-10)
            assert long.logits.shape[1] == short.logits.shape[1] + 3
        else:
            start = torch.nn.functional.cross_entropy(long.start_logits, torch.tensor([0, 5]))
            end = torch.nn.functional.cross_entropy(long.end_logits, torch.tensor([6, -100]))
            assert torch.allclose(long_loss, (start + end) / 2, atol=1e-10)


def test_first_values():
    net = ZOO["bert"].build()
    table = net.bert.embeddings.word_embeddings.weight
    model = pf.functionalize(net)

    def start(key=0, **options):
        (place,) = (
            pf.bind(pf.prompt_tuning(["word_embeddings"], **options), model).init(key)[1]["prompt_tuning"].values()
        )
        return place["prompt"]

    sampled = start(tokens=6)
    assert all((row == table).all(1).any() for row in sampled)
    assert not torch.equal(sampled, start(1, tokens=6))
    assert torch.equal(start(tokens=5, init=[7, 3]), table[torch.tensor([7, 3, 7, 3, 7])])
    assert torch.equal(start(tokens=1, init=torch.tensor([7, 3])), table[[7]])
    assert start(tokens=400, init="normal").std().sub(1).abs() < 0.05
    half = pf.bind(pf.prompt_tuning(["word_embeddings"]), pf.functionalize(copy.deepcopy(net).bfloat16()))
    assert all(leaf.dtype is torch.float32 for leaf in half.init(0)[1]["prompt_tuning"].popitem()[1].values())


def test_together_with_other_parts():
    """An adapter of the embedding acts on the tokens; edits behind see the longer sequence."""
    net = ZOO["bert"].build()
    model = pf.functionalize(net)
    edits = pf.direft(pf.blocks(), rank=2, positions="f4")
    prompts = pf.prompt_tuning(["word_embeddings"], tokens=3)
    adapter = pf.bind(pf.chain(pf.lora(["word_embeddings"], rank=2), edits, prompts), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf + 0.1 * randn(*leaf.shape), tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = model(adapter.apply(frozen, tree), X, attention_mask=MASKS["right"]).logits
    assert y.shape == (2, 2)
    other = pf.bind(pf.chain(prompts, edits), model)
    with pytest.raises(pf.AddinError, match="put it behind this one"):
        model(other.apply(*other.init(0)), X, attention_mask=MASKS["right"])


def test_the_base_cannot_stand_beside_outputs_that_keep_prompts():
    model = pf.functionalize(ZOO["llama"].build())
    for keep in (False, True):
        adapter = pf.bind(pf.prompt_tuning(["embed_tokens"], tokens=3, keep=keep), model)
        frozen = adapter.frozen
        stacked = pf.stack([adapter.init(key)[1] for key in (0, 1)])
        y = model(pf.route(adapter, frozen, stacked, torch.tensor([1, 0])), X).logits
        for sample, key in enumerate((1, 0)):
            alone = model(adapter.apply(*adapter.init(key)), X).logits
            assert torch.allclose(y[sample], alone[sample], atol=1e-10)
        mixed = pf.route(adapter, frozen, stacked, torch.tensor([1, -1]))
        if keep:
            with pytest.raises(pf.RouteError, match="-1"):
                model(mixed, X)
        else:
            assert torch.allclose(model(mixed, X).logits[1], model(model.params, X).logits[1], atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0}, {"tokens": 2.0}, {"init": "zero"}, {"init": []}, {"init": [1.0]}, {"init": [-1]}, {"init": 3},
        {"init": [32]}, {"reparameterize": "lstm"}, {"hidden": 0}, {"after": -1}, {"keep": None},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(pf.OptionError):
        pf.bind(pf.prompt_tuning(["word_embeddings"], **options), pf.functionalize(ZOO["bert"].build()))


def test_bad_places_and_calls():
    bert = pf.functionalize(ZOO["bert"].build())
    with pytest.raises(pf.OptionError, match="one embedding"):
        pf.bind(pf.prompt_tuning(r".*_embeddings"), bert)
    with pytest.raises(pf.OptionError, match="choose the nn"):
        pf.bind(pf.prompt_tuning(["classifier"]), bert)
    with pytest.raises(pf.OptionError, match="inputs_embeds"):
        pf.bind(pf.prompt_tuning("embed"), pf.functionalize(ZOO["tied"].build()))
    adapter = pf.bind(pf.prompt_tuning(["word_embeddings"], tokens=3, after=2), bert)
    weights = adapter.apply(*adapter.init(0))
    with pytest.raises(pf.AddinError, match="4 dimensions"):
        bert(weights, X, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(pf.AddinError, match="neither"):
        bert(weights, attention_mask=torch.ones(2, 5))
    with pytest.raises(pf.AddinError, match="the sequence has 1"):
        bert(weights, X[:, :1])
