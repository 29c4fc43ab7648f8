"""Own files, in which samples lack whole views: what is shared, scores of everyone, the missing view with its uncertainty.

    python docs/tutorials/missing_view.py        # a minute; tests/test_tutorials.py runs it as well

The files are drawn here, so that what is said of them can be checked. The same from a shell:

    hcl check genes.csv proteins.csv clinic.csv
    hcl fit genes.csv proteins.csv clinic.csv --outcome outcome.csv --output fit.npz
    hcl impute fit.npz proteins genes.csv clinic.csv --output proteins-imputed.csv
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import polars as pl

import hcl_jax

jax.config.update("jax_enable_x64", True)
generator = np.random.default_rng(0)
n, dims, ranks = 600, {"genes": 60, "proteins": 30, "clinic": 12}, {"genes+proteins+clinic": 2, "genes+proteins": 1, "clinic": 1}


def draw(rows):
    """Views of patients with known factors: two are shared by all, one by genes and proteins, one is the clinic's own."""
    factors = {name: generator.normal(size=(rows, rank)) for name, rank in ranks.items()}
    views = {view: generator.normal(size=(rows, dim)) for view, dim in dims.items()}
    for name, z in factors.items():
        for view in name.split("+"):
            views[view] += z @ loadings[name, view].T
    return views, factors


loadings = {(s, v): generator.normal(size=(dims[v], rank)) * 0.6 for s, rank in ranks.items() for v in s.split("+")}
views, factors = draw(n)
patients = [f"patient {i}" for i in range(n)]
lacks = generator.random(n) < 0.4

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)

    # 1. One file a view. Four in ten patients have no proteins: they are simply not in that file.
    for view, matrix in views.items():
        rows = np.flatnonzero(~lacks) if view == "proteins" else np.arange(n)
        table = pl.DataFrame(matrix[rows], schema=[f"{view}{j}" for j in range(dims[view])])
        table.insert_column(0, pl.Series("patient", [patients[i] for i in rows])).write_csv(folder / f"{view}.csv")

    # 2. Samples are joined by name, and each counts for the views that it has.
    files = {view: folder / f"{view}.csv" for view in dims}
    outcome = dict(zip(patients, factors["genes+proteins+clinic"][:, 0] + 0.3 * generator.normal(size=n), strict=True))
    found = hcl_jax.fit(files, y=outcome)
    print(found.structures)
    for sentence in found.warnings:
        print(sentence)

# 3. Proteins of those who lack them, predicted from genes and clinic, with standard deviations.
values, deviations = found.impute("proteins")
missing = np.array([patients.index(name) for name in values["sample"]])
order = np.argsort(missing)
predicted = values.drop("sample").to_numpy()[order][lacks]
within = np.abs(predicted - views["proteins"][lacks]) < 1.645 * deviations.drop("sample").to_numpy()[order][lacks]
explained = 1 - np.mean((predicted - views["proteins"][lacks]) ** 2) / np.var(views["proteins"][lacks])
print(f"of the missing proteins {explained:.0%} of the variance is predicted; 90 % intervals hold {within.mean():.0%} of them")

# 4. New patients, without proteins.
new, new_factors = draw(200)
frames = {view: pl.DataFrame(matrix, schema=[f"{view}{j}" for j in range(dims[view])]) for view, matrix in new.items()}
del frames["proteins"]
said = np.corrcoef(found.predict(frames), new_factors["genes+proteins+clinic"][:, 0])[0, 1]
print(f"correlation of the predicted outcome with its factor, without proteins: {said:.2f}")

assert dict(zip(found.structures["structure"], found.structures["rank"], strict=True)) == ranks
assert 0.86 < within.mean() < 0.94
assert explained > 0.4
assert said > 0.85
