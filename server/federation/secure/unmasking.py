"""From a masked sum to the open one: shares are asked for, checked against what was dealt, and masks are taken away."""

from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Message, MessageType
from numpy.typing import NDArray

from server.federation.messaging.asking import Asking, SiteAnswer, SiteQuestion
from server.federation.messaging.transport import Grid, Timing
from server.federation.secure.masked_sum import MaskedSum
from shared.messages.secure_sum.unmask import (
    UNMASK_ACTION,
    UnmaskAnswer,
    UnmaskQuery,
    read_unmask_answer,
    unmask_record,
)
from shared.secure_aggregation.additive_masks import Mask, add_masks, pairwise_mask
from shared.secure_aggregation.dealing import is_dealt, recover, revealed_seeds
from shared.secure_aggregation.roster import SecureSumError
from shared.updates.fixed_point import CHUNK_ELEMENTS

Shares = dict[tuple[str, int], bytes]
"""What one site has given back: by dealer and number of the seed."""


class Unmasking:
    """One round's; the survivors are the sites whose updates are in `total`."""

    def __init__(self, total: MaskedSum, run: str, server_round: int, request_digest: str) -> None:
        self._total, self._run, self._round, self._digest = total, run, server_round, request_digest
        self._roster, self._dealings = total.roster, total.dealings
        self.survivors = tuple(sorted(self._dealings))

    def ask(
        self, grid: Grid, timing: Timing, nodes: Mapping[str, int], attend: Callable[[], None]
    ) -> dict[str, Shares]:
        """Shares of as many sites as the threshold takes, each checked.

        Args:
            grid: that the run's messages go through.
            timing: deadlines.
            nodes: addresses of the survivors; one that is not there counts as silent.
            attend: called again and again.

        Raises:
            SecureSumError: too few have given shares; names why.
        """
        questions = {
            site: SiteQuestion(nodes[site], unmask_record(self.query(site))) for site in self.survivors if site in nodes
        }
        kind = f"{MessageType.QUERY}.{UNMASK_ACTION}"
        asking = Asking(grid, timing, questions, kind, self._round, self._read)
        found = asking.answers(timing.question_seconds(len(questions)), attend, self._is_enough)
        given = {site: answer.value for site, answer in found.items() if answer.value is not None}
        if len(given) >= self._roster.threshold:
            return given
        missing = {site: found[site].problem if site in found else "no longer registered" for site in self.survivors}
        told = "; ".join(f"{site} ({problem})" for site, problem in missing.items() if site not in given)
        raise SecureSumError(
            f"the sum cannot be read: {len(given)} of the {self._roster.threshold} answers it takes; {told}"
        )

    def query(self, site: str) -> UnmaskQuery:
        """The question to one survivor, with what the others have sealed for it."""
        number = self._roster.number_of(site)
        return UnmaskQuery(
            run=self._run,
            server_round=self._round,
            request_digest=self._digest,
            survivors=self.survivors,
            boxes=tuple(self._dealings[dealer].boxes[number] for dealer in self.survivors),
        )

    def checked(self, site: str, answer: UnmaskAnswer) -> Shares:
        """The shares of an answer, each held against what its dealer has said of it.

        Raises:
            SecureSumError: a refusal, or a share that was not dealt: the site or the dealer is wrong.
        """
        if answer.refusal is not None:
            raise SecureSumError(f"{answer.refusal}: {answer.reason}")
        if answer.request_digest != self._digest or len(answer.shares) != len(self.survivors):
            raise SecureSumError("its answer is to another question")
        receiver, found = self._roster.number_of(site), Shares()
        for place, dealer in enumerate(self.survivors):
            seeds = revealed_seeds(self._roster, self.survivors, self._roster.number_of(dealer))
            shares = answer.revealed(place)
            if len(shares) != len(seeds):
                raise SecureSumError(f"it gave {len(shares)} shares of site {dealer}, asked were {len(seeds)}")
            for seed, share in zip(seeds, shares, strict=True):
                if not is_dealt(self._dealings[dealer], receiver, seed, share):
                    raise SecureSumError(f"its share of site {dealer} is not the one that {dealer} says it dealt")
                found[dealer, seed] = share
        return found

    def masks(self, given: Mapping[str, Shares]) -> list[Mask]:
        """What has to be added to the sum so that no mask is left in it.

        Raises:
            SecureSumError: a site has dealt shares of another seed than it says; names it.
        """
        masks = []
        for dealer in self.survivors:
            own = self._roster.number_of(dealer)
            for seed in revealed_seeds(self._roster, self.survivors, own):
                shares = {self._roster.number_of(site): found[dealer, seed] for site, found in given.items()}
                secret = recover(self._dealings[dealer], seed, shares, dealer)
                added = Mask(1, secret) if seed == own else pairwise_mask(own, seed, secret)
                masks.append(Mask(-added.sign, secret))
        return masks

    def open(self, masks: list[Mask]) -> NDArray[np.int64]:
        """The sum of the survivors' updates (num_elements,), in the ring's unit.

        Raises:
            SecureSumError: it is larger than so many updates can make, so that some mask was wrong.
        """
        elements, ring = self._total.elements, self._total.ring
        add_masks(elements, ring, masks)
        # With 64 bits the sum is opened where it lies.
        opened = elements.view(np.int64) if ring.bits == 64 else np.empty(len(elements), np.int64)
        largest = ring.largest_sum(len(self.survivors))
        for start in range(0, len(elements), CHUNK_ELEMENTS):
            part = slice(start, start + CHUNK_ELEMENTS)
            opened[part] = ring.decode(elements[part])
            if np.abs(opened[part]).max(initial=0) > largest:
                raise SecureSumError(
                    f"the sum is larger than {len(self.survivors)} updates can make: a site has masked wrongly or sent "
                    "too long an update, and which one cannot be known"
                )
        return opened

    def _read(self, site: str, message: Message) -> Shares:
        return self.checked(site, read_unmask_answer(message.content))

    def _is_enough(self, found: Mapping[str, SiteAnswer[Shares]]) -> bool:
        return sum(answer.value is not None for answer in found.values()) >= self._roster.threshold
