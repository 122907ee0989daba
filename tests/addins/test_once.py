"""What places of a call share: made once of the same, anew of all else, and as if it were made each time."""

from types import SimpleNamespace

import optree
import pytest
import torch
import transformers

import peft_func as pf
from peft_func.addins import positions, prefix
from peft_func.addins.once import once
from tests.addins.small import MASKS, X, bound
from tests.zoo import seeded


def call():
    return SimpleNamespace(notes={})


class Made:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return object()


def test_the_same_is_made_once_and_all_else_anew():
    inner, make, mask = call(), Made(), torch.ones(2, 3)
    first = once(inner, ("a", 3), (mask, None, 0), make)
    assert once(inner, ("a", 3), (mask, None, 0), make) is first
    others = [
        (call(), ("a", 3), (mask, None, 0)),
        (inner, ("b", 3), (mask, None, 0)),
        (inner, ("a", 4), (mask, None, 0)),
        (inner, ("a", torch.device("cpu")), (mask, None, 0)),
        (inner, ("a", 3), (mask.clone(), None, 0)),
        (inner, ("a", 3), (mask.double(), None, 0)),
        (inner, ("a", 3), (mask, None, 1)),
        (inner, ("a", 3), (mask, None, False)),
        (inner, ("a", 3), (mask, [], 0)),
        (inner, ("a", 3), (None, None, 0)),
    ]
    made = [once(*other, make) for other in others]
    assert len({id(one) for one in (first, *made)}) == make.count == 1 + len(others)


def test_what_was_written_to_or_may_have_been_is_made_anew():
    inner, make, mask = call(), Made(), torch.ones(2, 3)
    first = once(inner, ("a",), (mask,), make)
    mask[0] = 0
    second = once(inner, ("a",), (mask,), make)
    assert second is not first
    assert once(inner, ("a",), (mask,), make) is second
    with torch.inference_mode():
        mask = torch.ones(2)
    assert once(inner, ("a",), (mask,), make) is not once(inner, ("a",), (mask,), make)


def test_gradients_and_transforms_keep_theirs_apart():
    inner, make, mask = call(), Made(), torch.ones(2, 3)
    first = once(inner, ("a",), (mask,), make)
    with torch.no_grad():
        assert once(inner, ("a",), (mask,), make) is not first
    found = []
    torch.vmap(lambda x: found.append(once(inner, ("a",), (mask,), make)) or x)(mask)
    assert found[0] is not first
    assert once(inner, ("a",), (mask,), make) is first


def test_a_few_kinds_are_kept_however_long_a_call_is():
    inner, make, masks = call(), Made(), [torch.ones(2) for _ in range(40)]
    kinds = [once(inner, ("a",), (mask,), make) for mask in masks[:3] * 2]
    assert make.count == 3
    assert kinds[:3] == kinds[3:]
    for mask in masks:
        once(inner, ("a",), (mask,), make)
    assert sum(len(kept) for kept in inner.notes.values()) < 5


def gpt2(attention="sdpa"):
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention,
    )  # fmt: skip
    return seeded(lambda: transformers.GPT2LMHeadModel(config))()


METHODS = {
    "prefix": pf.prefix_tuning(pf.attentions(), tokens=2),
    "reft": pf.loreft(pf.blocks(), rank=2, positions="f1+l2"),
    "prefixes": pf.chain(
        pf.prefix_tuning(pf.attentions(0, 1), tokens=2, name="two"),
        pf.prefix_tuning(pf.attentions(1, 2), tokens=3, name="three", shift=False),
        pf.prefix_tuning(pf.attentions(), tokens=2, name="more", shift=False),
    ),
    "refts": pf.chain(
        pf.loreft(pf.blocks(), rank=2, positions="f1", name="first"),
        pf.direft(pf.blocks(), rank=2, positions="l2", name="last"),
        pf.noreft(pf.blocks(0, 2), rank=2, positions=[1, -1], name="listed"),
        pf.noreft(pf.blocks(0, 1), rank=2, positions=lambda rank, count: rank * 2 < count, name="half"),
    ),
}


def outcome(model, adapter, frozen, tree, mask):
    leaves = pf.map_leaves(lambda t: t.detach().requires_grad_(), tree)
    logits = model(adapter.apply(frozen, leaves), X, attention_mask=mask).logits
    logits.square().sum().backward()
    return [logits, *(leaf.grad for leaf in optree.tree_leaves(leaves))]


def each_time(monkeypatch):
    for module in (positions, prefix):
        monkeypatch.setattr(module, "once", lambda inner, key, given, make: make())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["plain", "remat", "checkpoint", "reentrant"])
def test_calls_are_those_that_make_masks_in_every_block(how, name, padding, monkeypatch):
    net = gpt2()
    if how in ("checkpoint", "reentrant"):
        net.train().gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        if how == "reentrant":
            net.enable_input_require_grads()
    model, adapter, frozen, tree = bound(net, METHODS[name])
    model = pf.remat(model, pf.blocks()) if how == "remat" else model
    ours = outcome(model, adapter, frozen, tree, MASKS[padding])
    each_time(monkeypatch)
    for one, other in zip(ours, outcome(model, adapter, frozen, tree, MASKS[padding]), strict=True):
        assert torch.equal(one, other)
    assert all(bool(one.any()) for one in ours)


@pytest.mark.parametrize("name", ["prefix", "reft", "refts"])
def test_routed_batches_and_generation(name, monkeypatch):
    model, adapter, frozen, tree = bound(gpt2("eager"), METHODS[name])  # sdpa looks into masks, which no vmap can
    other = adapter.init(1)[1]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": MASKS["left"]}
    options |= {"output_logits": True, "return_dict_in_generate": True, "use_cache": True}

    def outcomes():
        routed = pf.route(adapter, frozen, pf.stack([tree, other]), torch.tensor([1, 0]))
        yield model(routed, X, attention_mask=MASKS["left"]).logits
        yield from model.method("generate")(adapter.apply(frozen, tree), X, **options).logits

    ours = list(outcomes())
    each_time(monkeypatch)
    assert all(map(torch.equal, ours, outcomes()))


def test_masks_are_made_once_for_all_blocks(monkeypatch):
    counts = {"chosen": 0, "_opened": 0}

    def counted(module, function):
        made = getattr(module, function)

        def count(*args):
            counts[function] += 1
            return made(*args)

        monkeypatch.setattr(module, function, count)

    counted(positions, "chosen")
    counted(prefix, "_opened")
    model, adapter, frozen, tree = bound(gpt2(), pf.chain(METHODS["prefix"], METHODS["reft"]))
    for mask in MASKS.values():
        counts |= dict.fromkeys(counts, 0)
        model(adapter.apply(frozen, tree), X, attention_mask=mask)
        assert counts == {"chosen": 1, "_opened": 1}
