import zipfile
from pathlib import Path

import numpy as np
import pytest

from server.simulation.division import divide_by_person, make_site_folders
from shared.data.images import list_images
from shared.data.synthetic import write_folder
from shared.errors import InputError


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    write_folder(tmp_path / "faces", 120, 8, seed=0, images_per_person=3)
    return tmp_path / "faces"


def contents(folder: Path) -> dict[bytes, str]:
    return {path.read_bytes(): path.parent.name for path in folder.rglob("*.png")}


def test_every_image_has_one_place_and_no_person_two(faces: Path, tmp_path: Path):
    made = divide_by_person(faces, tmp_path / "out", num_sites=3, reference_ratio=0.2, seed=0)
    parts = [contents(folder) for folder in (*made.sites, made.reference)]
    person_of = contents(faces)
    assert sum(map(len, parts)) == len(person_of) == 120
    persons = [{person_of[data] for data in part} for part in parts]
    assert len(set.union(*persons)) == sum(map(len, persons)) == 40
    assert len(persons[-1]) == 8
    assert max(map(len, persons[:3])) - min(map(len, persons[:3])) <= 1
    assert made.unit == "person"


def test_the_division_depends_on_the_seed_only(faces: Path, tmp_path: Path):
    first, again, other = (
        divide_by_person(faces, tmp_path / name, 2, 0.2, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert contents(first.reference).keys() == contents(again.reference).keys()
    assert contents(first.reference).keys() != contents(other.reference).keys()


def test_a_zip_without_persons_is_divided_by_image_into_numbered_files(faces: Path, tmp_path: Path):
    archive = tmp_path / "flat.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number, path in enumerate(sorted(faces.rglob("*.png"))):
            file.write(path, f"{number}.png")
    made = divide_by_person(archive, tmp_path / "deep" / "out", 2, 0.25, 0)
    assert made.unit == "image"
    assert sum(made.num_images.values()) == 120


def test_too_few_persons_are_refused_before_anything_is_written(tmp_path: Path):
    write_folder(tmp_path / "faces", 6, 8, seed=0, images_per_person=3)
    with pytest.raises(InputError, match="2 persons cannot be divided among 3 sites"):
        divide_by_person(tmp_path / "faces", tmp_path / "out", 3, 0.2, 0)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    write_folder(folder / "all", 80, 8, 0, images_per_person=8)
    return folder / "all"


def counts(out, num_sites):
    return [
        {path.name: len(list(path.iterdir())) for path in (out / f"site-{index}").iterdir()}
        for index in range(num_sites)
    ]


def total(found):
    return sum(sum(site.values()) for site in found)


def test_by_person_nobody_is_at_two_sites_and_some_are_held_out(tmp_path, source):
    make_site_folders(str(source), tmp_path, 3, 8, "person", 0.5, 0)
    found = counts(tmp_path, 3)
    names = [name for site in found for name in site]
    assert len(names) == len(set(names)) == 9
    assert total(found) == 72


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1000.0])
def test_dirichlet_gives_every_image_to_one_site_and_every_site_an_image(tmp_path, source, alpha):
    make_site_folders(str(source), tmp_path, 5, 8, "dirichlet", alpha, 0)
    found = counts(tmp_path, 5)
    assert total(found) == 80
    assert all(found)


def test_a_small_alpha_concentrates_classes_and_a_large_one_spreads_them(tmp_path, source):
    sites_per_class = {}
    for alpha in (0.02, 1000.0):
        out = tmp_path / str(alpha)
        make_site_folders(str(source), out, 4, 8, "dirichlet", alpha, 0)
        found = counts(out, 4)
        sites_per_class[alpha] = np.mean([sum(name in site for site in found) for name in set().union(*found)])
    assert sites_per_class[0.02] < 2 < sites_per_class[1000.0] == 4


def test_the_division_repeats_with_its_seed_and_changes_with_another(tmp_path, source):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_site_folders(str(source), tmp_path / name, 4, 8, "dirichlet", 0.5, seed)
        found.append(counts(tmp_path / name, 4))
    assert found[0] == found[1] != found[2]


def test_synthetic_sites_have_as_many_images_as_asked(tmp_path):
    make_site_folders("synthetic:6", tmp_path, 2, 8, "person", 0.5, 0)
    assert [len(list_images(tmp_path / f"site-{index}").names) for index in range(2)] == [6, 6]


@pytest.mark.parametrize(
    ("text", "sites", "skew", "words"),
    [
        ("synthetic:", 2, "person", "synthetic:40"),
        ("synthetic:0", 2, "person", "synthetic:40"),
        ("synthetic:\u00b2", 2, "person", "synthetic:40"),
        (f"synthetic:{'9' * 5000}", 2, "person", "synthetic:40"),
        ("source", 81, "dirichlet", "80 images for 81 sites"),
        ("source", 99, "person", "give more"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, source, text, sites, skew, words):
    with pytest.raises(InputError, match=words):
        make_site_folders(str(source) if text == "source" else text, tmp_path / "out", sites, 8, skew, 0.5, 0)


def test_images_without_classes_cannot_be_skewed_by_class(tmp_path, source):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="--by person"):
        make_site_folders(str(flat), tmp_path / "out", 2, 8, "dirichlet", 0.5, 0)
