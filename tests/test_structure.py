"""The bookkeeping of structures, and refusals that name what is wrong."""

import pickle
from itertools import combinations

import numpy as np
import pytest
from helpers import CHAIN, HIERARCHIES, LATTICE, TWO, UNEVEN

from hcl_jax import Hierarchy
from hcl_jax.structure import as_structure, full_lattice, structure_name


def test_structures_stand_larger_first_then_lexicographically():
    assert full_lattice(3) == ((1, 2, 3), (1, 2), (1, 3), (2, 3), (1,), (2,), (3,))
    shuffled = Hierarchy((5, 5, 5), {(3,): 1, (2, 1): 2, (3, 2, 1): 1, (1,): 0, (1, 3): 1})
    assert shuffled.structures == ((1, 2, 3), (1, 2), (1, 3), (3,))
    assert shuffled.ranks == (((1, 2, 3), 1), ((1, 2), 2), ((1, 3), 1), ((3,), 1))


def test_the_full_lattice_counts_every_subset_once():
    for n_modalities in range(1, 11):
        subsets = {s for size in range(1, n_modalities + 1) for s in combinations(range(1, n_modalities + 1), size)}
        assert set(full_lattice(n_modalities)) == subsets
        assert len(full_lattice(n_modalities)) == 2**n_modalities - 1


@pytest.mark.parametrize("hierarchy", HIERARCHIES, ids=str)
def test_mask_rows_and_columns_tell_the_same_story(hierarchy):
    expected = np.zeros((hierarchy.n_features, hierarchy.n_factors), bool)
    row_ends, column_ends = np.cumsum(hierarchy.dims), np.cumsum([rank for _, rank in hierarchy.ranks])
    for (s, rank), end in zip(hierarchy.ranks, column_ends, strict=True):
        for m in s:
            expected[row_ends[m - 1] - hierarchy.dims[m - 1] : row_ends[m - 1], end - rank : end] = True
    np.testing.assert_array_equal(hierarchy.mask, expected)
    np.testing.assert_array_equal(
        np.concatenate([np.flatnonzero(expected[hierarchy.rows(m)].any(1)) for m in hierarchy.modalities]),
        np.concatenate([np.arange(dim) for dim in hierarchy.dims]),
    )
    for m in hierarchy.modalities:
        np.testing.assert_array_equal(hierarchy.active_columns(m), np.flatnonzero(expected[hierarchy.rows(m)][0]))
        np.testing.assert_array_equal(hierarchy.modality_of_feature[hierarchy.rows(m)], m - 1)
    for s in hierarchy.structures:
        np.testing.assert_array_equal(hierarchy.structure_rows(s), np.flatnonzero(expected[:, hierarchy.columns(s)].all(1)))


def test_equal_hierarchies_are_one_static_argument():
    again = Hierarchy([9, 7], {(2,): 2, (2, 1): 2, (1,): 1})
    assert again == TWO
    assert hash(again) == hash(TWO)
    assert pickle.loads(pickle.dumps(again)) == TWO
    assert Hierarchy((9, 7), {(1, 2): 2, (1,): 1, (2,): 1}) != TWO


def test_common_hierarchies():
    assert LATTICE.structures == full_lattice(3)
    jive = Hierarchy.shared_and_private((6, 7, 8), shared=3, private=2)
    assert dict(jive.ranks) == {(1, 2, 3): 3, (1,): 2, (2,): 2, (3,): 2}
    assert Hierarchy.full((4,), 2).structures == ((1,),)
    assert Hierarchy.full((3,) * 2, 1).n_factors == 3
    assert Hierarchy.full((512,) * 10, 1).n_factors == 1023
    assert UNEVEN.rank((1, 3)) == 1
    assert UNEVEN.rank((1, 2)) == 0
    assert CHAIN.n_modalities == 4
    assert CHAIN.n_features == 19


def test_union_holds_both():
    other = Hierarchy((9, 7), {(1, 2): 1, (1,): 3})
    union = TWO.union(other)
    assert dict(union.ranks) == {(1, 2): 2, (1,): 3, (2,): 2}
    assert union == other.union(TWO)
    assert TWO.union(TWO) == TWO
    with pytest.raises(ValueError, match=r"other: its dims are \(9, 8\); expected \(9, 7\)"):
        TWO.union(Hierarchy((9, 8), {(1,): 1}))


def test_a_union_need_not_be_identifiable():
    tight, other = Hierarchy((2, 5), {(1, 2): 2}), Hierarchy((2, 5), {(1,): 2})
    assert tight.union(other).n_factors == 4


