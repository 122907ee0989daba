"""Folders in HF PEFT's format, against the PEFT that is installed: it saves and we load, we save and it loads."""

import contextlib
import copy
import json
import re
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from tests.transforms.peer import KNOWN_WARNINGS
from tests.zoo import Tied, gpt2, ids, llama, logits, randn, seeded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ONE_FLAG = "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"  # one flag for all layers


class Mixed(nn.Module):
    """Every kind of module that the format holds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=1)
        self.one = nn.Conv1d(6, 6, 3, padding=1)
        self.two = nn.Conv2d(1, 4, (3, 2), stride=2, padding=(1, 1))
        self.three = nn.Conv3d(1, 2, 2)
        self.plain = Conv1D(8, 6)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.one(h.mT).mT
        h = (
            h
            + self.two(h[:, None]).mean((1, 2, 3))[:, None, None]
            + self.three(h[:, None, None].repeat(1, 1, 2, 1, 1)).mean()
        )
        return self.head(self.norm(self.body(self.plain(h))))


MIXED = ["embed", "one", "two", "three", "plain", "body.0", "body.2"]


def mixed():
    return seeded(Mixed)()


X = ids(2, 7, high=11)


def peer(net, config, dtype=torch.float64):
    """A PEFT model around a copy, with random values in all that trains."""
    with warnings.catch_warnings():
        for message in (*KNOWN_WARNINGS, "LoRA adapter added to ConvNd", ONE_FLAG):
            warnings.filterwarnings("ignore", message=message)
        model = peft.get_peft_model(copy.deepcopy(net), config).eval()
    for name, param in model.named_parameters():
        if ".lora_" in name:
            param.data = (torch.randn_like(param, dtype=torch.float64) / 2).to(dtype)
        elif param.requires_grad:
            param.data += torch.randn_like(param) / 3
    return model


def save_of(model, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not identify embedding|Setting `save_embedding_layers`")
        model.save_pretrained(folder)
    return folder


def config(**options):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options})


def reload(net, folder):
    """What PEFT makes of a folder; any warning is an error."""
    with warnings.catch_warnings():
        for message in (ONE_FLAG, "`is_gradient_checkpointing` is deprecated"):
            warnings.filterwarnings("ignore", message=message)
        return peft.PeftModel.from_pretrained(copy.deepcopy(net), folder, autocast_adapter_dtype=False).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def read(path):
    return json.loads((path / CONFIG).read_text())


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def edit(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(read(folder) | fields))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def round_trip(net, conf, folder, call, *, extra=None):
    """PEFT saves; we load with its outputs; we save the same bytes and the same config; PEFT loads what we wrote."""
    theirs = peer(net, conf)
    save_of(theirs, folder / "theirs")
    model = pf.functionalize(net)
    adapter, frozen, tree = pf.load_peft(folder / "theirs", model)
    expected = call(theirs)
    close(call(lambda *a, **k: model(adapter.apply(frozen, tree), *a, **k)), expected)
    given = pf.peft_config(folder / "theirs")
    pf.save_peft(folder / "same", adapter, tree, config=given)
    assert (folder / "same" / WEIGHTS).read_bytes() == (folder / "theirs" / WEIGHTS).read_bytes()
    assert (folder / "same" / CONFIG).read_bytes() == (folder / "theirs" / CONFIG).read_bytes()
    pf.save_peft(folder / "own", adapter, tree)
    assert (folder / "own" / WEIGHTS).read_bytes() == (folder / "theirs" / WEIGHTS).read_bytes()
    again = reload(net, folder / "own")
    close(call(again), expected)
    reread, frozen, same = pf.load_peft(folder / "own", model)
    assert {k: t.tolist() for k, t in pf.leaves(same)} == {k: t.tolist() for k, t in pf.leaves(tree)}
    close(call(lambda *a, **k: model(reread.apply(frozen, same), *a, **k)), expected)
    return adapter, tree


def on_mixed(f):
    return f(X)


OPTIONS = {
    "all kinds": {"target_modules": MIXED},
    "rslora": {"target_modules": MIXED, "use_rslora": True},
    "a regex": {"target_modules": r"(embed|body\.[02]|one)"},
    "patterns": {
        "target_modules": MIXED, "rank_pattern": {"0": 3, r"body\.[02]": 1, "^two$": 1},
        "alpha_pattern": {"b.*d|one": 5, "embe.": 7},
    },
    "patterns and rslora": {
        "target_modules": ["0", "2"], "use_rslora": True, "rank_pattern": {"2": 5}, "alpha_pattern": {"2": 1},
    },
    "modules_to_save": {"target_modules": ["body.0", "plain"], "modules_to_save": ["head", "norm"]},
    "an adapter and whole modules by suffix": {"target_modules": ["0"], "modules_to_save": ["ead"]},
    "lora_only": {"target_modules": ["body.0", "body.2", "one"], "bias": "lora_only"},
    "lora_only and modules_to_save": {"target_modules": ["body.0"], "bias": "lora_only", "modules_to_save": ["head"]},
    "all biases": {"target_modules": ["body.0", "body.2", "one"], "bias": "all"},
    "dropout": {"target_modules": ["plain"], "lora_dropout": 0.25},
    "gaussian": {"target_modules": ["plain"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["0", "2"], "init_lora_weights": "orthogonal"},
    "excluded": {"target_modules": r"body\.[02]", "exclude_modules": ["body.2"]},
    "a float for alpha": {"target_modules": ["0"], "lora_alpha": 2.5},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_ways_for_every_kind_of_module(options, tmp_path):
    if options.get("init_lora_weights") == "orthogonal":
        options = options | {"r": 4}
    round_trip(mixed(), config(**options), tmp_path, on_mixed)


@pytest.mark.parametrize("places", [["c_attn"], ["c_attn", "c_proj", "c_fc"]])
def test_gpt2(places, tmp_path):
    net = seeded(gpt2)()
    x = ids(2, 5, high=32)
    adapter, _ = round_trip(net, config(target_modules=places, fan_in_fan_out=True), tmp_path, lambda f: logits(f(x)))
    assert len(adapter.parts[0].paths) == (2 if len(places) == 1 else 8)


def test_llama_with_its_embedding_and_its_head(tmp_path):
    net = seeded(llama)()
    x = ids(2, 5, high=32)
    conf = config(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    _adapter, tree = round_trip(net, conf, tmp_path, lambda f: logits(f(x)))
    assert list(tree["train"]) == ["lm_head.weight"]
    assert read(tmp_path / "same")["task_type"] == "CAUSAL_LM"


def test_a_classifier_that_peft_trains_for_its_task(tmp_path):
    net = seeded(
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
            )
        )
    )()
    x = ids(2, 5, high=32)
    conf = config(target_modules=["query"], task_type="SEQ_CLS")
    _, tree = round_trip(net, conf, tmp_path, lambda f: logits(f(x)))
    assert sorted(tree["train"]) == ["classifier.bias", "classifier.weight"]
    edit(tmp_path / "theirs", modules_to_save=None)  # as older versions write it
    _, _, same = pf.load_peft(tmp_path / "theirs", pf.functionalize(net))
    assert same["train"].keys() == tree["train"].keys()


@pytest.mark.parametrize("init", ["eva", "mica"])
def test_inits_that_leave_the_base_alone(init, tmp_path):
    net = mixed().float()
    theirs = peer(net, config(target_modules=["body.0"]), torch.float32)
    save_of(theirs, tmp_path / "a")
    edit(tmp_path / "a", init_lora_weights=init)
    model = pf.functionalize(net)
    adapter, frozen, tree = pf.load_peft(tmp_path / "a", model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`init_lora_weights` is 'eva'")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "a").eval()
    torch.testing.assert_close(model(adapter.apply(frozen, tree), X), again(X))
    torch.testing.assert_close(again(X), theirs(X))


def test_an_embedding_whose_base_weight_is_in_the_file(tmp_path):
    net = seeded(llama)()
    theirs = peer(net, config(target_modules=["embed_tokens", "q_proj"]))
    save_of(theirs, tmp_path / "a")
    name = PREFIX + "model.embed_tokens.base_layer.weight"
    assert name in load_file(tmp_path / "a" / WEIGHTS)
    model, x = pf.functionalize(net), ids(2, 5, high=32)
    adapter, frozen, tree = pf.load_peft(tmp_path / "a", model)
    close(logits(model(adapter.apply(frozen, tree), x)), logits(theirs(x)))
    odd = pf.functionalize(net)
    odd.params["model.embed_tokens.weight"] = torch.full_like(odd.params["model.embed_tokens.weight"], float("inf"))
    rewrite(tmp_path / "a", lambda tensors: tensors[name].fill_(float("inf")))
    pf.load_peft(tmp_path / "a", odd)  # what is not finite is no leaf
    with pytest.raises(pf.FileFormatError, match="base weight, and another one than this model's"):
        pf.load_peft(tmp_path / "a", model)
    rewrite(tmp_path / "a", lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(pf.FileFormatError, match=r"is \(3, 3\); for this model"):
        pf.load_peft(tmp_path / "a", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_file_is_kept(dtype, tmp_path):
    net = mixed().to(dtype)
    theirs = peer(net, config(target_modules=["embed", "body.0", "one"]))
    for name, param in theirs.named_parameters():
        if ".lora_" in name:
            param.data = param.data.to(dtype)
    save_of(theirs, tmp_path / "a")
    model = pf.functionalize(net)
    adapter, _frozen, tree = pf.load_peft(tmp_path / "a", model)
    assert {leaf.dtype for _, leaf in pf.leaves(tree)} == {dtype}
    pf.save_peft(tmp_path / "b", adapter, tree)
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()
    exact = pf.functionalize(net.double())
    wide = pf.map_leaves(lambda leaf: leaf.double(), tree)
    again = reload(net, tmp_path / "b").double()
    close(exact(pf.bind(adapter.method, exact).apply(exact.params, wide), X), again(X))


def test_a_fresh_adapter_of_ours_is_read_without_a_warning(tmp_path):
    net = mixed()
    model = pf.functionalize(net)
    method = pf.chain(
        pf.lora(
            MIXED, rank=2, alpha=5, dropout=0.1, name="mine", rank_stabilized=True, rank_pattern={"body.0": 4},
            alpha_pattern={"embed": 2.0},
        ),
        pf.train(r"(head|norm)\..*", name="rest"),
    )  # fmt: skip
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf + torch.randn_like(leaf) / 3, tree)
    pf.save_peft(tmp_path / "a", adapter, tree, config={"base_model_name_or_path": None, "task_type": None})
    close(reload(net, tmp_path / "a")(X), model(adapter.apply(frozen, tree), X))
    saved = read(tmp_path / "a")
    assert saved["rank_pattern"] == {r"^body\.0": 4}
    assert saved["modules_to_save"] == ["head", "norm"]
    text = (tmp_path / "a" / CONFIG).read_text()
    assert text == json.dumps(saved, indent=2, sort_keys=True)
    again, _, loaded = pf.load_peft(tmp_path / "a", model, adapter=adapter)
    assert again is adapter
    assert {k: t.tolist() for k, t in pf.leaves(loaded)} == {k: t.tolist() for k, t in pf.leaves(tree)}
    assert listed(tmp_path / "a") == [CONFIG, WEIGHTS]


def test_alpha_none_is_the_rank_of_every_place(tmp_path):
    net = mixed()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(["0", "2"], rank=2, rank_pattern={"2": 5}), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(torch.randn_like, tree)
    pf.save_peft(tmp_path / "a", adapter, tree)
    close(reload(net, tmp_path / "a")(X), model(adapter.apply(frozen, tree), X))


class Names(nn.Module):
    """Names that are ends of others."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict(
            {"fc": nn.Linear(4, 4), "fcx": nn.Linear(4, 4), "f.c".replace(".", "-"): nn.Linear(4, 4)}
        )
        self.subfc = nn.Linear(4, 4)

    def forward(self, x):
        for layer in (self.fc, *self.inner.values(), self.subfc):
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("where", ["fc", r"inner\.fc", "fc|subfc", r"inner\..*", r"inner\.f-c"])
def test_names_that_end_alike(where, tmp_path):
    net, x = seeded(Names)(), randn(3, 4)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(where, rank=2, rank_pattern={where: 3}, alpha=5), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(torch.randn_like, tree)
    pf.save_peft(tmp_path / "a", adapter, tree)
    close(reload(net, tmp_path / "a")(x), model(adapter.apply(frozen, tree), x))


