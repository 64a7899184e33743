"""What the operator computes by own hand: `audit` of a model and of DP-SGD, `compare-alone`, feature `statistics`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from client.home import find_home
from shared.commandline import JsonOption, owned, tell_json
from shared.errors import InputError

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]
DEFAULT = "model"


class _ModelFirst(TyperGroup):
    """`audit CHECKPOINT` is short for `audit model CHECKPOINT`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the default command in front, unless another one or help is asked for."""
        if args and args[0] not in self.commands and args[0] not in self.get_help_option_names(ctx):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


audits = typer.Typer(
    cls=_ModelFirst,
    no_args_is_help=True,
    help="Check a model for leaks of your images (audit CHECKPOINT ...), or the DP training itself (audit canaries).",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(audits, name="audit")
    app.command()(compare_alone)
    app.command()(statistics)


@audits.command(DEFAULT)
def audit(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or run directory of the model.")],
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            help="Public checkpoint trained without this site's images, to compare with; may be "
            "repeated, the model's start first."
        ),
    ] = None,
    public: Annotated[
        str,
        typer.Option(
            help="Public images: a copy of the first reference is fine-tuned on them and used as one more reference."
        ),
    ] = "",
    public_steps: Annotated[int, typer.Option(min=1, help="Steps of the fine-tuning on --public.")] = 500,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what the coordinator gets: verdicts on noisy counts, charged.")
    ] = None,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures",
            help="Write exact figures instead of noisy ones. The data set's epsilon is unbounded from then on.",
        ),
    ] = False,
    extractor: Annotated[str, typer.Option(help="Feature space of the copy test: pixels, onnx:FILE, ...")] = "pixels",
    weights: Annotated[Path | None, typer.Option(help="File of the extractor's weights.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Generated images of the copy test.")] = 1000,
    control_steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Training steps of the control model, which learns images by heart to prove that the attack works.",
        ),
    ] = 1000,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: as site.toml says.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Attack a model with this site's images: membership inference, copies.

    Without --out nothing is charged and nothing leaves.
    """
    from client.answers.attacks import AuditOptions
    from client.answers.attacks import audit as run
    from client.answers.audit_counts import counted_verdicts
    from client.answers.audited_model import subject_of, with_tuned_reference
    from client.answers.verdicts import charge_operator, write_verdicts
    from client.data.dataset import open_dataset
    from client.privacy.epsilon import epsilon_of
    from client.settings import load_settings
    from client.training.local_round import choose_device
    from shared.evaluation.networks import load_extractor
    from shared.messages.audit import PIXELS
    from shared.training.processes import named_device

    place = find_home(home)
    settings = load_settings(place)
    where = named_device(device) if device else choose_device(settings.device)
    subject = subject_of(checkpoint, reference or (), device=where, overrides=overrides or ())
    options = AuditOptions(
        extractor=None if extractor == PIXELS else load_extractor(extractor, weights=weights, device=where),
        num_images=num,
        control_steps=control_steps,
        on_stage=lambda stage: typer.echo(f"{stage} ...", err=True),
    )
    if public:
        options.on_stage(f"fine-tuning the reference on {public}, {public_steps} steps")
        subject = with_tuned_reference(subject, public, public_steps)
    verdicts = run(place, settings, subject, options)
    for verdict in verdicts:
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in verdict.figures.items() if isinstance(value, int | float)
        )
        typer.echo(f"{verdict.audit}: {'pass' if verdict.passed else f'FAIL, {verdict.reason}'} ({shown})")
    typer.echo(f"figures and the closest pairs, for your eyes only: {place.path / 'audits'}")
    if out is not None:
        charge_operator(place, settings, subject.digest, figures=figures, epsilon_of=epsilon_of)
        if not figures:
            options.on_stage("counting, with noise, what the coordinator gets")
            data, policy = open_dataset(place, settings.image_size), settings.policy
            verdicts = counted_verdicts(settings.alias, subject, data, policy.unit, policy.audit)
        write_verdicts(place, verdicts, out)
        typer.echo(f"verdicts for the coordinator, charged: {out}")
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


