"""Rematerialised modules: the same values and gradients, less memory, a second run that finds what the first did."""

import copy
import functools
import gc
import inspect
import pickle
import sys
import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import peft_func as pf
from tests import zoo
from tests.threads import wrong_answers
from tests.zoo import ids, randn


class Step(nn.Module):
    """A layer that counts how often it runs, over all copies of it."""

    runs: list[int] = []

    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, double: bool = False) -> Tensor:
        Step.runs.append(1)
        return x + self.dropout(self.down(torch.tanh(self.up(x)))) * (2 if double else 1)


@pytest.fixture(autouse=True)
def _none_ran():
    Step.runs.clear()


def steps(depth: int = 3, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(*[Step(dropout=dropout) for _ in range(depth)]).double().train()


STEPS = pf.of_type(Step)


bert = functools.partial(zoo.bert, layers=3, dropout=0.2)
llama = functools.partial(zoo.llama, dropout=0.2)
vit = functools.partial(zoo.vit, layers=3, patch=2, dropout=0.1)


def cnn() -> nn.Module:
    def stage(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.GELU(), nn.Dropout2d(0.2))

    return nn.Sequential(stage(1, 6), stage(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


NETS = {
    "bert": (bert, pf.blocks(), (ids(3, 5, high=32),)),
    "llama": (llama, pf.blocks(), (ids(3, 5, high=32),)),
    "vit": (vit, pf.blocks(), (randn(3, 1, 8, 8),)),
    "cnn": (cnn, "[01]", (randn(3, 1, 8, 8),)),
}
MATRICES = pf.of_type(nn.Linear, nn.Conv2d) & ~pf.path(r"(classifier|score|lm_head|4)\..*")
METHODS = {
    "lora": pf.lora(MATRICES, rank=2, dropout=0.3),
    "gift": pf.gift(MATRICES, rank=2, share="none"),
    "dora": pf.chain(pf.dora(MATRICES, rank=2), pf.train(r".*norm\d?\.weight|.*LayerNorm.*|.\.1.*")),
    "svdiff": pf.svdiff(MATRICES),
}


def built(name: str) -> tuple[pf.FunctionalModel, pf.FunctionalModel, tuple[Tensor, ...]]:
    build, where, inputs = NETS[name]
    torch.manual_seed(1)
    model = pf.functionalize(build().double().train())
    return model, pf.remat(model, where), inputs


def results(model: pf.FunctionalModel, method: object, *inputs: Tensor) -> list[Tensor]:
    """Return the output, and the gradient of every leaf and of every floating input."""
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    leaves = pf.map_leaves(lambda t: (t + 0.1 * t.cos()).requires_grad_(), tree)
    wanted = [leaf for _, leaf in pf.leaves(leaves)]
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted += [x for x in given if x.is_floating_point()]
    torch.manual_seed(7)
    output = model(adapter.apply(frozen, leaves), *given)
    output = output.logits if hasattr(output, "logits") else output
    torch.manual_seed(8)  # backward restores the state that the segment started with, and then this one
    found = torch.autograd.grad(output.square().sum(), wanted)
    assert all(bool(grad.any()) for grad in found)
    return [output.detach(), *found, torch.rand(1)]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_output_and_gradients_are_those_without_remat_dropout_included(name, method):
    model, lean, inputs = built(name)
    same(results(lean, METHODS[method], *inputs), results(model, METHODS[method], *inputs))


def test_a_segment_runs_once_more_in_backward_and_only_there():
    model = pf.functionalize(steps())
    lean, x = pf.remat(model, STEPS), randn(2, 6)
    params = {name: t.clone().requires_grad_() for name, t in model.params.items()}

    def runs(call):
        Step.runs.clear()
        call()
        return len(Step.runs)

    assert runs(lambda: model(params, x).sum().backward()) == 3
    assert runs(lambda: lean(params, x)) == 3
    assert runs(lambda: lean(params, x).sum().backward()) == 6
    with torch.no_grad():
        assert runs(lambda: lean(params, x)) == 3
    with torch.inference_mode():
        assert runs(lambda: lean(params, x)) == 3
    for twin in (lean.eval(), lean.train(), lean.to(torch.float64), lean.method("forward"), copy.deepcopy(lean),
                 pickle.loads(pickle.dumps(lean)), pf.with_modes(lean, "0"), pf.remat(lean, STEPS)):  # fmt: skip
        assert runs(lambda twin=twin: twin(params, x).sum().backward()) == 6
    assert runs(lambda: model(params, x).sum().backward()) == 3  # the model it was made of is left as it is


def test_gradients_of_gradients_and_backward_twice():
    model = pf.functionalize(steps())
    adapter = pf.bind(pf.chain(pf.dora(".*weight", rank=2)), model)
    frozen, tree = adapter.init(0)

    def results(model):
        leaves = pf.map_leaves(lambda t: (t + 0.1 * t.cos()).requires_grad_(), tree)
        wanted = [leaf for _, leaf in pf.leaves(leaves)]
        loss = model(adapter.apply(frozen, leaves), randn(2, 6)).square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, retain_graph=True)
        return [*first, *second, *torch.autograd.grad(loss, wanted)]

    same(results(pf.remat(model, STEPS)), results(model))


class Running(nn.Module):
    """Divides by a running mean of squares, which it updates first: its output depends on its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(6))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.5).add_(0.5 * x.detach().square().mean(0))
            self.count = self.count + 1  # a new tensor in place of the old one
        return x / self.mean.sqrt() * self.count


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(6), Running], ids=["BatchNorm", "own"])
def test_buffers_are_written_once_and_the_second_run_reads_what_the_first_one_read(norm):
    block = nn.Sequential(Step(), norm(), Step())
    net = (
        nn.Sequential(block, Step(), block).double().train()
    )  # the same block twice: the second call reads the first's
    model = pf.functionalize(net)
    lean = pf.remat(model, "0")

    def results(model):
        params = {name: t.clone().requires_grad_() for name, t in model.params.items()}
        y, state = model.with_state(params, model.state, randn(5, 6))
        before = {name: t.clone() for name, t in state.items()}
        for _ in range(2):
            y.square().sum().backward(retain_graph=True)
        for name, tensor in state.items():  # backward has not touched what was returned
            assert torch.equal(tensor, before[name])
            assert not torch.equal(tensor, model.state[name])
        return [y.detach(), *state.values(), *(p.grad for p in params.values())]

    same(results(lean), results(model))


def gate(place, key):
    return {"gate": torch.tensor(0.5, dtype=torch.float64)}


VIT_ADDINS = {
    "around the blocks": pf.chain(
        METHODS["lora"], pf.after(pf.blocks(), lambda tree, y: y * tree["gate"], gate), pf.houlsby(rank=4)
    ),
    "from block to block": pf.across(
        r".*0\.(mlp\.fc1|intermediate\.dense)", r".*2\.(mlp\.fc1|intermediate\.dense)",
        lambda tree, a, x: x + tree["gate"] * a[..., :16], gate,
    ),
    "within a block": pf.across(
        pf.blocks(), pf.blocks(), lambda tree, a, y: y + tree["gate"] * a, gate, taken="input", given="output"
    ),
    "adaptformer": pf.adaptformer(rank=3, dropout=0.2, activation="gelu"),
    "vpt and convpass": pf.chain(pf.vpt(tokens=2), pf.convpass(rank=3, dropout=0.2)),
    "vqt": pf.chain(pf.vqt(tokens=2), pf.lora(MATRICES, rank=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", VIT_ADDINS)
def test_addins_at_segments_inside_of_them_and_across(name):
    model, lean, inputs = built("vit")
    same(results(lean, VIT_ADDINS[name], *inputs), results(model, VIT_ADDINS[name], *inputs))


def test_the_second_run_needs_the_notes_of_the_first(monkeypatch):
    _, lean, inputs = built("vit")
    monkeypatch.setattr(sys.modules["peft_func.functional.remat"], "_notes_in", lambda module: {})
    with pytest.raises(Exception, match=r"tokens|shape|recomput"):  # VPT has told Convpass of its tokens, and is gone
        results(lean, VIT_ADDINS["vpt and convpass"], *inputs)


def test_threads():
    model = pf.functionalize(steps(dropout=0.0))
    lean, x = pf.remat(model, STEPS), randn(2, 6)
    adapter = pf.bind(pf.lora(".*weight", rank=2), lean)
    trees = [pf.map_leaves(lambda t, i=i: t + 0.1 * (i + 1), adapter.init(i)[1]) for i in range(4)]

    def gradient(model, i):
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), trees[i])
        model(adapter.apply(adapter.frozen, leaves), x).square().sum().backward()
        return torch.cat([leaf.grad.flatten() for _, leaf in pf.leaves(leaves)])

    assert wrong_answers(functools.partial(gradient, lean), [gradient(model, i) for i in range(4)], times=20) == []


def test_under_torch_func_modules_run_once_and_values_are_the_same():
    model = pf.functionalize(steps())
    lean, x = pf.remat(model, STEPS), randn(2, 6)
    adapter = pf.bind(pf.lora(".*weight", rank=2), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.1, tree)
    stacked = pf.stack([tree, pf.map_leaves(lambda t: t * 2, tree)])

    def loss(model, t):
        return model(adapter.apply(frozen, t), x).square().sum()

    def flat(tree):
        return [leaf for _, leaf in pf.leaves(tree)]

    for f in (
        lambda m: flat(torch.func.grad(functools.partial(loss, m))(tree)),
        lambda m: [torch.func.vmap(functools.partial(loss, m))(stacked)],
        lambda m: flat(torch.func.vmap(torch.func.grad(functools.partial(loss, m)))(stacked)),
        lambda m: list(torch.func.jvp(functools.partial(loss, m), (tree,), (tree,))),
        lambda m: flat(torch.func.jacrev(functools.partial(loss, m))(tree)),
    ):
        expected = f(model)
        Step.runs.clear()
        same(f(lean), expected)
        assert len(Step.runs) == 3

    def mapped(m):  # backward comes when the vmap is over
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), stacked)
        torch.func.vmap(functools.partial(loss, m))(leaves).sum().backward()
        return [leaf.grad for leaf in flat(leaves)]

    same(mapped(lean), mapped(model))


def test_ensembles_and_routed_batches():
    model, lean, (x,) = built("vit")
    model, lean = model.eval(), lean.eval()

    def results(model, method):
        adapter = pf.bind(method, model)
        frozen, tree = adapter.init(0)
        stacked = pf.stack([pf.map_leaves(lambda t: t + 0.1, tree), pf.map_leaves(lambda t: t - 0.2, tree)])
        leaves = pf.map_leaves(lambda t: t.requires_grad_(), stacked)
        wanted = [leaf for _, leaf in pf.leaves(leaves)]
        every = pf.ensemble(adapter)(frozen, leaves, x).logits
        one = model(pf.route(adapter, frozen, leaves, torch.tensor([1, -1, 0])), x).logits
        return [every, one, *torch.autograd.grad(every.square().sum() + one.square().sum(), wanted)]

    for method in (pf.lora(MATRICES, rank=2), pf.houlsby(rank=4)):
        same(results(lean, method), results(model, method))


@pytest.mark.slow
def test_compiled_transforms_run_once():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2)]).double()
    model = pf.functionalize(net)
    lean, x = pf.remat(model, "[01]"), randn(2, 6)
    adapter = pf.bind(pf.lora(".*", rank=2), lean)
    frozen, tree = adapter.init(0)
    stacked = pf.stack([pf.map_leaves(lambda t, i=i: t + 0.1 * i, tree) for i in (1, 2)])

    def results(model, compile):
        def loss(t):
            return model(adapter.apply(frozen, t), x).square().sum()

        torch._dynamo.reset()
        grads = compile(torch.func.vmap(torch.func.grad(loss)))(stacked)
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), stacked)
        compile(torch.func.vmap(loss))(leaves).sum().backward()
        return [*(t for _, t in pf.leaves(grads)), *(t.grad for _, t in pf.leaves(leaves))]

    same(
        results(lean, functools.partial(torch.compile, fullgraph=True, backend="aot_eager")),
        results(model, lambda f: f),
    )


@pytest.mark.slow
def test_compiled_without_breaks_and_computed_again_in_the_backward_graph():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2)]).double()
    model = pf.functionalize(net)
    lean, x = pf.remat(model, "[01]"), randn(2, 6)
    adapter = pf.bind(pf.chain(pf.lora(".*", rank=2), pf.after("1", lambda t, y: y * t["gate"], gate)), lean)
    frozen, tree = adapter.init(0)
    trees = [pf.map_leaves(lambda t, i=i: t + 0.1 * i, tree) for i in (1, 2)]
    found = []

    def compiler(graph, _):
        found.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)

    def results(call):
        outputs = []
        for tree in trees:
            leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), tree)
            loss = call(leaves)
            loss.backward()
            outputs += [loss.detach(), *(leaf.grad for _, leaf in pf.leaves(leaves))]
        return outputs

    again = []
    for each in (model, lean):
        torch._dynamo.reset()
        found.clear()

        def loss(tree, model=each):
            return model(adapter.apply(frozen, tree), x).square().sum()

        same(results(torch.compile(loss, backend=backend, fullgraph=True)), results(loss))
        _, backward = found  # and no more: another tree is no reason to compile again
        again.append(sum(node.target is torch.ops.aten.tanh.default for node in backward.graph.nodes))
    assert again == [0, 2]


def step_of(model: pf.FunctionalModel, x: Tensor, method: object):
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    leaves = pf.map_leaves(lambda t: t.requires_grad_(), tree)
    return lambda: model(adapter.apply(frozen, leaves), x).logits.square().sum().backward()


def test_a_training_step_holds_less():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256
    )
    model = pf.functionalize(transformers.BertForSequenceClassification(config).train())
    lean, x = pf.remat(model, pf.blocks()), ids(4, 32, high=50)
    for method in (pf.lora(MATRICES, rank=4), pf.dora(MATRICES, rank=4), pf.gift(MATRICES, rank=4, share="none")):
        for graph in ("composed", "factored", "formed"):
            with pf.graph(graph):
                plain, less = (pf.peak_memory(step_of(m, x, method)).peak for m in (model, lean))
            assert less < 0.4 * plain


def test_a_call_leaves_nothing_behind_that_waits_for_the_garbage_collection():
    model = pf.functionalize(steps())
    lean, x = pf.remat(model, STEPS), randn(2, 6)
    params = {name: t.clone().requires_grad_() for name, t in model.params.items()}
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is Step for thing in gc.get_objects())
        lean(params, x)
        lean(params, x).sum().backward()
        assert sum(type(thing) is Step for thing in gc.get_objects()) == before
    finally:
        gc.enable()


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x.cos() @ torch.diag(torch.diag(self.inner.weight))  # no rule: the weight is formed


def test_the_policies_of_the_call_hold_for_the_second_run():
    model = pf.functionalize(nn.Sequential(Multiplies(), Multiplies()).double())
    lean, x = pf.remat(model, "[01]"), randn(2, 6)
    with pf.densify("allow"):
        expected = results(model, pf.lora(".*", rank=2), x)
        adapter = pf.bind(pf.lora(".*", rank=2), lean)
        leaves = pf.map_leaves(lambda t: (t + 0.1 * t.cos()).requires_grad_(), adapter.init(0)[1])
        loss = lean(adapter.apply(adapter.frozen, leaves), x).square().sum()
    with warnings.catch_warnings(), pf.densify("error"):
        warnings.simplefilter("error")
        loss.backward()
    same([leaf.grad for _, leaf in pf.leaves(leaves)], expected[1:-2])


def test_autocast_of_the_call_holds_for_the_second_run():
    torch.manual_seed(1)
    model = pf.functionalize(bert().train())
    lean, x = pf.remat(model, pf.blocks()), ids(3, 5, high=32)

    def results(model):
        adapter = pf.bind(pf.lora(MATRICES, rank=2), model)
        leaves = pf.map_leaves(lambda t: (t + 0.1).requires_grad_(), adapter.init(0)[1])
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(adapter.apply(adapter.frozen, leaves), x).logits.float().square().sum()
        loss.backward()
        return [leaf.grad for _, leaf in pf.leaves(leaves)]

    for a, b in zip(results(lean), results(model), strict=True):
        assert torch.equal(a, b)


def test_in_a_module_for_trainers_and_when_observed():
    net = steps()
    lean, x = pf.remat(pf.functionalize(net), STEPS), randn(2, 6)
    adapter = pf.bind(pf.lora(".*weight", rank=2), lean)
    module = pf.Adapted.of(adapter, adapter.init(0)[1]).train()
    module(x).sum().backward()
    assert len(Step.runs) == 6
    y, seen = pf.observe(lean, adapter.apply(adapter.frozen, pf.map_leaves(
        lambda t: t.requires_grad_(), adapter.init(0)[1])), r"0\.up", x)  # fmt: skip
    y.sum().backward()
    assert len(seen["0.up"]) == 1


def test_the_whole_model_as_a_segment_with_keywords_and_its_signature():
    model = pf.functionalize(Step().double())
    lean = pf.remat(model, "")
    params = {name: t.clone().requires_grad_() for name, t in model.params.items()}
    y = lean(params, randn(2, 6), double=True)
    y.sum().backward()
    assert torch.equal(y, model(params, randn(2, 6), double=True))
    assert list(inspect.signature(lean._skeleton.root.forward).parameters) == ["x", "double"]


def test_a_forward_that_is_an_attribute_is_kept():
    net = steps()
    net[1].forward = functools.partial(Step.forward, net[1], double=True)
    model = pf.functionalize(net)
    same(results(pf.remat(model, STEPS), pf.lora(".*weight", rank=2), randn(2, 6)),
         results(model, pf.lora(".*weight", rank=2), randn(2, 6)))  # fmt: skip


def test_layers_of_torch_itself():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.2)
    for mode in (True, False):
        net = nn.TransformerEncoder(layer, 2).double().train(mode)
        model = pf.functionalize(net)
        method = pf.lora(r".*(in_proj_weight|linear\d\.weight)", rank=2)
        lean = pf.remat(model, pf.of_type(nn.TransformerEncoderLayer))
        same(results(lean, method, randn(2, 3, 8)), results(model, method, randn(2, 3, 8)))


def test_places_that_cannot_be():
    model = pf.functionalize(nn.Sequential(steps(), nn.ModuleList([nn.Linear(2, 2)])))
    with pytest.raises(pf.SelectorError, match=r"remat: 'setp' .* nearest"):
        pf.remat(model, "setp")
    with pytest.raises(pf.OptionError, match=r"'0.0' is inside of '0'.*choose one"):
        pf.remat(model, r"0|0\.0")
    with pytest.raises(pf.OptionError, match=r"'0.1.up' is inside of '0'"):
        pf.remat(pf.remat(model, r"0\.1\.up"), "0")
    with pytest.raises(pf.OptionError, match=r"'1' is a ModuleList, which is never called"):
        pf.remat(model, "1")
    with pytest.raises(pf.OptionError, match="takes a functional model, not a Linear"):
        pf.remat(nn.Linear(2, 2), "")


def test_what_writes_to_its_arguments_is_refused():
    model = pf.functionalize(nn.Sequential(nn.Linear(4, 4), nn.CELU(inplace=True)))
    params = {name: t.clone().requires_grad_() for name, t in model.params.items()}
    with pytest.raises(pf.ModuleRefusedError, match="a CELU writes to what it receives"):
        pf.remat(model, "1")(params, torch.ones(1, 4))
    with torch.no_grad():
        pf.remat(model, "1")(params, torch.ones(1, 4))
    pf.remat(model, "")(params, torch.ones(1, 4)).sum().backward()

    torch.manual_seed(1)
    net = llama()
    lean = pf.remat(pf.functionalize(net.train()), pf.blocks())
    leaves = {name: t.clone().requires_grad_() for name, t in lean.params.items()}
    with pytest.raises(pf.ModuleRefusedError, match=r"LlamaDecoderLayer writes .*use_cache=False"):
        lean(leaves, ids(2, 4, high=32), use_cache=True)
    lean(leaves, ids(2, 4, high=32)).logits.sum().backward()
