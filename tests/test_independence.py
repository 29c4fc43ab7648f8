"""The terms of deep losses: released code's values and gradients, definitions in loops, and what must hold by construction."""

from functools import cache, partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    LATTICE,
    TWO,
    assert_at_least,
    assert_at_most,
    assert_close,
    assert_within,
    equations,
    reference_arrays,
    relative,
)

from hcl_jax import Hierarchy
from hcl_jax.contrastive import cosine, structure_overlap
from hcl_jax.networks.independence import (
    classifier_information,
    classifier_log_likelihood,
    club,
    cmd,
    cross_covariance,
    difference,
    first_match_triplet,
    gaussian_kernel,
    hcl_loss,
    hsic,
    info_nce,
    orthogonality,
    same_label,
    signed_overlap,
    supcon,
    symmetric_info_nce,
    third_moments,
    triplet_hinge,
    unit,
    unit_structures,
)
from hcl_jax.structure import full_lattice

CMD = "random bounded K1 K2 K3 identical permuted_rows shifted different_batch large_scale"
DIFFERENCE = "random identical orthogonal_design constant_second one_zero_row shifted_scaled"
ORTHOGONALITY = "random identical zeros opposite tiny"
TRIPLET = "random same_labels all_different identical_features zero_features"
CASES = {
    "cmd_port": CMD,
    "cmd_official": CMD,
    "diff_port": DIFFERENCE,
    "diff_official": DIFFERENCE,
    "hsic_port": "sigma1 sigma0.5 sigma3 identical constant_second duplicate_rows batch3 batch4 batch40_mm_path scaled10 kernel",
    "triplet_port": f"{TRIPLET} margin0.15",
    "hinge_official": f"{TRIPLET} binary no_triples",
    "ortho_port": ORTHOGONALITY,
    "ortho_official": ORTHOGONALITY,
    "infonce_convirt": "tau0.07_lam0.75 tau1_lam1 tau1_lam0 tau0.1_lam0.5 tau0.01_lam0.75 identical constant zeros",
    "infonce_scores": "random transposed zero diag1000 huge",
    "prob_classifier_obj": "random huge",
    "prob_classifier_eval": "random saturated",
    "nce_critic": "random constant_x identical_rows batch1",
    "club_critic": "random learning identical_rows learning_identical_rows",
    "concat_critic": "scores",
    "separable_critic": "scores",
    "supcon": "simclr_raw simclr_normalised labels_raw labels_normalised three_views_labels one_mode_labels temperature0.5 "
    "temperature0.5_base0.5 mask identical_features identical_views single_view_unique_labels zeros",
    "hcl_loss": "unequal_lam0 unequal_lam1 unequal_lam0.01 equal_lam0 equal_lam1 identical_lam0 identical_lam1 zeros_lam0 "
    "zeros_lam1",
    "mse_official": "random",
}
NAMES = [f"{function}/{case}" for function, cases in CASES.items() for case in cases.split()]
VALUE_TOLERANCE = {
    "cmd_port/permuted_rows": 1e-14,  # the value is rounding: 1.7e-15
    "cmd_official/permuted_rows": 1e-14,
    "infonce_scores": 3e-8,  # the released code rounds log N to float32
}
GRADIENT_TOLERANCE = {"diff_port/one_zero_row": 1e-8}  # a row of norm 1e-17, rounding of the mean, is divided by 1e-8
ONLY_FINITE = {
    "cmd_port/permuted_rows",  # both gradients are rounding divided by its own length
    "cmd_official/permuted_rows",
    "cmd_official/identical",  # NaN there, as the square root has no derivative at 0
    "cmd_official/shifted",
    "supcon/single_view_unique_labels",  # 0/0 there: no anchor has a positive
}


def mlp(weights, prefix, x):
    for layer in (0, 2, 4):
        x = jax.nn.relu(x) if layer else x
        x = x @ weights[f"{prefix}.{layer}.weight"].T + weights[f"{prefix}.{layer}.bias"][None, :]
    return x


