"""What the command lines of studies share: presets that single options override, and one-line errors that name the argument."""

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from hcl_jax.structure import Hierarchy, Structure

Study = TypeVar("Study")


def peek(arguments: Sequence[str], *names: str) -> dict[str, str | None]:
    """The values of a few options, before all are parsed: those that decide what the defaults are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name)
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None
    return vars(known)


def parse(study: type[Study], arguments: Sequence[str], default: Study, prog: str, description: str | None) -> Study:
    """The study that the command line asks for, from this default on; a bad command line raises `ValueError` in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(study, prog=prog, description=description, args=list(arguments), default=default)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_first_sentence(said.getvalue())) from None
        raise


def _first_sentence(box: str) -> str:
    """What tyro's message says, without its title and frame, and the form of the option that it is about."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = "\n".join("" if set(line) <= {"─", "-"} else line for line in lines).split("\n\n")
    expected = [part.splitlines()[1] for part in parts if part.startswith("Argument helptext:")]
    said = [" ".join(part.split()) for part in parts if not part.startswith(("For full helptext", "Argument helptext"))]
    named = [part for part in said if "--" in part] or said[-1:]
    return "; ".join([named[0].rstrip("."), *(f"expected {form}" for form in expected[:1]), "see --help"])


def error_line(study: Any, error: Exception) -> str:
    """The error in one line, an argument's name in front as it is written on the command line."""
    name, colon, rest = " ".join(str(error).split()).partition(":")
    flags = {field.name: f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(study)} | {"ranks": "--rank"}
    return f"{flags.get(name, name)}{colon}{rest}"


def check_list(name: str, values: Sequence[Any]) -> None:
    """Raise `ValueError` unless there is at least one value, and each once."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}: got {' '.join(map(str, values)) or 'nothing'}; expected at least one value, each once")


def make_hierarchy(dims: Sequence[int], rank: int | None, structures: Sequence[str]) -> Hierarchy:
    """The hierarchy of `--rank` and `--structures`: those listed, or every subset of the modalities.

    >>> str(make_hierarchy((9, 9, 9), 2, ("123:1", "12")))
    '123:1,12:2'
    """
    if structures:
        named = [_parse_structure(text, rank) for text in structures]
        check_list("structures", ["".join(map(str, s)) for s, _ in named])
        try:
            return Hierarchy(dims, dict(named))
        except ValueError as error:
            raise ValueError(str(error).replace("ranks:", "structures:", 1)) from None
    if rank is None:
        raise ValueError("rank: is None; expected a positive integer")
    return Hierarchy.full(dims, rank)


def _parse_structure(text: str, rank: int | None) -> tuple[Structure, int]:
    modalities, _, own = text.partition(":")
    try:
        members = tuple(sorted(int(m) for m in (modalities.split(".") if "." in modalities else modalities)))
        return members, int(own) if own or rank is None else rank
    except ValueError:
        raise ValueError(f"structures: cannot read {text!r}; expected modalities:rank, such as 123:5, or give --rank") from None
