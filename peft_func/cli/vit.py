"""The demo's network: a small vision transformer, an ordinary `nn.Module` that knows nothing of adapters.

Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929, with mean pooling in place of a class token.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block: `x + attention(norm x)`, then `x + mlp(norm x)`; `[batch, tokens, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        update: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + update

    def attention(self, x: Tensor) -> Tensor:
        """Return the multi-head self-attention of `x` `[batch, tokens, width]`, in its shape."""
        # Written out, because F.scaled_dot_product_attention falls to a slow loop under vmap on the CPU.
        batch, tokens, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        mixed = torch.softmax(q @ k.mT / sqrt(width // self.heads), dim=-1) @ v
        y: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return y


class VisionTransformer(nn.Module):
    """Logits `[batch, classes]` for grey images `[batch, size, size]`.

    Args:
        classes: the number of outputs of the head.
        size: the height and width of an image, in pixels.
        patch: those of a patch, in pixels; it divides `size`.
        width: the number of features of a token.
        depth: the number of blocks.
        heads: the number of attention heads; it divides `width`.
    """

    def __init__(
        self, classes: int, *, size: int = 8, patch: int = 2, width: int = 48, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**2, width)
        self.position = nn.Parameter(torch.zeros((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        n, p = images.shape[-1] // self.patch, self.patch
        tokens = images.reshape(-1, n, p, n, p).transpose(2, 3).reshape(-1, n * n, p * p)
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def vision_transformer(key: int, classes: int) -> VisionTransformer:
    """Return a network whose first weights depend on the key only; the global generators are not touched.

    Args:
        key: a seed, as `torch.Generator.manual_seed` takes it.
        classes: the number of outputs of the head.
    """
    generator = torch.Generator().manual_seed(key)
    with torch.device("meta"):  # the layers' own initialisation draws from the global generator
        net = VisionTransformer(classes)
    net.to_empty(device="cpu")
    with torch.no_grad():
        net.position.normal_(generator=generator)  # as large as a patch: mean pooling must not lose where things are
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 1 / sqrt(module.in_features), generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    return net
