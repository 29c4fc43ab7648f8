"""Results on disk: parquet parts named by content, a manifest, and a reader that takes their union.

    OUTPUT/manifest.json
    OUTPUT/cells/<cell>/<method>/<first>-<last>.parquet

Every file is written under a temporary name and renamed, so that what stands under its own name is whole.
"""

import io
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

PART_SIZE = 20
_PART_NAME = re.compile(r"(\d+)-(\d+)\.parquet")
_PROVENANCE = ("commit", "dirty", "run", "seconds")


class OutputError(Exception):
    """The output folder cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class Identity:
    """What all results of one output folder have in common."""

    study: str
    seed: int
    dtype: str
    version: str


@dataclass(frozen=True)
class Part:
    """Replicates `first` to `last`, both included."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    @property
    def file_name(self) -> str:
        return f"{self.first}-{self.last}.parquet"


def aligned_parts(replicates: list[int]) -> list[Part]:
    """The replicates cut into runs without a gap that end at multiples of 20.

    >>> aligned_parts([*range(25, 41)])
    [Part(first=25, last=39), Part(first=40, last=40)]
    """
    parts: list[Part] = []
    for replicate in sorted(replicates):
        if parts and replicate == parts[-1].last + 1 and replicate % PART_SIZE:
            parts[-1] = Part(parts[-1].first, replicate)
        else:
            parts.append(Part(replicate, replicate))
    return parts


class Store:
    """The results of a study under one folder. Nothing is written before `begin`."""

    def __init__(self, output: Path, identity: Identity):
        """Raises `OutputError` when the folder holds results of another seed, dtype, version or study, or of no manifest."""
        self.output, self.identity = Path(output), identity
        self._manifest = _read_manifest(self.output) or {"identity": asdict(identity), "runs": [], "parts": {}}
        differences = [
            f"{name} {found!r} (this run: {asdict(identity)[name]!r})"
            for name, found in self._manifest["identity"].items()
            if found != asdict(identity).get(name)
        ]
        if differences:
            raise OutputError(f"--output: {output} holds results of {', '.join(differences)}; choose another folder")

    def missing(self, cell: str, method: str, replicates: int) -> list[Part]:
        """The parts that are still to be computed for replicates 0 … replicates − 1."""
        held = {r for part in _parts_in(self._folder(cell, method)) for r in range(part.first, part.last + 1)}
        return aligned_parts([r for r in range(replicates) if r not in held])

    def begin(self, run: dict[str, Any]) -> None:
        """Record a run (configuration, command line, versions, device); raises `OutputError` if the folder cannot be written."""
        self._commit, self._dirty = _git_state()
        for path in _part_paths(self.output):  # parts that a killed run wrote after its last manifest
            self._manifest["parts"].setdefault(self._key(path), _read_provenance(path))
        self._manifest["runs"].append(run)
        self.write_manifest()

    def write(self, cell: str, method: str, part: Part, table: pl.DataFrame, seconds: float) -> None:
        """Write one part, whole or not at all; its provenance is in the file, and in the manifest when that is next written."""
        path = self._folder(cell, method) / part.file_name
        values = (self._commit, self._dirty, len(self._manifest["runs"]) - 1, round(seconds, 3))
        provenance = dict(zip(_PROVENANCE, values, strict=True))
        buffer = io.BytesIO()
        table.write_parquet(buffer, metadata={"provenance": json.dumps(provenance)})
        write_bytes(path, buffer.getvalue(), self.output)
        self._manifest["parts"][self._key(path)] = provenance

    def write_manifest(self) -> None:
        """Bring the manifest on disk up to date."""
        self._manifest["parts"] = dict(sorted(self._manifest["parts"].items()))
        text = json.dumps(self._manifest, indent=1, default=str) + "\n"
        write_bytes(self.output / "manifest.json", text.encode(), self.output)

    def _folder(self, cell: str, method: str) -> Path:
        return self.output / "cells" / cell / method

    def _key(self, path: Path) -> str:
        return path.relative_to(self.output / "cells").as_posix()


def read_results(output: Path) -> pl.DataFrame:
    """All finished parts of a study as one tidy table.

    Raises `OutputError` when the folder holds no results, or parts that overlap.
    """
    output = Path(output)
    if _read_manifest(output) is None:
        raise OutputError(f"--output: {output} holds no results; expected a folder that a study has written")
    paths = list(_part_paths(output))
    for folder in {path.parent for path in paths}:
        _refuse_overlaps(folder)
    if not paths:
        raise OutputError(f"--output: {output} holds no finished part yet")
    return pl.scan_parquet(sorted(paths), glob=False, hive_partitioning=False).collect()


def _part_paths(output: Path) -> Iterator[Path]:
    return (path for path in output.glob("cells/*/*/*.parquet") if _PART_NAME.fullmatch(path.name))


def _parts_in(folder: Path) -> list[Part]:
    matches = [_PART_NAME.fullmatch(path.name) for path in folder.glob("*.parquet")]
    return sorted((Part(int(match[1]), int(match[2])) for match in matches if match), key=lambda part: part.first)


def _refuse_overlaps(folder: Path) -> None:
    parts = _parts_in(folder)
    for one, other in zip(parts[:-1], parts[1:], strict=True):
        if other.first <= one.last:
            raise OutputError(
                f"--output: parts {one.file_name} and {other.file_name} overlap in {folder}; expected each replicate once"
            )


def _read_manifest(output: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    except FileNotFoundError:
        if (output / "cells").exists():
            raise OutputError(f"--output: {output} has results but no manifest.json; choose another folder") from None
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"--output: {output / 'manifest.json'} cannot be read ({_reason(error)})") from None
    return manifest


def _read_provenance(path: Path) -> dict[str, Any]:
    provenance: dict[str, Any] = json.loads(pl.read_parquet_metadata(path).get("provenance", "{}"))
    return provenance


def _git_state() -> tuple[str | None, bool | None]:
    """The commit that this package is run from and whether files differ from it; None outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def write_bytes(path: Path, content: bytes, output: Path) -> None:
    """Write a file whole or not at all; raises `OutputError` that names `output`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _output_errors(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"--output: {output} cannot be written ({_reason(error)}); expected a writable folder") from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
