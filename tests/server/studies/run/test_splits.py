import numpy as np
import pytest
from PIL import Image

from server.studies.run.splits import Splits
from server.studies.schema import Study
from shared.data.synthetic import write_folder
from shared.errors import InputError

ARM = {"title": "t", "split": "train", "scales": {"cpu": {"recipe": "reproduce32-T-dsm"}}}


def make_study(private, public=None, seed=0):
    splits = {name: {"source": "private", "share": share} for name, share in private.items()}
    splits |= {name: {"source": "public", "share": share} for name, share in (public or {}).items()}
    arm = {**ARM, "split": next(iter(splits))}
    scales = {"cpu": {"generated": 2, "synthetic": 80}}
    return Study.model_validate(
        {"title": "t", "question": "q", "seed": seed, "splits": splits, "scales": scales, "arms": {"a": arm}}
    )


def make_splits(study, root, private="", public=""):
    return Splits(study, {"public": str(public), "private": str(private)}, root, 8, 80, lambda _done, _all: None)


def pixels(part):
    return {image.tobytes() for image in part.images.images}


@pytest.fixture
def faces(tmp_path):
    write_folder(tmp_path / "faces", 80, 8, 3, site="site1")
    return tmp_path / "faces"


def test_splits_share_no_person_and_lose_no_image(faces, tmp_path):
    shares = {"train": 0.5, "validation": 0.2, "test": 0.3}
    splits = make_splits(make_study(shares), tmp_path / "data", faces)
    parts = {name: splits.part(name) for name in shares}
    found = [pixels(part) for part in parts.values()]
    whole = {np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in faces.rglob("*.png")}
    assert sum(map(len, found)) == len(whole)
    assert set.union(*found) == whole
    # 20 persons of 4 images each.
    assert [part.facts["persons"] for part in parts.values()] == [10, 4, 6]
    assert [part.facts["images"] for part in parts.values()] == [40, 16, 24]


def test_a_smaller_share_is_part_of_a_larger_one_in_whole_persons(faces, tmp_path):
    splits = make_splits(make_study({"train": 1.0}), tmp_path / "data", faces)
    small, large = splits.part("train", 0.1), splits.part("train", 0.5)
    assert pixels(small) < pixels(large) < pixels(splits.part("train"))
    assert (small.facts["images"], small.facts["persons"]) == (8, 2)
    with pytest.raises(InputError, match=r"0.01 of the 80 images .* less than one"):
        splits.part("train", 0.01)


def test_the_same_division_comes_again_and_another_seed_gives_another(faces, tmp_path):
    study = make_study({"train": 0.5, "test": 0.5})
    first = make_splits(study, tmp_path / "one", faces).part("test")
    again = make_splits(study, tmp_path / "two", faces).part("test")
    other = make_splits(make_study({"train": 0.5, "test": 0.5}, seed=1), tmp_path / "one", faces).part("test")
    assert first.facts == again.facts
    assert first.facts["sha256"] != other.facts["sha256"]


def test_facts_name_the_set_without_its_place(faces, tmp_path):
    facts = make_splits(make_study({"train": 1.0}), tmp_path / "data", faces).part("train").facts
    assert facts["set"] == "faces"
    assert str(tmp_path) not in str(facts)


def test_synthetic_faces_stand_in_and_differ_between_the_sets(tmp_path):
    splits = make_splits(make_study({"train": 1.0}, {"public": 1.0}), tmp_path / "data")
    private, public = splits.part("train"), splits.part("public")
    assert private.facts["set"] == "80 synthetic faces"
    assert not pixels(private) & pixels(public)


def test_too_few_persons_or_images_are_refused(faces, tmp_path):
    with pytest.raises(InputError, match="20 persons leave none for split 'test'"):
        make_splits(make_study({"train": 0.99, "test": 0.01}), tmp_path / "data", faces)
    assert not list((tmp_path / "data").glob("private-*"))
    study = make_study({"train": 0.9, "test": 0.1})
    measured = study.arms["a"].model_copy(update={"test": "test", "validation": "test"})
    with pytest.raises(InputError, match="split 'test' has 8 images, at least 10"):
        make_splits(study, tmp_path / "data", faces).of(measured)
