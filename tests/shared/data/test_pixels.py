import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from shared.data.pixels import UnreadableImageError, decode, to_eight_bits

RNG = np.random.default_rng(0)
ORIENTATION = 0x0112
# Linear RGB to XYZ under D65 of Display P3 (SMPTE EG 432-1), Adobe RGB (1998) and sRGB (IEC 61966-2-1).
P3 = [[0.48657095, 0.26566769, 0.19821729], [0.22897456, 0.69173852, 0.07928691], [0.0, 0.04511338, 1.04394437]]
ADOBE = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
SRGB = [[0.4123908, 0.35758434, 0.18048079], [0.21263901, 0.71516868, 0.07219232], [0.01933082, 0.11919478, 0.95053215]]
D65, D50 = np.array([0.95046, 1.0, 1.08906]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def encode(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RNG.integers(0, 256, shape, np.uint8))


def s15(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(kind, space, pcs, tags):
    """An ICC profile, version 2, written by hand (ICC.1:2001-04)."""
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        padded = content + b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", name, place + len(body), len(content))
        body += padded
    header = struct.pack(">I4s4s4s4s4s", place + len(body), b"none", b"\2\x10\0\0", kind, space, pcs)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + s15(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def matrix_profile(matrix, exponent):
    """Profile of a display: its primaries brought to D50 by Bradford's matrix, one exponent for all channels."""
    cones = np.diag(BRADFORD @ D50 / (BRADFORD @ D65))
    to_d50 = np.linalg.inv(BRADFORD) @ cones @ BRADFORD @ np.array(matrix)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + s15(*D50)}
    for column, name in enumerate((b"r", b"g", b"b")):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + s15(*to_d50[:, column]), name + b"TRC": curve}
    return icc(b"mntr", b"RGB ", b"XYZ ", tags)


def srgb_of(linear_HWC):
    linear = np.clip(linear_HWC, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("matrix", "exponent"), [(P3, 2.2), (ADOBE, 563 / 256)], ids=["display-p3", "adobe-rgb"])
@pytest.mark.parametrize(("kind", "has_alpha"), [("PNG", False), ("PNG", True), ("TIFF", False), ("WEBP", False)])
def test_wide_gamut_colours_are_what_a_viewer_shows(matrix, exponent, kind, has_alpha):
    pixels = RNG.integers(0, 256, (16, 16, 3), np.uint8)
    picture = Image.fromarray(pixels)
    if has_alpha:
        picture.putalpha(255)
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(encode(picture, kind, icc_profile=matrix_profile(matrix, exponent), **options), 16)
    linear = (pixels / 255) ** exponent
    expected = srgb_of(linear @ (np.linalg.inv(np.array(SRGB)) @ np.array(matrix)).T).transpose(2, 0, 1)
    assert np.abs(expected - pixels.transpose(2, 0, 1)).max() > 20
    # Within one level, and two where a curve is steep near black: profiles hold 16-bit figures.
    difference = np.abs(found - expected)
    assert np.quantile(difference, 0.98) <= 1 and difference.max() <= 2.5


def lut_profile(corners):
    """A CMYK profile whose Lab colours at the 16 corners of ink are given, as (L, a, b)."""
    lab = [(round(light * 2.55), round(a + 128), round(b + 128)) for light, a, b in corners]
    identity = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += identity * 4 + bytes(value for one in lab for value in one) + identity * 3
    return icc(b"prtr", b"CMYK", b"Lab ", {b"wtpt": b"XYZ \0\0\0\0" + s15(*D50), b"A2B0": lut})


def test_inks_are_shown_by_their_profile():
    # Paper is white; full cyan of this printer is a dark red, which no naive conversion would give.
    corners = [(100, 0, 0) if ink == 0 else (40, 50, 40) if ink == 8 else (0, 0, 0) for ink in range(16)]
    profile = lut_profile(corners)
    cyan, paper = (Image.new("CMYK", (8, 8), inks) for inks in ((255, 0, 0, 0), (0, 0, 0, 0)))
    found = decode(encode(cyan, "TIFF", icc_profile=profile), 8)[:, 4, 4].astype(int)
    # Lab (40, 50, 40) under D50 to sRGB by the formulas of CIE 15 and IEC 61966-2-1.
    fy = (40 + 16) / 116
    xyz_50 = np.array([(fy + 50 / 500) ** 3, fy**3, (fy - 40 / 200) ** 3]) * D50
    cones = np.diag(BRADFORD @ D65 / (BRADFORD @ D50))
    xyz = np.linalg.inv(BRADFORD) @ cones @ BRADFORD @ xyz_50
    assert np.abs(found - srgb_of(np.linalg.inv(np.array(SRGB)) @ xyz)).max() <= 2
    assert decode(encode(paper, "TIFF", icc_profile=profile), 8).min() >= 254
    assert decode(encode(cyan, "TIFF"), 8)[:, 4, 4].tolist() == [0, 255, 255]


@pytest.mark.parametrize("profile", [b"x", matrix_profile(P3, 2.2)[:300], lut_profile([(50, 0, 0)] * 16)])
def test_a_profile_that_is_damaged_or_of_other_channels_is_ignored_as_viewers_do(profile):
    picture = noise(8, 8)
    assert np.array_equal(decode(encode(picture, icc_profile=profile), 8), np.asarray(picture).transpose(2, 0, 1))


def with_gamma(png, gamma):
    return png[:33] + chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000))) + png[33:]


