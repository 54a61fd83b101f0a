"""Mobile-Former (arXiv 2108.05895) in PyTorch, a peer to compare numbers and speed with: names and layouts are those of src/encoder/mobile_former.

Maps are [N, C, H, W], tokens [N, M, d]. Written from the paper's blocks as its first author's public code has them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qb_heat import Kinked, Relu6, halvings


@dataclass
class Table:
    stem: int
    tokens: tuple[int, int]
    groups: int
    rows: list[tuple]
    stem_stride: int = 2
    widen: int | None = None


def twelve(widths: list[int]) -> list[tuple]:
    w0, w1, w2, w3, w4, w5 = widths
    return [("lite", 2, w0, 1), ("down", 6, w1, 4), ("flat", 4, w1), ("down", 6, w2, 4), ("flat", 4, w2),
            ("down", 6, w3, 4), ("flat", 4, w3), ("flat", 6, w4), ("flat", 6, w4), ("down", 6, w5, 4), ("flat", 6, w5),
            ("flat", 6, w5)]


MINI = [("lite", 2, 8, 1), ("down", 3, 12, 2), ("flat", 2, 12), ("down", 2, 16, 2), ("flat", 2, 20)]
TINY = [("lite", 2, 24, 1), ("down", 6, 40, 4), ("flat", 6, 40), ("flat", 6, 40), ("flat", 6, 40), ("down", 4, 48, 4),
        ("flat", 4, 48), ("flat", 4, 64)]
TABLES = {
    "mini": Table(8, (3, 32), 1, MINI, stem_stride=1),
    "mini-groups": Table(8, (3, 32), 4, MINI, stem_stride=1),
    "mf-tiny": Table(24, (4, 48), 1, TINY, widen=192),
    "mf-w720": Table(16, (6, 192), 1, twelve([16, 28, 60, 112, 120, 120]), widen=720),
}


def hard_sigmoid(t):
    return (t + 3).clamp(0, 6) / 6


def shuffle(x, groups: int):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def attend(q, k, v, heads: int):
    split = lambda t: t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2)
    return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)


def sequence(x):
    return x.flatten(2).transpose(1, 2)


class ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv(x))


class DynamicRelu(Kinked):
    def __init__(self, channels: int, d: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, d // 4), nn.Linear(d // 4, 2 * channels)

    def forward(self, x, token):
        hidden = self.fc1(token)
        logits = self.fc2(F.relu(hidden))
        self.note(x, hidden, logits - 3, logits + 3)
        theta = hard_sigmoid(logits)[:, :, None, None]
        first, second = theta.chunk(2, 1)
        return torch.maximum(2 * first * x, (2 * second - 1) * x)


class MobileToFormer(nn.Module):
    def __init__(self, channels: int, d: int):
        super().__init__()
        self.q, self.gate, self.out = nn.Linear(d, channels), nn.Linear(d, channels), nn.Linear(channels, d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x, z):
        seen = attend(self.q(z), sequence(x), sequence(x), 2)
        return self.norm(z + self.out(seen * 2 * hard_sigmoid(self.gate(z))))


class Former(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.q, self.out, self.fc1, self.fc2 = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, z):
        z = self.norm1(z + self.out(attend(self.q(z), z, z, 4)))
        return self.norm2(z + self.fc2(F.gelu(self.fc1(z))))


class FormerToMobile(nn.Module):
    def __init__(self, channels: int, d: int):
        super().__init__()
        self.k, self.v = nn.Linear(d, channels), nn.Linear(d, channels)

    def forward(self, x, z):
        seen = attend(sequence(x), self.k(z), self.v(z), 2)
        return x + seen.transpose(1, 2).reshape(x.shape)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, inside: int, outputs: int, d: int, groups: int):
        super().__init__()
        self.pw1, self.act1 = ConvNorm(inputs, inside, groups=groups), DynamicRelu(inside, d)
        self.dw, self.act2 = ConvNorm(inside, inside, 3, groups=inside), DynamicRelu(inside, d)
        self.pw2 = ConvNorm(inside, outputs, groups=groups)
        self.groups, self.skip = groups, inputs == outputs

    def forward(self, x, token):
        y = self.act1(shuffle(self.pw1(x), self.groups), token)
        y = shuffle(self.pw2(self.act2(self.dw(y), token)), self.groups)
        return x + y if self.skip else y


class DownSampling(nn.Module):
    def __init__(self, inputs: int, inside: int, outputs: int, inside2: int, stride: int, d: int,
                 groups: int):
        super().__init__()
        self.dw1, self.act1 = ConvNorm(inputs, inside, 3, stride, inputs), DynamicRelu(inside, d)
        self.pw1 = ConvNorm(inside, outputs, groups=groups)
        self.dw2, self.act2 = ConvNorm(outputs, inside2, 3, 1, outputs), DynamicRelu(inside2, d)
        self.pw2 = ConvNorm(inside2, outputs, groups=groups)
        self.shuffles = (inputs, outputs) if groups > 1 else (1, 1)

    def forward(self, x, token):
        y = self.pw1(self.act1(shuffle(self.dw1(x), self.shuffles[0]), token))
        return y + self.pw2(self.act2(shuffle(self.dw2(y), self.shuffles[1]), token))


class Lite(nn.Module):
    def __init__(self, inputs: int, inside: int, outputs: int, stride: int, groups: int):
        super().__init__()
        self.dw, self.relu6 = ConvNorm(inputs, inside, 3, stride, inputs), Relu6()
        self.pw = ConvNorm(inside, outputs, groups=groups)
        self.shuffle, self.skip = inputs if groups > 1 else 1, stride == 1 and inputs == outputs

    def forward(self, x, z):
        y = self.pw(shuffle(self.relu6(self.dw(x)), self.shuffle))
        return (x + y if self.skip else y), z


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, d: int, mobile: nn.Module):
        super().__init__()
        self.m2f, self.former, self.mobile = MobileToFormer(inputs, d), Former(d), mobile
        self.f2m = FormerToMobile(outputs, d)

    def forward(self, x, z):
        z = self.former(self.m2f(x, z))
        return self.f2m(self.mobile(x, z[:, 0]), z), z


class MobileFormer(nn.Module):
    def __init__(self, table: Table, stride: int):
        super().__init__()
        d, groups, width = table.tokens[1], table.groups, table.stem
        own = [table.stem_stride] + [{"lite": row[-1], "down": 2, "flat": 1}[row[0]] for row in table.rows]
        first, *strides = halvings(own, stride)
        self.tokens = nn.Parameter(torch.randn(table.tokens))
        self.stem, self.relu6, self.blocks = ConvNorm(3, width, 3, first), Relu6(), nn.ModuleList()
        for (kind, expand, outputs, *more), s in zip(table.rows, strides):
            if kind == "lite":
                block = Lite(width, expand * width, outputs, s, groups)
            elif kind == "down":
                mobile = DownSampling(width, expand * width, outputs, more[0] * outputs, s, d, groups)
                block = Block(width, outputs, d, mobile)
            else:
                block = Block(width, outputs, d, Bottleneck(width, expand * width, outputs, d, groups))
            self.blocks.append(block)
            width = outputs
        self.widen = ConvNorm(width, table.widen) if table.widen else None
        self.channels = table.widen or width

    def forward(self, x):
        x, z = self.relu6(self.stem(x)), self.tokens.expand(len(x), -1, -1)
        for block in self.blocks:
            x, z = block(x, z)
        return (self.widen(x) if self.widen else x), z
