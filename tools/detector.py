"""The detector's head, its matching and its loss in PyTorch, a peer to compare numbers with and to try settings in:
names and layouts are the Rust side's (src/detect).

Maps are [N, h, w, C]; boxes are [centre x, centre y, width, height] as shares of the frame. Where the Rust side cuts
padding off, here it is masked.
"""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from qb_heat import Block

PLACE, PRIOR, ANCHOR, WIDEST, EDGE, TEMPERATURE, SPREAD = 4, 0.01, 4, 0.5, 1e-3, 20, 0.5
ALPHA, WEIGHTS = 0.25, (2.0, 5.0, 2.0)


def attend(q, k, v, heads: int, mask):
    """`mask` [N, 1, L or 1, S]: true where a query sees a key."""
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(split(q), split(k), split(v), mask).transpose(1, 2).flatten(2)


def perceptron(first: nn.Linear, second: nn.Linear, x):
    return second(F.gelu(first(x)))


def inverse_sigmoid(x):
    x = x.clamp(EDGE, 1 - EDGE)
    return (x / (1 - x)).log()


class EncoderBlock(Block):
    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.projection(attend(q, k, v, self.heads, mask))
        return x + perceptron(self.fc1, self.fc2, self.norm2(x))


class Input(nn.Module):
    def __init__(self, channels: int, stride: int, width: int):
        super().__init__()
        self.linear, self.norm, self.stride = nn.Linear(channels, width), nn.LayerNorm(width), stride


