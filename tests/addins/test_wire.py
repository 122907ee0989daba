"""The tutorial of ZhiJian, line by line, against plain PyTorch with hooks."""

import functools
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.zoo import ZOO, randn

SIZE, HIDDEN, CLASSES = 4, 6, 3


class MLP(nn.Module):
    """The tutorial's model, on smaller images."""

    def __init__(self, args, num_classes):
        super().__init__()
        self.args = args
        self.image_size = SIZE
        self.fc1 = nn.Linear(self.image_size * self.image_size * 3, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.fc3 = nn.Linear(HIDDEN, num_classes)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = self.fc1(x)
        x = nn.ReLU()(x)
        x = self.fc2(x)
        x = nn.ReLU()(x)
        x = self.fc3(x)
        return x  # noqa: RET504 (as in the document)


class MLPAddin(pf.AddinBase):
    """The tutorial's add-in."""

    def __init__(self, config, model_config):
        super().__init__()
        self.config = config
        self.embed_dim = model_config.hidden_size
        self.reduction_dim = 2
        self.fc1 = nn.Linear(self.embed_dim, self.reduction_dim)
        if config.mlp_addin_output_size is not None:
            self.fc2 = nn.Linear(self.reduction_dim, config.mlp_addin_output_size)
        else:
            self.fc2 = nn.Linear(self.reduction_dim, self.embed_dim)

    def forward(self, x):
        identity = x
        out = self.fc1(identity)
        out = nn.ReLU()(out)
        out = self.fc2(out)
        return out  # noqa: RET504

    def adapt_input(self, module, inputs):
        x = inputs[0]
        return self.forward(x)

    def adapt_output(self, module, inputs, outputs):
        return self.forward(outputs)

    def adapt_across_input(self, module, inputs):
        x = inputs[0]
        x = x + self.forward(self.inputs_cache)
        return x  # noqa: RET504

    def adapt_across_output(self, module, inputs, outputs):
        outputs = outputs + self.forward(self.inputs_cache)
        return outputs  # noqa: RET504


CONFIG = types.SimpleNamespace(mlp_addin_output_size=HIDDEN)
MODEL_CONFIG = types.SimpleNamespace(hidden_size=HIDDEN)


def make_addin():
    return MLPAddin(CONFIG, MODEL_CONFIG)


# What the document says of each line, as torch hooks: (side, module, function of the state dict, what was kept).
def bottleneck(p, x):
    return torch.relu(x @ p["fc1.weight"].T + p["fc1.bias"]) @ p["fc2.weight"].T + p["fc2.bias"]


def keep_input(keep, p, module, inputs):
    keep["x"] = inputs[0]


def keep_output(keep, p, module, inputs, output):
    keep["x"] = output


def insert_before(keep, p, module, inputs):
    return bottleneck(p, inputs[0])


def insert_after(keep, p, module, inputs, output):
    return bottleneck(p, output)


def add_before(keep, p, module, inputs):
    return inputs[0] + bottleneck(p, keep["x"])


def add_after(keep, p, module, inputs, output):
    return output + bottleneck(p, keep["x"])


TUTORIAL = {
    "(MLPAddin.adapt_input): ...->{inout1}(fc2)->...": [("pre", "fc2", insert_before)],
    "(MLPAddin.adapt_output): ...->(fc2){inout1}->...": [("post", "fc2", insert_after)],
    "(MLPAddin.adapt_across_input): ...->(fc1){in1}->...->{out1}(fc3)->...": [
        ("post", "fc1", keep_output), ("pre", "fc3", add_before),
    ],
    # The six of the document's menu; the last three name no out.
    "(MLPAddin.adapt_output): ...->(fc1){inout1}->...": [("post", "fc1", insert_after)],
    "(MLPAddin.adapt_across_input): ...->{in1}(fc2)->{out1}(fc3)->...": [
        ("pre", "fc2", keep_input), ("pre", "fc3", add_before),
    ],
    "(MLPAddin.adapt_across_input): ...->(fc1){in1}->...->{in2}(fc3)->...": [
        ("post", "fc1", keep_output), ("pre", "fc3", add_before),
    ],
    "(MLPAddin.adapt_across_output): ...->{in1}(fc2){in2}->...": [
        ("pre", "fc2", keep_input), ("post", "fc2", add_after),
    ],
    "(MLPAddin.adapt_across_output): ...->(fc1){in1}->(fc2){in2}->...": [
        ("post", "fc1", keep_output), ("post", "fc2", add_after),
    ],
}  # fmt: skip


def hooked(net, params, hooks, x):
    """Run a net with torch's hooks on it."""
    keep, handles = {}, []
    for side, path, function in hooks:
        module = net.get_submodule(path)
        register = module.register_forward_pre_hook if side == "pre" else module.register_forward_hook
        handles.append(register(functools.partial(function, keep, params)))
    try:
        return net(x)
    finally:
        for handle in handles:
            handle.remove()


def mlp():
    return MLP(types.SimpleNamespace(), CLASSES).double()


def check(text, hooks):
    net = mlp()
    model, x = pf.functionalize(net), randn(5, 3, SIZE, SIZE)
    adapter = pf.bind(pf.wire(text, MLPAddin=make_addin), model)
    frozen, trainable = adapter.init(0)
    ((place, leaves),) = trainable["wire"]["MLPAddin"].items()
    assert place == next(path for _, path, f in reversed(hooks) if f not in (keep_input, keep_output))
    assert list(leaves) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    copies = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    mine = model(adapter.apply(frozen, trainable), x)
    plain = hooked(net, copies, hooks, x)
    assert torch.allclose(mine, plain, atol=1e-12)
    assert not torch.allclose(mine, net(x), atol=1e-3)
    mine.square().sum().backward()
    plain.square().sum().backward()
    for name, leaf in leaves.items():
        assert torch.allclose(leaf.grad, copies[name].grad, atol=1e-10)
    return adapter


@pytest.mark.parametrize("text", TUTORIAL)
def test_the_lines_of_the_tutorial(text):
    check(text, TUTORIAL[text])


def test_the_record_that_the_tutorial_prints():
    """The document's dump of its arguments holds the record of the fifth example."""
    record = {
        "hook": [["get_pre", "pre"], ["adapt_across_output", "post"]],
        "location": [["fc2"], ["fc2"]],
        "name": "MLPAddin",
    }
    text = "(MLPAddin.adapt_across_output): ...->{in1}(fc2){in2}->..."
    wires = pf.wire([record], MLPAddin=make_addin)
    assert wires.records == [record]
    assert wires.wires == pf.wire(text, MLPAddin=make_addin).wires
    check([record], TUTORIAL[text])
    check({"addins": [record]}, TUTORIAL[text])


@pytest.mark.parametrize("line", ["input->(fc1)->(fc2)->{inout1}(fc3)->output", "...->{inout1} ( fc3 ) -> ..."])
def test_the_notation_of_the_tutorial(line):
    check(f"(MLPAddin.adapt_input): {line}", [("pre", "fc3", insert_before)])


def test_the_class_as_it_stands_needs_a_factory():
    with pytest.raises(pf.OptionError, match=r"MLPAddin needs config, model_config, .*lambda place: MLPAddin\("):
        pf.wire("(MLPAddin.adapt_input): {inout1}(fc2)", MLPAddin=MLPAddin)
    bound = functools.partial(MLPAddin, CONFIG, MODEL_CONFIG)
    pf.bind(pf.wire("(MLPAddin.adapt_input): {inout1}(fc2)", MLPAddin=bound), pf.functionalize(mlp()))
    instance = make_addin().double()
    adapter = pf.bind(pf.wire("(M.adapt_input): {inout1}(fc2)", M=instance), pf.functionalize(mlp()))
    assert torch.equal(adapter.init(0)[1]["wire"]["M"]["fc2"]["fc1.weight"], instance.fc1.weight)


def test_nothing_is_kept_between_calls():
    made = []

    def make():
        made.append(make_addin())
        return made[-1]

    net = mlp()
    model = pf.functionalize(net)
    text = "(A.adapt_across_input): ...->(fc1){in1}->...->{out1}(fc3)->..."
    adapter = pf.bind(pf.wire(text, A=make), model)
    frozen, trainable = adapter.init(0)
    model(adapter.apply(frozen, trainable), randn(2, 3, SIZE, SIZE))
    assert made
    assert all(addin.inputs_cache is None for addin in made)
    compiled = torch.compile(lambda tree, x: model(adapter.apply(frozen, tree), x), fullgraph=True, backend="aot_eager")
    x = randn(2, 3, SIZE, SIZE)
    assert torch.allclose(compiled(trainable, x), model(adapter.apply(frozen, trainable), x))
    assert all(addin.inputs_cache is None for addin in made)
    for around in adapter.surroundings(trainable):
        for hook in around.function.args[0]:
            for mode in (True, False):
                functional = hook.functional.in_mode(mode)
                roots = (functional._skeleton.root, functional._traced.root)
                assert all(root.addin.inputs_cache is None for root in roots)


def test_several_hooks_at_one_module_run_in_the_order_of_torch():
    net, x = mlp(), randn(5, 3, SIZE, SIZE)
    model = pf.functionalize(net)
    text = (
        "(MLPAddin.adapt_input): {inout1}(fc2), (MLPAddin.adapt_across_input): (fc1){in1}->{out1}(fc2),"
        "(MLPAddin.adapt_output): (fc2){inout1}, (MLPAddin.adapt_across_output): {in1}(fc2){out1}"
    )
    adapter = pf.bind(pf.wire(text, MLPAddin=make_addin), model)
    frozen, trainable = adapter.init(3)
    trees = trainable["wire"]["MLPAddin"]
    assert list(trees) == ["fc2", "fc2#2", "fc2#3", "fc2#4"]
    a, b, c, d = trees.values()
    handles, kept, other = [], {}, {}
    for side, path, function, keep, p in [
        ("pre", "fc2", insert_before, {}, a),
        ("post", "fc1", keep_output, kept, b),
        ("pre", "fc2", add_before, kept, b),
        ("post", "fc2", insert_after, {}, c),
        ("pre", "fc2", keep_input, other, d),
        ("post", "fc2", add_after, other, d),
    ]:
        module = net.get_submodule(path)
        register = module.register_forward_pre_hook if side == "pre" else module.register_forward_hook
        handles.append(register(functools.partial(function, keep, p)))
    assert torch.allclose(model(adapter.apply(frozen, trainable), x), net(x), atol=1e-12)


def test_pairs_of_one_expression_share_the_add_in_and_not_the_note():
    net, x = mlp(), randn(5, 3, SIZE, SIZE)
    model = pf.functionalize(net)
    crossing = "(M.adapt_across_input): (fc1){in1}->{in2}(fc2)->(fc2){out2.adapt_across_output}->{out1}(fc3)"
    adapter = pf.bind(pf.wire(crossing, M=make_addin), model)
    frozen, trainable = adapter.init(0)
    (p,) = trainable["wire"]["M"].values()
    one = net.fc1(x.flatten(1))
    middle = torch.relu(one)
    two = net.fc2(middle) + bottleneck(p, middle)
    assert torch.allclose(
        model(adapter.apply(frozen, trainable), x), net.fc3(torch.relu(two) + bottleneck(p, one)), atol=1e-12
    )


class Deep(nn.Module):
    """VPT-deep's shape of use: one shared add-in at many places, on a plain nn.Module."""

    def __init__(self, width, bias=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.full((width,), bias))

    def adapt(self, module, inputs):
        return inputs[0] + self.shift


def test_one_record_with_several_locations_shares_its_parameters():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).double()
    model, x = pf.functionalize(net), randn(2, 4)
    record = {"name": "Deep", "location": [[1], [2]], "hook": [["adapt", "pre"]], "kwargs": {"width": 4, "bias": 0.5}}
    wires = pf.wire(record, Deep=Deep)
    assert str(wires) == "(Deep(width=4, bias=0.5).adapt): ...->{inout1}([1])->...->{inout2}([2])->..."
    adapter = pf.bind(wires, model)
    frozen, trainable = adapter.init(0)
    assert trainable == {"wire": {"Deep": {"1": {"shift": trainable["wire"]["Deep"]["1"]["shift"]}}}}
    assert torch.equal(model(adapter.apply(frozen, trainable), x), net[2](net[1](net[0](x) + 0.5) + 0.5))
    # A range gives each copy its own.
    own = pf.bind(pf.wire("(Deep(width=4).adapt): {inout1}([1:3])", Deep=Deep), model)
    assert list(own.init(0)[1]["wire"]["Deep"]) == ["1", "2"]


