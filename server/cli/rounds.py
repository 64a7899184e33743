"""`maskfed-server`: the commands of federated runs; each is thin and imports late."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from server.federation.fleet.registry import check_home
from shared.errors import InputError

DEFAULT_HOME = Path("coordinator")
Home = Annotated[
    Path, typer.Option("--home", envvar="MASKFED_SERVER_HOME", help="The coordinator's folder.", show_default=True)
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the coordinator's."""
    for command in (finetune, status, stop, logs, simulate):
        app.command()(command)


def finetune(
    *,
    experiment: Annotated[str, typer.Argument(help="Experiment (file or recipe); with --resume: a change.")] = "",
    home: Home = DEFAULT_HOME,
    init: Annotated[str, typer.Option(help="Checkpoint, run or shipped model; default: train.init.")] = "",
    run: Annotated[str, typer.Option(help="Name of the run; default: the experiment's and the time.")] = "",
    resume: Annotated[str, typer.Option(help="Name of a run to take up from its last complete round.")] = "",
    force: Annotated[bool, typer.Option(help="Resume with a changed experiment (not seeds, privacy, model).")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    reference: Annotated[str, typer.Option(help="Images or statistics that rounds are measured against.")] = "",
    evaluate_arg: Annotated[list[str] | None, typer.Option(help="Further argument for these evaluations.")] = None,
    detach: Annotated[bool, typer.Option(help="Submit and return; follow with `status`.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Submit a federated fine-tuning and follow it; exit code 0: completed, 1: failed or stopped, 2: bad input."""
    from server.federation.finetune import Start, resume_run, start_run
    from server.federation.status import follow
    from server.runs.recipes import find_experiment
    from server.runs.run_directory import RunDir
    from shared.experiment.config import load_experiment, parse_experiment

    check_home(home)
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
        start = Start(experiment, tuple(overrides or ()), init, run, reference, tuple(evaluate_arg or ()))
        resume = start_run(home, start)
    if detach:
        typer.echo(resume)
    else:
        sys.exit(follow(home, resume, as_json=as_json))


def status(
    run: Annotated[str, typer.Argument(help="Name of a run; default: all.")] = "",
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show runs: rounds, sites, losses, bytes, epsilon; exit code 1 when the named run failed."""
    from rich.console import Console

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
    run: str, home: Home = DEFAULT_HOME, as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False
) -> None:
    """Stop a run; its last complete round stays, and `finetune --resume` takes it up again."""
    from server.federation.fleet.superlink import connect
    from server.federation.resubmission import Wanted

    check_home(home)
    with connect(home) as control:
        stopped = Wanted(home).stop(control, run)
    sentence = f"run {run} {'stopped' if stopped else 'was over already'}"
    typer.echo(json.dumps({"run": run, "stopped": stopped}) if as_json else sentence)


def logs(
    run: str, home: Home = DEFAULT_HOME, as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False
) -> None:
    """Print what the run's ServerApp says, until the run ends."""
    from server.federation.status import print_log

    check_home(home)
    print_log(home, run, lambda text: typer.echo(json.dumps({"log": text}) if as_json else text, nl=as_json))


def simulate(
    experiment: Annotated[str, typer.Argument(help="Experiment: file or recipe.")],
    *,
    sites: Annotated[int, typer.Option(min=1, help="Virtual sites.")] = 10,
    data: Annotated[str, typer.Option(help="Folder or zip of images, or synthetic:IMAGES_PER_SITE.")] = "synthetic:40",
    by: Annotated[
        str, typer.Option(help="Division among the sites: person, or dirichlet over class folders.")
    ] = "person",
    alpha: Annotated[float, typer.Option(min=0.001, help="Concentration of dirichlet; small: skewed.")] = 0.5,
    init: Annotated[str, typer.Option(help="Checkpoint, run or shipped model; default: train.init.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for everything; the same command goes on.")] = Path("simulation"),
    cpus: Annotated[int, typer.Option(min=0, help="CPUs to use; 0: all.")] = 0,
    cpus_per_site: Annotated[int, typer.Option(min=1, help="CPUs of a virtual site while it trains.")] = 1,
    gpus_per_site: Annotated[float, typer.Option(min=0, max=8, help="Share of a GPU, such as 0.25; 0: CPU.")] = 0.0,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Run the rounds with many virtual sites on this machine (extra `simulation`); exit code as of finetune."""
    from rich.console import Console

    from server.simulation.simulate import Simulate
    from server.simulation.simulate import simulate as run

    if by not in ("person", "dirichlet"):
        raise InputError(f"--by {by!r}: give person or dirichlet")
    options = Simulate(
        experiment=experiment,
        overrides=tuple(overrides or ()),
        init=init,
        num_sites=sites,
        data=data,
        skew="person" if by == "person" else "dirichlet",
        alpha=alpha,
        out=out,
        num_cpus=cpus,
        cpus_per_site=cpus_per_site,
        gpus_per_site=gpus_per_site,
    )
    sys.exit(run(options, Console()))
