"""A round is kept, or undone when public images say that it did damage.

The weights of a round lie as a candidate beside the checkpoints until they are checked, so a kill at any point leaves
the round before as the newest checkpoint: the round is repeated, sites send their stored replies, and the check, which
draws nothing, comes to the same. What was released under client-level DP stays counted.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.federation.acceptance.bound import MAX_ROLL_BACKS, Rise, worst_rise
from server.federation.acceptance.check import CheckQuestion, HeldOutCheck
from server.federation.acceptance.crowd import Crowd
from server.federation.acceptance.kept_replies import KeptReplies
from server.federation.acceptance.trust import trusted
from server.federation.updates.global_model import GlobalModel, load_global, round_folder, save_candidate
from shared.experiment.config import Experiment

CANDIDATE, REPLIES = "candidate", "replies"


class Acceptance:
    """What decides whether the rounds of one run are kept."""

    def __init__(self, run_folder: Path, experiment: Experiment) -> None:
        self.experiment, self.checkpoints = experiment, run_folder / "checkpoints"
        self.crowd = Crowd(run_folder, experiment)
        self._doubted: dict[str, dict[str, float]] = {}
        self.check = HeldOutCheck(run_folder)
        self.num_rolled_back = 0
        self._losses: dict[str, float] = {}
        config = experiment.federation
        is_hidden = config.central_noise_multiplier or config.secure
        is_kept = self.is_on and config.keep_replies and not is_hidden
        self.replies = KeptReplies(self.check.folder / REPLIES) if is_kept else None

    @property
    def is_on(self) -> bool:
        """Whether there are public images to look at."""
        return bool(self.check.images)

    @property
    def is_over(self) -> bool:
        """Whether the run has to stop: too many rounds were undone."""
        return self.num_rolled_back >= MAX_ROLL_BACKS

    def begin(self, model: GlobalModel, attend: Callable[[], None]) -> None:
        """Take up the run at `model`, as it was loaded from its newest checkpoint.

        Raises:
            CheckError: the check cannot run.
        """
        shutil.rmtree(self.check.folder, ignore_errors=True)
        self.crowd.begin(model.server_round)
        self._doubted = dict(model.record.get("doubted", {}))
        self.num_rolled_back = int(model.record.get("roll_backs", 0))
        if self.is_on:
            place = round_folder(self.checkpoints, model.server_round)
            question = CheckQuestion(str(place), self.check.images)
            self._losses = model.record.get("held_out") or self.check.ask(question, attend).losses

    def judge(self, model: GlobalModel, changes: dict[str, Any], attend: Callable[[], None]) -> dict[str, Any]:
        """Check the weights of a round, and take them back when they did damage.

        Args:
            model: after the round; what undoes the round is read from the checkpoint of the round before.
            changes: what the server's step says of the round.
            attend: called while the check runs.

        Returns:
            What the round's record says of it; it goes over `changes`.

        Raises:
            CheckError: the check cannot run, so the round is not accepted.
        """
        said: dict[str, Any] = {}
        try:
            if self.is_on and changes["weights_changed"]:
                said = self._judge(model, attend)
        finally:
            if self.replies is not None:
                self.replies.clear()
        if self.num_rolled_back:
            said["roll_backs"] = self.num_rolled_back
        said |= self._compare(model.server_round, is_kept=(changes | said)["weights_changed"])
        return said | ({"held_out": self._losses} if self.is_on else {})

    def _compare(self, server_round: int, *, is_kept: bool) -> dict[str, Any]:
        """What the sites' updates say of each other; an undone round says nothing."""
        if not is_kept:
            self.crowd.forget()
        comparison = self.crowd.take_in(server_round)
        known = trusted(self.crowd.run_folder)
        before = self._doubted
        self._doubted = {
            site: {**before.get(site, {"round": server_round}), "share": share,
                   **({"persistence": value} if (value := comparison.persistence.get(site)) is not None else {})}
            for site, share in sorted(self.crowd.shares.items()) if site not in known
        }  # fmt: skip
        named = sorted(self._doubted.keys() - before.keys())
        parts = {"persistence": comparison.persistence and comparison.as_json(), "named": named}
        return {name: part for name, part in {**parts, "doubted": self._doubted}.items() if part}

    def _judge(self, model: GlobalModel, attend: Callable[[], None]) -> dict[str, Any]:
        before = round_folder(self.checkpoints, model.server_round - 1)
        candidate, bound = self.check.folder / CANDIDATE, self.experiment.federation.max_held_out_rise
        save_candidate(candidate, model, self.experiment)
        replies = ""
        if self.replies is not None:
            self.replies.close()
            replies = str(self.replies.folder)
        question = CheckQuestion(str(candidate), self.check.images, str(before), self._losses, bound, replies)
        answer = self.check.ask(question, attend)
        shutil.rmtree(candidate)
        rise = worst_rise(self._losses, answer.losses)
        if rise.ratio <= bound:
            self._losses = answer.losses
            return {}
        self.num_rolled_back += 1
        take_back(model, before, self.experiment)
        told = {
            "group": rise.group,
            "rise": rise.ratio if math.isfinite(rise.ratio) else None,
            "bound": bound,
            "suspects": list(answer.suspects),
        }
        return {
            "weights_changed": False,
            "reason": in_words(rise, bound, answer.suspects, are_kept=bool(replies)),
            "rolled_back": told,
        }


def take_back(model: GlobalModel, before: Path, experiment: Experiment) -> None:
    """Make `model` that of the round before again, bit by bit; only the round's number stays."""
    vars(model).update(vars(load_global(before, experiment)) | {"server_round": model.server_round})


def in_words(rise: Rise, bound: float, suspects: tuple[str, ...], *, are_kept: bool) -> str:
    """One line for the operator."""
    who = "which site it was is not known, for updates are not kept"
    if are_kept:
        who = (
            f"it would not have without {', '.join(suspects)}"
            if suspects
            else "no minority of the sites was found behind it"
        )
    how = f"rose by {rise.ratio:.1%}" if math.isfinite(rise.ratio) else "is not finite"
    return f"rolled back: held-out loss ({rise.group}) {how}, federation.max_held_out_rise allows {bound:.1%}; {who}"
