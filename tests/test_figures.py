"""Figures: they say what the table says, treat every method alike, and are drawn from tables alone."""

import numpy as np
import polars as pl
import pytest

from figures import curves, recovery, style
from hcl_jax import ESTIMATORS, LIMITS, Hierarchy
from hcl_jax.experiments import Cell, Recovery, format_summary, summarise
from hcl_jax.experiments.store import Part
from hcl_jax.experiments.tidy import tidy_rows
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND

METHODS = ("hcl-vb", "hcl-ml", "hcl-gd", "hcl-gn", "hcl-svd", "naive-svd", "cramer-rao")
NORMS = ("spectral", "frobenius", "two_to_infinity")


def outcome(rng, method, cell, replicates, scale):
    """Errors that fall like n^(−1/2), the same for all structures of a size."""
    structures = (cell.hierarchy if method == "cramer-rao" else cell.fitted_hierarchy.union(cell.hierarchy)).structures
    error = scale * cell.n**-0.5
    seen = np.array([[m in s for m in cell.hierarchy.modalities] for s in structures], float)
    noise = lambda shape: np.exp(0.1 * rng.standard_normal((replicates, *shape)))
    block = error * seen[None] * noise(seen.shape)
    names = {f"procrustes_{norm}": error / (1 + i) * noise(()) for i, norm in enumerate(NORMS)}
    names |= {"gram_frobenius": 3 * error * noise(()), "gram_relative": error * noise(())}
    names |= {"structure_gram_frobenius": block.sum(-1), "block_gram_frobenius": block}
    return names | {"status": np.zeros(replicates, int), "steps": np.full(replicates, 9)}


def synthetic_table(sizes=(5_000, 10_000, 20_000, 30_000), noises=(1.0, 10.0), fitted=("true",), replicates=20):
    rng = np.random.default_rng(0)
    rows = []
    for noise in noises:
        for n in sizes:
            for variant in fitted:
                cell = Cell(Hierarchy.full((20, 30, 40), 3), n, noise, fitted=variant)
                for i, method in enumerate(METHODS):
                    values = outcome(rng, method, cell, replicates, 100 * noise * 1.2 ** (6 - i) * (1 + (variant != "true")))
                    structures, part = Recovery().structures(cell, method), Part(0, replicates - 1)
                    rows.append(tidy_rows("recovery", cell, method, structures, part, values))
    return pl.concat(rows)


def test_every_method_has_its_own_look():
    looks = {name: style.METHODS[name] for name in [*ESTIMATORS, "cramer-rao"]}
    assert len({look.colour for look in looks.values()}) == len(looks)
    assert len({look.label for look in looks.values()}) == len(looks)
    assert len({look.marker for look in looks.values()}) == len(looks)
    assert set(LIMITS) - {"detection"} <= set(style.METHODS)


def test_slope_of_a_power_law_is_exact():
    n = np.array([1e3, 2e3, 5e3, 2e4])
    slope, sem = curves.loglog_slope(n, 7 * n**-0.5, 0.01 * n**-0.5)
    assert slope == pytest.approx(-0.5, abs=1e-12)
    assert 0 < sem < 0.01


def test_slope_error_is_the_spread_of_slopes():
    rng = np.random.default_rng(1)
    n = np.array([1e3, 3e3, 1e4, 3e4])
    relative = np.array([0.01, 0.03, 0.02, 0.05])
    fits = [curves.loglog_slope(n, n**-0.5 * np.exp(relative * rng.standard_normal(4)), relative * n**-0.5) for _ in range(2_000)]
    slopes, sems = np.array(fits).T
    assert np.std(slopes) == pytest.approx(np.mean(sems), rel=0.07)  # four standard errors of a standard deviation


def test_curves_leave_out_what_is_not_finite():
    values = {"hcl-ml": [1.0, 7.0, np.nan], "cramer-rao": [1.0, 7.0, 5.0]}
    columns = {"n": 10, "replicate": [0, 1, 2] * 2, "method": np.repeat(list(values), 3), "metric": "gram_frobenius", "status": 0}
    table = pl.DataFrame(columns | {"value": np.concatenate(list(values.values()))})
    drawn = {
        average: dict(curves.error_curves(table, average=average).select("method", "mean").rows()) for average in ("rms", "mean")
    }
    assert drawn["rms"] == {"hcl-ml": pytest.approx(5.0), "cramer-rao": pytest.approx(5.0)}
    assert drawn["mean"]["hcl-ml"] == 4.0
    assert dict(curves.over_limit(table).select("method", "mean").rows()) == {"hcl-ml": pytest.approx(1.0)}


