"""Import and export of foreign checkpoints, against a network written with the authors' names."""

import json

import numpy as np
import pytest
import pywt
import torch
from safetensors.torch import save_file
from torch import nn

from server.cli import main as cli
from server.training.foreign.checkpoints import export_checkpoint, import_checkpoint
from server.training.foreign.schedules import schedule_tables
from server.training.foreign.wrapped_files import read_foreign
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.patches import patchify, unpatchify
from shared.diffusion.sampling import denoiser
from shared.diffusion.schedule import make_schedule, q_sample
from shared.diffusion.uvit import build_model, timestep_embedding
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import load_group, load_meta
from tests.small_network import SMALL

WIDTH, BLOCKS, HEADS = SMALL["width"], SMALL["num_blocks"], SMALL["num_heads"]
PATCH, SIDE = 4, 4


class TheirAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class TheirBlock(nn.Module):
    def __init__(self, *, skip: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = TheirAttention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TheirEncoder(nn.Module):
    """U-ViT without its output layer; `channels` selects pixels or wavelet bands."""

    def __init__(self, channels: int, position_name: str):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, WIDTH, PATCH, PATCH)})
        self.position_name = position_name
        self.register_parameter(position_name, nn.Parameter(torch.randn(1, 1 + SIDE**2, WIDTH)))
        self.in_blocks = nn.ModuleList(TheirBlock() for _ in range(BLOCKS // 2))
        self.mid_block = TheirBlock()
        self.out_blocks = nn.ModuleList(TheirBlock(skip=True) for _ in range(BLOCKS // 2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, t):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([timestep_embedding(t, WIDTH)[:, None], x], 1) + getattr(self, self.position_name)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.norm(x)


class TheirMaskDM(nn.Module):
    def __init__(self, channels: int = 3):
        super().__init__()
        self.encoder = TheirEncoder(channels, "encoder_pos_embed")
        self.encoder_to_output = nn.Linear(WIDTH, PATCH**2 * channels)

    def forward(self, x, t):
        return unpatchify(self.encoder_to_output(self.encoder(x, t))[:, 1:], PATCH, x.shape[1])


class TheirUViT(TheirEncoder):
    def __init__(self):
        super().__init__(3, "pos_embed")
        self.decoder_pred = nn.Linear(WIDTH, PATCH**2 * 3)

    def forward(self, x, t):
        return unpatchify(self.decoder_pred(super().forward(x, t))[:, 1:], PATCH, 3)


class TheirBiasedAttention(nn.Module):
    """The attention of the wavelet network, with a bias of query and one of value; `TheirAttention` written anew."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        heads = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query + self.q_bias, key, value + self.v_bias)
        )
        seen = nn.functional.scaled_dot_product_attention(*heads)
        return self.proj(seen.transpose(1, 2).flatten(2))


class TheirMaskDWT(nn.Module):
    """MaskedDWTUViT of the paper's Table 2, from its description: two embeddings, two outputs, twice the positions."""

    def __init__(self, *, is_biased: bool = True):
        super().__init__()
        self.encoder = TheirEncoder(3, "encoder_pos_embed")
        self.encoder.approx_patch_embed = self.encoder.patch_embed
        del self.encoder.patch_embed
        self.encoder.detail_patch_embed = nn.ModuleDict({"proj": nn.Conv2d(9, WIDTH, PATCH, PATCH)})
        self.encoder.encoder_pos_embed = nn.Parameter(torch.randn(1, 1 + 2 * SIDE**2, WIDTH))
        if is_biased:
            for block in (*self.encoder.in_blocks, self.encoder.mid_block, *self.encoder.out_blocks):
                block.attn = TheirBiasedAttention()
        self.approx_to_output = nn.Linear(WIDTH, PATCH**2 * 3)
        self.detail_to_output = nn.Linear(WIDTH, PATCH**2 * 9)

    def forward(self, x, t, is_hidden=None):
        """(B, 12, H, W); with `is_hidden`, (B, 2 N) booleans, what the two outputs say of visible patches."""
        encoder, embeddings = self.encoder, []
        for name, bands in (("approx", x[:, :3]), ("detail", x[:, 3:])):
            patches = encoder.get_submodule(f"{name}_patch_embed")["proj"](bands)
            embeddings.append(patches.flatten(2).transpose(1, 2))
        tokens = torch.cat([timestep_embedding(t, WIDTH)[:, None], *embeddings], 1) + encoder.encoder_pos_embed
        if is_hidden is not None:
            shown = torch.cat([torch.ones(len(x), 1, dtype=torch.bool), ~is_hidden], 1)
            tokens = tokens[shown].view(len(x), -1, WIDTH)
        skips = []
        for block in encoder.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = encoder.mid_block(tokens)
        for block in encoder.out_blocks:
            tokens = block(tokens, skips.pop())
        # Equally many of both are visible here.
        approximation, detail = encoder.norm(tokens)[:, 1:].chunk(2, 1)
        approximation, detail = self.approx_to_output(approximation), self.detail_to_output(detail)
        if is_hidden is not None:
            return approximation, detail
        return torch.cat([unpatchify(approximation, PATCH, 3), unpatchify(detail, PATCH, 9)], 1)


@pytest.fixture(scope="module")
def maskdm():
    torch.manual_seed(0)
    return TheirMaskDM()


def training_state(online: nn.Module, averaged: nn.Module, schedule: str = "linear", timesteps: int = 1000):
    """What MaskDM's trainer saves: a diffusion wrapper with its tables, and the averaging wrapper around it."""
    tables = schedule_tables(schedule, timesteps)
    live = {**tables, **{f"model.{key}": x for key, x in online.state_dict().items()}}
    mean = {**tables, **{f"model.{key}": x for key, x in averaged.state_dict().items()}}
    ema = {"initted": torch.tensor(True), "step": torch.tensor(9)}
    ema |= {f"online_model.{key}": x for key, x in live.items()}
    ema |= {f"ema_model.{key}": x for key, x in mean.items()}
    return {
        "step": 123,
        "model": live,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "ema": ema,
        "scaler": None,
    }


def ours_from(folder, group: str):
    model = build_model(load_meta(folder).experiment)
    model.load_state_dict({key: torch.from_numpy(x) for key, x in load_group(folder, group).items()})
    return model


def assert_same_function(model, theirs, channels: int = 3):
    x, t = torch.randn(2, channels, PATCH * SIDE, PATCH * SIDE), torch.tensor([3, 700])
    ids = torch.arange(SIDE**2).expand(2, -1)
    with torch.no_grad():
        got = unpatchify(model(patchify(x, PATCH), t, ids), PATCH, channels)
        torch.testing.assert_close(got, theirs(x, t), rtol=1e-4, atol=1e-5)


def test_maskdm_training_state_becomes_the_same_functions(tmp_path, maskdm):
    averaged = TheirMaskDM()
    torch.save(training_state(maskdm, averaged), tmp_path / "model-1.pt")
    experiment = import_checkpoint(tmp_path / "model-1.pt", tmp_path / "out")
    assert (experiment.model.size, experiment.model.image_size, experiment.model.patch_size) == ("T", 16, 4)
    assert experiment.diffusion.schedule == "linear"
    meta = load_meta(tmp_path / "out")
    assert (meta.step, meta.provenance["layout"]) == (123, "maskdm")
    assert_same_function(ours_from(tmp_path / "out", "model"), maskdm)
    assert_same_function(ours_from(tmp_path / "out", "ema"), averaged)


@pytest.mark.parametrize(("schedule", "timesteps"), [("linear", 500), ("linear", 2000), ("cosine", 100)])
def test_the_number_of_time_steps_is_read_from_the_tables(tmp_path, maskdm, schedule, timesteps):
    torch.save(training_state(maskdm, maskdm, schedule, timesteps), tmp_path / "model.pt")
    experiment = import_checkpoint(tmp_path / "model.pt", tmp_path / "out")
    assert (experiment.diffusion.schedule, experiment.diffusion.timesteps) == (schedule, timesteps)
    assert experiment.evaluation.steps == min(250, timesteps)


def test_what_contradicts_the_tables_is_refused(tmp_path, maskdm):
    def refused(change, words, **options):
        state = training_state(maskdm, maskdm, "linear", options.pop("timesteps", 1000))
        change(state)
        torch.save(state, tmp_path / "model.pt")
        with pytest.raises(InputError, match=words):
            import_checkpoint(tmp_path / "model.pt", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(lambda _: None, "the linear schedule, not cosine", schedule="cosine")
    refused(lambda _: None, "leaves 0.36 of the signal", timesteps=100)
    refused(lambda state: state["model"].update(betas=torch.full((1000,), 0.01)), "have different schedules")
    for name in ("alphas_cumprod", "sqrt_alphas_cumprod", "posterior_mean_coef1"):
        other = schedule_tables("cosine", 1000)[name]

        def both(state, name=name, other=other):
            state["model"].update({name: other})
            state["ema"].update({f"ema_model.{name}": other})

        refused(both, f"'{name}' contradicts 'betas'")
    for bad, words in ((lambda betas: betas.to_sparse(), "is sparse"), (lambda betas: betas / 0, "not finite")):
        refused(lambda state, bad=bad: state["model"].update(betas=bad(state["model"]["betas"])), f"'betas' .*{words}")
    refused(lambda state: state.update(step=-5), "step is -5, which no training counts")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            lambda x: x.clone().index_put_((torch.tensor(0),), torch.tensor(float("nan"))),
            "1 of 48 numbers",
        ),
        (lambda x: x * float("inf"), "48 of 48 numbers"),
        (lambda x: x.to(torch.int8), "holds int8 numbers"),
        (lambda x: x.to_sparse(), "is sparse"),
        (lambda x: x.to("meta"), "quantised or empty"),
    ],
)
def test_what_is_no_finite_dense_number_is_refused_by_its_key(tmp_path, value, words):
    state = TheirUViT().state_dict()
    state["norm.weight"] = value(state["norm.weight"])
    torch.save(state, tmp_path / "nnet.pth")
    with pytest.raises(InputError, match=f"'norm.weight' .*({words})"):
        import_checkpoint(tmp_path / "nnet.pth", tmp_path / "out", schedule="cosine")


def test_a_bias_of_query_key_and_value_is_kept(tmp_path):
    theirs = TheirUViT()
    for block in (*theirs.in_blocks, theirs.mid_block, *theirs.out_blocks):
        block.attn.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        nn.init.normal_(block.attn.qkv.bias)
    torch.save(theirs.state_dict(), tmp_path / "nnet.pth")
    assert import_checkpoint(tmp_path / "nnet.pth", tmp_path / "out", schedule="cosine").model.qkv_bias
    assert_same_function(ours_from(tmp_path / "out", "ema"), theirs)


def test_cosine_tables_are_recognised(tmp_path, maskdm):
    torch.save(training_state(maskdm, maskdm, "cosine"), tmp_path / "model.pt")
    assert import_checkpoint(tmp_path / "model.pt", tmp_path / "out").diffusion.schedule == "cosine"


def test_wavelet_network_is_recognised_by_its_channels(tmp_path):
    theirs = TheirMaskDM(channels=12)
    save_file({f"model.{key}": x for key, x in theirs.state_dict().items()}, tmp_path / "dwt.safetensors")
    experiment = import_checkpoint(tmp_path / "dwt.safetensors", tmp_path / "out", schedule="cosine")
    assert (experiment.data.wavelet, experiment.model.image_size, experiment.in_channels) == ("haar", 32, 12)
    assert_same_function(ours_from(tmp_path / "out", "ema"), theirs, channels=12)


@pytest.fixture(scope="module")
def maskdwt():
    torch.manual_seed(1)
    return TheirMaskDWT()


def test_the_papers_wavelet_network_becomes_the_same_function(tmp_path, maskdwt):
    averaged = TheirMaskDWT()
    torch.save(training_state(maskdwt, averaged, "cosine"), tmp_path / "model.pt")
    experiment = import_checkpoint(tmp_path / "model.pt", tmp_path / "out")
    assert (experiment.data.wavelet, experiment.data.wavelet_tokens) == ("haar", "split")
    assert (experiment.model.image_size, experiment.model.qkv_bias, experiment.sequences) == (32, True, (3, 9))
    # Its authors clip x_0 and believe the network's noise all the same.
    assert (experiment.evaluation.rederive_eps, experiment.evaluation.ddim_grid) == (False, "truncated")
    x, t = torch.randn(2, 12, PATCH * SIDE, PATCH * SIDE), torch.tensor([3, 700])
    for group, theirs in (("model", maskdwt), ("ema", averaged)):
        with torch.no_grad():
            ours = torch.stack([denoiser(ours_from(tmp_path / "out", group), experiment)(x, int(k)) for k in t])
            torch.testing.assert_close(ours[[0, 1], [0, 1]], theirs(x, t), rtol=1e-4, atol=1e-5)


def test_masked_loss_of_the_papers_wavelet_network_is_theirs(tmp_path, maskdwt):
    save_file({f"model.{key}": x for key, x in maskdwt.state_dict().items()}, tmp_path / "dwt.safetensors")
    stored = import_checkpoint(tmp_path / "dwt.safetensors", tmp_path / "out", schedule="cosine")
    mask = {"kind": "patch", "ratio": 0.7}
    experiment = Experiment.model_validate({**stored.model_dump(), "train": {"objective": "msm"}, "mask": mask})
    images, schedule = torch.rand(2, 3, 32, 32) * 2 - 1, make_schedule("cosine", 1000)
    draw = draw_noise(experiment, 2, torch.Generator().manual_seed(2))
    model = ours_from(tmp_path / "out", "model")
    with torch.no_grad():
        ours = per_image_loss(model, schedule, experiment, images, *draw)
    # Theirs: noise on whole bands, a mask of booleans over both sequences, the mean of each output's error.
    hidden = torch.ones(2, 2, SIDE**2, dtype=torch.bool)
    noise = torch.zeros(2, 12, PATCH * SIDE, PATCH * SIDE)
    places, parts = draw.ids_BL.chunk(2, 1), draw.eps_BVP.split([PATCH**2 * 3, PATCH**2 * 9], -1)
    for number, (ids, eps, channels) in enumerate(zip(places, parts, (slice(0, 3), slice(3, 12)), strict=True)):
        tokens = torch.zeros(2, SIDE**2, eps.shape[-1]).scatter_(1, ids[..., None].expand_as(eps), eps)
        noise[:, channels] = unpatchify(tokens, PATCH, eps.shape[-1] // PATCH**2)
        hidden[:, number].scatter_(1, ids, value=False)
    approximation, details = pywt.dwt2(images.numpy() / 2 + 0.5, "haar")
    bands = torch.from_numpy(np.concatenate([2 * approximation - 1, *details], 1))
    x_t = q_sample(schedule, bands, draw.t_B, noise)
    with torch.no_grad():
        outputs = maskdwt(x_t, draw.t_B, hidden.flatten(1))
    expected = torch.zeros(2)
    for number, (output, channels) in enumerate(zip(outputs, (slice(0, 3), slice(3, 12)), strict=True)):
        target = patchify(noise[:, channels], PATCH)[~hidden[:, number]].view(output.shape)
        expected += (output - target).square().mean((1, 2))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_biased", [True, False])
def test_export_returns_the_papers_wavelet_network(tmp_path, is_biased):
    theirs, other = TheirMaskDWT(is_biased=is_biased), TheirMaskDWT(is_biased=is_biased)
    torch.save(training_state(theirs, theirs, "cosine"), tmp_path / "model.pt")
    assert import_checkpoint(tmp_path / "model.pt", tmp_path / "out").model.qkv_bias == is_biased
    export_checkpoint(tmp_path / "out", tmp_path / "back.pt", "maskdm")
    state = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    other.load_state_dict({key[6:]: x for key, x in state.items() if key.startswith("model.")}, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match=r"'split', U-ViT one sequence of tokens: give --to maskdm"):
        export_checkpoint(tmp_path / "out", tmp_path / "back.pth", "uvit")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("encoder.mid_block.attn.v_bias"), "q_bias' does not fit: .*no other fits"),
        (
            lambda state: state.update({"encoder.mid_block.attn.q_bias": torch.zeros(3)}),
            rf"biases of query and value have shapes \(3,\) and \({WIDTH},\)",
        ),
        (
            lambda state: state.update({"encoder.mid_block.attn.v_bias": torch.full((WIDTH,), float("nan"))}),
            f"v_bias' has {WIDTH} of {WIDTH} numbers that are not finite",
        ),
        (
            lambda state: state.update({"encoder.encoder_pos_embed": torch.zeros(1, 1 + SIDE**2 + 4, WIDTH)}),
            "21 positions and 3 channels, where 1 . twice a square and 3 fit",
        ),
        (
            lambda state: state.update({"encoder.detail_patch_embed.proj.weight": torch.zeros(WIDTH, 9, 8, 8)}),
            r"detail_patch_embed\.proj\.weight' has shape",
        ),
        (lambda state: state.pop("detail_to_output.bias"), r"'detail_to_output\.bias' is missing"),
    ],
)
def test_damaged_wavelet_networks_are_refused_by_key(tmp_path, maskdwt, change, words):
    state = dict(maskdwt.state_dict())
    change(state)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(InputError, match=words) as caught:
        import_checkpoint(tmp_path / "model.pth", tmp_path / "out", schedule="cosine")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_uvit_state_dict_becomes_the_same_function(tmp_path):
    theirs = TheirUViT()
    torch.save(theirs.state_dict(), tmp_path / "nnet_ema.pth")
    import_checkpoint(tmp_path / "nnet_ema.pth", tmp_path / "out", schedule="cosine")
    assert_same_function(ours_from(tmp_path / "out", "ema"), theirs)
    assert_same_function(ours_from(tmp_path / "out", "model"), theirs)


