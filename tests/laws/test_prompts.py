"""Prompts, prefixes and gated prompts obey the laws."""

import warnings
from typing import Any, ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st

import peft_func as pf
from tests.laws.addins import AddinLaws
from tests.laws.conformance import GRADS, KEYS, VALUES, close, perturbed
from tests.zoo import ZOO, ids

ATTENTIONS = pf.attentions()


class PromptLaws(AddinLaws):
    """Law 16 needs a net with tokens: a Llama that checkpoints its own layers."""

    DEEP: ClassVar[Any] = None

    @settings(max_examples=3)
    @given(KEYS)
    def test_16_checkpointing_inside_the_model(self, key):
        grads = []
        for segments in (False, True):
            net = ZOO["llama"].build().train()
            if segments:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # it has another name since transformers 5.23
                    net.gradient_checkpointing_enable({"use_reentrant": False})
            adapter = pf.bind(self.DEEP, pf.functionalize(net))
            frozen, tree = adapter.init(key)
            leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, key))
            adapter.model(adapter.apply(frozen, leaves), ids(2, 5, high=32)).logits.square().sum().backward()
            grads.append(pf.map_leaves(lambda t: t.grad, leaves))
        assert close(*grads, GRADS)
        assert all(leaf.any() for tree in grads[1].values() for place in tree.values() for leaf in place.values())


class NoIdentity(PromptLaws):
    @given(st.data())
    def test_01_identity_at_init(self, data):
        """Tokens attend to prompts from the start, whatever these are."""
        case = data.draw(self.cases())
        expected = case.animal.output(case.net(*case.args, **case.kwargs))
        start = case.call(case.start)
        assert start.shape == expected.shape
        assert not close(start, expected, VALUES)


class TestPromptTuning(NoIdentity):
    compiled = ["llama"]
    DEEP = pf.prompt_tuning(["embed_tokens"], tokens=3, reparameterize="mlp")
    CASES = {
        "llama": [pf.prompt_tuning(["embed_tokens"], tokens=3)],
        "bert": [pf.prompt_tuning(["word_embeddings"], tokens=2, after=1, reparameterize="mlp", hidden=4)],
        "gpt2": [pf.prompt_tuning(["wte"], tokens=3, init=[4, 5])],
    }


class TestPrefixTuning(NoIdentity):
    compiled = ["llama"]
    DEEP = pf.prefix_tuning(ATTENTIONS, tokens=3)
    CASES = {
        "llama": [pf.prefix_tuning(ATTENTIONS, tokens=3)],
        "bert": [pf.prefix_tuning(ATTENTIONS, tokens=2, reparameterize="mlp", hidden=4)],
        "gpt2": [pf.prefix_tuning(pf.attentions(1), tokens=3, shift=False)],
    }


class TestAdaptionPrompt(PromptLaws):
    """The gate starts at zero, and the prompts have no gradient before it moves."""

    compiled = ["llama"]
    DEEP = pf.adaption_prompt(ATTENTIONS, tokens=3)
    CASES = {
        "llama": [pf.adaption_prompt(ATTENTIONS, tokens=3)],
        "bert": [pf.adaption_prompt(ATTENTIONS, tokens=2, tanh=True)],
        "gpt2": [pf.adaption_prompt(pf.attentions(-1), tokens=4)],
    }
