"""The table of all arms, and whether the goals are reached."""

from collections.abc import Mapping, Sequence
from math import isnan
from statistics import mean
from typing import Any

from benchmarks.poison.arm import Attack

COST, GAIN = 0.02, 0.1
"""Goals: what one bad site may cost of the held-out loss, and gain of what it gains without defences."""
HALVED, BACKDOOR_RATE, DAMAGE = 0.5, 0.5, 0.1
"""An adversary's rate without defences: the target's loss halved, half of the triggered faces, a tenth more loss."""
FIGURE = {"backdoor": "backdoor", "implant": "implant", "colluding": "implant", "careful": "implant"}
"""What an attack is after; the others want damage."""
BARE = {"careful": "implant"}
"""Attacks that hide gain without defences what this one gains."""
BOUNDED, DEFENDED = "clipped-checked", "crowd-checked"
Outcomes = Mapping[str, Mapping[str, Any]]


def summarise(outcomes: Outcomes, attacks: Mapping[str, Attack], seeds: Sequence[int]) -> tuple[str, bool]:
    """One line for the page, after a table on standard output; and whether every goal is reached."""
    rows = [_row(outcomes, attack, seeds) for attack in attacks.values() if attack.adversary]
    for row in rows:
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    honest = [outcomes[f"{DEFENDED}.none.{seed}"] for seed in seeds]
    undone, looked = sum(len(each["rolled_back"]) for each in honest), sum(each["rounds"] for each in honest)
    wrong = sum(
        len(_wrong(outcomes[f"{DEFENDED}.{name}.{seed}"], each))
        for name, each in attacks.items()
        for seed in seeds
        if not each.is_foreign
    )
    rise = max(max(each["rises"]) for each in honest)
    largest = max(figures["largest"] - figures["median"] for each in honest for figures in each["persistence"])
    weak = [row["attack"] for row in rows if row["rate"] == "weak"]
    open_ = [row["attack"] for row in rows if row["defended"] == "open"]
    text = (
        f"{len(rows) - len(open_)} of {len(rows)} attacks held or named by the defaults"
        f"{' (open: ' + ', '.join(open_) + ')' if open_ else ''}; {undone} of {looked} honest rounds undone "
        f"(needs 0), largest honest rise {rise:.1%}; {wrong} honest sites named (needs 0), largest honest persistence "
        f"{largest:.3f} above the median; "
        + "; ".join(f"{row['attack']} {row['text']}" for row in rows)
        + _foreign(outcomes, attacks, seeds)
        + (f"; below its rate without defences: {', '.join(weak)}" if weak else "")
    )
    return text, not (open_ or weak or undone or wrong)


def _wrong(outcome: Mapping[str, Any], attack: Attack) -> set[str]:
    """Honest sites that were doubted."""
    return {site for _, site in outcome["named"]} - _names(attack)


def _foreign(outcomes: Outcomes, attacks: Mapping[str, Attack], seeds: Sequence[int]) -> str:
    """What becomes of an honest site whose photographs are of another kind."""
    found = [
        outcomes[f"{DEFENDED}.{name}.{seed}"] for name, each in attacks.items() if each.is_foreign for seed in seeds
    ]
    if not found:
        return ""
    doubted = [each["least_shares"] for each in found if each["least_shares"]]
    least = min((share for shares in doubted for share in shares.values()), default=1.0)
    times = f"doubted in {len(doubted)} of {len(found)} runs"
    return f"; an honest site with another data set {times}, counts {least:.0%} at least"


def _names(attack: Attack) -> set[str]:
    return {f"site-{number}" for number in attack.sites}


def _row(outcomes: Outcomes, attack: Attack, seeds: Sequence[int]) -> dict[str, Any]:
    figure, bare_name = FIGURE.get(attack.name, "held_out"), BARE.get(attack.name, attack.name)

    def average(rule: str, what: str, key: str) -> float:
        return mean(outcomes[f"{rule}.{what}.{seed}"]["after"][key] for seed in seeds)

    honest, held_out = average("mean", "none", figure), average("mean", "none", "held_out")
    bare = average("mean", bare_name, figure)
    bounded, defended = (average(rule, attack.name, figure) for rule in (BOUNDED, DEFENDED))
    costs = {name: average(rule, what, "held_out") / held_out - 1
             for name, rule, what in (("bare", "mean", bare_name), ("bounded", BOUNDED, attack.name),
                                      ("defended", DEFENDED, attack.name))}  # fmt: skip
    own = [outcomes[f"{DEFENDED}.{attack.name}.{seed}"] for seed in seeds]
    named = [_named_in(each, attack) for each in own]
    gain = abs(bare - honest)
    is_held = costs["defended"] <= COST and (figure == "held_out" or abs(defended - honest) <= GAIN * gain)
    text = (
        f"{_short(figure)} {honest:.3f} honest, {bare:.3f} bare, {bounded:.3f} bounded, {defended:.3f} by default; "
        f"{_kept(abs(bounded - honest), abs(defended - honest), gain) if figure != 'held_out' else ''}"
        f"held-out cost {costs['bare']:+.1%}, {costs['bounded']:+.1%}, {costs['defended']:+.1%}; "
        + _found(named)
        + _checked_alone(outcomes, attack, seeds)
    )
    rate = _rate(figure, honest, bare, costs["bare"]) if attack.name not in ("lazy", "stale") else "no attack"
    return {"attack": attack.name, "rate": rate, "defended": "held" if is_held or all(named) else "open", "text": text}


def _kept(bounded: float, defended: float, bare: float) -> str:
    """What is left of the gain without defences."""
    return f"keeps {bounded / bare:.0%} and {defended / bare:.0%} of its gain; " if bare else ""


def _named_in(outcome: Mapping[str, Any], attack: Attack) -> int:
    """The round in which all of an attack's sites were known, by either defence, and nobody else; 0: they were not."""
    names = _names(attack)
    found = {site: number for number, site in outcome["named"]}
    for number, suspects in zip(outcome["rolled_back"], outcome["suspects"], strict=True):
        found |= {site: min(number, found.get(site, number)) for site in suspects}
    return max(found.values()) if found.keys() == names else 0


def _found(named: Sequence[int]) -> str:
    rounds = [number for number in named if number]
    return f"named in {len(rounds)} of {len(named)} runs" + (
        f", after round {max(rounds)} at the latest" if rounds else ""
    )


def _checked_alone(outcomes: Outcomes, attack: Attack, seeds: Sequence[int]) -> str:
    """What the held-out check makes of it without any bound, where that was tried."""
    found = [outcomes[key] for seed in seeds if (key := f"mean-checked.{attack.name}.{seed}") in outcomes]
    if not found:
        return ""
    right = sum(bool(each["suspects"]) and set(each["suspects"][0]) == _names(attack) for each in found)
    return f", by the check alone in {right} of {len(found)}"


def _rate(figure: str, honest: float, bare: float, cost: float) -> str:
    """Whether an adversary without defences in its way does what it is there for."""
    is_reached = {
        "implant": bare <= HALVED * honest,
        "backdoor": bare >= BACKDOOR_RATE,
        "held_out": cost >= DAMAGE or isnan(cost),
    }[figure]
    return "reached" if is_reached else "weak"


def _short(figure: str) -> str:
    return {"implant": "target's loss", "backdoor": "backdoor", "held_out": "held-out loss"}[figure]
