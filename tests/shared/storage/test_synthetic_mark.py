import json
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from shared.errors import InputError
from shared.storage.synthetic_mark import SyntheticMark, marked_png, read_mark, seed_range, write_array_mark

MODEL = "0123456789abcdef" * 4
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
TERM = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.fixture
def pixels():
    return np.random.default_rng(3).integers(0, 256, (7, 9, 3), np.uint8)


def chunks(png):
    """(type, content) of each chunk, read without Pillow."""
    place = 8
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        yield kind, png[place + 8 : place + 8 + length]
        place += 12 + length


def png_of(tmp_path, *extra, name="a.png"):
    """A picture with further chunks behind its pixels."""
    plain = tmp_path / "plain.png"
    Image.new("RGB", (3, 3), "red").save(plain)
    data = plain.read_bytes()
    added = b"".join(
        struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in extra
    )
    (tmp_path / name).write_bytes(data[:-12] + added + data[-12:])
    return tmp_path / name


def test_a_program_that_knows_xmp_and_iptc_finds_the_mark(pixels):
    found = dict(chunks(marked_png(pixels, SyntheticMark(MODEL, "5"))))
    keyword, _, rest = found[b"iTXt"].partition(b"\0")
    assert keyword == b"XML:com.adobe.xmp" and rest[:4] == b"\0\0\0\0"  # not compressed, no language
    tree = ElementTree.fromstring(rest[4:].decode("utf-8"))
    assert [each.text for each in tree.iter(IPTC)] == [TERM]


def test_the_mark_changes_no_pixel_and_names_model_and_seeds(pixels, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(marked_png(pixels, SyntheticMark(MODEL, "5 to 8")))
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    texts = [body for kind, body in chunks(path.read_bytes()) if kind == b"tEXt"]
    assert f"maskfed:model\0{MODEL}".encode() in texts and b"maskfed:seeds\x005 to 8" in texts
    assert read_mark(path) == SyntheticMark(MODEL, "5 to 8")


@pytest.mark.parametrize(("first", "count", "text"), [(5, 1, "5"), (0, 32, "0 to 31")])
def test_seeds_are_first_and_last(first, count, text):
    assert seed_range(first, count) == text


def test_marks_of_other_programs_are_read(tmp_path):
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" e:DigitalSourceType="'
        f'{TERM.replace("http:", "https:")}"/></rdf:RDF></x:xmpmeta>'
    ).encode()
    Image.new("RGB", (3, 3)).save(tmp_path / "a.jpg", xmp=xmp)
    assert read_mark(tmp_path / "a.jpg") == SyntheticMark()
    behind = png_of(tmp_path, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    assert read_mark(behind) == SyntheticMark()


def test_a_photograph_has_no_mark(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    xmp = TERM.replace("trainedAlgorithmicMedia", "digitalCapture").join((">DigitalSourceType>", "<")).encode()
    Image.new("RGB", (3, 3)).save(tmp_path / "b.jpg", xmp=xmp)
    assert read_mark(tmp_path / "a.png") is None and read_mark(tmp_path / "b.jpg") is None


def test_text_of_a_hostile_file_never_reaches_the_terminal(pixels, tmp_path):
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<a:DigitalSourceType>" + TERM.encode()
    hostile = png_of(
        tmp_path, (b"iTXt", xmp), (b"tEXt", b"maskfed:model\0\x1b[2Jgood"), (b"tEXt", b"maskfed:seeds\x001\n2")
    )
    assert str(read_mark(hostile)) == ("generated (trainedAlgorithmicMedia), model not recorded, seed not recorded")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1"])
def test_what_is_no_picture_is_one_line(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: not a picture that can be read; give"):
        read_mark(tmp_path / "a.png")


def test_a_text_bomb_is_one_line(tmp_path):
    bomb = zlib.compress(b" " * (64 << 20))
    path = png_of(tmp_path, (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb))
    with pytest.raises(InputError, match="not a picture"):
        read_mark(path)


def test_an_array_is_marked_by_the_file_beside_it(tmp_path):
    array = tmp_path / "x.npy"
    np.save(array, np.zeros((2, 3, 4, 4), np.uint8))
    assert read_mark(array) is None
    side = write_array_mark(array, SyntheticMark(MODEL, "0 to 1"))
    assert side.name == "x.npy.json" and json.loads(side.read_text())["digital_source_type"] == TERM
    assert read_mark(array) == SyntheticMark(MODEL, "0 to 1")
    np.save(array, np.ones((2, 3, 4, 4), np.uint8))
    with pytest.raises(InputError, match="belongs to another content"):
        read_mark(array)
    for damaged in ("[]", "{", '{"sha256": 1}'):
        side.write_text(damaged)
        with pytest.raises(InputError, match="not the mark of an array"):
            read_mark(array)
