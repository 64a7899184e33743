import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import InputError
from shared.features import check_digest, load_extractor
from shared.randomnet import random_filters, stem_features

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file with the layout of the Inception weights and random content, and its digest."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Untrained("x", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / "inception.pth")
    path = folder / "inception.pth"
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), network


def test_inception_features_equal_torch_fidelity(random_weights):
    path, digest, network = random_weights
    extractor = load_extractor("inception-v3-compat", weights=path, weights_sha256=digest)
    expected = network(IMAGES[:2])[0].numpy()
    assert extractor.width == 2048 and extractor.space.sha256 == digest
    np.testing.assert_allclose(extractor(IMAGES[:2]), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert extractor.space.distance_name == "fd_inception-v3-compat_2048"


def test_inception_layer_can_be_chosen_and_is_checked(random_weights):
    path, digest, _ = random_weights
    assert load_extractor("inception-v3-compat:64", weights=path, weights_sha256=digest).width == 64
    with pytest.raises(InputError, match="no layer '65'"):
        load_extractor("inception-v3-compat:65", weights=path, weights_sha256=digest)


def test_weights_with_another_digest_are_refused(random_weights):
    path, digest, _ = random_weights
    with pytest.raises(InputError, match=rf"{digest}.*expected 6726825d.*--weights-sha256"):
        load_extractor("inception-v3-compat", weights=path)
    with pytest.raises(InputError, match="no such file"):
        check_digest(path.with_name("absent.pth"), "", "")


def test_weights_that_run_code_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"a": pytest.raises}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match="not a file of plain tensors"):
        load_extractor("inception-v3-compat", weights=path, weights_sha256=digest)


def test_without_weights_and_network_the_line_says_what_to_do(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError, match=r"no route.*--weights FILE.*random-inception"):
        load_extractor("inception-v3-compat")


def test_random_stem_is_torch_fidelitys_inception_up_to_layer_192(random_weights):
    network = random_weights[2]
    convolutions = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    filters = [getattr(network, name).conv.weight for name in convolutions]
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    network.features_list = ["192"]
    expected = network(images)[0]
    network.features_list = ["2048"]
    found = stem_features(filters, (images.float() - 128) / 128)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_random_network_is_the_same_every_time_and_named_apart_from_fid():
    one, other = load_extractor("random-inception"), load_extractor("random-inception")
    assert one.space == other.space and one.space.distance_name == "fd_random_inception_192"
    assert (one(IMAGES) == other(IMAGES)).all() and one.width == 192
    assert next(tuple(weight.shape) for weight in random_filters()) == (32, 3, 3, 3)


def test_features_do_not_depend_on_the_batch():
    extractor = load_extractor("random-inception")
    together = extractor(IMAGES)
    apart = np.concatenate(list(extractor.batches(IMAGES.split(1))))
    np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-6)
    assert extractor(IMAGES[:0]).shape == (0, 192)


def test_images_must_be_uint8_rgb():
    extractor = load_extractor("random-inception")
    for images in (IMAGES.float(), IMAGES[0], IMAGES[:, :1]):
        with pytest.raises(InputError, match="uint8"):
            extractor(images)


@pytest.mark.parametrize("spec", ["resnet", "random-inception:3", "clip-nothing", "onnx", ""])
def test_unknown_extractors_are_refused(spec):
    with pytest.raises(InputError, match="unknown"):
        load_extractor(spec)


def write_onnx(path, input_type):
    """The smallest network of the agreed shape, mean over pixels, as protobuf bytes (no writer library needed)."""

    def field(number, payload):
        if isinstance(payload, int):
            return bytes([number << 3, payload])
        payload = payload.encode() if isinstance(payload, str) else payload
        return bytes([number << 3 | 2]) + varint(len(payload)) + payload

    def varint(value):
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def value(name, kind, dims):
        shape = b"".join(field(1, field(2, d) if isinstance(d, str) else field(1, d)) for d in dims)
        return field(1, name) + field(2, field(1, field(1, kind) + field(2, shape)))

    def attribute(name, kind, content):
        return field(5, field(1, name) + content + bytes([20 << 3 & 127 | 128, 1, kind]))

    cast = field(1, "images") + field(2, "x") + field(4, "Cast") + attribute("to", 2, field(3, 1))
    axes = field(1, 2) + field(2, 7) + field(8, "axes") + field(9, np.array([2, 3], "<i8").tobytes())
    keep = attribute("keepdims", 2, field(3, 0))
    mean = field(1, "x") + field(1, "axes") + field(2, "features") + field(4, "ReduceMean") + keep
    graph = field(1, cast) + field(1, mean) + field(2, "g") + field(5, axes)
    graph += field(11, value("images", input_type, ["n", 3, "h", "w"])) + field(12, value("features", 1, ["n", 3]))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 18)))
    return path


def test_onnx_file_gives_features_named_after_it(tmp_path):
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "mean3.onnx", input_type=2)
    extractor = load_extractor(f"onnx:{path}")
    np.testing.assert_allclose(extractor(IMAGES), IMAGES.float().mean((2, 3)).numpy(), rtol=1e-5)
    assert extractor.space.distance_name == "fd_onnx:mean3" and extractor.width == 3
    assert extractor.space.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_onnx_file_with_other_input_types_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(InputError, match=r"tensor\(float\).*uint8"):
        load_extractor(f"onnx:{write_onnx(tmp_path / 'f.onnx', input_type=1)}")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match="not a readable ONNX file"):
        load_extractor(f"onnx:{tmp_path / 'text.onnx'}")
