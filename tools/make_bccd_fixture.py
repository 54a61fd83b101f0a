"""Makes tests/fixtures/bccd/: the first 16 training images of BCCD as they are, their boxes and their licence.

    python3 tools/make_bccd_fixture.py bccd.tar tests/fixtures/bccd

The input is a tar of BCCD (blood cells, MIT) as tools/make_bccd.py makes it. The first 12 images are
instances_train.json, the last 4 instances_val.json; each has red cells, a white one and, but for a few, platelets. Only
Python's standard library is needed.
"""

import json
import sys
import tarfile
from pathlib import Path

PARTS = {"train": range(0, 12), "val": range(12, 16)}


def main(source: str, target: str) -> None:
    folder = Path(target)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    with tarfile.open(source) as archive:

        def read(name: str) -> bytes:
            return archive.extractfile(f"bccd/{name}").read()

        (folder / "LICENSE").write_bytes(read("LICENSE"))
        coco = json.loads(read("annotations/instances_train.json"))
        for part, numbers in PARTS.items():
            images = [coco["images"][number] for number in numbers]
            ids = {image["id"] for image in images}
            for image in images:
                (folder / image["file_name"]).write_bytes(read(image["file_name"]))
            chosen = {"images": images, "annotations": [a for a in coco["annotations"] if a["image_id"] in ids],
                      "categories": coco["categories"]}
            text = json.dumps(chosen, separators=(",", ":")).replace("},{", "},\n{")
            (folder / "annotations" / f"instances_{part}.json").write_text(text + "\n")
            print(part, len(images), "images,", len(chosen["annotations"]), "boxes")


if __name__ == "__main__":
    main(*sys.argv[1:])
