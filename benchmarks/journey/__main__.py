"""README and runbook as they stand, on three hosts: from nothing to a released private model.

Coordinator and sites are network namespaces in which `fleet.example` is the coordinator, so `fleet.example:443` is
real. The coordinator types what the README has for it, hospital-a what the README has for a site, hospital-b what the
runbook has (its name in place of hospital-a's is the one word that changes). The work is scaled by `--set` alone.
"""

import os
import pty
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.hosts import Host, hosts, not_measured, num_online, reason_against, rounds, wait_for
from benchmarks.journey.documents import commands, named
from benchmarks.local import ONLINE_SECONDS, command
from benchmarks.measure import verdict
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
WAIT_SECONDS = 600.0
IN_ENGLISH = {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"}


def main() -> int:
    """Walk once; 0 when a model was released."""
    if reason := reason_against():
        return not_measured(reason)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder:
        root = Path(folder)
        # What the commands keep in the user's own folders stays here, too.
        os.environ |= {"MASKFED_CACHE": str(root / "cache"), "XDG_STATE_HOME": str(root / "state")}
        with hosts(root, ("s", "a", "b")) as machines, names(machines):
            typed = walk(*machines)
            is_released = (machines[0].folder / "released" / "MODEL_CARD.md").is_file()
            spent = epsilon_spent(machines[0])
    text = f"{typed} commands from nothing to a released private model, {time.monotonic() - begun:.0f} s"
    return verdict("journey", f"{text}, epsilon {spent}", reached=is_released)


def walk(server: Host, *sites: Host) -> int:
    """Type everything; the number of commands."""
    images(server, *sites)
    coordinator = commands("README.md", "**As coordinator**")
    runbook = commands("deploy/README.md", "## Coordinator: install")
    check_same(coordinator, runbook)
    per_site = [
        commands("README.md", "**As a data-holding site**"),
        [
            [word.replace("hospital-a", "hospital-b") for word in line]
            for line in commands("deploy/README.md", "## Site: join")
        ],
    ]
    parts = split_at(coordinator, "sites add")
    for line in parts[0]:
        type_line(server, line)
    for site, lines in zip(sites, per_site, strict=True):
        join(server, site, parts[1], lines)
    wait_for(lambda: num_online(server) == len(sites), ONLINE_SECONDS, "both sites online")
    for line in parts[2]:
        type_line(server, line)
    return len(coordinator) + len(sites) - 1 + sum(map(len, per_site))


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
    words = [*line, *(word for setting in SCALED.get(name, ()) for word in ("--set", setting))]
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
    if done.returncode:
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
