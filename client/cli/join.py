"""The commands that begin and end taking part: enroll, join, certificate."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli import site
from client.cli.persons import PersonsOption, keep_persons, with_unit
from client.cli.policy import describe
from client.home import Home, find_home
from shared.commandline import owned
from shared.errors import InputError
from shared.messages.agreement.defaults import DELTA, EPSILON_CAP, MAX_ROUNDS, MAX_STEPS, MIN_NOISE
from shared.paths import user_folder

if TYPE_CHECKING:
    pass

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]

OPTIONS = {
    "image_size": "image-size",
    "held_out_ratio": "held-out",
    "device": "device",
    "policy.tasks": "task",
    "policy.unit": "unit",
    "policy.epsilon_cap": "epsilon-cap",
    "policy.delta": "delta",
    "policy.min_noise_multiplier": "min-noise",
    "policy.max_steps_per_round": "max-steps",
    "policy.max_rounds_per_day": "max-rounds",
    "policy.audit.max_per_run": "max-audits",
    "policy.audit.noise_multiplier": "audit-noise",
    "policy.min_images_train": "min-images",
    "policy.image_count": "image-count",
    "policy.release_scalars": "release",
}
"""Options of `join` by the field that they set."""


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (enroll, join, certificate):
        app.command()(command)


def enroll(
    alias: Annotated[str, typer.Argument(help="Name for your site.")],
    home: HomeOption = None,
    renew: Annotated[
        str | None, typer.Option(help="Replace one key, `node` or `signing`, when in doubt or after a loss.")
    ] = None,
    node_key: Annotated[
        Path | None,
        typer.Option(is_eager=True, help="File of the node key if another user owns it; run the command as root then."),
    ] = None,
) -> None:
    """Make the keys that your site lacks, and print the line to send to the coordinator."""
    from client.settings import load_settings
    from deploy.identity.site_identity import RENEWABLE, create_identity

    place = find_home(home)
    if renew is not None and renew not in RENEWABLE:
        raise InputError(f"--renew {renew}: give node or signing")
    if place.settings.exists() and (own := load_settings(place).alias) != alias:
        raise InputError(f"{place.path} is the folder of site {own}, not of {alias}: give that name, or another --home")
    line = create_identity(place.path, alias, renew, node_key)
    # Before it, so that the line is the last one also where both outputs go to one file.
    typer.echo("send the coordinator the next line; it is good for 14 days and for one use", err=True)
    typer.echo(line)


def join(  # every rule of the policy is one option
    bundle: Annotated[Path, typer.Argument(help="The join bundle that the coordinator sent.")],
    data: Annotated[Path, typer.Option(help="Folder or zip of images; one folder per person.")],
    image_size: Annotated[int, typer.Option(min=8, max=4096, help="Image size in pixels.")],
    home: HomeOption = None,
    identities: Annotated[Path | None, typer.Option(help="File with `<file name> <person>` lines.")] = None,
    person_depth: Annotated[
        int,
        typer.Option(min=0, help="In nested folders: the level that names the person; 1 is the first below the top."),
    ] = 0,
    num_persons: PersonsOption = None,
    epsilon_cap: Annotated[
        float, typer.Option(min=0, help="Largest epsilon that all training together may cost your images.")
    ] = EPSILON_CAP,
    delta: Annotated[float, typer.Option(help="Delta that goes with every epsilon.")] = DELTA,
    unit: Annotated[
        str | None, typer.Option(help="What epsilon protects: image or person; default: person where there are any.")
    ] = None,
    min_noise: Annotated[float, typer.Option(help="Refuse plans with a smaller noise multiplier.")] = MIN_NOISE,
    max_steps: Annotated[int, typer.Option(help="Most optimizer steps in one round.")] = MAX_STEPS,
    max_rounds: Annotated[int, typer.Option(help="Most rounds in 24 hours.")] = MAX_ROUNDS,
    max_audits: Annotated[
        int, typer.Option(min=0, help="Most audits per run, with --task audit; a release of a DP run needs 1.")
    ] = 0,
    audit_noise: Annotated[
        float, typer.Option(help="Noise multiplier of an audit's counts: less finds more, and costs more.")
    ] = 4.0,
    allow_non_private: Annotated[
        bool, typer.Option("--allow-non-private", help="Accept training without DP: updates can then be inverted.")
    ] = False,
    allow_any_experiment: Annotated[
        bool,
        typer.Option(
            "--allow-any-experiment",
            help="Accept every experiment within the other limits without `approve experiment`.",
        ),
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind of request to answer: train, mean_image, statistics or audit; may be repeated. "
            "Default: train and mean_image."
        ),
    ] = None,
    release: Annotated[
        list[str] | None,
        typer.Option(help="Number to send with each reply: loss, grad_norm or seconds; may be repeated."),
    ] = None,
    image_count: Annotated[
        str, typer.Option(help="What the coordinator learns of the number of images: hidden, rounded or exact.")
    ] = "hidden",
    min_images: Annotated[int, typer.Option(help="Fewest images to train with.")] = 1,
    held_out: Annotated[float, typer.Option(help="Share of the images to keep out of training, for audits.")] = 0.1,
    head_file: Annotated[
        Path | None,
        typer.Option(
            help="File outside --home that notes the newest ledger entry, so that an old copy of the ledger is noticed."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train: auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads to train with; 0: torch decides.")] = 0,
    proxy: Annotated[
        str, typer.Option(help="HTTP proxy that leads out, http://host:port; variables like HTTPS_PROXY are not read.")
    ] = "",
    start_now: Annotated[bool, typer.Option("--start", help="Then run `data scan` and `start` as well.")] = False,
) -> None:
    """Join a federation: trust its CA, approve its client code, and write your policy to `site.toml`."""
    from client.operator.installed_code import approve_installed, check_installed
    from client.records.history import check_head_file
    from client.settings import parse_settings, save_settings
    from deploy.identity.addresses import split_proxy
    from deploy.identity.enrolment import read_bundle
    from deploy.identity.site_identity import accept_bundle

    place = find_home(home)
    joined = read_bundle(bundle)
    if proxy:
        split_proxy(proxy)
    if place.settings.exists():
        raise InputError(f"{place.settings} exists already: edit it, or remove it first to join again")
    with _in_options():
        settings = parse_settings(
            {
                "alias": joined.alias,
                "address": joined.address,
                "proxy": proxy,
                "data": str(data.resolve()),
                "identities": str(identities.resolve()) if identities else "",
                "person_depth": person_depth,
                "image_size": image_size,
                "held_out_ratio": held_out,
                "head_file": str((head_file or default_head_file(place, joined.alias)).resolve()),
                "device": device,
                "threads": threads,
                "policy": {
                    "tasks": task or ["train", "mean_image"],
                    "experiments": "any" if allow_any_experiment else "approved",
                    "require_dp": not allow_non_private,
                    "unit": unit or "image",
                    "epsilon_cap": epsilon_cap,
                    "delta": delta,
                    "min_noise_multiplier": min_noise,
                    "max_steps_per_round": max_steps,
                    "max_rounds_per_day": max_rounds,
                    "audit": {"max_per_run": max_audits, "noise_multiplier": audit_noise},
                    "min_images_train": min_images,
                    "image_count": image_count,
                    "release_scalars": release or [],
                },
            },
            "join",
        )
    settings = with_unit(place, settings, unit, num_persons)
    check_head_file(Path(settings.head_file), place.path)
    check_installed(joined.code_digest)
    accept_bundle(place.path, joined)
    approve_installed(place)
    save_settings(place, settings)
    keep_persons(place, settings)
    typer.echo(f"joined {joined.address} as {joined.alias}; CA fingerprint, to compare with the coordinator by phone:")
    typer.echo(f"  {joined.ca_fingerprint}")
    typer.echo(describe(settings.policy))
    typer.echo(f"policy: {place.settings}; next: `maskfed-client data scan`, `doctor`, `start`")
    if start_now:
        site.data_scan(place.path)
        site.start(place.path)


@contextlib.contextmanager
def _in_options() -> Iterator[None]:
    """Let an error name the option that was typed, not the field of `site.toml` that it becomes."""
    try:
        yield
    except InputError as error:
        words = re.fullmatch(r"join: ([a-z_.]+?)(?:\.\d+)? = (.*)", str(error), re.DOTALL)
        if words is None or words[1] not in OPTIONS:
            raise
        raise InputError(f"--{OPTIONS[words[1]]} {words[2]}") from error


def certificate(
    file: Annotated[Path, typer.Argument(help="The certificate that the coordinator sent.")],
    home: HomeOption = None,
    node_key: Annotated[
        Path | None,
        typer.Option(is_eager=True, help="File of the node key if another user owns it; run the command as root then."),
    ] = None,
) -> None:
    """Install a new site certificate: the file that the coordinator made with `maskfed-server sites certify`."""
    from deploy.identity.site_identity import accept_certificate

    place = find_home(home)
    try:
        pem = file.read_text(encoding="ascii")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a PEM certificate: give the file that `sites certify` wrote") from error
    typer.echo(f"{accept_certificate(place.path, pem, node_key)} written; restart `maskfed-client start`")


def default_head_file(home: Home, alias: str) -> Path:
    """A file of this home below the user's state folder."""
    import hashlib

    state = user_folder("XDG_STATE_HOME", ".local", "state")
    return state / "maskfed" / f"{alias}-{hashlib.sha256(str(home.path).encode()).hexdigest()[:12]}.json"
