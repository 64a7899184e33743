"""What sites were charged for images: it stays with all that is made of them."""

import pytest

from server.runs.lineage import (
    CHARGES_FILE,
    MeanImageCharge,
    as_provenance,
    charges_of_images,
    charges_of_weights,
    write_charges,
)
from shared.errors import InputError

FIRST = MeanImageCharge(run="align-1", num_sites=2, unit="person", noise_multiplier=3.73, delta=1e-5, epsilon=1.01)
SECOND = MeanImageCharge(run="align-2", num_sites=5, unit="image", noise_multiplier=2.5, delta=1e-6, epsilon=1.9)


def test_images_say_what_they_cost(tmp_path):
    write_charges(tmp_path, [FIRST, SECOND])
    assert charges_of_images(tmp_path) == (FIRST, SECOND)


def test_ordinary_images_cost_nothing(tmp_path):
    assert charges_of_images(tmp_path) == () == charges_of_images(tmp_path / "synthetic:public:7")
    assert as_provenance(()) == {}


def test_weights_carry_each_question_once():
    provenance = as_provenance([FIRST], [SECOND, FIRST])
    assert charges_of_weights(provenance) == (FIRST, SECOND)
    assert charges_of_weights({"command": "train"}) == ()


@pytest.mark.parametrize("content", [b"", b"[1]", b'[{"run": "a"}]', b"\xff"])
def test_a_damaged_record_is_one_line_and_never_nothing(tmp_path, content: bytes):
    (tmp_path / CHARGES_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"charged\.json is damaged"):
        charges_of_images(tmp_path)


def test_damaged_provenance_is_one_line():
    with pytest.raises(InputError, match="mean_images is damaged"):
        charges_of_weights({"mean_images": [{"run": "a"}]})
