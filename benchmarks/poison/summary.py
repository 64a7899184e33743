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
FIGURE = {"backdoor": "backdoor", "implant": "implant", "colluding": "implant"}
"""What an attack is after; the others want damage."""
DEFENDED = "clipped-checked"
Outcomes = Mapping[str, Mapping[str, Any]]


def summarise(outcomes: Outcomes, attacks: Mapping[str, Attack], seeds: Sequence[int]) -> tuple[str, bool]:
    """One line for the page, after a table on standard output; and whether every goal is reached."""
    rows = [_row(outcomes, attack, seeds) for attack in attacks.values() if attack.adversary]
    for row in rows:
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    honest = [outcomes[f"{rule}.none.{seed}"] for rule in ("clipped-checked", "mean-checked") for seed in seeds]
    mistakes, looked = sum(len(each["rolled_back"]) for each in honest), sum(each["rounds"] for each in honest)
    rise = max(max(each["rises"]) for each in honest)
    weak = [row["attack"] for row in rows if row["rate"] == "weak"]
    open_ = [row["attack"] for row in rows if row["defended"] == "open"]
    text = (
        f"{len(rows) - len(open_)} of {len(rows)} attacks held or named by the defaults"
        f"{' (open: ' + ', '.join(open_) + ')' if open_ else ''}; {mistakes} of {looked} honest rounds undone "
        f"(needs 0), largest honest rise {rise:.1%}; "
        + "; ".join(f"{row['attack']} {row['text']}" for row in rows)
        + (f"; below its rate without defences: {', '.join(weak)}" if weak else "")
    )
    return text, not open_ and not weak and not mistakes


def _row(outcomes: Outcomes, attack: Attack, seeds: Sequence[int]) -> dict[str, Any]:
    figure, names = FIGURE.get(attack.name, "held_out"), {f"site-{number}" for number in attack.sites}

    def average(rule: str, what: str, key: str) -> float:
        return mean(outcomes[f"{rule}.{what}.{seed}"]["after"][key] for seed in seeds)

    honest, held_out = average("mean", "none", figure), average("mean", "none", "held_out")
    bare, clipped, defended = (average(rule, attack.name, figure) for rule in ("mean", "clipped", DEFENDED))
    costs = {rule: average(rule, attack.name, "held_out") / held_out - 1 for rule in ("mean", "clipped", DEFENDED)}
    own = [outcomes[f"{DEFENDED}.{attack.name}.{seed}"] for seed in seeds]
    is_named = all(each["suspects"] and set(each["suspects"][0]) == names for each in own)
    noticed = [each["rolled_back"][0] for each in own if each["rolled_back"]]
    gain = abs(bare - honest)
    is_held = costs[DEFENDED] <= COST and (figure == "held_out" or abs(defended - honest) <= GAIN * gain)
    found = [outcomes[f"mean-checked.{attack.name}.{seed}"] for seed in seeds]
    seen = [each["rolled_back"][0] for each in found if each["rolled_back"]]
    right = sum(bool(each["suspects"]) and set(each["suspects"][0]) == names for each in found)
    text = (
        f"{_short(figure)} {honest:.3f} honest, {bare:.3f} bare, {clipped:.3f} clipped, {defended:.3f} with roll-back; "
        f"held-out cost {costs['mean']:+.1%}, {costs['clipped']:+.1%}, {costs[DEFENDED]:+.1%}; noticed in "
        f"{len(noticed)} of {len(seeds)} runs{f' from round {min(noticed)}' if noticed else ''}, without the bound in "
        f"{len(seen)}{f' from round {min(seen)}, named rightly in {right}' if seen else ''}"
    )
    rate = _rate(figure, honest, bare, costs["mean"]) if attack.name not in ("lazy", "stale") else "no attack"
    return {"attack": attack.name, "rate": rate, "defended": "held" if is_held or is_named else "open", "text": text}


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
