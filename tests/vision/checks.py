"""The checks on torchvision's and timm's models; run as a program, because of what the imports need."""

import copy
import os
import sys
import traceback
import warnings

import torch

sys.path.append(os.environ["VISION"])
_register = torch.library.register_fake


def _register_fake(name, *args, **kwargs):
    """Skip the fake kernels of operators that torchvision's wheel brings for another build of torch."""
    if isinstance(name, str) and name.startswith("torchvision::"):
        return lambda function: function
    return _register(name, *args, **kwargs)


torch.library.register_fake = _register_fake
import timm  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

import peft_func as pf  # noqa: E402
from peft_func.trees import paths  # noqa: E402
from tests.transforms.resnet18 import SEED_TABLE  # noqa: E402

torch.library.register_fake = _register
MATRICES = pf.of_type(nn.Linear, nn.Conv2d)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def resnet():
    return torchvision.models.resnet18(), randn(2, 3, 32, 32)


def vit():
    net = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    )
    return net, randn(3, 3, 16, 16)


def convnext():
    setting = [
        torchvision.models.convnext.CNBlockConfig(8, 16, 1),
        torchvision.models.convnext.CNBlockConfig(16, None, 1),
    ]
    return torchvision.models.ConvNeXt(setting, num_classes=5), randn(2, 3, 16, 16)


def mobilenet():
    return torchvision.models.mobilenet_v3_small(num_classes=5), randn(2, 3, 32, 32)


def timm_vit():
    net = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=5, init_values=0.1
    )
    return net, randn(3, 3, 16, 16)


def timm_vit_tiny():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5), randn(1, 3, 224, 224)


def timm_mixer():
    return timm.models.MlpMixer(img_size=16, patch_size=4, embed_dim=16, num_blocks=2, num_classes=5), randn(
        2, 3, 16, 16
    )


NETS = [resnet, vit, convnext, mobilenet, timm_vit, timm_vit_tiny, timm_mixer]


def built(make):
    torch.manual_seed(0)
    net, x = make()
    net = net.double().eval()
    for tensor in net.parameters():
        tensor.data += 0.02 * torch.randn_like(tensor)
    for name, buffer in net.named_buffers():
        if buffer.is_floating_point() and "running" in name:
            buffer.data += 0.2 * torch.rand_like(buffer)
    return net, x


