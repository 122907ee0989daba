"""Edits of representations against forward hooks on the plain net, position by position."""

import pytest
import torch
from torch import nn

import peft_func as pf
from peft_func.addins.reft import orthonormal
from tests.zoo import ZOO, ids, randn

METHODS = {"loreft": pf.loreft, "noreft": pf.noreft, "direft": pf.direft}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer", "vit": "vit.layers"}


def edit(kind, tree, h):
    """The paper's formulas for one vector; the basis by Gram and Schmidt."""
    if kind == "direft":
        return h + tree["W2"].T @ (tree["W1"] @ h + tree["b"])
    if kind == "noreft":
        return h + tree["W2"].T @ (tree["W1"] @ h + tree["b"] - tree["W2"] @ h)
    basis = []
    for row in tree["R"]:
        for other in basis:
            row = row - (row @ other) * other
        basis.append(row / row.norm())
    rotation = torch.stack(basis)
    return h + rotation.T @ (tree["W"] @ h + tree["b"] - rotation @ h)


def first_and_last(first, last, there):
    """Where pyreft intervenes on a sequence, with its padding."""
    tokens = [i for i, real in enumerate(there) if real]
    half = len(tokens) // 2
    return tokens[: min(first, half)], tokens[len(tokens) - min(last, half) :]


def hooked(net, kind, trees, places_of):
    """Put the edit at every position on the outputs of modules, the slow and plain way."""

    def hook(tree):
        def change(module, args, output):
            h = output if torch.is_tensor(output) else output[0]
            new = h.clone()
            for sample in range(len(h)):
                for group, positions in places_of(sample).items():
                    for position in positions:
                        own = tree if group is None else tree[group]
                        new[sample, position] = edit(kind, own, h[sample, position])
            return new if torch.is_tensor(output) else (new, *output[1:])

        return change

    return [net.get_submodule(path).register_forward_hook(hook(tree)) for path, tree in trees.items()]


def away(tree):
    return pf.map_leaves(lambda leaf: leaf + 0.3 * randn(*leaf.shape, seed=leaf.numel()), tree)


def compare(animal, method, kind, places_of, args=None, **kwargs):
    net = ZOO[animal].build()
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(3)
    tree = away(tree)
    args = ZOO[animal].inputs(0)[0] if args is None else args
    plain = net(*args, **{name: value for name, value in kwargs.items() if name != "prompt_mask"}).logits
    y = model(adapter.apply(frozen, tree), *args, **kwargs).logits
    handles = hooked(net, kind, tree[kind], places_of)
    expected = net(*args, **{name: value for name, value in kwargs.items() if name != "prompt_mask"}).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(y, expected, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(y, plain, atol=1e-6)
    return tree[kind]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("animal", ["llama", "gpt2", "bert", "vit"])
def test_all_blocks_of_real_nets(animal, kind):
    method = METHODS[kind](pf.blocks(), rank=2, positions="f2+l1")
    tree = compare(animal, method, kind, lambda sample: {None: [0, 1, 4]})
    assert list(tree) == [f"{BLOCKS[animal]}.{i}" for i in (0, 1)]


SIDES = {
    "right": [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]],
    "left": [[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]],
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("animal", ["llama", "bert"])
def test_padding_is_passed_over(animal, tied, side):
    mask = torch.tensor(SIDES[side])
    method = pf.loreft(pf.blocks(), rank=3, positions="f2+l3", tied=tied)

    def places_of(sample):
        first, last = first_and_last(2, 3, mask[sample])
        return {None: first + last} if tied else {"first": first, "last": last}

    compare(animal, method, "loreft", places_of, (ids(2, 7, high=32),), attention_mask=mask)
    positional = pf.direft(pf.blocks(), rank=3, positions="f2+l3", tied=tied)
    compare(animal, positional, "direft", places_of, (ids(2, 7, high=32), mask))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("1:3", [1, 2]),
        ("-2:", [3, 4]),
        (":-3", [0, 1]),
        (slice(1, None), [1, 2, 3, 4]),
        ([0, -1], [0, 4]),
        ((2,), [2]),
        ("l2", [3, 4]),
        ("f9", [0, 1]),
        (lambda rank, count: rank % 2 == count % 2, [1, 3]),
    ],
)
def test_positions(positions, expected):
    compare("bert", pf.noreft(pf.blocks(), positions=positions), "noreft", lambda sample: {None: expected})


@pytest.mark.parametrize("animal", ["llama", "bert"])
def test_a_mask_of_its_own_says_where_the_prompt_is(animal):
    prompt = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    whole = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    method = pf.loreft(pf.blocks(), positions="l2", mask="prompt_mask")

    def places_of(sample):
        return {None: first_and_last(0, 2, prompt[sample])[1]}

    compare(animal, method, "loreft", places_of, (ids(2, 7, high=32),), attention_mask=whole, prompt_mask=prompt)

    def all_of_it(sample):
        return {None: first_and_last(0, 2, whole[sample])[1]}

    compare(animal, method, "loreft", all_of_it, (ids(2, 7, high=32),), attention_mask=whole)


def test_generation_edits_the_prompt_only():
    net = ZOO["llama"].build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.loreft(pf.blocks(), rank=2, positions="f1+l1"), model)
    frozen, tree = adapter.init(0)
    tree = away(tree)
    prompt = ids(2, 5, high=32)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    weights = adapter.apply(frozen, tree)
    cached = model.method("generate")(weights, prompt, attention_mask=mask, use_cache=True, **options)

    def places_of(sample):
        first, last = first_and_last(1, 1, mask[sample])
        return {None: first + last}

    tokens, whole = prompt, mask
    hooked(net, "loreft", tree["loreft"], places_of)
    for _ in range(5):
        position_ids = (whole.cumsum(1) - 1).clamp(min=0)
        logits = net(tokens, attention_mask=whole, position_ids=position_ids).logits
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
        whole = torch.cat([whole, whole.new_ones(2, 1)], 1)
    assert torch.equal(cached, tokens)


