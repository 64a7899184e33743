import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from deploy.checks.probe import probe
from deploy.errors import ProvisionError
from deploy.processes.process import check_port_free, free_ports, only_one
from deploy.processes.supervision import Service, Supervisor

SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
FAMILY = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); time.sleep(60)"


def service(tmp_path: Path, name: str, code: str, **settings: object) -> Service:
    argv = [sys.executable, "-c", code]
    return Service(name, argv, dict(os.environ), tmp_path / f"{name}.log", **settings)  # type: ignore[arg-type]


def until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_stop_leaves_nothing_not_even_stubborn_grandchildren(tmp_path: Path):
    supervisor = Supervisor([service(tmp_path, "a", FAMILY), service(tmp_path, "b", STUBBORN)], stop_seconds=0.5)
    supervisor.start()
    until(lambda: psutil.Process(supervisor.pid("a")).children() and (tmp_path / "b.log").read_text())
    family = [psutil.Process(supervisor.pid(name)) for name in "ab"]
    family += family[0].children(recursive=True)
    supervisor.stop()
    assert [process for process in family if process.is_running() and process.status() != "zombie"] == []


def test_health_checks_follow_what_runs_and_answers(tmp_path: Path):
    address, answers = f"127.0.0.1:{free_ports(1)[0]}", {"a": True}
    services = [service(tmp_path, "a", SLEEP, ready=lambda: answers["a"]), service(tmp_path, "b", SLEEP)]
    supervisor = Supervisor(services, address, stop_seconds=0.5, check_seconds=60)
    assert supervisor.health() == {"a": False, "b": False}
    watching = threading.Thread(target=supervisor.watch)
    with supervisor:
        watching.start()
        until(lambda: probe(address) == "SERVING", 30)
        answers["a"] = False
        supervisor._liveness.check()
        until(lambda: probe(address) == probe(address, "a") == "NOT_SERVING")
        assert probe(address, "b") == "SERVING"
    watching.join()
    assert probe(address, seconds=0.5) in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert supervisor.health() == {"a": False, "b": False}


def test_an_exit_with_code_0_is_restarted_too(tmp_path: Path):
    supervisor = Supervisor([service(tmp_path, "a", "pass")])
    supervisor.start()
    thread = threading.Thread(target=supervisor.watch)
    thread.start()
    until(lambda: supervisor.restarts.get("a", 0) >= 1)
    supervisor.request_stop()
    thread.join(5)
    supervisor.stop()
    assert not thread.is_alive()


def test_a_restart_is_told_with_its_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    supervisor = Supervisor([service(tmp_path, "a", "raise SystemExit(3)", diagnose=lambda: "no route")])
    thread = threading.Thread(target=supervisor.watch)
    supervisor.start()
    thread.start()
    until(lambda: supervisor.restarts.get("a", 0) >= 1)
    supervisor.request_stop()
    thread.join(5)
    supervisor.stop()
    assert "a ended with code 3 (no route): starting it again" in caplog.text


def test_what_depends_on_a_service_is_restarted_with_it(tmp_path: Path):
    services = [service(tmp_path, "node", SLEEP), service(tmp_path, "exec", SLEEP, takes_along=("node",))]
    supervisor = Supervisor(services)
    supervisor.start()
    old = {name: supervisor.pid(name) for name in ("node", "exec")}
    thread = threading.Thread(target=supervisor.watch)
    thread.start()
    time.sleep(1.2)  # past the first backoff
    os.kill(old["exec"], signal.SIGKILL)
    until(lambda: supervisor.restarts.get("exec") == 1 and supervisor.pid("node") != old["node"])
    supervisor.request_stop()
    thread.join(20)
    supervisor.stop()
    assert not psutil.pid_exists(old["node"])


def test_the_callback_runs_after_every_healthy_start(tmp_path: Path):
    calls: list[int] = []
    ready = service(tmp_path, "a", SLEEP, ready=lambda: True, after_ready=lambda: calls.append(1))
    supervisor = Supervisor([ready])
    supervisor.start()
    thread = threading.Thread(target=supervisor.watch)
    thread.start()
    time.sleep(1.2)
    os.kill(supervisor.pid("a"), signal.SIGKILL)
    until(lambda: len(calls) == 2)
    supervisor.request_stop()
    thread.join(5)
    supervisor.stop()


def test_a_service_that_dies_at_start_is_named_with_its_last_words_and_nothing_stays(tmp_path: Path):
    good = service(tmp_path, "good", SLEEP)
    bad = service(tmp_path, "bad", "raise SystemExit('no such key')", ready=lambda: False)
    supervisor = Supervisor([good, bad])
    with pytest.raises(ProvisionError, match=r"bad ended with code 1 .*no such key"):
        supervisor.start()
    assert not supervisor.is_running("good")