def test_linear_png_is_brightened_by_its_gamma_and_the_usual_one_changes_nothing():
    picture = noise(8, 8)
    pixels = np.asarray(picture).transpose(2, 0, 1)
    assert np.abs(decode(with_gamma(encode(picture), 1.0), 8) - srgb_of(pixels / 255)).max() <= 0.5
    assert np.array_equal(decode(with_gamma(encode(picture), 0.45455), 8), pixels)
    # PNG, 11.3.2.5: the chunk sRGB stands above the gamma.
    assert np.array_equal(
        decode(
            raw_png(np.asarray(picture), 2, chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100_000)), bits=8),
            8,
        ),
        pixels,
    )


BYTES = RNG.integers(0, 256, (8, 8))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RNG.integers(0, 2**16, (8, 8)).astype(np.uint16), lambda values: values >> 8),
        (BYTES.astype(np.uint16), lambda values: values),
        ((BYTES * 16 + 7).astype(np.uint16), lambda values: values >> 4),
        (BYTES.astype(np.int32), lambda values: values),
        ((BYTES * 257).astype(np.int32), lambda values: values >> 8),
        ((BYTES / 255).astype(np.float32), lambda _: BYTES),
        (BYTES.astype(np.float32), lambda _: BYTES),
        ((BYTES * 257.0).astype(np.float32), lambda _: BYTES * 257 >> 8),
        (np.zeros((8, 8), np.uint16), lambda values: values),
    ],
    ids=["16", "8-in-16", "12-in-16", "8-in-32", "16-in-32", "unit", "float-8", "float-16", "black"],
)
def test_deep_files_are_scaled_by_what_is_in_them(values, expected):
    found = decode(encode(Image.fromarray(values), "TIFF"), 8)
    assert np.array_equal(found, np.broadcast_to(expected(values), (3, 8, 8)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[0.0, np.nan]], "not finite"),
        ([[0.0, np.inf]], "not finite"),
        ([[-1.0, 1.0]], "from -1 to 1"),
        ([[0, 70_000]], "from 0 to 70000"),
        ([[-5, 9]], "from -5 to 9"),
    ],
)
def test_deep_files_without_a_known_range_are_refused_with_the_reason(values, words):
    values = np.array(values)
    stored = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
    with pytest.raises(UnreadableImageError, match=words):
        decode(encode(Image.fromarray(stored), "TIFF"), 8)
    with pytest.raises(UnreadableImageError):
        to_eight_bits(np.zeros((0, 3)))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(values, colour_type, *chunks, bits=16):
    """PNG as Pillow does not write it: 16 bits per channel, or with chunks of one's own before the pixels."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_rgb_png(values_HWC, *chunks):
    return raw_png(values_HWC, 2, *chunks)


def test_one_deep_grey_that_means_transparent_is_laid_over_black():
    values = RNG.integers(1, 2**16, (8, 8))
    values[2, 3] = values[4, 5] = 0xBEEF
    expected = np.where(values == 0xBEEF, 0, values >> 8)
    found = decode(raw_png(values, 0, chunk(b"tRNS", struct.pack(">H", 0xBEEF))), 8)
    assert np.array_equal(found, np.broadcast_to(expected, (3, 8, 8)))


def tiff_tag(data, tag, value):
    """The same little-endian TIFF with another value of a short tag that it has."""
    start = data.index(struct.pack("<HHI", tag, 3, 1))
    return data[: start + 8] + struct.pack("<I", value) + data[start + 12 :]


def test_deep_grey_whose_zero_is_white_is_turned_round():
    values = RNG.integers(0, 2**16, (8, 8)).astype(np.uint16)
    found = decode(tiff_tag(encode(Image.fromarray(values), "TIFF"), 262, 0), 8)
    assert np.array_equal(found, np.broadcast_to(65535 - values >> 8, (3, 8, 8)))


def test_what_pillow_would_read_as_another_picture_is_refused():
    values = RNG.integers(0, 2**16, (8, 8, 3))
    with pytest.raises(UnreadableImageError, match="transparent colour"):
        decode(deep_rgb_png(values, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))), 8)
    with pytest.raises(UnreadableImageError, match="without its palette"):
        decode(raw_png(BYTES, 3, bits=8), 8)
    assert decode(raw_png(BYTES, 3, chunk(b"PLTE", bytes(range(256)) * 3), bits=8), 8).any()


def test_deep_planes_are_refused_and_shallow_ones_read():
    pixels = np.asarray(noise(8, 8))
    for bits, store in ((8, "u1"), (16, "<u2")):
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1).astype(store) * (257 if bits == 16 else 1)).tobytes()
        size = len(planes) // 3
        long = [(258, 3, [bits] * 3), (273, 4, [8, 8 + size, 8 + 2 * size]), (279, 4, [size] * 3)]
        short = [(256, 8), (257, 8), (259, 1), (262, 2), (277, 3), (278, 8), (284, 2)]
        place, extra, tags = 8 + len(planes), b"", []
        for tag, kind, values in long:
            tags.append(struct.pack("<HHII", tag, kind, 3, place + 2 + 12 * 10 + 4 + len(extra)))
            extra += struct.pack("<3H" if kind == 3 else "<3I", *values)
        tags += [struct.pack("<HHII", tag, 3, 1, value) for tag, value in short]
        table = struct.pack("<H", 10) + b"".join(sorted(tags, key=lambda each: each[:2][::-1])) + bytes(4)
        data = b"II*\0" + struct.pack("<I", place) + planes + table + extra
        if bits == 8:
            assert np.array_equal(decode(data, 8), pixels.transpose(2, 0, 1))
        else:
            with pytest.raises(UnreadableImageError, match="separate planes"):
                decode(data, 8)


def test_deep_colours_are_cut_to_their_high_bytes_but_never_to_black():
    values = RNG.integers(0, 2**16, (8, 8, 3))
    assert np.array_equal(decode(deep_rgb_png(values), 8), (values >> 8).transpose(2, 0, 1))
    with pytest.raises(UnreadableImageError, match="shows black"):
        decode(deep_rgb_png(values >> 8), 8)
    with pytest.raises(UnreadableImageError, match="shows black"):
        decode(deep_rgb_png(values >> 4), 8)


def test_square_of_the_right_size_is_returned_unchanged():
    picture = noise(16, 16)
    assert np.array_equal(decode(encode(picture), 16), np.asarray(picture).transpose(2, 0, 1))


def test_centre_crop_then_antialiased_bicubic_resize():
    picture = noise(40, 64)
    expected = picture.crop((12, 0, 52, 40)).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(decode(encode(picture), 16), np.asarray(expected).transpose(2, 0, 1))


def test_explicit_crop_counts_source_pixels_and_never_exceeds_the_picture():
    picture = noise(40, 30)
    assert np.array_equal(
        decode(encode(picture), 8, crop=8), np.asarray(picture.crop((11, 16, 19, 24))).transpose(2, 0, 1)
    )
    assert np.array_equal(decode(encode(picture), 30, crop=99), decode(encode(picture), 30))


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(decode(encode(Image.fromarray(stripes)), 8)[:, :, 1:-1]) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # A red corner: where it has to end up for each orientation of a 4 x 4 picture, as (row, column).
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0] = (255, 0, 0)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    corner = {1: (0, 0), 2: (0, 3), 3: (3, 3), 4: (3, 0), 5: (0, 0), 6: (0, 3), 7: (3, 3), 8: (3, 0)}[orientation]
    found = decode(encode(Image.fromarray(pixels), exif=exif), 4)
    assert tuple(np.argwhere(found[0] == 255)[0]) == corner


def test_grey_becomes_three_equal_channels():
    picture = noise(8, 8, 1)
    found = decode(encode(picture), 8)
    assert np.array_equal(found, np.broadcast_to(np.asarray(picture), (3, 8, 8)))


def test_transparency_is_laid_over_black():
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[:, :4, 3] = 0
    pixels[:, 4:, 3] = 255
    found = decode(encode(Image.fromarray(pixels)), 8)
    assert found[:, :, :4].max() == 0 and found[:, :, 4:].min() == 200


def test_transparent_palette_and_grey_alpha_and_cmyk_decode_to_rgb():
    palette = noise(8, 8).quantize(8)
    assert decode(encode(palette, "GIF", transparency=0), 8).shape == (3, 8, 8)
    assert decode(encode(Image.merge("LA", (noise(8, 8, 1), noise(8, 8, 1)))), 8).shape == (3, 8, 8)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode(encode(cmyk, "JPEG", quality=95), 8)
    assert red[0].min() > 200 and red[1:].max() < 60


def test_large_jpeg_at_a_fraction_of_its_size_looks_the_same():
    smooth = noise(8, 8).resize((512, 512), Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95)
    slow = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(decode(data, 32).astype(int) - np.asarray(slow).transpose(2, 0, 1)).mean() < 1.5


def huge_png():
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [b"", b"not a picture", encode(noise(64, 64))[:300], encode(noise(64, 64), "JPEG")[:200], huge_png()],
    ids=["empty", "text", "cut png", "cut jpeg", "bomb"],
)
def test_damaged_and_hostile_files_are_unreadable_not_a_crash(data):
    with pytest.raises(UnreadableImageError):
        decode(data, 16)


# Pillow warns about damaged TIFF tags before it raises.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bytes_never_raise_anything_else():
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        original = encode(noise(16, 16), kind)
        for _ in range(60):
            data = bytearray(original)
            for position in RNG.integers(0, len(data), 4):
                data[position] = RNG.integers(0, 256)
            try:
                assert decode(bytes(data), 8).shape == (3, 8, 8)
            except UnreadableImageError:
                continue


def test_several_pages_of_one_size_are_refused_and_previews_are_not():
    page, other, preview = noise(16, 16), noise(16, 16), noise(4, 4)
    with pytest.raises(UnreadableImageError, match="2 pages of one size: save each page"):
        decode(encode(page, "TIFF", save_all=True, append_images=[other]), 16)
    with_preview = encode(page, "TIFF", save_all=True, append_images=[preview])
    assert np.array_equal(decode(with_preview, 16), np.asarray(page).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "SGI", "DDS", "ICNS"])
def test_what_is_no_format_of_pictures_here_is_not_read_under_the_suffix_of_one(kind):
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        decode(encode(noise(16, 16), kind), 8)


def test_postscript_is_run_by_nobody(monkeypatch):
    """Pillow hands it to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", 8)
