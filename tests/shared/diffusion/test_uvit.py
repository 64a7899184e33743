"""The U-ViT: sizes, masking, K draws, attention paths."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from shared.diffusion.uvit import (
    Attention,
    Positions,
    UViT,
    build_model,
    timestep_embedding,
    uvit_B,
    uvit_L,
    uvit_S,
    uvit_T,
)
from shared.experiment.config import parse_experiment

pytestmark = pytest.mark.full_size

PIXELS_64 = {"in_channels": 3, "grid_size": 16, "patch_size": 4}
PIXELS_32 = {"in_channels": 3, "grid_size": 8, "patch_size": 4}
WAVELET_256 = {"in_channels": 12, "grid_size": 32, "patch_size": 4}


def tiny(num_blocks: int = 3) -> UViT:
    torch.manual_seed(0)
    return UViT(in_channels=3, grid_size=4, patch_size=2, width=32, num_blocks=num_blocks, num_heads=4)


def inputs(batch: int = 3, visible: int = 5, draws: int = 1):
    torch.manual_seed(1)
    tokens = torch.randn(batch, draws * visible, 12)
    ids = torch.rand(batch, draws, 16).argsort(-1)[..., :visible].reshape(batch, draws * visible)
    t = torch.randint(1000, (batch, draws))
    return tokens, t if draws > 1 else t[:, 0], ids


@pytest.mark.parametrize(
    ("build", "shape", "count"),
    [
        (uvit_T, PIXELS_64, 3_400_176),
        (uvit_T, PIXELS_32, 3_363_312),
        (uvit_S, PIXELS_64, 44_292_144),
        (uvit_B, PIXELS_64, 99_468_336),
        (uvit_L, PIXELS_64, 231_233_584),
        (uvit_L, WAVELET_256, 232_315_072),
        (uvit_L, {**WAVELET_256, "sequences": (3, 9)}, 233_364_672),
    ],
)
def test_parameter_counts_are_those_of_the_paper(build, shape, count):
    with torch.device("meta"):
        model = build(**shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_wavelet_network_of_the_paper_has_its_number_of_parameters():
    experiment = parse_experiment(
        "[model]\nsize = 'L'\nimage_size = 256\nqkv_bias = true\n[data]\nwavelet = 'haar'\nwavelet_tokens = 'split'\n"
    )
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_model(experiment).parameters())
    # Theirs has no bias of the key, on which no attention depends.
    assert count - 17 * 1024 == 233_399_488


@pytest.mark.parametrize("sequences", [(), (1, 2)])
def test_patch_embeddings_start_as_a_convolution_of_torch_does_on_demand(sequences):
    torch.manual_seed(0)
    shape = {"in_channels": 3, "grid_size": 4, "patch_size": 4, "width": 192, "num_blocks": 3, "num_heads": 3}
    model = UViT(**shape, sequences=sequences)
    model.start_patches_uniformly()
    channels = sequences or (3,)
    for layer, size in zip(("embedding", "detail_embedding"), channels, strict=False):
        ours, theirs = model.get_submodule(layer), torch.nn.Conv2d(size, 192, 4, 4)
        for own, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            assert own.abs().max() <= (16 * size) ** -0.5
            assert own.detach().std() == pytest.approx(float(other.detach().std()), rel=0.25)
    assert float(model.output.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert parse_experiment("[model]\npatch_init = 'uniform'\n").model.patch_init == "uniform"


def test_every_trainable_tensor_sits_in_its_own_leaf_module():
    for module in tiny().modules():
        if list(module.parameters(recurse=False)):
            assert not list(module.children())
            assert not list(module.buffers(recurse=False))


def test_attention_is_selectable_by_name():
    names = [name for name, _ in tiny().named_parameters() if ".attention." in name]
    assert len(names) == 3 * 3


def test_forward_matches_functional_reference_of_the_published_architecture():
    model = tiny()
    tokens, t, ids = inputs()
    w = dict(model.named_parameters())

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"])

    def block(x, name, skip=None):
        if skip is not None:
            x = torch.cat([x, skip], -1) @ w[f"{name}.skip.weight"].T + w[f"{name}.skip.bias"]
        y = norm(x, f"{name}.norm1") @ w[f"{name}.attention.qkv.weight"].T
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in y.chunk(3, -1))
        y = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        x = x + y @ w[f"{name}.attention.projection.weight"].T + w[f"{name}.attention.projection.bias"]
        y = F.gelu(norm(x, f"{name}.norm2") @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"])
        return x + y @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]

    x = torch.stack([tokens[b] @ w["embedding.weight"].T + w["embedding.bias"] for b in range(3)])
    x = torch.cat([timestep_embedding(t, 32)[:, None], x], 1)
    table = w["positions.weight"]
    x = x + torch.stack([torch.cat([table[:1], table[1:][ids[b]]]) for b in range(3)])
    skip = x = block(x, "in_blocks.0")
    x = block(block(x, "mid_block"), "out_blocks.0", skip)
    expected = norm(x, "norm")[:, 1:] @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(model(tokens, t, ids), expected, rtol=1e-5, atol=1e-5)


def test_order_of_visible_patches_does_not_matter():
    model = tiny()
    tokens, t, ids = inputs()
    order = torch.randperm(5)
    shuffled = model(tokens[:, order], t, ids[:, order])
    torch.testing.assert_close(shuffled, model(tokens, t, ids)[:, order], rtol=1e-4, atol=1e-5)


def test_position_and_time_change_the_prediction():
    model = tiny()
    tokens, t, ids = inputs()
    assert not torch.allclose(model(tokens, t, ids), model(tokens, t, (ids + 1) % 16))
    assert not torch.allclose(model(tokens, t, ids), model(tokens, (t + 1) % 1000, ids))


def test_draws_in_the_token_axis_equal_draws_in_the_batch():
    model = tiny()
    tokens, t, ids = inputs(draws=4)
    together = model(tokens, t, ids)
    apart = model(tokens.view(12, 5, 12), t.flatten(), ids.view(12, 5)).view(3, 20, 12)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("draws", [1, 3])
def test_empty_batch_goes_through_and_has_zero_gradient(draws):
    model = tiny()
    tokens, t, ids = inputs(batch=0, draws=draws)
    out = model(tokens, t, ids)
    assert out.shape == tokens.shape
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_explicit_attention_of_bfloat16_on_the_cpu_agrees_with_float32():
    torch.manual_seed(0)
    layer = Attention(32, 4)
    x = torch.randn(2, 10, 32)
    expected = layer(x, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, 2)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.02)


def test_bfloat16_never_calls_the_fused_kernel_on_the_cpu(monkeypatch):
    def fused(*_):
        raise AssertionError("fused kernel called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    model = tiny().bfloat16()
    assert model(*inputs()).dtype == torch.float32  # dtype of the solver state, not of the weights
    with pytest.raises(AssertionError, match="fused"):
        tiny()(*inputs())


def test_empty_batch_never_calls_the_fused_kernel(monkeypatch):
    def fused(*_):
        raise RuntimeError("batch size must be positive")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fused)
    output = tiny()(*(each[:0] for each in inputs()))
    torch.autograd.backward(output.sum())
    assert len(output) == 0


def test_bfloat16_weights_stay_close_to_float32():
    expected, got = tiny()(*inputs()), tiny().bfloat16()(*inputs())
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.02)


def test_position_gradient_reaches_only_visible_rows():
    layer = Positions(5, 4)
    layer(torch.zeros(1, 2, 4), torch.tensor([[1, 3]])).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any(1).tolist() == [False, True, False, True, False]


def test_timestep_embedding_matches_diffusers():
    t = torch.tensor([0.0, 1.5, 999.0])
    from diffusers.models.embeddings import get_timestep_embedding  # loads for seconds

    expected = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, 64), expected, rtol=1e-5, atol=1e-5)


def test_build_model_follows_the_experiment():
    text = '[model]\nsize = "T"\nimage_size = 32\n[data]\nwavelet = "haar"\n'
    model = build_model(parse_experiment(text))
    assert isinstance(model, UViT)
    assert (model.embedding.in_features, model.grid_size, model.width) == (4 * 4 * 12, 4, 192)


def test_the_bias_of_query_key_and_value_starts_at_zero_and_is_used():
    plain, biased = (parse_experiment(f"[model]\nqkv_bias = {value}\n") for value in ("false", "true"))
    torch.manual_seed(3)
    network = build_model(plain)
    torch.manual_seed(3)
    other = build_model(biased)
    names = {name for name, _ in other.named_parameters()} - {name for name, _ in network.named_parameters()}
    assert len(names) == 7 and all(name.endswith("attention.qkv.bias") for name in names)
    tokens, t, ids = torch.randn(2, 4, 48), torch.tensor([3, 700]), torch.arange(4).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(network(tokens, t, ids), other(tokens, t, ids))
        other.mid_block.attention.qkv.bias.fill_(0.5)
        assert not torch.equal(network(tokens, t, ids), other(tokens, t, ids))