def concat_scores(weights, first, second):
    """f([first_i; second_j])."""
    n = len(first)
    pairs = jnp.concatenate([jnp.repeat(first, n, axis=0), jnp.tile(second, (n, 1))], axis=1)
    return mlp(weights, "_f", pairs).reshape(n, n)


def straight_through(a, floor=1e-8):
    """torch's cosine similarity clamps the norm but differentiates it as if it had not: seen only at norms below the floor."""
    squared = jnp.sum(a**2, axis=-1, keepdims=True)
    norm = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
    return a / (norm + jax.lax.stop_gradient(jnp.maximum(norm, floor) - norm))


def cmd_case(inputs, given, words):
    return cmd(*inputs, moments=next((int(word[1]) for word in words if word[0] == "K"), 5))


def hsic_case(inputs, given, words):
    sigma = given.get("sigma", 1.0)
    return gaussian_kernel(*inputs, sigma) if "kernel" in words else hsic(*inputs, sigma, least_samples=4)


def triplet_case(inputs, given, words):
    normalise = partial(unit, floor=1e-8)
    return first_match_triplet(jnp.stack(inputs), given["labels"], given.get("margin", 1.0), normalise=normalise)


def hinge_case(inputs, given, words):
    labels = jnp.tile(given["labels"][:, 0], len(inputs))
    return triplet_hinge(jnp.concatenate(inputs), labels, normalise=partial(unit, inside=1e-8))


def convirt_case(inputs, given, words):
    a, b = (unit(x, floor=1e-12) for x in inputs)
    return symmetric_info_nce(a @ b.T, given.get("tau", 0.07), given.get("lam", 0.75))


def nce_case(inputs, given, words):
    return -info_nce(concat_scores(given, *inputs).T)


def club_case(inputs, given, words):
    x, y = inputs
    scores = concat_scores(given, y, x)
    return -info_nce(scores) if "learning" in words else club(scores)


def separable_case(inputs, given, words):
    x, y = inputs
    return mlp(given, "_h", y) @ mlp(given, "_g", x).T


def supcon_case(inputs, given, words):
    (features,) = inputs
    positives = same_label(given["labels"]) if "labels" in given else given["mask"] > 0 if "mask" in given else None
    numbers = {key: given[key] for key in ("temperature", "base_temperature") if key in given}
    anchor_views = 1 if "one_mode" in words else None
    return supcon(features if "raw" in words else unit(features), positives, anchor_views=anchor_views, **numbers)


def hcl_case(inputs, given, words):
    """The stored blocks, modality by modality, laid out as representations."""
    lattice = full_lattice(3)
    blocks = dict(zip([(m, s) for m in (1, 2, 3) for s in lattice if m in s], inputs, strict=True))
    ranks = {s: blocks[s[0], s].shape[1] for s in lattice}
    hierarchy = Hierarchy([sum(r for s, r in ranks.items() if m in s) for m in (1, 2, 3)], ranks)
    rows = [[blocks.get((m, s), jnp.zeros_like(blocks[s[0], s])) for s in lattice] for m in (1, 2, 3)]
    return hcl_loss(jnp.stack([jnp.concatenate(row, axis=1) for row in rows]), hierarchy, given["lam"])


def of_inputs(loss, **options):
    return lambda inputs, given, words: loss(*inputs, **options)


