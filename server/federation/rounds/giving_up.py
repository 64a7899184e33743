"""When a run ends before its last round: rounds that change nothing, or that are undone."""

from server.federation.acceptance.acceptance import Acceptance
from server.federation.updates.global_model import GlobalModel
from shared.experiment.config import Experiment

UNCHANGED_ROUNDS = 3
"""Rounds in a row without a change that end a run of plain rounds, unless the experiment says otherwise."""


class RunFailedError(RuntimeError):
    """The run cannot go on; `is_final` says that trying again will not help."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


class GivingUp:
    """Looks at each round's record, and ends the run that should not go on."""

    def __init__(self, experiment: Experiment, acceptance: Acceptance) -> None:
        self._experiment, self._acceptance = experiment, acceptance
        self._num_unchanged = 0

    def after_round(self, model: GlobalModel) -> None:
        """Go on, or not.

        Raises:
            RunFailedError: the second round was undone, or too many in a row did not change the weights.
        """
        self.after_roll_back(model)
        self._after_unchanged(model)

    def after_roll_back(self, model: GlobalModel) -> None:
        """Part of `after_round`, and for a run that was killed before it could stop.

        Raises:
            RunFailedError: the newest round was undone, and it was not the first one.
        """
        if "rolled_back" in model.record and self._acceptance.is_over:
            raise RunFailedError(
                f"round {model.server_round} was undone, {self._acceptance.num_rolled_back} in this run: "
                f"{model.record['reason']}: look at the suspects (`maskfed-server sites remove`), then --resume",
                is_final=True,
            )

    def _after_unchanged(self, model: GlobalModel) -> None:
        """Training costs the sites, under DP-SGD even budget: rounds that change nothing must not go on for ever."""
        federation = self._experiment.federation
        is_vain = not model.record["weights_changed"] and "rolled_back" not in model.record
        self._num_unchanged = self._num_unchanged + 1 if is_vain else 0
        default = 1 if self._experiment.privacy.mechanism == "dp-sgd" else UNCHANGED_ROUNDS
        most = federation.max_unchanged_rounds or default
        if model.server_round < federation.rounds and self._num_unchanged >= most:
            raise RunFailedError(
                f"round {model.server_round}: the weights did not change in {self._num_unchanged} rounds in a row "
                f"({model.record['reason']}): see why sites gave nothing, then --resume",
                is_final=True,
            )
