"""A picture is known by its samples, whatever a program without loss has made of its file."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from client.data.file_records import look, samples_digest
from shared.data.image_set import ImageCache
from shared.data.images import list_images
from shared.data.pixels import UnreadableImageError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

CHUNK = b"gAMA" + struct.pack(">I", 100_000)
GAMMA = struct.pack(">I", 4) + CHUNK + struct.pack(">I", zlib.crc32(CHUNK))
"""Of a PNG with linear samples, to stand behind its header."""


def picture(height: int = 11, width: int = 14, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def with_orientation(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return file_of(image, exif=exif)


SAME: dict[str, Callable[[Image.Image], bytes]] = {
    "compressed harder": lambda image: file_of(image, compress_level=9),
    "BMP": lambda image: file_of(image, "BMP"),
    "WebP without loss": lambda image: file_of(image, "WEBP", lossless=True),
    "TIFF": lambda image: file_of(image, "TIFF", compression="tiff_lzw"),
    "turned by its tag": with_orientation,
    "with a profile": lambda image: file_of(image, icc_profile=SRGB),
    "with a gamma": lambda image: file_of(image)[:33] + GAMMA + file_of(image)[33:],
    "with an alpha channel": lambda image: file_of(image.convert("RGBA")),
    **{f"transposed, {way.name}": lambda image, way=way: file_of(image.transpose(way)) for way in Image.Transpose},
}


@pytest.mark.parametrize("way", SAME)
def test_a_copy_without_loss_has_the_same_samples(way: str):
    assert samples_digest(SAME[way](picture())) == samples_digest(file_of(picture()))


def test_a_jpeg_is_known_in_a_format_without_loss():
    jpeg = file_of(picture(64, 80), "JPEG", quality=80)
    with Image.open(io.BytesIO(jpeg)) as decoded:
        assert samples_digest(file_of(decoded.convert("RGB"))) == samples_digest(jpeg)


def test_grey_and_palettes_are_what_they_show():
    for other in (picture().convert("L"), picture().quantize(16)):
        assert samples_digest(file_of(other)) == samples_digest(file_of(other.convert("RGB")))


def test_a_picture_whose_corners_tie_is_known_however_it_is_turned():
    tile = np.asarray(picture(4, 4))
    whole = Image.fromarray(np.tile(tile, (2, 2, 1)))
    found = {samples_digest(file_of(whole.transpose(way))) for way in Image.Transpose}
    assert found == {samples_digest(file_of(whole))}


def test_other_samples_are_another_picture():
    changed = np.array(picture())
    changed[3, 4, 1] ^= 1
    others = [Image.fromarray(changed), picture(seed=1), picture().resize((7, 11)), picture().crop((0, 0, 14, 10))]
    assert len({samples_digest(file_of(each)) for each in [picture(), *others]}) == 5
    # The same numbers in another shape.
    flat = [Image.fromarray(np.asarray(picture()).reshape(shape)) for shape in ((11, 14, 3), (7, 22, 3))]
    assert len({samples_digest(file_of(each)) for each in flat}) == 2


def test_what_cannot_be_decoded_is_named():
    with pytest.raises(UnreadableImageError):
        samples_digest(b"no picture")


def test_every_file_is_recorded_in_order_and_pictures_three_times(tmp_path: Path):
    for number in range(70):
        (tmp_path / f"{number:02d}.png").write_bytes(file_of(picture(seed=number % 50)))
    (tmp_path / "99.png").write_bytes(b"no picture")
    source = list_images(tmp_path)
    pixels = np.arange(70 * 3, dtype=np.uint8).reshape(70, 3, 1, 1)
    cache = ImageCache(lambda: pixels, 70, 1, names=source.names[:-1])
    seen = look(source, cache, None, b"k" * 32, b"m" * 32)
    assert len(seen.files) == len(seen.machine_files) == 71
    assert [each.records[0] for each in seen.pictures] == seen.files[:-1]
    assert [each.row for each in seen.pictures] == list(range(70))
    assert {len(each.records) for each in seen.pictures} == {3}
    assert seen.pictures[3].records[2] == seen.pictures[53].records[2] != seen.pictures[4].records[2]
    assert seen.sides == [11] * 70
    assert {record for each in seen.pictures for record in each.records}.isdisjoint(
        record for records in seen.machine_records for record in records
    )
