import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import InputError
from shared.evaluation.dinov2 import NETWORKS, DinoV2
from shared.evaluation.networks import check_digest, load_extractor
from shared.evaluation.onnx_network import _features
from shared.evaluation.random_inception import random_filters, stem_features

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


# ---- CLIP and DINOv2 from files ----


@pytest.fixture(scope="module")
def clip_archive(tmp_path_factory):
    """A TorchScript archive in the layout of OpenAI's, a tiny random network inside, and that network."""
    from torch_fidelity.feature_extractor_clip import VisionTransformer

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = VisionTransformer(64, 32, width=64, layers=2, heads=1, output_dim=16)
            self.text_projection = nn.Parameter(torch.zeros(8, 16))

        def forward(self, x):
            return self.visual(x)

    torch.manual_seed(0)
    both = Both().eval().requires_grad_(False)
    # torch-fidelity reads weights in half precision: these survive it.
    for tensor in both.state_dict().values():
        tensor.copy_(tensor.half().float())
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(both, torch.zeros(1, 3, 64, 64)).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), both.visual


def test_clip_from_a_file_gives_its_own_features(clip_archive):
    path, digest, visual = clip_archive
    extractor = load_extractor("clip-vit-b-32", weights=path, weights_sha256=digest)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean = 255 * torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    deviation = 255 * torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    np.testing.assert_allclose(extractor(images), visual((images.float() - mean) / deviation), rtol=1e-4, atol=1e-5)
    assert extractor.space.sha256 == digest and extractor.width == 16
    assert extractor.space.distance_name == "fd_clip-vit-b-32"


def test_clip_archive_of_something_else_is_refused(clip_archive, tmp_path):
    path, digest, _ = clip_archive
    with pytest.raises(InputError, match=rf"{digest}.*expected 40d36571.*--weights-sha256"):
        load_extractor("clip-vit-b-32", weights=path)
    other = tmp_path / "other.pt"
    torch.save({"a": torch.zeros(2)}, other)
    with pytest.raises(InputError, match="not OpenAI's archive"):
        load_extractor("clip-vit-b-32", weights=other, weights_sha256=hashlib.sha256(other.read_bytes()).hexdigest())


def folded(network, width):
    """The same network out of PyTorch's own encoder layers: the scales are folded into the projections before them."""
    layers = []
    for block in network.blocks:
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        one, two = block.ls1.gamma, block.ls2.gamma
        tensors = {
            "self_attn.in_proj_weight": block.attn.qkv.weight,
            "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": one[:, None] * block.attn.proj.weight,
            "self_attn.out_proj.bias": one * block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight,
            "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": two[:, None] * block.mlp.fc2.weight,
            "linear2.bias": two * block.mlp.fc2.bias,
        }
        for name in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                tensors[f"{name}.{kind}"] = getattr(getattr(block, name), kind)
        layer.load_state_dict(tensors)
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory):
    """A file in the layout of DINOv2's ViT-S/14 with random content, its digest and its network."""
    torch.manual_seed(0)
    network = DinoV2(384, 12, is_gated=False).eval().requires_grad_(False)
    for name, tensor in network.named_parameters():
        if name.endswith(("gamma", "pos_embed", "cls_token")):
            tensor.normal_(0.3, 0.2)
    path = tmp_path_factory.mktemp("dinov2") / "vits.pth"
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), network


def test_dinov2_from_a_file_equals_pytorchs_own_layers(dinov2_file):
    path, digest, network = dinov2_file
    extractor = load_extractor("dinov2-vit-s-14", weights=path, weights_sha256=digest)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean = 255 * torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    deviation = 255 * torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    patches = network.patch_embed["proj"]((images.float() - mean) / deviation).flatten(2).mT
    grid = network.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    positions = nn.functional.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic").flatten(2).mT
    tokens = torch.cat([(network.cls_token + network.pos_embed[:, :1]).expand(2, -1, -1), patches + positions], 1)
    expected = network.norm(folded(network, 384)(tokens))[:, 0]
    np.testing.assert_allclose(extractor(images), expected.numpy(), rtol=1e-3, atol=1e-4)
    assert extractor.space.sha256 == digest and extractor.space.distance_name == "fd_dinov2-vit-s-14"


def test_dinov2_files_of_another_network_or_digest_are_refused(dinov2_file, tmp_path):
    path, digest, _ = dinov2_file
    with pytest.raises(InputError, match=rf"{digest}.*expected b938bf1b.*dinov2_vits14_pretrain.pth"):
        load_extractor("dinov2-vit-s-14", weights=path)
    with pytest.raises(InputError, match=r"'blocks.0.attn.proj.bias' is \(384,\) in the file, \(768,\)"):
        load_extractor("dinov2-vit-b-14", weights=path, weights_sha256=digest)
    number = tmp_path / "number.pth"
    torch.save(3, number)
    with pytest.raises(InputError, match="not a dictionary of tensors"):
        load_extractor(
            "dinov2-vit-s-14", weights=number, weights_sha256=hashlib.sha256(number.read_bytes()).hexdigest()
        )


@pytest.mark.parametrize(("name", "millions"), [("s", 22.06), ("b", 86.58), ("l", 304.37), ("g", 1136.48)])
def test_dinov2_networks_have_the_published_numbers_of_parameters(name, millions):
    published = NETWORKS[f"dinov2-vit-{name}-14"]
    with torch.device("meta"):
        network = DinoV2(published.width, published.depth, is_gated=name == "g")
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_positions_are_the_published_ones_on_their_own_grid():
    network = DinoV2(64, 1, is_gated=True)
    nn.init.normal_(network.pos_embed)
    assert network._positions(37, 37) is network.pos_embed
    assert network(torch.zeros(1, 3, 28, 42)).shape == (1, 64)


