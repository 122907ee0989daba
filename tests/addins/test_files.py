"""Files of add-ins: what they ask for is checked before anything of that size is made."""

import json
import resource

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peft_func as pf
from tests.zoo import ZOO

GREEDY = {
    "adaptformer": ("vit", pf.adaptformer(rank=4), {"rank": 2**20}),
    "adaption_prompt": ("llama", pf.adaption_prompt(pf.attentions(-1), tokens=2), {"tokens": 2**20}),
    "bottleneck": ("bert", pf.pfeiffer(rank=4), {"rank": 2**20}),
    "convpass": ("vit", pf.convpass(rank=2), {"rank": 2**20}),
    "loreft": ("bert", pf.loreft(pf.blocks(), rank=2), {"rank": 2**20}),
    "prefix_tuning": ("llama", pf.prefix_tuning(pf.attentions(), tokens=2), {"tokens": 2**20}),
    "prompt_tuning": ("gpt2", pf.prompt_tuning("transformer.wte", tokens=2, init="normal"), {"tokens": 2**20}),
    "vpt": ("vit", pf.vpt(tokens=2), {"tokens": 2**20}),
    "vqt": ("vit", pf.vqt(tokens=2), {"tokens": 2**20}),
}


def tampered(path, **options):
    """Write other options into a file."""
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["peft_func"])
    method = meta["method"]
    (part,) = method.get("chain", [method])
    part["options"] |= options
    save_file(load_file(path), path, {"peft_func": json.dumps(meta)})


@pytest.mark.parametrize("kind", GREEDY)
def test_a_file_that_asks_for_much_is_refused_before_it_gets_it(kind, tmp_path):
    animal, method, options = GREEDY[kind]
    model = pf.functionalize(ZOO[animal].build())
    adapter = pf.bind(method, model)
    path = tmp_path / "a.safetensors"
    pf.save(path, adapter, adapter.init(0)[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in (2**20, 2**60):
        tampered(path, **dict.fromkeys(options, value))
        with pytest.raises(pf.FileFormatError):
            pf.load(path, model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB: far below what was asked for


def test_a_file_for_modules_that_are_not_there(tmp_path):
    model = pf.functionalize(ZOO["bert"].build())
    adapter = pf.bind(pf.bottleneck(r".*layer\.1\.output", rank=2), model)
    path = tmp_path / "a.safetensors"
    pf.save(path, adapter, adapter.init(0)[1])
    with pytest.raises(pf.FileFormatError, match=r"'bert\.encoder\.layer\.1\.output', which this model has not"):
        pf.load(path, pf.functionalize(ZOO["gpt2"].build()))


def test_an_addin_of_ones_own_is_loaded_with_its_method(tmp_path):
    model = pf.functionalize(ZOO["mlp"].build())
    own = pf.after("0", lambda tree, y: y + tree["b"], lambda place, key: {"b": place.like.new_zeros(())}, name="own")
    adapter = pf.bind(own, model)
    path = tmp_path / "a.safetensors"
    pf.save(path, adapter, pf.map_leaves(lambda leaf: leaf + 2, adapter.init(0)[1]))
    with pytest.raises(pf.OptionError, match="method="):
        pf.load(path, model)
    assert float(pf.load(path, model, method=own)[2]["own"]["0"]["b"]) == 2.0