def test_a_module_to_save_whose_name_ends_another_is_refused(tmp_path):
    model = pf.functionalize(seeded(Names)())
    adapter = pf.bind(pf.chain(pf.lora(r"inner\.fcx", rank=2), pf.train(r"fc\..*")), model)
    with pytest.raises(pf.OptionError, match=r"inner\.fc"):
        pf.save_peft(tmp_path / "a", adapter, adapter.init(0)[1])


def test_half_of_a_module_and_single_biases_are_refused(tmp_path):
    model = pf.functionalize(mixed())
    for trained in (r"head\.weight", r"body\.0\.bias|head\.bias", r"plain\.bias"):
        adapter = pf.bind(pf.chain(pf.lora("plain", rank=2), pf.train(trained)), model)
        with pytest.raises(pf.OptionError, match="PEFT trains whole modules"):
            pf.save_peft(tmp_path / "a", adapter, adapter.init(0)[1])
    assert listed(tmp_path) == []


def test_a_config_that_says_otherwise_is_replaced_where_it_does(tmp_path):
    net = mixed()
    save_of(peer(net, config(target_modules=["body.0"], task_type="FEATURE_EXTRACTION")), tmp_path / "a")
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(["body.2"], rank=3, alpha=1), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(torch.randn_like, tree)
    pf.save_peft(tmp_path / "b", adapter, tree, config=pf.peft_config(tmp_path / "a"))
    saved = read(tmp_path / "b")
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (3, 1, ["2"])
    assert saved["task_type"] == "FEATURE_EXTRACTION"
    assert saved["auto_mapping"] == read(tmp_path / "a")["auto_mapping"]
    close(model(adapter.apply(frozen, tree), X), _plain(net, tmp_path / "b")(X))
    with pytest.raises(pf.OptionError, match="use_dora"):
        pf.save_peft(tmp_path / "c", adapter, tree, config={"use_dora": True})
    with pytest.raises(pf.OptionError, match="no JSON"):
        pf.save_peft(tmp_path / "c", adapter, tree, config={"revision": object()})


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"target_modules": ["body.0", "body.2"]},
        {"target_modules": r"body\.2"},
        {"target_modules": "(?=x)y"},
        {"lora_alpha": 9},
        {"rank_pattern": {"0": 1}},
        {"bias": "lora_only"},
        {"modules_to_save": ["head"]},
    ],
)
def test_every_field_that_says_otherwise_is_replaced(one, fields, tmp_path):
    folder, model = one
    adapter, frozen, tree = pf.load_peft(folder, model)
    given = pf.peft_config(folder)
    pf.save_peft(tmp_path / "b", adapter, tree, config=given | fields)
    saved = read(tmp_path / "b")
    assert {name: saved[name] for name in fields if name != "target_modules"} != fields
    assert sorted(saved["target_modules"]) in (["0", "embed"], ["body.0", "embed"])
    close(reload(mixed(), tmp_path / "b")(X), model(adapter.apply(frozen, tree), X))


