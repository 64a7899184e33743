"""The demo as it is shown by default: sites that give nothing away but differentially private results.

Public training; one private mean image of each site, by which public images are aligned; public training on those; two
rounds of DP-SGD; a third one that every site's cap refuses; canaries, gate, release. What public images alone make of
the same time is trained beside it, and stands in the table at the end.
"""

import json
from pathlib import Path
from typing import Any

from deploy.processes.demo_commands import CommandError
from server.demo.budget import FIRST_STEPS, PublicSteps, read_speed
from server.demo.plain import REFERENCE_IMAGES, RUN, SEED, SHIPPED_MODEL, Demo
from server.runs.history import read_run
from shared.data.synthetic import write_folder
from shared.experiment.config import Experiment, load_experiment
from shared.messages.training import experiment_digest
from shared.storage.files import write_atomically

PUBLIC_RECIPE, PRIVATE_RECIPE = "demo-private32-T-public", "demo-private32-T"
PUBLIC_IMAGES, PRIVATE_SITE_IMAGES = 6000, 5000
EPSILON_CAP = 8
COMPARISON = "comparison.json"
BAR = 32


class PrivateDemo(Demo):
    """One demonstration with privacy, stage by stage."""

    def run(self) -> Path:
        """All stages; the report."""
        self._prepare_environment()
        with self.commands.everything_ends():
            reference = self._divide()
            start = self.out / "public"
            steps = self._train_public(start)
            self._start_coordinator()
            self._start_sites()
            plan = self._approve("plan")
            self._align(plan)
            aligned = self._go_on("aligned", start, self.out / "aligned-images", steps.aligned)
            self._finetune_privately(plan, aligned, reference)
            self._one_round_too_many(aligned)
            alone = self._go_on("public-only", start, self._public_data(), steps.alone)
            self._compare({"start": start, "public-only": alone, "private": self._run_folder}, reference)
            self._release()
            report = self._report()
        self._title(f"done: open {report}")
        return report

    @property
    def _run_folder(self) -> Path:
        return self.home / "runs" / RUN

    def _divide(self) -> Path:
        self._title("images: synthetic faces, four of each person")
        parts, size = self.out / "images", self._private_experiment().model.image_size
        for number, alias in enumerate(self.aliases):
            write_folder(parts / alias, PRIVATE_SITE_IMAGES, size, SEED, site=f"site{number}")
        write_folder(parts / "reference", REFERENCE_IMAGES, size, SEED, site=f"heldout{len(self.aliases)}")
        self.say(f"  {PRIVATE_SITE_IMAGES} images at each of {len(self.aliases)} sites, 1,200 of other persons")
        return parts / "reference"

    def _train_public(self, start: Path) -> PublicSteps:
        """Begin the public training, see how fast this machine is, and go on for as long as the plan allows."""
        self._title("public training: how fast is this machine?")
        self._run_public(start, SHIPPED_MODEL, self._public_data(), FIRST_STEPS)
        steps = self.budget.public_steps(read_speed(start), self._experiment_of(PUBLIC_RECIPE),
                                         self._private_experiment(), len(self.aliases))  # fmt: skip
        self._title(f"public training from the shipped model: {steps.public} steps")
        self._run_public(start, SHIPPED_MODEL, self._public_data(), steps.public)
        return steps

    def _go_on(self, name: str, start: Path, data: Path | str, steps: int) -> Path:
        self._title(f"{name}: {steps} further steps on {data}")
        self._run_public(self.out / name, start, data, steps)
        return self.out / name

    def _run_public(self, out: Path, init: Path, data: Path | str, steps: int) -> None:
        given = ("--data", str(data), "--out", str(out), "--init", str(init), "--set", f"train.steps={steps}")
        self.commands.run("maskfed-server", "train", PUBLIC_RECIPE, *given)

    def _join(self, alias: str, *home: str) -> tuple[str, ...]:
        size = self._private_experiment().model.image_size
        return (
            *("maskfed-client", "join", str(self._bundle(alias)), *home, "--data", str(self.out / "images" / alias)),
            *("--image-size", str(size), "--epsilon-cap", str(EPSILON_CAP), "--persons", str(PRIVATE_SITE_IMAGES // 4)),
            *("--task", "train", "--task", "mean_image", "--task", "audit", "--max-audits", "1"),
            *("--threads", str(self._threads()), "--head-file", str(self.out / "heads" / f"{alias}.json")),
        )

    def _approve(self, name: str, **federation: int) -> Path:
        """Write the plan with all its fields, and have each site's operator approve it."""
        num_sites = len(self.aliases)
        chosen = {"min_available": num_sites, "min_replies": num_sites, **federation}
        overrides = [f"federation.{key}={value}" for key, value in chosen.items()]
        experiment = self._private_experiment(overrides)
        file = self.out / f"{name}.toml"
        write_atomically(file, experiment.to_toml())
        digest = experiment_digest(experiment)
        self._title(f"each site's operator approves the experiment {digest[:16]}...")
        self.commands.together(
            [("maskfed-client", "approve", "experiment", digest, *self._site_home(alias)) for alias in self.aliases]
        )
        return file

    def _align(self, plan: Path) -> None:
        self._title("each site releases one mean image with noise, and public images are aligned with them")
        given = ("--data", self._public_data(), "--out", str(self.out / "aligned-images"))
        self.commands.run("maskfed-server", "align", str(plan), *given, *self._at(self.home))

    def _finetune_privately(self, plan: Path, aligned: Path, reference: Path) -> None:
        experiment = load_experiment(plan)
        rounds, steps = experiment.federation.rounds, experiment.federation.local_steps
        self._title(f"{rounds} rounds of {steps} steps of DP-SGD at each site, per person")
        start = ("--run", RUN, "--init", str(aligned), "--reference", str(reference))
        self.commands.run("maskfed-server", "finetune", str(plan), *self._at(self.home), *start)
        self._show_epsilons()

    def _show_epsilons(self) -> None:
        last = read_run(self._run_folder).rounds[-1]
        for entry in sorted(last["answered"], key=lambda entry: str(entry["site"])):
            spent, cap = float(entry["epsilon"]), float(entry["epsilon_cap"])
            full = round(BAR * min(1.0, spent / cap))
            self.say(f"  {entry['site']}: {'█' * full}{'░' * (BAR - full)} epsilon {spent:.2f} of {cap:g} per person")

    def _one_round_too_many(self, aligned: Path) -> None:
        """A further run of one round, approved, too: it is the budget that refuses it."""
        plan = self._approve("one-more", rounds=1)
        self._title("one more round")
        given = ("--run", "one-more", "--init", str(aligned))
        said = self.commands.refused(
            "maskfed-server", "finetune", str(plan), *self._at(self.home), *given, log="one-more.log"
        )
        self.say(f"  refused: {said}")
        if "cap" not in (self.out / "logs" / "one-more.log").read_text(encoding="utf-8", errors="replace"):
            raise CommandError(f"the round was refused for another reason than the cap: {said}")

    def _compare(self, models: dict[str, Path], reference: Path) -> None:
        """Loss and distance on persons that no model has seen, and what they say."""
        self._title("what the private stages were worth, on persons that no model has seen")
        rows = {name: self._measure(name, path, reference) for name, path in models.items()}
        write_atomically(self.out / COMPARISON, json.dumps(rows, indent=2) + "\n")
        self.say(f"  {'':12} {'loss':>9} {'distance':>9}")
        for name, row in rows.items():
            self.say(f"  {name:12} {row['loss']:9.5f} {row['distance']:9.4f}")
        for other in ("start", "public-only"):
            won = [kind for kind in ("loss", "distance") if rows["private"][kind] < rows[other][kind]]
            self.say(f"  private against {other}: better in {' and '.join(won) or 'nothing'}")

    def _measure(self, name: str, path: Path, reference: Path) -> dict[str, Any]:
        said = self.commands.output("maskfed-server", "loss", str(path), "--data", str(reference), "--json")
        results = sorted(path.glob("evaluation/*/result.json"), key=lambda file: file.stat().st_mtime)
        if not results:
            self.commands.run("maskfed-server", "evaluate", str(path), "--reference", str(reference), log=f"{name}.log")
            results = list(path.glob("evaluation/*/result.json"))
        metrics = json.loads(results[-1].read_text(encoding="utf-8"))["metrics"]
        distance = next(value for metric, value in metrics.items() if metric.startswith("fd_"))
        return {"loss": json.loads(said)["mean"], "parts": json.loads(said)["parts"], "distance": distance}

    def _release(self) -> None:
        self._title("canary audit at each site, the gate, and the release")
        self.commands.run("maskfed-server", "audit", str(self._run_folder), "--canaries", *self._at(self.home))
        self.commands.run("maskfed-server", "release", str(self._run_folder), "--out", str(self.out / "release"))

    def _public_data(self) -> str:
        return f"synthetic:public:{PUBLIC_IMAGES}"

    def _private_experiment(self, overrides: list[str] | None = None) -> Experiment:
        return self._experiment_of(PRIVATE_RECIPE, overrides)
