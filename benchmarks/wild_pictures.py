"""Odd pictures, each with the right pixels, computed here, or the line that has to come."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shared.data.pixels import decode

SIDE = 8


@dataclass(frozen=True)
class Case:
    """One input: `act` gets a folder of its own; its result must equal `value`, or its error match `line`."""

    kind: str
    act: Callable[[Path], object]
    value: object = None
    line: str = ""


def picture(rng: random.Random) -> Case:
    """A lossless file of some mode; Pillow's own conversion is the reference."""
    mode = rng.choice(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
    kind = "TIFF" if mode == "CMYK" else rng.choice(["PNG", "TIFF"])
    shown = Image.fromarray(pixels(rng)).convert("RGB" if mode in ("RGBA", "LA") else mode)
    if mode in ("RGBA", "LA"):
        shown = shown.convert(mode)
        shown.putalpha(rng.choice([0, 255]))
    flat = shown.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", flat.size, (0, 0, 0, 255)), flat).convert("RGB")
    data = encoded(shown, kind)
    return Case("pictures", lambda _: decode(data, SIDE).tobytes(), np.asarray(expected).transpose(2, 0, 1).tobytes())


def deep_picture(rng: random.Random) -> Case:
    """8, 12 or 16 bits in wider samples, or a range that nothing tells."""
    bits = rng.choice([8, 12, 16])
    wide = np.array([[rng.randrange(2**bits) for _ in range(SIDE)] for _ in range(SIDE)])
    wide[0, 0] = 2**bits - 1
    store = rng.choice([np.uint16, np.int32, np.float32])
    data = encoded(Image.fromarray(wide.astype(store)), "TIFF")
    bad = rng.random() < 0.3
    if bad:
        data = encoded(Image.fromarray((wide - rng.choice([300_000, 2**bits])).astype(np.int32)), "TIFF")
    expected = np.broadcast_to(wide >> (bits - 8), (3, SIDE, SIDE)).astype(np.uint8).tobytes()
    return Case("deep", lambda _: decode(data, SIDE).tobytes(), expected, "no known range" if bad else "")


def raw_picture(rng: random.Random) -> Case:
    """What Pillow does not write: deep grey with a transparent value or white as zero, sRGB beside a gamma."""
    deep = np.array([[rng.randrange(2**16) for _ in range(SIDE)] for _ in range(SIDE)])
    colours, hidden = pixels(rng), int(deep[0, 0])
    grey = np.where(deep == hidden, 0, deep >> 8)
    other_gamma = [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", rng.randrange(20_000, 200_000)))]
    planes = [(b"tRNS", struct.pack(">HHH", 1, 2, 3))]
    data, expected, line = rng.choice(
        [
            (raw_png(deep, 0, (b"tRNS", struct.pack(">H", hidden))), np.broadcast_to(grey, (3, SIDE, SIDE)), ""),
            (inverted_tiff(deep), np.broadcast_to(65535 - deep >> 8, (3, SIDE, SIDE)), ""),
            (raw_png(colours, 2, *other_gamma, bits=8), colours.transpose(2, 0, 1), ""),
            (raw_png(colours.astype(int) * 257, 2, *planes), grey, "transparent colour"),
            (raw_png(deep % 256, 3, bits=8), grey, "without its palette"),
        ]
    )
    return Case("raw", lambda _: decode(data, SIDE).tobytes(), expected.astype(np.uint8).tobytes(), line)


def raw_png(values: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes], bits: int = 16) -> bytes:
    """PNG of 8 or 16 bits with chunks of its own before the pixels."""
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in values)
    return framed_png(rows, values.shape[:2], bits, colour_type, *chunks)


def framed_png(rows: bytes, shape: tuple[int, ...], bits: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """PNG of rows that are filtered and packed already."""
    header = struct.pack(">IIBBBBB", shape[1], shape[0], bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def shallow_picture(rng: random.Random) -> Case:
    """Grey of 1, 2, 4 or 8 bits, one value of which is transparent: it is laid over black."""
    bits = rng.choice([1, 2, 4, 8])
    highest = 2**bits - 1
    values = np.array([[rng.randrange(highest + 1) for _ in range(SIDE)] for _ in range(SIDE)])
    hidden = rng.randrange(highest + 1)
    places = (values[..., None] >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(places.reshape(SIDE, -1).astype(np.uint8), axis=1)
    shown = np.where(values == hidden, 0, values * 255 // highest)
    data = framed_png(
        b"".join(b"\0" + row.tobytes() for row in packed), (SIDE, SIDE), bits, 0, (b"tRNS", hidden.to_bytes(2))
    )
    expected = np.broadcast_to(shown, (3, SIDE, SIDE)).astype(np.uint8).tobytes()
    return Case("shallow", lambda _: decode(data, SIDE).tobytes(), expected)


def described_picture(rng: random.Random) -> Case:
    """Colours that a PNG describes without a profile: those of sRGB, which is read, or others."""
    colours = pixels(rng)
    srgb = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    gamma, adobe = (b"gAMA", struct.pack(">I", 45455)), (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    chunks, line = rng.choice(
        [
            ([(b"cICP", bytes([1, 13, 0, 1]))], ""),
            ([(b"cICP", bytes([12, 13, 0, 1]))], "without a profile"),
            ([(b"cICP", bytes([9, rng.choice([16, 18]), 0, 1]))], "without a profile"),
            ([gamma, (b"cHRM", struct.pack(">8I", *srgb))], ""),
            ([gamma, (b"cHRM", struct.pack(">8I", *adobe))], "without a profile"),
            ([(b"sRGB", b"\0"), gamma, (b"cHRM", struct.pack(">8I", *adobe))], ""),
        ]
    )
    data = raw_png(colours, 2, *chunks, bits=8)
    return Case("described", lambda _: decode(data, SIDE).tobytes(), colours.transpose(2, 0, 1).tobytes(), line)


def other_format(rng: random.Random) -> Case:
    """A file of a format that no suffix of pictures stands for, which Pillow would read or hand to another program."""
    kind = rng.choice(["TGA", "PCX", "SGI", "ICO", "DDS", "IM", "EPS"])
    shown = Image.fromarray(pixels(rng, 16))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    data = script if kind == "EPS" else encoded(shown, kind)
    return Case("formats", lambda _: decode(data, SIDE).tobytes(), line="not an image of a known format")


def inverted_tiff(values: np.ndarray) -> bytes:
    """TIFF of 16 bits whose tag 262 says that zero is white."""
    data = encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")
    place = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
    return data[:place] + bytes(4) + data[place + 4 :]


def damaged_picture(rng: random.Random) -> Case:
    """A file that is cut off, or is something else."""
    kind = rng.choice(["PNG", "JPEG", "BMP", "GIF"])
    whole = encoded(Image.fromarray(pixels(rng, 64)), kind)
    data = rng.choice([whole[: rng.randrange(len(whole) // 2)], b"", b"<html>" * 9, rng.randbytes(200)])
    return Case("damaged", lambda _: decode(data, SIDE).tobytes(), line=".")


def pixels(rng: random.Random, side: int = SIDE) -> np.ndarray:
    """Noise, uint8 (side, side, 3)."""
    return np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)


def encoded(picture: Image.Image, kind: str) -> bytes:
    """The picture as a file."""
    picture.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()
