"""Makes tests/fixtures/detection.safetensors: what PyTorch and SciPy answer, for tests/it/detector.rs.

    pip install torch numpy scipy scikit-learn safetensors
    python3 tools/make_detection_fixtures.py tests/fixtures/detection.safetensors
"""

import sys

import torch
from safetensors.numpy import save_file

import detector
from make_fixtures import OUT, fill, keep, keep_gradients, wave

# Rows and columns of pixels that show each picture; the first and the last are cut alike.
CONTENTS, FRAME = [(33, 48), (40, 29), (34, 48)], (40, 48)
CLASSES, LEVELS, QUERIES = 3, [(5, 4), (7, 8)], 6
# Class and box of what is in each image.
OBJECTS = [
    [(0, [0.31, 0.42, 0.22, 0.35]), (2, [0.63, 0.37, 0.41, 0.29])],
    [],
    [(1, [0.52, 0.61, 0.37, 0.28]), (0, [0.22, 0.33, 0.17, 0.31]), (2, [0.71, 0.55, 0.12, 0.43])],
]
# Group, object, class and box of what is spoilt of it.
NOISED = [
    [(0, 0, 0, [0.33, 0.40, 0.19, 0.37]), (0, 1, 1, [0.60, 0.39, 0.45, 0.26]),
     (1, 0, 2, [0.30, 0.45, 0.25, 0.31]), (1, 1, 2, [0.66, 0.36, 0.36, 0.33])],
    [],
    [(0, 0, 1, [0.50, 0.64, 0.41, 0.25]), (0, 1, 0, [0.23, 0.31, 0.14, 0.35]), (0, 2, 1, [0.73, 0.57, 0.14, 0.38])],
]


def rounded(values) -> torch.Tensor:
    """As the Rust side reads them."""
    return torch.tensor(values, dtype=torch.float32).double()


def rows(lists) -> torch.Tensor:
    """The image in front of what is known of each."""
    return rounded([[image, *row[:-1], *row[-1]] for image, rows in enumerate(lists) for row in rows])


def small_cases() -> None:
    a = (wave([7, 4], 0.4, 0.2) + torch.tensor([0.5, 0.5, 0.3, 0.3])).float().double().requires_grad_()
    b = (wave([7, 4], 2.9, 0.2) + torch.tensor([0.5, 0.5, 0.3, 0.3])).float().double()
    iou, generalised = detector.overlaps(a, b)
    (iou * wave([7], 1.0) + generalised * wave([7], 2.0)).sum().backward()
    for name, tensor in {"a": a, "b": b, "iou": iou, "generalised": generalised, "gradient/a": a.grad}.items():
        keep(f"overlaps/{name}", tensor)
    logits, truth = wave([6, 4], 0.3, 3.0).requires_grad_(), (wave([6, 4], 0.9) > 0.5).double()
    loss = detector.focal(logits, truth)
    loss.backward()
    keep("focal/truth", truth)
    keep("focal/output", loss.reshape(1))
    keep("focal/gradient/logits", logits.grad)


def watch_head(head, proposals, layers, shown, objects) -> None:
    """Nothing may hang on a rounding: neither the order of the proposals nor a match, a corner, or a clamped box."""
    certain = proposals[0].amax(-1).masked_fill(~shown, -float("inf"))
    best = certain.topk(QUERIES + 1, 1).values
    gap = (best[:, :-1] - best[:, 1:]).min().item()
    print("gap between proposals", gap)
    assert gap > 1e-3
    edge, kink = 1.0, 1.0
    for logits, boxes in [proposals, *layers]:
        edge = min(edge, (boxes - detector.EDGE).abs().min().item(), (1 - detector.EDGE - boxes).abs().min().item())
        valid = shown if logits.shape[1] == shown.shape[1] else torch.ones(logits.shape[:2], dtype=torch.bool)
        for one, box, rows, (classes, truths) in zip(logits, boxes, valid, objects):
            one, box = one[rows], box[rows]
            if not len(classes):
                continue
            cost = detector.costs(one, box, classes, truths).numpy()
            query, thing = detector.linear_sum_assignment(cost)
            generator = torch.Generator().manual_seed(0)
            for _ in range(200):
                shaken = cost + 1e-3 * (2 * torch.rand(cost.shape, generator=generator).numpy() - 1)
                other = detector.linear_sum_assignment(shaken)
                assert (other[0] == query).all() and (other[1] == thing).all(), "a match hangs on a rounding"
            a, b = box[query], truths[thing]
            p, q = detector.corners(a), detector.corners(b)
            inner = torch.minimum(p[:, 2:], q[:, 2:]) - torch.maximum(p[:, :2], q[:, :2])
            kink = min(kink, (a - b).abs().min().item(), (p - q).abs().min().item(), inner.abs().min().item())
    print("distance from kinks", kink, "and from the edges", edge)
    assert kink > 1e-4 and edge > 1e-4


def head_case(name: str, noised) -> None:
    head = detector.DetectionHead(LEVELS, CLASSES, 16, 2, 1, 2, QUERIES, 12)
    fill(head)
    for weight, tensor in head.state_dict().items():
        keep(f"weights/{weight}", tensor)  # The same in every case.
    maps = [wave([3, 10, 12, 5], 0.5).requires_grad_(), wave([3, 5, 6, 7], 0.8).requires_grad_()]
    objects = [(torch.tensor([c for c, _ in found], dtype=torch.long), rounded([b for _, b in found]).reshape(-1, 4))
               for found in OBJECTS]
    spoilt = noised and [[(*query[:3], rounded(query[3]).tolist()) for query in queries] for queries in noised]
    proposals, layers, denoised, shown = head(maps, CONTENTS, FRAME, spoilt)
    watch_head(head, proposals, layers, shown, objects)
    total, terms = detector.losses(proposals, layers, denoised, shown, objects, spoilt)
    total.backward()
    for image in range(3):
        keep(f"{name}/proposals/{image}/logits", proposals[0][image][shown[image]])
        keep(f"{name}/proposals/{image}/boxes", proposals[1][image][shown[image]])
        for i, (logits, boxes) in enumerate(layers):
            keep(f"{name}/layer{i}/{image}/logits", logits[image])
            keep(f"{name}/layer{i}/{image}/boxes", boxes[image])
        for i, (logits, boxes) in enumerate(denoised):
            count = len(noised[image])
            if count:
                keep(f"{name}/denoised{i}/{image}/logits", logits[image][:count])
                keep(f"{name}/denoised{i}/{image}/boxes", boxes[image][:count])
    keep(f"{name}/total", total.reshape(1))
    keep(f"{name}/terms", terms)
    for i, x in enumerate(maps):
        keep(f"{name}/input{i}", x.grad)
    dead = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == ([] if noised else ["label_tokens"]), f"without gradient: {dead}"
    keep_gradients(name, head)


def main(path: str) -> None:
    keep("objects", rows(OBJECTS))
    keep("noised", rows(NOISED))
    small_cases()
    head_case("head", None)
    head_case("denoising", NOISED)
    save_file(OUT, path)
    print(len(OUT), "tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