def test_names_of_structures():
    assert str(TWO) == "12:2,1:1,2:2"
    assert structure_name((1, 2, 3)) == "123"
    assert structure_name((2, 10)) == "2.10"


def test_every_structure_is_read_from_its_name():
    for n_modalities in (3, 9, 10, 12):
        lattice = full_lattice(n_modalities)
        names = [structure_name(s) for s in lattice]
        assert len(set(names)) == len(names)
        assert [as_structure(name, n_modalities) for name in names] == list(lattice)


@pytest.mark.parametrize("written", ["12", "21", (2, 1), [1, 2], {1, 2}, np.array([2, 1]), (1.0, np.int64(2)), "1.2"])
def test_look_ups_understand_what_is_meant(written):
    assert Hierarchy((9, 7), {"12": 2, 1: 1, "2": 2}) == TWO
    assert TWO.rank(written) == 2
    assert TWO.columns(written) == slice(0, 2)
    np.testing.assert_array_equal(TWO.structure_rows(written), np.arange(16))
    assert TWO.rows(np.int32(2)) == slice(9, 16)


@pytest.mark.parametrize(
    "wrong", [(), "", "13", (1, 3), (1, 1), 0, -1, 3, 1.5, None, "1x", "1:2", (None,), ("1", 2), ((1, 2), 1)]
)
def test_look_ups_refuse_what_is_no_structure(wrong):
    for look_up in (TWO.rank, TWO.columns, TWO.structure_rows):
        with pytest.raises(ValueError, match="structure: unknown structure"):
            look_up(wrong)
    with pytest.raises(ValueError, match="ranks: unknown structure"):
        Hierarchy((9, 7), {wrong: 1})


@pytest.mark.parametrize("wrong", [0, -1, 3, 1.5, "1", None, (1,)])
def test_look_ups_refuse_what_is_no_modality(wrong):
    for look_up in (TWO.rows, TWO.active_columns):
        with pytest.raises(ValueError, match="modality: is .*expected an integer from 1 to 2"):
            look_up(wrong)


def test_columns_of_an_absent_structure_are_refused():
    assert UNEVEN.rank("12") == 0
    with pytest.raises(ValueError, match=r"structure: '12' is not in the hierarchy; expected one of 123, 13, 23, 2"):
        UNEVEN.columns("12")


@pytest.mark.parametrize(
    ("dims", "ranks", "message"),
    [
        (5, {(1,): 1}, "dims: is 5"),
        ((4, None), {(1,): 1}, "dims: modality 2 has dimension None"),
        ((4, 1.5), {(1,): 1}, "dims: modality 2 has dimension 1.5"),
        ((4, 4), [(1, 2)], "ranks: is .*expected a dictionary"),
        ((4, 4), {(1,): None}, r"ranks: structure \(1,\) has rank None"),
        ((), {(1,): 1}, "dims: got no modality"),
        ((4, 0), {(1,): 1}, "dims: modality 2 has dimension 0; expected a positive integer"),
        ((4, -3), {(1,): 1}, "dims: modality 2 has dimension -3"),
        ((4, 4), {(1, 3): 1}, r"ranks: unknown structure \(1, 3\); expected a non-empty set of modalities from 1 to 2"),
        ((4, 4), {(0, 1): 1}, r"ranks: unknown structure \(0, 1\)"),
        ((4, 4), {(): 1}, r"ranks: unknown structure \(\)"),
        ((4, 4), {(1, 1): 1}, r"ranks: unknown structure \(1, 1\)"),
        ((4, 4), {(1, 2): 1, (2, 1): 1}, r"ranks: structure \(1, 2\) is given twice"),
        ((4, 4), {(1,): -1}, r"ranks: structure \(1,\) has rank -1; expected a non-negative integer"),
        ((4, 4), {(1,): 0, (2,): 0}, "ranks: every rank is 0"),
        ((4, 4), {}, "ranks: every rank is 0"),
        ((4, 3), {(1, 2): 2, (2,): 2}, "ranks: .* modality 2 have ranks adding up to 4; expected at most its dimension 3"),
    ],
)
def test_refusals_name_the_argument(dims, ranks, message):
    with pytest.raises(ValueError, match=message) as refusal:
        Hierarchy(dims, ranks)
    assert "\n" not in str(refusal.value)


def test_ranks_may_fill_a_modality():
    assert Hierarchy((4, 4), {(1, 2): 2, (2,): 2}).n_factors == 4
