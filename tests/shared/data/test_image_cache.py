import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.data import decoding, pixels, synthetic
from shared.data.image_cache import BuildOptions, build_cache, open_images
from shared.data.image_set import open_cache
from shared.data.images import list_images
from shared.data.pixels import decode
from shared.errors import InputError

RNG = np.random.default_rng(0)
LOSSY = BuildOptions(allow_unreadable=True)


@pytest.fixture
def faces(tmp_path):
    folder = tmp_path / "faces"
    for person in range(3):
        (folder / f"p{person}").mkdir(parents=True)
        for number in range(2):
            pixels = RNG.integers(0, 256, (12, 10, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"p{person}" / f"{number}.png")
    return folder


def expected(folder, size=8):
    return np.stack([decode(path.read_bytes(), size) for path in sorted(folder.rglob("*.png"))])


def test_cache_holds_every_image_its_person_and_its_name(faces, tmp_path):
    cache = build_cache(faces, tmp_path / "cache", 8)
    assert np.array_equal(cache.images, expected(faces))
    assert cache.persons.tolist() == [0, 0, 1, 1, 2, 2]
    assert cache.names[1] == "p0/1.png"
    assert len(cache) == 6 and cache.size == 8 and cache.num_unreadable == 0
    again = open_cache(tmp_path / "cache")
    assert np.array_equal(again.images, cache.images) and again.names == cache.names


def test_batch_is_a_writable_uint8_tensor_of_the_asked_images(faces, tmp_path):
    cache = build_cache(faces, tmp_path / "cache", 8)
    batch = cache.batch([4, 0])
    assert batch.dtype == torch.uint8
    assert np.array_equal(batch.numpy(), expected(faces)[[4, 0]])
    batch.zero_()
    assert np.array_equal(cache.images, expected(faces))


def test_selection_reads_only_its_rows_and_keeps_persons_and_names(faces, tmp_path):
    part = build_cache(faces, tmp_path / "cache", 8).select([5, 2])
    assert np.array_equal(part.batch([1, 0]).numpy(), expected(faces)[[2, 5]])
    assert np.array_equal(part.images, expected(faces)[[5, 2]])
    assert part.persons.tolist() == [2, 1] and part.names == ("p2/1.png", "p1/0.png") and len(part) == 2


def test_unreadable_files_are_skipped_counted_and_named_in_the_log_only(faces, tmp_path, caplog):
    (faces / "p1" / "0.png").write_bytes(b"broken")
    (faces / "p0" / "0.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        cache = build_cache(faces, tmp_path / "cache", 8, options=LOSSY)
    assert cache.num_unreadable == 2
    assert cache.names == ("p0/1.png", "p1/1.png", "p2/0.png", "p2/1.png")
    assert cache.persons.tolist() == [0, 1, 2, 2]
    good = [faces / name for name in cache.names]
    assert np.array_equal(cache.images, np.stack([decode(path.read_bytes(), 8) for path in good]))
    assert "p1/0.png" in caplog.text
    assert "p1/0.png" not in (tmp_path / "cache" / "cache.json").read_text()


def test_nothing_readable_is_an_error(faces, tmp_path):
    for path in faces.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of 6 files decodes"):
        build_cache(faces, tmp_path / "cache", 8)
    assert not (tmp_path / "cache").exists()


def test_more_than_one_percent_unreadable_is_refused_until_it_is_asked_for(faces, tmp_path, monkeypatch):
    for number in range(95):
        shutil.copy(faces / "p0" / "0.png", faces / "p0" / f"copy-{number}.png")
    (faces / "p1" / "0.png").write_bytes(b"broken")
    assert build_cache(faces, tmp_path / "cache", 8).num_unreadable == 1
    (faces / "p1" / "1.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"2 of 101 files are unreadable \(2\.0%, more than 1%\).*--allow-unreadable"):
        build_cache(faces, tmp_path / "cache", 8)
    # What was decoded is kept for the command that accepts the loss, and the cache for those who read it later.
    monkeypatch.setattr(decoding, "decode", None)
    assert build_cache(faces, tmp_path / "cache", 8, options=LOSSY).num_unreadable == 2
    assert len(build_cache(faces, tmp_path / "cache", 8)) == 99


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_the_machine_could_not_read_stops_the_build_and_is_no_fact_about_the_picture(
    faces, tmp_path, monkeypatch, number
):
    source = list_images(faces)
    with monkeypatch.context() as patched:
        patched.setattr("shared.data.image_cache.list_images", lambda _: source_that_fails(source, "p1/0.png", number))
        with pytest.raises(InputError, match=rf"p1/0\.png: {os.strerror(number)}: the build has stopped.*goes on"):
            build_cache(faces, tmp_path / "cache", 8)
    assert build_cache(faces, tmp_path / "cache", 8).num_unreadable == 0


def test_processes_refuse_a_folder_that_changed_since_it_was_listed(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "PROCESSES_FROM_IMAGES", 0)
    source = replace(list_images(faces), fingerprint="another")
    monkeypatch.setattr("shared.data.image_cache.list_images", lambda _: source)
    with pytest.raises(InputError, match="changed while it was read"):
        build_cache(faces, tmp_path / "cache", 8, 2)


def test_a_failing_read_keeps_what_was_decoded(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK_IMAGES", 1)
    source = list_images(faces)
    monkeypatch.setattr("shared.data.image_cache.list_images", lambda _: source_that_fails(source, "p2/0.png"))
    with pytest.raises(InputError, match=r"p2/0\.png: Input/output error"):
        build_cache(faces, tmp_path / "cache", 8, workers=1)
    state = np.fromfile(tmp_path / "cache" / "state.u8", np.uint8)
    assert (state[:4] == decoding.DECODED).sum() >= 2 and decoding.UNREADABLE not in state


def source_that_fails(source, bad, number=errno.EIO):
    def read(name):
        if name == bad:
            raise OSError(number, os.strerror(number))
        return source.read(name)

    return replace(source, read=read)


def test_unreadable_files_are_looked_at_again_when_asked(faces, tmp_path):
    good = (faces / "p1" / "0.png").read_bytes()
    stamp = (faces / "p1" / "0.png").stat().st_mtime_ns
    (faces / "p1" / "0.png").write_bytes(b"x" * len(good))
    os.utime(faces / "p1" / "0.png", ns=(stamp, stamp))
    assert build_cache(faces, tmp_path / "cache", 8, options=LOSSY).num_unreadable == 1
    (faces / "p1" / "0.png").write_bytes(good)
    os.utime(faces / "p1" / "0.png", ns=(stamp, stamp))
    assert build_cache(faces, tmp_path / "cache", 8, options=LOSSY).num_unreadable == 1
    again = BuildOptions(retry_unreadable=True)
    assert build_cache(faces, tmp_path / "cache", 8, options=again).num_unreadable == 0


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_cache_of_another_source_is_refused_and_stays(faces, tmp_path, is_finished):
    def interrupt(done, total):
        if not is_finished:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        build_cache(faces, tmp_path / "cache", 8, on_progress=interrupt)
    shutil.copytree(faces, tmp_path / "others")
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir() if path.name != ".lock"}
    with pytest.raises(InputError, match=r"is of .*/faces, not of .*/others: name another"):
        build_cache(tmp_path / "others", tmp_path / "cache", 8)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir() if path.name != ".lock"}
    owner = BuildOptions(is_owner=True)
    assert len(build_cache(tmp_path / "others", tmp_path / "cache", 8, options=owner)) == 6


def test_a_cache_of_an_older_decoder_is_refused_and_made_again(faces, tmp_path):
    build_cache(faces, tmp_path / "cache", 8)
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoding": 1}))
    with pytest.raises(InputError, match=r"decoding 1, not \d+; run `maskfed-server data cache"):
        open_cache(tmp_path / "cache")
    build_cache(faces, tmp_path / "cache", 8)
    assert json.loads(path.read_text())["decoding"] == pixels.DECODING_VERSION


def test_the_fingerprint_is_that_of_the_pixels_wherever_they_lie(faces, tmp_path):
    (faces / "x.raw").touch()
    cache = build_cache(faces, tmp_path / "cache", 8)
    assert cache.fingerprint == hashlib.sha256(expected(faces).tobytes()).hexdigest()
    assert cache.select([1, 0]).fingerprint == hashlib.sha256(expected(faces)[[1, 0]].tobytes()).hexdigest()
    assert cache.ignored == {".raw": 1}


def test_a_cache_that_does_not_fit_here_leaves_nothing(faces, tmp_path):
    for size in (500_000_000, 2_000_000_000):
        with pytest.raises(InputError, match=r"6 images need [\d,]+ bytes; lower --size"):
            build_cache(faces, tmp_path / "cache", size)
    assert not (tmp_path / "cache").exists()


def test_interrupted_build_goes_on_where_it_was(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK_IMAGES", 2)
    decoded = []

    def count(data, *sizes):
        decoded.append(data)
        return decode(data, *sizes)

    monkeypatch.setattr(decoding, "decode", count)

    def interrupt(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(faces, tmp_path / "cache", 8, workers=1, on_progress=interrupt)
    with pytest.raises(InputError, match=r"no readable cache\.json"):
        open_cache(tmp_path / "cache")
    first = len(decoded)
    cache = build_cache(faces, tmp_path / "cache", 8, workers=1)
    assert 0 < len(decoded) - first <= 2
    assert np.array_equal(cache.images, expected(faces))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        ".lock",
        "cache.json",
        "images.u8",
        "index.json",
    ]


def test_interrupted_build_of_changed_files_starts_over(faces, tmp_path, monkeypatch):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(faces, tmp_path / "cache", 8, on_progress=interrupt)
    Image.new("RGB", (9, 9), "red").save(faces / "p0" / "0.png")
    assert np.array_equal(build_cache(faces, tmp_path / "cache", 8).images, expected(faces))


def test_finished_cache_is_not_decoded_again(faces, tmp_path, monkeypatch):
    build_cache(faces, tmp_path / "cache", 8)
    monkeypatch.setattr(decoding, "decode", None)
    build_cache(faces, tmp_path / "cache", 8)


def test_processes_give_the_same_cache(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "PROCESSES_FROM_IMAGES", 0)
    (faces / "p1" / "0.png").write_bytes(b"broken")
    seen = []
    cache = build_cache(faces, tmp_path / "cache", 8, 2, LOSSY, on_progress=lambda *counts: seen.append(counts))
    assert np.array_equal(cache.images, np.stack([decode((faces / name).read_bytes(), 8) for name in cache.names]))
    assert len(cache) == 5 and seen[-1] == (6, 6)


def test_truncated_cache_is_refused_with_bytes_and_remedy(faces, tmp_path):
    build_cache(faces, tmp_path / "cache", 8)
    os.truncate(tmp_path / "cache" / "images.u8", 100)
    with pytest.raises(InputError, match=r"100 bytes where 6 images of 8 x 8 need 1152.*data cache .*faces --size 8"):
        open_cache(tmp_path / "cache")
    assert np.array_equal(build_cache(faces, tmp_path / "cache", 8).images, expected(faces))


def test_cache_older_than_its_folder_is_refused_and_rebuilt(faces, tmp_path):
    build_cache(faces, tmp_path / "cache", 8)
    Image.new("RGB", (9, 9), "red").save(faces / "p0" / "new.png")
    with pytest.raises(InputError, match="older than its images"):
        open_cache(tmp_path / "cache")
    assert len(open_cache(tmp_path / "cache", check_source=False)) == 6
    assert len(build_cache(faces, tmp_path / "cache", 8)) == 7


def test_cache_without_its_source_still_opens(faces, tmp_path):
    build_cache(faces, tmp_path / "cache", 8)
    faces.rename(tmp_path / "moved")
    assert len(open_cache(tmp_path / "cache")) == 6


def test_cache_of_another_schema_or_damaged_is_refused(faces, tmp_path):
    build_cache(faces, tmp_path / "cache", 8)
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 9}))
    with pytest.raises(InputError, match="schema 9, not 2"):
        open_cache(tmp_path / "cache")
    for damaged in ("{", "[]", path.read_text().replace('"content"', '"x"').replace("9", "2", 1)):
        path.write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            open_cache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cache.json", {"size": -8}),
        ("cache.json", {"size": 8.5}),
        ("cache.json", {"num_images": math.inf}),
        ("cache.json", {"num_unreadable": -1}),
        ("cache.json", {"ignored": {".txt": -2}}),
        ("cache.json", {"ignored": "none"}),
        ("index.json", {"persons": [0]}),
        ("index.json", {"persons": [[0]] * 6}),
        ("index.json", {"names": [1] * 6}),
    ],
)
def test_cache_whose_facts_cannot_be_is_refused(faces, tmp_path, name, change):
    build_cache(faces, tmp_path / "cache", 8)
    path = tmp_path / "cache" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match="its facts are damaged"):
        open_cache(tmp_path / "cache")


