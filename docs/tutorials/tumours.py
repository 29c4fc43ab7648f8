"""From three tables of the same tumours to a report: what mRNA, methylation and miRNA share, how sure that is, what it predicts.

    python docs/tutorials/tumours.py        # minutes; tests/test_tutorials.py runs it as well

Data: breast tumours of The Cancer Genome Atlas (open access), 347 of them, as the file tcga_brca5.npz under HCL_DATA has them.
"""

import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import hcl_jax
from hcl_jax.report import write_report

jax.config.update("jax_enable_x64", True)
path = Path(os.environ.get("HCL_DATA", "../shared/data")) / "tcga_brca5/tcga_brca5.npz"
if not path.is_file():
    raise SystemExit(f"{path} does not exist; expected the file, under HCL_DATA")
held = np.load(path)

# 1. Frames, one a view: rows are samples, named; columns are features. The views may have other samples, in any order.
tumours = held["patient"]
frames = {view: pd.DataFrame(held[view], index=tumours).add_prefix(view) for view in ("mrna", "meth", "mirna")}
subtype = pd.Series(held["pam50"], index=tumours, name="subtype")

# 2. One call: which structures there are and their ranks, as far as the data support them, and a regression of the subtype.
found = hcl_jax.fit(frames, y=subtype)
print(found.structures)
print(found.variance_explained())

# 3. How sure is that? Halves of the samples see the same, or not; permuted samples share nothing. Computed when first asked for.
print(found.assessment)

# 4. What is it worth? Everything is fitted again without each fold; principal components and all features stand beside it.
seen = found.evaluate(cv=5)
print(seen.outcome, seen.views, seen.structures)

# 5. The same as one file for a colleague, and the fit for the next tumours: features are found by name.
with tempfile.TemporaryDirectory() as folder:
    print(write_report(found, Path(folder) / "tumours.html", cv=5))
    found.save(Path(folder) / "tumours.npz")
    again = hcl_jax.load(Path(folder) / "tumours.npz")
new = {view: frame.iloc[:5, ::-1] for view, frame in frames.items() if view != "meth"}  # without methylation
print(again.transform(new).iloc[:, :2], again.predict(new))

accuracy = {row["method"]: row["mean"] for row in seen.outcome.iter_rows(named=True) if row["metric"] == "accuracy"}
assert accuracy["hcl_jax"] > 0.7, accuracy
assert np.allclose(again.transform(frames), found.scores())
