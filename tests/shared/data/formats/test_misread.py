"""What Pillow would show otherwise than a viewer does; the rest is tested through `decode` in `test_pixels`."""

import struct
import zlib

import numpy as np
import pytest

from shared.data.formats.misread import FORMATS
from shared.data.pixels import UnreadableImageError, decode, stored_size

COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
SRGB = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


def png(rows: bytes, bits: int, colour_type: int, **chunks: bytes) -> bytes:
    """A picture of 8 x 8 with chunks before its pixels."""
    parts = {"IHDR": struct.pack(">IIBBBBB", 8, 8, bits, colour_type, 0, 0, 0), **chunks}
    parts |= {"IDAT": zlib.compress(rows), "IEND": b""}
    framed = [(name.encode() + body, len(body)) for name, body in parts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk, size in framed
    )


def coloured(**chunks: bytes) -> bytes:
    return png(b"".join(b"\0" + row.tobytes() for row in COLOURS), 8, 2, **chunks)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("hidden", ["lowest", "middle", "highest", "beyond"])
def test_the_transparent_value_of_shallow_grey_is_laid_over_black(bits: int, hidden: str):
    highest = 2**bits - 1
    values = np.arange(64).reshape(8, 8) % (highest + 1)
    key = {"lowest": 0, "middle": highest // 2, "highest": highest, "beyond": highest + 2**bits}[hidden]
    places = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = b"".join(b"\0" + np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in places)
    shown = np.where(values == key & highest, 0, values * 255 // highest)
    found = decode(png(rows, bits, 0, tRNS=struct.pack(">H", key)), 8)
    assert np.array_equal(found, np.broadcast_to(shown, (3, 8, 8)))


@pytest.mark.parametrize(
    "chunks",
    [
        {"cICP": bytes([12, 13, 0, 1])},
        {"cICP": bytes([9, 16, 0, 1])},
        {"gAMA": struct.pack(">I", 45455), "cHRM": struct.pack(">8I", *ADOBE)},
    ],
    ids=["Display-P3", "HDR", "Adobe RGB"],
)
def test_colours_that_numbers_alone_describe_are_refused(chunks: dict[str, bytes]):
    with pytest.raises(UnreadableImageError, match="colours are described without a profile"):
        decode(coloured(**chunks), 8)
    assert stored_size(coloured(**chunks)) == (8, 8)


@pytest.mark.parametrize(
    "chunks",
    [
        {"cICP": bytes([1, 13, 0, 1])},
        {"gAMA": struct.pack(">I", 45455), "cHRM": struct.pack(">8I", *SRGB)},
        {"sRGB": b"\0", "gAMA": struct.pack(">I", 45455), "cHRM": struct.pack(">8I", *ADOBE)},
        {"cHRM": struct.pack(">8I", *ADOBE)},
    ],
    ids=["cICP of sRGB", "its primaries", "sRGB stands above them", "no gamma: viewers do not look"],
)
def test_srgb_is_read_however_it_is_described(chunks: dict[str, bytes]):
    assert np.array_equal(decode(coloured(**chunks), 8), COLOURS.transpose(2, 0, 1))


def test_formats_that_need_another_program_or_have_no_mark_are_not_among_the_known():
    assert not {"EPS", "WMF", "TGA", "PDF"} & set(FORMATS) and {"PNG", "JPEG", "TIFF", "WEBP"} <= set(FORMATS)
