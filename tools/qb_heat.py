"""QB-Heat and its encoder in PyTorch, a peer to compare numbers and speed with: names and layouts are the Rust side's.

Images and maps are [N, C, H, W], sequences [N, T, C].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class Kinked(nn.Module):
    """An activation that can remember how near its inputs came to a place where its derivative jumps."""

    watched = False
    nearest = float("inf")

    def note(self, *distances):
        if Kinked.watched:
            self.nearest = min(distance.detach().abs().min().item() for distance in distances)


class Relu(Kinked):
    def forward(self, x):
        self.note(x)
        return F.relu(x)


class Relu6(Kinked):
    def forward(self, x):
        self.note(x, x - 6)
        return F.relu6(x)


def nearest_kink(network: nn.Module) -> float:
    return min(layer.nearest for layer in network.modules() if isinstance(layer, Kinked))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, inside: int, outputs: int, stride: int, activation: type[Kinked] = Relu):
        super().__init__()
        if inside > inputs:
            self.expand, self.expand_norm = nn.Conv2d(inputs, inside, 1, bias=False), nn.BatchNorm2d(inside)
            self.activation = activation()
        self.depthwise = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False)
        self.depthwise_norm, self.activation2 = nn.BatchNorm2d(inside), activation()
        self.project, self.project_norm = nn.Conv2d(inside, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.widens, self.skip = inside > inputs, stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.activation(self.expand_norm(self.expand(x))) if self.widens else x
        y = self.activation2(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.skip else y


@dataclass
class Table:
    stem: int
    rows: list[tuple[int, int, int]]
    head: int
    activation: type[Kinked]


TINY = Table(24, [(48, 24, 1), (96, 32, 2), (128, 32, 1), (128, 32, 1), (160, 64, 2), (256, 64, 1), (256, 64, 1),
                  (320, 96, 1), (384, 96, 1), (384, 96, 1)], 192, Relu)
V2 = Table(32, [(32, 16, 1), (96, 24, 2), (144, 24, 1), (144, 32, 2), (192, 32, 1), (192, 32, 1), (192, 64, 2),
                (384, 64, 1), (384, 64, 1), (384, 64, 1), (384, 96, 1), (576, 96, 1), (576, 96, 1), (576, 160, 2),
                (960, 160, 1), (960, 160, 1), (960, 320, 1)], 1280, Relu6)


def halvings(strides: list[int], stride: int) -> list[int]:
    """Of a network's own strides, the first that halve are left out until `stride` in all remains."""
    strides = list(strides)
    for i in range(len(strides)):
        if torch.tensor(strides).prod() == stride:
            break
        strides[i] = 1
    return strides


class MobileNet(nn.Module):
    def __init__(self, table: Table, stride: int):
        super().__init__()
        first, *strides = halvings([2] + [s for _, _, s in table.rows], stride)
        self.stem, self.stem_norm = nn.Conv2d(3, table.stem, 3, first, 1, bias=False), nn.BatchNorm2d(table.stem)
        self.activation, self.blocks, width = table.activation(), nn.ModuleList(), table.stem
        for (inside, outputs, _), s in zip(table.rows, strides):
            self.blocks.append(InvertedResidual(width, inside, outputs, s, table.activation))
            width = outputs
        self.head, self.head_norm = nn.Conv2d(width, table.head, 1, bias=False), nn.BatchNorm2d(table.head)
        self.channels = table.head

    def forward(self, x):
        x = self.activation(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head_norm(self.head(x))


class Propagator(nn.Module):
    """Matrices [k, C, C]: x, y for one an axis; left, right, up, down for one a direction."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        self.kind = kind
        self.matrices = nn.Parameter(torch.zeros(2 if kind in ("signed", "exponential") else 4, channels, channels))

    def step(self, z, axis: int, sign: int):
        if self.kind == "signed":
            return z + sign * (z @ self.matrices[axis].T)
        if self.kind == "exponential":
            return z @ torch.linalg.matrix_exp(sign * self.matrices[axis]).T
        m = self.matrices[2 * axis + (sign > 0)]
        if self.kind == "separate":
            return z + z @ m.T
        unit = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return z + unit @ m.T

    def forward(self, z, row: int, column: int):
        """The visible quarter's place to {(row, column): features}."""
        sx, sy = (1 if column == 0 else -1), (1 if row == 0 else -1)
        beside, below = self.step(z, 0, sx), self.step(z, 1, sy)
        across = 0.5 * (self.step(beside, 1, sy) + self.step(below, 0, sx))
        return {(row, column): z, (row, 1 - column): beside, (1 - row, column): below, (1 - row, 1 - column): across}


class Decoder(nn.Module):
    def __init__(self, channels: int, width: int, depth: int, patch: int):
        super().__init__()
        self.embed, self.norm, self.pixels = nn.Linear(channels, width), nn.LayerNorm(width), nn.Linear(width, 3 * patch**2)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))

    def forward(self, z, grid: int):
        width = self.norm.normalized_shape[0]
        frequency = 10000 ** (-torch.arange(width // 4) / (width // 4))
        angles = torch.arange(grid)[:, None] * frequency
        line = torch.cat([angles.sin(), angles.cos()], 1)
        position = torch.cat([line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)], -1)
        z = self.embed(z) + position.reshape(1, grid * grid, width)
        for block in self.blocks:
            z = block(z)
        return self.pixels(self.norm(z))


class QbHeat(nn.Module):
    def __init__(self, encoder: nn.Module, stride: int, kind: str = "signed"):
        super().__init__()
        self.encoder, self.propagator = encoder, Propagator(encoder.channels, kind)
        self.decoder, self.patch = Decoder(encoder.channels, 128, 2, stride), stride

    def forward(self, images, groups):
        """`groups`: for each visible quadrant (row, column) how many images show it; they stand together."""
        n, _, size, _ = images.shape
        half, grid = size // 2, size // self.patch
        spans, start = [], 0
        for (r, c), count in groups.items():
            spans.append((r, c, start, start + count))
            start += count
        crops = [images[a:b, :, r * half:(r + 1) * half, c * half:(c + 1) * half] for r, c, a, b in spans]
        z = self.encoder(torch.cat(crops))
        z = z[0] if isinstance(z, tuple) else z
        z = z.flatten(2).transpose(1, 2)
        maps, weights = [], torch.ones(n, grid, grid)
        for r, c, a, b in spans:
            cells = self.propagator(z[a:b], r, c)
            cells = {place: cell.reshape(b - a, grid // 2, grid // 2, -1) for place, cell in cells.items()}
            maps.append(torch.cat([torch.cat([cells[y, 0], cells[y, 1]], 2) for y in (0, 1)], 1))
            weights[a:b, r * grid // 2:(r + 1) * grid // 2, c * grid // 2:(c + 1) * grid // 2] = 0
        predicted = self.decoder(torch.cat(maps).reshape(n, grid * grid, -1), grid)
        return masked_loss(predicted, targets(images, self.patch), weights.reshape(n, -1))


class Classifier(nn.Module):
    """An encoder with mean pooling and a linear classifier, and its loss."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.channels, classes)

    def forward(self, images, labels):
        return F.cross_entropy(self.classifier(self.encoder(images).mean((2, 3))), labels)


def targets(images, p: int):
    n, c, h, w = images.shape
    patches = images.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_loss(predicted, target, weights):
    return (((predicted - target) ** 2).mean(-1) * weights).sum() / weights.sum()
