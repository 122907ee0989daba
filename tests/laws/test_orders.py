"""Whatever is done with a model, in whatever order: the net stays bitwise what it was, and answers stay the same.

There is one net, one functional model of it, and several methods: of weights, of activations, and of both.
"""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.laws.conformance import VALUES, close, fingerprint, perturbed, unchanged
from tests.zoo import randn

F = nn.functional


class Busy(nn.Module):
    """It has buffers and attributes that a call writes, hooks, and modules with a fast path."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.lengths = 0, []
        self.stem.register_forward_hook(lambda module, args, output: output + 1)
        self.head.register_forward_pre_hook(lambda module, args: (2 * args[0],))

    def forward(self, x):
        self.calls += 1
        self.lengths.append(len(x))
        self.seen += 1
        h = self.norm(self.stem(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.layer(h)) + 0 * self.seen


def scaled(tree, inner, *args, **kwargs):
    return inner(*args, **kwargs) * (1 + tree["gate"])


def added(tree, taken, here):
    return here + tree["gate"] * taken


def gate(place, key):
    return {"gate": torch.zeros((), dtype=place.like.dtype)}


METHODS = {
    "lora": pf.lora(["stem", "linear1", "head"], rank=2),
    "gift": pf.chain(pf.gift(["linear1", "linear2"], rank=2), pf.ia3("head")),
    "train": pf.train(["norm", "head"]),
    "around": pf.chain(pf.around("layer.linear1|head", scaled, gate), pf.across("stem", "layer", added, gate)),
    "bottleneck": pf.bottleneck(["linear2", "stem"], rank=2),
    "both": pf.chain(pf.lora("head", rank=1), pf.after("layer", pf.built(lambda place: nn.Linear(8, 8)), name="own")),
}


class World:
    """One net and everything that is made of it."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Busy().double().eval()
        with torch.no_grad():
            self.net.norm.running_mean.uniform_(-1, 1)
        self.x = randn(4, 3, 5)
        self.model = pf.functionalize(self.net)
        self.base = self.model(self.model.params, self.x)
        self.adapters = {name: pf.bind(method, self.model) for name, method in METHODS.items()}
        self.trees = {name: perturbed(adapter.init(1)[1], 2) for name, adapter in self.adapters.items()}
        self.weights = {name: self.fresh(name) for name in METHODS}
        self.answers = {name: self.model(weights, self.x) for name, weights in self.weights.items()}

    def fresh(self, name):
        adapter = self.adapters[name]
        return adapter.apply(adapter.frozen, self.trees[name])

    def is_first(self, name, output):
        assert torch.equal(output, self.answers[name])

    # What may be done, each with one of the methods

    def bind(self, name):
        self.adapters[name] = pf.bind(METHODS[name], self.model)
        self.adapters[name].init(3)

    def apply(self, name):
        self.weights[name] = self.fresh(name)

    def call(self, name):
        self.is_first(name, self.model(self.weights[name], self.x))

    def call_without(self, name):
        assert torch.equal(self.model(self.model.params, self.x), self.base)

    def merge(self, name):
        adapter, tree = self.adapters[name], self.trees[name]
        if adapter.arounds:
            module = pf.export_module(adapter, adapter.frozen, tree)
        else:
            module = copy.deepcopy(self.net)
            module.load_state_dict(pf.merge(self.weights[name]), strict=False)
        assert close(module(self.x), self.answers[name], VALUES)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(1)  # it is its own, whatever is done with it

    def with_state(self, name):
        model = self.model.train()
        _, state = model.with_state(self.weights[name], model.state, self.x)
        _, state = model.with_state(self.weights[name], state, self.x + 1)
        assert float(state["seen"]) == 2 + float(self.net.seen)
        assert not torch.equal(state["norm.running_mean"], self.net.norm.running_mean)

    def gradient(self, name):
        adapter = self.adapters[name]
        tree = pf.map_leaves(lambda leaf: leaf.clone().requires_grad_(), self.trees[name])
        output = self.model(adapter.apply(adapter.frozen, tree), self.x)
        assert close(output, self.answers[name], VALUES)
        output.square().sum().backward()
        assert all(leaf.grad is not None for _, leaf in pf.leaves(tree))

    def mapped(self, name):
        adapter = self.adapters[name]
        stacked = pf.stack([self.trees[name], adapter.init(1)[1]])
        outputs = torch.vmap(lambda tree: self.model(adapter.apply(adapter.frozen, tree), self.x))(stacked)
        assert close(outputs[0], self.answers[name], VALUES)

    def adapted(self, name):
        module = pf.Adapted.of(self.adapters[name], self.trees[name])
        assert close(module(self.x), self.answers[name], VALUES)
        self.trained(module)

    def adapted_net(self, name):
        self.trained(pf.Adapted(self.net, METHODS[name], 1))

    def trained(self, module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        before = module.eval()(self.x).detach()
        for _ in range(2):
            module.train()(self.x).square().sum().backward()
            optimizer.step()
        assert not torch.equal(module.eval()(self.x), before)


ACTS = [
    World.bind, World.apply, World.call, World.call_without, World.merge, World.with_state, World.gradient,
    World.mapped, World.adapted, World.adapted_net,
]  # fmt: skip


def attributes(root):
    """Everything that a module and those in it hold besides tensors; hooks and lists by what is in them."""
    return [
        (path, key, id(value), list(value.items()) if isinstance(value, dict) else copy.copy(value))
        for path, module in root.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers")
    ]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.sampled_from(list(METHODS))), min_size=1, max_size=12))
def test_after_any_order_of_uses_the_net_and_the_answers_are_the_first(acts):
    world = World()
    roots = world.net, world.model._skeleton.root
    before = [(fingerprint(root), attributes(root)) for root in roots]
    params = {name: (tensor.data_ptr(), tensor._version) for name, tensor in world.model.params.items()}
    trees = {name: pf.map_leaves(torch.clone, tree) for name, tree in world.trees.items()}
    generator = torch.get_rng_state()
    for act, name in acts:
        act(world, name)
    assert torch.equal(generator, torch.get_rng_state())
    for root, (tensors, others) in zip(roots, before, strict=True):
        if root is world.net:
            assert unchanged(tensors, fingerprint(root))
        assert attributes(root) == others
        assert all(param.grad is None for param in root.parameters())
    assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in world.model.params.items()} == params
    for name, tree in world.trees.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(pf.leaves(tree), pf.leaves(trees[name]), strict=True))
        world.is_first(name, world.model(world.fresh(name), world.x))
    assert torch.equal(world.model(world.model.params, world.x), world.base)
    again = pf.functionalize(world.net)
    assert torch.equal(again(again.params, world.x), world.base)
    with torch.no_grad():
        assert torch.equal(world.net(world.x), world.base)  # last: it writes into itself
    assert (world.net.calls, world.net.lengths, float(world.net.seen)) == (1, [4], 1.0)
