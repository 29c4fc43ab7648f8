"""Cells are named by content, and what is stored is whole, identified and read back as the union of its parts."""

import errno
import json
import os
import zlib

import polars as pl
import pytest

from hcl_jax import Hierarchy
from hcl_jax.experiments.cell import Cell, path_name
from hcl_jax.experiments.store import Identity, OutputError, Part, Store, aligned_parts, read_results

IDENTITY = Identity("recovery", seed=0, dtype="float64", version="0.1.0")


def table(part: Part) -> pl.DataFrame:
    replicates = list(range(part.first, part.last + 1))
    constants = {"cell": "cell", "method": "m"}
    return pl.DataFrame({"replicate": replicates, "value": [float(r) for r in replicates]}).with_columns(
        **{name: pl.lit(value) for name, value in constants.items()}
    )


def store_with(output, *parts: Part, cell: str = "cell", method: str = "m") -> Store:
    store = Store(output, IDENTITY)
    store.begin({"command": "test"})
    for part in parts:
        store.write(cell, method, part, table(part), seconds=1.0)
    store.write_manifest()
    return store


def test_parts_end_at_multiples_of_twenty():
    assert aligned_parts(list(range(45))) == [Part(0, 19), Part(20, 39), Part(40, 44)]
    assert aligned_parts(list(range(25, 41))) == [Part(25, 39), Part(40, 40)]
    assert aligned_parts([0, 1, 5]) == [Part(0, 1), Part(5, 5)]
    assert aligned_parts([]) == []


def test_only_what_is_not_stored_is_missing(tmp_path):
    store = store_with(tmp_path, Part(0, 19), Part(20, 24))
    assert store.missing("cell", "m", 20) == []
    assert store.missing("cell", "m", 45) == [Part(25, 39), Part(40, 44)]
    assert store.missing("cell", "other", 3) == [Part(0, 2)]


def test_the_reader_takes_the_union_and_ignores_unfinished_files(tmp_path):
    store_with(tmp_path, Part(0, 19), Part(20, 24))
    (tmp_path / "cells/cell/m/.25-39.parquet.1.tmp").write_bytes(b"half")
    assert sorted(read_results(tmp_path)["replicate"]) == list(range(25))


def test_overlapping_parts_are_refused(tmp_path):
    store_with(tmp_path, Part(0, 19), Part(10, 24))
    with pytest.raises(OutputError, match=r"--output: parts 0-19.parquet and 10-24.parquet overlap"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("identity", "difference"),
    [
        (Identity("recovery", 1, "float64", "0.1.0"), "seed 0 \\(this run: 1\\)"),
        (Identity("recovery", 0, "float32", "0.1.0"), "dtype 'float64' \\(this run: 'float32'\\)"),
        (Identity("recovery", 0, "float64", "0.2.0"), "version '0.1.0' \\(this run: '0.2.0'\\)"),
    ],
)
def test_another_identity_is_refused_with_the_difference(tmp_path, identity, difference):
    store_with(tmp_path, Part(0, 1))
    with pytest.raises(OutputError, match=difference):
        Store(tmp_path, identity)


def test_results_without_a_manifest_are_refused(tmp_path):
    store_with(tmp_path, Part(0, 1))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(OutputError, match="no manifest"):
        Store(tmp_path, IDENTITY)


def test_the_manifest_finds_the_parts_of_a_killed_run(tmp_path):
    store = store_with(tmp_path, Part(0, 19))
    store.write("cell", "m", Part(20, 24), table(Part(20, 24)), seconds=2.0)  # killed before the next manifest
    store_with(tmp_path, Part(25, 39))
    parts = json.loads((tmp_path / "manifest.json").read_text())["parts"]
    assert [name for name in parts] == ["cell/m/0-19.parquet", "cell/m/20-24.parquet", "cell/m/25-39.parquet"]
    assert parts["cell/m/20-24.parquet"]["seconds"] == 2.0
    assert all({"commit", "dirty", "run"} <= set(part) for part in parts.values())


def test_a_full_disc_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = store_with(tmp_path, Part(0, 19))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"--output: .* cannot be written \(No space left on device\)") as caught:
        store.write("cell", "m", Part(20, 24), table(Part(20, 24)), seconds=1.0)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "cells/cell/m") == ["0-19.parquet"]


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    for output in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(OutputError, match="--output: "):
            Store(output, IDENTITY).begin({})


def test_a_folder_without_results_is_no_input(tmp_path):
    with pytest.raises(OutputError, match="holds no results"):
        read_results(tmp_path / "absent")


def test_cells_are_named_by_content():
    cell = Cell(Hierarchy.full((6, 5), 2), n=1000, noise_variance=0.1)
    assert cell.name == "dims=6x5,rank=2,n=1000,noise_variance=0.1"
    listed = Cell(Hierarchy((6, 5), {(1, 2): 2, (2,): 1}), 10, 1.0, latent="t", sampling="data", fitted="low")
    assert listed.name == "dims=6x5,ranks=12r2+2r1,n=10,noise_variance=1,latent=t,sampling=data,fitted=low"
    assert listed.columns()["rank"] == -1
    assert listed.columns()["structures"] == "12,2"


def test_long_names_are_cut_and_completed_by_their_checksum():
    label = "x" * 150
    name = Cell(Hierarchy.full((6, 5), 1), 10, 1.0, loadings=label).name
    whole = f"dims=6x5,rank=1,n=10,noise_variance=1,loadings={label}"
    assert len(name) == 120
    assert name == f"{whole[:111]}-{zlib.crc32(whole.encode()):08x}"


def test_names_tell_numbers_apart_to_the_last_digit():
    names = [Cell(Hierarchy.full((6, 5), 2), 10, noise).name for noise in (0.3, 0.30000000000000004, 1e-300, 1.0)]
    assert [name.rpartition("=")[2] for name in names] == ["0.3", "0.30000000000000004", "1e-300", "1"]


@pytest.mark.parametrize("label", ["rna/counts", "..", "a\nb", "β" * 200, "x" * 300, "a:b*?"])
def test_a_cell_of_any_label_is_stored_found_and_told_apart(tmp_path, label):
    cell, other = (Cell(Hierarchy.full((6, 5), 1), 10, 1.0, loadings=name) for name in (label, label + "'"))
    assert cell.name != other.name
    assert path_name(cell.name) == cell.name
    assert len(cell.name.encode()) <= 120
    store = Store(tmp_path, IDENTITY)
    store.begin({})
    part = Part(0, 1)
    store.write(cell.name, "m", part, table(part).with_columns(cell=pl.lit(cell.name)), seconds=1.0)
    assert store.missing(cell.name, "m", 2) == []
    assert set(read_results(tmp_path)["cell"]) == {cell.name}
    assert len(list(tmp_path.glob("cells/*"))) == 1
    with store.claim(f"{cell.name}/0") as held:
        assert held


def test_the_fitted_hierarchy_does_not_change_the_data():
    cells = [Cell(Hierarchy.full((6, 5), 1), 10, 1.0, fitted=fitted) for fitted in ("true", "high")]
    assert cells[0].draw_checksum == cells[1].draw_checksum
    assert cells[0].name != cells[1].name
