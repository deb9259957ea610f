"""The settings of a stage: one dataclass, from which flags, ``--help`` and checks derive.

A setting is one line of the dataclass; a field that is itself a dataclass is a part, whose settings become a group of flags::

    @dataclass(frozen=True)
    class LossSettings:
        temperature: float = setting(0.5, check=positive_float, help="of the contrastive loss")

    @dataclass(frozen=True)
    class TrainSettings:
        output_dir: str = setting("output/model", help="where the model goes")
        mode: str = setting("contrastive", choices=("contrastive", "pairwise"), help="the loss")
        merge: bool = setting(True, help="save the merged weights")
        loss: LossSettings = part(LossSettings)

    parser = argparse.ArgumentParser()
    add_settings(parser, TrainSettings)
    args = parser.parse_args(["--merge", "0", "--temperature", "2"])
    settings = settings_from(args, TrainSettings)
    # TrainSettings(output_dir='output/model', mode='contrastive', merge=False, loss=LossSettings(temperature=2.0))
    flag_values(settings)
    # {'output_dir': 'output/model', 'mode': 'contrastive', 'merge': False, 'temperature': 2.0}

The module that holds a stage's dataclass imports nothing heavy: ``--help`` answers before torch would be imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Settings = TypeVar("Settings")

# Choices that several stages have, here because the modules that act on them are heavy.
OVERLENGTH_POLICIES = ("drop", "left", "keep_end", "error")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PACKINGS = ("auto", "shared", "packed", "off")
TEMPLATE_HELP = (
    "for a tokenizer without a chat template, or instead of its own: a Jinja file, chatml, or the name of one of its own; "
    "empty: its own"
)


def setting(
    default: Any = MISSING,
    *,
    help: str,
    check: Callable[[str], Any] | None = None,
    choices: Sequence[str | int] | None = None,
) -> Any:
    """One setting, the value of a dataclass's field.

    Args:
        default: Left out: the flag must be given. A function: gives the default when it is needed, from the environment.
        help: What ``--help`` says; the default is added to it.
        check: Argparse type: the text of a flag -> its value; None: what the annotation is (str, int, float, Path; bool: 0 or
            1; Literal: one of its texts).
        choices: The values that it may have; None: those of a Literal, else any.
    """
    metadata = {"help": help, "check": check, "choices": choices}
    if isinstance(default, dict | list | set):  # every instance gets its own
        return field(default_factory=lambda: copy(default), metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def part(cls: type[Settings]) -> Any:
    """A field that holds the settings of a part, all at their defaults unless flags say otherwise."""
    return field(default_factory=cls)


def switch(text: str) -> bool:
    """Argparse type: ``0`` or ``1``."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")
    return text == "1"


def add_settings(parser: argparse.ArgumentParser | argparse._ArgumentGroup, cls: type) -> None:
    """Give a parser one flag for every setting of a dataclass; each part is a group with the name of its field.

    Raises:
        TypeError: A setting's annotation is none of str, int, float, bool, Path and Literal, and it names no ``check``.
    """
    types = get_type_hints(cls)
    for one in fields(cls):
        kind: type = types[one.name]
        if is_dataclass(kind):
            add_settings(parser.add_argument_group(one.name.replace("_", " ")), types[one.name])
            continue
        is_literal = get_origin(kind) is Literal
        readers: dict[Any, Callable[[str], Any]] = {bool: switch, str: str, int: int, float: float, Path: Path}
        check = one.metadata["check"] or (str if is_literal else readers.get(kind))
        if check is None:
            raise TypeError(f"{cls.__name__}.{one.name} is annotated {kind} and needs a check")
        default = default_of(one)
        text = one.metadata["help"]
        if default not in (MISSING, "", None) and default != {}:
            text += f" (default: {_as_flag(default)})"
        parser.add_argument(
            f"--{one.name}",
            type=check,
            choices=get_args(kind) if is_literal else one.metadata["choices"],
            default=None if default is MISSING else default,
            required=default is MISSING,
            metavar="{0,1}" if kind is bool else None,
            help=text.replace("%", "%%"),
        )


def settings_from(args: argparse.Namespace, cls: type[Settings]) -> Settings:
    """The dataclass, filled with the parsed flags of ``add_settings``; what ``args`` holds besides is not read."""
    types = get_type_hints(cls)
    return cls(
        **{
            one.name: settings_from(args, types[one.name]) if is_dataclass(types[one.name]) else getattr(args, one.name)
            for one in fields(cls)  # type: ignore[arg-type]
        }
    )


def flag_values(settings: Any) -> dict[str, Any]:
    """Flag -> value, the parts' flags in one row with the others: what a run writes down of its settings."""
    values: dict[str, Any] = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        values |= flag_values(value) if is_dataclass(value) else {one.name: value}
    return values


def default_of(one: Field[Any]) -> Any:
    """A field's default; ``MISSING`` where it has none."""
    return one.default if one.default_factory is MISSING else one.default_factory()


def _as_flag(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
