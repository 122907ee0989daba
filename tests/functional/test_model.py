"""A functional model is the module, as a function: same values, nothing touched, wrong names refused."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn

import peft_func as pf
from tests.laws.conformance import fingerprint, unchanged
from tests.zoo import ZOO, ids, randn


@pytest.mark.parametrize("name", ZOO)
def test_the_call_is_the_module(name):
    animal = ZOO[name]
    net = animal.build()
    model, (args, kwargs) = pf.functionalize(net), animal.inputs(1)
    before = fingerprint(net)
    assert list(model.params) == [name for name, _ in net.named_parameters()]
    assert all(model.params[n].data_ptr() == p.data_ptr() for n, p in net.named_parameters())
    assert not any(p.requires_grad for p in model.params.values())
    y, expected = animal.output(model(model.params, *args, **kwargs)), animal.output(net(*args, **kwargs))
    assert torch.allclose(y, expected, atol=1e-12, rtol=0)  # the module itself, with gradients on, takes no fast path
    assert unchanged(before, fingerprint(net))


@pytest.mark.parametrize("name", ZOO)
def test_the_state_dict_loads_strictly(name):
    net = ZOO[name].build()
    model = pf.functionalize(net)
    sd = model.state_dict(model.params)
    assert list(sd) == list(net.state_dict())
    fresh = copy.deepcopy(net)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(sd, strict=True)
    for key, value in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)


def test_ties_have_one_canonical_name_and_write_all_names():
    net = ZOO["tied"].build()
    model = pf.functionalize(net)
    assert model.ties == {"head.weight": "embed.weight"}
    assert "head.weight" not in model.params
    other = {**model.params, "embed.weight": model.params["embed.weight"] * 2}
    sd = model.state_dict(other)
    assert sd["head.weight"] is sd["embed.weight"]
    shared = pf.functionalize(ZOO["shared"].build())
    assert shared.ties == {f"blocks.{i}.0.{leaf}": f"inner.0.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}


def test_a_shared_module_sees_the_effective_weight_at_both_places_and_is_never_corrupted():
    net = ZOO["shared"].build()
    before, x = fingerprint(net), randn(3, 6)
    model = pf.functionalize(net)
    doubled = {**model.params, "inner.0.weight": model.params["inner.0.weight"] * 2}
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.inner[0].weight.mul_(2)
    assert torch.equal(model(doubled, x), twin(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(doubled, x), twin(x), atol=1e-12)
    assert torch.equal(model(model.params, x), net(x))
    assert unchanged(before, fingerprint(net))


def test_train_mode_returns_new_buffers_and_changes_none():
    net = ZOO["conv"].build()
    model = pf.functionalize(net)
    assert model._skeleton.root.training is False
    train, x = model.train(), randn(2, 4, 8, 8)
    kept = {name: value.clone() for name, value in model.state.items()}
    y, state = train.with_state(train.params, train.state, x)
    reference = copy.deepcopy(net).train()
    assert torch.equal(y, reference(x))
    for name, buffer in reference.named_buffers():
        assert torch.equal(state[name], buffer)
        assert torch.equal(model.state[name], kept[name])
        assert not torch.equal(state[name], kept[name])
    train(train.params, x)
    assert all(torch.equal(model.state[name], kept[name]) for name in kept)
    _, again = train.with_state(train.params, state, x)
    assert int(again["norm.num_batches_tracked"]) == 2
    assert torch.equal(train.eval()(train.params, x), net(x))
    sd = model.state_dict(model.params, state)
    assert torch.equal(sd["norm.running_mean"], state["norm.running_mean"])


def test_with_state_under_vmap_keeps_the_statistics_of_each_member():
    train = pf.functionalize(ZOO["conv"].build()).train()
    stacked = pf.stack([train.state, {k: v + 1 for k, v in train.state.items()}])
    xs = randn(2, 3, 4, 8, 8)
    ys, states = torch.vmap(lambda s, x: train.with_state(train.params, s, x))(stacked, xs)
    for i, state in enumerate(pf.unstack(stacked)):
        y, new = train.with_state(train.params, state, xs[i])
        assert torch.allclose(ys[i], y, atol=1e-12)
        for name in new:
            assert torch.allclose(states[name][i], new[name], atol=1e-12)


def test_batch_norm_in_train_mode_under_vmap_over_adapters():
    train, x = pf.functionalize(ZOO["conv"].build()).train(), randn(2, 4, 8, 8)
    adapter = pf.bind(pf.lora("stem|head", rank=2), train)
    frozen, tree = adapter.init(0)
    members = [pf.map_leaves(lambda t, i=i: t + 0.1 * i, tree) for i in range(3)]
    call = lambda t: train.with_state(adapter.apply(frozen, t), train.state, x)
    ys, states = torch.vmap(call)(pf.stack(members))
    grads = torch.vmap(torch.func.grad(lambda t: train(adapter.apply(frozen, t), x).square().sum()))(pf.stack(members))
    for i, member in enumerate(members):
        y, state = call(member)
        assert torch.allclose(ys[i], y, atol=1e-12)
        assert all(torch.allclose(states[name][i], state[name]) for name in state)
        alone = torch.func.grad(lambda t: train(adapter.apply(frozen, t), x).square().sum())(member)
        assert torch.allclose(grads["lora"]["stem.weight"]["A"][i], alone["lora"]["stem.weight"]["A"], atol=1e-10)


def test_with_state_compiles():
    train, x = pf.functionalize(ZOO["conv"].build()).train(), randn(2, 4, 8, 8)
    compiled = torch.compile(lambda w, s, x: train.with_state(w, s, x), fullgraph=True, backend="aot_eager")
    y, state = compiled(train.params, train.state, x)
    expected, new = train.with_state(train.params, train.state, x)
    assert torch.allclose(y, expected, atol=1e-12)
    assert all(torch.allclose(state[name], new[name]) for name in new)
    assert int(train.state["norm.num_batches_tracked"]) == 0


def test_modes_of_single_modules_and_overridden_train_are_kept():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    net = nn.Sequential(nn.Linear(3, 3), Frozen(3), nn.BatchNorm1d(3), nn.Dropout()).double().train()
    net[2].eval()
    model = pf.functionalize(net)
    assert [m.training for m in model._skeleton.root] == [True, False, False, True]
    assert [m.training for m in model.train()._skeleton.root] == [True, False, True, True]
    assert [m.training for m in net] == [True, False, False, True]


class Writes(nn.Module):
    """A module that does all that a pure function must not do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.history, self.last, self.table = [], None, {"calls": 0}
        self.blocks = [self.linear]  # a plain list: not registered
        self.bound = self.helper

    def helper(self, x):
        return self.linear(x)

    def forward(self, x):
        self.count += 1
        self.hidden = self.hidden * 2
        self.history.append(x)
        self.table["calls"] += 1
        self.last = x
        return self.bound(x) + self.blocks[0](x)


