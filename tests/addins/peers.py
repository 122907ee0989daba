"""HF PEFT's adapters, as peers."""

import copy

import pytest
import torch
from peft import get_peft_model

from tests.addins.small import X

QUIET = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # transformers', of PEFT
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "SEQ_CLS"}


def peer(net, config):
    """A copy of a net with PEFT's adapter, whose first values are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(copy.deepcopy(net), config).double().eval()


def labels_for(animal):
    return torch.tensor([0, 1]) if animal == "bert" else X