def test_the_basis_stays_orthonormal():
    rows = 5 * randn(3, 8)
    basis = orthonormal(rows)
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(orthonormal(basis), basis, atol=1e-14)
    start = pf.bind(pf.loreft(pf.blocks(), rank=3), pf.functionalize(ZOO["bert"].build())).init(0)[1]
    for tree in start["loreft"].values():
        assert torch.allclose(tree["R"] @ tree["R"].T, torch.eye(3, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_training_learns(kind):
    model = pf.functionalize(ZOO["vit"].build())
    adapter = pf.bind(METHODS[kind](pf.blocks(), rank=2, positions="f1+l1", tied=False, init="identity"), model)
    frozen, tree = adapter.init(0)
    x, labels = randn(8, 1, 8, 8), torch.arange(8) % 3
    start = None
    for _ in range(30):
        tree = pf.map_leaves(lambda leaf: leaf.detach().requires_grad_(), tree)
        loss = nn.functional.cross_entropy(model(adapter.apply(frozen, tree), x).logits, labels)
        start = loss.item() if start is None else start
        loss.backward()
        tree = pf.map_leaves(lambda leaf: leaf.detach() - 0.5 * leaf.grad, tree)
    assert loss.item() < start - 0.01


def test_dropout_drops_in_train_mode_only():
    model = pf.functionalize(ZOO["bert"].build())
    adapter = pf.bind(pf.loreft(pf.blocks(1), positions="f1", dropout=0.5, init="identity"), model)
    frozen, tree = adapter.init(0)
    x = ids(2, 5, high=32)
    weights = adapter.apply(frozen, tree)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = [model.train()(weights, x).logits for _ in range(2)]
    assert not torch.allclose(*seen)
    assert torch.allclose(model(weights, x).logits, ZOO["bert"].build()(x).logits, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_hugging_face_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        net = ZOO["llama"].build().train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        model = pf.functionalize(net)
        adapter = pf.bind(pf.loreft(pf.blocks(), rank=2, positions="f2+l1"), model)
        frozen, tree = adapter.init(0)
        tree = pf.map_leaves(lambda leaf: leaf.requires_grad_(), tree)
        mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
        model(adapter.apply(frozen, tree), ids(2, 5, high=32), attention_mask=mask).logits.square().sum().backward()
        grads.append([leaf.grad for block in tree["loreft"].values() for leaf in block.values()])
    first, second = grads
    assert all(map(torch.allclose, first, second))
    assert all(grad.abs().sum() > 0 for grad in first)


def test_functions_as_positions_are_the_users_own(tmp_path):
    method = pf.loreft(pf.blocks(), positions=even)
    model = pf.functionalize(ZOO["bert"].build())
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    pf.save(tmp_path / "own.safetensors", adapter, tree)
    with pytest.raises(pf.OptionError, match="method="):
        pf.load(tmp_path / "own.safetensors", model)
    again, frozen, loaded = pf.load(tmp_path / "own.safetensors", model, method=method)
    x = ids(2, 5, high=32)
    assert torch.equal(model(again.apply(frozen, loaded), x).logits, model(adapter.apply(frozen, tree), x).logits)


def even(rank, count):
    return rank % 2 == 0


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "f0"}, {"positions": "f1l1"}, {"positions": "l1+f1"}, {"positions": ""}, {"positions": []},
        {"positions": [1.5]}, {"positions": 3}, {"positions": slice(0, 8, 2)}, {"positions": "1:2:3"},
        {"positions": "f1+"}, {"rank": 0}, {"rank": 17}, {"rank": True}, {"dropout": 1.0}, {"init": "zero"},
        {"mask": "not a name"}, {"tied": "no"},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(pf.OptionError, match="loreft"):
        pf.bind(pf.loreft(pf.blocks(), **options), pf.functionalize(ZOO["bert"].build()))


def test_bad_places_and_calls():
    mlp = pf.functionalize(ZOO["mlp"].build())
    adapter = pf.bind(pf.loreft("0", positions="f1"), mlp)
    with pytest.raises(pf.AddinError, match="positions='all'"):
        mlp(adapter.apply(*adapter.init(0)), randn(4, 5))
    with pytest.raises(pf.OptionError, match="width="):
        pf.bind(pf.loreft("1"), mlp)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(pf.OptionError, match="batch_first=True"):
        pf.bind(pf.loreft(pf.blocks()), pf.functionalize(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)))
    bert = pf.functionalize(ZOO["bert"].build())
    adapter = pf.bind(pf.loreft(pf.blocks(), positions="f1"), bert)
    weights = adapter.apply(*adapter.init(0))
    with pytest.raises(pf.AddinError, match="4 dimensions"):
        bert(weights, ids(2, 5, high=32), attention_mask=torch.ones(2, 1, 5, 5))
    other = pf.bind(pf.loreft(pf.blocks(), positions="f1", mask="own"), bert)
    weights = other.apply(*other.init(0))
    with pytest.raises(pf.AddinError, match="own is for 4"):
        bert(weights, ids(2, 5, high=32), own=torch.ones(2, 4))
    llama = pf.functionalize(ZOO["llama"].build())
    adapter = pf.bind(pf.loreft(["down_proj"], width=8, positions="f1"), llama)
    with pytest.raises(pf.AddinError, match="width=16"):
        llama(adapter.apply(*adapter.init(0)), ids(2, 5, high=32))