def test_folder_with_the_longest_name_there_is_can_be_opened(tmp_path):
    for name in ("f" * 255, "\u1e9e" * 85):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "a.png")
        assert len(open_images(tmp_path / name, 8, tmp_path / "home")) == 1


def test_foreign_folder_is_never_overwritten(faces, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds other files \('thesis.txt'\)"):
        build_cache(faces, tmp_path / "mine", 8)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_cache_folder_that_cannot_be_made_is_refused(faces, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Not a directory; name another"):
        build_cache(faces, tmp_path / "file" / "cache", 8)


def test_identity_file_replaces_class_folders(faces, tmp_path):
    path = tmp_path / "identities.txt"
    path.write_text("".join(f"p{person}/{number}.png {number}\n" for person in range(3) for number in range(2)))
    assert build_cache(faces, tmp_path / "cache", 8, options=BuildOptions(path)).persons.tolist() == [0, 1] * 3


def test_open_images_takes_folders_caches_and_specs(faces, tmp_path):
    home = tmp_path / "home"
    cache = open_images(faces, 8, cache_home=home)
    assert np.array_equal(cache.images, expected(faces))
    assert len(list(home.iterdir())) == 1
    built = build_cache(faces, tmp_path / "cache", 8)
    assert np.array_equal(open_images(tmp_path / "cache", 8).images, built.images)
    with pytest.raises(InputError, match="holds 8 x 8 pixels, the experiment asks for 16"):
        open_images(tmp_path / "cache", 16)


def test_synthetic_spec_is_generated_in_memory():
    cache = open_images("synthetic:public:6:1", 16)
    images, persons = synthetic.generate(6, 16, 1, site="public")
    assert np.array_equal(cache.images, images) and np.array_equal(cache.persons, persons)
    assert np.array_equal(open_images("synthetic:public:6", 16).images, synthetic.generate(6, 16, 0, site="public")[0])


@pytest.mark.parametrize(
    "spec",
    [
        "synthetic:",
        "synthetic:public:x",
        "synthetic:public:1:2:3",
        "synthetic:public:0",
        "synthetic:public:\u00b2",
        f"synthetic:public:{'9' * 5000}",
    ],
)
def test_bad_synthetic_spec_is_refused(spec):
    with pytest.raises(InputError, match="synthetic"):
        open_images(spec, 16)


def test_a_disk_that_takes_only_parts_of_a_write_loses_no_pixel(faces, tmp_path, monkeypatch):
    (faces / "p0" / "0.png").write_bytes(b"no image")  # so that rows are moved, too
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: pwrite(descriptor, data[:7], place))
    cache = build_cache(faces, tmp_path / "cache", 8, options=LOSSY)
    (faces / "p0" / "0.png").unlink()
    assert np.array_equal(cache.images, expected(faces))


def test_a_folder_with_files_of_that_name_is_no_cache_and_stays_as_it_is(faces, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.json").write_text("my list")
    with pytest.raises(InputError, match="holds other files"):
        build_cache(faces, tmp_path / "mine", 8)
    assert (tmp_path / "mine" / "index.json").read_text() == "my list"
