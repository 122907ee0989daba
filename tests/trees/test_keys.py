"""Keys: split by path, the same everywhere, drawn without the global generators."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf
from peft_func.trees.keys import as_key, normal, uniform

ROOT = Path(__file__).parents[2]
F32 = torch.empty((), dtype=torch.float32)
DRAWS = {"uniform": uniform, "normal": normal}
DRAW = pytest.mark.parametrize("draw", [uniform, normal], ids=DRAWS)

REPORT = """
import json, torch, peft_func as pf
from peft_func.trees.keys import normal, uniform
like = torch.empty(())
adapter = pf.bind(pf.lora(".*", rank=2), pf.functionalize(torch.nn.Linear(4, 3)))
print(json.dumps({
    "split": [pf.split(key, path) for key in (0, -1, 2**70) for path in ("", "q.weight", "layers.10.q", "é")],
    "uniform": uniform((5,), 0.5, pf.split(0, "x"), like).tolist(),
    "normal": normal((5,), 0.5, pf.split(0, "x"), like).tolist(),
    "init": adapter.init(3)[1]["lora"]["weight"]["A"].tolist(),
}))
"""


def report(seed: str) -> dict:
    env = os.environ | {"PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", REPORT], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_draws_are_the_same_in_every_process():
    first = report("4242")
    assert first["split"] == [pf.split(k, p) for k in (0, -1, 2**70) for p in ("", "q.weight", "layers.10.q", "é")]
    assert first["uniform"] == uniform((5,), 0.5, pf.split(0, "x"), F32).tolist()
    assert first["normal"] == normal((5,), 0.5, pf.split(0, "x"), F32).tolist()
    model = pf.functionalize(torch.nn.Linear(4, 3, device="meta").to_empty(device="cpu"))
    assert first["init"] == pf.bind(pf.lora(".*", rank=2), model).init(3)[1]["lora"]["weight"]["A"].tolist()


def test_split_is_pinned():
    # A change of these numbers changes every user's first weights: it needs a new major version.
    assert pf.split(0, "q.weight") == 2502660341163218158
    assert pf.split(1, "layers.10.q") == 8505280075004186767


@given(st.integers(), st.integers(), st.text(max_size=8), st.text(max_size=8))
def test_split_depends_on_key_and_path(key, other, path, another):
    assert pf.split(key, path) == pf.split(key, path)
    assert 0 <= pf.split(key, path) < 2**63
    assert (pf.split(key, path) == pf.split(other, path)) == (key == other)
    assert (pf.split(key, path) == pf.split(key, another)) == (path == another)


def test_splits_do_not_meet():
    keys = [pf.split(key, path) for key in range(-20, 20) for path in ("", "0", "1", "1/0", "/", "a.b", "a/b", "b")]
    nested = [pf.split(pf.split(0, a), b) for a in "abc" for b in "abc"]
    assert len({*keys, *nested}) == len(keys) + len(nested)


@DRAW
def test_a_draw_is_a_function_of_its_key(draw):
    one, again, other = (draw((64,), 1.0, key, F32) for key in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert abs(torch.corrcoef(torch.stack([draw((4000,), 1.0, pf.split(0, p), F32) for p in "ab"]))[0, 1]) < 0.08


@pytest.mark.parametrize("bound", [1e-3, 0.25, 3.0])
def test_uniform_fills_its_interval_evenly(bound):
    n = 200_000
    values = uniform((n // 100, 100), bound, pf.split(0, "u"), F32).double().flatten() / bound
    assert values.abs().max() <= 1
    assert values.min() < -0.999
    assert values.max() > 0.999
    assert abs(values.mean()) < 5 / math.sqrt(3 * n)
    assert abs(values.std() - 1 / math.sqrt(3)) < 5 / math.sqrt(n)
    counts = torch.histc(values, 20, -1, 1)
    assert (counts - n / 20).abs().max() < 5 * math.sqrt(n / 20)


@pytest.mark.parametrize("std", [1e-3, 0.25, 3.0])
def test_normal_has_its_mean_its_spread_and_its_tails(std):
    n = 200_000
    values = normal((n // 100, 100), std, pf.split(0, "n"), F32).double().flatten() / std
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * n)
    for z in (-2.0, -1.0, 0.0, 1.0, 2.0):
        share = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        assert abs((values < z).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    assert 3.5 < values.abs().max() < 6.5


@DRAW
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.int8, torch.float32),
    ],
)
def test_a_key_gives_the_same_values_for_every_dtype(draw, dtype, result):
    drawn = draw((3, 5), 0.7, 11, torch.empty(2, dtype=dtype))
    assert drawn.dtype is result
    assert drawn.shape == (3, 5)
    assert torch.equal(drawn, draw((3, 5), 0.7, 11, F32).to(result))
    assert not drawn.requires_grad


@DRAW
def test_a_draw_on_meta_has_shape_and_dtype_only(draw):
    drawn = draw((3, 5), 0.7, 11, torch.empty(2, dtype=torch.float16, device="meta"))
    assert (drawn.shape, drawn.dtype, drawn.is_meta) == ((3, 5), torch.float32, True)


@DRAW
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1, 1)])
def test_odd_shapes_can_be_drawn(draw, shape):
    assert draw(shape, 1.0, 0, F32).shape == shape


@DRAW
def test_the_default_dtype_of_torch_does_not_matter(draw):
    expected = draw((4,), 1.0, 3, F32)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(draw((4,), 1.0, 3, F32), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@DRAW
def test_the_default_device_of_torch_does_not_matter(draw):
    with torch.device("meta"):  # as torch.set_default_device("cuda") would
        drawn = draw((4,), 1.0, 3, F32)
    assert drawn.device == F32.device
    assert torch.equal(drawn, draw((4,), 1.0, 3, F32))


@DRAW
def test_no_global_generator_is_used(draw):
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    draw((100,), 1.0, pf.split(0, "a"), F32)
    as_key(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state()) == before[2]  # noqa: NPY002


def adapter():
    with torch.device("meta"):
        net = torch.nn.Linear(4, 3)
    return pf.bind(pf.lora("weight", rank=2), pf.functionalize(net.to_empty(device="cpu")))


def first(key) -> torch.Tensor:
    return adapter().init(key)[1]["lora"]["weight"]["A"]


def test_a_generator_is_a_key_that_moves_on():
    generator = torch.Generator().manual_seed(7)
    one, two = first(generator), first(generator)
    assert torch.equal(one, first(torch.Generator().manual_seed(7)))
    assert not torch.equal(one, two)
    again = torch.Generator().manual_seed(7)
    assert torch.equal(one, first(as_key(again)))
    assert torch.equal(two, first(as_key(again)))


@pytest.mark.parametrize("key", [0, -1, 1, 2**31, 2**63, 2**64 + 1, -(2**90)])
def test_every_integer_is_a_key(key):
    assert torch.equal(first(key), first(key))
    assert not torch.equal(first(key), first(key + 1))


@pytest.mark.parametrize("key", [True, False, 0.0, 1.5, None, "0", b"0", torch.tensor(0), (0,), object()])
def test_what_is_no_key_is_refused(key):
    for call in (lambda: adapter().init(key), lambda: pf.split(key, "a"), lambda: as_key(key)):
        with pytest.raises(pf.OptionError, match="a key is an int"):
            call()
