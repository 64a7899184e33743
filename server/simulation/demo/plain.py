"""The demo without privacy: masked pre-training, a federation, plain rounds, a report.

Everything goes by the very commands that operators type. Every site has its own folder, settings, keys and processes;
nothing is simulated. Whatever happens, Ctrl-C included, the processes are taken down in the right order: sites first,
then the coordinator.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from deploy.processes.demo_commands import CommandError, Commands
from server.simulation.demo.demo_options import REPORT, DemoSettings
from server.simulation.demo_budget import Budget, Speed, measure_speed, read_speed
from server.simulation.division import divide_by_person
from shared.data.synthetic import write_folder
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment

SHIPPED_MODEL = Path(__file__).parents[2] / "models" / "synthetic32-T-msm"
RUN = "demo"
PUBLIC_IMAGES, SITE_IMAGES, REFERENCE_IMAGES = 2000, 1000, 1200
REFERENCE_RATIO = 0.2
SEED = 0
ONLINE_SECONDS = 90.0


class Demo:
    """One demonstration, stage by stage."""

    def __init__(self, settings: DemoSettings, budget: Budget, say: Callable[[str], None], ports: list[int]) -> None:
        self.settings, self.budget, self.say, self.ports = settings, budget, say, ports
        self.out = settings.out.resolve()
        self.home = self.out / "coordinator"
        self.aliases = [f"site-{number}" for number in range(settings.num_sites)]
        self.is_synthetic = settings.faces is None
        self.commands = Commands(self.out / "logs", say)

    def run(self) -> Path:
        """All stages; the report."""
        self._prepare_environment()
        with self.commands.everything_ends():
            reference = self._divide()
            speed = self._measure_speed()
            pretrained = self._pretrain(speed)
            self._start_coordinator()
            self._start_sites()
            self._finetune(pretrained, reference, speed.at(read_speed(pretrained)))
            report = self._report()
        self._title(f"done: open {report}")
        return report

    def _prepare_environment(self) -> None:
        # Many processes share the cores here: threads that spin while they wait would take them from each other.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Sites of another demo may have had the same faces: they are strangers.
        os.environ["MASKFED_REGISTRY"] = str(self.out / "registry")

    def _divide(self) -> Path:
        """Lay out the images: one folder per site, and the evaluator's held-out persons."""
        parts = self.out / "images"
        if self.settings.faces is not None:
            self._title(f"images: {self.settings.faces}, divided by person")
            division = divide_by_person(self.settings.faces, parts, self.settings.num_sites, REFERENCE_RATIO, SEED)
            for name, number in sorted(division.num_images.items()):
                self.say(f"  {name}: {number} images")
            return division.reference
        self._title("images: synthetic faces")
        size = self._experiment()[1].model.image_size
        for number, alias in enumerate(self.aliases):
            write_folder(parts / alias, SITE_IMAGES, size, SEED, site=f"site{number}")
        held_out = f"heldout{self.settings.num_sites}"
        write_folder(parts / "reference", REFERENCE_IMAGES, size, SEED, site=held_out)
        self.say(f"  {SITE_IMAGES} images at each of {len(self.aliases)} sites, {REFERENCE_IMAGES} of other persons")
        return parts / "reference"

    def _measure_speed(self) -> Speed:
        """A probe of seconds: what this machine can do decides how long the stages are."""
        self._title("how fast is this machine?")
        speed = measure_speed(self._experiment("-msm")[0], self._experiment()[0])
        self.say(f"  {speed.masked:.0f} masked and {speed.whole:.0f} whole images per second")
        return speed

    def _pretrain(self, speed: Speed) -> Path:
        _, experiment = self._experiment("-msm")
        steps = self.budget.pretraining_steps(speed, experiment, is_short=self.is_synthetic)
        share = f"{experiment.realised_mask_ratio:.0%} of each image hidden"
        self._title(f"masked pre-training on public images: {steps} steps, {share}")
        init = ("--init", str(SHIPPED_MODEL))
        self._train("-msm", self.out / "pretraining", *init, "--set", f"train.steps={steps}")
        return self.out / "pretraining"

    def _train(self, suffix: str, out: Path, *further: str, log: str = "") -> None:
        public = self.settings.public
        data = f"synthetic:public:{PUBLIC_IMAGES}" if public is None else str(public.resolve())
        recipe = self._experiment(suffix)[0]
        self.commands.run("maskfed-server", "train", recipe, "--data", data, "--out", str(out), *further, log=log)

    def _start_coordinator(self) -> None:
        self._title(f"a federation of {len(self.aliases)} sites: TLS, node authentication, own keys")
        ports = ("--port", str(self.ports[0]), "--health-port", str(self.ports[1]))
        self.commands.run("maskfed-server", "init", *self._at(self.home), *ports, log="init.log")
        self.commands.daemon("maskfed-server", "start", *self._at(self.home), log="coordinator.log", ready="ready:")

    def _start_sites(self) -> None:
        """Enrol, register, join, scan and start every site, then wait until the coordinator sees them."""
        homes = [self._site_home(alias) for alias in self.aliases]
        sites = list(zip(self.aliases, homes, strict=True))
        requests = self.commands.together([("maskfed-client", "enroll", alias, *home) for alias, home in sites])
        for alias, request in zip(self.aliases, requests, strict=True):
            bundle = ("--bundle", str(self._bundle(alias)))
            self.commands.run("maskfed-server", "sites", "add", request, *self._at(self.home), *bundle, log="sites.log")
        self.commands.together([self._join(alias, *home) for alias, home in sites])
        self.commands.together([("maskfed-client", "data", "scan", *home) for home in homes])
        for number, (alias, home) in enumerate(sites):
            ports = ("--port", str(self.ports[2 + 2 * number]), "--health-port", str(self.ports[3 + 2 * number]))
            self.commands.daemon("maskfed-client", "start", *home, *ports, log=f"{alias}.log")
        self._wait_online()

    def _join(self, alias: str, *home: str) -> tuple[str, ...]:
        size = self._experiment()[1].model.image_size
        images = self.out / "images" / alias
        return (
            *("maskfed-client", "join", str(self._bundle(alias)), *home, "--data", str(images)),
            *("--unit", "image", "--image-size", str(size), "--max-steps", "100000"),
            *("--allow-non-private", "--allow-any-experiment"),
            *("--release", "loss", "--release", "seconds", "--image-count", "rounded"),
            *("--threads", str(self._threads()), "--head-file", str(self.out / "heads" / f"{alias}.json")),
        )

    def _wait_online(self) -> None:
        deadline = time.monotonic() + ONLINE_SECONDS
        while True:
            listed = self.commands.output("maskfed-server", "sites", "list", *self._at(self.home))
            online = sum(" online " in line for line in listed.splitlines())
            if online == len(self.aliases):
                break
            if time.monotonic() > deadline:
                raise CommandError(f"only {online} of {len(self.aliases)} sites are online: see {self.out / 'logs'}")
            time.sleep(1)
        self.say(f"  {online} sites are online")

    def _finetune(self, pretrained: Path, reference: Path, speed: Speed) -> None:
        recipe, experiment = self._experiment()
        rounds, num_sites = self.settings.rounds, len(self.aliases)
        precision = load_experiment(pretrained / "experiment.toml").train.precision
        plan = self.budget.rounds(speed, experiment, rounds, num_sites)
        self._title(f"{rounds} rounds of {plan.local_steps} steps at each site, on images that stay there")
        chosen = {
            "federation.rounds": rounds,
            "federation.local_steps": plan.local_steps,
            "federation.min_available": num_sites,
            "federation.min_replies": max(1, num_sites - 1),
            "evaluation.every_rounds": plan.evaluate_every,
            # The sites are this machine, so what pre-training found to be faster here holds for them too.
            "train.precision": precision,
        }
        overrides = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
        start = ["--run", RUN, "--init", str(pretrained), "--reference", str(reference)]
        start += [f"--evaluate-arg={argument}" for argument in ("--precision", precision)]
        self.commands.run("maskfed-server", "finetune", recipe, *self._at(self.home), *start, *overrides)

    def _report(self) -> Path:
        self._title("report")
        run = self.home / "runs" / RUN
        self.commands.run("maskfed-server", "report", str(run))
        report = self.out / REPORT
        shutil.copyfile(run / "report.html", report)
        return report

    def _experiment(self, suffix: str = "") -> tuple[str, Experiment]:
        name = f"demo-{'synthetic' if self.is_synthetic else 'faces'}32-T{suffix}"
        return name, self._experiment_of(name)

    @staticmethod
    def _experiment_of(name: str, overrides: list[str] | None = None) -> Experiment:
        return load_experiment(find_experiment(name), overrides)

    def _threads(self) -> int:
        return max(1, len(os.sched_getaffinity(0)) // len(self.aliases))

    def _site_home(self, alias: str) -> tuple[str, str]:
        return self._at(self.out / "sites" / alias)

    def _bundle(self, alias: str) -> Path:
        return self.out / "bundles" / f"{alias}.join.json"

    @staticmethod
    def _at(home: Path) -> tuple[str, str]:
        return ("--home", str(home))

    def _title(self, text: str) -> None:
        minutes, seconds = divmod(int(self.budget.elapsed()), 60)
        self.say(f"\n[{minutes}:{seconds:02d}] {text}")
