"""What the round loop tells while it works, and asks before it deletes."""

from typing import Protocol

from server.federation.rounds.site_record import Answers


class Observer(Protocol):
    """What the round loop tells while it works."""

    def progress(self, server_round: int, stage: str, sites: dict[str, str], answers: Answers | None = None) -> None:
        """The stage of the current round, and each site's state."""

    def attend(self) -> None:
        """A moment for the observer's own work, several times a minute; it must not block."""

    def round_done(self, server_round: int) -> None:
        """A round's checkpoint is complete."""

    def oldest_needed(self) -> int | None:
        """Round of the oldest checkpoint that somebody still has to read; None: nobody does."""
