"""One scan, step by step: records, split, index, registry, ledger, and last the pointer. No torch."""

import hashlib
import hmac
import secrets
from pathlib import Path

import numpy as np

from client.data.file_records import Seen, look
from client.data.generations import (
    BUILDING,
    IMAGES,
    Index,
    Pointer,
    cache_digest,
    finish,
    read_pointer,
    remove_others,
    split_of,
    write_pointer,
)
from client.data.held_out import Place, Sides, Split
from client.data.person_mapping import persons_of
from client.data.scan_report import Scan, report
from client.home import Home
from client.records.data_key import create_data_key, key_id, read_data_key
from client.records.data_registry import DataRegistry, Identity, Records, registry_folder
from client.records.ledger import Ledger
from client.settings import SiteConfig
from shared.data.image_set import ImageCache
from shared.data.images import ImageSource, list_images
from shared.errors import InputError
from shared.storage.files import canonical_json


class Scanner:
    """A scan under the ledger's lock."""

    def __init__(
        self, home: Home, settings: SiteConfig, ledger: Ledger, *, is_new: bool = False, is_key_lost: bool = False
    ) -> None:
        self.home, self.settings, self.ledger, self.is_new = home, settings, ledger, is_new
        self.source: ImageSource = list_images(Path(settings.data))
        self.persons = persons_of(self.source, settings)
        self.registry = DataRegistry(registry_folder())
        with self.registry.locked():
            self.machine_key = self.registry.machine_key()
        self.machine_key_id = key_id(self.machine_key)
        self.key = self._lost_key() if is_key_lost else self._site_key()
        self.before = None if is_new or is_key_lost else read_pointer(home)
        split = split_of(home, self.before) if self.before else None
        self.before = self.before if split else None
        self.split = split or Split()
        self.split.key_id = key_id(self.key)

    def run(self, images: ImageCache) -> Scan:
        """From decoded images to a data set in use.

        Raises:
            InputError: the held-out share leaves nothing to train on.
        """
        seen = look(self.source, images, self.persons, self.key, self.machine_key)
        is_regrouped = self.before is not None and self.split.is_regrouped(seen.pictures)
        dataset_id = self.before.dataset_id if self.before and not is_regrouped else secrets.token_hex(16)
        self._recall(seen)
        sides = self.split.divide(self.key, seen.pictures, self.settings.held_out_ratio)
        for record in seen.files:
            self.split.records.setdefault(record, None)
        if not sides.train:
            raise InputError(
                f"held_out_ratio {self.settings.held_out_ratio} sets all {len(images)} images of {self.source.path} "
                "aside: nothing is left to train on, lower it or add persons"
            )
        index = self._index(dataset_id, seen, sides, images)
        pointer = finish(self.home, index, self.split, self.key)
        linked, homes = self._register(pointer, index.mapping, seen)
        write_pointer(self.home, pointer)
        remove_others(self.home, pointer)
        return report(
            index,
            seen,
            images.num_unreadable,
            self.source.ignored,
            linked=linked,
            homes=homes,
            is_regrouped=is_regrouped,
        )

    def _site_key(self) -> bytes:
        """The key that the records so far are under; drawn before there are any."""
        if not self.ledger.dataset_ids and not self.home.data_key.exists():
            create_data_key(self.home)
        key, known = read_data_key(self.home), self.ledger.key_id
        if known not in ("", key_id(key)):
            raise InputError(
                f"data.key is {key_id(key)}, the images were scanned under {known}: put the right key back; if that "
                "is lost, remove this one and `data scan --new-key`"
            )
        return key

    def _lost_key(self) -> bytes:
        """Another key, in place of none only, and where it is still known what was held out."""
        if self.home.data_key.exists():
            raise InputError(f"{self.home.data_key} is there: --new-key is for one that is lost for good")
        pointer = read_pointer(self.home)
        split = split_of(self.home, pointer) if pointer else None
        is_known = pointer and self.registry.records(pointer.dataset_id, self.machine_key_id)
        if pointer and not is_known and (split is None or True in split.records.values()):
            raise InputError(
                f"neither data.key nor {self.registry.folder} knows which images were held out: put one of them back"
            )
        create_data_key(self.home)
        return read_data_key(self.home)

    def _recall(self, seen: Seen) -> None:
        """What was held out here or in another home stays so; what this home trained on, too, unless it begins anew."""
        identities = self.registry.identities().values()
        known = [(each, self.registry.records(each.dataset_id, self.machine_key_id)) for each in identities]
        anywhere = [records.records for _, records in known if records]
        here = [records.records for each, records in known if records and each.ledger_id == self.ledger.ledger_id]
        for picture, known_as in zip(seen.pictures, seen.machine_records, strict=True):
            if self.split.place_of(picture.records) is not None:
                continue
            if any(records.get(record) for records in anywhere for record in known_as):
                self.split.records.update(dict.fromkeys(picture.records, True))
            elif not self.is_new and any(records.get(record) is False for records in here for record in known_as):
                self.split.records.update(dict.fromkeys(picture.records, False))

    def _index(self, dataset_id: str, seen: Seen, sides: Sides, images: ImageCache) -> Index:
        return Index(
            dataset_id=dataset_id,
            key_id=key_id(self.key),
            mapping=self._mapping(seen),
            size=self.settings.image_size,
            train=sides.train,
            twins=sides.twins,
            held_out=sides.held_out,
            persons=self._codes(images),
            split_sha256=hashlib.sha256(self.split.dump()).hexdigest(),
            cache_sha256=cache_digest(self.home.datasets / BUILDING / IMAGES),
        )

    def _mapping(self, seen: Seen) -> str:
        if self.persons is None:
            return ""
        filed = sorted([each.records[0], str(each.person)] for each in seen.pictures)
        return hmac.new(self.key, canonical_json(filed), hashlib.sha256).hexdigest()

    def _codes(self, images: ImageCache) -> list[int] | None:
        if self.persons is None:
            return None
        person_of = dict(zip(self.source.names, self.persons, strict=True))
        codes: list[int] = np.unique([person_of[name] for name in images.names], return_inverse=True)[1].tolist()
        return codes

    def _register(self, pointer: Pointer, mapping: str, seen: Seen) -> tuple[list[str], list[str]]:
        """Make the generation known to the machine and to the ledger, with all that share files with it."""
        own = {each for each in self.ledger.dataset_ids - {pointer.dataset_id} if self._is_shared(each, pointer)}
        with self.registry.locked():
            records = self._machine_records(pointer, seen)
            others = [each for each in self.registry.identities().values() if each.ledger_id != self.ledger.ledger_id]
            shared = [each for each in others if self._shares(each, records)]
            linked = sorted(own | {each.dataset_id for each in shared})
            identity = Identity(
                dataset_id=pointer.dataset_id,
                ledger_id=str(self.ledger.ledger_id),
                home=str(self.home.path),
                key_id=self.machine_key_id,
                fingerprint=pointer.fingerprint,
                linked=tuple(linked),
            )
            self.registry.publish(identity, Records(key_id=self.machine_key_id, records=records))
        self.ledger.register(
            pointer.dataset_id,
            linked,
            pointer.fingerprint,
            key_id=key_id(self.key),
            mapping=mapping,
            machine_key_id=self.machine_key_id,
        )
        self.ledger.take_over()
        return linked, sorted({each.home for each in shared})

    def _machine_records(self, pointer: Pointer, seen: Seen) -> dict[str, Place]:
        known = self.registry.records(pointer.dataset_id, self.machine_key_id)
        records: dict[str, Place] = dict(known.records) if known else {}
        records |= dict.fromkeys(set(seen.machine_files) - set(records))
        for picture, known_as in zip(seen.pictures, seen.machine_records, strict=True):
            records |= dict.fromkeys(known_as, self.split.place_of(picture.records))
        return records

    def _shares(self, other: Identity, records: dict[str, Place]) -> bool:
        theirs = self.registry.records(other.dataset_id, self.machine_key_id)
        return theirs is None or not records.keys().isdisjoint(theirs.records)

    def _is_shared(self, other: str, pointer: Pointer) -> bool:
        """Whether a data set of this ledger shares files; one whose records are lost or under another key does."""
        facts = self.ledger.registration(other) or {}
        is_old = "key_id" not in facts
        split = split_of(self.home, Pointer(other, "" if is_old else str(facts["fingerprint"])))
        if split is None or split.key_id not in ("", key_id(self.key)):
            return True
        if not self.split.records.keys().isdisjoint(split.records):
            return True
        # Records from before keys had names may be under a key that was lost since; only an old scan has compared them.
        was_compared = self.ledger.registration(pointer.dataset_id) is not None
        return not split.key_id and not was_compared
