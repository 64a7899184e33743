"""Every setting of an experiment with its meaning, range and default, read from the sections themselves."""

import ast
import inspect
import itertools
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from shared.experiment.base import Section
from shared.experiment.config import Experiment

WIDTH = 110
_SIGNS = {"gt": "above {}", "ge": "from {}", "lt": "below {}", "le": "up to {}"}


@dataclass(frozen=True)
class Setting:
    """One setting."""

    section: str
    name: str
    meaning: str
    range: str
    default: Any

    @property
    def key(self) -> str:
        """As `--set` takes it."""
        return f"{self.section}.{self.name}"


def settings() -> Iterator[Setting]:
    """All settings, in the order of an experiment file."""
    for section, info in Experiment.model_fields.items():
        kind = _section(info)
        for name, field in kind.model_fields.items():
            meaning = meanings(kind).get(name, "")
            yield Setting(section, name, meaning, _range(field), field.get_default(call_default_factory=True))


@cache
def meanings(kind: type[Section]) -> dict[str, str]:
    """The text below each field of a section, where it is declared."""
    tree = ast.parse(Path(inspect.getfile(kind)).read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(inspect.cleandoc(ast.literal_eval(text.value)).split())
    return found


def to_annotated_toml(experiment: Experiment) -> str:
    """The experiment as a file, every setting with its meaning, range and default in comments above it."""
    values = {section: getattr(experiment, section) for section in Experiment.model_fields}
    lines: list[str] = []
    for each in settings():
        if f"[{each.section}]" not in lines:
            lines += ["", f"# {inspect.cleandoc(type(values[each.section]).__doc__ or '')}", f"[{each.section}]"]
        facts = f"{each.meaning} ({each.range}; default {_toml(each.default)})"
        lines += [f"# {part}" for part in _wrapped(facts)]
        lines.append(f"{each.name} = {_toml(getattr(values[each.section], each.name))}")
    return "\n".join(lines).strip() + "\n"


def json_schema() -> str:
    """A JSON schema of experiment files, for editors."""
    schema = Experiment.model_json_schema()
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "maskfed experiment"}
    for each in settings():
        owner = _section(Experiment.model_fields[each.section]).__name__
        schema["$defs"][owner]["properties"][each.name]["description"] = each.meaning
    return json.dumps(schema, indent=2) + "\n"


def _section(info: FieldInfo) -> type[Section]:
    assert isinstance(info.annotation, type)
    assert issubclass(info.annotation, Section)
    return info.annotation


def _range(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    limits = _limits(field.metadata)
    return " ".join([_kind(field.annotation), *limits])


def _limits(metadata: list[Any]) -> list[str]:
    found = []
    for rule in metadata:
        for sign, words in _SIGNS.items():
            value = getattr(rule, sign, None)
            if isinstance(value, int | float):
                found.append(words.format(_number(value)))
        if (most := getattr(rule, "max_length", None)) is not None:
            found.append(f"at most {most}")
    return found


def _number(value: float) -> str:
    power = math.log2(value) if value > 2**20 else 0.5
    return f"2^{int(power)}" if power.is_integer() else f"{value:g}"


def _kind(annotation: Any) -> str:  # noqa: ANN401  # a type, in one of typing's many forms
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(_toml, arguments))
    if origin is typing.Annotated:
        return " ".join([_kind(arguments[0]), *_limits([meta for each in arguments[1:] for meta in _rules(each)])])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_kind, arguments))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    return {int: "integer", float: "number", bool: "true | false", str: "text"}.get(annotation, str(annotation))


def _rules(meta: Any) -> list[Any]:  # noqa: ANN401  # pydantic's own
    return list(meta.metadata) if isinstance(meta, FieldInfo) else [meta]


def _toml(value: Any) -> str:  # noqa: ANN401  # any value of a setting
    match value:
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case str():
            return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)
