"""Networks whose units can be permuted, and digits to train small ones on."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import peft_func as pf


def shake(net, seed=0):
    """Give every parameter and every buffer a value of its own, so that nothing is at rest at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
            tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
    return net.double().eval()


class BasicBlock(nn.Module):
    def __init__(self, inputs, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride=1, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != 2 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


class ResNet(nn.Module):
    """The names and the wiring of torchvision's ResNet."""

    def __init__(self, block, widths=(4, 6), depth=2, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 4
        for number, width in enumerate(widths, 1):
            blocks = []
            for i in range(depth):
                blocks.append(block(inputs, width, stride=2 if i == 0 and number > 1 else 1, **options))
                inputs = width if block is BasicBlock else 2 * width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.layers = len(widths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.layers + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(self.avgpool(x).flatten(1))


@functools.cache
def digits():
    """Return training images and labels, then test images and labels: `[n, 64]` from 0 to 1."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images, labels = images.float() / 16, labels.long()
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def fit(net, seed, steps=300, shape=(64,)):
    """Train a module on the digits; return its model in eval mode."""
    images, labels, *_ = digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(steps):
        index = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(images[index].reshape(-1, *shape)), labels[index]).backward()
        optimizer.step()
    return pf.functionalize(net).eval()
