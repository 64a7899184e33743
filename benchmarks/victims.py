"""Which running process of a local federation is meant by a name."""

import psutil

from benchmarks.local import LocalFederation

REPLY = "client in reply"
"""The client process while its SuperNode has the head of a reply and waits for the rest."""
WORKER = "nginx worker"


def victims(local: LocalFederation, target: str) -> list[psutil.Process]:
    """Running processes of one kind."""
    processes = local.processes()
    if target == REPLY:
        return [process for process in processes.get("flwr-clientapp", []) if is_replying(process)]
    if target in ("nginx", WORKER):
        found = [process for group in processes.values() for process in group if name_of(process) == "nginx"]
        return [process for process in found if is_worker(process) == (target == WORKER)]
    if target != "server superexec":
        return processes.get(target, [])
    below = psutil.Process(local.daemons["coordinator"].pid).children(recursive=True)
    return [process for process in processes.get("flower-superexec", []) if process in below]


def name_of(process: psutil.Process) -> str:
    """The kernel's name of a process; nginx writes titles over its command line."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def is_worker(process: psutil.Process) -> bool:
    """Whether nginx's own master has started this process of nginx."""
    try:
        return name_of(psutil.Process(process.ppid())) == "nginx"
    except psutil.Error:
        return False


def is_replying(process: psutil.Process) -> bool:
    """Whether a client process is sending its reply: only then it has a child, which waits for the end of that."""
    try:
        return bool(process.children())
    except psutil.NoSuchProcess:
        return False
