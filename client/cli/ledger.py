"""The commands of the ledger: what was spent, whether the record is whole, how far the budget reaches."""

import math
from pathlib import Path
from typing import Annotated

import typer

from client.home import find_home
from shared.commandline import JsonOption, owned, tell_json
from shared.errors import InputError

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]
ledger = typer.Typer(no_args_is_help=True, help="See what training has cost your images.")


def register(app: typer.Typer) -> None:
    """Add the command group to the program."""
    app.add_typer(ledger, name="ledger")


@ledger.command("show")
def ledger_show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List every charge, and the total of each data set with its unit and delta."""
    from client.privacy.epsilon import epsilon_of
    from client.records.ledger import read_ledger
    from client.settings import load_settings

    place = find_home(home)
    settings, history = load_settings(place), read_ledger(place.ledger)
    charges, committed = history.charges, history.committed
    inherited = {entry.sequence for entry, _ in history.inherited}
    charges = sorted([*charges, *history.inherited], key=lambda each: each[0].sequence)
    ids = list(dict.fromkeys(charge.dataset_id for _, charge in charges))
    totals = {each: history.total(each, settings.policy.delta, epsilon_of) for each in ids}
    if as_json:
        rows = [
            {"sequence": e.sequence, "time": e.time.isoformat(), "inherited": e.sequence in inherited, **c.model_dump()}
            for e, c in charges
        ]
        summed = {each: {**vars(total), "cap": settings.policy.epsilon_cap} for each, total in totals.items()}
        tell_json({"charges": rows, "committed": sorted(committed), "totals": summed})
        return
    for entry, charge in charges:
        state = "" if entry.sequence in committed | inherited else "  NOT COMPLETED, counts as spent"
        state = "  in another home, on shared images" if entry.sequence in inherited else state
        cost = (
            "without DP"
            if charge.mechanism == "none"
            else f"sigma {charge.noise_multiplier:g}, q {charge.sample_rate:g}, {charge.steps} steps, per {charge.unit}"
        )
        note = f" ({charge.remarks})" if charge.remarks else ""
        what = f"{charge.task} {charge.run} round {charge.server_round}"
        typer.echo(f"{entry.sequence:6d} {entry.time:%Y-%m-%d %H:%M} {what}: {cost}{note}{state}")
    for each, total in totals.items():
        typer.echo(f"data set {each}: {total}, cap {settings.policy.epsilon_cap:g}")
    if not charges:
        typer.echo("nothing has been charged yet")


@ledger.command("verify")
def ledger_verify(
    home: HomeOption = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Accept this copy as the newest. The ledger records that you did.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that no line was changed or lost, and that this is the newest copy."""
    from client.records.ledger import open_ledger, read_ledger
    from client.records.ledger_history import head_problem
    from client.settings import load_settings

    place = find_home(home)
    head_file = Path(load_settings(place).head_file)
    if adopt:
        with open_ledger(place.ledger, head_file, adopt=True):
            pass
    history = read_ledger(place.ledger)
    if problem := head_problem(history, head_file):
        raise InputError(problem)
    if as_json:
        head = history.entries[-1].hash if history.entries else None
        tell_json({"file": str(place.ledger), "num_entries": len(history.entries), "head": head})
        return
    newest = f", newest {history.entries[-1].hash}" if history.entries else ""
    typer.echo(f"{place.ledger}: {len(history.entries)} entries, unbroken{newest}")


@ledger.command("accept-clock")
def ledger_accept_clock(home: HomeOption = None) -> None:
    """Confirm that the clock is right now, after a wrong one dated entries ahead. Recorded; no charge is forgotten."""
    import datetime as dt

    from client.records.ledger import open_ledger
    from client.settings import load_settings

    place = find_home(home)
    with open_ledger(place.ledger, Path(load_settings(place).head_file)) as held:
        entry = held.accept_clock(dt.datetime.now(dt.UTC))
    typer.echo(f"entry {entry.sequence}: {entry.fields['num_ahead']} entries dated ahead count as written now")