def test_failures_are_counted_under_the_figure():
    table = synthetic_table(sizes=(100, 200), noises=(1.0,))
    failed = (pl.col("method") == "hcl-gd") & (pl.col("replicate") < 3) & (pl.col("n") == 100)
    bounded = (pl.col("method") == "hcl-ml") & (pl.col("replicate") < 2)
    table = table.with_columns(status=pl.when(failed).then(NON_FINITE).when(bounded).then(ON_BOUND).otherwise("status"))
    figure = recovery.fig_global_errors(table)
    note = figure.get_supxlabel().replace("\n", " ")
    assert "Root mean square ± standard error over 20 replicates" in note
    assert "Non-finite, left out of the averages: HCL-GD 3 of 40." in note
    assert "Out of steps, kept in the averages: none." in note
    assert note.endswith("With a noise variance on its bound, kept in the averages: HCL-ML 4 of 40.")
    predictions = curves.failure_note(table.with_columns(m=50))
    assert "on its bound or an indefinite moment projected, kept in the averages: HCL-ML 4 of 40." in predictions


def test_the_summary_tells_settings_and_statuses_apart():
    table = synthetic_table(sizes=(100,), noises=(0.3, 0.1 + 0.2))
    ended = pl.col("method").replace_strict({"hcl-gd": NON_FINITE, "hcl-ml": ON_BOUND}, default=CONVERGED)
    table = table.with_columns(status=pl.when(pl.col("replicate") < 3).then(ended).otherwise(CONVERGED))
    summary = summarise(table, "gram_frobenius")
    blocks = format_summary(summary, "gram_frobenius").split("\n\n")
    assert [block.partition("\n")[0].partition("noise variance ")[2] for block in blocks] == ["0.3", "0.30000000000000004"]
    ends = "hcl-ml: of 20 replicates 0 non-finite, 0 out of steps, 3 with a noise variance on its bound"
    assert all(block.endswith(f"\n{ends}\nhcl-gd: of 20 replicates 3 non-finite, 0 out of steps") for block in blocks)
    predictions = format_summary(summary.with_columns(m=50), "gram_frobenius")
    assert f"{ends} or an indefinite moment projected\n" in predictions


def test_global_figure_has_a_panel_a_metric_and_setting_and_slopes_in_its_legends():
    figure = recovery.fig_global_errors(synthetic_table(), ("procrustes_spectral", "gram_relative", "gram_frobenius"))
    assert len(figure.axes) == 3 * 2
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(labels) == len(METHODS)
    assert all("−0." in label for label in labels)


def test_structures_and_blocks_have_a_panel_each():
    table = synthetic_table(noises=(1.0,))
    titles = lambda figure: [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles(recovery.fig_structures(table))) == 7
    assert len(titles(recovery.fig_blocks(table))) == 12


def test_two_to_infinity_is_in_units_of_an_even_spread():
    table = synthetic_table(noises=(1.0,))
    flat = table.with_columns(value=pl.when(pl.col("metric").str.starts_with("procrustes")).then(1.0).otherwise("value"))
    line = recovery.fig_two_to_infinity(flat).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), np.sqrt(90 / np.log(90)))


def test_wrong_hierarchies_show_every_variant():
    table = synthetic_table(sizes=(5_000,), noises=(1.0,), fitted=("true", "missing", "low", "high", "merged"))
    figure = recovery.fig_wrong_hierarchies(table)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][0] == "true"
    assert len(figure.axes[0].get_xticks()) == 5


def test_kinds_of_noise_share_all_but_line_and_label_with_their_estimator():
    plain, view, feature = (style.method_style(f"hcl-vb{kind}+posterior") for kind in ("", "@view", "@feature"))
    assert (plain.colour, plain.marker) == (view.colour, view.marker) == (feature.colour, feature.marker)
    assert len({str(look.line) for look in (plain, view, feature)}) == 3
    assert view.label == "HCL-VB, noise by view"
    assert style.ordered(["naive-svd", "hcl-ml", "hcl-vb@view", "hcl-vb"]) == ["hcl-vb", "hcl-vb@view", "hcl-ml", "naive-svd"]


def test_settings_that_differ_have_files_of_their_own():
    setting = {"dims": "6x5", "structures": "12,1,2", "ranks": "1,1,1", "noise_variance": 0.3}
    slugs = [
        curves.setting_slug(setting | more)
        for more in ({}, {"noise_variance": 0.30000000000000004}, {"loadings": "rna/counts"}, {"loadings": "β" * 200})
    ]
    assert len(set(slugs)) == 4
    assert all("/" not in slug and len(slug.encode()) <= 120 for slug in slugs)


def test_unknown_metric_is_refused_with_its_name():
    with pytest.raises(ValueError, match=r"--metrics: unknown 'nonsense'; expected some of .*gram_frobenius"):
        recovery.check_metrics(synthetic_table(sizes=(5_000,)), ("nonsense",))


def test_all_figures_are_written(tmp_path):
    for name, figure in recovery.figures(synthetic_table(fitted=("true", "missing")), ("gram_frobenius",)):
        (path,) = style.save(figure, tmp_path, name, ("png",))
        assert path.stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 1 + 1 + 1 + 2 * 2 + 1
