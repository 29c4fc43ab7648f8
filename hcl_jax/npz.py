"""One .npz file of arrays and a description in JSON: no pickle, written whole or not at all."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hcl_jax.views import UNREADABLE

DESCRIPTION = "description"


def checked_destination(path: Path | str) -> Path:
    """The path of a file that is to be written. Raises `ValueError` for a folder that does not exist, and for a folder."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: the folder {path.parent} does not exist; expected one to write {path.name} to")
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder; expected a file to write to")
    return path


def write_npz(path: Path | str, description: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write the arrays under their names beside the description, first to a temporary name. Raises `ValueError` for a folder
    that does not exist."""
    path = checked_destination(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        held: dict[str, Any] = {DESCRIPTION: np.array(json.dumps(description))}
        np.savez(file, **held | {name: np.asarray(array) for name, array in arrays.items()})
    temporary.replace(path)


def read_npz(path: Path | str, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(description, arrays) of a file that `write_npz` wrote. Raises `ValueError` for one that it did not; `what` is expected."""
    try:
        with Path(path).open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            description = json.loads(str(file[DESCRIPTION]))
            return description, {name: file[name] for name in file.files if name != DESCRIPTION}
    except FileNotFoundError:
        raise ValueError(f"path: no file {path}; expected {what}") from None
    except (*UNREADABLE, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: {path} cannot be read ({error}); expected {what}") from None