@audits.command()
def canaries(
    experiment: Annotated[Path, typer.Argument(help="Experiment file whose plan is audited: [privacy], all rounds.")],
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Precision of the run, float32 or bfloat16; it matters with privacy.clipping = hooks only."),
    ] = "float32",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Audit DP-SGD as installed here: a throw-away training of canaries at a plan's constants. Costs no budget."""
    import secrets

    import numpy as np

    from client.privacy.canaries import NO_NOISE, audit_canaries, canary_plan
    from client.settings import load_settings
    from client.training.local_round import choose_device
    from shared.experiment.config import load_experiment

    settings = load_settings(find_home(home))
    asked = load_experiment(experiment, overrides)
    delta, device = settings.policy.delta, choose_device(settings.device)
    rng = np.random.default_rng(secrets.randbits(128))
    plan = canary_plan(asked)
    found = audit_canaries(plan, delta, rng, device=device, precision=precision)
    control = audit_canaries(canary_plan(asked, noise_multiplier=NO_NOISE), delta, rng, device=device)
    has_teeth = control.bound > found.epsilon
    if as_json:
        told: dict[str, object] = {"steps": plan.federation.local_steps, "sample_rate": plan.privacy.sample_rate}
        told |= {"noise_multiplier": plan.privacy.noise_multiplier}
        told |= {"guesses": found.guesses, "correct": found.correct}
        told |= {"bound": found.bound, "epsilon": found.epsilon, "delta": delta, "unit": plan.privacy.unit}
        tell_json(told | {"is_sound": found.is_sound, "bound_without_noise": control.bound})
        return
    typer.echo(
        f"{plan.federation.local_steps} steps at noise multiplier {plan.privacy.noise_multiplier:g}, rate "
        f"{plan.privacy.sample_rate:g}: {found.correct} of {found.guesses} guesses correct"
    )
    typer.echo(
        f"epsilon is at least {found.bound:.3f} (95 percent confidence), the ledger charges {found.epsilon:.3f} at "
        f"delta {delta:g} per {plan.privacy.unit}: {'pass' if found.is_sound else 'FAIL, noise or accounting is wrong'}"
    )
    typer.echo(
        f"with the noise off: at least {control.bound:.3f}, "
        + ("which the audit would have caught" if has_teeth else "below that epsilon: at this plan the audit is blunt")
    )
    if not found.is_sound:
        raise typer.Exit(1)


def compare_alone(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of the federated model.")],
    start: Annotated[Path, typer.Option(help="Checkpoint folder that the run started from.")],
    steps: Annotated[int, typer.Option(min=0, help="Steps to train alone; 0: as many as the run's rounds had.")] = 0,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train here alone for as long as a run, without DP, and tell which model does better on the held-out images.

    Nothing is charged, kept or sent.
    """
    from client.data.dataset import open_dataset
    from client.settings import load_settings
    from client.training.alone import compare_alone as compare
    from client.training.local_round import choose_device

    place = find_home(home)
    settings = load_settings(place)
    data = open_dataset(place, settings.image_size)
    typer.echo("training alone ...", err=True)
    gain = compare(place, data, checkpoint, start, device=choose_device(settings.device), steps=steps)
    if as_json:
        tell_json(asdict(gain))
    else:
        typer.echo(gain.in_words())


def statistics(
    out: Annotated[Path, typer.Option(help="Statistics file for the coordinator (.safetensors).")],
    extractor: Annotated[str, typer.Option(help="Feature network: inception-v3-compat, random-inception, onnx:FILE.")],
    weights: Annotated[Path | None, typer.Option(help="File of the extractor's weights.")] = None,
    projection: Annotated[Path | None, typer.Option(help="The coordinator's projection: release with DP.")] = None,
    noise: Annotated[float, typer.Option(help="Noise multiplier of a DP release.")] = 1.1,
    home: HomeOption = None,
) -> None:
    """Write feature statistics for the coordinator; charged. Exact, so of unbounded epsilon, without --projection."""
    from client.answers.statistics.site_statistics import StatisticsPlan, release_statistics
    from client.privacy.epsilon import epsilon_of
    from client.settings import load_settings
    from shared.evaluation.feature_statistics import save_statistics
    from shared.evaluation.networks import load_extractor
    from shared.evaluation.private_statistics import load_projection

    place = find_home(home)
    settings = load_settings(place)
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: give a name that ends in .safetensors")
    network = load_extractor(extractor, weights=weights)
    public = load_projection(projection) if projection else None
    plan = StatisticsPlan("dp" if public else "exact", network.space, public, noise)
    found = release_statistics(place, settings, plan, lambda: network, epsilon_of)
    save_statistics(found, out)
    spent = "exact: this site's total is unbounded" if found.release == "exact" else f"noise multiplier {noise:g}"
    typer.echo(f"{out}: {found.release} statistics, {spent}")
