"""A checkpoint as a folder for diffusers: their loader, our samples, the same weights back."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.training.foreign.diffusers_folder import WEIGHTS_FILE, export_folder, import_folder
from shared.diffusion.sampling import sample
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.evaluation.generate import load_model, sample_images, sample_x_0
from shared.experiment.config import Experiment
from shared.storage.checkpoint import load_group, load_meta, save_checkpoint
from shared.storage.synthetic_mark import SyntheticMark, read_mark

# Their loader copies code without a check of its types, and warns of what NumPy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed"),
]

VARIANTS = {
    "pixels": {"model": {"image_size": 16}, "evaluation": {"steps": 3, "eta": 1.0}},
    "linear, v, dpm++": {
        "model": {"image_size": 16, "patch_size": 2},
        "diffusion": {"schedule": "linear", "prediction": "v"},
        "evaluation": {"steps": 4, "sampler": "dpm++", "clip_x_0": False},
    },
    "haar, bias": {
        "model": {"image_size": 16, "qkv_bias": True},
        "data": {"wavelet": "haar"},
        "evaluation": {"steps": 2, "sampler": "ddpm"},
    },
    "haar, two sequences": {
        "model": {"image_size": 16},
        "data": {"wavelet": "haar", "wavelet_tokens": "split"},
        "evaluation": {"steps": 3, "rederive_eps": False, "ddim_grid": "truncated"},
    },
    "db2": {"model": {"image_size": 16}, "data": {"wavelet": "db2"}, "evaluation": {"steps": 2, "eta": 0.0}},
    "unet": {"model": {"image_size": 16, "backbone": "unet"}, "evaluation": {"steps": 1}},
}


def checkpoint_of(folder, tree):
    """A checkpoint of random weights, averaged and raw ones apart."""
    experiment = Experiment.model_validate(tree)
    torch.manual_seed(7)
    model = build_model(experiment)
    averaged = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    groups = {"ema": averaged, "model": {name: array + 1 for name, array in averaged.items()}}
    save_checkpoint(folder, groups, {"experiment": experiment, "step": 5})
    return folder


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Their loader, with a cache of its own for the Python files."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def loaded(folder):
        pipeline = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return loaded


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_draws_our_images_and_gives_the_weights_back(name, tmp_path, load):
    source = checkpoint_of(tmp_path / "source", VARIANTS[name])
    export_folder(source, tmp_path / "out")
    pipeline, ours = load(tmp_path / "out"), load_model(source)

    images = pipeline(seeds=[3, 11], output_type="np").images
    expected = sample_images(ours.model, ours.experiment, [3, 11], 2)
    assert np.array_equal((images * 255).round().astype("uint8"), expected.permute(0, 2, 3, 1).numpy())
    unrounded = pipeline(seeds=[3, 11], output_type="pt").images
    assert torch.equal(unrounded, sample_x_0(ours.model, ours.experiment, [3, 11]))

    assert import_folder(tmp_path / "out", tmp_path / "back") == load_meta(source).experiment
    for group in ("ema", "model"):
        back = load_group(tmp_path / "back", group)
        assert {key: array.tobytes() for key, array in back.items()} == {
            key: array.tobytes() for key, array in load_group(source, "ema").items()
        }


def test_start_noise_steps_and_generators_are_the_callers(tmp_path, load):
    source = checkpoint_of(tmp_path / "source", VARIANTS["pixels"])
    export_folder(source, tmp_path / "out")
    pipeline, ours = load(tmp_path / "out"), load_model(source, overrides=("evaluation.steps=5", "evaluation.eta=0.5"))
    x_T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (4, 9)]

    options = {"num_inference_steps": 5, "eta": 0.5, "output_type": "pt"}
    theirs = pipeline(latents=x_T, generator=generators(), **options).images
    assert torch.equal(theirs, sample(ours.model, make_schedule("cosine", 1000), ours.experiment, x_T, generators()))
    one = [pipeline(2, generator=torch.Generator().manual_seed(5), output_type="pt").images for _ in range(2)]
    assert torch.equal(*one) and not torch.equal(one[0][0], one[0][1])


def test_pictures_can_carry_the_mark_of_generated_media(tmp_path, load):
    source = checkpoint_of(tmp_path / "source", VARIANTS["pixels"])
    export_folder(source, tmp_path / "out")
    pipeline = load(tmp_path / "out")
    pipeline(seeds=[8]).images[0].save(tmp_path / "face.png", pnginfo=pipeline.synthetic_mark(8))
    assert read_mark(tmp_path / "face.png") == SyntheticMark(load_meta(source).digest, "8")


def test_wrong_targets_and_damaged_folders_are_one_line_and_leave_nothing(tmp_path):
    source = checkpoint_of(tmp_path / "source", VARIANTS["pixels"])
    export_folder(source, tmp_path / "out")
    with pytest.raises(InputError, match="out exists already"):
        export_folder(source, tmp_path / "out")
    with pytest.raises(InputError, match="back exists already"):
        (tmp_path / "back").mkdir()
        import_folder(tmp_path / "out", tmp_path / "back")
    with pytest.raises(InputError, match="says its schedule and heads itself"):
        import_folder(tmp_path / "out", tmp_path / "new", takes_all=False)
    with pytest.raises(InputError, match="neither a checkpoint folder"):
        export_folder(tmp_path, tmp_path / "new")

    weights = tmp_path / "out" / "network" / WEIGHTS_FILE
    whole = load_file(weights)
    first = min(whole)
    for damage, message in (
        ({k: v for k, v in whole.items() if k != first}, "is missing or does not belong"),
        ({**whole, "stranger": torch.zeros(1)}, "is missing or does not belong"),
        ({**whole, first: torch.zeros(3, 5)}, "has shape \\(3, 5\\)"),
        ({**whole, first: torch.full_like(whole[first], float("nan"))}, "not finite"),
    ):
        save_file(damage, weights)
        with pytest.raises(InputError, match=message) as caught:
            import_folder(tmp_path / "out", tmp_path / "new")
        assert "\n" not in str(caught.value)
    weights.write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a safetensors file"):
        import_folder(tmp_path / "out", tmp_path / "new")
    (tmp_path / "out" / "experiment.toml").unlink()
    with pytest.raises(InputError, match=r"no experiment\.toml"):
        import_folder(tmp_path / "out", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_python_files_of_a_folder_are_not_run_by_an_import(tmp_path):
    export_folder(checkpoint_of(tmp_path / "source", VARIANTS["pixels"]), tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.py"):
        file.write_text("raise SystemExit('run')")
    import_folder(tmp_path / "out", tmp_path / "back")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["model"] == load_meta(tmp_path / "source").digest
