"""What a run starts from, and whether it fits: registered sites, checkpoint, experiment, the model of round 0."""

import shutil
from pathlib import Path

from server.federation.rounds.selection import num_asked
from server.federation.updates.aggregation import check_total_weight
from server.federation.updates.global_model import GlobalModel, check_float32
from server.federation.updates.server_optimizer import ServerState
from server.runs.lineage import as_provenance, charges_of_weights
from shared.data.image_set import SYNTHETIC_PREFIX
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, pack
from shared.planning.workload import run_bytes
from shared.secure_aggregation.roster import MAX_SITES
from shared.storage.checkpoint import load_group, load_meta, resolve_checkpoint
from shared.storage.versions import git_commit
from shared.updates.trainable import select_trainable

UNWATCHED = "warning: no public images (--held-out): nothing watches what rounds do to the model"


def check_sites(experiment: Experiment, num_sites: int) -> None:
    """Refuse a federation that the registered sites cannot fill.

    Raises:
        InputError: names the field, the sites and the remedy.
    """
    config, optim = experiment.federation, experiment.optim
    if optim.ema_warmup != "ratio" or optim.ema_every != 1:
        raise InputError(
            f"optim.ema_warmup {optim.ema_warmup!r} and ema_every {optim.ema_every} are of a central training: rounds "
            "average by 'ratio' and 1"
        )
    for field in ("sites_per_round", "min_available", "min_replies"):
        asked = getattr(config, field)
        if asked > num_sites:
            raise InputError(
                f"federation.{field} {asked} is above the {num_sites} registered sites: add sites or lower it"
            )
    if config.secure and num_sites > MAX_SITES:
        raise InputError(f"federation.secure: {num_sites} registered sites, a secure sum has at most {MAX_SITES}")
    asked = num_asked(config, num_sites)
    if config.min_replies > asked:
        raise InputError(
            f"federation.min_replies {config.min_replies} is above the {asked} sites asked per round: lower it"
        )
    check_total_weight(asked, config)


def check_room(home: Path, experiment: Experiment, source: Path) -> None:
    """Refuse a run whose checkpoints the disk does not hold, before anybody is asked.

    Args:
        home: on the coordinator's disk.
        experiment: resolved.
        source: checkpoint that the run starts from; its averaged weights are as large as the run's.

    Raises:
        InputError: there is too little room.
    """
    needed = run_bytes(experiment, (source / "ema.safetensors").stat().st_size)
    free = shutil.disk_usage(home).free
    if free < needed:
        raise InputError(
            f"the run keeps checkpoints of up to {needed / 1e9:.1f} GB, and the disk of {home} has {free / 1e9:.1f} GB "
            "free: make room, or lower train.keep_last"
        )


def find_init(text: str) -> Path:
    """Checkpoint folder that `text` means: a path, or the name of a model that ships with the project.

    Raises:
        InputError: there is none.
    """
    if not text:
        raise InputError("finetune starts from a checkpoint: give --init, or train.init in the experiment")
    shipped = Path(__file__).parents[1] / "models" / text
    return resolve_checkpoint(shipped if shipped.is_dir() and not Path(text).exists() else Path(text))


def find_held_out(held_out: str, reference: str = "") -> str:
    """The images that rounds are checked with, as an absolute path or `synthetic:...`; empty: nothing is checked.

    Args:
        held_out: what the user says; empty: the images of `reference`, where it names images; `none`: no check.
        reference: what checkpoints are compared with; statistics and arrays are no images to check with.

    Raises:
        InputError: there is no such path.
    """
    asked = held_out or (reference if _names_images(reference) else "")
    if asked in ("", "none") or asked.startswith(SYNTHETIC_PREFIX):
        return "" if asked == "none" else asked
    if not Path(asked).exists():
        raise InputError(f"--held-out {asked} does not exist: give images (folder, zip, cache), or none")
    return str(Path(asked).resolve())


def _names_images(reference: str) -> bool:
    is_file = bool(reference) and (Path(reference).is_dir() or Path(reference).suffix == ".zip")
    return is_file or reference.startswith(SYNTHETIC_PREFIX)


def check_fits(source: Path, experiment: Experiment) -> None:
    """Refuse a checkpoint of another network or another diffusion.

    Raises:
        InputError: lists what differs.
    """
    theirs = load_meta(source).experiment
    for section, field in (
        ("model", "backbone"),
        ("model", "size"),
        ("model", "image_size"),
        ("model", "patch_size"),
        ("model", "qkv_bias"),
        ("data", "wavelet"),
        ("data", "wavelet_tokens"),
        ("diffusion", "schedule"),
        ("diffusion", "timesteps"),
        ("diffusion", "prediction"),
    ):
        ours, other = getattr(getattr(experiment, section), field), getattr(getattr(theirs, section), field)
        if ours != other:
            raise InputError(
                f"checkpoint {source} was trained with {section}.{field} {other!r}, the experiment says {ours!r}: "
                "change the experiment, or take another checkpoint"
            )


def initial_model(source: Path, experiment: Experiment) -> GlobalModel:
    """Round 0: the moving average of `source` as both the weights and the moving average."""
    tensors = load_group(source, "ema")
    check_float32(tensors, source)
    trainable = set(select_trainable(tensors, experiment.federation.trainable))
    manifest = Manifest.of({name: tensor for name, tensor in tensors.items() if name in trainable})
    base_manifest = Manifest.of({name: tensor for name, tensor in tensors.items() if name not in trainable})
    weights, meta = pack(tensors, manifest), load_meta(source)
    return GlobalModel(
        manifest=manifest,
        weights=weights,
        ema=weights.copy(),
        base_manifest=base_manifest,
        base=pack(tensors, base_manifest),
        server_round=0,
        local_steps=0,
        optimizer=ServerState(),
        parents=(meta.digest,),
        commit=git_commit(),
        lineage=as_provenance(charges_of_weights(meta.provenance)),
    )
