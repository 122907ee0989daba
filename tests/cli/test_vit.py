"""The network: its attention is torch's own, its patches are where they belong, its weights come from the key."""

import torch
import torch.nn.functional as F

from peft_func.cli.vit import VisionTransformer, vision_transformer


def test_attention_is_that_of_torch():
    block = vision_transformer(0, 5).double().blocks[0]
    x = torch.randn(2, 16, 48, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (4, 12)).transpose(1, 2) for p in (block.q_proj, block.k_proj, block.v_proj))
    expected = block.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(block.attention(x), expected)


def test_patches_are_those_of_a_convolution():
    net = VisionTransformer(5, depth=0, width=6, heads=1)
    images = torch.randn(3, 8, 8)
    kernel = net.embed.weight.reshape(6, 1, 2, 2)
    tokens = F.conv2d(images[:, None], kernel, net.embed.bias, stride=2).flatten(2).mT
    expected = net.head(net.norm(tokens + net.position).mean(1))
    torch.testing.assert_close(net(images), expected)


def test_the_key_decides():
    state = torch.get_rng_state()
    first, again, other = (vision_transformer(key, 5).state_dict() for key in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in first.values())
