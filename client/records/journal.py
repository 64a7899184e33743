"""What was asked, decided and released: a hash-chained record for the operator and whoever audits the site."""

from pathlib import Path

from client.records.chain import Entry, open_chain, read_chain

Kind = str
KINDS = ("request", "accepted", "refusal", "release", "resent", "approval", "scan", "failure", "left")


class Journal:
    """Appends to `journal.jsonl`; several processes may hold one, each entry is written under a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: Kind, **fields: object) -> None:
        """Record one event of `KINDS`, durable when this returns; numbers computed from images are named, not given."""
        assert kind in KINDS
        with open_chain(self.path, wait=True) as chain:
            chain.append(kind, **fields)

    def entries(self) -> list[Entry]:
        """Everything recorded so far, checked.

        Raises:
            ChainError: the file is damaged.
        """
        return read_chain(self.path)
