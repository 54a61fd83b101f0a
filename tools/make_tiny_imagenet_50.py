"""Makes tiny-imagenet-50.tar, 50 classes of Tiny ImageNet with boxes in COCO JSON, from the public tiny-imagenet-200.zip.

    python3 tools/make_tiny_imagenet_50.py tiny-imagenet-200.zip tiny-imagenet-50.tar

500 training and 50 validation images of 64 px a class. Only Python's standard library is needed.
"""

import json
import sys
import tarfile
import zipfile

from archive import add

CLASSES = """
    n01443537 n01644900 n01784675 n01944390 n01983481 n02074367 n02085620 n02094433 n02132136 n02190166
    n02423022 n02481823 n02730930 n02788148 n02793495 n02815834 n02883205 n02906734 n02909870 n02950826
    n02963159 n03026506 n03042490 n03201208 n03388043 n03393912 n03444034 n03599486 n03637318 n03770439
    n03804744 n03837869 n03854065 n03930313 n03937543 n03977966 n03992509 n04070727 n04074963 n04118538
    n04254777 n04311004 n04356056 n04371430 n04456115 n04597913 n07734744 n07871810 n09193705 n09246464
""".split()
ROOT, NAME = "tiny-imagenet-200", "tiny-imagenet-50"
SIDE = 64


def lines(archive: zipfile.ZipFile, path: str) -> list[list[str]]:
    return [line.split("\t") for line in archive.read(f"{ROOT}/{path}").decode().splitlines()]


def images_of(archive: zipfile.ZipFile, part: str):
    """(path in the zip, path in the tar, class, corners of its box) of each image."""
    if part == "val":
        for file, wnid, *corners in lines(archive, "val/val_annotations.txt"):
            if wnid in CLASSES:
                yield f"{ROOT}/val/images/{file}", f"val/{wnid}/{file}", wnid, corners
        return
    for wnid in CLASSES:
        rows = lines(archive, f"train/{wnid}/{wnid}_boxes.txt")
        for file, *corners in sorted(rows, key=lambda row: int(row[0].rsplit("_", 1)[1].split(".")[0])):
            yield f"{ROOT}/train/{wnid}/images/{file}", f"train/{wnid}/{file}", wnid, corners


def main(source: str, target: str) -> None:
    with zipfile.ZipFile(source) as archive, tarfile.open(target, "w") as tar:
        words = {wnid: text.split(",")[0] for wnid, text in lines(archive, "words.txt")}
        categories = [{"id": i + 1, "name": words[c], "supercategory": c} for i, c in enumerate(CLASSES)]
        for part in ("train", "val"):
            images, boxes = [], []
            for number, (inside, path, wnid, corners) in enumerate(images_of(archive, part), 1):
                add(tar, f"{NAME}/{path}", archive.read(inside))
                images.append({"id": number, "file_name": path, "width": SIDE, "height": SIDE})
                # Corners are pixels that belong to the box.
                left, top, right, bottom = map(int, corners)
                box = [left, top, right - left + 1, bottom - top + 1]
                boxes.append({"id": number, "image_id": number, "category_id": CLASSES.index(wnid) + 1, "bbox": box,
                              "area": box[2] * box[3], "iscrowd": 0})
            coco = {"images": images, "annotations": boxes, "categories": categories}
            add(tar, f"{NAME}/annotations/instances_{part}.json", json.dumps(coco).encode())
            print(part, len(images), "images")


if __name__ == "__main__":
    main(*sys.argv[1:])
