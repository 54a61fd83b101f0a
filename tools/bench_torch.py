"""Times PyTorch on what `qbheat bench` times, and prints one JSON object: the peer of tools/compare_speed.py.

    python3 tools/bench_torch.py pretrain --encoder mobilenet-tiny --image-size 64 --stride 8 --batch-size 64 --mode compile
"""

import argparse
import json
import resource
import time

import torch
from safetensors.torch import load_file
from torch import nn

import mobile_former
import qb_heat

CLASSES = 100
BLOCK = (64, 192)


def build_encoder(name: str, stride: int) -> nn.Module:
    tables = {"mobilenet-tiny": qb_heat.TINY, "mobilenet-v2": qb_heat.V2}
    if name in tables:
        return qb_heat.MobileNet(tables[name], stride)
    return mobile_former.MobileFormer(mobile_former.TABLES[name], stride)


def prepare(arguments):
    """The module and its inputs: given ones where a file holds them, else random ones."""
    n, size, work = arguments.batch_size, arguments.image_size, arguments.work
    given = load_file(arguments.step) if arguments.step else {}
    if work == "block":
        x = given.pop("pixels", None)
        module, inputs = qb_heat.Block(BLOCK[1], 4), [torch.randn(n, *BLOCK) if x is None else x]
    else:
        encoder = build_encoder(arguments.encoder, arguments.stride)
        images = given.pop("pixels", None)
        images = torch.randn(n, 3, size, size) if images is None else images
        if work == "pretrain":
            counts = given.pop("groups", torch.tensor([n // 4] * 4)).int().flatten().tolist()
            groups = dict(zip([(0, 0), (0, 1), (1, 0), (1, 1)], counts))
            module, inputs = qb_heat.QbHeat(encoder, arguments.stride), [images, groups]
            nn.init.normal_(module.propagator.matrices, std=0.02)
        elif work == "supervised":
            module, inputs = qb_heat.Classifier(encoder, CLASSES), [images, torch.arange(n) % CLASSES]
        else:
            module, inputs = encoder.eval(), [images]
    if given:
        module.load_state_dict(given, strict=False)
        module.train(work != "features")
        missing = [name for name in module.state_dict() if name not in given and "num_batches" not in name]
        assert not missing, f"not in {arguments.step}: {missing}"
    if arguments.mode == "channels_last":
        module = module.to(memory_format=torch.channels_last)
        if work != "block":
            inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    return module, inputs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["pretrain", "supervised", "features", "block"])
    parser.add_argument("--encoder", default="mobilenet-tiny")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mode", choices=["nchw", "channels_last", "compile"], default="nchw")
    parser.add_argument("--step", help="safetensors of weights and batch, from `qbheat bench --keep-step`")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    module, inputs = prepare(arguments)
    run = torch.compile(module) if arguments.mode == "compile" else module
    trains = arguments.work in ("pretrain", "supervised")
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95)) if trains else None
    if arguments.work == "block":
        inputs[0].requires_grad_()

    def step():
        if arguments.work == "features":
            with torch.no_grad():
                return run(*inputs)
        result = run(*inputs)
        loss = result if trains else result.square().mean()
        module.zero_grad()
        loss.backward()
        if optimiser:
            optimiser.step()
        return loss.item()

    first = step()
    if arguments.work == "features":
        first = first.square().mean().item()
    step()
    seconds = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({
        "images_per_s": arguments.batch_size / min(seconds),
        "parameters": sum(p.numel() for p in module.parameters()),
        "first_loss": first,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
