"""Makes tests/fixtures/reference.safetensors: what PyTorch and scikit-learn answer, for tests/it/reference.rs.

    pip install torch numpy scikit-learn safetensors
    python3 tools/make_fixtures.py tests/fixtures/reference.safetensors

Everything is computed in double precision and stored as float32. Inputs and weights are sines (see `wave`), so that
the large ones need not be stored: the Rust side computes the same.
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn

import mobile_former
import qb_heat
import resnet
import rivals
from qb_heat import Block, InvertedResidual, MobileNet, Propagator, QbHeat, masked_loss, targets

torch.set_default_dtype(torch.float64)
OUT: dict[str, np.ndarray] = {}


def keep(name: str, tensor: torch.Tensor) -> None:
    OUT[name] = np.ascontiguousarray(tensor.detach().numpy().astype(np.float32))


def wave(shape: list[int], phase: float, scale: float = 1.0) -> torch.Tensor:
    """scale·sin(0.7123·i + phase), rounded to float32 as the Rust side does."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy((scale * np.sin(0.7123 * i + phase)).astype(np.float32).astype(np.float64)).reshape(shape)


def phase(name: str) -> float:
    return sum((k + 1) * byte for k, byte in enumerate(name.encode())) % 1000


# ------------------------------------------------------------------ weights and answers by name


