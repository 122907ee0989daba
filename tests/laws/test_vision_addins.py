"""AdaptFormer, Convpass, SSF, VPT, VQT and FacT obey the laws."""

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.addins.timm_vit import TimmViT
from tests.laws.addins import AddinLaws
from tests.laws.conformance import GRADS, KEYS, Case, Laws, close, perturbed
from tests.zoo import ZOO, randn, seeded

LINEAR = pf.of_type(nn.Linear)


def differs_at_init(case):
    expected = case.animal.output(case.net(*case.args, **case.kwargs))
    return not close(case.call(case.start), expected, 1e-6)


class TestAdaptFormer(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.adaptformer(r"blocks\.2", rank=2, activation="tanh")
    CASES = {
        "mlp": [
            pf.adaptformer("0|2", rank=2, scale="learned", activation="tanh"),
            pf.adaptformer("2", rank=2, form="sequential", layer_norm="out", activation="silu"),
        ],
        "vit": [
            pf.adaptformer(rank=3, activation="gelu"),
            pf.adaptformer(pf.blocks(-1), rank=3, layer_norm="in", activation="tanh"),
        ],
        "bert": [pf.adaptformer(rank=3, activation="tanh"), pf.adaptformer(rank=2, form="sequential")],
        "llama": [pf.adaptformer(rank=3, activation="tanh")],
    }


class TestConvpass(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.convpass(r"blocks\.2", rank=2, prefix=0, scale=1.0)
    CASES = {
        "mlp": [
            pf.convpass("2", rank=2, prefix=0, scale=1.0),
            pf.convpass("0|4", rank=2, prefix=1, grid=(1, 3), init="xavier"),
        ],
        "vit": [pf.convpass(rank=3, scale=0.1), pf.convpass(pf.attentions(0), rank=2, init="xavier")],
    }


class TestVPT(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.vpt(r"blocks\.(0|2|4)", tokens=2, prefix=0, bound=0.3)
    CASES = {
        "mlp": [
            pf.vpt(LINEAR, tokens=2, prefix=1, bound=0.3),
            pf.vpt("0|2", tokens=1, prefix=0, bound=0.3, deep=False),
        ],
        "vit": [pf.vpt(tokens=3), pf.vpt(tokens=2, deep=False, keep=True), pf.vpt(pf.blocks(1), tokens=1, dropout=0.5)],
        "bert": [pf.vpt(tokens=2, prefix=1, bound=0.3)],
    }

    @given(KEYS)
    def test_01_identity_at_init(self, key):
        """Prompts change what the other tokens see: there is no promise, and it is no identity."""
        assert differs_at_init(Case("vit", pf.vpt(tokens=3), key))


class TestVQT(AddinLaws):
    compiled = ["vit"]
    CASES = {"vit": [pf.vqt(tokens=2), pf.vqt(pf.blocks(-1), tokens=3, pool="mean")]}

    @pytest.mark.parametrize("reentrant", [False])
    @settings(max_examples=3)
    @given(KEYS)
    def test_16_checkpointing_inside_the_model(self, reentrant, key):
        grads = []
        for segments in (False, True):
            adapter = pf.bind(pf.vqt(tokens=2), pf.functionalize(seeded(lambda s=segments: TimmViT(segments=s))()))
            frozen, tree = adapter.init(key)
            leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, key))
            x = randn(2, 1, 6, 6, seed=1).requires_grad_()
            adapter.model(adapter.apply(frozen, leaves), x).square().sum().backward()
            grads.append([x.grad, *(leaf.grad for leaf in optree.tree_leaves(leaves))])
        assert close(grads[0], grads[1], GRADS)


class TestSSFActivations(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.ssf(r"blocks\.(0|4)", form="activations")
    CASES = {
        "mlp": [pf.ssf(LINEAR, form="activations"), pf.ssf("1", form="activations", width=8)],
        "conv": [pf.ssf("stem|norm|grouped|up|head", form="activations")],
        "llama": [pf.ssf(r".*(_proj|norm)", form="activations")],
        "vit": [pf.ssf(pf.blocks(), form="activations")],
    }


class Chosen(Laws):
    """Laws of methods that are listed, for animals that have the places."""

    CASES = {}

    @classmethod
    def method_on(cls, name, which=0):
        return cls.CASES[name][0]

    @classmethod
    def cases(cls, names=None):
        known = [name for name in cls.CASES if names is None or name in names]

        @st.composite
        def draw_case(draw):
            name = draw(st.sampled_from(known))
            return Case(name, draw(st.sampled_from(cls.CASES[name])), draw(KEYS))

        return draw_case()


class TestSSF(Chosen):
    compiled = ["mlp", "conv"]
    CASES = {
        "mlp": [pf.ssf(".*"), pf.ssf("0|2.weight")],
        "conv": [pf.ssf("stem|norm|dilated|head")],
        "attention": [pf.ssf(r"packed.*")],
        "bert": [pf.ssf(pf.of_type(nn.Linear, nn.LayerNorm)), pf.ssf(pf.blocks())],
        "gpt2": [pf.ssf(pf.of_type(nn.LayerNorm) | pf.suffix("c_attn"))],
        "vit": [pf.ssf(pf.blocks(1) | pf.path(".*projection"))],
    }


class TestFacTTT(Chosen):
    compiled = ["mlp"]
    CASES = {
        "mlp": [pf.fact("2", rank=2)],
        "bert": [pf.fact(pf.attentions(), rank=3, scale=0.5)],
        "gpt2": [pf.fact(pf.blocks(), rank=2), pf.fact(["c_attn", "c_proj"], rank=2, width=8)],
        "vit": [pf.fact(pf.blocks(), rank=2, width=8)],
    }


class TestFacTTK(Chosen):
    compiled = ["mlp"]
    CASES = {
        "mlp": [pf.fact("2", rank=2, how="tk")],
        "gpt2": [pf.fact(pf.blocks(), rank=2, how="tk")],
        "attention": [pf.fact(r"packed.*", rank=3, how="tk")],
    }


def test_the_cases_are_of_known_animals():
    for laws in (TestAdaptFormer, TestConvpass, TestVPT, TestVQT, TestSSF, TestFacTTT, TestFacTTK, TestSSFActivations):
        assert laws.CASES.keys() <= ZOO.keys()
        assert all(isinstance(method, pf.Part) for methods in laws.CASES.values() for method in methods)
    assert torch.is_tensor(randn(1))
