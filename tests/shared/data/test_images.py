import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data.images import ignored_text, list_images
from shared.data.pixels import UnreadableImageError
from shared.errors import InputError

RNG = np.random.default_rng(0)


def encode(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RNG.integers(0, 256, shape, np.uint8))


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


def test_files_that_are_no_images_are_counted_by_suffix(tmp_path):
    fill(tmp_path, "a.jfif", "b.JPE", "c.png", "d.pgm")
    for name in ("1.raw", "2.RAW", "3.raw", "notes.txt", "README", ".hidden.raw"):
        (tmp_path / name).write_bytes(b"x")
    source = list_images(tmp_path)
    assert source.names == ("a.jfif", "b.JPE", "c.png", "d.pgm")
    assert dict(source.ignored) == {".raw": 3, ".txt": 1, "without suffix": 1}
    assert ignored_text(source.ignored) == "3 .raw, 1 .txt, 1 without suffix ignored"
    assert ignored_text({}) == ""
    assert ignored_text({f".{letter}": 1 for letter in "abcdefgh"}).endswith("1 .f, 2 others ignored")


def test_where_heic_cannot_be_read_its_count_names_the_command(monkeypatch):
    monkeypatch.setattr("shared.data.images.HAS_HEIF", False)
    assert ignored_text({".heic": 5}) == "5 .heic ignored (to read .heic: pip install 'maskfed[heic]')"


def test_links_that_lead_nowhere_or_to_themselves_and_special_files_are_counted(tmp_path):
    fill(tmp_path, "a.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    source = list_images(tmp_path)
    assert source.names == ("a.png",)
    assert dict(source.ignored) == {"broken links": 2, "special files": 1, "folders met before": 1}


@pytest.mark.parametrize("link", ["aa", "zz"])
def test_a_folder_that_is_reached_in_two_ways_is_named_by_its_own_place(tmp_path, link):
    """Persons are folders: they must not follow from the order in which a file system lists them."""
    fill(tmp_path, "people/ann/1.png", "people/bob/1.png")
    (tmp_path / link).symlink_to("people")
    (tmp_path / "people" / link).symlink_to("ann")
    source = list_images(tmp_path)
    assert source.names == ("people/ann/1.png", "people/bob/1.png")
    assert dict(source.ignored) == {"folders met before": 2}


def test_previews_and_deleted_files_of_file_servers_are_no_pictures(tmp_path):
    fill(tmp_path, "ann/1.png", "bob/1.png", "ann/@eaDir/1.png/thumb.png", "#recycle/2.png", "$RECYCLE.BIN/3.png")
    source = list_images(tmp_path)
    assert source.names == ("ann/1.png", "bob/1.png") and source.persons == ("ann", "bob")
    assert dict(source.ignored) == {"folders of the system": 3}
    files = [(str(path.relative_to(tmp_path)), PNG) for path in sorted(tmp_path.rglob("*.png")) if path.is_file()]
    archive = list_images(zipped(tmp_path / "a.zip", files))
    assert (archive.names, archive.persons, archive.ignored) == (source.names, source.persons, source.ignored)


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


PNG = encode(noise(8, 8))


def test_zip_of_a_program_for_windows_has_folders_too(tmp_path):
    path = zipped(tmp_path / "a.zip", [])
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("ann\\1.png", "bob\\1.png"):
            entry = zipfile.ZipInfo()
            entry.filename = name
            archive.writestr(entry, PNG)
    source = list_images(path)
    assert source.names == ("ann/1.png", "bob/1.png") and source.persons == ("ann", "bob")
    assert source.read("bob/1.png") == PNG


def test_zip_of_a_folder_beside_the_one_where_it_was_made_loses_nothing(tmp_path):
    source = list_images(zipped(tmp_path / "a.zip", [("../faces/ann/1.png", PNG), ("../faces/bob/.x.png", b"x")]))
    assert source.names == ("../faces/ann/1.png",) and source.read(source.names[0]) == PNG


def test_zip_member_without_a_name_is_no_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        nameless = zipfile.ZipInfo()
        nameless.filename = ""
        archive.writestr(nameless, PNG)
        archive.writestr("1.png", PNG)
    assert list_images(tmp_path / "a.zip").names == ("1.png",)


def test_zip_counts_what_it_leaves_out_and_names_a_damaged_member(tmp_path):
    path = zipped(tmp_path / "a.zip", [("1.png", PNG), ("2.png", PNG), ("x.raw", b"x")])
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(data)
    source = list_images(path)
    assert dict(source.ignored) == {".raw": 1}
    with pytest.raises(UnreadableImageError, match="damaged in the archive: Bad CRC-32"):
        source.read("1.png")
    assert source.read("2.png") == PNG


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_is_unreadable_however_it_is_compressed(tmp_path, method):
    """Each kind of compression has errors of its own, and bzip2's looks like one of the machine."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("1.png", PNG * 9)
        archive.writestr("2.png", PNG)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.index(b"1.png") + 5
    data[place + 12 : place + 40] = b"\xff" * 28
    (tmp_path / "a.zip").write_bytes(data)
    source = list_images(tmp_path / "a.zip")
    with pytest.raises(UnreadableImageError, match="damaged in the archive"):
        source.read("1.png")
    assert source.read("2.png") == PNG


def test_what_no_picture_needs_is_not_taken_into_memory(tmp_path, monkeypatch):
    """A megabyte of zip may hold a gigabyte of zeros."""
    monkeypatch.setattr("shared.data.images.MOST_FILE_BYTES", len(PNG))
    fill(tmp_path / "faces", "1.png", "2.png")
    (tmp_path / "faces" / "2.png").write_bytes(PNG + b"0")
    for source in (list_images(tmp_path / "faces"), list_images(zipped(tmp_path / "a.zip", [("2.png", PNG + b"0")]))):
        with pytest.raises(UnreadableImageError, match="bytes, at most"):
            source.read("2.png")
    assert list_images(tmp_path / "faces").read("1.png") == (tmp_path / "faces" / "1.png").read_bytes()


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("second", ["1.png", "./1.png"])
def test_two_members_of_one_name_are_refused(tmp_path, second):
    path = zipped(tmp_path / "a.zip", [("1.png", PNG), (second, PNG)])
    with pytest.raises(InputError, match=r"two members are called '1\.png'"):
        list_images(path)


def test_a_folder_that_cannot_be_read_stops_the_listing(tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def deny(place):
        if Path(place).name == "locked":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr("shared.data.images.os.scandir", deny)
    with pytest.raises(InputError, match=r"Permission denied: .*locked; cure it"):
        list_images(tmp_path)
