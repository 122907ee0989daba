"""ResNet-18 by its names: what the GIFt library's document says of it, and a stand-in where torchvision is not."""

import torch
from torch import nn

SEED_TABLE = {
    "conv1": ((448, 3), (3, 21)),
    "layer1.0.conv1": ((192, 3), (3, 192)),
    "layer1.0.conv2": ((192, 3), (3, 192)),
    "layer1.1.conv1": ((192, 3), (3, 192)),
    "layer1.1.conv2": ((192, 3), (3, 192)),
    "layer2.0.conv1": ((384, 3), (3, 192)),
    "layer2.0.conv2": ((384, 3), (3, 384)),
    "layer2.0.downsample.0": ((128, 3), (3, 64)),
    "layer2.1.conv1": ((384, 3), (3, 384)),
    "layer2.1.conv2": ((384, 3), (3, 384)),
    "layer3.0.conv1": ((768, 3), (3, 384)),
    "layer3.0.conv2": ((768, 3), (3, 768)),
    "layer3.0.downsample.0": ((256, 3), (3, 128)),
    "layer3.1.conv1": ((768, 3), (3, 768)),
    "layer3.1.conv2": ((768, 3), (3, 768)),
    "layer4.0.conv1": ((1536, 3), (3, 768)),
    "layer4.0.conv2": ((1536, 3), (3, 1536)),
    "layer4.0.downsample.0": ((512, 3), (3, 256)),
    "layer4.1.conv1": ((1536, 3), (3, 1536)),
    "layer4.1.conv2": ((1536, 3), (3, 1536)),
    "fc": ((1000, 3), (3, 512)),
}  # the shapes of B and A in the table of the GIFt library's document


def resnet18_names():
    """The layers of ResNet-18 under torchvision's names, on the meta device; it cannot be called."""

    def block(inside, out, stride):
        layers = {"conv1": nn.Conv2d(inside, out, 3, stride, 1, bias=False), "bn1": nn.BatchNorm2d(out)}
        layers |= {"conv2": nn.Conv2d(out, out, 3, 1, 1, bias=False), "bn2": nn.BatchNorm2d(out)}
        if stride == 2:
            layers["downsample"] = nn.Sequential(nn.Conv2d(inside, out, 1, 2, bias=False), nn.BatchNorm2d(out))
        return nn.ModuleDict(layers)

    with torch.device("meta"):
        layers = {"conv1": nn.Conv2d(3, 64, 7, 2, 3, bias=False), "bn1": nn.BatchNorm2d(64)}
        for i, (inside, out) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
            layers[f"layer{i}"] = nn.Sequential(block(inside, out, 1 + (i > 1)), block(out, out, 1))
        net = nn.ModuleDict({**layers, "fc": nn.Linear(512, 1000)})
    assert sum(p.numel() for p in net.parameters()) == 11_689_512
    return net
