"""The method of a merged adapter."""

import peft_func as pf
from peft_func.ensemble.rebuild import Plan, plan_of, rebuild
from tests.ensemble.merging import every


def test_additive_parts_keep_what_no_other_changes():
    _, model = every()
    adapter = pf.bind(pf.chain(pf.lora(["linear", "gpt"], rank=2), pf.ia3("gpt"), pf.train("norm|gpt")), model)
    plan = plan_of(adapter)
    assert plan.kept == {
        ("lora",): ("linear.weight",),
        ("ia3",): (),
        ("train",): ("gpt.bias", "norm.weight", "norm.bias"),
    }
    assert plan.formed == ("gpt.weight",)


def test_biases_of_a_low_rank_part_go_together():
    _, model = every()
    adapter = pf.bind(pf.chain(pf.lora(["linear", "gpt"], rank=2, bias=True), pf.ia3("gpt")), model)
    plan = plan_of(adapter)
    assert plan.kept[("lora",)] == ("linear.weight",)
    assert set(plan.formed) == {"gpt.weight", "gpt.bias", "linear.bias"}
    method, keys = rebuild(adapter, plan, {("lora",): {"linear.weight": 2}})
    assert keys == ("delta",)
    assert pf.bind(method, model).held == set(plan.formed)


def test_low_rank_parts_have_scale_one_and_the_ranks_by_path():
    _, model = every()
    method = pf.chain(
        pf.chain(pf.lora(["linear", "gpt", "conv"], rank=2, alpha=9, rank_stabilized=True, dropout=0.25), name="c"),
        pf.ia3("experts"),
    )
    adapter = pf.bind(method, model)
    ranks = {"linear.weight": 3, "gpt.weight": 1, "conv.weight": 3}
    again = pf.bind(rebuild(adapter, Plan.of_all(adapter), {("c", "lora"): ranks})[0], model)
    options = again.parts[0].options
    assert (options["rank"], options["rank_pattern"], options["alpha_pattern"]) == (3, {"gpt.weight": 1}, {})
    assert (options["alpha"], options["rank_stabilized"], options["dropout"]) == (None, False, 0.25)
    assert [part.keys for part in again.parts] == [("c", "lora"), ("ia3",)]
    assert again.method.parts[1] is method.parts[1]
