"""A run goes on only with the images it began with: what they were is part of the run directory. No torch."""

import json
from pathlib import Path
from typing import Any

from server.runs.run_directory import RunDir
from shared.data.image_set import ImageCache
from shared.errors import InputError
from shared.storage.files import write_atomically

IMAGES_FILE = "images.json"


def check_images(run: RunDir, images: ImageCache, data: Path, *, step: int, accept_other: bool = False) -> str:
    """Compare with the images that the run was trained on so far, and write these down.

    Args:
        run: its directory.
        images: what the next steps will see.
        data: as the user named them.
        step: optimizer steps done.
        accept_other: whether other images are taken from here on; they are recorded beside the first ones.

    Returns:
        What changed, for the run log; empty where nothing did.

    Raises:
        InputError: other images, and they are not accepted; or a damaged record.
    """
    path = run.path / IMAGES_FILE
    known = _read(path)
    now = {"fingerprint": images.fingerprint, "num_images": len(images), "data": str(data), "from_step": step}
    if known and known[-1]["fingerprint"] == now["fingerprint"]:
        return ""
    change = ""
    if known and step:
        before = known[-1]
        change = f"{before['num_images']} images of {before['data']} before, {len(images)} other ones of {data} now"
        if not accept_other:
            raise InputError(
                f"run {run.path} was trained on other images: {change}; give the first ones, name a new folder, or go "
                "on with --accept-other-data, which is recorded"
            )
    write_atomically(path, json.dumps([*(known if step else []), now], indent=2) + "\n")
    return change


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if all({"fingerprint", "num_images", "data"} <= each.keys() for each in known):
            return list(known)
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} is damaged; restore it from a copy, or delete it to take the images of now for the first")