def _plain(net, folder):
    edit(folder, task_type=None)
    return reload(net, folder)


def test_wrappers_in_names_are_dropped(tmp_path):
    net = mixed()
    theirs = peer(net, config(target_modules=["body.0", "embed"]))
    save_of(theirs, tmp_path / "a")

    def wrapped(tensors):
        for name in list(tensors):
            tensors[name.replace(PREFIX, PREFIX + "_orig_mod.").replace("body.", "body._fsdp_wrapped_module.")] = (
                tensors.pop(name)
            )

    rewrite(tmp_path / "a", wrapped)
    model = pf.functionalize(net)
    adapter, frozen, tree = pf.load_peft(tmp_path / "a", model)
    close(model(adapter.apply(frozen, tree), X), theirs(X))


def test_layers_to_transform(tmp_path):
    net, x = seeded(llama)(), ids(2, 5, high=32)
    conf = config(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers")
    adapter, _ = round_trip(net, conf, tmp_path, lambda f: logits(f(x)))
    assert adapter.parts[0].paths == ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight")


# Reuse of a bound adapter.


@pytest.fixture
def folders(tmp_path):
    net = mixed()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.lora(["0", "embed"], rank=2, alpha=4), pf.train("head")), model)
    trees = [pf.map_leaves(torch.randn_like, adapter.init(key)[1]) for key in range(4)]
    for key, tree in enumerate(trees):
        pf.save_peft(tmp_path / str(key), adapter, tree)
    return model, adapter, trees, [tmp_path / str(key) for key in range(4)]