@pytest.mark.parametrize("name", ["back.pt", "back.safetensors"])
def test_maskdm_export_returns_the_imported_file(tmp_path, maskdm, name):
    averaged = TheirMaskDM()
    state = training_state(maskdm, averaged)
    torch.save(state, tmp_path / "model.pt")
    import_checkpoint(tmp_path / "model.pt", tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / name, "maskdm")
    assert read_foreign(tmp_path / name).groups.keys() == {"model", "ema"}
    for group, tensors in read_foreign(tmp_path / "model.pt").groups.items():
        got = read_foreign(tmp_path / name).groups[group]
        assert got.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(got[key], tensor), key
    if name == "back.pt":
        back = torch.load(tmp_path / name, weights_only=True)
        assert back["step"] == 123
        assert set(back["model"]) == set(state["model"])
        assert set(back["ema"]) == {key for key in state["ema"] if key.startswith("ema_model.")}


def test_uvit_export_loads_strictly_into_their_network(tmp_path):
    theirs, other = TheirUViT(), TheirUViT()
    torch.save(theirs.state_dict(), tmp_path / "nnet.pth")
    import_checkpoint(tmp_path / "nnet.pth", tmp_path / "out", schedule="linear")
    export_checkpoint(tmp_path / "out", tmp_path / "back.pth", "uvit")
    other.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("final_layer.weight", "final convolution"),
        ("time_embed.0.weight", "time embedding"),
        ("label_emb.weight", "class conditioning"),
        ("in_blocks.0.attn.q_bias", "bias of the attention"),
        ("surprise", "nothing this network has"),
    ],
)
def test_what_does_not_fit_is_refused_by_key_and_reason(tmp_path, key, reason):
    torch.save({**TheirUViT().state_dict(), key: torch.zeros(3)}, tmp_path / "nnet.pth")
    with pytest.raises(InputError, match=f"key '{key}' does not fit: it is .*{reason}"):
        import_checkpoint(tmp_path / "nnet.pth", tmp_path / "out", schedule="linear")
    assert not (tmp_path / "out").exists()