LOSSES = {
    "cmd_port": cmd_case,
    "cmd_official": cmd_case,
    "diff_port": of_inputs(difference, normalise=partial(unit, floor=1e-8), reduce=jnp.sum),
    "diff_official": of_inputs(difference, normalise=partial(unit, outside=1e-6, held=True)),
    "hsic_port": hsic_case,
    "triplet_port": triplet_case,
    "hinge_official": hinge_case,
    "ortho_port": of_inputs(orthogonality, normalise=straight_through),
    "ortho_official": of_inputs(orthogonality, normalise=partial(unit, inside=float(np.float32(1e-12)))),  # a float in torch
    "infonce_convirt": convirt_case,
    "infonce_scores": lambda inputs, given, words: info_nce(inputs[0].T if "transposed" in words else inputs[0]),
    "prob_classifier_obj": of_inputs(classifier_log_likelihood),
    "prob_classifier_eval": of_inputs(classifier_information),
    "nce_critic": nce_case,
    "club_critic": club_case,
    "concat_critic": lambda inputs, given, words: concat_scores(given, *inputs),
    "separable_critic": separable_case,
    "supcon": supcon_case,
    "hcl_loss": hcl_case,
    "mse_official": of_inputs(lambda a, b: jnp.mean((a - b) ** 2)),
}
WORDS = (
    "K1",
    "K2",
    "K3",
    "kernel",
    "transposed",
    "learning",
    "raw",
    "one_mode",
)  # parts of a case's name that change the program
NUMBERS = {"margin0.15": {"margin": 0.15}, "temperature0.5": {"temperature": 0.5}}  # parameters that only the name tells
NUMBERS |= {"temperature0.5_base0.5": {"temperature": 0.5, "base_temperature": 0.5}}


@cache
def compiled(loss, words, differentiated):
    of_words = partial(loss, words=words)
    return jax.jit(jax.value_and_grad(of_words) if differentiated else lambda *args: (of_words(*args), []))


def under(prefix):
    """The stored arrays of a function or case, by their names below it; numbers in float64."""
    arrays = {key.removeprefix(prefix): array for key, array in reference_arrays("deep/losses").items() if key.startswith(prefix)}
    return {key: array.astype(float) if array.dtype.kind == "f" else array for key, array in arrays.items()}


def numbered(stored, word):
    """word1, word2, ... as a list."""
    return [stored.pop(f"{word}{i}") for i in range(1, 13) if f"{word}{i}" in stored]


def test_every_stored_case_is_handled():
    stored = {key.rsplit("/", 1)[0] for key in reference_arrays("deep/losses") if key.endswith("/value")}
    assert stored == set(NAMES)
    assert len(NAMES) == len(stored) == 116


@pytest.mark.parametrize("name", NAMES)
def test_released_code_agrees(name):
    """Values and gradients to 1e-9 relative, but for rounding that the released code or the problem itself has."""
    function, case = name.split("/")
    given = under(f"{name}/") | under(f"{function}/w/") | NUMBERS.get(case, {})
    inputs, gradients, expected = numbered(given, "in"), numbered(given, "grad"), given.pop("value")
    words = tuple(word for word in WORDS if word in case)
    value, found = jax.device_get(compiled(LOSSES[function], words, bool(gradients))(inputs, given))
    if np.isnan(expected).any():
        assert float(value) == 0
    else:
        allowed = VALUE_TOLERANCE.get(name, VALUE_TOLERANCE.get(function, 1e-14))
        assert_at_most(np.abs(value - expected).max(), allowed + 1e-9 * np.abs(expected).max(), f"{name}: error of the value")
    for ours, theirs in zip(found, gradients, strict=True):
        assert np.isfinite(ours).all()
        if name not in ONLY_FINITE:
            tolerance = 1e-13 + GRADIENT_TOLERANCE.get(name, 1e-9) * np.linalg.norm(theirs)
            assert_at_most(np.linalg.norm(ours - theirs), tolerance, f"{name}: error of a gradient")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


