"""What the operator is told of a scan. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from client.data.file_records import Seen
from client.data.generations import Index
from client.settings import SitePolicy
from shared.data.images import ignored_text

CURE_PERSONS = "Give one folder per person and no image beside the folders, or `identities`, and scan again."


@dataclass(frozen=True)
class Scan:
    """What `data scan` shows to the operator; nothing of it leaves the site."""

    dataset_id: str
    size: int
    num_train: int
    num_held_out: int
    num_persons: int | None
    num_held_out_persons: int | None
    num_duplicates: int
    num_unreadable: int
    ignored: Mapping[str, int]
    """Files that are no images, by suffix."""
    shorter_sides: tuple[int, int, int]
    """Of the files as they are, in pixels: smallest, median, largest."""
    num_enlarged: int
    """Files smaller than the size of the data set."""
    linked: list[str]
    """Other data sets that share files: their spending counts here, and this one's there."""
    homes: list[str]
    """Other homes of this machine that have such data sets."""
    is_regrouped: bool
    """Files that were seen before are now filed under other persons."""

    def lines(self, policy: SitePolicy) -> Iterator[str]:
        """For the operator: counts, persons, sizes, and what keeps the site from training."""
        yield f"data set {self.dataset_id}: {self.num_train} images to train on at {self.size} x {self.size} pixels"
        known = "" if self.num_persons is None else f" ({self.num_held_out_persons} of {self.num_persons} persons)"
        yield f"held out for audits, never trained on: {self.num_held_out}{known}"
        yield "shorter side of the files: {} to {} pixels, median {}".format(
            *self.shorter_sides[::2], self.shorter_sides[1]
        )
        named = ", named in logs/scan.log" if self.num_unreadable else ""
        yield f"dropped: {self.num_duplicates} duplicates, {self.num_unreadable} unreadable{named}"
        if self.ignored:
            yield f"no images by their suffix: {ignored_text(self.ignored)}"
        if self.is_regrouped:
            yield "files are filed under other persons than before: this is another data set, it inherits all spending"
        if self.linked:
            yield f"shares files with {', '.join(self.linked)}: spending counts for all of them"
        if self.homes:
            yield f"shares files with {', '.join(self.homes)}: what is spent in one home is spent in all"
        if self.num_enlarged:
            yield f"PROBLEM: {self.num_enlarged} files are smaller than {self.size} pixels and were enlarged"
        if self.num_train < policy.min_images_train:
            yield f"PROBLEM: training is refused below policy.min_images_train, which is {policy.min_images_train}"
        if policy.unit == "person" and self.num_persons is None:
            yield f"PROBLEM: policy.unit is 'person': training with DP is refused. {CURE_PERSONS}"


def report(
    index: Index,
    seen: Seen,
    num_unreadable: int,
    ignored: Mapping[str, int],
    *,
    linked: list[str],
    homes: list[str],
    is_regrouped: bool,
) -> Scan:
    """Counts of a scan that is done."""
    sides = sorted(seen.sides)
    groups: dict[str | None, set[str]] = {}
    num_duplicates = 0
    for picture in seen.pictures:
        group = groups.setdefault(picture.person, set())
        num_duplicates += not group.isdisjoint(picture.records)
        group.update(picture.records)
    owners = {each.row: each.person for each in seen.pictures}
    return Scan(
        dataset_id=index.dataset_id,
        size=index.size,
        num_train=len(index.train),
        num_held_out=len(index.held_out),
        num_persons=None if index.persons is None else len(groups),
        num_held_out_persons=None if index.persons is None else len({owners[row] for row in index.held_out}),
        num_duplicates=num_duplicates,
        num_unreadable=num_unreadable,
        ignored=ignored,
        shorter_sides=(sides[0], sides[len(sides) // 2], sides[-1]),
        num_enlarged=sum(side < index.size for side in sides),
        linked=linked,
        homes=homes,
        is_regrouped=is_regrouped,
    )
