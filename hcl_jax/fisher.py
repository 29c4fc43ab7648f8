"""The Fisher information of the hierarchical factor model, as an operator that never forms a d × d matrix (theory: Sections 3
and 6).

Parameters are (V, τ): V a masked d × K change of the loadings, τ a change of the noise variances, of which there is one for all
features, one a view or one a feature. They move Σ by D = VFᵀ + FVᵀ + diag(τ). The operator is H with
⟨(V', τ'), H(V, τ)⟩ = ½ tr(Σ⁻¹DΣ⁻¹D'), so that νH is the Fisher information of ν degrees of freedom.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.linalg import spd_inverse
from hcl_jax.structure import Hierarchy

Parameters = tuple[Float[Array, "d K"], Float[Array, " groups"]]

NOISE = ("shared", "view", "feature")
"""Which features share a noise variance: all, those of a view, or none."""


def check_noise(noise: str) -> None:
    """Raise `ValueError` unless the kind of noise is one of `NOISE`."""
    if noise not in NOISE:
        raise ValueError(f"noise: is {noise!r}; expected one of {', '.join(NOISE)}")


def noise_by_feature(noise_variance: Array, n_features: int) -> Float[Array, " d"]:
    """ψ, the noise variance of every feature, from one number for all of them or from a vector of them.

    Raises `ValueError` for a vector of another length: one value a view says nothing of the views' sizes, and would be taken for
    something else where there are as many views as factors.
    """
    if noise_variance.ndim == 0:
        return jnp.broadcast_to(noise_variance, (n_features,))
    if noise_variance.shape != (n_features,):
        raise ValueError(
            f"noise_variance: has shape {noise_variance.shape}; expected one number, or one for each of {n_features} features"
        )
    return noise_variance


def spread(values: Float[Array, " groups"], hierarchy: Hierarchy, noise: str) -> Float[Array, " d"]:
    """The value of every feature's group."""
    if noise == "feature":
        return values
    sizes = hierarchy.dims if noise == "view" else (hierarchy.n_features,)
    return jnp.repeat(values, np.array(sizes), total_repeat_length=hierarchy.n_features)


def pool(values: Float[Array, "d ..."], hierarchy: Hierarchy, noise: str) -> Float[Array, "groups ..."]:
    """The sums over the features of every group."""
    if noise == "feature":
        return values
    return jnp.concatenate([values[g].sum(axis=0, keepdims=True) for g in group_slices(hierarchy, noise)])


def group_sizes(hierarchy: Hierarchy, noise: str) -> np.ndarray:
    """The number of features of every group."""
    return np.array({"shared": (hierarchy.n_features,), "view": hierarchy.dims, "feature": (1,) * hierarchy.n_features}[noise])


def group_slices(hierarchy: Hierarchy, noise: str) -> tuple[slice, ...]:
    """The rows of every group, for noise that is shared or by view."""
    return tuple(hierarchy.rows(m) for m in hierarchy.modalities) if noise == "view" else (slice(0, hierarchy.n_features),)


def group_grams(A: Float[Array, "d K"], F: Float[Array, "d K"], hierarchy: Hierarchy, noise: str) -> Float[Array, "groups K K"]:
    """A_pᵀF_p for every group p of features, for noise that is shared or by view."""
    return jnp.stack([A[g].T @ F[g] for g in group_slices(hierarchy, noise)])