def test_what_forward_writes_is_gone_with_the_call():
    net = Writes().double().eval()
    model, x = pf.functionalize(net), randn(2, 3)
    doubled = {name: value * 2 for name, value in model.params.items()}
    y, state = model.with_state(doubled, model.state, x)
    assert torch.allclose(y, 2 * nn.functional.linear(x, doubled["linear.weight"], doubled["linear.bias"]))
    for _ in range(2):
        assert torch.equal(model(doubled, x), y)
    for module in (net, model._skeleton.root):
        assert (module.history, module.last, module.table) == ([], None, {"calls": 0})
    assert (float(state["count"]), state["hidden"].tolist()) == (1.0, [2.0, 2.0])
    assert (float(model.state["count"]), float(net.count)) == (0.0, 0.0)
    assert list(model.state_dict(model.params)) == list(net.state_dict())


def test_plain_tensors_with_a_graph_and_hooks_are_no_obstacle():
    net = nn.Sequential(nn.Linear(3, 3))
    net.note = net[0].weight * 2  # not a leaf: deepcopy would refuse it
    seen = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(module) or out + 1)
    model, x = pf.functionalize(net), torch.ones(2, 3)
    assert torch.equal(model(model.params, x), net(x))
    assert seen[0] is not seen[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize(
    "where", [".*", r"layers\.0\..*", "layers.1.linear1", r"layers\.2\.self_attn.*", r"layers\.1.*bias"]
)
def test_the_inference_fast_path_of_transformer_encoders(where):
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 3).double().eval()
    model, x = pf.functionalize(net), randn(2, 5, 8)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    adapter = pf.bind(pf.train(where) if "bias" in where else pf.lora(where, rank=2), model)
    frozen, tree = adapter.init(0)
    with torch.no_grad(), pf.densify("error"):
        weights = adapter.apply(frozen, pf.map_leaves(lambda t: t + 0.1, tree))
        y = model(weights, x, src_key_padding_mask=padding)
        net.load_state_dict(model.state_dict(weights), strict=True)
        expected = net(x, src_key_padding_mask=padding)
    assert torch.allclose(y[~padding], expected[~padding], atol=1e-12)


def test_recurrent_networks_run_on_the_given_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    net = Net().double()
    model, x = pf.functionalize(net), randn(2, 3, 4)
    adapter = pf.bind(pf.lora(".*", rank=2), model)
    frozen, tree = adapter.init(0)
    leaves = pf.map_leaves(lambda t: (t + 0.1).requires_grad_(), tree)
    weights = adapter.apply(frozen, leaves)
    with warnings.catch_warnings(record=True) as hints:
        warnings.simplefilter("always")
        y = model(weights, x)
    assert {hint.category for hint in hints} == {pf.DensifyWarning}
    assert len(hints) == 8
    y.sum().backward()
    assert all(leaf.grad.any() for path in leaves["lora"].values() for leaf in path.values())
    net.load_state_dict(model.state_dict(weights))
    assert torch.allclose(y, net(x), atol=1e-12)