def values(tree):
    return {keys: leaf.tolist() for keys, leaf in pf.leaves(tree)}


@pytest.mark.parametrize("workers", [1, 3])
def test_many_folders_in_order(folders, workers):
    model, adapter, trees, paths = folders
    bound, frozen, loaded = pf.load_peft_many(reversed(paths), model, workers=workers)
    assert [values(tree) for tree in loaded] == [values(tree) for tree in reversed(trees)]
    assert bound is not adapter
    assert frozen.keys() == adapter.init(0)[0].keys()
    assert all(frozen[name] is model.params[name] for name in frozen)
    assert pf.load_peft_many(paths, model, adapter=adapter)[0] is adapter


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_bad_folder_is_named(folders, workers):
    model, _, _, paths = folders
    (paths[2] / WEIGHTS).write_bytes(b"x" * 40)
    (paths[3] / WEIGHTS).write_bytes(b"x" * 40)
    with pytest.raises(pf.FileFormatError, match=re.escape(str(paths[2] / WEIGHTS))):
        pf.load_peft_many(paths, model, workers=workers)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_alpha": 5}, "another alpha"),
        ({"alpha_pattern": {"embed": 1}}, "another alpha"),
        ({"use_rslora": True}, "another rank_stabilized"),
        ({"lora_dropout": 0.5}, "another dropout"),
        ({"r": 3}, "have rank 2, while .* says 3"),
        ({"modules_to_save": None}, "holds the whole of 'head.bias'"),
    ],
)
def test_another_method_is_not_the_adapters(folders, fields, words):
    model, adapter, _, paths = folders
    edit(paths[1], **fields)
    for call in (lambda: pf.load_peft(paths[1], model, adapter=adapter), lambda: pf.load_peft_many(paths, model)):
        with pytest.raises(pf.FileFormatError, match=words) as error:
            call()
        assert str(paths[1]) in str(error.value)


def test_other_places_or_ranks_are_not_the_adapters(folders):
    model, _adapter, _, paths = folders
    for other in (pf.lora(["0"], rank=2, alpha=4), pf.lora(["0", "2", "embed"], rank=2, alpha=4)):
        bound = pf.bind(pf.chain(other, pf.train("head")), model)
        with pytest.raises(pf.FileFormatError, match="at other places"):
            pf.load_peft(paths[0], model, adapter=bound)
    bound = pf.bind(pf.chain(pf.lora(["0", "embed"], rank=3, alpha=4), pf.train("head")), model)
    with pytest.raises(pf.FileFormatError, match="for this model and method it is"):
        pf.load_peft(paths[0], model, adapter=bound)


def test_bad_arguments_of_loading(folders):
    model, adapter, _, paths = folders
    with pytest.raises(pf.OptionError, match="functionalize"):
        pf.load_peft(paths[0], mixed())
    with pytest.raises(pf.OptionError, match="bound to this very model"):
        pf.load_peft(paths[0], pf.functionalize(mixed()), adapter=adapter)
    with pytest.raises(pf.OptionError, match="bound to this very model"):
        pf.load_peft(paths[0], model, adapter=adapter.method)
    with pytest.raises(pf.OptionError, match="at least one"):
        pf.load_peft_many([], model)
    with pytest.raises(pf.OptionError, match="list of folders"):
        pf.load_peft_many(str(paths[0]), model)
    for workers in (0, True, 1.5):
        with pytest.raises(pf.OptionError, match="threads"):
            pf.load_peft_many(paths, model, workers=workers)


# Refusals: the config.

VARIANTS = {
    "use_dora": True,
    "alora_invocation_tokens": [1],
    "target_parameters": ["x"],
    "trainable_token_indices": [3],
    "layer_replication": [[0, 1]],
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"a": 1},
    "monteclora_config": {},
    "kasa_config": {"beta": 1},
    "arrow_config": {"top_k": 1},
    "megatron_config": {"a": 1},
    "some_new_field": 3,
}


@pytest.fixture
def one(tmp_path):
    net = mixed()
    save_of(peer(net, config(target_modules=["body.0", "embed"])), tmp_path / "a")
    return tmp_path / "a", pf.functionalize(net)


@pytest.mark.parametrize(("field", "value"), [(k, v) for k, v in VARIANTS.items() if v != {}])
def test_variants_and_unknown_fields_are_refused_by_name(one, field, value):
    folder, model = one
    edit(folder, **{field: value})
    with pytest.raises(pf.FileFormatError, match=rf"has {field}="):
        pf.load_peft(folder, model)
    for off in (None, False, [], {}):
        edit(folder, **{field: off})
        pf.load_peft(folder, model)