class FisherOperator(eqx.Module):
    """H at loadings F and noise variances ψ, with its mask: products, a preconditioner, solves by conjugate gradients, and the
    gradient of the likelihood that goes with it.

    All by Woodbury: with W = I + FᵀΨ⁻¹F, Σ⁻¹ = Ψ⁻¹ − Ψ⁻¹F W⁻¹ FᵀΨ⁻¹ and Σ⁻¹F = Ψ⁻¹F W⁻¹. O(dK²) a product, whatever the
    noise; where a group holds many features, its sums are K × K matrices that are formed once.
    """

    loadings: Float[Array, "d K"]
    psi: Float[Array, " d"]
    grams: Float[Array, "g K K"] | None  # F_pᵀΨ_p⁻²F_p; None with noise by feature, where they would be d matrices
    gram: Float[Array, "K K"]  # FᵀΨ⁻¹F
    inverse: Float[Array, "K K"]  # W⁻¹
    log_det: Float[Array, ""]  # log det W = log det Σ − log det Ψ
    core: Float[Array, "K K"]  # FᵀΣ⁻¹F
    own_noise: Float[Array, " groups"]  # Σ_j (1 − 2h_j)/ψ_j² over every group, h_j = f_jᵀW⁻¹f_j/ψ_j
    noise_diagonal: Float[Array, " groups"]  # ‖(Σ⁻¹)_pp‖_F² for every group p
    modality_inverses: Float[Array, "M K K"]
    hierarchy: Hierarchy = eqx.field(static=True)
    noise: str = eqx.field(static=True)

    def __init__(self, loadings: Float[Array, "d K"], noise_variance: Array, hierarchy: Hierarchy, noise: str = "shared"):
        self.hierarchy, self.noise, self.loadings = hierarchy, noise, loadings
        self.psi = noise_by_feature(noise_variance, hierarchy.n_features)
        scaled = loadings / self.psi[:, None]
        self.grams = None if noise == "feature" else group_grams(scaled, scaled, hierarchy, noise)
        self.gram = loadings.T @ scaled
        self.inverse, self.log_det = spd_inverse(self.gram + jnp.eye(self.gram.shape[0], dtype=self.gram.dtype))
        self.core = self.gram @ self.inverse
        leverage = jnp.sum((loadings @ self.inverse) * scaled, axis=1)
        self.own_noise = self._pool((1 - 2 * leverage) / self.psi**2)
        self.noise_diagonal = self._noise_diagonal(leverage)
        damping = max(1e-6, 1e3 * float(jnp.finfo(loadings.dtype).eps))  # factors may be collinear to rounding
        self.modality_inverses = modality_inverses(self.core, hierarchy, damping)

    def _pool(self, values: Float[Array, " d"]) -> Float[Array, " groups"]:
        return pool(values, self.hierarchy, self.noise)

    def _quadratic(self, X: Float[Array, "K K"]) -> Float[Array, " groups"]:
        """Σ_j f_jᵀX f_j/ψ_j² over every group."""
        if self.grams is not None:
            return jnp.einsum("pij,ij->p", self.grams, X)
        return jnp.sum((self.loadings @ X) * self.loadings, axis=1) / self.psi**2

    def _bilinear(self, V: Float[Array, "d K"], X: Float[Array, "K K"]) -> Float[Array, " groups"]:
        """Σ_j v_jᵀX f_j/ψ_j² over every group."""
        return self._pool(jnp.sum((V @ X) * self.loadings, axis=1) / self.psi**2)

    def _weighted_gram(self, tau: Float[Array, " groups"]) -> Float[Array, "K K"]:
        """FᵀΨ⁻¹ diag(τ) Ψ⁻¹F."""
        if self.grams is not None:
            return jnp.einsum("pij,p->ij", self.grams, tau)
        return (self.loadings * (tau / self.psi**2)[:, None]).T @ self.loadings

    def _noise_diagonal(self, leverage: Float[Array, " d"]) -> Float[Array, " groups"]:
        if self.grams is None:
            return ((1 - leverage) / self.psi) ** 2
        moved = self.grams @ self.inverse
        return self.own_noise + jnp.einsum("pij,pji->p", moved, moved)

    def image(self) -> Float[Array, "d K"]:
        """Σ⁻¹F."""
        return self.loadings @ self.inverse / self.psi[:, None]

    def product(self, parameters: Parameters) -> Parameters:
        """H(V, τ) = ([Σ⁻¹DΣ⁻¹F]∘mask, ½ tr_q(Σ⁻¹DΣ⁻¹)).

        With C = FᵀΨ⁻¹V and T = FᵀΨ⁻¹ diag(τ) Ψ⁻¹F, DΣ⁻¹F = V FᵀΣ⁻¹F + F CᵀW⁻¹ + diag(τ)Σ⁻¹F, and the diagonals of Σ⁻¹VFᵀΣ⁻¹
        and of Σ⁻¹ diag(τ) Σ⁻¹ are sums of rows: all in the spans of V and F, in which Σ⁻¹ is a K × K matrix.
        """
        V, tau = parameters
        F, inverse, psi = self.loadings, self.inverse, self.psi
        by_feature = spread(tau, self.hierarchy, self.noise) / psi
        C, T = F.T @ (V / psi[:, None]), self._weighted_gram(tau)
        common = inverse @ ((C.T - T) @ inverse - C @ self.core)
        along = V @ self.core + F @ common + by_feature[:, None] * (F @ inverse)
        along = jnp.where(self.hierarchy.mask, along / psi[:, None], 0)
        traces = self._bilinear(V, inverse) - self._quadratic(inverse @ C @ inverse)
        own = self.own_noise * tau + self._quadratic(inverse @ T @ inverse)
        return along, traces + own / 2

    def deviance(self, covariance_image: Float[Array, "d K"], variances: Float[Array, " d"]) -> Float[Array, ""]:
        """log det Σ + tr(Σ⁻¹S), from S Σ⁻¹F and diag S: tr(Σ⁻¹S) = tr(Ψ⁻¹S) − tr(FᵀΨ⁻¹ SΣ⁻¹F)."""
        explained = jnp.sum(self.loadings / self.psi[:, None] * covariance_image)
        return jnp.sum(jnp.log(self.psi) + variances / self.psi) - explained + self.log_det

    def minus_half_gradient(self, covariance_image: Float[Array, "d K"], variances: Float[Array, " d"]) -> Parameters:
        """−½ of the gradient of log det Σ + tr(Σ⁻¹S) along masked loadings and noise variances, from S Σ⁻¹F and diag S:
        ([Σ⁻¹(S Σ⁻¹F − F)]∘mask, −½ tr_q(Σ⁻¹ − Σ⁻¹SΣ⁻¹)).

        Along the loadings the difference comes first: where factors are far stronger than the noise, Σ⁻¹ loses digits of what
        it is taken of. Along the noise, with Y = Σ⁻¹F: Σ⁻¹ = Ψ⁻¹ − YFᵀΨ⁻¹, and
        Σ⁻¹SΣ⁻¹ = Ψ⁻¹(S − (SY)Fᵀ − F(SY)ᵀ + F(YᵀSY)Fᵀ)Ψ⁻¹, of which only traces are needed.
        """
        F, inverse, psi = self.loadings, self.inverse, self.psi
        difference = covariance_image - F
        inner = F.T @ (difference / psi[:, None])
        along_loadings = jnp.where(self.hierarchy.mask, (difference - F @ (inverse @ inner)) / psi[:, None], 0)
        quadratic = inverse @ (inner + self.gram)  # YᵀSY
        middle = self._pool((variances - 2 * jnp.sum(covariance_image * F, axis=1) - psi) / psi**2)
        return along_loadings, (middle + self._quadratic(quadratic + inverse)) / 2

    def precondition(self, parameters: Parameters) -> Parameters:
        """An approximate inverse: per modality Ψ V (FᵀΣ⁻¹F)⁻¹ on its active columns, and the diagonal for τ."""
        V, tau = parameters
        V = apply_by_modality(self.psi[:, None] * V, self.modality_inverses, self.hierarchy)
        return V, 2 * tau / self.noise_diagonal

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
    scale = jnp.trace(core) / core.shape[0]
    scale = jnp.where(scale > 0, scale, 1)
    damped = core + scale * damping * jnp.eye(core.shape[0], dtype=core.dtype)
    return inverses_of_seen(jnp.broadcast_to(damped, (hierarchy.n_modalities, *core.shape)), hierarchy)


def inverses_of_seen(cores: Float[Array, "M K K"], hierarchy: Hierarchy) -> Float[Array, "M K K"]:
    """The inverse of each modality's core on its active columns, zero elsewhere."""
    seen = jnp.asarray(hierarchy.modality_mask, cores.dtype)
    both = seen[:, :, None] * seen[:, None, :]
    eye = jnp.eye(cores.shape[1], dtype=cores.dtype)
    return both * jax.lax.map(lambda matrix: spd_inverse(matrix)[0], both * cores + eye[None] * (1 - seen)[:, None, :])


def apply_by_modality(V: Float[Array, "d K"], inverses: Float[Array, "M K K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """The rows of every modality times its own K × K matrix."""
    return jnp.concatenate([V[hierarchy.rows(m)] @ inverses[m - 1] for m in hierarchy.modalities])
