"""Makes tests/fixtures/coco-parity.json: small random data sets with predictions, and what pycocotools says of them.

    pip install pycocotools
    python3 tools/make_coco_fixture.py tests/fixtures/coco-parity.json

Each set has classes, truths (for each image boxes with class, area and crowd), predictions (for each image) and
pycocotools' 12 figures, -1 where there is nothing that a figure could be about. Among them are crowds, images without
boxes or predictions, tied scores, boxes exactly on a prediction, more than 100 predictions of a class in an image, sets
without a class, without a prediction that fits, without anything but crowds.
"""

import contextlib
import io
import json
import random
import sys

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SIDE = 300


def box(largest: int) -> list[float]:
    width, height = (random.choice([random.randint(4, largest), random.uniform(4, largest)]) for _ in range(2))
    return [random.uniform(0, SIDE - width), random.uniform(0, SIDE - height), width, height]


def near(truth: list[float]) -> list[float]:
    if random.random() < 0.1:
        return list(truth)
    spread = random.choice([0.02, 0.1, 0.3])
    left, top, width, height = truth
    return [left + random.gauss(0, spread) * width, top + random.gauss(0, spread) * height,
            width * random.uniform(1 - spread, 1 + spread), height * random.uniform(1 - spread, 1 + spread)]


def make(images: int, classes: int, boxes: int, crowds: float, ties: bool, noise: int, absent: bool) -> dict:
    truths, predictions = [], []
    score = (lambda: random.choice([0.25, 0.5, 0.75])) if ties else random.random
    for _ in range(images):
        here = []
        for _ in range(random.choice([0, random.randint(1, boxes)])):
            bbox = box(random.choice([24, 80, 200]))
            # An object may fill less than its box.
            area = bbox[2] * bbox[3] * random.choice([1, 1, 0.5])
            known = classes - 1 if absent else classes
            here.append({"class": random.randrange(known), "bbox": bbox, "area": area,
                         "crowd": random.random() < crowds})
        found = [{"class": truth["class"] if random.random() < 0.8 else random.randrange(classes),
                  "score": score(), "bbox": near(truth["bbox"])}
                 for truth in here for _ in range(random.choice([0, 1, 1, 2]))]
        found += [{"class": random.randrange(classes), "score": score(), "bbox": box(150)}
                  for _ in range(random.randint(0, noise))]
        random.shuffle(found)
        truths.append(here)
        predictions.append(found)
    return {"classes": classes, "truths": truths, "predictions": predictions}


def figures(data: dict) -> list[float]:
    numbered = [(image, truth) for image, here in enumerate(data["truths"], 1) for truth in here]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i + 1} for i in range(len(data["truths"]))],
        "categories": [{"id": c + 1, "name": str(c)} for c in range(data["classes"])],
        "annotations": [{"id": number, "image_id": image, "category_id": box["class"] + 1, "bbox": box["bbox"],
                         "area": box["area"], "iscrowd": int(box["crowd"])}
                        for number, (image, box) in enumerate(numbered, 1)],
    }
    truth.createIndex()
    results = [{"image_id": image, "category_id": box["class"] + 1, "score": box["score"], "bbox": box["bbox"]}
               for image, here in enumerate(data["predictions"], 1) for box in here]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(figure) for figure in evaluation.stats]


def main(target: str) -> None:
    random.seed(7)
    sets = [make(images, classes, boxes, crowds, ties, noise, absent)
            for images, classes, boxes, crowds, ties, noise, absent in [
                (8, 1, 4, 0.0, False, 3, False),
                (12, 3, 6, 0.15, False, 5, False),
                (12, 3, 6, 0.15, True, 5, False),
                (6, 4, 5, 0.3, True, 8, True),
                (10, 2, 3, 1.0, False, 4, False),
                (3, 1, 12, 0.1, True, 130, False),
                (9, 5, 2, 0.0, False, 0, False),
            ]]
    with contextlib.redirect_stdout(io.StringIO()):
        for data in sets:
            for here in (*data["truths"], *data["predictions"]):
                for each in here:
                    each["bbox"] = [round(number, 2) for number in each["bbox"]]
            data["figures"] = figures(data)
    with open(target, "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(data, separators=(",", ":")) for data in sets) + "\n]\n")
    for data in sets:
        print([round(figure, 3) for figure in data["figures"]])


if __name__ == "__main__":
    main(*sys.argv[1:])
