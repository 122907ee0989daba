"""The choice of a graph: costs against a count of the products that run, and what forces or forbids one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import peft_func as pf
from peft_func.weights.branch import Branch
from peft_func.weights.fused import input_side, linear
from peft_func.weights.graph import PLAIN, Graph, Shape, choose, listening
from tests.zoo import randn


def shape(tokens=4096, inputs=256, outputs=256, rank=8, **changes):
    given = {"trains": True, "needs_input": True, "may_form": True, "may_fuse": True} | changes
    return Shape(tokens, inputs, outputs, rank, **given)


def in_place(_, left, right, *args, out_shape=None, **kwargs):
    """Count `addmm_`, which the counter does not know."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("graph", ["factored", "formed"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("rank", [2, 8])
def test_costs_are_those_of_the_products_that_run(graph, trains, needs_input, on_input, rank):
    T, i, o = 24, 64, 48
    W, A = randn(o, i), randn(rank, i, seed=1).requires_grad_(trains)
    B = randn(i if on_input else o, rank, seed=2).requires_grad_(trains)
    x = randn(T, i, seed=3).requires_grad_(needs_input)
    seen = []
    with (
        pf.graph(graph),
        listening(lambda shape, choice: seen.append((shape, choice))),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter,
    ):
        y = (input_side if on_input else linear)(x, W, None, Branch(A, B, 0.5))
        if trains or needs_input:
            y.sum().backward()
    ((found, choice),) = seen
    assert found == Shape(T, i, o, rank, trains, needs_input, True, trains, on_input)
    assert choice.graph is (Graph(graph) if trains or graph == "formed" else Graph.COMPOSED)
    assert choice.fuses is trains
    # The base takes part in forward, and in backward if its input has a gradient.
    base = T * i * o * (1 + needs_input)
    assert counter.get_total_flops() == 2 * (base + choice.costs[Graph(graph)])


def test_a_branch_that_has_to_stay_inside_costs_a_product_with_the_base_in_a_first_layer():
    T, i, o = 24, 64, 48
    A, phi = randn(2, i, seed=1).requires_grad_(), randn(i, 2, seed=2).requires_grad_()
    x, seen = randn(T, i, seed=3), []
    with (
        pf.graph("factored"),
        listening(lambda _, choice: seen.append(choice)),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter,
    ):
        input_side(x, randn(o, i), None, Branch(A, phi, 0.5, dropped=x * 2)).sum().backward()
    (choice,) = seen
    assert not choice.absorbs
    assert choice.costs[Graph.FACTORED] > T * i * o
    assert counter.get_total_flops() == 2 * (T * i * o + choice.costs[Graph.FACTORED])


def test_many_tokens_are_formed_and_few_are_not():
    assert choose(shape(4096)).graph is Graph.FORMED
    assert choose(shape(256)).graph is Graph.FACTORED
    assert choose(shape(4096, may_form=False)).graph is Graph.FACTORED
    assert choose(shape(16)).graph is Graph.COMPOSED
    assert choose(shape(4096)).reason == "forming the matrix costs less"
    assert choose(shape(256)).reason == "the factors cost less"
    assert choose(shape(300)).reason == "forming the matrix saves less than a tenth"


@pytest.mark.parametrize("on_input", [False, True])
def test_the_chosen_graph_costs_least_or_nearly_so(on_input):
    for tokens in (64, 256, 1024, 4096):
        for inputs, outputs in ((256, 256), (1024, 4096), (4096, 1024)):
            given = shape(tokens, inputs, outputs, input_side=on_input)
            choice = choose(given)
            costs = choice.costs
            assert choice.graph is not Graph.COMPOSED
            assert costs[choice.graph] * 9 <= min(costs.values()) * 10


def test_what_is_kept_is_bounded():
    assert choose(shape(256, rank=8)).keeps
    assert not choose(shape(256, rank=9)).keeps
    assert choose(shape(256, outputs=512, rank=16)).keeps


def test_a_branch_on_the_input_goes_through_the_matrix_first_where_that_costs_less():
    assert choose(shape(2048, 1024, 256, input_side=True)).absorbs
    assert choose(shape(2048, 256, 256, input_side=True)).absorbs  # the copy of x costs more than W B
    assert not choose(shape(2048, 256, 1024, input_side=True)).absorbs
    assert choose(shape(2048, 256, 1024, input_side=True, needs_input=False)).absorbs  # its gradient needs no dy W
    assert not choose(shape(256, 1024, 1024, rank=64, input_side=True)).absorbs
    assert not choose(shape(2048, 1024, 256)).absorbs
    assert not choose(shape(2048, 1024, 256, input_side=True, may_form=False)).absorbs
    with pf.densify("error"):
        choice = choose(shape(2048, 1024, 256, input_side=True))
    assert choice.graph is Graph.FACTORED
    assert choice.absorbs
    assert "W B" in choice.reason


@pytest.mark.parametrize("on_input", [False, True])
def test_who_listens_sees_the_choice_that_is_made_when_nobody_does(on_input):
    small = choose(shape(16, input_side=on_input))
    assert small._replace(costs={}) == PLAIN


def test_it_can_be_forced_and_forbidden():
    with pf.graph("factored"):
        assert choose(shape(4096)).graph is Graph.FACTORED
        with pf.graph("auto"):
            assert choose(shape(4096)).graph is Graph.FORMED
        assert choose(shape(1)).graph is Graph.FACTORED
    with pf.graph("formed"):
        assert choose(shape(1)).graph is Graph.FORMED
        assert choose(shape(1, may_form=False)).graph is Graph.FACTORED
    with pf.densify("error"):
        assert choose(shape(4096)).graph is Graph.FACTORED
        with pf.graph("formed"):
            assert "densify" in choose(shape(4096)).reason
    assert choose(shape(4096)).graph is Graph.FORMED
    with (
        pytest.raises(pf.OptionError, match=r"'auto', 'composed', 'factored', 'formed', not 'dense'"),
        pf.graph("dense"),
    ):
        pass


def test_dropout_and_half_precision_are_never_formed():
    seen = []
    x = torch.ones(64, 8)
    A, B = torch.ones(2, 8, requires_grad=True), torch.ones(8, 2, requires_grad=True)
    with pf.graph("formed"), listening(lambda shape, choice: seen.append(choice.graph)):
        linear(x, torch.ones(8, 8), None, Branch(A, B, 1.0, dropped=x * 2))
        linear(x.bfloat16(), torch.ones(8, 8).bfloat16(), None, Branch(A, B, 1.0))
        linear(x, torch.ones(8, 8), None, Branch(A, B, 1.0))
    assert seen == [Graph.FACTORED, Graph.FACTORED, Graph.FORMED]


def test_a_choice_says_where_autograd_needs_no_function():
    seen = []
    x, W, A, B = torch.ones(512, 512), torch.ones(512, 512), torch.ones(2, 512), torch.ones(512, 2, requires_grad=True)
    with pf.densify("error"), listening(lambda shape, choice: seen.append(choice)):
        linear(x, W, None, Branch(A, B, 1.0))  # LoRA-FA
        linear(x, W, None, Branch(A.requires_grad_(), B, 1.0))
        linear(x, W.requires_grad_(), None, Branch(A, B, 1.0))  # the base trains, too
        with torch.no_grad():
            linear(x, W, None, Branch(A, B, 1.0))
    assert [choice.graph.value for choice in seen] == ["composed", "factored", "composed", "composed"]
    assert [choice.fuses for choice in seen] == [False, True, False, False]
    assert all("autograd" in choice.reason for choice in seen if not choice.fuses)
