"""Checks of a site's own side, each with what to do. `deploy/doctor.py` checks keys, certificates, disk, network."""

import datetime as dt
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from client.data.dataset import CURE_PERSONS, open_dataset
from client.data.person_mapping import persons_of
from client.home import Home
from client.policy.approval import read_approved
from client.private_files import check_private
from client.records.chain import read_chain
from client.records.data_registry import MACHINE_FOLDER, DataRegistry, registry_folder
from client.records.ledger import read_ledger
from client.records.ledger_history import head_problem
from client.settings import CURE_SIGNING_KEY, SiteConfig, load_settings
from shared.data.images import list_images
from shared.data.pixels import HAS_HEIF, UnreadableImageError, decode
from shared.errors import InputError
from shared.messages.signature import public_text, read_key
from shared.storage.code_digest import installed_digest

PROBED_IMAGES = 16


@dataclass(frozen=True)
class Check:
    """One finding; `text` says what to do when it is not ok."""

    name: str
    is_ok: bool
    text: str


def check_site(home: Home) -> list[Check]:
    """Everything that can be checked without the network."""
    try:
        settings = load_settings(home)
    except InputError as error:
        return [Check("settings", False, str(error))]
    checks: list[tuple[str, Callable[[], str]]] = [
        ("settings", lambda: f"{home.settings} is private and valid"),
        ("folder", lambda: check_folder(home)),
        ("images", lambda: _images(settings)),
        ("data set", lambda: _dataset(home, settings)),
        ("registry", _registry),
        ("ledger", lambda: _ledger(home, settings)),
        ("ledger clock", lambda: _clock(home)),
        ("signing key", lambda: check_signing_key(home)),
        ("code", lambda: check_code(home)),
        ("policy", lambda: _policy(settings)),
        ("extras", lambda: _extras(settings)),
        ("device", lambda: _device(settings)),
    ]
    return list(_run(checks))


def _run(checks: list[tuple[str, Callable[[], str]]]) -> Iterator[Check]:
    for name, check in checks:
        try:
            yield Check(name, True, check())
        except (InputError, OSError) as error:
            yield Check(name, False, str(error))


def check_records(home: Home, settings: SiteConfig) -> None:
    """Stop a site whose ledger or journal is damaged or outdated before it takes part; checked by each `start`.

    Raises:
        InputError: what is wrong with them.
    """
    _ledger(home, settings)
    read_chain(home.journal)


def check_folder(home: Home) -> str:
    """Whether folder and private files can be read by this user alone; also checked by each `start`.

    Raises:
        InputError: naming what is open, and the command that closes it.
    """
    mode = home.path.stat().st_mode & 0o777
    if mode & 0o077:
        raise InputError(f"{home.path} has mode {mode:04o}: chmod 700 {home.path}")
    for path in (home.ledger, home.journal, home.approved, home.data_key):
        if path.exists():
            check_private(path)
    return f"{home.path} is private"


def check_signing_key(home: Home) -> str:
    """Whether this site can sign its answers; also checked by each `start`.

    Raises:
        InputError: the key is missing (a folder of an older version has none) or open to others.
    """
    public = public_text(read_key(home.signing_key, CURE_SIGNING_KEY))
    return f"answers are signed with the key {public[:12]}"


