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


def group_grams(A: Float[Array, "d K"], F: Float[Array, "d K"], groups: tuple[slice, ...]) -> Float[Array, "groups K K"]:
    """A_pᵀF_p for every group p of features."""
    return jnp.stack([A[g].T @ F[g] for g in groups])


class FisherOperator(eqx.Module):
    """H at loadings F and noise variances ψ, with its mask: products, a preconditioner, solves by conjugate gradients, and the
    gradient of the likelihood that goes with it.

    All by Woodbury: with W = I + FᵀΨ⁻¹F, Σ⁻¹ = Ψ⁻¹ − Ψ⁻¹F W⁻¹ FᵀΨ⁻¹ and Σ⁻¹F = Ψ⁻¹F W⁻¹.
    """

    loadings: Float[Array, "d K"]
    noise: Float[Array, " g"]
    psi: Float[Array, "d 1"]
    grams: Float[Array, "g K K"]  # F_pᵀF_p
    gram: Float[Array, "K K"]  # FᵀΨ⁻¹F
    inverse: Float[Array, "K K"]  # W⁻¹
    core: Float[Array, "K K"]  # FᵀΣ⁻¹F
    noise_norms: Float[Array, "g g"]  # ‖(Σ⁻¹)_pq‖_F² for all pairs of groups
    modality_inverses: Float[Array, "M K K"]
    hierarchy: Hierarchy = eqx.field(static=True)
    groups: tuple[tuple[int, int], ...] = eqx.field(static=True)

    def __init__(
        self, loadings: Float[Array, "d K"], noise: Float[Array, " groups"], hierarchy: Hierarchy, groups: tuple[slice, ...]
    ):
        self.hierarchy, self.groups = hierarchy, tuple((g.start, g.stop) for g in groups)
        self.loadings, self.noise, self.psi = loadings, noise, by_feature(noise, groups)
        self.grams = group_grams(loadings, loadings, groups)
        self.gram = jnp.einsum("pij,p->ij", self.grams, 1 / noise)
        self.inverse = spd_inverse(self.gram + jnp.eye(self.gram.shape[0], dtype=self.gram.dtype))[0]
        self.core = self.gram @ self.inverse
        cores = jnp.einsum("pij,p->pij", self.grams @ self.inverse, 1 / noise**2)
        own = self._sizes() / noise**2 - 2 * jnp.trace(cores, axis1=1, axis2=2) / noise
        self.noise_norms = jnp.einsum("pij,qji->pq", cores, cores) + jnp.diag(own)
        damping = max(1e-6, 1e3 * float(jnp.finfo(loadings.dtype).eps))  # factors may be collinear to rounding
        self.modality_inverses = modality_inverses(self.core, hierarchy, damping)

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(*g) for g in self.groups)

    def _sizes(self) -> Float[Array, " g"]:
        return jnp.array([stop - start for start, stop in self.groups], self.noise.dtype)

    def image(self) -> Float[Array, "d K"]:
        """Σ⁻¹F."""
        return self.loadings @ self.inverse / self.psi

    def product(self, parameters: Parameters) -> Parameters:
        """H(V, τ) = ([Σ⁻¹DΣ⁻¹F]∘mask, ½ tr_q(Σ⁻¹DΣ⁻¹)).

        With A_p = F_pᵀV_p and C = FᵀΨ⁻¹V, DΣ⁻¹F = V FᵀΣ⁻¹F + F CᵀW⁻¹ + diag(τ)Σ⁻¹F, all in the spans of V and F, in which Σ⁻¹ is
        a K × K matrix.
        """
        V, tau = parameters
        inverse, groups = self.inverse, self._slices()
        A = group_grams(self.loadings, V, groups)
        C = jnp.einsum("pij,p->ij", A, 1 / self.noise)
        moved = jnp.einsum("pij,p->ij", self.grams, tau / self.noise**2)  # FᵀΨ⁻¹ diag(τ) Ψ⁻¹F
        common = inverse @ ((C.T - moved) @ inverse - C @ self.core)
        own = [self.loadings[g] @ (common + tau[p] / self.noise[p] * inverse) for p, g in enumerate(groups)]
        along = jnp.where(self.hierarchy.mask, (V @ self.core + jnp.concatenate(own)) / self.psi, 0)
        traces = jnp.einsum("pij,ij->p", A, inverse) - jnp.einsum("pij,ij->p", self.grams, inverse @ C @ inverse)
        return along, traces / self.noise**2 + self.noise_norms @ tau / 2

    def minus_half_gradient(self, covariance_image: Float[Array, "d K"], variances: Float[Array, " d"]) -> Parameters:
        """−½ of the gradient of log det Σ + tr(Σ⁻¹S) along masked loadings and noise variances, from S Σ⁻¹F and diag S:
        ([Σ⁻¹(S Σ⁻¹F − F)]∘mask, −½ tr_q(Σ⁻¹ − Σ⁻¹SΣ⁻¹)).

        Along the loadings the difference comes first: where factors are far stronger than the noise, Σ⁻¹ loses digits of what
        it is taken of. Along the noise, with Y = Σ⁻¹F: Σ⁻¹ = Ψ⁻¹ − YFᵀΨ⁻¹, and
        Σ⁻¹SΣ⁻¹ = Ψ⁻¹(S − (SY)Fᵀ − F(SY)ᵀ + F(YᵀSY)Fᵀ)Ψ⁻¹, of which only traces are needed.
        """
        F, inverse = self.loadings, self.inverse
        difference = covariance_image - F
        inner = F.T @ (difference / self.psi)
        along_loadings = jnp.where(self.hierarchy.mask, (difference - F @ (inverse @ inner)) / self.psi, 0)
        quadratic = inverse @ (inner + self.gram)  # YᵀSY
        middle = by_group(variances - 2 * jnp.sum(covariance_image * F, axis=1), self._slices())
        middle = middle + jnp.einsum("pij,ij->p", self.grams, quadratic + inverse)
        return along_loadings, (middle / self.noise**2 - self._sizes() / self.noise) / 2

    def precondition(self, parameters: Parameters) -> Parameters:
        """An approximate inverse: per modality Ψ V (FᵀΣ⁻¹F)⁻¹ on its active columns, and the diagonal for τ."""
        V, tau = parameters
        V = apply_by_modality(self.psi * V, self.modality_inverses, self.hierarchy)
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