def test_missing_and_misshapen_keys_are_named(tmp_path):
    state = TheirUViT().state_dict()
    torch.save({key: x for key, x in state.items() if key != "mid_block.mlp.fc1.bias"}, tmp_path / "a.pth")
    torch.save({**state, "norm.weight": torch.zeros(3)}, tmp_path / "b.pth")
    torch.save({**state, "pos_embed": torch.zeros(1, 12, WIDTH)}, tmp_path / "c.pth")
    torch.save({**state, "pos_embed": torch.zeros(1, 0, WIDTH)}, tmp_path / "d.pth")
    for name, message in (
        ("a", r"'mid_block\.mlp\.fc1\.bias' is missing"),
        ("b", r"'norm\.weight' has shape \(3,\)"),
        ("c", "12 positions"),
        ("d", " 0 positions"),
    ):
        with pytest.raises(InputError, match=message):
            import_checkpoint(tmp_path / f"{name}.pth", tmp_path / "out", schedule="linear")


def test_the_digest_of_a_checkpoint_in_parts_covers_every_part(tmp_path):
    state = {key: tensor.clone() for key, tensor in TheirUViT().state_dict().items()}
    held = {key: f"m-0000{1 + ('mid' in key)}-of-00002.safetensors" for key in state}
    index, found = tmp_path / "m.safetensors.index.json", []
    index.write_text(json.dumps({"weight_map": held}))
    for number in range(2):
        state["mid_block.mlp.fc1.bias"] += number
        for file in set(held.values()):
            save_file({key: tensor for key, tensor in state.items() if held[key] == file}, tmp_path / file)
        import_checkpoint(index, tmp_path / f"out{number}", schedule="linear")
        found.append(load_meta(tmp_path / f"out{number}").provenance["sha256"])
    assert found[0] != found[1], "the index is the same, what was imported is not"