def test_an_unknown_field_can_be_ignored_and_is_kept(one, tmp_path):
    folder, model = one
    edit(folder, some_new_field=3)
    adapter, _, tree = pf.load_peft(folder, model, ignore=["some_new_field"])
    pf.save_peft(tmp_path / "b", adapter, tree, config=pf.peft_config(folder))
    assert read(tmp_path / "b") == read(folder)
    edit(folder, use_dora=True)
    with pytest.raises(pf.FileFormatError, match="use_dora"):
        pf.load_peft(folder, model, ignore=["some_new_field", "use_dora"])


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PISSA", 1, 0, None, [1]]
)
def test_inits_that_change_the_base_are_refused(one, init):
    folder, model = one
    edit(folder, init_lora_weights=init)
    with pytest.raises(pf.FileFormatError, match=r"init_lora_weights=.*path_initial_model_for_weight_conversion"):
        pf.load_peft(folder, model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; load_peft reads LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"r": 0}, "has r=0; it must be a whole number"),
        ({"r": True}, "has r=True"),
        ({"r": "2"}, "has r='2'"),
        ({"r": 3}, "have rank 2, while .* says 3"),
        ({"lora_alpha": None}, "has lora_alpha=None"),
        ({"lora_alpha": 10**400}, "has lora_alpha=1000"),
        ({"lora_dropout": 1.0}, "probability"),
        ({"lora_dropout": "x"}, "has lora_dropout='x'"),
        ({"use_rslora": "false"}, "has use_rslora='false'"),
        ({"bias": "some"}, "has bias='some'"),
        ({"bias": "all", "modules_to_save": ["head"]}, "three times"),
        ({"bias": "lora_only"}, "lacks 'body.0.bias'"),
        ({"bias": "all"}, "lacks '"),
        ({"modules_to_save": "head"}, "has modules_to_save='head'"),
        ({"modules_to_save": ["head"]}, "lacks 'head.bias'"),
        ({"modules_to_save": [""]}, "has modules_to_save="),
        ({"rank_pattern": {"0": 2.5}}, "has rank_pattern=2.5"),
        ({"rank_pattern": [1]}, "has rank_pattern="),
        ({"rank_pattern": {r"(?=a)b": 3}}, r"rank_pattern, has the regex '\(\?=a\)b'"),
        ({"alpha_pattern": {"(a": 3}}, "alpha_pattern, has the regex"),
        ({"alpha_pattern": {"embed": "x"}}, "has alpha_pattern='x'"),
        ({"rank_pattern": {"(.*.*)*(.*.*)*(.*.*)*x": 3}}, "have rank 2|too long"),
    ],
)  # fmt: skip
def test_values_of_the_config_that_cannot_be(one, fields, words):
    folder, model = one
    if "(.*.*)*" not in str(fields):
        edit(folder, **fields)
        with pytest.raises(pf.FileFormatError, match=words) as error:
            pf.load_peft(folder, model)
        assert str(folder) in str(error.value)
    else:  # a pattern that would take `re` years is answered at once
        edit(folder, **fields)
        pf.load_peft(folder, model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "holds a list"),
        ("null", "holds a NoneType"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ('{"peft_type": NaN}', "NaN is no JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"r": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        (" " * (9 * 2**20) + "{}", "larger than 8 MiB"),
    ],
)
def test_a_config_that_is_none(one, text, words):
    folder, model = one
    (folder / CONFIG).write_text(text)
    with pytest.raises(pf.FileFormatError, match=words):
        pf.load_peft(folder, model)


def test_binary_rubbish_for_a_config(one):
    folder, model = one
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00\x01\x80")
    with pytest.raises(pf.FileFormatError, match="cannot be read as JSON"):
        pf.load_peft(folder, model)


def test_folders_that_are_none(one, tmp_path):
    folder, model = one
    with pytest.raises(pf.FileFormatError, match="is no folder"):
        pf.load_peft("someone/some-adapter", model)
    with pytest.raises(pf.FileFormatError, match="is no folder"):
        pf.load_peft(folder / CONFIG, model)
    with pytest.raises(pf.FileFormatError, match=r"holds no file adapter_config.json"):
        pf.load_peft(tmp_path, model)
    (folder / WEIGHTS).unlink()
    with pytest.raises(pf.FileFormatError, match=r"holds no adapter_model.safetensors"):
        pf.load_peft(folder, model)
    (folder / WEIGHTS).mkdir()
    with pytest.raises(pf.FileFormatError, match=r"holds no adapter_model.safetensors"):
        pf.load_peft(folder, model)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    with pytest.raises(pf.FileFormatError, match=r"holds no file adapter_config.json"):
        pf.peft_config(folder)


def test_a_pickle_is_refused_with_a_command_that_converts_it(one):
    folder, model = one
    expected = values(pf.load_peft(folder, model)[2])
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(pf.FileFormatError, match="pickle") as error:
        pf.load_peft(folder, model)
    code = re.search(r'python -c "(.*)"$', str(error.value))[1]
    exec(code, {})
    assert values(pf.load_peft(folder, model)[2]) == expected


def test_arguments_of_the_wrong_kind(one, tmp_path):
    folder, model = one
    with pytest.raises(pf.OptionError, match="list of fields"):
        pf.load_peft(folder, model, ignore="some_new_field")
    adapter, _, tree = pf.load_peft(folder, model)
    with pytest.raises(pf.OptionError, match="the JSON object"):
        pf.save_peft(tmp_path / "b", adapter, tree, config=str(folder))


# Refusals: the tensors.


