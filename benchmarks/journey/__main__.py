"""README and runbook as they stand, on three hosts: from nothing to a released private model.

Coordinator and sites are network namespaces in which `fleet.example` is the coordinator, so `fleet.example:443` is
real. The coordinator types what the README has for it, hospital-a what the README has for a site, hospital-b what the
runbook has (its name in place of hospital-a's is the one word that changes). The work is scaled by `--set` alone.

hospital-a approves the recipe before anybody asks; hospital-b decides on what was offered, by its facts and its number.
The run is watched on the coordinator's live page in a real Chromium, and the evidence of coordinator and site is
checked on a fourth host that has one file of ours, Python and `cryptography`.
"""

import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.hosts import Host, hosts, not_measured, num_online, reason_against, rounds, wait_for
from benchmarks.journey.documents import commands, named
from benchmarks.journey.elsewhere import check, key_of
from benchmarks.journey.watching import watched
from benchmarks.local import ONLINE_SECONDS, command
from benchmarks.measure import verdict
from benchmarks.scratch import scratch
from shared.data.synthetic import write_folder
from shared.storage.runlog import read_metrics

NAME, SIZE = "fleet.example", 64
ROUNDS, SEED = 1, 0
"""Walks of which the figure is, and the seed of the faces."""
PUBLIC_IMAGES, SITE_IMAGES, HELD_OUT_IMAGES = 64, 48, 32
MODEL = ("model.size=T", "model.patch_size=16")
PRETRAINING = (*MODEL, "mask.block_size=1", "train.steps=4", "train.batch=8")
EVALUATION = (
    "evaluation.num_images=32",
    "evaluation.sampler=dpm++",
    "evaluation.steps=4",
    "evaluation.extractor=random-inception",
)
FINE_TUNING = (
    *MODEL,
    *EVALUATION,
    "federation.rounds=2",
    "federation.local_steps=2",
    "privacy.noise_multiplier=3",
    "privacy.expected_batch=4",
    "privacy.micro_batch=4",
)
SCALED = {
    "train": PRETRAINING,
    "plan": FINE_TUNING,
    "finetune": FINE_TUNING,
    "finetune --dry-run": FINE_TUNING,
    "approve experiment": FINE_TUNING,
}
"""What is changed of each command, as `--set`; commands that are not listed are typed as they stand."""
MAY_END_WITH = {"finetune --dry-run": (0, 1)}
"""Exit codes: not every site has accepted when the plan is offered first."""
PAGE_PORT = 8080
FACTS = (
    "asked for by run",
    "but for",
    "per person: noise multiplier",
    "epsilon of this plan",
    "your cap",
    "MB",
    "training for",
)
"""What a site is shown before it decides."""
SHOWN = ("hospital-a", "hospital-b", "first", "running", "completed", "online")
"""What the live page shows in the course of a run."""
WAIT_SECONDS = 600.0
IN_ENGLISH = {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"}


def main() -> int:
    """Walk once; 0 when a model was released."""
    if reason := reason_against():
        return not_measured(reason)
    begun = time.monotonic()
    with scratch() as root:
        # What the commands keep in the user's own folders stays here, too.
        os.environ |= {"MASKFED_CACHE": str(root / "cache"), "XDG_STATE_HOME": str(root / "state")}
        with hosts(root, ("s", "a", "b", "v")) as machines, names(machines):
            typed = walk(*machines)
            is_released = (machines[0].folder / "released" / "MODEL_CARD.md").is_file()
            spent = epsilon_spent(machines[0])
    text = f"{typed} commands from nothing to a released private model, {time.monotonic() - begun:.0f} s"
    return verdict("journey", f"{text}, epsilon {spent}", reached=is_released)


def walk(server: Host, first: Host, second: Host, elsewhere: Host) -> int:
    """Type everything; the number of commands."""
    sites = (first, second)
    images(server, *sites)
    coordinator = commands("README.md", "**As coordinator**")
    runbook = commands("deploy/README.md", "## Coordinator: install")
    check_same(coordinator, runbook)
    decision, evidence = (commands("deploy/README.md", marker) for marker in ("**Decide.**", "**Show it elsewhere.**"))
    per_site = [
        commands("README.md", "**As a data-holding site**"),
        [
            [word.replace("hospital-a", "hospital-b") for word in line]
            for line in commands("deploy/README.md", "## Site: join")
        ],
    ]
    before, admission, after = split_at(coordinator, "sites add")
    for line in before:
        type_line(server, line)
    for site, lines in zip(sites, per_site, strict=True):
        join(server, site, admission, lines)
    wait_for(lambda: num_online(server) == len(sites), ONLINE_SECONDS, "both sites online")
    place = [named(line) for line in after].index("finetune --dry-run") + 1
    for line in after[:place]:
        type_line(server, line)
    decide(second, decision)
    with watched(server, "coordinator", PAGE_PORT) as seen:
        printed = [type_line(server, line) for line in after[place:]]
    seen.check(*SHOWN)
    check(elsewhere, server.folder / "released" / "evidence.zip", key_of(printed[-1]))
    for line in evidence:
        check(elsewhere, first.folder / "first.zip", key_of(type_line(first, line)))
    return sum(map(len, (coordinator, *per_site, decision, evidence))) + len(sites) - 1


def decide(site: Host, lines: list[list[str]]) -> None:
    """What a site is shown of what waits, and its word.

    Raises:
        RuntimeError: a fact is not shown.
    """
    shown = type_line(site, lines[0])
    if missing := [fact for fact in FACTS if fact not in shown]:
        raise RuntimeError(f"`approve list` does not show {missing[0]!r}: {shown[-2000:]}")
    for line in lines[1:]:
        type_line(site, line)


def join(server: Host, site: Host, admission: list[list[str]], lines: list[list[str]]) -> None:
    """A site's commands; after its first one the coordinator's answer to it, and the bundle sent back."""
    printed = type_line(site, lines[0]).strip().splitlines()[-1]
    for line in admission:
        type_line(server, [printed if word == "LINE" else word for word in line])
    bundle = next(word for word in lines[1] if word.endswith(".join.json"))
    shutil.copy(server.folder / bundle, site.folder / bundle)
    for line in lines[1:]:
        type_line(site, line)


def type_line(host: Host, line: list[str]) -> str:
    """One command on a terminal, where every question is answered yes; `start` stays."""
    name = named(line)
    # What waits has been scaled by who asked.
    scaled = () if any(word.isdigit() for word in line) and name == "approve experiment" else SCALED.get(name, ())
    words = [*line, *(word for setting in scaled for word in ("--set", setting))]
    print(f"{host.name}$ {' '.join(words)}", flush=True)
    if name == "start":
        host.start(*words)
        return ""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"y\n" * 4)
        done = subprocess.run(
            ["ip", "netns", "exec", host.name, *command(*words)],
            stdin=theirs,
            capture_output=True,
            text=True,
            check=False,
            cwd=host.folder,
            timeout=WAIT_SECONDS,
            env={**os.environ, **IN_ENGLISH},
        )
    finally:
        os.close(ours)
        os.close(theirs)
    if done.returncode not in MAY_END_WITH.get(name, (0,)):
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return done.stdout