def test_other_sizes_heads_and_unknown_schedules_are_refused(tmp_path):
    state = TheirUViT().state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save({key: x for key, x in state.items() if "_blocks.0." not in key}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="48, 3 blocks, 8 heads is none of the sizes"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "out", schedule="linear", num_heads=8)
    with pytest.raises(InputError, match="48, 1 blocks is none of the sizes"):
        import_checkpoint(tmp_path / "b.pth", tmp_path / "out", schedule="linear")
    with pytest.raises(InputError, match=r"no schedule tables: say which one .* --schedule linear or cosine"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "out")
    torch.save({**state, "betas": torch.full((1000,), 0.5)}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="'betas' of neither schedule"):
        import_checkpoint(tmp_path / "c.pth", tmp_path / "out")


def test_unreadable_files_are_one_line(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    torch.save({"step": 1}, tmp_path / "empty.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    for name, message in (
        ("absent.pt", "No such file"),
        ("text.pt", "no safetensors or plain torch file"),
        ("text.safetensors", "no safetensors or plain torch file"),
        ("empty.pt", "holds no tensors"),
        ("other.pt", "'weights': neither"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            import_checkpoint(tmp_path / name, tmp_path / "out", schedule="linear")
        assert "\n" not in str(caught.value)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": TheirUViT()}, tmp_path / "module.pt")  # a pickled object, not tensors
    with pytest.raises(InputError, match="no safetensors or plain torch file"):
        import_checkpoint(tmp_path / "module.pt", tmp_path / "out", schedule="linear")


def test_commands_import_and_export(tmp_path, maskdm, capsys, monkeypatch):
    torch.save(training_state(maskdm, maskdm), tmp_path / "model.pt")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["maskfed-server", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert call("import-checkpoint", tmp_path / "model.pt", "--out", tmp_path / "out") == 0
    assert call("export", tmp_path / "out", "--out", tmp_path / "back.pth", "--to", "uvit") == 0
    assert "size T, 16 px, patch 4" in capsys.readouterr().out
    assert "pos_embed" in torch.load(tmp_path / "back.pth", weights_only=True)
    assert call("import-checkpoint", tmp_path / "model.pt", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_existing_targets_and_other_suffixes_are_left_alone(tmp_path, maskdm):
    torch.save(training_state(maskdm, maskdm), tmp_path / "model.pt")
    import_checkpoint(tmp_path / "model.pt", tmp_path / "out")
    with pytest.raises(InputError, match="out exists already"):
        import_checkpoint(tmp_path / "model.pt", tmp_path / "out")
    with pytest.raises(InputError, match=r"model\.pt exists already"):
        export_checkpoint(tmp_path / "out", tmp_path / "model.pt", "maskdm")
    with pytest.raises(InputError, match=r"suffix '\.bin'"):
        export_checkpoint(tmp_path / "out", tmp_path / "model.bin", "maskdm")
