"""Runs qbheat and PyTorch alternately on the same work, weights and batch, and prints one table as Markdown.

    cargo build --release
    pip install torch safetensors
    python3 tools/compare_speed.py target/release/qbheat [--rounds 2] [--only tiny] [--images DATA]

PyTorch runs eagerly with channels first, eagerly with channels last, and compiled; the best counts. `--images` names a
folder or tar of images on disk, for the share of a step that waits for them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

MODES = ["nchw", "channels_last", "compile"]
# What, the work, its options, the floor.
ROWS = [
    ("QB-Heat step, mobilenet-tiny, 64 px, batch 64", "pretrain", ["mobilenet-tiny", 64, 8, 64], 1.25),
    ("QB-Heat step, mobilenet-tiny, 64 px, batch 256", "pretrain", ["mobilenet-tiny", 64, 8, 256], 1.25),
    ("supervised step, mobilenet-tiny, 64 px, batch 128", "supervised", ["mobilenet-tiny", 64, 8, 128], 1.3),
    ("QB-Heat step, mf-tiny, 64 px, batch 64", "pretrain", ["mf-tiny", 64, 8, 64], 1.2),
    ("QB-Heat step, mf-tiny, 64 px, batch 256", "pretrain", ["mf-tiny", 64, 8, 256], 1.2),
    ("QB-Heat step, mobilenet-v2, 256 px, batch 16", "pretrain", ["mobilenet-v2", 256, 32, 16], 1.1),
    ("QB-Heat step, mf-w720, 256 px, batch 16", "pretrain", ["mf-w720", 256, 32, 16], 1.1),
    ("features, mobilenet-tiny, 64 px, batch 64", "features", ["mobilenet-tiny", 64, 8, 64], 1.3),
    ("features, mobilenet-v2, 224 px, batch 1", "features", ["mobilenet-v2", 224, 32, 1], 1.3),
    ("transformer block, [256, 64, 192]", "block", ["mobilenet-tiny", 64, 8, 256], 1.1),
]
# What the PyTorch side computes, whatever the program's defaults are.
NETWORK = ["qb_heat.visible_weight=0", "qb_heat.decoder.depth=2", "qb_heat.decoder.width=128"]
SAME = [word for setting in NETWORK for word in ("--set", setting)]
HERE = Path(__file__).parent


def options(encoder: str, size: int, stride: int, batch: int, threads: int, steps: int) -> list[str]:
    pairs = {"encoder": encoder, "image-size": size, "stride": stride, "batch-size": batch, "threads": threads, "steps": steps}
    return [word for name, value in pairs.items() for word in (f"--{name}", str(value))]


def answer(command: list[str]) -> dict | None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(" ".join(command), done.stderr, sep="\n", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(binary: str, work: str, row: list, rounds: int, threads: int) -> dict:
    steps = 30 if row[3] == 1 else 8
    ours, theirs = [], {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        kept = os.path.join(folder, "step.safetensors")
        for _ in range(rounds):
            command = [binary, "bench", "--work", work, *options(*row, threads, steps), *SAME, "--one-batch", "--json"]
            ours.append(answer(command + ["--keep-step", kept]))
            for mode in MODES:
                script = [sys.executable, str(HERE / "bench_torch.py"), work, *options(*row, threads, steps)]
                theirs[mode].append(answer(script + ["--mode", mode, "--step", kept]))
    first = ours[0]
    for found in [run for runs in theirs.values() for run in runs if run]:
        assert found["parameters"] == first["parameters"], (found, first)
        difference = abs(found["first_loss"] - first["first_loss"])
        assert difference <= 1e-3 * abs(first["first_loss"]), (found, first)
    best = {mode: max((run["images_per_s"] for run in runs if run), default=0) for mode, runs in theirs.items()}
    mode = max(best, key=best.get)
    fastest = max(ours, key=lambda run: run["images_per_s"])
    return {
        "ours": fastest,
        "torch": best,
        "best": best[mode],
        "mode": mode,
        "memory": [min(r["peak_memory_mib"] for r in ours), min(r["peak_memory_mib"] for r in theirs[mode] if r)],
        "version": next(run["torch"] for runs in theirs.values() for run in runs if run),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        value = lambda key: next(line.split(":")[1].strip() for line in lines if line.split("\t")[0] == key)
        return f"{value('model name')}, family {value('cpu family')}, model {value('model')}"
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--images", help="images on disk, for the share of a step that waits for them")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if arguments.only in row[0]]
    if not rows:
        parser.error(f"--only {arguments.only}: no row's name contains it; there are: {'; '.join(row[0] for row in ROWS)}")
    lines, version = [], ""
    for name, work, row, floor in rows:
        found = compare(arguments.binary, work, row, arguments.rounds, arguments.threads)
        ours, version = found["ours"], found["version"]
        torch = " / ".join(f"{found['torch'][mode]:.0f}" for mode in MODES)
        memory = found["memory"]
        lines.append(
            f"| {name} | {ours['images_per_s']:.0f} | {torch} | **{ours['images_per_s'] / found['best']:.2f}** | {floor} | "
            f"{memory[0]} / {memory[1]} = {memory[0] / memory[1]:.2f} | {ours['gflops']:.0f} of {ours['peak_gflops']:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    print(f"{processor()}, {os.cpu_count()} cores, {arguments.threads} threads, {platform.system()}; "
          f"PyTorch {version}; {date.today()}\n")
    print("| work | qbheat, images/s | PyTorch channels first / last / compiled | ratio | floor | memory, MiB | GFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    if arguments.images:
        command = [arguments.binary, "bench", *options("mobilenet-tiny", 64, 8, 64, arguments.threads, 30), *SAME, "--json"]
        for memory in (4096, 0):
            ms = answer(command + ["--data", arguments.images, "--set", f"data.memory_mib={memory}"])["ms"]
            kept = "decoded once" if memory else "decoded anew each time"
            print(f"\nwaiting for images, {kept}: {100 * ms['data'] / sum(ms.values()):.1f} % of the median step")


if __name__ == "__main__":
    main()
