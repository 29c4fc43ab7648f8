"""Problems with a known answer, and comparisons whose tolerance follows dtype and scale.

The figures that tests measure are logged: `pytest -n 0 --log-cli-level=INFO` shows them.
"""

import logging
import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from hypothesis import settings
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, Truth, recovery_errors
from hcl_jax.experiments import read_results
from hcl_jax.structure import full_lattice

PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)  # no deadline: the first example of a shape compiles

TWO = Hierarchy((9, 7), {(1, 2): 2, (1,): 1, (2,): 2})
LATTICE = Hierarchy.full((7, 6, 8), 1)  # all that the published algorithms accept
UNEVEN = Hierarchy((6, 8, 5), {(1, 2, 3): 2, (1, 3): 1, (2, 3): 2, (2,): 1})
CHAIN = Hierarchy((4, 5, 4, 6), {(1, 2): 1, (2, 3): 1, (3, 4): 1, (1, 2, 3, 4): 1, (4,): 2})
SHARED = Hierarchy((5, 4), {(1, 2): 3})
HIERARCHIES = (TWO, LATTICE, UNEVEN, CHAIN, SHARED)

PUBLISHED = ("hcl-svd-published", "hcl-gd-published")
NAIVE = ("naive-svd", "naive-svd-denoised")
LIKELIHOOD = ("hcl-ml", "hcl-vb")
HIERARCHICAL = tuple(name for name in ESTIMATORS if name not in NAIVE)

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"HCL_REFERENCE": ROOT / "../shared/reference", "HCL_DATA": ROOT / "../shared/data"}

_log = logging.getLogger("measured")

RESULT_KEY = ["cell", "method", "metric", "structure", "modality", "replicate"]


def sorted_results(output: Path) -> pl.DataFrame:
    """The table of a folder of results, in one order."""
    return read_results(output).sort(RESULT_KEY)


def assert_same_bits(one: pl.DataFrame, other: pl.DataFrame) -> None:
    """Both tables hold the same rows, each once, with the same bits."""
    assert not one.select(RESULT_KEY).is_duplicated().any()
    assert one.drop("value").equals(other.drop("value"))
    assert one["value"].to_numpy().tobytes() == other["value"].to_numpy().tobytes()


@cache
def reference_arrays(name: str, place: str = "HCL_REFERENCE") -> dict[str, np.ndarray]:
    """The arrays of `name`.npz under the folder that the environment variable `place` names; the test is skipped without it."""
    path = Path(os.environ.get(place, PLACES[place])) / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {place}")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays}


def assert_at_most(measured, bound, what: str) -> None:
    """A measured figure is at most its bound; the figure is logged, and stands in the message if it is not."""
    line = f"{what}: measured {float(measured):.4g}, at most {float(bound):.4g} expected"
    _log.info(line)
    assert float(measured) <= bound, line


def assert_at_least(measured, bound, what: str) -> None:
    """A measured figure is at least its bound."""
    line = f"{what}: measured {float(measured):.4g}, at least {float(bound):.4g} expected"
    _log.info(line)
    assert float(measured) >= bound, line


def assert_within(measured, centre, tolerance, what: str) -> None:
    """A measured figure lies within a tolerance of where it should be."""
    line = f"{what}: measured {float(measured):.5g}, expected {float(centre):.5g} ± {float(tolerance):.3g}"
    _log.info(line)
    assert abs(float(measured) - float(centre)) <= float(tolerance), line


def assert_refused(main, arguments, words, output, capsys) -> None:
    """A command line ends with exit code 2 after one line that holds all the words, and has not written `output`."""
    assert main([*arguments, "--output", str(output)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(word in line for word in words), line
    assert not output.exists()


def relative(actual, expected) -> float:
    """‖actual − expected‖ / ‖expected‖; the plain norm of the difference where the expected is 0."""
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape} differ"
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (size if size > 0 else 1.0))


def assert_close(actual, expected, what: str = "value", slack: float = 1e3) -> None:
    """Equal up to `slack` roundings of the less precise dtype, relative to the norm of the expected array."""
    eps = max(np.finfo(np.asarray(a).dtype).eps for a in (actual, expected) if np.asarray(a).dtype.kind == "f")
    assert_at_most(relative(actual, expected), slack * eps, what)


def _block(rng: np.random.Generator, dim: int, rank: int) -> np.ndarray:
    values = np.sort(rng.uniform(0.5, 1.5, rank))[::-1]
    left, _ = np.linalg.qr(rng.standard_normal((dim, rank)))
    return left * values @ orthogonal(rng, rank).T


def numpy_loadings(rng: np.random.Generator, hierarchy: Hierarchy) -> np.ndarray:
    """Loadings of the paper's Section 4.1, drawn by NumPy: nothing to compile, and independent of the library's own draws."""
    loadings = np.zeros((hierarchy.n_features, hierarchy.n_factors))
    for s, rank in hierarchy.ranks:
        for m in s:
            loadings[hierarchy.rows(m), hierarchy.columns(s)] = _block(rng, hierarchy.dims[m - 1], rank)
    return loadings


def problem(hierarchy: Hierarchy, seed: int = 0, noise: float = 0.1, n: int = 2000) -> tuple[Truth, SampleCovariance]:
    """(truth, sample covariance of n Gaussian samples) of a random model."""
    rng = np.random.default_rng(seed)
    loadings = numpy_loadings(rng, hierarchy)
    z, e = rng.standard_normal((n, hierarchy.n_factors)), rng.standard_normal((n, hierarchy.n_features))
    S = np.cov((z @ loadings.T + np.sqrt(noise) * e).T)
    return Truth(jnp.asarray(loadings), jnp.asarray(noise, float), hierarchy), SampleCovariance(jnp.asarray(S), n=n)


