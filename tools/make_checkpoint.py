"""Makes tests/fixtures/checkpoint-format-1: a checkpoint of a linear layer, 3 inputs and 2 outputs, after 5 steps.

    pip install numpy safetensors blake3
    python3 tools/make_checkpoint.py tests/fixtures/checkpoint-format-1

Written by hand from the format and not by the program: whatever becomes of it, files of this format must load.
"""

import json
import pathlib
import sys

import blake3
import numpy as np
from safetensors.numpy import save


def main(target: str) -> None:
    folder = pathlib.Path(target) / "step-000000005"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 8, "bias": np.array([-1, 2], dtype=np.float32)}
    moments = {}
    for name, value in weights.items():
        moments[f"first_moment.{name}"] = value.reshape(-1) / 4
        moments[f"second_moment.{name}"] = value.reshape(-1) ** 2
    files = {}
    for name, tensors in (("model.safetensors", weights), ("optimizer.safetensors", moments)):
        data = save(tensors)
        (folder / name).write_bytes(data)
        files[name] = {"bytes": len(data), "blake3": blake3.blake3(data).hexdigest()}
    position = {"step": 5, "steps_per_epoch": 2, "seed": 7, "events_bytes": 123, "data": "ab"}
    text = json.dumps(position, separators=(",", ":")).encode()
    manifest = {
        "format": 1,
        "position": position,
        "position_blake3": blake3.blake3(text).hexdigest(),
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
