"""`pf.across`: an activation of one place at another, in one call."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_func as pf
from tests.addins.small import added, gate
from tests.threads import wrong_answers
from tests.zoo import randn, seeded


def mlp(depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)]).double()


def run(net, method, x):
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    return model(adapter.apply(frozen, tree), x)


@pytest.mark.parametrize("taken", ["input", "output"])
@pytest.mark.parametrize("given", ["input", "output"])
@pytest.mark.parametrize(("source", "sink"), [(0, 2), (0, 1), (1, 1)])
def test_every_pair_of_ends(source, sink, taken, given):
    net, x = mlp(), randn(3, 4)
    method = pf.across(str(source), str(sink), added, gate, taken=taken, given=given)
    if source == sink and (taken, given) == ("output", "input"):
        with pytest.raises(pf.OptionError, match="own input"):
            run(net, method, x)
        return
    value, notes = x, {}
    for i, layer in enumerate(net):
        if i == source:
            notes["input"] = value
        if i == sink and given == "input":
            value = value + 0.5 * notes[taken]
        value = layer(value)
        if i == source:
            notes["output"] = value
        if i == sink and given == "output":
            value = value + 0.5 * notes[taken]
    assert torch.allclose(run(net, method, x), value, atol=1e-12)


def test_sources_and_sinks_are_paired_in_order_or_one_serves_all():
    net, x = mlp(4), randn(3, 4)
    a = net[0](x)
    b = net[1](a)
    c = net[2](b + 0.5 * a)
    expected = net[3](c + 0.5 * b)
    assert torch.allclose(run(net, pf.across("0|1", "2|3", added, gate), x), expected)
    expected = net[3](c + 0.5 * a)
    assert torch.allclose(run(net, pf.across("0", "2|3", added, gate), x), expected)
    with pytest.raises(pf.OptionError, match=r"2 sources.*3 sinks"):
        run(net, pf.across("0|1", "1|2|3", added, gate), x)


def test_two_parts_do_not_meet():
    net, x = mlp(), randn(3, 4)
    method = pf.chain(
        pf.across("0", "2", added, gate, name="one"), pf.across("0", "2", added, gate, taken="input", name="two")
    )
    a = net[0](x)
    assert torch.allclose(run(net, method, x), net[2](net[1](a) + 0.5 * x + 0.5 * a))


def test_a_sink_before_its_source_is_an_error():
    with pytest.raises(pf.AddinError, match="'0' runs before '2'"):
        run(mlp(), pf.across("2", "0", added, gate), randn(1, 4))


def test_a_shared_module_gives_its_latest_activation():
    layer = nn.Linear(4, 4).double()
    net = nn.Sequential(layer, layer, nn.Linear(4, 4).double())
    x = randn(2, 4)
    hidden = layer(layer(x))
    assert torch.allclose(run(net, pf.across("0", "2", added, gate), x), net[2](hidden + 0.5 * hidden))


class Segments(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layers, self.reentrant = mlp(), reentrant

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def test_reentrant_checkpointing_between_the_ends_is_refused_not_wrong():
    model = pf.functionalize(Segments(reentrant=True))
    adapter = pf.bind(pf.across("layers.0", "layers.2", added, gate), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf.requires_grad_(), tree)
    x = randn(2, 4).requires_grad_()
    with pytest.raises(pf.LeakError, match="use_reentrant=False"):
        model(adapter.apply(frozen, tree), x).sum().backward()


def test_nothing_survives_a_call_and_threads_do_not_meet():
    model = pf.functionalize(mlp())
    adapter = pf.bind(pf.across("0", "2", added, gate), model)
    frozen, tree = adapter.init(0)
    inputs = [randn(2, 4, seed=i) for i in range(4)]
    weights = adapter.apply(frozen, tree)
    assert not wrong_answers(lambda i: model(weights, inputs[i]), [model(weights, x) for x in inputs], times=100)
    assert not any("notes" in vars(module) for module in model._skeleton.root.modules())


def test_a_module_as_the_function():
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, taken, here):
            return here + taken @ self.weight

    net, x = mlp(), randn(3, 4)
    hidden = net[0](x)
    assert torch.allclose(run(net, pf.across("0", "2", Mix, given="output"), x), net[2](net[1](hidden)) + hidden)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


def doubled(tree, h):
    return 2 * h


def queried(tree, inner, x, *args, **kwargs):
    return inner(2 * x, *args, **kwargs)


# A method that notes, and what stands between two of them and changes what they note.
NOTING = {
    "across": (mlp, (3, 4), lambda **own: pf.across("0", "2", added, gate, **own), pf.after("0", doubled)),
    "wire": (
        mlp,
        (3, 4),
        lambda **own: pf.wire("(Skip.add_post): ...->(0){in1}->...->(2){out1}->...", Skip=pf.AddinBase, **own),
        pf.after("0", doubled),
    ),
    "parallel_adapter": (
        Classifier,
        (2, 5, 8),
        lambda **own: pf.parallel_adapter(rank=2, **own),
        pf.before(["linear1"], doubled),
    ),
    "adaptformer": (
        Classifier,
        (2, 5, 8),
        lambda **own: pf.adaptformer(rank=2, dropout=0.0, **own),
        pf.before(["linear1"], doubled),
    ),
    "vqt": (Classifier, (2, 5, 8), lambda **own: pf.vqt(tokens=2, **own), pf.around(["self_attn"], queried)),
}


@pytest.mark.parametrize("kind", NOTING)
def test_parts_of_one_name_below_named_chains_keep_their_notes_apart(kind):
    build, shape, method, between = NOTING[kind]
    model, x = pf.functionalize(seeded(build)()), randn(*shape)
    outputs = []
    for one, other in (({}, {}), ({"name": "one"}, {"name": "other"})):
        parts = pf.chain(pf.chain(method(**one), name="a"), between, pf.chain(method(**other), name="b"))
        adapter = pf.bind(parts, model)
        frozen, tree = adapter.init(0)
        own = iter([randn(*leaf.shape, 1, seed=i)[..., 0] for i, (_, leaf) in enumerate(pf.leaves(tree))])
        outputs.append(model(adapter.apply(frozen, pf.map_leaves(lambda leaf, own=own: next(own), tree)), x))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], model(model.params, x), atol=1e-3)
