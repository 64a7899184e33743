import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from shared.data.images import UnreadableImageError, decode, list_images, read_identities
from shared.errors import InputError

RNG = np.random.default_rng(0)
ORIENTATION = 0x0112


def encode(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RNG.integers(0, 256, shape, np.uint8))


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


def test_sixteen_bit_grey_keeps_its_high_byte():
    values = RNG.integers(0, 2**16, (8, 8)).astype(np.uint16)
    assert np.array_equal(decode(encode(Image.fromarray(values)), 8)[0], values >> 8)


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
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

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


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise(8, 8)))


def test_folder_is_listed_sorted_without_hidden_files_and_other_kinds(tmp_path):
    fill(tmp_path, "b.png", "a.JPG", ".hidden.png", ".git/x.png")
    (tmp_path / "notes.txt").write_text("x")
    source = list_images(tmp_path)
    assert source.names == ("a.JPG", "b.png")
    assert source.persons is None
    assert source.read("b.png") == (tmp_path / "b.png").read_bytes()


def test_class_folders_are_persons_but_one_common_top_folder_is_not(tmp_path):
    fill(tmp_path, "set/ann/1.png", "set/bob/1.png", "set/bob/2.png")
    assert list_images(tmp_path).persons == ("ann", "bob", "bob")
    fill(tmp_path / "one", "faces/1.png", "faces/2.png")
    assert list_images(tmp_path / "one").persons is None
    fill(tmp_path, "set/loose.png")
    assert list_images(tmp_path / "set").persons is None


def test_albums_below_the_first_folder_are_the_same_person(tmp_path):
    fill(tmp_path, "ann/2019/1.png", "ann/2020/1.png", "bob/1.png")
    assert list_images(tmp_path).persons == ("ann", "ann", "bob")


def test_linked_class_folders_are_followed_and_loops_end(tmp_path):
    fill(tmp_path, "store/1.png", "set/ann/1.png")
    (tmp_path / "set" / "bob").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "ann" / "up").symlink_to(tmp_path / "set")
    assert list_images(tmp_path / "set").names == ("ann/1.png", "bob/1.png")


def test_zip_reads_like_its_folder(tmp_path):
    fill(tmp_path / "set", "ann/1.png", "bob/1.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.mkdir("set")
        for name in ("set/ann/1.png", "set/bob/1.png"):
            archive.write(tmp_path / name, name)
        archive.writestr("__MACOSX/set/ann/._1.png", b"x")
    source = list_images(tmp_path / "set.zip")
    assert source.names == ("set/ann/1.png", "set/bob/1.png")
    assert source.persons == ("ann", "bob")
    assert source.read("set/ann/1.png") == (tmp_path / "set/ann/1.png").read_bytes()


def test_fingerprint_changes_with_content_and_names_only(tmp_path):
    fill(tmp_path, "a.png")
    first = list_images(tmp_path).fingerprint
    assert list_images(tmp_path).fingerprint == first
    fill(tmp_path, "b.png")
    assert list_images(tmp_path).fingerprint != first


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "no image file in it"),
        (lambda path: path.write_text("x"), "is not a zip file"),
    ],
)
def test_bad_source_is_one_line_with_the_remedy(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(InputError, match=words):
        list_images(tmp_path / "x")


def test_identity_file_names_persons_by_file_name_or_path(tmp_path):
    path = tmp_path / "identity_CelebA.txt"
    path.write_text("000001.jpg 2880\na/000002.jpg 2937\n\nb/000002.jpg 1\n")
    assert read_identities(path, ("a/000001.jpg", "a/000002.jpg", "b/000002.jpg")) == ("2880", "2937", "1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("000001.jpg", "1 words"),
        ("other.jpg 1", "no line for 1 of 1 images"),
        ("000001.jpg 7\n\n000001.jpg 8", "lines 1 and 3 give 000001.jpg to two persons, 7 and 8"),
    ],
)
def test_bad_identity_file_is_refused(tmp_path, text, words):
    path = tmp_path / "identities.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_identities(path, ("000001.jpg",))
    with pytest.raises(InputError, match="not a text file"):
        read_identities(tmp_path / "none", ())