def test_embedding_with_max_norm_does_not_renormalise_the_base():
    net = nn.Embedding(5, 4, max_norm=0.5)
    before = net.weight.detach().clone()
    model = pf.functionalize(net)
    y = model(model.params, torch.arange(5))
    assert y.norm(dim=1).max() <= 0.5 + 1e-6
    assert torch.equal(net.weight, before)


def test_other_methods_of_the_module():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).double().eval()
    model, prompt = pf.functionalize(net), ids(2, 5, high=32)
    adapter = pf.bind(pf.lora(["q_proj", "down_proj"], rank=2), model)
    frozen, tree = adapter.init(0)
    weights = adapter.apply(frozen, pf.map_leaves(lambda t: t + 0.2, tree))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with pf.densify("error"):
        text = model.method("generate")(weights, prompt, **options)
    twin = copy.deepcopy(net)
    twin.load_state_dict(model.state_dict(weights), strict=True)
    assert torch.equal(text, twin.generate(prompt, **options))
    with pytest.raises(pf.OptionError, match="no method 'generat'"):
        model.method("generat")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_mixture_of_experts(implementation):
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = implementation
    net = transformers.MixtralForCausalLM(config).double().eval()
    model, prompt = pf.functionalize(net), ids(2, 5, high=32)
    adapter = pf.bind(pf.chain(pf.lora(["gate_up_proj", "q_proj"], rank=2), pf.gift(["down_proj"], rank=2)), model)
    frozen, tree = adapter.init(0)
    assert tree["lora"]["model.layers.0.mlp.experts.gate_up_proj"]["A"].shape == (4, 2, 16)
    weights = adapter.apply(frozen, pf.map_leaves(lambda t: t + 0.1, tree))
    with pf.densify("error"):
        y = model(weights, prompt).logits
    net.load_state_dict(model.state_dict(weights), strict=True)
    assert torch.allclose(y, net(prompt).logits, atol=1e-10)


def test_all_weights_may_be_cast_or_moved_but_not_one_of_them():
    model = pf.functionalize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    wide = {name: tensor.double() for name, tensor in model.params.items()}
    assert model(wide, randn(2, 3)).dtype is torch.float64
    with pytest.raises(pf.TreeError, match=r"'1\.bias' is torch\.float64 on cpu, but '0\.weight' is torch\.float32"):
        model({**model.params, "1.bias": wide["1.bias"]}, torch.ones(2, 3))
    with pytest.raises(pf.TreeError, match=r"'0\.bias' is torch\.float32 on meta"):
        model({**model.params, "0.bias": torch.ones(3, device="meta")}, torch.ones(2, 3))
    moved = model.to(torch.float64)
    assert moved(moved.params, randn(2, 3)).dtype is torch.float64
    assert next(iter(model.params.values())).dtype is torch.float32


def test_wrong_names_and_shapes_are_refused():
    model = pf.functionalize(ZOO["tied"].build())
    x = ids(2, 3, high=32)
    typo = {("mix.wieght" if name == "mix.weight" else name): t for name, t in model.params.items()}
    with pytest.raises(KeyError, match=r"missing: mix\.weight; unknown: 'mix\.wieght' \(nearest: mix\.weight"):
        model(typo, x)
    with pytest.raises(pf.NameMismatchError, match=r"head\.weight is another name of embed\.weight"):
        model({**model.params, "head.weight": model.params["embed.weight"]}, x)
    with pytest.raises(pf.TreeError, match=r"'mix\.weight' is \(8, 7\); this model's is \(8, 8\)"):
        model({**model.params, "mix.weight": randn(8, 7)}, x)
    with pytest.raises(pf.TreeError, match="is a float"):
        model({**model.params, "mix.weight": 1.0}, x)
    with pytest.raises(pf.NameMismatchError, match="the state must have the names"):
        model.with_state(model.params, {"nothing": x}, x)


def test_pickle_and_deepcopy():
    model = pf.functionalize(ZOO["mlp"].build())
    x = randn(2, 5)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(twin.params, x), model(model.params, x))


def test_exceptions_in_the_module_leave_nothing_behind():
    class Fails(nn.Linear):
        def forward(self, x):
            if x.sum() < 0:
                raise ZeroDivisionError
            return super().forward(x)

    model = pf.functionalize(Fails(3, 3).double())
    with pytest.raises(ZeroDivisionError):
        model(model.params, -torch.ones(1, 3).double())
    x: Tensor = torch.ones(1, 3).double()
    assert torch.equal(model(model.params, x), nn.functional.linear(x, *model.params.values()))


def test_a_net_that_keeps_handles_of_its_hooks():
    """As transformers does after `enable_input_require_grads`: handles cannot be copied, and need not be."""

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.handles = [self.inner.register_forward_hook(lambda module, args, output: output * 2)]

        def forward(self, x):
            self.handles.append(None)
            return self.inner(x)

    net = Kept().double()
    model, x = pf.functionalize(net), torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(model(model.params, x), net(x))
    assert torch.equal(model.train()(model.params, x), net(x))
    assert len(model._skeleton.root.handles) == 1