class Parallel(nn.Module):
    """AdaptFormer's parallel form: a hook of the class's own notes, and `add_post` of the base adds."""

    def __init__(self, place):
        super().__init__()
        self.down = nn.Linear(place.module.in_features, place.module.in_features)

    def adapt(self, module, inputs):
        self.inputs_cache = self.down(inputs[0])


def test_a_method_may_note_by_itself():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).double()
    model, x = pf.functionalize(net), randn(2, 4)
    record = {"name": "P", "location": ["1", "2"], "hook": [["adapt", "pre"], ["add_post", "post"]]}
    adapter = pf.bind(pf.wire([record], P=Parallel), model)
    frozen, trainable = adapter.init(0)
    p = trainable["wire"]["P"]["1"]
    middle = net[0](x)
    expected = net[2](net[1](middle)) + nn.functional.linear(middle, p["down.weight"], p["down.bias"])
    assert torch.allclose(model(adapter.apply(frozen, trainable), x), expected, atol=1e-12)
    bare = pf.bind(pf.wire("(P.add_post): (1){inout1}", P=Parallel), model)
    with pytest.raises(pf.AddinError, match="has noted nothing"):
        model(bare.apply(*bare.init(0)), x)


def test_every_hook_of_the_base_class():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).double()
    model, x = pf.functionalize(net), randn(2, 4)
    (a, b, c) = net
    for text, expected in [
        ("(B.add_pre): {in1}(0)->{out1}(2)", lambda: c(b(a(x)) + x)),
        ("(B.add_pre): (0){in1}->{out1}(2)", lambda: c(b(a(x)) + a(x))),
        ("(B.add_post): {in1}(1){out1}", lambda: c(b(a(x)) + a(x))),
        ("(B.add_post): (0){in1}->(2){out1}", lambda: c(b(a(x))) + a(x)),
        ("(B.add_post): {in1}(0)->(1){out1}->(2){out1}", lambda: c(b(a(x)) + x) + x),
    ]:
        adapter = pf.bind(pf.wire(text, B=pf.AddinBase), model)
        frozen, trainable = adapter.init(0)
        assert not trainable["wire"]
        assert torch.allclose(model(adapter.apply(frozen, trainable), x), expected(), atol=1e-12)