def _images(settings: SiteConfig) -> str:
    source = list_images(Path(settings.data))
    names = source.names[:: max(1, len(source.names) // PROBED_IMAGES)][:PROBED_IMAGES]
    start, good = time.monotonic(), 0
    for name in names:
        try:
            decode(source.read(name), settings.image_size)
            good += 1
        except UnreadableImageError:
            continue
    if not good:
        raise InputError(f"none of {len(names)} probed files in {settings.data} decodes: give readable pictures")
    rate = len(names) / max(time.monotonic() - start, 1e-6)
    filed = persons_of(source, settings)
    persons = "no persons" if filed is None else f"{len(set(filed))} persons"
    return f"{len(source.names)} files, {persons}, {good} of {len(names)} probed decode, {rate:.0f} per second and core"


def _dataset(home: Home, settings: SiteConfig) -> str:
    data = open_dataset(home, settings.image_size)
    if len(data.train) < settings.policy.min_images_train:
        raise InputError(
            f"{len(data.train)} training images, policy.min_images_train is {settings.policy.min_images_train}: "
            "add images, or lower it"
        )
    if settings.policy.unit == "person" and data.persons is None:
        raise InputError(f"policy.unit is 'person', but the images have no persons. {CURE_PERSONS}")
    return f"{len(data.train)} images to train on, {len(data.held_out)} held out"


def _registry() -> str:
    registry = DataRegistry(registry_folder())
    registry.prepare()
    with registry.locked():
        number = len({each.home for each in registry.identities().values()})
    if registry.is_shared:
        return f"{registry.folder}: {number} homes of this machine see each other's images and spending"
    return (
        f"{registry.folder}: {number} homes; homes of OTHER USERS are not linked. If there are any: "
        f"`install -d -g maskfed -m 2770 {MACHINE_FOLDER}`, join group maskfed, and scan again"
    )


def _ledger(home: Home, settings: SiteConfig) -> str:
    history = read_ledger(home.ledger)
    if problem := head_problem(history, Path(settings.head_file)):
        raise InputError(problem)
    return f"{len(history.entries)} entries, unbroken, newest head kept in {settings.head_file}"


def _clock(home: Home) -> str:
    now = dt.datetime.now(dt.UTC)
    if read_ledger(home.ledger).is_clock_behind(now):
        raise InputError(
            f"the clock says {now:%Y-%m-%d %H:%M} UTC, before a ledger entry: set it (NTP), or, if it is right now and "
            "was wrong then, `maskfed-client ledger accept-clock`"
        )
    return f"{now:%Y-%m-%d %H:%M} UTC"


def check_code(home: Home) -> str:
    """Whether the operator has approved the code that is installed; told by each `start`, for rounds are refused else.

    Raises:
        InputError: naming the command that approves it.
    """
    digest = installed_digest()
    if digest not in read_approved(home).code:
        raise InputError(f"installed client code {digest[:12]} is not approved: `maskfed-client approve code`")
    return f"installed client code {digest[:12]} is approved"


def _policy(settings: SiteConfig) -> str:
    policy = settings.policy
    if not policy.tasks:
        raise InputError("policy.tasks is empty: every request is refused")
    if policy.max_steps_per_round == 0 or policy.max_rounds_per_day == 0:
        raise InputError("policy allows 0 steps or 0 rounds: every training request is refused")
    if policy.require_dp and policy.epsilon_cap == 0:
        raise InputError("policy.epsilon_cap is 0: every DP round is refused")
    return f"tasks {', '.join(policy.tasks)}; epsilon cap {policy.epsilon_cap:g} per {policy.unit}"


def unused_card(devices: Path = Path("/dev")) -> str:
    """A GPU of this machine that its kernel shows, whatever torch can do with it; empty without one."""
    found = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    return str(devices / found[0]) if found else "/dev/kfd" if (devices / "kfd").exists() else ""


def _extras(settings: SiteConfig) -> str:
    """Whether the optional packages that this site's files and policy ask for are installed.

    Raises:
        InputError: one is not, with the command that brings it.
    """
    wanted = {}
    if any(each.startswith("onnx:") for each in settings.policy.extractors) and find_spec("onnxruntime") is None:
        wanted["onnx"] = "policy.extractors names an ONNX network"
    ignored = list_images(Path(settings.data)).ignored
    if not HAS_HEIF and {".heic", ".heif"} & ignored.keys():
        wanted["heic"] = f"{ignored.get('.heic', 0) + ignored.get('.heif', 0)} pictures are HEIC files and are left out"
    if wanted:
        extras = ",".join(wanted)
        raise InputError(f"{'; '.join(wanted.values())}: `pip install 'maskfed[{extras}]'`")
    return "nothing that is asked for is missing"


def _device(settings: SiteConfig) -> str:
    import torch

    if torch.cuda.is_available() and settings.device != "cpu":
        from shared.training.compiling import has_compiler

        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        memory = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
        slow = "" if has_compiler() else "; without gcc and Python's headers rounds run uncompiled, that is slower"
        return f"{gpus} with {memory}{slow}"
    if settings.device != "cpu" and (card := unused_card()):
        raise InputError(
            f"{card} is here, but torch {torch.__version__} cannot use it: install its driver and the CUDA build of "
            "torch (`pip install torch`), or device = 'cpu' in site.toml"
        )
    if settings.device == "cuda":
        raise InputError("site.toml asks for cuda, but torch finds no GPU: install the driver, or device = 'cpu'")
    return f"CPU with {len(os.sched_getaffinity(0))} cores; no GPU is used"
