"""A complete small site in a temporary folder, and requests to it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.data.dataset import scan
from client.home import Home
from client.private_files import write_private
from client.settings import SiteConfig, SitePolicy, save_settings
from shared.data.synthetic import write_folder
from shared.experiment.config import Experiment, parse_experiment
from shared.messages.packing import Manifest, pack
from shared.messages.training import RequestHeader, TrainRequest
from tests.signing import key_of, pem_of

SIZE = 16
OPEN_POLICY = {
    "tasks": ("train",),
    "experiments": "any",
    "require_dp": False,
    "epsilon_cap": 10.0,
    "min_noise_multiplier": 0.5,
    "max_steps_per_round": 100,
    "max_rounds_per_day": 100,
}
DP = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "sample_rate": 0.2, "expected_batch": 4, "micro_batch": 4}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 synthetic images of 6 persons in class folders."""
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, num_images=24, size=SIZE, seed=1)
    return folder


MakeSite = Callable[..., tuple[Home, SiteConfig]]


@pytest.fixture
def make_site(tmp_path: Path, photos: Path) -> MakeSite:
    """Build a site whose policy allows everything that the arguments do not change."""

    def make(data: Path | None = None, held_out_ratio: float = 0.2, **policy: Any) -> tuple[Home, SiteConfig]:
        home = Home(tmp_path / "home")
        settings = SiteConfig(
            alias="site0",
            address="127.0.0.1:1",
            data=str(data or photos),
            image_size=SIZE,
            held_out_ratio=held_out_ratio,
            head_file=str(tmp_path / "head" / "ledger.json"),
            device="cpu",
            policy=SitePolicy(**{**OPEN_POLICY, **policy}),
        )
        save_settings(home, settings)
        # A drawn key would draw another split in each run, and once in 64 one that sets all six persons aside.
        write_private(home.data_key, bytes(32))
        write_private(home.signing_key, pem_of(key_of(settings.alias)))
        scan(home, settings, allow_unreadable=True)
        return home, settings

    return make


def experiment(**sections: dict[str, Any]) -> Experiment:
    """A tiny experiment: T model, 16 pixels in patches of 8, two local steps."""
    base: dict[str, dict[str, Any]] = {
        "train": {"batch": 4},
        "model": {"image_size": SIZE, "patch_size": 8},
        "diffusion": {"timesteps": 50},
        "federation": {"local_steps": 2, "rounds": 3, "min_replies": 1, "min_available": 1},
        "evaluation": {"steps": 10},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return Experiment.model_validate(base)


def weights_of(plan: Experiment) -> dict[str, Any]:
    """Seeded initial tensors of the experiment's model."""
    from shared.diffusion import uvit

    made = _drawn_weights(plan, uvit.SIZES.get(plan.model.size))
    return {name: array.copy() for name, array in made.items()}


@functools.lru_cache(maxsize=100)
def _drawn_weights(plan: Experiment, _network: object) -> dict[str, Any]:
    """The same each time, but for what network a size stands for: `tests/small_network.py`."""
    import torch

    from shared.diffusion.uvit import build_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(plan)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def request_for(
    plan: Experiment, server_round: int = 1, run: str = "run", frozen: tuple[str, ...] = (), **header: Any
) -> TrainRequest:
    """A request for a round of `plan`, all tensors trainable but `frozen`."""
    from shared.messages.packing import array_digest

    tensors = weights_of(plan)
    base = {name: tensors.pop(name) for name in frozen}
    base_manifest = Manifest.of(base)
    packed = pack(base, base_manifest)
    manifest = Manifest.of(tensors)
    fields = {
        "run": run,
        "server_round": server_round,
        "experiment": plan,
        "precision": "float32",
        "manifest": manifest,
        "base_manifest": base_manifest,
        "base_digest": array_digest(packed) if frozen else "",
        **header,
    }
    return TrainRequest(RequestHeader(**fields), pack(tensors, manifest), packed if frozen else None)


__all__ = ["DP", "OPEN_POLICY", "SIZE", "experiment", "parse_experiment", "request_for", "weights_of"]