class Kinds(pf.AddinBase):
    def nothing(self, module, inputs):
        return None

    def both(self, module, inputs):
        return tuple(2 * value for value in inputs)

    def first(self, module, inputs):
        return 3 * inputs[0]

    def whole(self, module, inputs, outputs):
        return (outputs, len(inputs))

    def typed(self, module, inputs):
        assert isinstance(module, nn.Bilinear)
        return module.weight.sum() + inputs[0]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("nothing", lambda net, x, y: net(x, y)),
        ("both", lambda net, x, y: net(2 * x, 2 * y)),
        ("first", lambda net, x, y: net(3 * x, y)),
        ("typed", lambda net, x, y: net(net.weight.sum() + x, y)),
    ],
)
def test_what_a_method_may_return(method, expected):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Bilinear(3, 4, 2)

        def forward(self, x, y):
            return self.mix(x, y)

    net, x, y = Two().double(), randn(5, 3), randn(5, 4, seed=1)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.wire(f"(K.{method}): {{inout1}}(mix)", K=Kinds), model)
    assert torch.allclose(model(adapter.apply(*adapter.init(0)), x, y), expected(net.mix, x, y))
    after = pf.bind(pf.wire("(K.whole): (mix){inout1}", K=Kinds), model)
    assert model(after.apply(*after.init(0)), x, y)[1] == 2


