"""The laws for what acts on activations: an add-in's test class inherits them, and names its cases."""

import copy
import pickle
from typing import Any, ClassVar

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_func as pf
from tests.laws.conformance import GRADS, KEYS, VALUES, Case, Laws, _Checkpointed, close, listed, perturbed
from tests.zoo import randn


class AddinLaws(Laws):
    """The laws of weight transforms, as they read for functions around modules.

    A subclass gives `CASES`: for animals of the zoo, methods that hold add-ins of its kind. `SMALL` is a method for
    the small model whose segments are checkpointed: layers `blocks.0`, `blocks.2`, `blocks.4` of the animal "mlp".
    """

    CASES: ClassVar[dict[str, list[Any]]] = {}
    SMALL: ClassVar[Any] = None
    files = True  # whether the method can be rebuilt from a file
    compiled: ClassVar[list[str]] = []

    @classmethod
    def method_on(cls, name: str, which: int = 0) -> Any:
        return cls.CASES[name][0]

    @classmethod
    def cases(cls, names: list[str] | None = None) -> st.SearchStrategy[Case]:
        return listed(cls.CASES, names)

    @given(st.data())
    def test_02_unselected_weights_are_the_same_objects(self, data):
        case = data.draw(self.cases())
        weights = case.adapter.apply(case.frozen, case.tree)
        touched = {path for part in case.adapter.parts for path in part.seen}
        assert all(weights[path] is case.model.params[path] for path in weights if path not in touched)
        assert weights.arounds

    @settings(max_examples=8)
    @given(st.data())
    def test_03_merge_is_the_call(self, data):
        """What cannot be merged is exported: a plain module with the same output, also after pickling."""
        case = data.draw(self.cases())
        with pytest.raises(pf.AddinError, match="export_module"):
            pf.merge(case.adapter.apply(case.frozen, case.tree))
        module = pf.export_module(case.adapter, case.frozen, case.tree)
        expected = case.call(case.tree)
        assert close(case.animal.output(module(*case.args, **case.kwargs)), expected, VALUES)
        again = pickle.loads(pickle.dumps(module))
        assert close(case.animal.output(again(*case.args, **case.kwargs)), expected, VALUES)
        twin = pf.export_module(case.adapter, case.frozen, case.start)
        twin.load_state_dict(module.state_dict(), strict=True)
        assert close(case.animal.output(twin(*case.args, **case.kwargs)), expected, VALUES)

    @given(st.data())
    def test_04_structured_is_dense(self, data):
        """A weight transform in the same chain gives what it gives when its effective weights are formed."""
        case = data.draw(self.cases())
        lora = pf.lora(case.animal.where[0], rank=1, name="weights")
        adapter = pf.bind(pf.chain(case.method, lora), case.model)
        frozen, tree = adapter.init(case.key)
        tree = perturbed(tree, case.key)
        alone = pf.bind(lora, case.model)
        dense = pf.merge(alone.apply(alone.init(0)[0], {"weights": tree["weights"]}))
        formed = copy.deepcopy(case.net)
        formed.load_state_dict(dense, strict=False)
        plain = pf.bind(case.method, pf.functionalize(formed))
        own = {name: sub for name, sub in tree.items() if name != "weights"}
        weights = plain.apply(plain.init(0)[0], own)
        assert close(case.run(adapter.apply(frozen, tree)), case.run(weights, plain.model), VALUES)

    @given(st.data())
    def test_06_purity(self, data):
        case = data.draw(self.cases())
        before, rng = [tensor.clone() for tensor in case.net.state_dict().values()], torch.get_rng_state()
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), case.tree)
        case.run(case.adapter.apply(case.frozen, leaves)).sum().backward()
        assert torch.equal(rng, torch.get_rng_state())
        assert all(map(torch.equal, before, case.net.state_dict().values()))
        assert not any("forward" in vars(module) for module in case.net.modules())
        assert not any("forward" in vars(module) for module in case.model._skeleton.root.modules())
        expected = case.animal.output(case.net(*case.args, **case.kwargs))
        assert close(case.run(case.model.params), expected, VALUES)

    @given(st.data())
    def test_10_save_and_load(self, data):
        if self.files:
            Laws.test_10_save_and_load.hypothesis.inner_test(self, data)
        else:
            case = data.draw(self.cases())
            assert any(part.options is None for part in case.adapter.parts)

    @settings(max_examples=10)
    @given(st.data(), st.sampled_from([torch.float16, torch.bfloat16]))
    def test_14_half_precision_merge_is_rounded_once(self, data, dtype):
        """On a base in half precision the call runs, gives that dtype, and is near the one in double."""
        case = data.draw(self.cases())
        half = pf.functionalize(copy.deepcopy(case.net).to(dtype))
        adapter = pf.bind(case.method, half)
        frozen, tree = adapter.init(case.key)
        tree = pf.map_leaves(lambda own, like: own.to(like.dtype), case.tree, tree)
        cast = lambda value: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        args, kwargs = tuple(map(cast, case.args)), {name: cast(value) for name, value in case.kwargs.items()}
        output = case.animal.output(half(adapter.apply(frozen, tree), *args, **kwargs))
        assert output.dtype is dtype
        assert torch.allclose(output.double(), case.call(case.tree), atol=0.3, rtol=0.1)

    @pytest.mark.parametrize("reentrant", [False])
    @given(st.data())
    @settings(max_examples=5)
    def test_16_checkpointing_inside_the_model(self, reentrant, data):
        if self.SMALL is None:
            pytest.fail("name a method for the small model that checkpoints its segments")
        key = data.draw(KEYS)
        grads = []
        for segments in (False, True):
            adapter = pf.bind(self.SMALL, pf.functionalize(_Checkpointed(segments, reentrant)))
            frozen, tree = adapter.init(key)
            leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, key))
            x = randn(4, 5, seed=1).requires_grad_()
            adapter.model(adapter.apply(frozen, leaves), x).square().sum().backward()
            grads.append([x.grad, *(leaf.grad for leaf in optree.tree_leaves(leaves))])
        assert close(grads[0], grads[1], GRADS)

    @pytest.mark.parametrize("name", ["first", "last"])
    def test_15_threads(self, name):
        animal = list(self.CASES)[0 if name == "first" else -1]
        self.check_threads(Case(animal, self.CASES[animal][0], 11), times=25)
