"""Studies by name, one data file each, and their arms at a scale. No torch here."""

import tomllib
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from server.studies.schema import SCALES, Arm, Scale, Stage, Study
from shared.errors import InputError
from shared.experiment.config import explain

FOLDER = Path(__file__).parent / "definitions"


def study_names() -> list[str]:
    """Names of all studies, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_study(name: str) -> Study:
    """The study of a name, or of a file.

    Raises:
        InputError: no such study, bad TOML, unknown key, or a reference to nothing; the line names the key.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"study {name!r} is unknown: known are {', '.join(study_names())}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"study {path.name}: not valid TOML ({error})") from error
    try:
        return _completed(Study.model_validate(tree))
    except ValidationError as error:
        raise InputError(f"study {path.name}: {explain(error, Study)}") from error


def _completed(study: Study) -> Study:
    """The study with the settings of its scales in each arm, and with the arms that a scale has from another."""
    arms = {
        name: arm.model_copy(
            update={"scales": {scale: stage for scale in study.scales for stage in _stages(study, arm, scale)}}
        )
        for name, arm in study.arms.items()
    }
    return study.model_copy(update={"arms": arms})


def _stages(study: Study, arm: Arm, scale: Scale) -> list[Stage]:
    """What an arm trains at a scale, or nothing."""
    plan, own = study.scales[scale], arm.scales.get(scale)
    if own:
        return [own.model_copy(update={"settings": plan.settings | own.settings})]
    if not plan.like or plan.like not in arm.scales:
        return []
    whole, share = arm.scales[plan.like], plan.images_share
    settings = study.scales[plan.like].settings | plan.settings | whole.settings
    at = tuple(sorted({max(1, round(each * share)) for each in whole.at}))
    # 0 stands for the recipe's own length, which no share shortens.
    images = max(1, round(whole.images * share)) if whole.images else 0
    return [whole.model_copy(update={"settings": settings, "images": images, "at": at})]


def arm_at(study: Study, study_name: str, arm: str, scale: str) -> tuple[Arm, Stage, Scale]:
    """An arm, and what it trains at a scale.

    Raises:
        InputError: no such arm, or not at that scale; the line lists what there is.
    """
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is unknown: give one of {', '.join(SCALES)}")
    known = cast(Scale, scale)
    if arm not in study.arms:
        raise InputError(f"study {study_name} has no arm {arm!r}: it has {', '.join(study.arms)}")
    chosen = study.arms[arm]
    if known not in chosen.scales:
        raise InputError(
            f"arm {arm} of {study_name} has no scale {scale!r}: it has {', '.join(chosen.scales)}; choose with --scale"
        )
    return chosen, chosen.scales[known], known


def arms_at(study: Study, study_name: str, scale: str) -> list[str]:
    """Names of all arms that a study has at a scale, in its order.

    Raises:
        InputError: unknown scale, or none.
    """
    names = [name for name, arm in study.arms.items() if scale in arm.scales]
    if not names:
        raise InputError(f"study {study_name} has no scale {scale!r}: it has {', '.join(study.scales)}")
    return names