def renamed(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


A = PREFIX + "body.0.lora_A.weight"
B = PREFIX + "body.0.lora_B.weight"
EMBED = PREFIX + "embed.lora_embedding_A"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(A), "lacks the other factor of 'body.0'"),
        (lambda t: t.pop(B), "lacks the other factor of 'body.0'"),
        (lambda t: t.clear(), "holds no tensor lora_A"),
        (lambda t: t.update({A: torch.zeros(2, 9).double()}), r"is \(2, 9\); for this model and method it is \(2, 8\)"),
        (lambda t: t.update({A: torch.zeros(5, 8).double()}), "have rank 5, while"),
        (lambda t: t.update({A: torch.zeros(16).double()}), r"is \(16,\); a factor has two"),
        (lambda t: t.update({A: torch.zeros(0, 8).double()}), r"is \(0, 8\); a factor"),
        (lambda t: t.update({B: torch.zeros(2, 8).double()}), r"is \(2, 8\); for this model and method it is \(8, 2\)"),
        (lambda t: t.update({A: t[A].int()}), "is I32; leaves are"),
        (lambda t: t.update({B: t[B] * float("nan")}), "lora_B.weight' holds values that are not finite"),
        (lambda t: t[EMBED].view(-1)[3:4].fill_(float("inf")), "embedding_A' holds values that are not finite"),
        (lambda t: t.update({PREFIX + "norm.weight": torch.ones(8)}), "whole of 'norm.weight'"),
        (lambda t: t.update({PREFIX + "head.bias": torch.ones(3)}), "whole of 'head.bias'"),
        (lambda t: t.update({"extra": torch.ones(1)}), "'extra'; the names of PEFT's LoRA begin with"),
        (lambda t: t.update({"prompt_embeddings": torch.ones(1)}), "'prompt_embeddings'; the names"),
        (
            lambda t: t.update({PREFIX + "../../etc/x.lora_A.weight": torch.ones(1)}),
            "no parameter '../../etc/x.weight'",
        ),
        (lambda t: t.update({PREFIX + "body.0.lora_B.bias": torch.ones(1)}), "lora_bias"),
        (lambda t: t.update({PREFIX + "body.0.lora_magnitude_vector": torch.ones(8)}), "of DoRA"),
        (lambda t: t.update({PREFIX + "embed.token_adapter.trainable_tokens_delta": torch.ones(8)}), "single rows"),
        (renamed(A, PREFIX + "body.0.lora_A.default.weight"), "no parameter 'body.0.lora_A.default.weight'"),
        (renamed(A, PREFIX + "body.9.lora_A.weight"), "no parameter 'body.9.weight'; the nearest names: body"),
        (
            renamed(EMBED, PREFIX + "embed.lora_A.weight"),
            "for this module of the model it would be '.*lora_embedding_B'",
        ),
        (renamed(A, PREFIX + "body.0.lora_embedding_A"), "for this module of the model it would be '.*lora_B.weight'"),
        (renamed(A, PREFIX + "norm.lora_A.weight"), "it is a LayerNorm"),
        (lambda t: t.update({A.replace(PREFIX, PREFIX + "_orig_mod."): t[A].clone()}), "which are of one weight"),
        (lambda t: t.update({PREFIX + "body.0.weight": torch.ones(8, 8)}), "both an adapter of 'body.0.weight'"),
    ],
)
def test_tensors_that_cannot_be(one, change, words):
    folder, model = one
    rewrite(folder, change)
    with pytest.raises(pf.FileFormatError, match=words) as error:
        pf.load_peft(folder, model)
    assert str(folder) in str(error.value)


def test_values_that_are_not_finite_if_meant(one):
    folder, model = one
    rewrite(folder, lambda t: t.update({B: t[B] * float("nan")}))
    assert pf.load_peft(folder, model, allow_nonfinite=True)[2]["lora"]["body.0.weight"]["B"].isnan().all()