@pytest.mark.parametrize("name", ["clip-vit-b-32", "dinov2-vit-s-14"])
def test_other_networks_name_their_published_file_too(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError, match=rf"{name} cannot be downloaded \(no route\): fetch https://.*--weights"):
        load_extractor(name)


def test_a_cached_file_is_checked_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth").write_bytes(b"half a download")
    with pytest.raises(InputError, match="sha256 is"):
        load_extractor("dinov2-vit-s-14")


def write_onnx(path, input_type, shape=("n", 3, "h", "w"), axes=(2, 3), external=""):
    """The smallest network of the agreed shape, mean over pixels, as protobuf bytes (no writer library needed).

    `external` names another file for the axes of the mean.
    """

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
    axes_of = field(9, np.array(axes, "<i8").tobytes())
    if external:
        axes_of = field(13, field(1, "location") + field(2, external)) + field(14, 1)
    axes = field(1, 2) + field(2, 7) + field(8, "axes") + axes_of
    keep = attribute("keepdims", 2, field(3, 0))
    mean = field(1, "x") + field(1, "axes") + field(2, "features") + field(4, "ReduceMean") + keep
    graph = field(1, cast) + field(1, mean) + field(2, "g") + field(5, axes)
    graph += field(11, value("images", input_type, shape)) + field(12, value("features", 1, [shape[0], 3]))
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


def test_onnx_file_whose_weights_lie_elsewhere_is_refused_by_name(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "split.onnx", 2, external="weights.bin")
    monkeypatch.chdir(tmp_path)
    for _ in ("missing", "there"):
        with pytest.raises(InputError, match=r"tensor 'axes' lies in another file \('weights\.bin'\)"):
            load_extractor(f"onnx:{path}")
        (tmp_path / "weights.bin").write_bytes(np.array([2, 3], "<i8").tobytes())


def test_onnx_file_with_a_fixed_batch_or_channels_last_gives_the_same_features(tmp_path):
    pytest.importorskip("onnxruntime")
    expected = IMAGES.float().mean((2, 3)).numpy()
    for name, shape, axes in (
        ("one", (1, 3, "h", "w"), (2, 3)),
        ("two", (2, 3, "h", "w"), (2, 3)),
        ("last", ("n", "h", "w", 3), (1, 2)),
    ):
        extractor = load_extractor(f"onnx:{write_onnx(tmp_path / f'{name}.onnx', 2, shape, axes)}")
        np.testing.assert_allclose(extractor(IMAGES), expected, rtol=1e-5)


def test_onnx_file_for_another_size_is_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    extractor = load_extractor(f"onnx:{write_onnx(tmp_path / 'a.onnx', 2, ('n', 3, 112, 112))}")
    with pytest.raises(InputError, match=r"takes images of 3 x 112 x 112, these are 3 x \d+ x \d+") as caught:
        extractor(IMAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_damaged_onnx_files_are_one_line(tmp_path, cut):
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "a.onnx", 2)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="not a readable ONNX file") as caught:
        load_extractor(f"onnx:{path}")
    assert "\n" not in str(caught.value)


def test_onnx_runtimes_own_format_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"\x18\0\0\0ORTM" + bytes(50))
    with pytest.raises(InputError, match="own format"):
        load_extractor(f"onnx:{tmp_path / 'a.onnx'}")


def test_onnx_file_for_grey_images_is_refused_before_anything_is_computed(tmp_path):
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "grey.onnx", 2, ("n", 1, "h", "w"))
    with pytest.raises(InputError, match="an extractor takes colours"):
        load_extractor(f"onnx:{path}")


def test_onnx_output_that_is_not_one_row_of_features_for_each_image_is_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    # The mean over all images of a batch is declared as (3, 3), which is (N, D) by its looks.
    extractor = load_extractor(f"onnx:{write_onnx(tmp_path / 'a.onnx', 2, ('n', 3, 'h', 3), (0, 2))}")
    with pytest.raises(InputError, match="gives 3 rows for 5 images"):
        extractor(torch.zeros(5, 3, 8, 3, dtype=torch.uint8))


class Output:
    def __init__(self, name, kind="tensor(float)", shape=("n", 7)):
        self.name, self.type, self.shape = name, kind, list(shape)


def test_the_one_output_that_can_be_features_is_taken_and_several_are_refused():
    odd = [Output("map", shape=("n", 7, 4, 4)), Output("labels", "tensor(int64)"), Output("any", shape=("n", "d"))]
    assert _features([*odd, Output("pool")], Path("a.onnx")).name == "pool"
    with pytest.raises(InputError, match=r"gives pool .*, logits .*: an extractor gives float32 \(N, D\) once"):
        _features([Output("pool"), Output("logits"), *odd], Path("a.onnx"))
    with pytest.raises(InputError, match=r"gives map .*, labels .*, any "):
        _features(odd, Path("a.onnx"))


def test_other_weights_than_those_of_the_network_are_one_line(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(2)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match="not the published weights of inception-v3-compat") as caught:
        load_extractor("inception-v3-compat", weights=path, weights_sha256=digest)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty.pth").write_bytes(b"")
    digest = hashlib.sha256(b"").hexdigest()
    with pytest.raises(InputError, match="not a file of plain tensors"):
        load_extractor("inception-v3-compat", weights=tmp_path / "empty.pth", weights_sha256=digest)