class Predictor(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.score, self.hidden, self.offset = nn.Linear(width, classes), nn.Linear(width, width), nn.Linear(width, 4)
        nn.init.constant_(self.score.bias, -math.log((1 - PRIOR) / PRIOR))
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, tokens, references):
        offset = perceptron(self.hidden, self.offset, tokens)
        return self.score(tokens), (offset + inverse_sigmoid(references)).sigmoid()


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, feed_forward: int, classes: int):
        super().__init__()
        content, self.heads = width - PLACE * heads, heads
        self.among_norm, self.look_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm, self.answer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.among_query, self.among_key = nn.Linear(width, width), nn.Linear(width, width)
        self.among_value, self.among = nn.Linear(width, width), nn.Linear(width, width)
        self.look_query, self.look_key = nn.Linear(width, content), nn.Linear(width, content)
        self.look_value, self.look = nn.Linear(width, width), nn.Linear(width, width)
        self.look_place = nn.Linear(width, PLACE * heads)
        self.fc1, self.fc2 = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.answer = Predictor(width, classes)
        angle = torch.arange(heads) * 2 * math.pi / heads
        place = torch.stack([angle.cos(), angle.sin()], -1)
        place = place / place.abs().amax(-1, keepdim=True)
        nn.init.zeros_(self.look_place.weight)
        with torch.no_grad():
            self.look_place.bias.copy_(torch.cat([place, torch.full((heads, 2), math.log(SPREAD))], -1).flatten())

    def forward(self, content, references, position, tokens, centres, blur, apart, shown):
        normed = self.among_norm(content)
        placed = normed + position
        seen = attend(self.among_query(placed), self.among_key(placed), self.among_value(normed), self.heads, apart)
        content = content + self.among(seen)
        content = content + self.look(self.looked(self.look_norm(content), references, tokens, centres, blur, shown))
        content = content + perceptron(self.fc1, self.fc2, self.norm(content))
        return content, *self.answer(self.answer_norm(content), references)

    def looked(self, queries, references, tokens, centres, blur, shown):
        """Scores as they are meant: content, plus the logarithm of a Gaussian with its constant."""
        n, l, _ = queries.shape
        place = self.look_place(queries).view(n, l, self.heads, PLACE)
        half = references[..., None, 2:] / 2
        centre = references[..., None, :2] + place[..., :2] * half
        variance = (place[..., 2:].exp() * half) ** 2 + blur
        away = (centres - centre[..., None, :]) ** 2 / (2 * variance[..., None, :])
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.look_query(queries)), split(self.look_key(tokens)), split(self.look_value(tokens))
        scores = q @ k.transpose(-1, -2) / math.sqrt(v.shape[-1]) - away.sum(-1).transpose(1, 2)
        weights = scores.masked_fill(~shown, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class DetectionHead(nn.Module):
    def __init__(self, levels, classes, width=128, heads=4, encoder_layers=1, decoder_layers=3, queries=100, feed_forward=512):
        """`levels`: channels and stride of each map, finest first."""
        super().__init__()
        self.inputs = nn.ModuleList(Input(channels, stride, width) for channels, stride in levels)
        self.level_tokens = nn.Parameter(torch.zeros(len(levels), width))
        self.encoder = nn.ModuleList(EncoderBlock(width, heads) for _ in range(encoder_layers))
        self.norm, self.proposals = nn.LayerNorm(width), Predictor(width, classes)
        self.label_tokens = nn.Parameter(torch.randn(classes, width))
        self.position_hidden, self.position = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, feed_forward, classes) for _ in range(decoder_layers))
        self.queries, self.width = queries, width

    def embed(self, shares):
        frequencies = 2 * math.pi * TEMPERATURE ** (-torch.arange(self.width // 4) / (self.width // 4))
        angles = shares[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(2)

    def forward(self, maps, contents, frame, noised=None):
        """`contents`: rows and columns of pixels that show each picture, in the upper left of a `frame` of (height,
        width) pixels; `noised`: for each image a list of (group, object, class, box). Answers are pairs of logits and
        boxes: of all positions, then of each layer's queries, then of its denoising queries; last what positions show
        the picture, [N, T]."""
        n, (height, width) = len(contents), frame
        tokens, centres, anchors, shown = [], [], [], []
        for i, (entry, x) in enumerate(zip(self.inputs, maps)):
            tokens.append(entry.norm(entry.linear(x)).flatten(1, 2) + self.level_tokens[i])
            rows, columns = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(x.shape[2]), indexing="ij")
            step = torch.tensor([entry.stride / width, entry.stride / height])
            centre = (torch.stack([columns, rows], -1).flatten(0, 1) + 0.5) * step
            centres.append(centre)
            anchors.append(torch.cat([centre, (ANCHOR * step).clamp(max=WIDEST).expand_as(centre)], -1))
            seen = [(rows * entry.stride < h) & (columns * entry.stride < w) for h, w in contents]
            shown.append(torch.stack(seen).flatten(1))
        centres, anchors, shown = torch.cat(centres), torch.cat(anchors), torch.cat(shown, 1)
        mask = shown[:, None, None]
        blur = (torch.tensor([self.inputs[0].stride / width, self.inputs[0].stride / height]) / 2) ** 2
        tokens = torch.cat(tokens, 1) + self.embed(centres[None])
        for block in self.encoder:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        proposals = self.proposals(tokens, anchors[None])

        queries = min(self.queries, shown.sum(1).min().item())
        certain = proposals[0].amax(-1).masked_fill(~shown, -math.inf)
        best = certain.topk(queries, 1).indices[..., None]
        content = tokens.gather(1, best.expand(-1, -1, self.width))
        references = proposals[1].detach().gather(1, best.expand(-1, -1, 4))
        apart = None
        if noised is not None and any(noised):
            most = max(map(len, noised))
            fill = [(-1, 0, 0, [0.5] * 4)]
            lists = [spoilt + fill * (most - len(spoilt)) for spoilt in noised]
            column = lambda i: torch.tensor([[query[i] for query in spoilt] for spoilt in lists])
            content = torch.cat([content, self.label_tokens[column(2)]], 1)
            references = torch.cat([references, column(3).to(references)], 1)
            kin = torch.cat([torch.full((n, queries), -2), column(0)], 1)
            apart = (kin[:, :, None] == kin[:, None])[:, None]
        layers, denoised = [], []
        for layer in self.layers:
            position = perceptron(self.position_hidden, self.position, self.embed(references))
            content, *answers = layer(content, references, position, tokens, centres, blur, apart, mask)
            layers.append(tuple(answer[:, :queries] for answer in answers))
            denoised.append(tuple(answer[:, queries:] for answer in answers))
            references = answers[1].detach()
        return proposals, layers, denoised if apart is not None else [], shown


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlaps(a, b):
    """IoU and generalised IoU."""
    a, b = corners(a), corners(b)
    area = lambda low, high: (high - low).clamp(min=0).prod(-1)
    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return both / union, both / union - (hull - union) / hull


def focal(logits, truth):
    p = logits.sigmoid()
    right = truth * p + (1 - truth) * (1 - p)
    weight = truth * ALPHA + (1 - truth) * (1 - ALPHA)
    return (weight * (1 - right) ** 2 * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")).sum()


@torch.no_grad()
def costs(logits, boxes, classes, truths):
    """[Q, objects] of one image."""
    p = logits.sigmoid()
    yes = ALPHA * (1 - p) ** 2 * F.softplus(-logits)
    no = (1 - ALPHA) * p**2 * F.softplus(logits)
    l1 = (boxes[:, None] - truths).abs().sum(-1)
    return WEIGHTS[0] * (yes - no)[:, classes] + WEIGHTS[1] * l1 - WEIGHTS[2] * overlaps(boxes[:, None], truths)[1]


def terms(logits, boxes, places, classes, truths):
    """Focal loss of all rows, L1 and 1 − generalised IoU of those at `places`."""
    truth = torch.zeros_like(logits)
    truth[places, classes] = 1
    return torch.stack([focal(logits, truth), (boxes[places] - truths).abs().sum(), (1 - overlaps(boxes[places], truths)[1]).sum()])


def losses(proposals, layers, denoised, shown, objects, noised=None):
    """`objects`: classes and boxes of each image. The total, and the terms in the order of the Rust side's `Terms`."""
    wanted = max(1, sum(len(classes) for classes, _ in objects))

    def matched(answers, valid):
        total = 0
        for logits, boxes, rows, (classes, truths) in zip(*answers, valid, objects):
            logits, boxes = logits[rows], boxes[rows]
            query, thing = linear_sum_assignment(costs(logits, boxes, classes, truths).numpy())
            total = total + terms(logits, boxes, torch.as_tensor(query), classes[thing], truths[thing])
        return total / wanted

    def put_right(answers):
        total, spoilt = 0, max(1, sum(map(len, noised)))
        for logits, boxes, queries, (classes, truths) in zip(*answers, noised, objects):
            if queries:
                thing = torch.tensor([query[1] for query in queries])
                total = total + terms(logits[: len(queries)], boxes[: len(queries)], torch.arange(len(queries)), classes[thing], truths[thing])
        return total / spoilt

    weights = torch.tensor(WEIGHTS)
    everything = [torch.ones(len(objects), layer[0].shape[1], dtype=torch.bool) for layer in layers]
    *earlier, last = [matched(layer, rows) for layer, rows in zip(layers, everything)]
    whole = lambda parts: sum(((weights * part).sum() for part in parts), torch.zeros(()))
    first, earlier, right = whole([matched(proposals, shown)]), whole(earlier), whole([put_right(x) for x in denoised])
    total = (weights * last).sum() + earlier + first + right
    return total, torch.stack([*last, earlier, first, right])