def test_modules_that_are_called_with_keywords_or_return_tuples():
    animal = ZOO["bert"]
    net = animal.build()
    model = pf.functionalize(net)
    args, _ = animal.inputs(0)
    text = "(B.add_post): {in1}(bert.encoder.layer[0:2].attention)->(bert.encoder.layer[0:2].attention.self){out1}"
    adapter = pf.bind(pf.wire(text, B=pf.AddinBase), model)
    mine = model(adapter.apply(*adapter.init(0)), *args).logits
    kept = {}
    for number in (0, 1):
        attention = net.bert.encoder.layer[number].attention

        def keep(module, args, kwargs, number=number):
            kept[number] = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))

        def add(module, args, out, number=number):
            return (out[0] + kept[number], *out[1:])

        attention.register_forward_pre_hook(keep, with_kwargs=True)
        attention.self.register_forward_hook(add)
    assert torch.allclose(mine, net(*args).logits, atol=1e-12)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(input=x)


def test_a_module_that_is_called_with_keywords_only():
    net, x = Keyword().double(), randn(2, 4)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.wire("(K.first): {inout1}(inner)", K=Kinds), model)
    assert torch.allclose(model(adapter.apply(*adapter.init(0)), x), net.inner(3 * x))


def test_an_add_in_that_gives_before_it_takes():
    model = pf.functionalize(mlp())
    adapter = pf.bind(pf.wire("(M.add_pre): (fc3){in1}->{out1}(fc2)", M=pf.AddinBase), model)
    with pytest.raises(pf.AddinError, match=r"'fc2' runs before 'fc3', from which it takes"):
        model(adapter.apply(*adapter.init(0)), randn(2, 3, SIZE, SIZE))


