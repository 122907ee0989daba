"""AdaptFormer, Convpass, SSF, VPT, VQT and FacT obey the laws."""

from typing import ClassVar

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.addins.timm_vit import TimmViT
from tests.laws.addins import AddinLaws
from tests.laws.conformance import GRADS, KEYS, Case, Laws, _same_with_gradients, close, listed, perturbed
from tests.zoo import randn, seeded

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


class OnImages(AddinLaws):
    """What needs tokens of images: the small model that checkpoints its segments is a vision transformer."""

    @pytest.mark.parametrize("reentrant", [False])
    @settings(max_examples=2)
    @given(KEYS)
    def test_16_checkpointing_inside_the_model(self, reentrant, key):
        grads = []
        for segments in (False, True):
            adapter = pf.bind(self.SMALL, pf.functionalize(seeded(lambda s=segments: TimmViT(segments=s))()))
            frozen, tree = adapter.init(key)
            leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, key))
            x = randn(2, 1, 6, 6, seed=1).requires_grad_()
            adapter.model(adapter.apply(frozen, leaves), x).square().sum().backward()
            grads.append([x.grad, *(leaf.grad for leaf in optree.tree_leaves(leaves))])
        assert close(grads[0], grads[1], GRADS)


class TestConvpassAndVQT(OnImages):
    SMALL = pf.chain(pf.convpass(rank=2, scale=1.0), pf.vqt(tokens=2))
    CASES = {
        "vit": [
            pf.convpass(rank=3, scale=0.1),
            pf.vqt(tokens=2),
            pf.chain(
                pf.vqt(pf.blocks(-1), tokens=3, pool="mean"), pf.convpass(pf.attentions(0), rank=2, init="xavier")
            ),
        ]
    }


class TestVPT(OnImages):
    SMALL = pf.chain(pf.vpt(tokens=7), pf.convpass(pf.mlps(), rank=2, scale=1.0))
    CASES = {
        "vit": [pf.vpt(tokens=3), pf.vpt(tokens=2, deep=False, keep=True)],
        "bert": [pf.vpt(tokens=2, prefix=1, bound=0.3)],
    }

    @given(KEYS)
    def test_01_identity_at_init(self, key):
        """Prompts change what the other tokens see: there is no promise, and it is no identity."""
        assert differs_at_init(Case("vit", pf.vpt(tokens=3), key))

    @given(st.data())
    def test_18_route_is_the_loop(self, data):
        """Every sample needs an adapter: one batch cannot hold sequences with prompts and sequences without."""
        case = data.draw(self.cases())
        members = case.members()
        (x,) = case.args
        index = data.draw(st.lists(st.integers(0, 2), min_size=len(x), max_size=len(x)))

        def together(stacked):
            return case.run(pf.route(case.adapter, case.frozen, stacked, torch.tensor(index)))

        def loop(trees):
            one = lambda i, k: case.model(case.adapter.apply(case.frozen, trees[k]), x[i : i + 1])
            return torch.cat([case.animal.output(one(i, k)) for i, k in enumerate(index)])

        _same_with_gradients(together, loop, members)
        with pytest.raises(pf.RouteError, match="-1"):
            case.run(pf.route(case.adapter, case.frozen, pf.stack(members), torch.tensor([0, -1])))


class TestSSFActivations(AddinLaws):
    SMALL = pf.ssf(r"blocks\.(0|4)", form="activations")
    CASES = {
        "mlp": [pf.ssf(LINEAR, form="activations"), pf.ssf("1", form="activations", width=8)],
        "conv": [pf.ssf("stem|norm|grouped|up|head", form="activations")],
        "llama": [pf.ssf(r".*(_proj|norm)", form="activations")],
    }


class Chosen(Laws):
    """Laws of methods that are listed, for animals that have the places."""

    CASES: ClassVar = {}
    SMALL: ClassVar = None

    @classmethod
    def methods(cls, animal, where):
        return st.just(cls.SMALL)

    def test_15_threads(self):
        Laws.test_15_threads(self, "mlp")

    @classmethod
    def method_on(cls, name, which=0):
        return cls.CASES[name][0]

    @classmethod
    def cases(cls, names=None):
        return listed(cls.CASES, names)


class TestSSF(Chosen):
    SMALL = pf.ssf(".*")
    compiled = ["conv"]
    CASES = {
        "mlp": [pf.ssf(".*"), pf.ssf("0|2.weight")],
        "conv": [pf.ssf("stem|norm|dilated|head")],
        "attention": [pf.ssf(r"packed.*")],
        "bert": [pf.ssf(pf.of_type(nn.Linear, nn.LayerNorm)), pf.ssf(pf.blocks())],
        "gpt2": [pf.ssf(pf.of_type(nn.LayerNorm) | pf.suffix("c_attn"))],
        "vit": [pf.ssf(pf.blocks(1) | pf.path(".*projection"))],
    }


class TestFacT(Chosen):
    SMALL = pf.fact(r"blocks\.2", rank=3)
    compiled = ["mlp"]
    CASES = {
        "mlp": [pf.fact("2", rank=2, how="tk"), pf.fact("2", rank=3)],
        "bert": [pf.fact(pf.attentions(), rank=3, scale=0.5)],
        "gpt2": [pf.fact(pf.blocks(), rank=2), pf.fact(["c_attn", "c_proj"], rank=2, width=8, how="tk")],
        "attention": [pf.fact(r"packed.*", rank=3, how="tk")],
        "vit": [pf.fact(pf.blocks(), rank=2, width=8)],
    }