def images(server: Host, *sites: Host) -> None:
    """What operators have before they begin: public faces, faces held out for the distance, and their own."""
    write_folder(server.folder / "public-faces", PUBLIC_IMAGES, SIZE, SEED)
    write_folder(server.folder / "heldout-faces", HELD_OUT_IMAGES, SIZE, SEED, site="heldout")
    for number, site in enumerate(sites):
        write_folder(site.folder / "images", SITE_IMAGES, SIZE, SEED, site=f"site{number}")


def check_same(readme: list[list[str]], runbook: list[list[str]]) -> None:
    """The runbook's commands for a coordinator are among the README's, word for word."""
    if missing := [line for line in runbook if line not in readme]:
        raise ValueError(f"deploy/README.md and README.md disagree: {' '.join(missing[0])}")


def split_at(lines: list[list[str]], name: str) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """What comes before a command, the command, and what comes after it."""
    (place,) = (number for number, line in enumerate(lines) if named(line) == name)
    return lines[:place], lines[place : place + 1], lines[place + 1 :]


def epsilon_spent(server: Host) -> str:
    """The largest epsilon that the last round's replies told, and its unit."""
    answered = rounds(server, "first")[-1]["answered"]
    worst = max(answered, key=lambda entry: entry["epsilon"])
    offers = read_metrics(server.folder / "coordinator" / "runs" / "first" / "metrics.jsonl")
    accepted = sum(event["kind"] == "offer" and event["status"] == "accepted" for event in offers)
    return f"{worst['epsilon']:.3g} per {worst['unit']}, {accepted} offers accepted"


@contextmanager
def names(machines: list[Host]) -> Iterator[None]:
    """`fleet.example` is the first host, for all of them and nobody else: `ip netns exec` lays the file over /etc."""
    folders = [Path("/etc/netns", host.name) for host in machines]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{machines[0].address} {NAME}\n", encoding="ascii")
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