def test_two_wirings_of_one_name_in_named_chains_are_kept_apart():
    net, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).double(), randn(2, 4)
    model, (a, b, c) = pf.functionalize(net), net
    doubled = pf.wire("(K.first): {inout1}(0), (B.add_pre): {in1}(0)->{out1}(2)", K=Kinds, B=pf.AddinBase)
    same = pf.wire("(K.first): {inout1}(0), (B.add_pre): {in1}(0)->{out1}(2)", K=Kinds, B=pf.AddinBase)
    adapter = pf.bind(pf.chain(pf.chain(doubled, name="one"), pf.chain(same, name="two")), model)
    # The second is around the first: it sees 3x, and the first 9x.
    expected = c(b(a(9 * x)) + 3 * x + 9 * x)
    assert torch.allclose(model(adapter.apply(*adapter.init(0)), x), expected, atol=1e-12)


def test_first_values_depend_on_the_key_and_the_place_only():
    model = pf.functionalize(mlp())
    one = pf.bind(pf.wire("(M.adapt_input): {inout1}(fc3)", M=make_addin), model)
    two = pf.bind(pf.wire("(M.adapt_input): {inout1}(fc2), (M.adapt_input): {inout1}(fc3)", M=make_addin), model)
    state = torch.get_rng_state()
    first, second = one.init(5)[1]["wire"]["M"]["fc3"], two.init(5)[1]["wire"]["M"]
    assert all(torch.equal(first[name], second["fc3"][name]) for name in first)
    assert not torch.equal(first["fc1.weight"], second["fc2"]["fc1.weight"])
    assert torch.equal(state, torch.get_rng_state())


def test_shared_modules_and_negative_indices_are_found():
    animal = ZOO["shared"]
    model = pf.functionalize(animal.build())
    for path in ("inner[0]", "inner.0", "blocks[2][0]", "blocks[-1][-2]", "blocks.0.0"):
        assert pf.bind(pf.wire(f"(K.first): {{inout1}}({path})", K=Kinds), model).parts[0].modules == ("inner.0",)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fc4", r"column 21: no module \(fc4\): the model has no module 'fc4'. The nearest names: fc"),
        ("fc1.weight", r"\(fc1\) has no module 'weight'"),
        ("fc1[0]", r"\(fc1\) has no module 0"),
        ("blocks[3]", r"\(blocks\) has 2 numbered modules; expected an index from -2 to 1"),
        ("blocks[-3]", r"\(blocks\) has 2 numbered modules; expected an index from -2 to 1"),
        ("blocks[0].atn", r"\(blocks\.0\) has no module 'atn'.*blocks\.0\.attn"),
    ],
)
def test_modules_that_do_not_exist(path, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(2, 2), nn.Linear(2, 2)
            self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(2, 2)}) for _ in range(2))

    model = pf.functionalize(Net())
    with pytest.raises(pf.SelectorError, match=message) as error:
        pf.bind(pf.wire(f"(K.first): {{inout1}}({path})", K=Kinds), model)
    assert str(error.value).splitlines()[-1].index("^") == 21 - 1
    with pytest.raises(pf.SelectorError, match=message.replace("column 21", "column 13")):  # only passed through
        pf.bind(pf.wire(f"(K.first): ({path})->{{inout1}}(fc1)", K=Kinds), model)
    with pytest.raises(pf.SelectorError, match="record 0, hook 0: no module"):
        pf.bind(pf.wire({"name": "K", "location": [path], "hook": [["first", "pre"]]}, K=Kinds), model)


