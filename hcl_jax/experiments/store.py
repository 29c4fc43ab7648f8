"""Results on disk: parquet parts named by content, a manifest, and a reader that takes their union.

    OUTPUT/manifest.json
    OUTPUT/cells/<cell>/<method>/<first>-<last>.parquet
    OUTPUT/locks/…

Every file is written under a temporary name and renamed, so that what stands under its own name is whole. Any number of
processes may share a folder: they claim what they compute, and merge what they say in the manifest, under locks of the operating
system, which a process that dies lets go of.
"""

import io
import json
import os
import re
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

PART_SIZE = 20
MANIFEST_WAIT = 60.0
"""Seconds that a process waits for others to finish with the manifest, which takes them a moment each."""
_PART_NAME = re.compile(r"(\d+)-(\d+)\.parquet")
_LEFT_OVER = re.compile(r"\.(\d+)-(\d+)\.parquet\..*\.tmp")


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
    """The results of a study under one folder. Nothing is written before `begin`. May be sent to another process."""

    def __init__(self, output: Path, identity: Identity):
        """Raises `OutputError` when the folder holds results of another seed, dtype, version or study, or of no manifest."""
        self.output, self.identity = Path(output).absolute(), identity
        self.unusable: dict[Path, str] = {}
        """Files that `missing` found in the place of a part, and what is wrong with them."""
        self._manifest()

    def missing(self, cell: str, method: str, stop: int, first: int = 0) -> list[Part]:
        """The parts that are still to be computed for replicates first … stop − 1. A damaged file does not count as a part."""
        held: set[int] = set()
        for path, part in self._parts_among(cell, method, first, stop):
            try:
                _read_part(path)
            except UnusablePartError as error:
                self.unusable[path] = str(error)
            else:
                held.update(range(part.first, part.last + 1))
        return aligned_parts([r for r in range(first, stop) if r not in held])

    def clean(self, cell: str, method: str, stop: int, first: int) -> None:
        """Set damaged files among these replicates aside, and remove what dead processes left: for whoever has claimed them."""
        with _output_errors(self.output):
            for path in self._folder(cell, method).glob(".*.tmp"):
                match = _LEFT_OVER.fullmatch(path.name)
                if match and first <= int(match[1]) < stop:
                    path.unlink(missing_ok=True)
            for path, _ in self._parts_among(cell, method, first, stop):
                try:
                    _read_part(path)
                except UnusablePartError:
                    path.replace(set_aside_name(path))

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process has the named piece of work to itself while the block runs: False if another one has it."""
        with self._lock(name, wait=0.0) as held:
            yield held

    def begin(self, run: dict[str, Any]) -> None:
        """Record a run (configuration, command line, versions, device); raises `OutputError` if the folder cannot be written,
        or another process has begun to write results of another identity into it."""
        with self._manifest_lock():
            manifest = self._manifest()
            self._run = len(manifest["runs"])
            manifest["runs"].append(run)
            self._write_manifest(manifest)

    def check_shared(self) -> None:
        """Raise `OutputError` unless the folder that a run has begun to write is seen from this machine."""
        if not (self.output / "manifest.json").exists():
            raise OutputError(
                f"--output: {self.output} is not seen from {socket.gethostname()}; expected a folder that all machines share"
            )

    def write(self, cell: str, method: str, part: Part, table: pl.DataFrame, seconds: float, device: str = "") -> None:
        """Write one part, whole or not at all; its provenance is in the file, and in the manifest when that is next written."""
        commit, dirty = _git_state()
        provenance = {"commit": commit, "dirty": dirty, "run": self._run, "seconds": round(seconds, 3), "device": device}
        buffer = io.BytesIO()
        table.write_parquet(buffer, metadata={"provenance": json.dumps(provenance)})
        write_bytes(self._folder(cell, method) / part.file_name, buffer.getvalue(), self.output)

    def write_manifest(self) -> None:
        """Bring the manifest on disk up to date with all parts that are there, whoever wrote them."""
        with self._manifest_lock():
            self._write_manifest(self._manifest())

    def _manifest(self) -> dict[str, Any]:
        manifest = _read_manifest(self.output) or {"identity": asdict(self.identity), "runs": [], "parts": {}}
        own = asdict(self.identity)
        differences = [
            f"{name} {found!r} (this run: {own.get(name)!r})"
            for name, found in manifest["identity"].items()
            if found != own.get(name)
        ]
        if differences:
            raise OutputError(f"--output: {self.output} holds results of {', '.join(differences)}; choose another folder")
        return manifest

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        manifest["parts"] = {
            path.relative_to(self.output / "cells").as_posix(): provenance
            for path in sorted(_part_paths(self.output))
            if (provenance := _read_provenance(path)) is not None
        }
        text = json.dumps(manifest, indent=1, default=str) + "\n"
        write_bytes(self.output / "manifest.json", text.encode(), self.output)

    @contextmanager
    def _manifest_lock(self) -> Iterator[None]:
        with self._lock("manifest", MANIFEST_WAIT) as held:
            if not held:
                raise OutputError(f"--output: {self.output / 'manifest.json'} was locked for {MANIFEST_WAIT:.0f} s; try again")
            yield

    @contextmanager
    def _lock(self, name: str, wait: float) -> Iterator[bool]:
        with _output_errors(self.output):
            path = self.output / "locks" / f"{name}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a process that is killed
            try:
                lock.acquire(timeout=wait)
            except Timeout:
                held = False
            else:
                held = True
        try:
            yield held
        finally:
            lock.release()

    def _folder(self, cell: str, method: str) -> Path:
        return self.output / "cells" / cell / method

    def _parts_among(self, cell: str, method: str, first: int, stop: int) -> list[tuple[Path, Part]]:
        folder = self._folder(cell, method)
        return [(folder / p.file_name, p) for p in _parts_in(folder) if p.first < stop and p.last >= first]


def read_results(output: Path) -> pl.DataFrame:
    """All finished parts of a study as one tidy table.

    Raises `OutputError` when the folder holds no results, parts that overlap, or a file that is not the part that it is named.
    """
    output = Path(output)
    if _read_manifest(output) is None:
        raise OutputError(f"--output: {output} holds no results; expected a folder that a study has written")
    paths = sorted(_part_paths(output))
    for folder in {path.parent for path in paths}:
        _refuse_overlaps(folder)
    if not paths:
        raise OutputError(f"--output: {output} holds no finished part yet")
    try:
        return pl.concat([_read_part(path) for path in paths])
    except UnusablePartError as error:
        raise OutputError(f"--output: {error}; run the study again to have it computed anew, or delete the file") from None


class UnusablePartError(Exception):
    """A file has the name of a part and is not that part; the message is one line that names it."""


def _read_part(path: Path) -> pl.DataFrame:
    """The rows of one part. Raises `UnusablePartError` for a file that is cut off, or holds other rows than its name says."""
    match = _PART_NAME.fullmatch(path.name)
    assert match is not None
    part, constants = Part(int(match[1]), int(match[2])), {"cell": path.parent.parent.name, "method": path.parent.name}
    try:
        table = pl.read_parquet(path, glob=False, hive_partitioning=False)
        rows = table.group_by("replicate").len().sort("replicate")
        whole = rows["replicate"].to_list() == [*range(part.first, part.last + 1)] and rows["len"].n_unique() == 1
        own = all(table[name].unique().to_list() == [value] for name, value in constants.items())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UnusablePartError(f"{path} cannot be read ({_reason(error)})") from None
    if not (whole and own):
        raise UnusablePartError(f"{path} holds other rows than replicates {part.first} to {part.last} of this cell and method")
    return table


def set_aside_name(path: Path) -> Path:
    """Where a damaged part is moved."""
    return path.with_name(f"{path.name}.unreadable")


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


def _read_provenance(path: Path) -> dict[str, Any] | None:
    try:
        provenance: dict[str, Any] = json.loads(pl.read_parquet_metadata(path).get("provenance", "{}"))
    except (OSError, ValueError, pl.exceptions.PolarsError):  # damaged, or set aside this moment
        return None
    return provenance


@cache
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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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