@ledger.command("plan")
def ledger_plan(
    experiment: Annotated[str, typer.Argument(help="Experiment file with a [privacy] section, or a recipe's name.")],
    home: HomeOption = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the experiment: section.key=value; may be repeated."),
    ] = None,
    sites: Annotated[
        int, typer.Option(min=1, max=100_000, help="Sites per round; the more, the less noise in their mean.")
    ] = 1,
    probe_seconds: Annotated[float, typer.Option(min=0.1, max=60, help="How long to measure this machine.")] = 3.0,
    as_json: JsonOption = False,
) -> None:
    """Say what an experiment would cost here, how many rounds fit under the cap, and which noise would fit all."""
    from client.data.dataset import open_dataset
    from client.offers.waiting import length_in_words
    from client.policy.facts import gather_facts
    from client.policy.rules import experiment_refusals
    from client.privacy.accounting import epsilon
    from client.privacy.planning import noise_that_fits, num_that_fit
    from client.records.ledger import read_ledger
    from client.records.spending import Spending
    from client.settings import load_settings
    from shared.experiment.config import load_experiment
    from shared.experiment.recipes import find_experiment
    from shared.messages.agreement.plan import resolve
    from shared.planning.speed_probe import images_per_second, num_values
    from shared.planning.workload import lines, workload

    place = find_home(home)
    settings, planned = load_settings(place), resolve(load_experiment(find_experiment(experiment), override))
    policy = settings.policy
    if planned.privacy.mechanism == "none":
        raise InputError(
            f"{experiment}: privacy.mechanism is 'none': nothing to plan, it would make the total unbounded"
        )
    history, data = read_ledger(place.ledger), open_dataset(place, settings.image_size)
    spent = history.spending(data.dataset_id)
    rounds, steps = planned.federation.rounds, planned.federation.local_steps
    sigma, rate, image = planned.privacy.noise_multiplier, planned.privacy.sample_rate, planned.privacy.mean_image_noise
    total, epsilon_image = history.total(data.dataset_id, policy.delta, epsilon), None
    if image:
        spent = [*spent, Spending(image, 1.0, 1)]
        epsilon_image = epsilon(spent, policy.delta)
    one, after = (epsilon([*spent, Spending(sigma, rate, count * steps)], policy.delta) for count in (1, rounds))
    fit = num_that_fit(spent, Spending(sigma, rate, steps), policy.delta, policy.epsilon_cap, rounds)
    noise = noise_that_fits(spent, rate, rounds * steps, policy.delta, policy.epsilon_cap)
    is_by_person = planned.privacy.unit == "person" and data.persons is not None
    units = len(data.units("person" if is_by_person else "image"))
    work = workload(planned, sites, units, num_values(planned), images_per_second(planned, probe_seconds))
    refusals = experiment_refusals(planned, policy, gather_facts(place, settings, "", data, history))
    if as_json:
        told = {"spent": vars(total), "epsilon_cap": policy.epsilon_cap, "epsilon_mean_image": epsilon_image}
        told |= {"epsilon_round": one, "epsilon_run": after, "rounds": rounds, "rounds_that_fit": fit}
        told |= {"noise_that_fits": noise, **vars(work)}
        tell_json(told | {"refusals": [{"code": each.code, "reason": each.reason} for each in refusals]})
        return
    typer.echo(f"spent: {total}, cap {policy.epsilon_cap:g}")
    if epsilon_image is not None:
        typer.echo(f"one mean image at sigma {image:g}: epsilon {epsilon_image:.3f}")
    typer.echo(f"{length_in_words(rounds, steps)} at sigma {sigma:g}, q {rate:g}: epsilon {after:.3f}")
    typer.echo(f"epsilon after one round: {one:.3f}")
    typer.echo(f"rounds that fit under the cap: {fit} of {rounds}")
    fitting = f"{noise:.4g}" if math.isfinite(noise) else "none; fewer rounds or steps, or a lower q"
    typer.echo(f"noise multiplier at which all {rounds} rounds fit: {fitting}")
    for line in lines(planned, work, sites):
        typer.echo(line)
    for refusal in refusals:
        typer.echo(f"as it stands the policy refuses it: {refusal.code}, {refusal.reason}")
