"""The cable of one site is pulled in the middle of a round, for 20 s and for 90 s, and plugged in again.

After the short cut its reply must count. The long cut outlasts the round's deadline: the round must go on without the
site and say so, nothing may be charged twice, and the site must take part in a later round without anybody's help.
"""

import json
import sys
import time
from collections import Counter
from typing import Any

from benchmarks.hosts import Host, federation_on_hosts, not_measured, reason_against, rounds, wait_for
from benchmarks.local import tiny_experiment
from benchmarks.measure import without_options

SHORT_SECONDS, LONG_SECONDS = 20, 90
ROUNDS = 4


def main() -> int:
    """Measure once."""
    if reason := reason_against():
        return not_measured(reason)
    one_is_enough = {"min_available": 1, "min_replies": 1, "round_deadline_seconds": 75}
    experiment = tiny_experiment(image_size=16, rounds=ROUNDS, local_steps=60, **one_is_enough)
    with federation_on_hosts(experiment) as (server, _, site_b):
        server.run("maskfed-server", "finetune", "round.toml", "--init", "init", "--run", "cut", "--detach")
        cut_in_round(site_b, 1, SHORT_SECONDS)
        cut_in_round(site_b, 2, LONG_SECONDS)
        wait_for(lambda: len(rounds(server, "cut")) == ROUNDS, 400, f"round {ROUNDS}")
        records, charges = rounds(server, "cut"), charged(site_b)
    states = {record["round"]: state_of(record, "site-1") for record in records}
    twice = [digest for digest, number in Counter(charges).items() if number > 1]
    is_back = "answered" in (states[3], states[ROUNDS])
    is_good = states[1] == "answered" and states[2] != "answered" and not twice and is_back
    is_good = is_good and all(state_of(record, "site-0") == "answered" for record in records)
    print(
        f"cut {SHORT_SECONDS} s: {states[1]}; cut {LONG_SECONDS} s: {states[2]}, round closed after "
        f"{records[1]['seconds']['total']:.0f} s; then {states[3]}, {states[ROUNDS]}; {len(twice)} charged twice"
    )
    return int(not is_good)


def cut_in_round(site: Host, server_round: int, seconds: float) -> None:
    """Wait until the site works on a round, then cut its link for `seconds`."""
    wait_for(lambda: any(e.get("server_round") == server_round for e in journal(site)), 200, f"round {server_round}")
    site.cut()
    time.sleep(seconds)
    site.heal()


def journal(site: Host) -> list[dict[str, Any]]:
    """Fields of the site's journal."""
    path = site.folder / "site" / "journal.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return [{**entry, **entry.get("fields", {})} for entry in entries]


def charged(site: Host) -> list[str]:
    """Request digest of every reservation in the site's ledger."""
    lines = (site.folder / "site" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [str(entry["fields"]["request_digest"]) for entry in entries if entry["kind"] == "reserve"]


def state_of(record: dict[str, Any], site: str) -> str:
    """In which list of a round's record a site stands."""
    groups = ("answered", "refused", "failed", "late", "rejected", "lost")
    return next((group for group in groups if any(entry["site"] == site for entry in record[group])), "not asked")


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
