"""What sections of an experiment, settings and messages have in common: how strictly they are read."""

from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Frozen, and an unknown key is an error: a typo must never train the wrong thing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """`true` is no number, though Python counts it as 1."""
        given = value if isinstance(value, list | tuple) else (value,)
        # The type is looked at last: a long ledger is half a million fields.
        has_bool = any(isinstance(each, bool) for each in given)
        if has_bool and _is_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("give a number, not true or false")
        return value


def _is_number(kind: object) -> bool:
    """Whether a field holds a number, or several."""
    return kind in (int, float) or any(_is_number(each) for each in get_args(kind))
