"""`maskfed-server demo`: the whole idea on one machine, by the very commands that operators type.

Every site has its own folder, settings, keys and processes; nothing is simulated. Whatever happens, Ctrl-C included,
the processes are taken down in the right order: sites first, then the coordinator.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from deploy.processes import adopt_orphans, check_port_free, end_descendants, end_together, free_ports, last_line, spawn
from deploy.topology import program
from server.budget import Budget, Speed, read_speed
from server.divide import divide
from server.recipes import find_experiment
from shared.config import Experiment, load_experiment
from shared.errors import InputError
from shared.images import list_images
from shared.synthetic import write_folder

SHIPPED_MODEL = Path(__file__).parent / "models" / "synthetic32-T-msm"
RUN = "demo"
PUBLIC_IMAGES, SITE_IMAGES, REFERENCE_IMAGES = 2000, 1000, 1200
REFERENCE_RATIO = 0.2
SEED = 0
ONLINE_SECONDS = 90.0
START_SECONDS = 90.0
STOP_SECONDS = 40.0


class DemoError(RuntimeError):
    """A command of the demo failed; the text names it and its last words."""


@dataclass
class Demo:
    """One demonstration; `run` does everything.

    Attributes:
        public: public images for the pre-training; None: synthetic ones.
        faces: private images, divided by person among the sites and the evaluator; None: synthetic ones.
        num_sites: sites on this machine.
        rounds: fine-tuning rounds.
        budget: seconds for everything.
        out: new folder for all that the demo makes.
        port: first port to use; 0: any free ones.
        say: prints a line.
    """

    public: Path | None
    faces: Path | None
    num_sites: int
    rounds: int
    budget: Budget
    out: Path
    port: int
    say: Callable[[str], None]
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _command: subprocess.Popen[bytes] | None = None

    def run(self) -> Path:
        """Show everything; the report.

        Raises:
            InputError: bad input, before anything is started.
            DemoError: a step failed; all processes are down again then.
        """
        if (self.public is None) != (self.faces is None):
            raise InputError("demo: give both --public and --faces, or neither for synthetic faces")
        if self.out.exists() and any(self.out.iterdir()):
            raise InputError(f"demo: folder {self.out} is not empty: give another --out, or remove it")
        self.out = self.out.resolve()
        ports = self._ports()
        for port in ports:
            check_port_free("127.0.0.1", port, "demo")
        for images in filter(None, (self.public, self.faces)):
            list_images(images)
        with self._everything_ends():
            reference = self._divide()
            speed = self._measure_speed()
            pretrained = self._pretrain(speed)
            self._start(ports)
            self._finetune(pretrained, reference, speed)
            report = self._report()
        self._title(f"done: open {report}")
        return report

    @property
    def _kind(self) -> str:
        return "synthetic" if self.faces is None else "faces"

    @property
    def _home(self) -> Path:
        return self.out / "coordinator"

    def _site(self, number: int) -> Path:
        return self.out / "sites" / f"site-{number}"

    def _experiment(self, suffix: str = "") -> tuple[str, Experiment]:
        name = f"demo-{self._kind}32-T{suffix}"
        return name, load_experiment(find_experiment(name))

    def _ports(self) -> list[int]:
        count = 2 + 2 * self.num_sites
        return list(range(self.port, self.port + count)) if self.port else free_ports(count)

    def _divide(self) -> Path:
        """Lay out the images: public ones, one folder per site, and the evaluator's held-out persons."""
        self._title("images: " + ("synthetic faces" if self.faces is None else f"{self.faces}, divided by person"))
        parts = self.out / "images"
        if self.faces is not None:
            division = divide(self.faces, parts, self.num_sites, REFERENCE_RATIO, SEED)
            for name, number in sorted(division.num_images.items()):
                self.say(f"  {name}: {number} images")
            return division.reference
        size = self._experiment()[1].model.image_size
        for number in range(self.num_sites):
            write_folder(parts / f"site-{number}", SITE_IMAGES, size, SEED, site=f"site{number}")
        write_folder(parts / "reference", REFERENCE_IMAGES, size, SEED, site=f"heldout{self.num_sites}")
        self.say(
            f"  {self.num_sites} sites with {SITE_IMAGES} images each, {REFERENCE_IMAGES} of other persons to evaluate"
        )
        return parts / "reference"

    def _public_data(self) -> str:
        return f"synthetic:public:{PUBLIC_IMAGES}" if self.public is None else str(self.public.resolve())

    def _measure_speed(self) -> Speed:
        """Two short trainings, thrown away: what this machine can do decides how long the stages are."""
        self._title("how fast is this machine?")
        rates = []
        for suffix in ("-msm", ""):
            name, _ = self._experiment(suffix)
            folder = self.out / "speed"
            self._train(name, folder, ["--set", "train.steps=30"], quiet=True)
            rates.append(read_speed(folder))
            shutil.rmtree(folder)
        self.say(f"  {rates[0]:.0f} masked and {rates[1]:.0f} whole images per second")
        return Speed(*rates)

    def _pretrain(self, speed: Speed) -> Path:
        name, experiment = self._experiment("-msm")
        steps = self.budget.pretraining_steps(speed, experiment, is_short=self.faces is None)
        share = f"{experiment.realised_mask_ratio:.0%} of each image hidden"
        self._title(f"masked pre-training on public images: {steps} steps, {share}")
        init = ["--init", str(SHIPPED_MODEL)] if self.faces is None else []
        self._train(name, self.out / "pretraining", [*init, "--set", f"train.steps={steps}"])
        return self.out / "pretraining"

    def _train(self, name: str, out: Path, further: Sequence[str], *, quiet: bool = False) -> None:
        command = ["maskfed-server", "train", name, "--data", self._public_data(), "--out", str(out), *further]
        self._run(command, log=self.out / "logs" / "train.log" if quiet else None)

    def _start(self, ports: list[int]) -> None:
        """Set up and start the coordinator and every site."""
        self._title(f"a federation of {self.num_sites} sites: TLS, node authentication, own keys")
        home = ["--home", str(self._home)]
        settings = ["--port", str(ports[0]), "--health-port", str(ports[1])]
        self._run(["maskfed-server", "init", *home, *settings], log=self.out / "logs" / "init.log")
        self._daemon(["maskfed-server", "start", *home], "coordinator", "ready:")
        aliases = [f"site-{number}" for number in range(self.num_sites)]
        requests = self._together(
            [["maskfed-client", "enroll", alias, "--home", str(self._site(n))] for n, alias in enumerate(aliases)]
        )
        bundles = [self.out / "bundles" / f"{alias}.join.json" for alias in aliases]
        for request, bundle in zip(requests, bundles, strict=True):
            self._run(
                ["maskfed-server", "sites", "add", request, *home, "--bundle", str(bundle)],
                log=self.out / "logs" / "sites.log",
            )
        self._together([self._join(number, bundle) for number, bundle in enumerate(bundles)])
        self._together(
            [["maskfed-client", "data", "scan", "--home", str(self._site(n))] for n in range(self.num_sites)]
        )
        for number, alias in enumerate(aliases):
            site_ports = ["--port", str(ports[2 + 2 * number]), "--health-port", str(ports[3 + 2 * number])]
            self._daemon(["maskfed-client", "start", "--home", str(self._site(number)), *site_ports], alias)
        self._wait_online()

    def _join(self, number: int, bundle: Path) -> list[str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self.num_sites)
        size = self._experiment()[1].model.image_size
        images = self.out / "images" / f"site-{number}"
        return [
            *("maskfed-client", "join", str(bundle), "--home", str(self._site(number)), "--data", str(images)),
            *("--image-size", str(size), "--allow-non-private", "--allow-any-experiment", "--max-steps", "100000"),
            *("--release", "loss", "--release", "seconds", "--image-count", "rounded", "--threads", str(threads)),
            *("--head-file", str(self.out / "heads" / f"site-{number}.json")),
        ]

    def _wait_online(self) -> None:
        deadline = time.monotonic() + ONLINE_SECONDS
        while True:
            listed = self._output(["maskfed-server", "sites", "list", "--home", str(self._home)])
            online = sum(" online " in line for line in listed.splitlines())
            if online == self.num_sites:
                break
            if time.monotonic() > deadline:
                raise DemoError(f"only {online} of {self.num_sites} sites are online after {ONLINE_SECONDS:.0f} s")
            time.sleep(1)
        self.say(f"  {online} sites are online")

    def _finetune(self, pretrained: Path, reference: Path, speed: Speed) -> None:
        name, experiment = self._experiment()
        plan = self.budget.rounds(speed, experiment, self.rounds, self.num_sites)
        self._title(f"{self.rounds} rounds of {plan.local_steps} steps at each site, on images that stay there")
        federation = {
            "rounds": self.rounds,
            "local_steps": plan.local_steps,
            "min_available": self.num_sites,
            "min_replies": max(1, self.num_sites - 1),
        }
        overrides = [f"federation.{key}={value}" for key, value in federation.items()]
        overrides.append(f"evaluation.every_rounds={plan.evaluate_every}")
        self._run(
            [
                *("maskfed-server", "finetune", name, "--home", str(self._home), "--run", RUN),
                *("--init", str(pretrained), "--reference", str(reference)),
                *(part for override in overrides for part in ("--set", override)),
            ]
        )

    def _report(self) -> Path:
        self._title("report")
        run = self._home / "runs" / RUN
        self._run(["maskfed-server", "report", str(run)])
        report = self.out / "report.html"
        shutil.copyfile(run / "report.html", report)
        return report

    # ---- Processes ----

    def _title(self, text: str) -> None:
        minutes, seconds = divmod(int(self.budget.elapsed()), 60)
        self.say(f"\n[{minutes}:{seconds:02d}] {text}")

    def _run(self, command: Sequence[str], log: Path | None = None) -> None:
        """One command in the foreground: its output on the console, or in `log`."""
        self.say(f"$ {shlex.join(_short(command))}")
        if log:
            self._wait(spawn(_argv(command), dict(os.environ), log), command, log)
        else:
            self._wait(
                subprocess.Popen(_argv(command), stdin=subprocess.DEVNULL, start_new_session=True), command, None
            )

    def _wait(self, process: subprocess.Popen[bytes], command: Sequence[str], log: Path | None) -> None:
        self._command = process
        code = process.wait()
        self._command = None
        if code:
            said = f": {last_line(log)}" if log else ""
            raise DemoError(f"`{shlex.join(_short(command))}` ended with code {code}{said}")

    def _together(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Commands of different sites side by side; the last line that each printed."""
        self.say(f"$ {shlex.join(_short(commands[0]))}" + ("" if len(commands) == 1 else "   (and so at each site)"))
        logs = [self.out / "logs" / f"{command[1]}-{number}.log" for number, command in enumerate(commands)]
        started = [spawn(_argv(command), dict(os.environ), log) for command, log in zip(commands, logs, strict=True)]
        for process, command, log in zip(started, commands, logs, strict=True):
            self._wait(process, command, log)
        return [last_line(log, limit=4096) for log in logs]

    def _output(self, command: Sequence[str]) -> str:
        found = subprocess.run(_argv(command), capture_output=True, text=True, check=False, start_new_session=True)
        if found.returncode:
            raise DemoError(
                f"`{shlex.join(_short(command))}` ended with code {found.returncode}: {found.stderr.strip()}"
            )
        return found.stdout

    def _daemon(self, command: Sequence[str], name: str, ready: str = "") -> None:
        """A process that stays; with `ready`, wait until it has printed that."""
        self.say(f"$ {shlex.join(_short(command))} &")
        log = self.out / "logs" / f"{name}.log"
        process = spawn(_argv(command), dict(os.environ), log)
        self._daemons.append(process)
        deadline = time.monotonic() + START_SECONDS
        while ready and ready not in log.read_text(encoding="utf-8", errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"`{shlex.join(_short(command))}` did not come up: {last_line(log)}")
            time.sleep(0.2)

    @contextmanager
    def _everything_ends(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM become exceptions; on the way out every process ends, in order."""

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        adopt_orphans()
        # Many processes share the cores here: threads that spin while they wait would take them from each other.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number in old:
                signal.signal(number, signal.SIG_IGN)
            self._take_down()
            for number, handler in old.items():
                signal.signal(number, handler)

    def _take_down(self) -> None:
        if not self._daemons and self._command is None:
            return
        self._title("taking everything down: sites, then the coordinator")
        if self._command is not None:
            end_together([self._command], STOP_SECONDS)
        end_together(self._daemons[1:], STOP_SECONDS)
        end_together(self._daemons[:1], STOP_SECONDS)
        killed = end_descendants()
        self.say("  no process is left" + (f" ({killed} had to be killed)" if killed else ""))


def _argv(command: Sequence[str]) -> list[str]:
    return [program(command[0]), *command[1:]]


def _short(command: Sequence[str]) -> list[str]:
    """For the eye: an enrolment line is long."""
    return [part if len(part) < 160 else f"{part[:40]}..." for part in command]
