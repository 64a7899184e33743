"""The demo as it is shown by default: sites that give nothing away but differentially private results.

Public training; offers; one private mean image of each site, by which public images are aligned; public training on
those; a round of DP-SGD; one more, which every site's cap refuses; canaries, gate, release. What public images alone
make of the same compute is trained beside it, and stands in the table at the end.
"""

import json
from pathlib import Path

from deploy.processes.demo_commands import CommandError
from server.runs.history import read_run
from server.simulation.demo.beside import compare, half_the_cores_each, measure_distances
from server.simulation.demo.plain import REFERENCE_IMAGES, RUN, SEED, SHIPPED_MODEL, Demo
from server.simulation.demo.stages import FIRST_STEPS, Plan
from server.simulation.demo_budget import read_speed
from shared.data.synthetic import write_folder
from shared.experiment.config import Experiment
from shared.storage.files import write_atomically

PUBLIC_RECIPE, PRIVATE_RECIPE = "demo-private32-T-public", "demo-private32-T"
PUBLIC_IMAGES, SITE_IMAGES, IMAGES_PER_PERSON = 6000, 5000, 4
BAR = 32
RELEASE_SECONDS = 50.0
"""On two idle cores: held-out loss, canaries, gate and release, after the distances."""


class PrivateDemo(Demo):
    """One demonstration with privacy, stage by stage."""

    def run(self) -> Path:
        """All stages; the report."""
        self._prepare_environment()
        with self.commands.everything_ends():
            reference = self._divide()
            start = self.out / "start"
            timing = self._train_public(start)
            begun = self.budget.elapsed()
            self._start_coordinator()
            self._start_sites()
            plan = self._approve()
            self._offer("the plan is offered: what would it cost, and who accepts?", plan, start)
            self._align(plan)
            aligned, alone = self._go_on(start, timing, self.budget.elapsed() - begun)
            self._finetune_privately(plan, aligned, reference)
            self._show_epsilons()
            self._one_round_too_many(plan, aligned)
            models = {"start": start, "public only": alone, "private": self._run_folder}
            self._title("what the private stages were worth, on persons that no model has seen")
            num_images = timing.num_measured(self.budget, RELEASE_SECONDS)
            measure_distances(self.commands, list(reversed(models.values())), reference, num_images)
            compare(self.commands, models, reference, self._run_folder, self.say)
            self._release()
            report = self._report()
        self._title(f"done: open {report}")
        return report

    @property
    def _run_folder(self) -> Path:
        return self.home / "runs" / RUN

    def _divide(self) -> Path:
        self._title(f"images: synthetic faces, {IMAGES_PER_PERSON} of each person")
        parts, size = self.out / "images", self._private().model.image_size
        for number, alias in enumerate(self.aliases):
            write_folder(parts / alias, SITE_IMAGES, size, SEED, site=f"site{number}")
        write_folder(parts / "reference", REFERENCE_IMAGES, size, SEED, site=f"heldout{len(self.aliases)}")
        self.say(
            f"  {SITE_IMAGES} at each of {len(self.aliases)} sites, {REFERENCE_IMAGES} of other persons like theirs"
        )
        return parts / "reference"

    def _train_public(self, start: Path) -> Plan:
        """Begin the public training, see how fast this machine is, and go on for as long as the plan allows."""
        self._title("public training: how fast is this machine?")
        self._train_on(start, SHIPPED_MODEL, self._public_data(), FIRST_STEPS)
        public, rate = self._experiment_of(PUBLIC_RECIPE), read_speed(start)
        timing = Plan(rate, public, self._private(), len(self.aliases), REFERENCE_IMAGES)
        stages = timing.stages(self.budget)
        if stages.is_over:
            self.say(
                "  the budget does not suffice for what is to be shown: the shortest stages are taken, and it is late"
            )
        self._title(f"public training from the shipped model: {stages.start} steps, {rate:.0f} images per second")
        if stages.start > FIRST_STEPS:
            self._train_on(start, SHIPPED_MODEL, self._public_data(), stages.start)
        return timing

    def _train_on(self, out: Path, init: Path, data: Path | str, steps: int) -> None:
        self.commands.run(*_training(out, init, data, steps), log=f"train-{out.name}.log")

    def _go_on(self, start: Path, timing: Plan, set_up_seconds: float) -> tuple[Path, Path]:
        """From the start on, side by side: on aligned images, and on public ones as they are."""
        aligned, alone = self.out / "aligned", self.out / "public-only"
        steps, further = timing.further_stages(self.budget, set_up_seconds)
        self._title(f"{steps} steps on aligned images; beside it, to compare, {further} on public images alone")
        with half_the_cores_each():
            self.commands.together(
                [
                    _training(aligned, start, self.out / "aligned-images", steps),
                    _training(alone, start, self._public_data(), further),
                ]
            )
        return aligned, alone

    def _join(self, alias: str, *home: str) -> tuple[str, ...]:
        """With the default policy: DP is required, experiments are approved, persons are the unit, the cap is 8."""
        size = self._private().model.image_size
        return (
            *("maskfed-client", "join", str(self._bundle(alias)), *home, "--data", str(self.out / "images" / alias)),
            *("--image-size", str(size), "--persons", str(SITE_IMAGES // IMAGES_PER_PERSON)),
            *("--task", "train", "--task", "mean_image", "--task", "audit", "--max-audits", "1"),
            *("--threads", str(self._threads()), "--head-file", str(self.out / "heads" / f"{alias}.json")),
        )

    def _approve(self) -> Path:
        """Write the plan with all its fields, and have each site's operator approve it."""
        num_sites = len(self.aliases)
        overrides = [f"federation.{name}={num_sites}" for name in ("min_available", "min_replies")]
        plan = self.out / "plan.toml"
        write_atomically(plan, self._private(overrides).to_toml())
        self._title("each site's operator looks at the experiment and approves it")
        sites = [
            ("maskfed-client", "approve", "experiment", str(plan), *self._site_home(each)) for each in self.aliases
        ]
        self.commands.together(sites)
        return plan

    def _offer(self, title: str, plan: Path, init: Path) -> None:
        self._title(title)
        self.commands.run("maskfed-server", "finetune", str(plan), *self._at(self.home), *_dry_run(init))

    def _align(self, plan: Path) -> None:
        self._title("each site releases one mean image with noise, and public images are aligned with them")
        given = ("--data", self._public_data(), "--out", str(self.out / "aligned-images"))
        self.commands.run("maskfed-server", "align", str(plan), *given, *self._at(self.home))

    def _finetune_privately(self, plan: Path, aligned: Path, reference: Path) -> None:
        federation = self._private().federation
        self._title(f"{federation.rounds} round of {federation.local_steps} steps of DP-SGD at each site, per person")
        start = ("--run", RUN, "--init", str(aligned), "--held-out", str(reference))
        self.commands.run("maskfed-server", "finetune", str(plan), *self._at(self.home), *start)

    def _show_epsilons(self) -> None:
        last = read_run(self._run_folder).rounds[-1]
        for entry in sorted(last["answered"], key=lambda entry: str(entry["site"])):
            spent, cap = float(entry["epsilon"]), float(entry["epsilon_cap"])
            full = round(BAR * min(1.0, spent / cap))
            self.say(f"  {entry['site']}: {'█' * full}{'░' * (BAR - full)} epsilon {spent:.2f} of {cap:g} per person")

    def _one_round_too_many(self, plan: Path, aligned: Path) -> None:
        """The same plan once more, approved as it is: it is the budget that refuses it, and nothing is charged."""
        self._title("one more round?")
        command = ("maskfed-server", "finetune", str(plan), *self._at(self.home), *_dry_run(aligned), "--json")
        said = self.commands.refused(*command, log="one-more.log")
        offers = json.loads(said[said.index("{") :])["offers"]
        for offer in offers:
            self.say(f"  {offer['site']}: {offer['status']}, {offer['reason']}")
        if not all(offer["reason"].startswith("budget_exceeded") for offer in offers):
            raise CommandError("one more round was refused for another reason than the cap")

    def _release(self) -> None:
        self._title("canary audit at each site, the gate, and the release")
        self.commands.run("maskfed-server", "audit", str(self._run_folder), "--canaries", *self._at(self.home))
        self.commands.run("maskfed-server", "release", str(self._run_folder), "--out", str(self.out / "release"))

    @staticmethod
    def _public_data() -> str:
        return f"synthetic:public:{PUBLIC_IMAGES}"

    def _private(self, overrides: list[str] | None = None) -> Experiment:
        return self._experiment_of(PRIVATE_RECIPE, overrides)


def _training(out: Path, init: Path, data: Path | str, steps: int) -> tuple[str, ...]:
    given = ("--data", str(data), "--out", str(out), "--init", str(init), "--set", f"train.steps={steps}")
    return ("maskfed-server", "train", PUBLIC_RECIPE, *given)


def _dry_run(init: Path) -> tuple[str, ...]:
    return ("--init", str(init), "--dry-run")
