import numpy as np
import pytest

from server.simulation.virtual_sites import partition
from shared.data.images import list_images
from shared.data.synthetic import write_folder
from shared.errors import InputError


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
    partition(str(source), tmp_path, 3, 8, "person", 0.5, 0)
    found = counts(tmp_path, 3)
    names = [name for site in found for name in site]
    assert len(names) == len(set(names)) == 9
    assert total(found) == 72


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1000.0])
def test_dirichlet_gives_every_image_to_one_site_and_every_site_an_image(tmp_path, source, alpha):
    partition(str(source), tmp_path, 5, 8, "dirichlet", alpha, 0)
    found = counts(tmp_path, 5)
    assert total(found) == 80
    assert all(found)


def test_a_small_alpha_concentrates_classes_and_a_large_one_spreads_them(tmp_path, source):
    sites_per_class = {}
    for alpha in (0.02, 1000.0):
        out = tmp_path / str(alpha)
        partition(str(source), out, 4, 8, "dirichlet", alpha, 0)
        found = counts(out, 4)
        sites_per_class[alpha] = np.mean([sum(name in site for site in found) for name in set().union(*found)])
    assert sites_per_class[0.02] < 2 < sites_per_class[1000.0] == 4


def test_the_division_repeats_with_its_seed_and_changes_with_another(tmp_path, source):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        partition(str(source), tmp_path / name, 4, 8, "dirichlet", 0.5, seed)
        found.append(counts(tmp_path / name, 4))
    assert found[0] == found[1] != found[2]


def test_synthetic_sites_have_as_many_images_as_asked(tmp_path):
    partition("synthetic:6", tmp_path, 2, 8, "person", 0.5, 0)
    assert [len(list_images(tmp_path / f"site-{index}").names) for index in range(2)] == [6, 6]


@pytest.mark.parametrize(
    ("text", "sites", "skew", "words"),
    [
        ("synthetic:", 2, "person", "synthetic:40"),
        ("synthetic:0", 2, "person", "synthetic:40"),
        ("source", 81, "dirichlet", "80 images for 81 sites"),
        ("source", 99, "person", "give more"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, source, text, sites, skew, words):
    with pytest.raises(InputError, match=words):
        partition(str(source) if text == "source" else text, tmp_path / "out", sites, 8, skew, 0.5, 0)


def test_images_without_classes_cannot_be_skewed_by_class(tmp_path, source):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="--by person"):
        partition(str(flat), tmp_path / "out", 2, 8, "dirichlet", 0.5, 0)