def normal_truth(rng: np.random.Generator, hierarchy: Hierarchy, noise_variance: np.ndarray, noise: str) -> Truth:
    """A truth whose loadings are normal with variance 4/d_m in modality m: every column has a squared norm of about 4 there."""
    scale = np.sqrt(4 / np.repeat(hierarchy.dims, hierarchy.dims))
    loadings = jnp.asarray(scale[:, None] * masked_normal(rng, hierarchy))
    return Truth(loadings, jnp.asarray(noise_variance), hierarchy, noise=noise)


def stacked(trees):
    """Equal pytrees stacked along a new leading axis, for vmap."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def population(truth: Truth, n: float = 2000) -> SampleCovariance:
    """The population covariance in place of a sample's."""
    return SampleCovariance(truth.covariance(), n=n)


def lower_precision(covariance: SampleCovariance) -> SampleCovariance:
    """The same covariance in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), covariance)


@cache
def fitted_by(name: str, **options):
    """The named estimator, compiled once per hierarchy and dtype."""
    return jax.jit(partial(ESTIMATORS[name], **options), static_argnums=1)


@cache
def batch_fitted_by(name: str, **options):
    """The named estimator over a batch of covariances."""

    def fit(covariances, hierarchy):
        return jax.vmap(lambda covariance: ESTIMATORS[name](covariance, hierarchy, **options))(covariances)

    return jax.jit(fit, static_argnums=1)


errors_of = jax.jit(recovery_errors, static_argnums=(1, 3))


def hierarchy_for(name: str) -> Hierarchy:
    """A hierarchy that the named estimator accepts, the same for all but the published ones."""
    return LATTICE if name in PUBLISHED else TWO


def random_hierarchy(rng: np.random.Generator, n_modalities: int) -> Hierarchy:
    """Some structures of the lattice with ranks 1 to 3, in dimensions from the least that Section 1 allows to three more."""
    lattice = full_lattice(n_modalities)
    chosen = rng.choice(len(lattice), size=rng.integers(1, min(len(lattice), 6) + 1), replace=False)
    ranks = {lattice[i]: int(rng.integers(1, 4)) for i in chosen}
    needed = [sum(rank for s, rank in ranks.items() if m in s) for m in range(1, n_modalities + 1)]
    return Hierarchy([max(1, total + int(rng.integers(0, 4))) for total in needed], ranks)


def masked_normal(rng: np.random.Generator, hierarchy: Hierarchy) -> np.ndarray:
    """Standard normal loadings with the hierarchy's zero pattern."""
    return np.where(hierarchy.mask, rng.standard_normal(hierarchy.mask.shape), 0.0)


def orthogonal(rng: np.random.Generator, k: int) -> np.ndarray:
    """A Haar orthogonal matrix, a reflection half of the time."""
    Q, R = np.linalg.qr(rng.standard_normal((k, k)))
    return Q * np.sign(np.diagonal(R))


def structure_rotation(rng: np.random.Generator, hierarchy: Hierarchy) -> np.ndarray:
    """A K × K matrix with one orthogonal block per structure."""
    rotation = np.zeros((hierarchy.n_factors, hierarchy.n_factors))
    for s in hierarchy.structures:
        rotation[hierarchy.columns(s), hierarchy.columns(s)] = orthogonal(rng, hierarchy.rank(s))
    return rotation


def identified(name: str, estimate, hierarchy: Hierarchy) -> np.ndarray:
    """What an estimate says whatever the signs of its eigenvectors: FFᵀ, or its diagonal blocks.

    The published methods find every modality's block of a structure by itself, so that its sign, and with it every
    off-diagonal block of FFᵀ, is left to the eigensolver.
    """
    F = np.asarray(estimate.loadings, float)
    modality = hierarchy.modality_of_feature
    kept = (modality[:, None] == modality[None, :]) | (name not in PUBLISHED)
    return np.where(kept, F @ F.T, 0.0)


def structure_gram(loadings, hierarchy: Hierarchy, structure) -> np.ndarray:
    """Λ_sΛ_sᵀ as a d × d matrix."""
    block = np.asarray(loadings)[:, hierarchy.columns(structure)]
    return block @ block.T


def dense_deviance(loadings, noise_by_feature, S):
    """log det Σ + tr(Σ⁻¹S), Σ = FFᵀ + diag(ψ), written out with d × d matrices."""
    Sigma = loadings @ loadings.T + jnp.diag(noise_by_feature)
    return jnp.linalg.slogdet(Sigma)[1] + jnp.trace(jnp.linalg.solve(Sigma, S))


def permuted_modalities(hierarchy: Hierarchy, order: tuple[int, ...]) -> tuple[Hierarchy, np.ndarray, np.ndarray]:
    """The hierarchy with modality i now the old `order[i]` (0-based), and where its rows and columns stood before."""
    new_of_old = {old + 1: new for new, old in enumerate(order, start=1)}
    dims = [hierarchy.dims[i] for i in order]
    moved = {s: tuple(sorted(new_of_old[m] for m in s)) for s in hierarchy.structures}
    permuted = Hierarchy(dims, {moved[s]: hierarchy.rank(s) for s in hierarchy.structures})
    old_of = {new: old for old, new in moved.items()}
    rows = np.concatenate([np.arange(hierarchy.n_features)[hierarchy.rows(i + 1)] for i in order])
    columns = np.concatenate([np.arange(hierarchy.n_factors)[hierarchy.columns(old_of[s])] for s in permuted.structures])
    return permuted, rows, columns


def _is_jaxpr(value) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation of a program, those of its loops and branches included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner))
