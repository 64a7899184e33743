import numpy as np
import pytest
import torch

from shared.audits.memorisation import copies, features_of, nearest_neighbours, pixel_features, views_of
from shared.data.synthetic import generate
from shared.errors import InputError


@pytest.fixture(scope="module")
def faces():
    images, persons = generate(900, 16, 0, site="site0", images_per_person=2)
    images = torch.from_numpy(images)
    return images[:400], images[400:600], persons[400:600], images[600:]


def slightly_changed(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 6
    return (images.float() * 0.97 + noise).clamp(0, 255).to(torch.uint8)


def run(generated, faces, *, is_mirrored=False):
    training, held_out, persons, _ = faces
    views = [views_of(pixel_features, images, is_mirrored=is_mirrored) for images in (generated, training, held_out)]
    return copies(*views, persons)


def test_noisy_copies_are_found_and_named(faces):
    found = run(slightly_changed(faces[0][:50]), faces)
    assert found.copy_rate > 0.9 and found.authenticity < 0.1
    assert all(one == other for one, other in found.closest) and len(found.closest) == 16


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_new_faces_are_no_copies(faces, is_mirrored):
    found = run(faces[3], faces, is_mirrored=is_mirrored)
    assert found.copy_rate <= 0.01 and found.false_positive_rate <= 0.01


def test_mirrored_copies_are_found_where_training_mirrored_and_only_there(faces):
    mirrored = slightly_changed(faces[0][:50]).flip(-1)
    found = run(mirrored, faces, is_mirrored=True)
    assert found.copy_rate > 0.9 and found.authenticity < 0.1
    assert all(one == other for one, other in found.closest)
    assert run(mirrored, faces).copy_rate < 0.1


def test_blurred_average_faces_are_no_copies(faces):
    blend = torch.stack([faces[3][i : i + 30].float().mean(0) for i in range(0, 240, 5)]).to(torch.uint8)
    assert run(blend, faces).copy_rate <= 0.03


def test_a_few_copies_among_many_give_their_share(faces):
    mixed = torch.cat([faces[3][:190], slightly_changed(faces[0][:10])])
    assert run(mixed, faces).copy_rate == pytest.approx(0.05, abs=0.015)


def test_neighbours_equal_scikit_learn():
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((n, 7)).astype(np.float32) for n in (600, 300))
    distances, indices = nearest_neighbours(one, other)
    from sklearn.neighbors import NearestNeighbors  # loads for seconds

    expected, expected_indices = NearestNeighbors(n_neighbors=1).fit(other).kneighbors(one)
    np.testing.assert_allclose(distances, expected[:, 0], rtol=1e-3)
    assert (indices == expected_indices[:, 0]).mean() > 0.99
    assert (nearest_neighbours(one, one, skip_self=True)[1] != np.arange(600)).all()


def test_features_do_not_depend_on_the_batch(faces):
    assert (features_of(pixel_features, faces[1], 7) == pixel_features(faces[1])).all()


def test_too_few_held_out_images_are_refused(faces):
    with pytest.raises(InputError, match="39 held-out"):
        copies(*([pixel_features(images)] for images in (faces[3], faces[0], faces[1][:39])))
