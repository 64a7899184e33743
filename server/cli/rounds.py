"""`maskfed-server`: the commands of federated runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.commandline import JsonOption, owned, tell_json
from shared.errors import InputError

if TYPE_CHECKING:
    from server.federation.finetune import Start
    from shared.experiment.config import Experiment

DEFAULT_HOME = Path("coordinator")
Home = Annotated[
    Path,
    typer.Option(
        "--home", envvar="MASKFED_SERVER_HOME", callback=owned(), help="The coordinator's folder.", show_default=True
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    for command in (finetune, status, stop, logs, alerts):
        app.command()(command)


def finetune(
    *,
    experiment: Annotated[
        str, typer.Argument(help="Experiment file or recipe; with --resume only to change the experiment.")
    ] = "",
    home: Home = DEFAULT_HOME,
    init: Annotated[
        str,
        typer.Option(help="Start from this checkpoint, run or shipped model; default: the experiment's train.init."),
    ] = "",
    run: Annotated[str, typer.Option(help="Name for the run; default: made from experiment and time.")] = "",
    resume: Annotated[str, typer.Option(help="Resume this run from its last complete round.")] = "",
    force: Annotated[
        bool,
        typer.Option(
            help="Resume although the experiment changed (never its seed, precision, privacy, model or data)."
        ),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
    ] = None,
    reference: Annotated[str, typer.Option(help="Images or statistics files to measure rounds against.")] = "",
    evaluate_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Argument for the evaluations beside the rounds, as in "
            "--evaluate-arg=--bootstrap=200; may be repeated."
        ),
    ] = None,
    held_out: Annotated[
        str, typer.Option(help="Public images to check each round with; default: those of --reference; none: no check.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only ask the sites what they would do with it and what it would cost.")
    ] = False,
    detach: Annotated[bool, typer.Option(help="Submit the run and return; follow it with `status`.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Fine-tune a model with the sites, and show it until it ends. Exit code 0: completed, 1: failed or stopped.

    Before round 1 the plan is offered to every site, free of charge. The run starts once
    federation.min_replies sites have accepted.
    """
    from server.federation.finetune import Start, resume_run, start_run
    from server.federation.fleet.registry import check_home
    from server.federation.starting_point import UNWATCHED, find_held_out
    from server.federation.status import follow
    from server.runs.run_directory import RunDir
    from shared.experiment.config import load_experiment, parse_experiment
    from shared.experiment.recipes import find_experiment

    check_home(home)
    if dry_run and (resume or not experiment):
        raise InputError("--dry-run asks about a new run: give an experiment, and no --resume")
    if resume:
        changed = None
        if experiment:
            changed = load_experiment(find_experiment(experiment), overrides)
        elif overrides:
            changed = parse_experiment(RunDir(home / "runs" / resume).experiment.to_toml(), overrides)
        if not resume_run(home, resume, changed, force=force):
            typer.echo(f"run {resume} has not ended: following it", err=True)
    elif not experiment:
        raise InputError("finetune needs an experiment file, or --resume and the name of a run")
    else:
        start = Start(experiment, tuple(overrides or ()), init, run, reference, tuple(evaluate_arg or ()), held_out)
        if dry_run:
            sys.exit(_offer(home, start, as_json=as_json))
        _warn_non_private(load_experiment(find_experiment(experiment), overrides))
        resume = start_run(home, start)
        if not find_held_out(held_out, reference):
            typer.echo(UNWATCHED, err=True)
    if detach:
        typer.echo(resume)
    else:
        sys.exit(follow(home, resume, as_json=as_json))


def _offer(home: Path, start: "Start", *, as_json: bool) -> int:
    """Ask only; exit code 0 when enough sites would take part."""
    from rich.console import Console

    from server.federation.finetune import prepare
    from server.federation.offer_table import newest_offers, offer_table
    from server.federation.offers import dry_run
    from server.federation.starting_point import initial_model

    ready = prepare(home, start)
    _warn_non_private(ready.experiment)
    model = initial_model(ready.source, ready.experiment)
    offers = newest_offers(dry_run(home, ready.experiment, model, lambda _: None))
    federation = ready.experiment.federation
    num_accepted = sum(offer["status"] == "accepted" for offer in offers)
    if as_json:
        Console().print_json(data={"offers": offers, "accepted": num_accepted, "needed": federation.min_replies})
    else:
        Console().print(offer_table(offers, federation.rounds))
        typer.echo(
            f"{num_accepted} of {len(offers)} sites accept; federation.min_replies asks for {federation.min_replies}"
        )
    return 0 if num_accepted >= federation.min_replies else 1


def _warn_non_private(experiment: "Experiment") -> None:
    if experiment.privacy.mechanism == "none":
        typer.echo("warning: this experiment has no DP: sites with the default policy refuse it", err=True)


def status(
    run: Annotated[str, typer.Argument(help="Name of a run; default: all.")] = "",
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show runs: rounds, sites, losses, bytes, epsilon. Exit code 1 if the run you name has failed."""
    from rich.console import Console

    from server.federation.fleet.registry import check_home
    from server.federation.status import all_runs, table

    check_home(home)
    summaries = all_runs(home, run)
    if as_json:
        Console().print_json(data=summaries[0] if run else summaries)
    elif not summaries:
        Console().print("no runs yet: `maskfed-server finetune` starts one", highlight=False)
    else:
        for summary in summaries:
            Console().print(table(summary))
    if run and summaries[0]["status"] == "failed":
        sys.exit(1)


def stop(
    run: Annotated[str, typer.Argument(help="Name of a run.")],
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Stop a run. Its last complete round is kept, and `finetune --resume` continues from there."""
    from server.federation.fleet.registry import check_home
    from server.federation.fleet.superlink import connect
    from server.federation.resubmission import Wanted

    check_home(home)
    with connect(home) as control:
        stopped = Wanted(home).stop(control, run)
    sentence = f"run {run} {'stopped' if stopped else 'was over already'}"
    typer.echo(json.dumps({"run": run, "stopped": stopped}) if as_json else sentence)


def logs(
    run: Annotated[str, typer.Argument(help="Name of a run.")],
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Print the log of a run until it ends."""
    from server.federation.fleet.registry import check_home
    from server.federation.status import print_log

    check_home(home)
    print_log(home, run, lambda text: typer.echo(json.dumps({"log": text}) if as_json else text, nl=as_json))


def alerts(
    home: Home = DEFAULT_HOME,
    to: Annotated[str, typer.Option(help="Send alerts to this https:// address; -: read it from standard input.")] = "",
    proxy: Annotated[str, typer.Option(help="HTTP proxy on the way there, http://host:port.")] = "",
    off: Annotated[bool, typer.Option("--off", help="Send none from now on.")] = False,
    test: Annotated[bool, typer.Option("--test", help="Send a test message and wait for the answer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send what needs you to a webhook: sites that refuse or are lost, caps at 80 %, runs given up, certificates."""
    from deploy.alerts.setup import change_alerts, in_words

    facts = change_alerts(home, "coordinator", to, proxy, off=off, test=test)
    if as_json:
        tell_json(facts)
    else:
        typer.echo(in_words(facts))
