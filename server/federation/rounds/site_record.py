"""What a round knows of each site that it asked: its state, and which states may follow."""

import time
from dataclasses import dataclass
from typing import Any, Literal

from shared.storage.runlog import OUTCOMES, Outcome

State = Literal["asked", "requeued"] | Outcome
Answers = dict[str, dict[str, float]]
"""Seconds and bytes of sites' answers, by alias."""
TRANSITIONS: dict[State, tuple[State, ...]] = {
    "asked": ("requeued", *OUTCOMES),
    # Its answer may still come: the reply that was half uploaded when the node restarted, for example.
    "requeued": ("asked", "requeued", *OUTCOMES),
    **dict.fromkeys(OUTCOMES, ()),
}
"""Where a site may go from each state; `requeued`: it is asked again as soon as it is online."""
TRANSIENT_STATES: tuple[State, ...] = ("late", "lost")
MAX_QUESTIONS = 5
"""Times that a site is asked within one round, the first included."""


@dataclass
class SiteRecord:
    """What a round knows of one site."""

    site: str
    node_id: int
    activated_at: str
    state: State = "asked"
    code: str = ""
    reason: str = ""
    questions: int = 1
    lost_at: float = 0.0
    """When it was last requeued."""
    needs_base: bool = False
    update_digest: str = ""
    """SHA-256 of the update that was folded."""
    answer: dict[str, Any] | None = None

    @property
    def is_open(self) -> bool:
        """Whether its outcome is still to come."""
        return bool(TRANSITIONS[self.state])

    def move(self, state: State, code: str, reason: str) -> bool:
        """Enter `state`; false, and nothing happens, where the table does not allow it."""
        if state not in TRANSITIONS[self.state]:
            return False
        self.state, self.code, self.reason = state, code, reason
        if state == "requeued":
            self.lost_at = time.monotonic()
        return True

    def as_json(self) -> dict[str, Any]:
        """The site's entry in the round's record."""
        entry: dict[str, Any] = {"site": self.site}
        entry |= {key: value for key, value in (("code", self.code), ("reason", self.reason)) if value}
        if self.questions > 1:
            entry["questions"] = self.questions
        return entry | (self.answer or {})
