"""Makes bccd.tar, the blood cells of BCCD with boxes in COCO JSON, from a checkout of its public repository.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python3 tools/make_bccd.py BCCD_Dataset bccd.tar

205 images to train on, 87 to validate, 72 to test, as its own lists have them, without two boxes of no size; MIT. Only
Python's standard library is needed.
"""

import json
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

from archive import add

CATEGORIES = ["RBC", "WBC", "Platelets"]


def coco(source: Path, names: list[str]) -> dict:
    images, boxes = [], []
    for image, name in enumerate(names, 1):
        root = ElementTree.parse(source / "BCCD/Annotations" / f"{name}.xml").getroot()
        width, height = (int(root.findtext(f"size/{side}")) for side in ("width", "height"))
        images.append({"id": image, "file_name": f"images/{name}.jpg", "width": width, "height": height})
        for thing in root.iter("object"):
            left, top, right, bottom = (int(thing.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
            if right == left or bottom == top:
                continue
            boxes.append({"id": len(boxes) + 1, "image_id": image, "category_id": CATEGORIES.index(thing.findtext("name")) + 1,
                          "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top),
                          "iscrowd": 0})
    return {"images": images, "annotations": boxes,
            "categories": [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]}


def main(source: str, target: str) -> None:
    folder = Path(source)
    with tarfile.open(target, "w") as tar:
        add(tar, "bccd/LICENSE", (folder / "LICENSE").read_bytes())
        for part in ("train", "val", "test"):
            names = (folder / "BCCD/ImageSets/Main" / f"{part}.txt").read_text().split()
            found = coco(folder, names)
            add(tar, f"bccd/annotations/instances_{part}.json", json.dumps(found).encode())
            for image in found["images"]:
                path = image["file_name"]
                add(tar, f"bccd/{path}", (folder / "BCCD/JPEGImages" / Path(path).name).read_bytes())
            print(part, len(names), "images,", len(found["annotations"]), "boxes")


if __name__ == "__main__":
    main(*sys.argv[1:])
