"""Calls with add-ins leave nothing behind that waits for the garbage collection, also with checkpoints in the model."""

import gc
import weakref

import optree
import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_func as pf
from peft_func.functional.skeleton import Skeleton
from tests.addins.small import X, added, bound, gate, ones, scaled
from tests.zoo import randn


class Scale(pf.AddinBase):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def adapt_input(self, module, inputs):
        return inputs[0] * self.scale


def bert():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).double().train(), X


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double(), randn(2, 5, 8)


def blocks():
    return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]).double(), randn(2, 4)


KINDS = {
    "around": (blocks, pf.chain(pf.around("0|1.0", scaled, ones), pf.around("0", scaled, ones, name="outer"))),
    "across": (blocks, pf.across("0", "2", added, gate)),
    "bottleneck": (bert, pf.bottleneck(pf.blocks(), reduction=4)),
    "adaptformer": (bert, pf.adaptformer(rank=2)),
    "vpt": (encoder, pf.vpt(tokens=2, prefix=0, bound=0.1)),
    "prompts": (bert, pf.prompt_tuning("embeddings.word_embeddings", tokens=2)),
    "prefix": (bert, pf.prefix_tuning(pf.attentions(), tokens=2)),
    "reft": (bert, pf.loreft(pf.blocks(), rank=2, positions="f1")),
    "wire": (blocks, pf.wire("(A.adapt_input): ...->{inout1}([0:2])->...", A=Scale)),
}


@pytest.fixture
def left(monkeypatch):
    """Weak references to every module of a call, and, by the add-in that is returned, to everything noted in it."""
    found, clone = [], Skeleton.clone

    def seen(*args):
        root = clone(*args)
        found.extend(map(weakref.ref, root.modules()))
        return root

    def peek(tree, inner, *args, **kwargs):
        output = inner(*args, **kwargs)
        tensors = filter(torch.is_tensor, pytree.tree_leaves(inner.notes))
        found.extend(map(weakref.ref, tensors))
        return output

    monkeypatch.setattr(Skeleton, "clone", seen)
    gc.collect()
    gc.disable()
    yield found, pf.around("", peek, name="peek")
    gc.enable()


def first(output):
    return output if torch.is_tensor(output) else output[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_and_notes_of_a_call_are_gone_with_its_output(kind, left):
    found, peek = left
    build, method = KINDS[kind]
    net, x = build()
    model, adapter, frozen, tree = bound(net, pf.chain(method, peek))
    weights = adapter.apply(frozen, pf.map_leaves(lambda t: t.requires_grad_(), tree))
    first(model(weights, x))
    found.clear()
    output = first(model(weights, x))
    assert len(found) >= len(list(net.modules())) + (kind == "across")
    del output
    assert all(reference() is None for reference in found)
    first(model(weights, x)).sum().backward()
    assert all(reference() is None for reference in found)


class Checkpointed(nn.Module):
    """Its segments are run again in backward, when nothing but what is given to `checkpoint` is left of the call."""

    GIVEN = {
        "module": lambda module: module,
        "call": lambda module: module.__call__,
        "forward": lambda module: module.forward,
        "function": lambda module: lambda x: module(x),
    }

    def __init__(self, given, reentrant):
        super().__init__()
        self.parts = blocks()[0]
        self.given, self.reentrant = given, reentrant

    def forward(self, x):
        for part in self.parts:
            run = self.GIVEN[self.given](part) if self.given else part
            x = checkpoint(run, x, use_reentrant=self.reentrant) if self.given else run(x)
        return x


@pytest.mark.parametrize("given", Checkpointed.GIVEN)
@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [("around", False), ("around", True), ("chained", False), ("chained", True), ("across", False)],
)
def test_what_a_checkpoint_holds_is_enough_to_run_it_again(kind, given, reentrant, left):
    found, _ = left
    ones_at = lambda where, name: pf.around(where, scaled, ones, name=name)
    method = {
        "around": ones_at(r"parts\.[01]", "a"),
        "chained": pf.chain(ones_at(r"parts\.[01](\.0)?", "a"), ones_at(r"parts\.[12]", "b")),
        "across": pf.across(r"parts\.0\.0", r"parts\.[12]", added, gate),
    }[kind]
    torch.manual_seed(3)
    plain, x = Checkpointed(None, reentrant), randn(2, 4).requires_grad_()
    grads = []
    for how in (None, given):
        net = Checkpointed(how, reentrant)
        net.load_state_dict(plain.state_dict())
        model, adapter, frozen, tree = bound(net, method)
        leaves = pf.map_leaves(lambda t: t.requires_grad_(), tree)
        weights = adapter.apply(frozen, leaves)
        model(weights, x).sum().backward()
        found.clear()
        wanted = [x, *optree.tree_leaves(leaves)]
        for leaf in wanted:
            leaf.grad = None
        model(weights, x).square().sum().backward()
        grads.append([leaf.grad.clone() for leaf in wanted])
        assert all(bool(grad.any()) for grad in grads[-1])
        if how != "forward":  # then the module is held by its own forward
            assert all(reference() is None for reference in found)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_transformers_hold_enough_and_no_longer_than_their_call(reentrant, left):
    found, _ = left
    method = pf.chain(
        pf.bottleneck(pf.blocks() | pf.mlps(), reduction=4),
        pf.train("embeddings.word_embeddings.weight"),  # a reentrant checkpoint asks its inputs for gradients
    )
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        net, x = bert()
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model, adapter, frozen, tree = bound(net, method)
        leaves = pf.map_leaves(lambda t: (t + 0.1 * t.cos()).requires_grad_(), tree)
        for _ in range(2):
            found.clear()
            first(model(adapter.apply(frozen, leaves), x)).square().sum().backward()
        assert all(reference() is None for reference in found)
        grads.append([leaf.grad for leaf in optree.tree_leaves(leaves)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_forward_that_outlives_its_call_says_so():
    kept = []

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x):
            kept.append(self.part.forward)
            return self.part(x)

    model, adapter, frozen, tree = bound(Keeps(), pf.around("part", scaled, ones))
    model(adapter.apply(frozen, tree), torch.ones(1, 4))
    with pytest.raises(pf.AddinError, match="'part' is called after the call of the model"):
        kept[0](torch.ones(1, 4))
