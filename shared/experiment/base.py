"""What sections of an experiment, settings and messages have in common: how strictly they are read."""

import difflib
import re
from typing import TypeGuard, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

MAX_SHOWN = 200
"""Characters of a wrong value that an error repeats."""

_FORM = re.compile(r"[\[-]|^(float|int|str)$")
"""How pydantic names a form that a value may have, at the end of its place; no key looks so."""
_PLAIN = frozenset({str, int, float, type(None)})


class Section(BaseModel):
    """Frozen, and an unknown key is an error: a typo must never train the wrong thing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """`true` is no number, though Python counts it as 1."""
        # A long ledger is a hundred thousand fields: what is clearly no bool costs one look.
        if value.__class__ in _PLAIN:
            return value
        given = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        has_bool = any(isinstance(each, bool) for each in given)
        if has_bool and _is_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("give a number, not true or false")
        return value


def _is_number(kind: object) -> bool:
    """Whether a field holds a number, or several, and no words beside them."""
    parts = get_args(kind)
    return kind in (int, float) or (bool not in parts and any(_is_number(each) for each in parts))


def explain(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """One line for the first problem of a validation: key, value, what is allowed.

    Args:
        error: what went wrong.
        kind: what was read; an unknown key is then told with the one that was meant.
    """
    first, *others = error.errors()
    place, message = first["loc"], first["msg"].removeprefix("Value error, ")
    if place and _FORM.search(str(place[-1])):
        # A value that may have one of several forms has been held against each: all of them are allowed.
        forms = [
            each["msg"] for each in others if each["loc"][:-1] == place[:-1] and _FORM.search(str(each["loc"][-1]))
        ]
        place, message = place[:-1], " or ".join([message, *(form[0].lower() + form[1:] for form in forms)])
    key = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        meant = _meant(kind, [str(part) for part in first["loc"]]) if kind else ""
        return f"unknown key {key!r}{f': is {meant!r} meant?' if meant else ':'} remove it or correct its spelling"
    if not key:
        return message
    value = repr(first["input"])
    value = value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."
    return f"{key} = {value}: {message}" if not isinstance(first["input"], dict) else f"{key}: {message}"


def _meant(kind: type[BaseModel], parts: list[str]) -> str:
    """The key that an unknown one resembles: in its own section, else one of that name in another section."""
    *sections, name = parts
    known = _keys(kind)
    here = {key.rpartition(".")[2]: key for key in known if key.split(".")[:-1] == sections}
    if near := difflib.get_close_matches(name.lower(), here, 1, 0.7):
        return here[near[0]]
    return next((key for key in known if key.rpartition(".")[2] == name), "")


def _keys(kind: type[BaseModel], before: str = "") -> list[str]:
    """Every key of a section and of those in it."""
    inner = {name: field.annotation for name, field in kind.model_fields.items()}
    parts = [_keys(each, f"{before}{name}.") for name, each in inner.items() if _is_section(each)]
    return [f"{before}{name}" for name in inner] + [key for part in parts for key in part]


def _is_section(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
