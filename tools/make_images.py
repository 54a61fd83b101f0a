"""Makes tests/fixtures/images/: one small file of each kind of image, and what Pillow or arithmetic says is in it; and
tests/fixtures/refused/: kinds that qbheat does not read.

    pip install pillow numpy safetensors
    python3 tools/make_images.py tests/fixtures

`expected.safetensors` holds [height, width, 3] bytes for each file, and under NAME.luma the [height, width] bytes of
one channel. Pillow cannot write interlaced or 16-bit colour PNGs, nor 16-bit colour TIFFs, so these are put together
here; and it does not scale 16 bits to 8 by rounding v/257, so numpy does.
"""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import save_file

FOLDER = Path(sys.argv[1]) / "images"
REFUSED = Path(sys.argv[1]) / "refused"
HEIGHT, WIDTH = 14, 20
BACKGROUND = (255, 255, 255)
EXPECTED: dict[str, np.ndarray] = {}

y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
RGB = np.stack([40 + 9 * x, 30 + 14 * y, 200 - 4 * x - 5 * y], -1).round().astype(np.uint8)
ALPHA = (255 * x / (WIDTH - 1)).round().astype(np.uint8)
GREY = (5 + 6 * x + 9 * y).round().astype(np.uint8)
# Low bytes that differ from the high ones, so that neither cutting nor wrapping passes for scaling.
RGB16 = (RGB.astype(np.uint32) * 257 + (np.arange(RGB.size).reshape(RGB.shape) * 97) % 251).clip(0, 65535).astype(np.uint16)
GREY16 = RGB16[..., 0].copy()
ALPHA16 = (65535 * x / (WIDTH - 1)).round().astype(np.uint16)


def to_8(values: np.ndarray) -> np.ndarray:
    return np.floor(values.astype(np.float64) / 257 + 0.5).astype(np.uint8)


def flat(image: Image.Image) -> Image.Image:
    """RGB, with transparency laid over the background."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGB", image.size, BACKGROUND)
        below.paste(image, mask=image.getchannel("A"))
        return below
    return image.convert("RGB")


def expect(name: str, image: Image.Image) -> None:
    image = flat(image)
    EXPECTED[name] = np.asarray(image).copy()
    EXPECTED[f"{name}.luma"] = np.asarray(image.convert("L")).copy()


def keep(name: str, data: bytes, pixels: np.ndarray | None = None) -> None:
    """Writes a file; what is in it is `pixels` (of 8 bits, with alpha or not), or what Pillow reads from it."""
    (FOLDER / name).write_bytes(data)
    image = Image.open(io.BytesIO(data)) if pixels is None else Image.fromarray(pixels)
    expect(name, ImageOps.exif_transpose(image))


def save(name: str, image: Image.Image, **options) -> None:
    data = io.BytesIO()
    image.save(data, Image.registered_extensions()["." + name.rsplit(".", 1)[1]], **options)
    keep(name, data.getvalue())


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def png(samples: np.ndarray, depth: int, colour: int, interlaced: bool = False) -> bytes:
    """`samples` [height, width, channels] as a PNG of this bit depth and colour type."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def rows(part: np.ndarray) -> bytes:
        out = b""
        for row in part:
            bits = "".join(f"{int(v):0{depth}b}" for v in row.reshape(-1))
            bits += "0" * (-len(bits) % 8)
            out += b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
        return out

    height, width, _ = samples.shape
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        parts = [samples[top::down, left::right] for top, left, down, right in passes]
        data = b"".join(rows(part) for part in parts if part.size)
    else:
        data = rows(samples)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def tiff16(samples: np.ndarray, order: str) -> bytes:
    """`samples` [height, width, channels] of 16 bits as an uncompressed TIFF, "<" or ">" for its byte order."""
    height, width, channels = samples.shape
    data = samples.astype(order + "u2").tobytes()
    depths_at = 8 + len(data)
    depths = struct.pack(f"{order}{channels}H", *[16] * channels)
    short, long = 3, 4
    depth = (depths_at if channels > 2 else 16 << (0 if order == "<" else 16))
    tags = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, depth),
        (259, long, 1, 1),
        (262, long, 1, 2 if channels == 3 else 1),
        (273, long, 1, 8),
        (277, long, 1, channels),
        (278, long, 1, height),
        (279, long, 1, len(data)),
    ]
    directory = struct.pack(order + "H", len(tags))
    directory += b"".join(struct.pack(order + "HHII", *tag) for tag in tags) + struct.pack(order + "I", 0)
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(order + "HI", 42, depths_at + len(depths)) + data + depths + directory