def fill(module: nn.Module) -> None:
    """Weights and running statistics that the Rust side computes alike from names and shapes."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            shape, last = list(tensor.shape), name.rsplit(".", 1)[-1]
            if last == "num_batches_tracked":
                continue
            if last == "running_var":
                values = 1 + wave(shape, phase(name), 0.5)
            elif len(shape) == 1:
                values = wave(shape, phase(name), 0.1) + (1 if last == "weight" else 0)
            elif last == "matrices":
                values = wave(shape, phase(name), 0.3 / math.sqrt(shape[-1]))
            else:
                values = wave(shape, phase(name), math.sqrt(3 / math.prod(shape[1:])))
            tensor.copy_(values.to(torch.float32).double())


def keep_gradients(case: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            keep(f"{case}/gradient/{name}", parameter.grad)


def backward(output: torch.Tensor) -> None:
    (output * wave(list(output.shape), 1.0)).sum().backward()


def layer_case(case: str, module: nn.Module, shape: list[int], *more: torch.Tensor) -> None:
    """`more`: inputs behind the first one, without a gradient of their own."""
    fill(module)
    x = wave(shape, 0.5).requires_grad_()
    y = module(x, *more)
    backward(y)
    keep(f"{case}/output", y)
    keep(f"{case}/gradient/input", x.grad)
    keep_gradients(case, module)
    for name, buffer in module.named_buffers():
        if "running" in name:
            keep(f"{case}/state/{name}", buffer)
    if isinstance(module, (InvertedResidual, resnet.ResNet)):
        distance = qb_heat.nearest_kink(module)
        print(case, "distance from ReLU's kinks", distance)
        assert distance > 2e-4


def mobile_former_case(name: str) -> None:
    """Whole images and quarters in evaluation mode, whole images in training mode: map, tokens, every gradient."""
    table = mobile_former.TABLES[name]
    whole = wave([2, 3, 16, 16], 0.5)
    for case, x, training in (("whole", whole, False), ("quarter", whole[:, :, :8, :8], False), ("train", whole, True)):
        case = f"{name}/{case}"
        network = mobile_former.MobileFormer(table, 4)
        fill(network)
        network.train(training)
        x = x.clone().requires_grad_()
        feature_map, tokens = network(x)
        loss = (feature_map * wave(list(feature_map.shape), 1.0)).mean() + (tokens * wave(list(tokens.shape), 1.0)).mean()
        loss.backward()
        keep(f"{case}/map", feature_map)
        keep(f"{case}/tokens", tokens)
        keep(f"{case}/gradient/input", x.grad)
        keep_gradients(case, network)
        if training:
            for name_, buffer in network.named_buffers():
                if "running" in name_:
                    keep(f"{case}/state/{name_}", buffer)
        dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        assert not dead, f"without gradient: {dead}"
        print(case, "distance from kinks", qb_heat.nearest_kink(network))
        assert qb_heat.nearest_kink(network) > 3e-6


def resnet_case(name: str) -> None:
    """A step with every halving; the map without stem's and pool's in evaluation mode."""
    table = resnet.TABLES[name]
    layer_case(name, resnet.ResNet(table, 8), [2, 3, 30, 26])
    network = resnet.ResNet(table, 2).eval()
    fill(network)
    keep(f"{name}/evaluation", network(wave([2, 3, 12, 10], 0.5)))


def rival_cases() -> None:
    """Loss, gradients, running statistics and what follows after a step of MoCo-v2 and of latent targets."""
    encoder = lambda: resnet.ResNet(resnet.Table(6, [1, 0, 0, 0], False), 4)
    moco = rivals.MoCo(encoder(), 4, 6)
    fill(moco)
    loss = moco(wave([16, 3, 16, 16], 0.65), [2, 5, 0, 7, 3, 1, 6, 4], 2, 0.2)
    latent = rivals.Latent(encoder(), 10)
    fill(latent)
    latent_loss = latent(wave([8, 3, 16, 16], 1.85), 2, 0.3, 0.5)
    for case, model, value, pair in (
        ("moco", moco, loss, (moco.key, moco.query)),
        ("latent", latent, latent_loss, (latent.teacher, latent.encoder)),
    ):
        value.backward()
        keep(f"{case}/output", value.reshape(1))
        keep_gradients(case, model)
        for name, buffer in model.named_buffers():
            if "running" in name:
                keep(f"{case}/state/{name}", buffer)
        rivals.follow(*pair, 0.75)
        for name, parameter in pair[0].named_parameters():
            keep(f"{case}/followed/{name}", parameter)
        print(case, "distance from ReLU's kinks", qb_heat.nearest_kink(pair[1]))
        assert qb_heat.nearest_kink(pair[1]) > 1e-4

    scores, labels = wave([5, 4], 0.3, 2.0).requires_grad_(), torch.tensor([0, 3, 1, 1, 2])
    loss = F.cross_entropy(scores, labels, label_smoothing=0.1)
    loss.backward()
    keep("smoothed/output", loss.reshape(1))
    keep("smoothed/gradient/scores", scores.grad)


def main(path: str) -> None:
    qb_heat.Kinked.watched = True
    layer_case("block", Block(16, 4), [2, 5, 16])
    layer_case("residual1", InvertedResidual(6, 10, 6, 1), [3, 6, 5, 5])
    layer_case("residual2", InvertedResidual(6, 10, 8, 2), [3, 6, 6, 6])

    token, tokens = wave([3, 8], 0.8), wave([3, 4, 8], 0.8)
    layer_case("dynamic-relu", mobile_former.DynamicRelu(6, 8), [3, 6, 3, 5], token)
    layer_case("map-to-tokens", mobile_former.MobileToFormer(6, 8), [3, 6, 3, 5], tokens)
    layer_case("tokens", mobile_former.Former(8), [3, 4, 8])
    layer_case("tokens-to-map", mobile_former.FormerToMobile(6, 8), [3, 6, 3, 5], tokens)
    for name in ("mini", "mini-groups"):
        mobile_former_case(name)
    for name in ("resnet-mini", "resnet-mini-bottleneck"):
        resnet_case(name)

    for kind in ("signed", "separate", "exponential", "norm-linear"):
        for row, column in ((0, 0), (1, 1), (0, 1)):
            module, case = Propagator(6, kind), f"propagator-{kind}-{row}{column}"
            fill(module)
            z = wave([2, 3, 6], 0.5).requires_grad_()
            cells = module(z, row, column)
            whole = torch.stack([cells[place] for place in ((0, 0), (0, 1), (1, 0), (1, 1))])
            backward(whole)
            keep(f"{case}/output", whole)
            keep(f"{case}/gradient/input", z.grad)
            keep(f"{case}/gradient/matrices", module.matrices.grad)

    images, predicted = wave([2, 3, 8, 8], 0.5), wave([2, 16, 12], 0.3).requires_grad_()
    weights = (wave([2, 16], 0.1) > 0).double() + 0.25
    loss = masked_loss(predicted, targets(images, 2), weights)
    loss.backward()
    keep("loss/output", loss.reshape(1))
    keep("loss/weights", weights)
    keep("loss/gradient/predicted", predicted.grad)

    quadrants = [(0, 1), (1, 1), (0, 0), (1, 0), (0, 1), (0, 0), (1, 1), (1, 0)]
    order = sorted(range(8), key=lambda i: quadrants[i])
    groups = {place: 2 for place in sorted(set(quadrants))}
    for kind in ("signed", "norm-linear"):
        model = QbHeat(MobileNet(qb_heat.TINY, 4), 4, kind)
        fill(model)
        keep(f"model-{kind}/output", model(wave([8, 3, 32, 32], 0.5)[order], groups).reshape(1))

    rival_cases()

    # AdamW over 20 steps, clipped by the global norm, linear warm-up and cosine.
    linear = nn.Linear(4, 3)
    fill(linear)
    x, y = wave([8, 4], 0.2), wave([8, 3], 0.9, 4.0)
    optimiser = torch.optim.AdamW(
        [{"params": [linear.weight], "weight_decay": 0.3}, {"params": [linear.bias], "weight_decay": 0.0}],
        lr=0.05, betas=(0.9, 0.95))
    rate = lambda i: (i + 1) / 5 if i < 5 else 0.5 * (1 + math.cos(math.pi * (i - 5) / 15))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses = []
    for _ in range(20):
        loss = ((linear(x) - y) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(linear.parameters(), 0.7)
        optimiser.step()
        scheduler.step()
        losses.append(loss.detach())
    keep("adamw/losses", torch.stack(losses))
    keep("adamw/weight", linear.weight)
    keep("adamw/bias", linear.bias)

    # scikit-learn's logistic regression; its C is 1/(rows·l2).
    rows, l2 = 90, 1e-2
    inputs = wave([rows, 5], 0.4).numpy()
    labels = (np.arange(rows) * 7 % 11) % 3
    solved = LogisticRegression(C=1 / (rows * l2), tol=1e-10, max_iter=10000).fit(inputs, labels)
    keep("logistic/weights", torch.from_numpy(solved.coef_.T.copy()))
    keep("logistic/bias", torch.from_numpy(solved.intercept_))

    save_file(OUT, path)
    print(len(OUT), "tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
