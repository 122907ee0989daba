"""Which options go with which way to merge."""

import pytest
import torch

import peft_func as pf
from peft_func.ensemble.rules import HOWS, check_merge, check_weights


def test_weights():
    assert check_weights(4, None) == (0.25,) * 4
    assert check_weights(2, (1, -2)) == (1.0, -2.0)
    assert check_weights(2, torch.tensor([0.5, 2.0])) == (0.5, 2.0)
    for wrong in ([1.0], [1.0, float("inf")], [1.0, True], {"a": 1.0, "b": 2.0}, torch.ones(2, 1), iter([1.0, 2.0])):
        with pytest.raises(pf.OptionError):
            check_weights(2, wrong)


@pytest.mark.parametrize("how", list(HOWS))
def test_an_option_is_needed_used_or_refused(how):
    pruned = how not in ("cat", "svd", "delta", "linear", "slerp")
    needed = ({"density": 0.5} if pruned else {}) | ({"key": 1} if "dare" in how else {})
    options = {"rank": None, "density": None, "majority": "total", "key": None} | needed
    checked = check_merge(2, None, how, **options)
    assert (checked.rule.density, checked.rule.key) == (options["density"], options["key"])
    for option in needed:
        with pytest.raises(pf.OptionError, match=f"needs {option}="):
            check_merge(2, None, how, **options | {option: None})
    cuts = how in ("svd", "slerp") or how.endswith("_svd") or how.startswith("knots")
    for option, value, allowed in (
        ("rank", 2, cuts),
        ("density", 0.5, pruned),
        ("key", 3, "dare" in how),
        ("majority", "frequency", how.endswith(("ties", "ties_svd"))),
    ):
        if allowed:
            check_merge(2, None, how, **options | {option: value})
        else:
            with pytest.raises(pf.OptionError, match=how):
                check_merge(2, None, how, **options | {option: value})


def test_a_generator_is_a_key():
    first, second = (
        check_merge(2, None, "dare_linear", None, 0.5, "total", torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    assert first.rule.key != second.rule.key
