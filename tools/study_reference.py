"""The reference of study files, written from the models that check them: each key, its type, default and meaning.

`mkdocs.yml` names this module as a hook: the page `docs/study-file.md` gets the tables where it says MARKER. What a key
means is the string below its field, else what the method says of it as an axis. Neither torch nor Ray is loaded.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, cast

from pydantic import BaseModel

from bdense_core.methods import AnyMethod
from bdense_core.methods.base import Method
from search.sections import ComparisonSection
from search.space import SearchSpace
from search.spec import StudySpec

MARKER = "<!-- every key of a study file -->"
_NOTES = re.compile(r"\s*\((?:spec/methods\.md|spec)[ :][^)]*\)")
"""References to the project's notes on the papers, which are not part of the site."""
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NUMBERS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    type: str
    default: str
    meaning: str


def reference() -> str:
    """The whole reference as Markdown, a heading and a table for each section."""
    parts = ["## The study itself", _table(StudySpec, skipped=_sections(StudySpec))]
    for name, section in _sections(StudySpec).items():
        parts += [f"## {name}", _about(section), _table(section)]
    parts += ["## method", _chosen(AnyMethod, "kind")]
    parts += ["## space", _chosen(SearchSpace, "family")]
    return "\n\n".join(part for part in parts if part)


def keys_of(model: type) -> list[Key]:
    """The keys of one section, method or family, in the order of their declaration."""
    return [_key(model, name, annotation) for name, annotation in _annotations(model)]


def on_page_markdown(markdown: str, **_kwargs: object) -> str:
    """What mkdocs calls for each page."""
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections that have a heading of their own, by their keys; nobody writes a comparison by hand."""
    found = {}
    for name, info in model.model_fields.items():
        for member in _members(info.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel) and name not in ("space", "constraints"):
                found[name] = member
    return {name: section for name, section in found.items() if section is not ComparisonSection}


def _chosen(union: Any, by: str) -> str:
    """A heading and a table for each member of a union that a key tells apart."""
    parts = []
    for member in map(_bare, _members(_bare(union))):
        named = next(key for key in keys_of(member) if key.name == by)
        parts += [f"### {by}: {named.default.strip('`')}", _about(member), _table(member, skipped=(by,))]
    return "\n\n".join(parts)


def _table(model: type, skipped: typing.Container[str] = ()) -> str:
    rows = [key for key in keys_of(model) if key.name not in skipped]
    lines = [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" for key in rows]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *lines])


def _about(model: type) -> str:
    return _clean(inspect.cleandoc(model.__doc__ or ""))


def _annotations(model: type) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(model, include_extras=True)
    names = (
        model.model_fields
        if issubclass(model, BaseModel)
        else [field.name for field in dataclasses.fields(cast(Any, model))]
    )
    yield from ((name, hints[name]) for name in names)


def _key(model: type, name: str, annotation: Any) -> Key:
    default, limits = _default_and_limits(model, name)
    return Key(name=name, type=_type(annotation) + limits, default=default, meaning=_meaning(model, name))


def _default_and_limits(model: type, name: str) -> tuple[str, str]:
    if not issubclass(model, BaseModel):
        (field,) = (field for field in dataclasses.fields(cast(Any, model)) if field.name == name)
        return _value(field.default, is_missing=field.default is dataclasses.MISSING), ""
    info = model.model_fields[name]
    limits = [f"{word} {getattr(m, key):g}" for m in info.metadata for key, word in _LIMITS.items() if hasattr(m, key)]
    default = info.get_default(call_default_factory=True)
    return _value(default, is_missing=info.is_required()), (", " + " and ".join(limits)) if limits else ""


def _value(value: Any, *, is_missing: bool) -> str:
    if is_missing:
        return "must be given"
    if isinstance(value, BaseModel):
        return "as below"
    if value is None or value in ("", (), {}):
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{part:g}' for part in value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any) -> str:
    bare, origin, members = _bare(annotation), typing.get_origin(_bare(annotation)), _members(_bare(annotation))
    if type(None) in members or len(members) > 1:
        return " or ".join(dict.fromkeys(_type(member) for member in members if member is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(bare))
    if origin is tuple:
        inner = typing.get_args(bare)
        return f"list of {_type(inner[0])}" if inner[-1] is Ellipsis else f"[{', '.join(map(_type, inner))}]"
    return "section" if origin is dict or bare not in _NUMBERS else _NUMBERS[bare]


def _bare(annotation: Any) -> Any:
    return _bare(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is typing.Annotated else annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _meaning(model: type, name: str) -> str:
    found = next((texts[name] for cls in (*model.__mro__, Method) if name in (texts := _texts(cls))), "")
    if not found and model in typing.get_args(AnyMethod) and name in (axes := model().axes()):
        found = f"{axes[name].about[0].upper()}{axes[name].about[1:]}."
    return _clean(found).replace("\n", " ").replace("|", "\\|")


@cache
def _texts(cls: type) -> dict[str, str]:
    """The string below each field, and in each property, of a class, as its source has it."""
    if cls.__module__.partition(".")[0] not in ("bdense_core", "search"):
        return {}
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    found = {node.name: ast.get_docstring(node) or "" for node in body if isinstance(node, ast.FunctionDef)}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _clean(text: str) -> str:
    return _NOTES.sub("", text)
