"""The Fisher information of the hierarchical factor model, as an operator that never forms a d × d matrix (theory: Sections 3
and 6).

Parameters are (V, τ): V a masked d × K change of the loadings, τ a change of the noise variance, one number or one per group of
features. They move Σ by D = VFᵀ + FVᵀ + diag(τ). The operator is H with ⟨(V', τ'), H(V, τ)⟩ = ½ tr(Σ⁻¹DΣ⁻¹D'), so that νH is the
Fisher information of ν degrees of freedom.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.covariance import SampleCovariance
from hcl_jax.linalg import spd_inverse
from hcl_jax.structure import Hierarchy

Parameters = tuple[Float[Array, "d K"], Float[Array, " groups"]]


def noise_groups(hierarchy: Hierarchy, per_modality: bool) -> tuple[slice, ...]:
    """The rows that share a noise variance: all features together, or one group per modality."""
    if per_modality:
        return tuple(hierarchy.rows(m) for m in hierarchy.modalities)
    return (slice(0, hierarchy.n_features),)


def by_feature(values: Float[Array, " groups"], groups: tuple[slice, ...]) -> Float[Array, "d 1"]:
    """A group's value repeated over its features, as a column."""
    columns = [jnp.broadcast_to(values[p], (g.stop - g.start, 1)) for p, g in enumerate(groups)]
    return jnp.concatenate(columns)


def by_group(values: Float[Array, " d"], groups: tuple[slice, ...]) -> Float[Array, " groups"]:
    """The sums of the features' values over every group."""
    # not a stack of scalars: under vmap its batch axis comes last, which jax.scipy's cg refuses beside the loadings'
    return jnp.concatenate([values[g].sum(keepdims=True) for g in groups])


def group_grams(loadings: Float[Array, "d K"], groups: tuple[slice, ...]) -> Float[Array, "groups K K"]:
    """F_pᵀF_p for every group p of features."""
    return jnp.stack([loadings[g].T @ loadings[g] for g in groups])


class FactorPrecision(eqx.Module):
    """Σ⁻¹ for Σ = FFᵀ + Ψ, through W = I + FᵀΨ⁻¹F (Woodbury): Σ⁻¹V = Ψ⁻¹(V − F W⁻¹ FᵀΨ⁻¹V)."""

    loadings: Float[Array, "d K"]
    noise: Float[Array, "d 1"]
    gram: Float[Array, "K K"]  # FᵀΨ⁻¹F = W − I
    inverse: Float[Array, "K K"]  # W⁻¹

    def __init__(self, loadings: Float[Array, "d K"], noise: Float[Array, "d 1"], gram: Float[Array, "K K"]):
        self.loadings, self.noise, self.gram = loadings, noise, gram
        self.inverse = spd_inverse(gram + jnp.eye(gram.shape[0], dtype=gram.dtype))[0]

    def apply(self, vectors: Float[Array, "d k"]) -> Float[Array, "d k"]:
        """Σ⁻¹ V."""
        scaled = vectors / self.noise
        return scaled - (self.loadings / self.noise) @ (self.inverse @ (self.loadings.T @ scaled))