SMALL = Hierarchy((3, 3), {(1, 2): 2, (1,): 1, (2,): 1})
LABELS = jnp.asarray([0, 1, 1, 0, 2, 1, 0, 3])
GROUPS = np.array([0, 0, 1, 2, 0, 0, 1, 2])
DEFAULTS = {
    "cmd": cmd,
    "difference": difference,
    "cross_covariance": cross_covariance,
    "orthogonality": orthogonality,
    "hsic": hsic,
    "third_moments": lambda a, b: third_moments(jnp.concatenate([a, b], axis=1), GROUPS),
    "first_match_triplet": lambda a, b: first_match_triplet(jnp.stack([a, b]), LABELS),
    "triplet_hinge": lambda a, b: triplet_hinge(jnp.concatenate([a, b]), jnp.tile(LABELS, 2)),
    "info_nce": lambda a, b: info_nce(a @ b.T),
    "symmetric_info_nce": lambda a, b: symmetric_info_nce(cosine(a, b)),
    "club": lambda a, b: club(a @ b.T),
    "classifier_log_likelihood": lambda a, b: classifier_log_likelihood(a @ b.T),
    "classifier_information": lambda a, b: classifier_information(a @ b.T),
    "supcon": lambda a, b: supcon(unit(jnp.stack([a, b], axis=1)), same_label(LABELS)),
    "hcl_loss": lambda a, b: hcl_loss(jnp.where(SMALL.modality_mask[:, None], jnp.stack([a, b]), 0), SMALL),
}


hsic_of = jax.jit(hsic)


@cache
def differentiated(name):
    return jax.jit(jax.value_and_grad(DEFAULTS[name], argnums=(0, 1)))


@pytest.mark.parametrize("name", DEFAULTS)
def test_values_and_gradients_are_finite_where_norms_and_spreads_are_zero(name):
    """In float32, whose result is float32 and that of float64 to its precision."""
    a, b = draw(8, 4), draw(8, 4, seed=1)
    x, y = (array.astype(np.float32) for array in (a, b))
    value, _ = differentiated(name)(x, y)
    assert value.dtype == jnp.float32
    assert_at_most(abs(float(value) - float(jax.jit(DEFAULTS[name])(a, b))), 1e-4, f"{name}: float32 − float64")
    zero, constant = np.zeros_like(x), np.full_like(x, 0.3)
    one_zero_row = np.where(np.arange(8)[:, None] == 3, np.float32(0), x)
    for pair in [(zero, zero), (zero, x), (constant, constant), (constant, x), (x, x), (one_zero_row, zero), (one_zero_row, x)]:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(differentiated(name)(*pair)))


def test_unit_is_the_vector_over_its_guarded_length():
    a = np.vstack([draw(3, 4), np.zeros((1, 4)), 1e-9 * draw(1, 4, seed=1)])
    norms = np.linalg.norm(a, axis=1, keepdims=True)
    lengths = {"floor": np.maximum(norms, 1e-8), "inside": np.sqrt(norms**2 + 1e-8), "outside": norms + 1e-6}
    guards = {"floor": 1e-8, "inside": 1e-8, "outside": 1e-6}
    guarded, plain, held = jax.jit(
        lambda x: (
            {name: unit(x, **{name: guard}) for name, guard in guards.items()},
            unit(x),
            jax.grad(lambda x: jnp.sum(unit(x, held=True)))(x),
        )
    )(a)
    for name, of_rows in lengths.items():
        assert_close(guarded[name], a / of_rows, name)
    assert_close(plain, np.divide(a, norms, where=norms > 0, out=np.zeros_like(a)), "no guard")
    assert_close(held[:3], np.repeat(1 / norms[:3], 4, axis=1), "gradient with the length held")


def test_equal_samples_have_no_moment_discrepancy():
    value, gradients = jax.device_get(differentiated("cmd")(draw(8, 4), draw(8, 4)))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("penalty", [difference, cross_covariance])
def test_orthogonal_centred_designs_have_no_covariance(penalty):
    basis = np.linalg.qr(np.column_stack([np.ones(12), draw(12, 5)]))[0][:, 1:]
    a, b = 3 + basis[:, :2], basis[:, 2:4] - 7
    if penalty is difference:  # its rows are normalised, which orthogonality survives where all rows are equally long
        a, b = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]), np.array([[1.0, -1], [-1, 1], [-1, 1], [1, -1]])
    of_designs = jax.jit(penalty)
    assert_at_most(of_designs(a, b), 1e-28, "penalty of orthogonal designs")
    assert_at_least(of_designs(a, a), 0.01, "penalty of equal ones")