@pytest.mark.parametrize(
    ("factories", "message"),
    [
        ({}, r"column 2: no add-in 'K'; none is given. Give it as pf.wire\(..., K=its class\)"),
        ({"Kk": Kinds, "Z": Kinds}, r"no add-in 'K'; the nearest given: Kk"),
        ({"K": Kinds, "L": Kinds}, "L is wired nowhere; the wiring names K"),
        ({"K": 3}, "K is a int; give an nn.Module class"),
        ({"K": dict}, "the class dict is no nn.Module"),
        ({"K": nn.Identity}, r"column 13: K has no method 'first'; the nearest: "),
    ],
)
def test_factories(factories, message):
    with pytest.raises(pf.OptionError, match=message):
        pf.wire("(K.first): {inout1}(fc1)", **factories)


@pytest.mark.parametrize(
    ("text", "factories", "message"),
    [
        ("(K.frist): (fc1)->{inout1}(fc2)", {"K": Kinds}, r"column 20: K has no method 'frist'; the nearest: first"),
        ("(K.first): (fc1){inout1}", {"K": Kinds}, r"on the way out of \(fc1\).*\(module, inputs, outputs\); it takes"),
        ("(K.whole): {inout1}(fc1)", {"K": Kinds}, r"on the way into \(fc1\).*with \(module, inputs\)"),
        ("(K(dim=1).first): {inout1}(fc1)", {"K": Kinds}, "unexpected keyword argument 'dim'"),
        ("(K(dim=1).first): {inout1}(fc1)", {"K": Kinds()}, "takes no keywords"),
    ],
)
def test_methods_and_keywords(text, factories, message):
    with pytest.raises(pf.OptionError, match=message):
        pf.wire(text, **factories)


def test_what_a_function_makes_is_checked_when_it_is_bound():
    model = pf.functionalize(mlp())
    for factory, message in [(lambda: 3, "K made a int at 'fc1'"), (lambda: nn.Identity(), "K has no method 'first'")]:
        with pytest.raises(pf.OptionError, match=message):
            pf.bind(pf.wire("(K.first): {inout1}(fc1)", K=factory), model)


def test_a_wiring_says_what_it_is():
    wires = pf.wire("(K.first): {inout1}(fc1)", K=Kinds)
    assert repr(wires) == "Wiring('(K.first): ...->{inout1}(fc1)->...', name='wire')"
    assert isinstance(wires, pf.Wiring)
    with pytest.raises(pf.OptionError, match="word without dots"):
        pf.wire("(K.first): {inout1}(fc1)", K=Kinds, name="a.b")


@given(st.lists(st.sampled_from(["in", "out"]), min_size=2, max_size=6), st.integers(0, 99))
def test_random_sums_across(kinds, seed):
    """Any places of a deep net, in the order of the run: what enters one is added at those behind it."""
    count = len(kinds)
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(count)]).double()
    model, x = pf.functionalize(net), randn(2, 3, seed=seed)
    kinds = ["in", *kinds[1:-1], "out"]
    words, number = [], 0
    for i, kind in enumerate(kinds):
        number += kind == "in"
        words.append(f"{{{kind}{number}}}({i})")
    used = {word.partition("}")[0][4:] for word in words if word.startswith("{out")}
    words = [word for word in words if word.startswith("{out") or word.partition("}")[0][3:] in used]
    adapter = pf.bind(pf.wire(f"(B.add_pre): {'->'.join(words)}", B=pf.AddinBase), model)
    h, note = x, None
    for i, layer in enumerate(net):
        if kinds[i] == "in":
            note = h
        else:
            h = h + note
        h = layer(h)
    assert torch.allclose(model(adapter.apply(*adapter.init(0)), x), h, atol=1e-12)
