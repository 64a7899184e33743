"""The synthetic faces: reproducible, disjoint, shifted between sites, smooth, and quick."""

import hashlib
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data.portraits.population import population
from shared.data.portraits.rendering import render
from shared.data.portraits.traits import Portraits
from shared.data.synthetic import generate, write_folder
from shared.errors import InputError

# Mean red, green, blue of the first six images at seed 0, two per person.
PINNED = [
    [187.34, 157.64, 142.26],
    [154.30, 131.12, 123.80],
    [131.80, 96.38, 78.25],
    [131.74, 104.99, 91.93],
    [195.96, 168.22, 142.13],
    [195.07, 174.17, 154.03],
]


def test_image_k_does_not_depend_on_the_number_of_images() -> None:
    few, few_persons = generate(7, 32, 3, site="site1")
    many, many_persons = generate(71, 32, 3, site="site1")
    assert np.array_equal(few, many[:7])
    assert np.array_equal(few_persons, many_persons[:7])


def test_same_call_gives_the_same_bytes_and_another_seed_other_faces() -> None:
    first, _ = generate(8, 32, 0)
    assert np.array_equal(first, generate(8, 32, 0)[0])
    assert not np.array_equal(first, generate(8, 32, 1)[0])


def test_persons_are_pinned() -> None:
    # Persons stay who they are across versions: the shipped checkpoint was trained on them.
    means = generate(6, 32, 0, images_per_person=2)[0].mean(axis=(2, 3))
    assert np.abs(means - PINNED).max() < 0.5


def test_images_have_the_promised_shape_and_type() -> None:
    images, persons = generate(5, 48, 0, images_per_person=2)
    assert images.shape == (5, 3, 48, 48)
    assert images.dtype == np.uint8
    assert persons.dtype == np.int64
    assert list(persons - persons[0]) == [0, 0, 1, 1, 2]


def test_no_images_are_allowed() -> None:
    images, persons = generate(0, 32, 0)
    assert images.shape == (0, 3, 32, 32)
    assert persons.shape == (0,)


def test_sites_share_no_person_and_no_image() -> None:
    seen_persons: set[int] = set()
    seen_images: set[bytes] = set()
    for site in ("public", "heldout", "site0", "site1", "site2"):
        images, persons = generate(40, 32, 0, site=site)
        seen_persons |= set(persons.tolist())
        seen_images |= {image.tobytes() for image in images}
    assert len(seen_persons) == 5 * 10
    assert len(seen_images) == 5 * 40


def test_images_of_one_person_are_closer_than_those_of_two() -> None:
    images, persons = generate(120, 32, 0)
    # Hair and skin: the upper middle of the picture.
    centre = images[:, :, 2:20, 10:22].astype(np.float64).reshape(120, -1)
    distance = np.linalg.norm(centre[:, None] - centre[None], axis=-1)
    same = persons[:, None] == persons[None]
    assert distance[same & ~np.eye(120, dtype=bool)].mean() < 0.6 * distance[~same].mean()


def test_images_of_one_person_all_differ() -> None:
    images, _ = generate(16, 32, 0, images_per_person=16)
    assert len({image.tobytes() for image in images}) == 16


def test_every_site_is_shifted_from_every_other_and_from_the_public_pool() -> None:
    names = ("public", "site0", "site1", "site2", "site3")
    mean = {name: generate(400, 32, 0, site=name)[0].astype(np.float64).mean(axis=0) for name in names}
    for one in names:
        for other in names:
            assert one == other or np.abs(mean[one] - mean[other]).mean() > 5


def test_heldout_persons_come_from_the_sites_populations_in_turn() -> None:
    for person in range(6):
        assert population("heldout", person) == population(f"site{person % 3}")
        assert population("heldout5", person) == population(f"site{person % 5}")
    heldout = generate(1200, 32, 0, site="heldout")[0].mean(axis=(0, 2, 3))
    sites = np.mean([generate(400, 32, 0, site=f"site{k}")[0].mean(axis=(0, 2, 3)) for k in range(3)], axis=0)
    assert np.abs(heldout - sites).max() < 5