def test_truncated_at_every_length(one):
    folder, model = one
    raw = (folder / WEIGHTS).read_bytes()
    for length in [*range(0, len(raw), max(1, len(raw) // 40)), len(raw) - 1]:
        (folder / WEIGHTS).write_bytes(raw[:length])
        with pytest.raises(pf.FileFormatError):
            pf.load_peft(folder, model)


@settings(max_examples=150)
@given(data=st.data())
def test_any_byte_of_a_file_may_be_wrong(data, shared):
    """Whatever is in the header or the config: our own error, or an adapter."""
    folder, model, raws = shared
    for name, raw in raws.items():
        head = len(raw) if name == CONFIG else 8 + int.from_bytes(raw[:8], "little")
        broken = bytearray(raw)
        for _ in range(data.draw(st.integers(0, 3))):
            broken[data.draw(st.integers(0, head - 1))] = data.draw(
                st.sampled_from(list(b'{}[]",:0189-eE.AWx \x00\xff'))
            )
        (folder / name).write_bytes(bytes(broken))
    with contextlib.suppress(pf.FileFormatError):
        pf.load_peft(folder, model)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp("shared"), mixed()
    save_of(peer(net, config(target_modules=["body.0", "embed"], rank_pattern={"0": 3})), folder)
    return folder, pf.functionalize(net), {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def test_a_header_that_promises_terabytes(one):
    folder, model = one
    header = json.dumps({A: {"dtype": "F64", "shape": [2, 2**40], "data_offsets": [0, 2**44]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(pf.FileFormatError):
        pf.load_peft(folder, model)


def test_a_rank_above_the_matrix_is_refused(tmp_path):
    net = mixed()
    save_of(peer(net, config(target_modules=["body.0"], r=9)), tmp_path / "a")
    with pytest.raises(pf.FileFormatError, match=r"rank=9 for body.0.weight"):
        pf.load_peft(tmp_path / "a", pf.functionalize(net))


def test_a_buffer_of_a_module_to_save_is_refused(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    save_of(peer(net, config(target_modules=["0"], modules_to_save=["1"])), tmp_path / "a")
    with pytest.raises(pf.FileFormatError, match=r"a buffer of this model"):
        pf.load_peft(tmp_path / "a", pf.functionalize(net))


# Places where PEFT's function and ours differ.

ODD = {
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups"),
    "dilation": (lambda: nn.Conv2d(4, 4, 3, dilation=2, padding="same"), "dilated"),
    "padding mode": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    "max_norm": (lambda: nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"),
}


@pytest.mark.parametrize(("make", "words"), ODD.values(), ids=ODD)
def test_places_where_pefts_function_is_another(make, words, tmp_path):
    net = nn.ModuleDict({"odd": make(), "other": nn.Linear(4, 4)}).double()
    model = pf.functionalize(net)
    save_of(peer(net, config(target_modules=["odd"])), tmp_path / "a")
    with pytest.raises(pf.FileFormatError, match=words):
        pf.load_peft(tmp_path / "a", model)
    adapter = pf.bind(pf.lora(r"odd(\.out_proj)?", rank=2), model)
    with pytest.raises(pf.OptionError, match=f"{words}|inside a module"):
        pf.save_peft(tmp_path / "b", adapter, adapter.init(0)[1])
    adapter = pf.bind(pf.lora("odd.*weight", rank=2), model)
    with pytest.raises(pf.OptionError):
        pf.save_peft(tmp_path / "b", adapter, adapter.init(0)[1])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 1, dilation=2), nn.Conv1d(4, 4, 2, padding_mode="reflect")])
def test_dilation_and_padding_modes_that_do_nothing(conv, tmp_path):
    net = nn.ModuleDict({"odd": conv}).double()
    net.forward = None
    save_of(peer(net, config(target_modules=["odd"])), tmp_path / "a")
    pf.load_peft(tmp_path / "a", pf.functionalize(net))


def test_out_proj_of_attention_is_refused():
    """PEFT adapts a module that the attention never calls: nothing comes of it."""
    net = nn.TransformerEncoderLayer(8, 2, 16).double()
    adapter = pf.bind(pf.lora(["out_proj"], rank=2), pf.functionalize(net))
    with pytest.raises(pf.OptionError, match="at out_proj alone, nothing at all"):
        pf.save_peft("never", adapter, adapter.init(0)[1])


def test_transposed_convolutions_experts_and_roots_are_refused(tmp_path):
    net = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 3), "list": nn.ParameterList([torch.ones(3, 4, 4)])})
    for where, words in (("up", "transposed"), ("list.0", "is none")):
        adapter = pf.bind(pf.lora(where, rank=2), pf.functionalize(net))
        with pytest.raises(pf.OptionError, match=words):
            pf.save_peft(tmp_path / "a", adapter, adapter.init(0)[1])
    adapter = pf.bind(pf.lora("weight", rank=2), pf.functionalize(nn.Linear(4, 4)))
    with pytest.raises(pf.OptionError, match="modules inside a module"):
        pf.save_peft(tmp_path / "a", adapter, adapter.init(0)[1])


class Pair(nn.Module):
    """One module that is reached by two paths."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("key", ["head.lora_A.weight", "embed.lora_embedding_A"])
def test_tied_weights_are_refused_unless_meant(key, tmp_path):
    net = seeded(Tied)()
    module = key.split(".")[0]
    theirs = peer(net, config(target_modules=[module]))
    save_of(theirs, tmp_path / "a")
    model = pf.functionalize(net)
    with pytest.raises(pf.FileFormatError, match="allow_tied=True"):
        pf.load_peft(tmp_path / "a", model)
    adapter, frozen, tree = pf.load_peft(tmp_path / "a", model, allow_tied=True)
    assert list(tree["lora"]) == ["embed.weight"]
    merged = theirs.merge_and_unload()
    expected = merged.get_submodule(module).weight
    close(pf.merge(adapter.apply(frozen, tree))["embed.weight"], expected.detach())
    assert pf.load_peft(tmp_path / "a", model, adapter=adapter, allow_tied=True)[0] is adapter
    with pytest.raises(pf.OptionError, match="further names"):
        pf.save_peft(tmp_path / "b", adapter, tree)


def test_two_adapters_of_one_weight_are_refused(tmp_path):
    net = seeded(Tied)()
    save_of(peer(net, config(target_modules=["head", "embed"])), tmp_path / "a")
    with pytest.raises(pf.FileFormatError, match=r"which are of one weight of this model, 'embed.weight'"):
        pf.load_peft(tmp_path / "a", pf.functionalize(net), allow_tied=True)


def test_shared_modules_and_tied_whole_modules_are_refused(tmp_path):
    adapter = pf.bind(pf.lora("first", rank=2), pf.functionalize(Pair()))
    with pytest.raises(pf.OptionError, match="further names"):
        pf.save_peft(tmp_path / "b", adapter, adapter.init(0)[1])
    net = seeded(Tied)()
    save_of(peer(net, config(target_modules=["mix"], modules_to_save=["head"])), tmp_path / "a")
    with pytest.raises(pf.FileFormatError, match="allow_tied=True"):
        pf.load_peft(tmp_path / "a", pf.functionalize(net))
    adapter = pf.bind(pf.chain(pf.lora("mix", rank=2), pf.train("head")), pf.functionalize(net))
    with pytest.raises(pf.OptionError, match="further names"):
        pf.save_peft(tmp_path / "b", adapter, adapter.init(0)[1])


# Saving.


def test_methods_that_the_format_cannot_hold(tmp_path):
    model = pf.functionalize(mixed())
    own = pf.on(
        r"head\.bias", pf.Transform(lambda w, k: {p: t.clone() for p, t in w.items()}, lambda t, w: {}), name="own"
    )
    lora = pf.lora("plain", rank=2)
    for method, words in (
        (pf.gift("body.0", rank=2), "'gift' of this adapter is gift"),
        (pf.chain(lora, pf.ia3("body.0")), "'ia3' of this adapter is ia3"),
        (pf.chain(lora, own), "'own' of this adapter is a method of your own"),
        (pf.chain(lora, pf.lora("body.0", rank=2, name="b")), r"has 2 \(lora, b\)"),
        (pf.train("head"), r"has 0 \(none\)"),
    ):
        adapter = pf.bind(method, model)
        with pytest.raises(pf.OptionError, match=words) as error:
            pf.save_peft(tmp_path / "a", adapter, adapter.init(0)[1])
        assert "pf.save(path, adapter, trainable)" in str(error.value)


def test_a_named_chain_is_as_good_as_another(tmp_path):
    net = mixed()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.lora("plain", rank=2), pf.train("head"), name="all"), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(torch.randn_like, tree)
    pf.save_peft(tmp_path / "a", adapter, tree)
    close(reload(net, tmp_path / "a")(X), model(adapter.apply(frozen, tree), X))
    assert values(pf.load_peft(tmp_path / "a", model, adapter=adapter)[2]) == values(tree)


def test_a_folder_that_holds_something_is_not_written_to_unasked(folders, tmp_path):
    _, adapter, trees, paths = folders
    raw = {name: (paths[0] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    (paths[0] / "notes.txt").write_text("mine")
    with pytest.raises(pf.FileFormatError, match=r"holds something already.*overwrite=True"):
        pf.save_peft(paths[0], adapter, trees[1])
    assert {name: (paths[0] / name).read_bytes() for name in (CONFIG, WEIGHTS)} == raw
    pf.save_peft(paths[0], adapter, trees[1], overwrite=True)
    assert (paths[0] / "notes.txt").read_text() == "mine"
    assert (paths[0] / WEIGHTS).read_bytes() == (paths[1] / WEIGHTS).read_bytes()
    assert listed(paths[0]) == [CONFIG, WEIGHTS, "notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    pf.save_peft(empty, adapter, trees[0])
    assert {name: (empty / name).read_bytes() for name in (CONFIG, WEIGHTS)} == raw


def test_nothing_is_left_where_writing_fails(folders, tmp_path, monkeypatch):
    _, adapter, trees, paths = folders
    with pytest.raises(pf.FileFormatError, match="cannot be written"):
        pf.save_peft(tmp_path / "no" / "such", adapter, trees[0])
    (tmp_path / "file").write_text("x")
    with pytest.raises(pf.FileFormatError, match="cannot be written"):
        pf.save_peft(tmp_path / "file", adapter, trees[0])
    assert (tmp_path / "file").read_text() == "x"

    def fail(*args, **kwargs):
        raise OSError("disk full")

    before = listed(tmp_path)
    monkeypatch.setattr("peft_func.interop.peft_folder.save_file", fail)
    with pytest.raises(pf.FileFormatError, match="disk full"):
        pf.save_peft(tmp_path / "new", adapter, trees[0])
    assert listed(tmp_path) == before
    with pytest.raises(pf.FileFormatError, match="disk full"):
        pf.save_peft(paths[0], adapter, trees[0], overwrite=True)
    assert listed(paths[0]) == [WEIGHTS]  # no config: nobody reads weights with a config of another


def test_trees_of_another_shape_or_place_are_refused(folders, tmp_path):
    _, adapter, trees, _ = folders
    with pytest.raises(pf.TreeError):
        pf.save_peft(tmp_path / "x", adapter, {"lora": trees[0]["lora"]})
    with pytest.raises(pf.TreeError, match="on meta"):
        pf.save_peft(tmp_path / "x", adapter, pf.map_leaves(lambda leaf: leaf.to("meta"), trees[0]))
    assert not (tmp_path / "x").exists()


def test_views_that_require_gradients_are_saved_as_values(folders, tmp_path):
    _, adapter, trees, paths = folders
    stacked = pf.map_leaves(lambda leaf: leaf.requires_grad_(), pf.stack(trees))
    pf.save_peft(tmp_path / "x", adapter, pf.unstack(stacked)[1])
    assert (tmp_path / "x" / WEIGHTS).read_bytes() == (paths[1] / WEIGHTS).read_bytes()


def test_loading_leaves_model_files_and_generator_alone(one):
    folder, model = one
    before = {name: tensor.clone() for name, tensor in model.params.items()}
    raw, state = (folder / WEIGHTS).read_bytes(), torch.get_rng_state()
    _, _frozen, tree = pf.load_peft(folder, model)
    for _, leaf in pf.leaves(tree):
        leaf.add_(1.0)  # a leaf is the caller's own: neither the file nor another leaf is behind it
    assert (folder / WEIGHTS).read_bytes() == raw
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.params[name], tensor) for name, tensor in before.items())
    shutil.rmtree(folder)
    assert all(leaf.isfinite().all() for _, leaf in pf.leaves(tree))