class FisherOperator(eqx.Module):
    """H at loadings F and noise variances ψ, with its mask: products, a preconditioner, solves by conjugate gradients, and the
    gradient of the likelihood that goes with it."""

    precision: FactorPrecision
    image: Float[Array, "d K"]  # Σ⁻¹F = Ψ⁻¹FW⁻¹
    core: Float[Array, "K K"]  # FᵀΣ⁻¹F
    noise: Float[Array, " g"]
    grams: Float[Array, "g K K"]
    noise_norms: Float[Array, "g g"]  # ‖(Σ⁻¹)_pq‖_F² for all pairs of groups
    modality_inverses: Float[Array, "M K K"]
    hierarchy: Hierarchy = eqx.field(static=True)
    groups: tuple[tuple[int, int], ...] = eqx.field(static=True)

    def __init__(
        self, loadings: Float[Array, "d K"], noise: Float[Array, " groups"], hierarchy: Hierarchy, groups: tuple[slice, ...]
    ):
        self.hierarchy, self.groups, self.noise = hierarchy, tuple((g.start, g.stop) for g in groups), noise
        self.grams = group_grams(loadings, groups)
        gram = jnp.einsum("pij,p->ij", self.grams, 1 / noise)
        self.precision = FactorPrecision(loadings, by_feature(noise, groups), gram)
        self.image = (loadings / self.precision.noise) @ self.precision.inverse
        self.core = gram @ self.precision.inverse
        cores = jnp.einsum("pij,p->pij", self.grams @ self.precision.inverse, 1 / noise**2)
        own = self._sizes() / noise**2 - 2 * jnp.trace(cores, axis1=1, axis2=2) / noise
        self.noise_norms = jnp.einsum("pij,qji->pq", cores, cores) + jnp.diag(own)
        damping = max(1e-6, 1e3 * float(jnp.finfo(loadings.dtype).eps))  # factors may be collinear to rounding
        self.modality_inverses = modality_inverses(self.core, hierarchy, damping)

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(*g) for g in self.groups)

    def _sizes(self) -> Float[Array, " g"]:
        return jnp.array([stop - start for start, stop in self.groups], self.noise.dtype)

    def product(self, parameters: Parameters) -> Parameters:
        """H(V, τ) = ([Σ⁻¹DΣ⁻¹F]∘mask, ½ tr_q(Σ⁻¹DΣ⁻¹))."""
        V, tau = parameters
        groups = self._slices()
        F, Y = self.precision.loadings, self.image
        moved = V @ self.core + F @ (V.T @ Y) + by_feature(tau, groups) * Y
        along_loadings = jnp.where(self.hierarchy.mask, self.precision.apply(moved), 0)
        traces = by_group(jnp.sum(self.precision.apply(V) * Y, axis=1), groups)
        return along_loadings, traces + self.noise_norms @ tau / 2

    def minus_half_gradient(self, covariance_image: Float[Array, "d K"], covariance: SampleCovariance) -> Parameters:
        """−½ of the gradient of log det Σ + tr(Σ⁻¹S) along masked loadings and noise variances, from S Σ⁻¹F:
        ([Σ⁻¹(S Σ⁻¹F − F)]∘mask, −½ tr_q(Σ⁻¹ − Σ⁻¹SΣ⁻¹)).

        Along the loadings the difference comes first: where factors are far stronger than the noise, Σ⁻¹ loses digits of what
        it is taken of. Along the noise, with Y = Σ⁻¹F: Σ⁻¹ = Ψ⁻¹ − YFᵀΨ⁻¹, and
        Σ⁻¹SΣ⁻¹ = Ψ⁻¹(S − (SY)Fᵀ − F(SY)ᵀ + F(YᵀSY)Fᵀ)Ψ⁻¹, of which only traces are needed.
        """
        F, psi, inverse = self.precision.loadings, self.precision.noise, self.precision.inverse
        difference = covariance_image - F
        inner = F.T @ (difference / psi)
        along_loadings = jnp.where(self.hierarchy.mask, (difference - F @ (inverse @ inner)) / psi, 0)
        quadratic = inverse @ (inner + self.precision.gram)  # YᵀSY
        middle = by_group(covariance.variances() - 2 * jnp.sum(covariance_image * F, axis=1), self._slices())
        middle = middle + jnp.einsum("pij,ij->p", self.grams, quadratic + inverse)
        return along_loadings, (middle / self.noise**2 - self._sizes() / self.noise) / 2

    def precondition(self, parameters: Parameters) -> Parameters:
        """An approximate inverse: per modality Ψ V (FᵀΣ⁻¹F)⁻¹ on its active columns, and the diagonal for τ."""
        V, tau = parameters
        V = apply_by_modality(self.precision.noise * V, self.modality_inverses, self.hierarchy)
        return V, 2 * tau / jnp.diagonal(self.noise_norms)

    def solve(self, right: Parameters, tolerance: float, max_steps: int) -> Parameters:
        """H⁻¹ of the right-hand side by preconditioned conjugate gradients from zero.

        H is singular along the rotations within a structure; a right-hand side orthogonal to them (every gradient, and the
        gradient of every rotation-free quantity) is consistent and the solution has no component that matters along them.
        """
        solution, _ = jax.scipy.sparse.linalg.cg(self.product, right, tol=tolerance, maxiter=max_steps, M=self.precondition)
        return solution


def modality_inverses(core: Float[Array, "K K"], hierarchy: Hierarchy, damping: float | Array) -> Float[Array, "M K K"]:
    """Per modality, the inverse of the core on the modality's active columns (damped in units of its mean diagonal), zero
    elsewhere."""
    seen = jnp.asarray(hierarchy.modality_mask, core.dtype)
    scale = jnp.trace(core) / core.shape[0]
    scale = jnp.where(scale > 0, scale, 1)
    both = seen[:, :, None] * seen[:, None, :]
    eye = jnp.eye(core.shape[0], dtype=core.dtype)
    damped = both * core[None] + eye[None] * (scale * damping * seen + (1 - seen))[:, None, :]
    return both * jnp.stack([spd_inverse(matrix)[0] for matrix in damped])


def apply_by_modality(V: Float[Array, "d K"], inverses: Float[Array, "M K K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """The rows of every modality times its own K × K matrix."""
    return jnp.concatenate([V[hierarchy.rows(m)] @ inverses[m - 1] for m in hierarchy.modalities])
