"""What cannot be a pure function is refused by name, with what to do instead."""

import pytest
import torch
from torch import nn

import peft_func as pf


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_modules():
    with pytest.raises(pf.ModuleRefusedError, match=r"0 \(RecursiveScriptModule\) is scripted.*pass the eager one"):
        pf.functionalize(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))


def test_data_parallel():
    with pytest.raises(ValueError, match=r"the module \(DataParallel\).*pass its \.module"):
        pf.functionalize(nn.DataParallel(nn.Linear(2, 2)))


def test_compiled_modules():
    with pytest.raises(pf.ModuleRefusedError, match=r"_orig_mod"):
        pf.functionalize(torch.compile(nn.Linear(2, 2)))


def test_parametrized_modules():
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(pf.ModuleRefusedError, match=r"0 \(.*\) is parametrized in weight.*remove_parametrizations"):
        pf.functionalize(net)


def test_lazy_modules():
    with pytest.raises(pf.ModuleRefusedError, match="no shape for 'weight' yet; run one batch"):
        pf.functionalize(nn.LazyLinear(3))


def test_things_that_are_no_modules():
    with pytest.raises(pf.ModuleRefusedError, match=r"takes an nn\.Module; it got a int"):
        pf.functionalize(3)
