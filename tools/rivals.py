"""MoCo-v2 and QB-Heat with latent targets in PyTorch, peers to compare numbers with: names are the Rust side's."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from qb_heat import Propagator, masked_loss

QUADRANTS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters()):
            slow.mul_(momentum).add_(fast, alpha=1 - momentum)


class Branch(nn.Module):
    def __init__(self, encoder: nn.Module, dim: int):
        super().__init__()
        self.encoder, channels = encoder, encoder.channels
        self.hidden, self.projection = nn.Linear(channels, channels), nn.Linear(channels, dim)

    def forward(self, images):
        return F.normalize(self.projection(F.relu(self.hidden(self.encoder(images).mean((2, 3))))), dim=1)


class MoCo(nn.Module):
    def __init__(self, encoder: nn.Module, dim: int, queue: int):
        super().__init__()
        self.query = Branch(encoder, dim)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("running_queue", torch.zeros(queue, dim))

    def forward(self, views, order: list[int], parts: int, temperature: float):
        """arXiv 1911.05722, algorithm 1, in sub-batches, shuffled for the keys; the newest keys come first."""
        n = len(order)
        q = torch.cat([self.query(part) for part in views[:n].chunk(parts)])
        with torch.no_grad():
            shuffled = views[n:][order]
            k = torch.cat([self.key(part) for part in shuffled.chunk(parts)])
            k = k[torch.argsort(torch.tensor(order))]
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.running_queue.T], 1) / temperature
        self.running_queue = torch.cat([k, self.running_queue])[: len(self.running_queue)]
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))


class Latent(nn.Module):
    def __init__(self, encoder: nn.Module, head: int):
        super().__init__()
        channels = encoder.channels
        self.encoder, self.propagator = encoder, Propagator(channels, "signed")
        self.head = nn.ModuleList([nn.Linear(channels, head), nn.Linear(head, channels)])
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, images, each: int, guard: float, visible_weight: float):
        """Images with the same visible quadrant stand together, `each` for each of QUADRANTS."""
        half = images.shape[-1] // 2
        spans = [(r, c, i * each, (i + 1) * each) for i, (r, c) in enumerate(QUADRANTS)]
        crops = [images[a:b, :, r * half:(r + 1) * half, c * half:(c + 1) * half] for r, c, a, b in spans]
        z = self.encoder(torch.cat(crops))
        side = z.shape[-1]
        z = z.flatten(2).transpose(1, 2)
        maps, weights = [], torch.ones(len(images), 2 * side, 2 * side)
        for r, c, a, b in spans:
            cells = self.propagator(z[a:b], r, c)
            cells = {place: cell.reshape(each, side, side, -1) for place, cell in cells.items()}
            maps.append(torch.cat([torch.cat([cells[y, 0], cells[y, 1]], 2) for y in (0, 1)], 1))
            weights[a:b, r * side:(r + 1) * side, c * side:(c + 1) * side] = visible_weight
        with torch.no_grad():
            target = standardised(self.teacher(images).permute(0, 2, 3, 1).flatten(0, 2)).reshape(len(images), 4 * side**2, -1)
        rows = standardised(z.flatten(0, 1))
        correlation = rows.T @ rows / len(rows)
        off_diagonal = correlation - torch.diag(torch.diag(correlation))
        predicted = torch.cat(maps).reshape(target.shape)
        predicted = predicted + self.head[1](F.gelu(self.head[0](predicted)))
        return masked_loss(predicted, target, weights.flatten(1)) + guard * (off_diagonal**2).sum() / len(correlation)


def standardised(rows):
    return (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-6).sqrt()