def test_the_cross_covariances_of_structures_are_their_overlap():
    H = draw(3, 10, LATTICE.n_factors) * LATTICE.modality_mask[:, None]
    pairs = [(H[m][:, [j]], H[m][:, [k]]) for m in range(3) for j, k in combinations(range(LATTICE.n_factors), 2)]
    summed = jax.jit(jax.vmap(cross_covariance))(*map(np.stack, zip(*pairs, strict=True))).sum()
    assert_close(summed / 3, jax.jit(structure_overlap, static_argnums=1)(H, LATTICE), "mean over modalities")


@pytest.mark.parametrize("sigma", [None, 0.7])
def test_hsic_is_the_trace_of_its_definition(sigma):
    a, b = draw(15, 3), draw(15, 2, seed=1)

    def kernel(x):
        distances = np.linalg.norm(x[:, None] - x[None, :], axis=-1)
        variance = np.median(distances[np.triu_indices(15, 1)] ** 2) if sigma is None else sigma**2
        return np.exp(-(distances**2) / 2 / variance)

    H = np.eye(15) - 1 / 15
    expected = np.trace(kernel(a) @ H @ kernel(b) @ H) / 14**2
    assert_close(hsic_of(a, b, sigma), expected, "HSIC")


def test_hsic_is_zero_without_dependence_and_never_negative():
    a, others = jnp.asarray(draw(10, 3)), jnp.asarray(draw(200, 10, 2, seed=1))
    of_a = jax.jit(jax.vmap(lambda b: hsic(a, b)))
    assert_at_most(jnp.abs(of_a(jnp.full_like(others, 1e3 / 7))).max(), 1e-15, "HSIC with a constant")
    assert_at_least(of_a(others).min(), 0, "smallest HSIC of 200 draws")
    assert_close(of_a(50 + 10 * others), of_a(others), "median bandwidth: whatever the scale and offset", slack=1e5)


def test_an_offset_costs_hsic_no_digits():
    a, b = draw(40, 3).astype(np.float32), draw(40, 2, seed=1).astype(np.float32)
    assert_at_most(relative(hsic_of(a + 100, b, 1.0), hsic_of(a, b, 1.0)), 1e-4, "relative change by an offset of 100")


def cosines_of(features):
    rows = features / np.linalg.norm(features, axis=-1, keepdims=True)
    return rows @ rows.T


def looped_hinge(features, y, margin):
    cosines, n, of_anchors = cosines_of(features), len(y), []
    for a in range(n):
        terms = [
            max(0, margin * abs(y[a] - y[q]) - cosines[a, p] + cosines[a, q])
            for p in range(n)
            for q in range(n)
            if p != a and y[p] == y[a] and y[q] != y[a]
        ]
        of_anchors += [np.mean(terms)] if terms else []
    return np.mean(of_anchors)


def looped_first_match(blocks, y, margin):
    M, n, _ = blocks.shape
    cosines, terms = cosines_of(blocks.reshape(M * n, -1)), []
    for m in range(M):
        for i in range(n):
            other = next(k for k in range(M) if k != m)
            positive = next(j for j in range(n) if y[j] == y[i])
            negative = next(j for j in range(n) if y[j] != y[i])
            own = cosines[m * n + i]
            terms.append(max(0, own[m * n + negative] - own[other * n + positive] + margin))
    return np.mean(terms)


def test_triplet_losses_are_their_loops():
    blocks, y = draw(3, 8, 4), np.asarray(LABELS)  # two labels occur once: with one modality they have no positive
    first, hinge = jax.jit(first_match_triplet), jax.jit(triplet_hinge)
    for margin in (0.15, 1.0):
        looped = looped_first_match(blocks, y, margin)
        assert_close(first(blocks, y, margin), looped, f"first matches, margin {margin}")
        for M in (1, 3):
            features, labels = blocks[:M].reshape(8 * M, 4), np.tile(y, M)
            looped = looped_hinge(features, labels, margin)
            assert_close(hinge(features, labels, margin), looped, f"all pairs of {M} modalities, margin {margin}")