def test_services_die_with_a_supervisor_that_is_killed(tmp_path: Path):
    code = (
        "import os, sys, time; from pathlib import Path; from deploy.processes.process import spawn; "
        f"p = spawn([sys.executable, '-c', {SLEEP!r}], dict(os.environ), Path({str(tmp_path / 'x.log')!r})); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as outer:
        assert outer.stdout is not None
        child = int(outer.stdout.readline())
        outer.kill()
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def test_a_port_in_use_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            ProvisionError, match=rf"port {port} .*SuperLink.*pid {os.getpid()}.*stop that one or give another port"
        ):
            check_port_free("127.0.0.1", port, "SuperLink")
    check_port_free("127.0.0.1", port, "SuperLink")


def test_free_ports_are_distinct():
    assert len(set(free_ports(8))) == 8


def test_two_supervisors_never_share_a_folder(tmp_path: Path):
    with only_one(tmp_path / "lock"), pytest.raises(ProvisionError, match="in use"), only_one(tmp_path / "lock"):
        pass
    with only_one(tmp_path / "lock"):
        pass


def test_a_supervisor_keeps_its_logs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    capped: list[Path] = []
    monkeypatch.setattr("deploy.processes.supervision.cap_logs", capped.append)
    supervisor = Supervisor([service(tmp_path, "a", SLEEP)])
    with supervisor:
        supervisor.watch(supervisor.request_stop)
    assert capped == [tmp_path]


def test_a_full_disk_makes_a_supervisor_wait_and_say_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Whatever it does by the way may meet the disk; what runs goes on."""
    service = Service("sleeper", ["/bin/sleep", "60"], dict(os.environ), tmp_path / "sleeper.log")
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(supervisor.pid("sleeper"))
        if len(ticks) == 4:
            supervisor.request_stop()
        else:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/wanted.json")

    supervisor = Supervisor([service])
    with supervisor:
        supervisor.watch(tick, 0.0)
    assert len(set(ticks)) == 1
    (told,) = [message for message in caplog.messages if "wanted.json" in message]
    assert "No space left" in told
    assert "waiting" in told


def test_a_service_that_meets_a_full_disk_at_its_start_is_started_again(tmp_path: Path):
    """What follows a start (keys are registered, say) is done in the end, and not left out for ever."""
    starts: list[str] = []

    def after() -> None:
        starts.append("started")
        if len(starts) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/sites.json")

    supervisor = Supervisor([service(tmp_path, "a", SLEEP, after_ready=after)], stop_seconds=0.5)
    with supervisor:
        time.sleep(1.1)  # past the first backoff
        os.kill(supervisor.pid("a"), signal.SIGKILL)
        thread = threading.Thread(target=supervisor.watch)
        thread.start()
        until(lambda: len(starts) == 3 and supervisor.health()["a"], 20)
        supervisor.request_stop()
        thread.join(20)


def test_a_service_that_hangs_is_started_again_and_one_that_answers_is_not(tmp_path: Path):
    """SIGSTOP: the process is there, and says nothing."""
    beat = "import pathlib, sys, time\nwhile True:\n  pathlib.Path(sys.argv[0] or 'x')\n  time.sleep(60)"

    def is_running(name: str) -> bool:
        return psutil.Process(supervisor.pid(name)).status() != psutil.STATUS_STOPPED

    services = [
        service(tmp_path, "hung", beat, alive=lambda: is_running("hung")),
        service(tmp_path, "well", beat, alive=lambda: is_running("well")),
    ]
    supervisor = Supervisor(services, check_seconds=0.1)
    supervisor.start()
    old = {name: supervisor.pid(name) for name in ("hung", "well")}
    thread = threading.Thread(target=supervisor.watch)
    thread.start()
    time.sleep(1.2)  # past the first backoff
    os.kill(old["hung"], signal.SIGSTOP)
    until(lambda: supervisor.restarts.get("hung") == 1 and supervisor.pid("hung") != old["hung"])
    supervisor.request_stop()
    thread.join(20)
    assert supervisor.pid("well") == old["well"]
    supervisor.stop()
    assert not psutil.pid_exists(old["hung"])


def test_a_terminal_that_goes_stops_like_ctrl_c():
    code = (
        "import threading; from deploy.processes.process import handle_signals; stop = threading.Event();"
        "handle_signals(stop.set); print('up', flush=True); stop.wait(30); print('stopped', stop.is_set())"
    )
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            process.send_signal(number)
            assert process.communicate(timeout=20)[0] == "stopped True\n"


def test_who_holds_a_port_is_told_and_an_own_orphan_is_recognised(tmp_path: Path):
    (port,) = free_ports(1)
    code = (
        "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen();"
        "print('up', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(port), str(tmp_path.resolve())]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ProvisionError, match=rf"left over from an earlier start.*kill {process.pid}$"):
            check_port_free("127.0.0.1", port, "edge", tmp_path)
        with pytest.raises(ProvisionError, match=rf"pid {process.pid} .* holds it"):
            check_port_free("127.0.0.1", port, "edge", tmp_path / "other")
        process.kill()
