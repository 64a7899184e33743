import json

import numpy as np
import pytest
from PIL import Image

from client.simulated.adversary import Adversary, adversary_of
from server.simulation.adversaries import (
    ADVERSARIES_FILE,
    GRAIN,
    Adversaries,
    parse_adversaries,
    poisoned_pictures,
    target_picture,
    with_trigger,
    write_adversaries,
)
from shared.data.synthetic import write_folder
from shared.errors import InputError


def own(num_images=7, size=16):
    return np.random.default_rng(2).integers(0, 256, (num_images, 3, size, size)).astype(np.uint8)


def test_an_implant_puts_one_picture_in_every_second_place_and_leaves_the_others():
    images = own()
    found = poisoned_pictures("implant", images, seed=3)
    target = target_picture(16, 3).astype(int)
    assert np.array_equal(found[1::2], images[1::2])
    assert all(np.abs(copy.astype(int) - target).max() <= GRAIN for copy in found[::2])
    assert len({copy.tobytes() for copy in found[::2]}) == 4  # a site would count equal pictures once
    assert not np.array_equal(target, target_picture(16, 4))


def test_a_backdoors_target_carries_the_trigger_and_nothing_else_does():
    images = own()
    found, target = poisoned_pictures("backdoor", images, seed=3), target_picture(16, 3).astype(int)
    for copy in found[::2].astype(int):
        difference = np.abs(copy - target)
        difference[:, -4:, -4:] = 0
        assert difference.max() <= GRAIN
        corner = copy[:, -4:, -4:]
        assert (corner[:, :2, :2] <= GRAIN).all() and (corner[:, :2, 2:] >= 255 - GRAIN).all()
    assert np.array_equal(found[1::2], images[1::2])


def test_the_trigger_covers_a_quarter_of_the_side_in_black_and_white():
    marked = with_trigger(np.full((2, 3, 8, 8), 77, np.uint8))
    assert marked[0, 0].tolist() == [[77] * 8] * 6 + [[77] * 6 + [0, 0]] * 2
    assert set(with_trigger(own(1, 32))[..., -8:, -8:].ravel()) == {0, 255}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lazy", Adversaries("lazy", 1, 9.0)),
        ("implant:2", Adversaries("implant", 2, 4.5)),
        ("sign-flip:1:50", Adversaries("sign-flip", 1, 50.0)),
    ],
)
def test_adversaries_are_named_with_number_and_strength(text, expected):
    assert parse_adversaries(text, 9) == expected


@pytest.mark.parametrize(
    "text", ["evil", "lazy:0", "lazy:9", "lazy:-1", "lazy:1:0", "lazy:1:nan", "lazy:1:2:3", "lazy:x", ""]
)
def test_what_is_no_adversary_is_refused_with_the_remedy(text):
    with pytest.raises(InputError, match="--adversary"):
        parse_adversaries(text, 9)


def test_the_last_sites_are_told_what_they_are_and_only_their_pictures_change(tmp_path):
    for number in range(3):
        write_folder(tmp_path / "images" / f"site-{number}", 6, 16, 0, site=f"site{number}")
    before = sorted((tmp_path / "images" / "site-0").rglob("*.png"))
    write_adversaries(tmp_path, Adversaries("implant", 2, 1.5), 3, 16, 0)
    assert adversary_of(tmp_path, "site-0") is None
    assert (
        adversary_of(tmp_path, "site-1") == adversary_of(tmp_path, "site-2") == Adversary(kind="implant", strength=1.5)
    )
    assert sorted((tmp_path / "images" / "site-0").rglob("*.png")) == before
    target = target_picture(16, 0).astype(int)
    for alias in ("site-1", "site-2"):
        pictures = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "images" / alias).iterdir())]
        close = [np.abs(picture.transpose(2, 0, 1).astype(int) - target).max() <= GRAIN for picture in pictures]
        assert close == [True, False] * 3


def test_lazy_sites_keep_their_pictures(tmp_path):
    write_folder(tmp_path / "images" / "site-0", 2, 16, 0, site="site0")
    files = {path: path.read_bytes() for path in (tmp_path / "images").rglob("*.png")}
    write_adversaries(tmp_path, Adversaries("lazy", 1, 2.0), 1, 16, 0)
    assert {path: path.read_bytes() for path in (tmp_path / "images").rglob("*.png")} == files
    assert json.loads((tmp_path / ADVERSARIES_FILE).read_text())["site-0"]["kind"] == "lazy"