def test_the_hinge_of_all_triples_needs_no_array_of_them():
    n = 40
    program = jax.make_jaxpr(jax.grad(triplet_hinge))(jnp.zeros((n, 3)), jnp.arange(n) % 3)
    largest = max(out.aval.size for equation in equations(program.jaxpr) for out in equation.outvars)
    assert_at_most(largest, 2 * n * (n + 1), "entries of the largest array")


def test_supcon_is_its_loop_over_anchors_that_have_positives():
    features, y, tau = draw(8, 1, 3), np.asarray(LABELS), 0.5
    inner, of_anchors = features[:, 0] @ features[:, 0].T / tau, []
    for a in range(8):
        others = [j for j in range(8) if j != a]
        terms = [inner[a, p] - np.log(np.exp(inner[a, others]).sum()) for p in others if y[p] == y[a]]
        of_anchors += [np.mean(terms)] if terms else []
    of_features = jax.jit(partial(supcon, temperature=tau, base_temperature=tau))
    assert_close(of_features(features, y[:, None] == y), -np.mean(of_anchors), "SupCon")
    assert float(of_features(features[:1])) == 0


def test_info_nce_is_at_most_log_n_and_club_takes_off_a_constant():
    scores = 10 ** np.linspace(-2, 6, 60)[:, None, None] * draw(60, 16, 16)
    assert_at_most(jax.jit(jax.vmap(info_nce))(scores).max(), np.log(16) + 1e-9, "InfoNCE of random scores")
    one, of_scores, symmetric = scores[20], jax.jit(club), jax.jit(symmetric_info_nce)
    assert_close(of_scores(one + 5), of_scores(one), "CLUB")
    assert_close(symmetric(one, 0.1, 0.5), symmetric(one.T, 0.1, 0.5), "equally weighted, either way round")


def test_bounds_of_a_gaussian_pair_stand_where_the_theory_has_them():
    """With the exact log density ratio CLUB has mean (1 − 1/n)·ρ²/(1 − ρ²); InfoNCE stays below I = −½ log(1 − ρ²)."""
    rho, n, repeats = 0.5, 64, 400
    x, e = draw(2, repeats, n)
    y = rho * x + np.sqrt(1 - rho**2) * e
    u, v = x[:, :, None], y[:, None, :]
    ratio = -np.log(1 - rho**2) / 2 - (rho**2 * (u**2 + v**2) - 2 * rho * u * v) / (2 * (1 - rho**2))
    upper, lower = (np.asarray(jax.jit(jax.vmap(bound))(ratio)) for bound in (club, info_nce))
    sem_upper, sem_lower = (values.std(ddof=1) / np.sqrt(repeats) for values in (upper, lower))
    assert_within(upper.mean(), (1 - 1 / n) * rho**2 / (1 - rho**2), 4 * sem_upper, "mean CLUB")
    information = -np.log(1 - rho**2) / 2
    assert_at_most(lower.mean(), information + 4 * sem_lower, "mean InfoNCE")
    assert_at_least(lower.mean(), 0.9 * information, "mean InfoNCE")


def test_a_classifier_with_the_right_odds_gives_back_the_ratio():
    ratio = draw(9, 9)
    information = jax.jit(classifier_information)(ratio - np.log(8))
    assert_close(information, np.diagonal(ratio).mean(), "mean log density ratio")
    ignorant = jax.jit(classifier_log_likelihood)(np.zeros((9, 9)))
    assert_close(ignorant, -np.log(2), "log-likelihood of an ignorant classifier")