def jpegs() -> None:
    rgb, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    save("baseline.jpg", rgb, quality=95)
    save("progressive.jpg", rgb, quality=95, progressive=True)
    save("grey.jpg", grey, quality=95)
    cmyk = Image.fromarray(np.dstack([255 - RGB, (2 * y).astype(np.uint8)]), "CMYK")
    save("cmyk.jpg", cmyk, quality=95)
    # A file whose channels hold Y, Cb, Cr and K becomes YCCK by the word of its Adobe segment.
    ycc = np.asarray(rgb.convert("YCbCr"))
    data = io.BytesIO()
    Image.fromarray(np.dstack([255 - ycc, (2 * y).astype(np.uint8)]), "CMYK").save(data, "JPEG", quality=95)
    ycck = bytearray(data.getvalue())
    ycck[ycck.index(b"Adobe") + 11] = 2
    keep("ycck.jpg", bytes(ycck))
    for orientation in range(1, 9):
        save(f"exif-{orientation}.jpg", rgb, quality=95, subsampling=0, exif=exif(orientation))


def pngs() -> None:
    rgb, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    for depth in (1, 2, 4):
        samples = (GREY >> (8 - depth))[..., None]
        keep(f"grey-{depth}.png", png(samples, depth, 0), (samples[..., 0] * (255 // (2**depth - 1))).astype(np.uint8))
    save("grey-8.png", grey)
    keep("grey-16.png", png(GREY16[..., None], 16, 0), to_8(GREY16))
    save("grey-alpha.png", Image.merge("LA", (grey, Image.fromarray(ALPHA))))
    samples = np.dstack([GREY16, ALPHA16])
    keep("grey-alpha-16.png", png(samples, 16, 4), np.dstack([to_8(GREY16)] * 3 + [to_8(ALPHA16)]))
    save("rgb.png", rgb)
    save("rgb-rotated.png", rgb, exif=exif(6))
    keep("rgb-16.png", png(RGB16, 16, 2), to_8(RGB16))
    save("rgb-alpha.png", Image.fromarray(np.dstack([RGB, ALPHA])))
    samples = np.dstack([RGB16, ALPHA16])
    keep("rgb-alpha-16.png", png(samples, 16, 6), to_8(samples))
    keep("interlaced.png", png(RGB, 8, 2, interlaced=True), RGB)
    keep("interlaced-grey-2.png", png((GREY >> 6)[..., None], 2, 0, interlaced=True), (GREY >> 6) * 85)
    for colours in (2, 4, 16, 200):
        save(f"palette-{colours}.png", rgb.quantize(colours))
    palette = rgb.quantize(16)
    save("palette-transparent.png", palette, transparency=bytes([0, 60, 128, 200]))


def others() -> None:
    rgb, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
    save("lossless.webp", rgb, lossless=True)
    save("alpha.webp", rgba, lossless=True, exact=True)
    save("lossy.webp", rgb, quality=95)
    save("rotated.webp", rgb, lossless=True, exif=exif(8))
    save("animated.webp", rgb, lossless=True, save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)])
    save("rgb.bmp", rgb)
    save("alpha.bmp", rgba)
    save("grey.bmp", grey)
    save("palette.bmp", rgb.quantize(16))
    save("bits.bmp", grey.point(lambda v: 255 * (v > 99)).convert("1"))
    save("still.gif", rgb.quantize(64))
    save("transparent.gif", rgb.quantize(16), transparency=3)
    second = rgb.transpose(Image.Transpose.ROTATE_180).quantize(64)
    save("animated.gif", rgb.quantize(64), save_all=True, append_images=[second])
    save("grey.tiff", grey)
    save("rgb.tiff", rgb)
    save("rgb-lzw.tiff", rgb, compression="tiff_lzw")
    save("rgb-deflate.tiff", rgb, compression="tiff_adobe_deflate")
    save("alpha.tiff", rgba)
    save("bits.tiff", grey.point(lambda v: 255 * (v > 99)).convert("1"))
    save("cmyk.tiff", Image.fromarray(np.dstack([255 - RGB, (2 * y).astype(np.uint8)]), "CMYK"))
    keep("grey-16.tif", tiff16(GREY16[..., None], "<"), to_8(GREY16))
    keep("grey-16-big.tif", tiff16(GREY16[..., None], ">"), to_8(GREY16))
    keep("rgb-16.tif", tiff16(RGB16, "<"), to_8(RGB16))
    save("rgb.ppm", rgb)
    save("grey.pgm", grey)
    save("bits.pbm", grey.point(lambda v: 255 * (v > 99)).convert("1"))
    text = f"P3\n# as text\n{WIDTH} {HEIGHT}\n255\n" + "\n".join(str(v) for v in RGB.reshape(-1)) + "\n"
    keep("text.ppm", text.encode())
    header = f"P5 {WIDTH} {HEIGHT} 65535\n".encode()
    keep("grey-16.pgm", header + GREY16.astype(">u2").tobytes(), to_8(GREY16))


def refused() -> None:
    rgb, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    rgb.quantize(16).save(REFUSED / "palette.tiff")
    rgb.convert("YCbCr").save(REFUSED / "ycbcr.tiff")
    grey.convert("F").save(REFUSED / "float.tiff")
    grey.convert("I").save(REFUSED / "int32.tiff")


for folder in (FOLDER, REFUSED):
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
jpegs()
pngs()
others()
refused()
save_file(EXPECTED, FOLDER / "expected.safetensors")