def moved(tree, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return pf.map_leaves(lambda t: t + scale * torch.randn(t.shape, dtype=t.dtype, generator=generator), tree)


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


METHODS = {
    "lora": lambda net: pf.lora(MATRICES, rank=1 if net is mobilenet else 2, alpha=3),
    "gift": lambda net: pf.gift(MATRICES, rank=1 if net is mobilenet else 2, share="none"),
    "ia3": lambda net: pf.ia3(MATRICES, scale_bias=True),
    "dora": lambda net: pf.dora(MATRICES, rank=1 if net is mobilenet else 2),
    "balanced": lambda net: pf.lora(MATRICES, rank=3, conv="balanced"),
    "packed": lambda net: pf.lora(r".*(in_proj_weight|qkv\.weight)", rank=2),
    "chain": lambda net: pf.chain(
        pf.lora(MATRICES, rank=1), pf.gift(MATRICES, rank=1, share="none"), pf.train(r".*bias")
    ),
}


def check_merge(make, method):
    """model(weights) is the module with the merged state dict loaded, gradients included; nothing is formed."""
    net, x = built(make)
    model = pf.functionalize(net)
    adapter = pf.bind(METHODS[method](make), model)
    frozen, start = adapter.init(0)
    before = {name: (tensor, tensor._version, tensor.clone()) for name, tensor in net.state_dict().items()}
    same(model(adapter.apply(frozen, start), x), net(x).detach())

    tree = pf.map_leaves(lambda t: t.requires_grad_(), moved(start))
    leaves = [leaf for _, leaf in paths.leaves(tree)]
    with pf.densify("error"):
        weights = adapter.apply(frozen, tree)
        out = model(weights, x)
        grads = torch.autograd.grad(out.square().sum(), leaves)
    plain = copy.deepcopy(net)
    plain.load_state_dict(model.state_dict(weights), strict=True)
    same(out, plain(x), 1e-10)
    assert (out - net(x)).abs().max() > 1e-4
    dense = torch.autograd.grad(model(pf.merge(adapter.apply(frozen, tree)), x).square().sum(), leaves)
    for grad, expected in zip(grads, dense, strict=True):
        scale = max(1.0, expected.abs().max().item())
        same(grad / scale, expected / scale, 1e-8)
    for name, tensor in net.state_dict().items():
        _, version, value = before[name]
        assert tensor._version == version, name
        assert torch.equal(tensor, value), name


def check_statistics(make, method):
    """BatchNorm in train mode: with_state returns what the plain module's buffers become, and changes none."""
    net, x = built(make)
    net.train()
    model = pf.functionalize(net)
    adapter = pf.bind(METHODS[method](make), model)
    frozen, start = adapter.init(0)
    weights = adapter.apply(frozen, moved(start))
    plain = copy.deepcopy(net)
    plain.load_state_dict(model.state_dict(weights))
    before = {name: tensor.clone() for name, tensor in model.state.items()}
    state = model.state
    with pf.densify("error"):
        for step in range(3):
            out, state = model.with_state(weights, state, x + step)
            same(out, plain(x + step), 1e-9)
    buffers = dict(plain.named_buffers())
    assert any(name.endswith("running_var") for name in buffers)
    assert set(state) == set(buffers)
    for name, tensor in buffers.items():
        same(state[name], tensor, 1e-9)
        assert torch.equal(model.state[name], before[name]), name
        assert torch.equal(dict(net.named_buffers())[name], before[name]), name
    assert int(state["bn1.num_batches_tracked"]) == 3
    evaluated = copy.deepcopy(net).eval()
    evaluated.load_state_dict(model.state_dict(weights, state))
    same(model.eval().with_state(weights, state, x)[0], evaluated(x), 1e-9)


def check_vmap(make, method):
    """vmap over stacked adapters is the loop, forward and gradient."""
    net, x = built(make)
    model = pf.functionalize(net)
    adapter = pf.bind(METHODS[method](make), model)
    frozen, start = adapter.init(0)
    members = [moved(start, seed) for seed in range(3)]
    call = lambda tree: model(adapter.apply(frozen, tree), x)
    loss = lambda tree: call(tree).square().mean()
    with pf.densify("error"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        outputs = torch.vmap(call)(pf.stack(members))
        grads = torch.vmap(torch.func.grad(loss))(pf.stack(members))
    same(outputs, torch.stack([call(tree) for tree in members]))
    expected = pf.stack([torch.func.grad(loss)(tree) for tree in members])
    for (keys, grad), (_, wanted) in zip(paths.leaves(grads), paths.leaves(expected), strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(
            grad / scale, wanted / scale, atol=1e-8, rtol=1e-8, msg=lambda m, k=keys: f"{k}: {m}"
        )


def check_one_channel_of_state_under_vmap(make, method):
    """Each member of a stack gets running statistics of its own."""
    net, x = built(make)
    model = pf.functionalize(net).train()
    adapter = pf.bind(METHODS[method](make), model)
    frozen, start = adapter.init(0)
    members = [moved(start, seed) for seed in range(2)]
    step = lambda tree, state: model.with_state(adapter.apply(frozen, tree), state, x)
    states = {name: torch.stack([t, t]) for name, t in model.state.items()}
    outputs, new = torch.vmap(step)(pf.stack(members), states)
    for i, tree in enumerate(members):
        out, state = step(tree, model.state)
        same(outputs[i], out, 1e-9)
        for name in state:
            same(new[name][i], state[name], 1e-9)


def check_seed_table(make, method):
    """The leaves of LoRA over the balanced views are those of the GIFt library's table, row by row."""
    net, _ = make()
    adapter = pf.bind(METHODS[method](make), pf.functionalize(net))
    leaves = adapter.init(0)[1]["lora"]
    assert list(leaves) == [f"{name}.weight" for name in SEED_TABLE]
    for name, (B, A) in SEED_TABLE.items():
        assert tuple(leaves[f"{name}.weight"]["B"].shape) == B, name
        assert tuple(leaves[f"{name}.weight"]["A"].shape) == A, name
    assert sum(leaf.numel() for _, leaf in paths.leaves(leaves)) == 75_063


def check_count_of_shifts(make, method):
    """SVDiff trains as many values as in the GIFt library."""
    net, _ = make()
    adapter = pf.bind(pf.svdiff(MATRICES), pf.functionalize(net))  # no init: it decomposes
    assert sum(torch.Size(shape).numel() for shape in adapter.spec.values()) == 11_157


ADDINS = {
    "adaptformer": lambda: pf.adaptformer(rank=3),
    "convpass": lambda: pf.convpass(rank=3, scale=0.5),
    "vpt": lambda: pf.vpt(tokens=2),
    "vqt": lambda: pf.vqt(tokens=2),
    "ssf": lambda: pf.ssf(pf.of_type(nn.Linear, nn.LayerNorm)),
    "fact": lambda: pf.fact(pf.blocks(), rank=2),
}


def check_addin(make, method):
    """An add-in finds its places by structure; it is the identity at the start, but for prompts."""
    net, x = built(make)
    model = pf.functionalize(net)
    adapter = pf.bind(ADDINS[method](), model)
    frozen, start = adapter.init(0)
    out = model(adapter.apply(frozen, start), x)
    moved_out = model(adapter.apply(frozen, moved(start)), x)
    assert out.shape == moved_out.shape == net(x).shape
    assert (moved_out - out).abs().max() > 1e-6
    if method == "vpt":
        assert (out - net(x)).abs().max() > 1e-6
    else:
        same(out, net(x).detach())


@torch.no_grad()
def check_timm_steps(make, method):
    """AdaptFormer and deep prompts on timm's own blocks, whose layer scales do not act on the branch, step by step."""
    net, x = built(make)
    model = pf.functionalize(net)
    adapter = pf.bind(ADDINS[method](), model)
    frozen, start = adapter.init(0)
    tree = moved(start, scale=0.2)
    h = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))
    for i, block in enumerate(net.blocks):
        leaves = tree[method][f"blocks.{i}"]
        if method == "vpt":
            prompt = leaves["prompt"].expand(len(h), -1, -1)
            h = torch.cat([h[:, :1], prompt, h[:, 3 if i else 1 :]], 1)
        h = h + block.ls1(block.attn(block.norm1(h)))
        branch = 0.0
        if method == "adaptformer":
            inside = torch.relu(h @ leaves["down"].T + leaves["down_bias"])
            branch = 0.1 * (inside @ leaves["up"].T + leaves["up_bias"])
        h = h + block.ls2(block.mlp(block.norm2(h))) + branch
    if method == "vpt":
        h = torch.cat([h[:, :1], h[:, 3:]], 1)
    same(model(adapter.apply(frozen, tree), x), net.forward_head(net.norm(h)))


def check_presets(make, method):
    """Presets find the head, the last norm and the last blocks."""
    net, _ = built(make)
    model = pf.functionalize(net)
    names = lambda preset: set(pf.bind(preset, model).init(0)[1]["train"])
    head = {name for name in model.params if name.startswith("head")}
    assert names(pf.linear_probe()) == head == {name for name in head if name.endswith(("weight", "bias"))}
    last = ("blocks.1.", "encoder.layers.encoder_layer_1.", "norm.", "encoder.ln.")
    assert names(pf.partial(1)) == head | {name for name in model.params if name.startswith(last)}
    assert names(pf.full()) == set(model.params)


CHECKS = {
    **{f"merge {net.__name__} {m}": (check_merge, net, m) for net in NETS for m in ("lora", "gift")},
    **{f"merge {net.__name__} {m}": (check_merge, net, m) for net in (resnet, vit, timm_vit, mobilenet)
       for m in ("ia3", "dora", "chain")},
    **{f"merge {net.__name__} packed": (check_merge, net, "packed") for net in (vit, timm_vit, timm_vit_tiny)},
    **{f"statistics resnet {m}": (check_statistics, resnet, m) for m in ("lora", "gift")},
    **{f"vmap {net.__name__} {m}": (check_vmap, net, m) for net in (resnet, vit, timm_vit, convnext)
       for m in ("lora", "gift")},
    "vmap statistics resnet": (check_one_channel_of_state_under_vmap, resnet, "lora"),
    "merge resnet balanced": (check_merge, resnet, "balanced"),
    "table resnet balanced": (check_seed_table, resnet, "balanced"),
    "count resnet svdiff": (check_count_of_shifts, resnet, "svdiff"),
    **{f"addin {net.__name__} {m}": (check_addin, net, m) for net in (vit, timm_vit) for m in ADDINS if m != "fact"},
    "addin timm_vit_tiny fact": (check_addin, timm_vit_tiny, "fact"),
    **{f"steps timm_vit {m}": (check_timm_steps, timm_vit, m) for m in ("adaptformer", "vpt")},
    **{f"presets {net.__name__}": (check_presets, net, "") for net in (vit, timm_vit)},
}  # fmt: skip


def main():
    """Run all checks and print a report."""
    torch.set_num_threads(1)
    for name, (check, make, method) in CHECKS.items():
        try:
            check(make, method)
            result = "ok"
        except Exception:  # noqa: BLE001
            result = traceback.format_exc()
        print(f"\n=== {name}\n{result}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
