"""The models that the laws are checked on: small, float64, each with inputs and with selections that make sense."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf


@dataclass(frozen=True)
class Animal:
    """A model of the zoo.

    Attributes:
        build: makes the module, in float64 and eval mode.
        inputs: makes `(args, kwargs)` from a seed.
        output: takes the tensor out of what the module returns.
        where: selectors of matrices, from a few to all.
        narrow: a selector of places of one width, for sharing over all.
        densifies: whether something in it has no rule, and is formed.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    where: list[Any]
    narrow: Any
    output: Callable[[Any], Tensor] = field(default=lambda out: out)
    densifies: bool = False


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, high: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build in float64 and eval mode, from a fixed seed that leaves the global generator as it was."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = build().double().eval()
            for param in net.parameters():  # norms and biases at their defaults would hide mistakes
                param.data += 0.1 * torch.randn_like(param)
        return net

    return make


def one(*shape: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda seed: ((randn(*shape, seed=seed),), {})


def tokens(*shape: int, high: int = 32) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda seed: ((ids(*shape, high=high, seed=seed),), {})


class ConvNet(nn.Module):
    """Every kind of 2-D convolution that matters: strided, dilated, grouped, depthwise, circular; BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding="same", groups=4, padding_mode="circular", bias=False)
        self.dilated = nn.Conv2d(12, 6, (1, 3), dilation=2, padding=(0, 2), padding_mode="reflect")
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = torch.tanh(self.up(self.dilated(self.grouped(x))))
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8, padding_idx=0)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mix(self.embed(x)))))


class Shared(nn.Module):
    """One block, used twice and reachable by two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.blocks = nn.ModuleList([self.inner, nn.Linear(6, 6), self.inner])
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Attention(nn.Module):
    """`nn.MultiheadAttention` with packed and with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.separate = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4, add_bias_kv=True)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        x = x + self.packed(x, x, x, need_weights=False)[0]
        x = x + self.packed(x, key @ key.new_ones(6, 8), x)[0]
        return x + self.separate(x, key, value)[0]


class Experts(nn.Module):
    """Expert weights as 3-D parameters, by index, by `bmm` and by `baddbmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 6) / 3)  # [experts, out, in]
        self.down = nn.Parameter(torch.randn(3, 10, 6) / 3)  # [experts, in, out]
        self.plain = Conv1D(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.stack([torch.tanh(nn.functional.linear(x, self.up[e])) for e in range(3)])
        flat = hidden.reshape(3, -1, 10)
        mixed = torch.bmm(flat, self.down) + flat @ self.down
        return self.plain(mixed.view(3, *x.shape[:-1], 6).mean(0))


def bert(*, layers: int = 2, dropout: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(*, dropout: float = 0.0) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attention_dropout=dropout, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit(*, layers: int = 2, patch: int = 4, dropout: float = 0.0) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24, image_size=8,
        patch_size=patch, num_channels=1, num_labels=3, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def logits(out: Any) -> Tensor:
    return out.logits


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


ZOO: dict[str, Animal] = {
    "mlp": Animal(
        seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))),
        one(4, 5), [".*", "0", ["2"], pf.index(2, 4)], r"(.*\.)?2",
    ),
    "conv": Animal(
        seeded(ConvNet), one(2, 4, 8, 8), [".*", "stem|head", "grouped", pf.of_type(nn.ConvTranspose2d)], "up",
    ),
    "tied": Animal(seeded(Tied), tokens(2, 5), [".*", "head", "embed|mix"], ".*"),
    "shared": Animal(seeded(Shared), one(3, 6), [".*", "inner.0", r"blocks\.2\.0"], ".*"),
    "attention": Animal(
        seeded(Attention),
        lambda seed: ((randn(2, 3, 8, seed=seed), randn(2, 3, 6, seed=seed + 1), randn(2, 3, 4, seed=seed + 2)), {}),
        [r".*(in_proj|q_proj|k_proj|v_proj)_weight", ["out_proj"], "packed"], "packed",
    ),
    "encoder_layer": Animal(seeded(encoder_layer), one(2, 3, 8), [".*", "linear1", ["self_attn"]], "linear1"),
    "experts": Animal(seeded(Experts), one(4, 6), [".*", "up", "down", "plain"], "plain"),
    "bert": Animal(
        seeded(bert), tokens(2, 5),
        [pf.of_type(nn.Linear) & ~pf.path("classifier"), ["query", "value"], ".*embeddings.*"],
        ["query", "value"], logits,
    ),
    "gpt2": Animal(seeded(gpt2), tokens(2, 5), [".*", ["c_attn"], "lm_head"], ["c_attn"], logits),
    "llama": Animal(
        seeded(llama), tokens(2, 5), [pf.of_type(nn.Linear), ["q_proj", "v_proj"], ".*embed_tokens"], ["q_proj"], logits
    ),
    "vit": Animal(
        seeded(vit), one(2, 1, 8, 8), [pf.of_type(nn.Linear) & ~pf.path("classifier"), ".*projection"],
        pf.of_type(nn.Linear) & pf.suffix("q_proj") | pf.suffix("query"), logits,
    ),
}  # fmt: skip