def test_third_moments_are_those_of_the_halves():
    """Σ over the triples that are not all of one group of T_abc T'_abc/6, with both arrays of third moments formed; n odd."""
    h = draw(9, 5)
    groups = np.array([3, 3, 0, 1, 0])
    T = [np.einsum("ia,ib,ic->abc", half, half, half) / len(half) for half in (h[:4], h[4:])]
    a, b, c = np.ix_(groups, groups, groups)
    expected = np.sum(T[0] * T[1] * ~((a == b) & (b == c))) / 6
    assert_close(jax.jit(partial(third_moments, groups=groups))(h), expected, "third moments")


@pytest.mark.parametrize(("dependent", "truth"), [(False, 0.0), (True, 1.0)])
def test_third_moments_are_unbiased(dependent, truth):
    """Three groups of a sign each, the third the product of the others or independent: uncorrelated, but E abc = 1 in six orders.

    A skewed e beside the first sign shows that moments within a group, E e³ = 2, do not count.
    """
    rng = np.random.default_rng(5)
    a, b, c = rng.choice([-1.0, 1.0], size=(3, 4000, 32))
    h = np.stack([a, rng.exponential(size=a.shape) - 1, b, a * b if dependent else c], axis=-1)
    values = np.asarray(jax.jit(jax.vmap(lambda x: third_moments(x, np.array([0, 0, 1, 2]))))(h))
    sem = values.std(ddof=1) / np.sqrt(4000)
    assert_at_most(sem, 0.05, "standard error")
    assert_within(values.mean(), truth, 4 * sem, "mean third moments")


def test_the_released_regulariser_is_its_sum_and_collapses():
    """Inner products over the first min(r_s, r_t) coordinates; Σ|a + 2b + c|² where vectors are equal within a level."""
    of_blocks = jax.jit(signed_overlap, static_argnums=1)
    hierarchy = Hierarchy((9, 9), {(1, 2): 3, (1,): 2, (2,): 4})
    H = draw(2, 5, hierarchy.n_factors) * hierarchy.modality_mask[:, None]
    blocks = [(H[..., hierarchy.columns(s)], r) for s, r in hierarchy.ranks]
    expected = sum(np.sum(one[..., : min(r, k)] * two[..., : min(r, k)]) for one, r in blocks for two, k in blocks)
    assert_close(of_blocks(H, hierarchy), expected, "sum over pairs of structures")
    a, b = (draw(3, 5, 4, seed=seed) for seed in (1, 2))
    lattice = Hierarchy.full((16, 16, 16), 4)
    level = {3: a, 2: b, 1: a}
    H = np.concatenate([level[len(s)] * np.isin([1, 2, 3], s)[:, None, None] for s in lattice.structures], axis=-1)
    assert_close(of_blocks(H, lattice), 4 * np.sum((a + b) ** 2), "closed form")
    collapsed = np.concatenate(
        [(-a if len(s) == 2 else a) * np.isin([1, 2, 3], s)[:, None, None] for s in lattice.structures], -1
    )
    assert_at_most(of_blocks(collapsed, lattice), 1e-28, "opposite directions")


def test_every_vector_of_a_structure_has_length_one():
    units = jax.jit(unit_structures, static_argnums=1)(draw(2, 6, TWO.n_factors) * TWO.modality_mask[:, None], TWO)
    for s in TWO.structures:
        norms = np.linalg.norm(np.asarray(units)[..., TWO.columns(s)], axis=-1)
        assert_close(norms, np.repeat(np.isin([1, 2], s)[:, None].astype(float), 6, axis=1), f"norms in {s}")


def test_too_few_samples_or_modalities_are_refused():
    with pytest.raises(ValueError, match="representations: has 1 samples"):
        third_moments(jnp.ones((1, 3)), np.arange(3))
    with pytest.raises(ValueError, match="scores: has 1 samples"):
        classifier_information(jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="blocks: has 1 modality"):
        first_match_triplet(jnp.ones((1, 8, 2)), LABELS)
