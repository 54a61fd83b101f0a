"""Makes assets/cifar10-6000.tar, the built-in data: 500 training and 100 test images of each class.

    python3 tools/make_builtin.py cifar10.tar assets/cifar10-6000.tar

The input is a tar of CIFAR-10 as cifar10/{train,test}/CLASS/NNNN.jpg (50,000 + 10,000 images). The first files of each
class by name are taken as they are; nothing is decoded. Source: A. Krizhevsky, "Learning Multiple Layers of Features
from Tiny Images", 2009.
"""

import sys
import tarfile

COUNT = {"train": 500, "test": 100}


def main(source: str, target: str) -> None:
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(source) as archive, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as out:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if not member.isfile():
                continue
            _, split, label, _ = member.name.split("/")
            if taken.get((split, label), 0) >= COUNT[split]:
                continue
            taken[split, label] = taken.get((split, label), 0) + 1
            clean = tarfile.TarInfo(member.name)
            clean.size = member.size
            out.addfile(clean, archive.extractfile(member))
    print({key: count for key, count in sorted(taken.items())})


if __name__ == "__main__":
    main(*sys.argv[1:])