def test_small_and_large_pictures_show_the_same_scene() -> None:
    small = generate(24, 32, 0)[0].astype(np.float64)
    large = generate(24, 64, 0)[0].astype(np.float64).reshape(24, 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert np.abs(small - large).mean() < 4


def test_every_parameter_of_a_portrait_changes_the_picture() -> None:
    row: dict[str, np.ndarray] = {}
    colours = {"skin", "hair", "iris", "lip", "clothes", "tint", "backdrop", "backdrop_end"}
    base = {
        "head_width": 0.6, "head_height": 0.76, "chin": 0.3, "eye_size": 0.15, "eye_gap": 0.27, "brow_height": 0.19,
        "brow_width": 0.03, "nose_length": 0.17, "nose_width": 0.08, "mouth_width": 0.24, "lip_height": 0.06,
        "hairline": -0.5, "hair_length": 0.6, "beard": 0.4, "zoom": 1.0, "mouth_open": 0.3, "eye_open": 0.9,
        "ambient": 0.5, "light_y": -0.3, "smile": 0.3,
    }  # fmt: skip
    for field in fields(Portraits):
        shade = 0.3 + 0.05 * len(row) % 0.5
        value = [[shade, 0.5, 0.4]] if field.name in colours else [base.get(field.name, 0.1)]
        row[field.name] = np.array(value, np.float32)
    plain = render(Portraits(**row), 64)
    for name, value in row.items():
        changed = render(Portraits(**{**row, name: value * np.float32(0.8)}), 64)
        assert not np.array_equal(plain, changed), name


def test_left_and_right_mirror_when_pose_and_light_are_mirrored() -> None:
    images, _ = generate(800, 32, 0)
    mean = images.astype(np.float64).mean(axis=0)
    assert np.abs(mean - mean[:, :, ::-1]).mean() < 3


def test_edges_are_antialiased() -> None:
    # A hard edge is one step; a covered one needs pixels in between: few neighbours differ by almost the full range.
    images = generate(64, 64, 0)[0].astype(np.int64)
    steps = np.abs(np.diff(images, axis=3))
    assert (steps > 160).mean() < 2e-3


def test_folder_has_one_subfolder_per_person(tmp_path: Path) -> None:
    write_folder(tmp_path / "faces", 6, 32, 0, site="site0", images_per_person=3)
    images, persons = generate(6, 32, 0, site="site0", images_per_person=3)
    names = sorted(str(path.relative_to(tmp_path / "faces")) for path in (tmp_path / "faces").rglob("*.png"))
    assert names == [f"{person:012d}/{k:03d}.png" for person in sorted(set(persons.tolist())) for k in range(3)]
    with Image.open(tmp_path / "faces" / names[4]) as picture:
        assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), images[4])


def test_folder_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").touch()
    with pytest.raises(InputError, match="not empty"):
        write_folder(tmp_path, 1, 32, 0)


@pytest.mark.parametrize("site", ["", "site", "site-1", "Public", "heldout0", "publicsite0", "site0\n"])
def test_unknown_site_is_refused(site: str) -> None:
    with pytest.raises(InputError, match="unknown"):
        generate(1, 32, 0, site=site)


@pytest.mark.parametrize("num_images,size,per_person", [(-1, 32, 4), (4, 7, 4), (4, 32, 0)])
def test_number_out_of_range_is_refused(num_images: int, size: int, per_person: int) -> None:
    with pytest.raises(InputError, match="raise it"):
        generate(num_images, size, 0, images_per_person=per_person)


def test_bytes_do_not_depend_on_hash_seed_or_thread_count() -> None:
    code = (
        "import hashlib, os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from shared.data.synthetic import generate;"
        "print(hashlib.sha256(generate(70, 32, 5)[0].tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == hashlib.sha256(generate(70, 32, 5)[0].tobytes()).hexdigest()


def test_neither_torch_nor_flower_is_imported() -> None:
    code = "import sys, shared.data.synthetic; print([m for m in ('torch', 'flwr', 'scipy') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
