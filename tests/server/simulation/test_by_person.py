import zipfile
from pathlib import Path

import pytest

from server.simulation.by_person import divide
from shared.data.synthetic import write_folder
from shared.errors import InputError


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    write_folder(tmp_path / "faces", 120, 8, seed=0, images_per_person=3)
    return tmp_path / "faces"


def contents(folder: Path) -> dict[bytes, str]:
    return {path.read_bytes(): path.parent.name for path in folder.rglob("*.png")}


def test_every_image_has_one_place_and_no_person_two(faces: Path, tmp_path: Path):
    made = divide(faces, tmp_path / "out", num_sites=3, reference_ratio=0.2, seed=0)
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
        divide(faces, tmp_path / name, 2, 0.2, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert contents(first.reference).keys() == contents(again.reference).keys()
    assert contents(first.reference).keys() != contents(other.reference).keys()


def test_a_zip_without_persons_is_divided_by_image_into_numbered_files(faces: Path, tmp_path: Path):
    archive = tmp_path / "flat.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number, path in enumerate(sorted(faces.rglob("*.png"))):
            file.write(path, f"{number}.png")
    made = divide(archive, tmp_path / "deep" / "out", 2, 0.25, 0)
    assert made.unit == "image"
    assert sum(made.num_images.values()) == 120


def test_too_few_persons_are_refused_before_anything_is_written(tmp_path: Path):
    write_folder(tmp_path / "faces", 6, 8, seed=0, images_per_person=3)
    with pytest.raises(InputError, match="2 persons cannot be divided among 3 sites"):
        divide(tmp_path / "faces", tmp_path / "out", 3, 0.2, 0)
    assert not (tmp_path / "out").exists()
