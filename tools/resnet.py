"""ResNets (arXiv 1512.03385) in PyTorch, a peer to compare numbers with: tensors have torchvision's names, as those of src/encoder/resnet.rs do.

Maps are [N, C, H, W].
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from qb_heat import Kinked, Relu, halvings


@dataclass
class Table:
    width: int
    blocks: list[int]
    bottleneck: bool


TABLES = {
    "resnet-mini": Table(6, [2, 1, 0, 0], False),
    "resnet-mini-bottleneck": Table(6, [2, 1, 0, 0], True),
    "resnet-18": Table(64, [2, 2, 2, 2], False),
    "resnet-50": Table(64, [3, 4, 6, 3], True),
}


class MaxPool(Kinked):
    """Behind a ReLU; the derivative jumps where another position takes over, unless all of them are 0."""

    def forward(self, x):
        if Kinked.watched:
            windows = F.unfold(x, 3, padding=1, stride=2).reshape(len(x), x.shape[1], 9, -1)
            first, second = windows.topk(2, 2).values.unbind(2)
            self.note((first - second)[first > 0])
        return F.max_pool2d(x, 3, 2, 1)


class Block(nn.Module):
    def __init__(self, inputs: int, inside: int, outputs: int, stride: int):
        super().__init__()
        conv = lambda i, o, kernel, s=1: nn.Conv2d(i, o, kernel, s, kernel // 2, bias=False)
        self.bottleneck = outputs > inside
        self.conv1 = conv(inputs, inside, 1) if self.bottleneck else conv(inputs, inside, 3, stride)
        self.bn1, self.relu1 = nn.BatchNorm2d(inside), Relu()
        self.conv2 = conv(inside, inside, 3, stride if self.bottleneck else 1)
        self.bn2, self.relu2 = nn.BatchNorm2d(inside), Relu()
        if self.bottleneck:
            self.conv3, self.bn3, self.relu3 = conv(inside, outputs, 1), nn.BatchNorm2d(outputs), Relu()
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = self.downsample(x) if self.downsample else x
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if not self.bottleneck:
            return self.relu2(y + shortcut)
        return self.relu3(self.bn3(self.conv3(self.relu2(y))) + shortcut)


class ResNet(nn.Module):
    def __init__(self, table: Table, stride: int):
        super().__init__()
        own = [2 if stage and block == 0 else 1 for stage, n in enumerate(table.blocks) for block in range(n)]
        first, pool, *strides = halvings([2, 2] + own, stride)
        self.conv1, self.bn1 = nn.Conv2d(3, table.width, 7, first, 3, bias=False), nn.BatchNorm2d(table.width)
        self.relu, self.pool, width = Relu(), MaxPool() if pool == 2 else nn.Identity(), table.width
        for stage, n in enumerate(table.blocks):
            inside, blocks = table.width << stage, []
            outputs = 4 * inside if table.bottleneck else inside
            for _ in range(n):
                blocks.append(Block(width, inside, outputs, strides.pop(0)))
                width = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.channels = width

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
