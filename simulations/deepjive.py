"""DeepJIVE on signals whose joint and individual parts are known, on pairs of digits, and on a phantom of two scanners.

Claims (arXiv 2507.19682): joint and individual parts are recovered where views are nonlinear; joint codes of paired digits tell
the digit and individual ones the style; they predict better than separate autoencoders. Everything is judged on rows that no
method has seen. Beside the three ways to make joint codes the same stand separate autoencoders of equal size, AJIVE, JIVE,
nonlinear HCL, the ablations, and the step that chooses ranks. MNIST (LeCun, Cortes and Burges; usually stated as CC BY-SA 3.0)
is read from mnist/mnist.npz under HCL_DATA.

    python simulations/deepjive.py                                          # curves, blocks and digits, one seed: half an hour
    python simulations/deepjive.py --preset tiny                            # minutes
    python simulations/deepjive.py --setting curves blocks --seeds 0 1 2 3 4
    python simulations/deepjive.py --setting curves independent --methods ranks --seeds 0 1 2 3 4 5 6 7 8 9
    python simulations/deepjive.py --setting curves --rank-offsets -2 -1 0 1 2
    python simulations/deepjive.py --setting digits --methods explicit no-orthogonality all-at-once residual
    python simulations/deepjive.py --setting lattice phantom minor-phantom  # partial sharing; volumes
    python simulations/deepjive.py --setting volumes --file volumes.npz     # one's own: arrays of n × s × s × s, and `group`
    python figures/deepjive.py results/deepjive                             # draws the figures
"""

import dataclasses
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from scipy.linalg import subspace_angles
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from tqdm import tqdm

from hcl_jax.baselines import BASELINES
from hcl_jax.experiments import OutputError, configure
from hcl_jax.experiments.command_line import error_line, parse, peek
from hcl_jax.experiments.store import write_bytes
from hcl_jax.fitted import Fitted, column_structures
from hcl_jax.joint_ranks import choose_ranks
from hcl_jax.networks import NETWORKS, NetworkFit, TrainingConfig, deepjive
from hcl_jax.networks.deepjive import DeepjiveConfig, parts, warnings_of
from hcl_jax.signals import (
    halved,
    pair_images,
    sample_blocks,
    sample_curves,
    sample_phantom,
    sample_structured_curves,
)
from hcl_jax.structure import Hierarchy, Structure, structure_name

PROGRAM = "deepjive.py"
BOTH = (1, 2)
BOOTSTRAPS = 1000
DATA = Path(__file__).resolve().parent.parent / "../shared/data"


class Case(NamedTuple):
    """Rows, the first n of them to fit; what is known of them; and how DeepJIVE is fitted."""

    views: list[np.ndarray]
    n: int
    hierarchy: Hierarchy
    config: DeepjiveConfig
    parts: dict[tuple[int, Structure], np.ndarray] = {}
    factors: dict[Structure, np.ndarray] = {}
    classes: np.ndarray | None = None


def signals_case(signals: Any, n: int, ranks: dict, config: DeepjiveConfig) -> Case:
    views = [np.asarray(view) for view in signals.views]
    hierarchy = Hierarchy([view.shape[1] for view in views], ranks)
    arrays = lambda held: {name: np.asarray(value) for name, value in held.items()}
    return Case(views, n, hierarchy, config, arrays(signals.parts), arrays(signals.factors))


def curves(seed: int, n: int) -> Case:
    return signals_case(sample_curves(jr.key(seed), n + 1000), n, {"12": 2, "1": 2, "2": 2}, DeepjiveConfig())


def independent(seed: int, n: int) -> Case:
    return signals_case(sample_curves(jr.key(seed), n + 1000, joint=False), n, {"1": 4, "2": 4}, DeepjiveConfig())


def blocks(seed: int, n: int) -> Case:
    training = dataclasses.replace(DeepjiveConfig().training, steps=3000, batch_size=min(128, max(n // 2, 16)))
    # blocks stand in the order of the samples: held-out ones are the even ones
    signals = sample_blocks(jr.key(seed), 2 * n)
    order = np.concatenate([np.arange(1, 2 * n, 2), np.arange(0, 2 * n, 2)])
    case = signals_case(signals, n, {"12": 1, "1": 1, "2": 2}, DeepjiveConfig(hidden=(), training=training))
    rearranged = lambda held: {name: value[order] for name, value in held.items()}
    return case._replace(
        views=[view[order] for view in case.views], parts=rearranged(case.parts), factors=rearranged(case.factors)
    )


def lattice(seed: int, n: int) -> Case:
    hierarchy = Hierarchy.full((48, 48, 48), 2)
    signals = sample_structured_curves(jr.key(seed), n + 1000, hierarchy)
    return signals_case(signals, n, dict(hierarchy.ranks), DeepjiveConfig())


def digits(seed: int, n: int, change: str = "inverted", small: bool = True) -> Case:
    path = Path(os.environ.get("HCL_DATA", DATA)) / "mnist" / "mnist.npz"
    if not path.exists():
        raise ValueError(f"HCL_DATA: has no {path.name} in mnist/; expected MNIST as x_train, y_train, x_test and y_test")
    rng, found = np.random.default_rng(seed), []
    with np.load(path, allow_pickle=False) as held:
        for split, count in (("train", n), ("test", 2000)):
            images = held[f"x_{split}"].astype(np.float32) / 255
            found.append(pair_images(rng, halved(images) if small else images, held[f"y_{split}"], count, change))
    views = [np.concatenate([a[m].reshape(len(a[m]), -1) for a in found]) for m in (0, 1)]
    training = dataclasses.replace(DeepjiveConfig().training, steps=2000, batch_size=256, learning_rate=2e-3)
    config = DeepjiveConfig(hidden=(128, 64), gamma=0.01, training=training)
    if not small:
        config = dataclasses.replace(config, shapes=((28, 28),) * 2, channels=(16, 32), kernel=3)
    hierarchy = Hierarchy([view.shape[1] for view in views], {"12": 10, "1": 16, "2": 16})
    return Case(views, n, hierarchy, config, classes=np.concatenate([a[2] for a in found]))


def phantom(seed: int, n: int, side: int = 16, effect: float = 1.0) -> Case:
    held = sample_phantom(np.random.default_rng(seed), n + 300, side, effect)
    case = volumes_case([view.reshape(n + 300, -1) for view in held.views], n, side, held.group)
    return case._replace(factors={BOTH: held.atrophy[:, None]})


def volumes_case(views: list[np.ndarray], n: int, side: int, group: np.ndarray) -> Case:
    training = TrainingConfig(steps=1500, batch_size=32, learning_rate=2e-3, weight_decay=0.0, round_steps=50, patience=20)
    levels = side.bit_length() - 2
    config = DeepjiveConfig(shapes=((side,) * 3,) * len(views), channels=(8, 16, 32, 64)[:levels], gamma=0.01, training=training)
    ranks = {tuple(range(1, len(views) + 1)): 2} | {(m,): 4 for m in range(1, len(views) + 1)}
    return Case(views, n, Hierarchy([view.shape[1] for view in views], ranks), config, classes=group)


def own_volumes(file: Path | None, seed: int) -> Case:
    """Volumes from a file: every array but `group` is a view, of equal sides that are powers of two; a quarter is held out."""
    if file is None:
        raise ValueError("file: is missing; expected an .npz file of volumes, n × s × s × s each, and `group`, one integer a row")
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"file: {file} cannot be read ({error}); expected .npz with one array a view, and `group`") from None
    group = arrays.pop("group", None)
    sides = {array.shape[1:] for array in arrays.values()}
    side = next(iter(sides))[0] if sides else 0
    if group is None or len(sides) != 1 or next(iter(sides)) != (side,) * 3 or side < 8 or side & (side - 1):
        raise ValueError(f"file: holds volumes of {sorted(sides)}; expected one s × s × s, s a power of 2 from 8 on, and `group`")
    order = np.random.default_rng(seed).permutation(len(group))
    views = [array[order].reshape(len(group), -1).astype(np.float32) for array in arrays.values()]
    return volumes_case(views, len(group) * 3 // 4, side, np.asarray(group)[order].astype(int))


SETTINGS: dict[str, tuple[int, Callable[..., Case]]] = {
    "blocks": (1000, blocks),
    "curves": (2000, curves),
    "independent": (2000, independent),
    "lattice": (4000, lattice),
    "digits": (5000, digits),
    "digits-rotated": (5000, lambda seed, n: digits(seed, n, "rotated")),
    "digits-noisy": (5000, lambda seed, n: digits(seed, n, "noisy")),
    "digits-28": (5000, lambda seed, n: digits(seed, n, small=False)),
    "phantom": (600, phantom),
    "minor-phantom": (600, lambda seed, n: phantom(seed, n, effect=0.3)),
    "phantom-32": (400, lambda seed, n: phantom(seed, n, 32)),
}
"""By name: rows to fit, and how they are drawn from (seed, rows)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "explicit": {},
    "exchange": {"identity": "exchange"},
    "merged": {"identity": "merged", "restarts": 3},
    "separate": {},
    "no-orthogonality": {"gamma": 0.0, "project": False},
    "all-at-once": {"joint_first": 0.0},
    "exchange-all-at-once": {"identity": "exchange", "joint_first": 0.0},
    "small-batch": {"training": {"batch_size": 32}},
    "unstandardised": {"standardise": False},
    "adversarial": {"orthogonality": "adversarial"},
    "explained": {"orthogonality": "explained"},
    "residual": {"orthogonality": "residual"},
}
"""Of DeepJIVE; the options in which they differ."""
METHODS = (*VARIANTS, "ajive", "jive", "hcl", "ranks")


@dataclass(frozen=True)
class Study:
    """Every option is described below; --preset sets the defaults that are shown, and any option overrides it."""

    preset: Literal["tiny", "default"] = "default"
    """Where the other options start."""
    setting: tuple[str, ...] = ("blocks", "curves", "digits")
    """Data: blocks, curves, independent, lattice, digits[-rotated|-noisy|-28], phantom, minor-phantom, phantom-32, volumes."""
    methods: tuple[str, ...] = ("explicit", "exchange", "merged", "separate", "ajive", "hcl")
    """What to fit: variants of DeepJIVE, ajive, jive, hcl; ranks, the step that chooses them."""
    seeds: tuple[int, ...] = (0,)
    """One draw and one fit each."""
    n: int | None = None
    """Rows to fit. Default: the setting's."""
    rank_offsets: tuple[int, ...] = (0,)
    """Added to the joint rank and taken from the individual ones."""
    steps: int | None = None
    """Of the training of DeepJIVE. Default: the setting's."""
    file: Path | None = None
    """Of one's own volumes."""
    output: Path = Path("results/deepjive")
    """Folder of deepjive.parquet, to which fits are added that it lacks, and of the pictures of the first seed."""


PRESETS = {
    "tiny": Study(
        preset="tiny",
        setting=("blocks", "curves"),
        methods=("explicit", "ajive"),
        n=200,
        steps=200,
        output=Path("results/deepjive-tiny"),
    ),
    "default": Study(),
}


def check(study: Study) -> None:
    """Raise `ValueError`, naming the argument, for what cannot be drawn or fitted."""
    for name, known in (("setting", (*SETTINGS, "volumes")), ("methods", METHODS)):
        for value in getattr(study, name):
            if value not in known:
                raise ValueError(f"{name}: unknown {value!r}; expected some of {', '.join(known)}")
    for name, least in (("n", 20), ("steps", 1)):
        if getattr(study, name) is not None and getattr(study, name) < least:
            raise ValueError(f"{name}: is {getattr(study, name)}; expected at least {least}")


def case_of(study: Study, setting: str, seed: int) -> Case:
    """The rows, and the configuration with the steps that are asked for."""
    if setting == "volumes":
        case = own_volumes(study.file, seed)
    else:
        rows, make = SETTINGS[setting]
        case = make(seed, study.n or rows)
    return case if study.steps is None else case._replace(config=varied(case.config, {"training": {"steps": study.steps}}))


def varied(config: DeepjiveConfig, options: dict[str, Any]) -> DeepjiveConfig:
    """The configuration with these options; those of the training by name."""
    own = dict(options)
    training = dataclasses.replace(config.training, **own.pop("training", {}))
    return dataclasses.replace(config, training=training, **own)


def with_offset(hierarchy: Hierarchy, offset: int) -> Hierarchy | None:
    """The hierarchy with the joint rank so much larger and the individual ones so much smaller; None where that cannot be."""
    everyone = tuple(hierarchy.modalities)
    ranks = {s: r + (offset if s == everyone else -offset if len(s) == 1 else 0) for s, r in hierarchy.ranks}
    ranks = {s: max(r, 1) if len(s) == 1 else r for s, r in ranks.items()}
    return None if min(ranks.values()) < 0 else Hierarchy(hierarchy.dims, ranks)


def fit(method: str, case: Case, hierarchy: Hierarchy, seed: int) -> Fitted:
    """The method on the first n rows."""
    train, key = [view[: case.n] for view in case.views], jr.key(seed)
    if method in BASELINES:
        return BASELINES[method](train, hierarchy)
    if method == "hcl":
        return NETWORKS["hcl"](train, hierarchy, key=key)
    if method == "separate":
        widths = {(m,): len(hierarchy.active_columns(m)) for m in hierarchy.modalities}
        hierarchy = Hierarchy(hierarchy.dims, widths)
    return deepjive.fit(train, hierarchy, varied(case.config, VARIANTS[method]), key=key)


def measure(fitted: Fitted, case: Case) -> dict[str, float]:
    """What the scores hold of what is known, on the rows that were not fitted; regressions are fitted to the first n."""
    n, scores = case.n, np.asarray(fitted.transform(case.views), float)
    of_column = column_structures(fitted)
    by = {s: scores[:, [column == s for column in of_column]] for s in sorted({s for s in of_column if s})}
    found = signal_metrics(by, case, n)
    shared = tuple(range(1, len(case.views) + 1))
    if case.classes is not None:
        groups = {"all": scores} | {structure_name(s): block for s, block in by.items()}
        if isinstance(fitted, NetworkFit) and shared in by:
            one = np.tile(np.arange(len(case.views)) == 0, (len(scores), 1))
            alone = np.asarray(fitted.transform(case.views, one), float)
            joint = alone[:, [column == shared for column in of_column]]
            groups |= {f"{structure_name(shared)} from view 1": joint} if joint.any() else {}  # none where codes are merged
        for name, block in groups.items():
            found |= {f"{metric} {name}": value for metric, value in class_metrics(block, case.classes, n).items()}
    if not case.config.hidden and shared in by:
        linear = np.asarray(fit("ajive", case, case.hierarchy, 0).transform(case.views), float)[:, case.hierarchy.columns(shared)]
        found["degrees to ajive"] = degrees(by[shared][:n], linear[:n])
    if isinstance(fitted, NetworkFit) and fitted.method == "deepjive":
        found |= part_errors(fitted, case)
        found["warnings"] = float(len(warnings_of(fitted)))
    return found


def signal_metrics(by: dict[Structure, np.ndarray], case: Case, n: int) -> dict[str, float]:
    """R² of every structure's factors by that structure's scores and, at most, by another's; the largest correlation of scores of
    structures that share a view; the angle of the joint scores to the joint factors of blocks."""
    found = {}
    for s, factors in case.factors.items():
        held = {t: r_squared(block, factors, n) for t, block in by.items()}
        name = structure_name(s)
        found |= {
            f"r2 {name}": held.get(s, np.nan),
            f"r2 {name} elsewhere": max([v for t, v in held.items() if t != s], default=0.0),
        }
        others = [value for t, value in held.items() if t != s and set(s) & set(t)]
        found[f"r2 {name} elsewhere, mean"] = float(np.mean(others)) if others else 0.0
        if s in by and factors.shape[1] == by[s].shape[1] == 1:
            found["degrees to truth"] = degrees(by[s][:n], factors[:n])
    correlations = [
        abs(np.corrcoef(by[s][n:].T, by[t][n:].T)[: by[s].shape[1], by[s].shape[1] :]).max()
        for s in by
        for t in by
        if s < t and set(s) & set(t)
    ]
    return found | ({"correlation": float(max(correlations))} if correlations else {})


def degrees(a: np.ndarray, b: np.ndarray) -> float:
    """The largest angle between the spaces that the centred columns span."""
    return float(np.degrees(subspace_angles(a - a.mean(axis=0), b - b.mean(axis=0)).max()))


def r_squared(scores: np.ndarray, factors: np.ndarray, n: int) -> float:
    """On the rows from n on, all columns together."""
    F = np.column_stack([np.ones(len(scores)), scores])
    B = np.linalg.lstsq(F[:n], factors[:n], rcond=None)[0]
    return 1 - float(np.sum((factors[n:] - F[n:] @ B) ** 2) / np.sum((factors[n:] - factors[:n].mean(axis=0)) ** 2))


def class_metrics(scores: np.ndarray, classes: np.ndarray, n: int) -> dict[str, float]:
    """Accuracy of a linear probe and of a support vector machine; of two classes also precision, recall and F1, with the 95 %
    interval of each over resampled test rows."""
    found, truth = {}, classes[n:]
    for name, probe in (("accuracy", LogisticRegression(max_iter=300)), ("svm", SVC())):
        said = make_pipeline(StandardScaler(), probe).fit(scores[:n], classes[:n]).predict(scores[n:])
        found[name] = float(np.mean(said == truth))
        if name == "svm" and len(np.unique(classes)) == 2:
            rows = np.random.default_rng(0).integers(0, len(truth), (BOOTSTRAPS, len(truth)))
            drawn = judged(truth[rows], said[rows])
            for judge, value in judged(truth, said).items():
                low, high = np.percentile(drawn[judge], [2.5, 97.5])
                found |= {f"svm {judge}": float(value), f"svm {judge} low": low, f"svm {judge} high": high}
    return found


def judged(truth: np.ndarray, said: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, precision, recall and F1 of class 1 of 0 and 1, along the last axis; 0 where there is none to count."""
    hits, true, positive = (np.sum(x, axis=-1) for x in (truth * said, truth, said))
    return {
        "accuracy": np.mean(truth == said, axis=-1),
        "precision": hits / np.maximum(positive, 1),
        "recall": hits / np.maximum(true, 1),
        "f1": 2 * hits / np.maximum(true + positive, 1),
    }


def part_errors(fitted: NetworkFit, case: Case) -> dict[str, float]:
    """‖Ĵ − J‖/‖J‖ of joint and of individual parts, each about its mean among the training rows: mean over views; and the squared
    error of the views over their variance."""
    rebuilt, n = {place: np.asarray(part, float) for place, part in parts(fitted, case.views).items()}, case.n
    centred = lambda part: part[n:] - part[:n].mean(axis=0)
    left = [
        np.sum((centred(view) - sum(centred(part) for (l, _), part in rebuilt.items() if l == m)) ** 2)
        / np.sum(centred(view) ** 2)
        for m, view in enumerate(case.views, start=1)
    ]
    found = {"reconstruction": float(np.mean(left))}
    if set(case.parts) == set(rebuilt):
        errors: dict[str, list[float]] = {}
        for (m, s), part in case.parts.items():
            kind = "individual error" if len(s) == 1 else "joint error"
            error = np.linalg.norm(centred(rebuilt[m, s]) - centred(part)) / np.linalg.norm(centred(part))
            errors.setdefault(kind, []).append(float(error))
        found |= {kind: float(np.mean(values)) for kind, values in errors.items()}
    return found


def pictures(fitted: NetworkFit, case: Case) -> dict[str, np.ndarray]:
    """For eight held-out rows the views, their joint and their individual parts; what the decoders make of joint scores from −2
    to 2 standard deviations along their first principal axis."""
    shared = tuple(range(1, len(case.views) + 1))
    rows = [view[case.n : case.n + 8] for view in case.views]
    rebuilt, found = parts(fitted, rows), {}
    scores = np.asarray(fitted.transform([view[: case.n] for view in case.views]), float)
    own = fitted.hierarchy.columns(shared)
    axis = np.linalg.svd(scores[:, own] - scores[:, own].mean(axis=0), full_matrices=False)[2][0]
    along = np.tile(scores.mean(axis=0), (5, 1))
    along[:, own] += np.linspace(-2, 2, 5)[:, None] * axis * (scores[:, own] @ axis).std()
    walk = deepjive.decoded(fitted.network, jnp.asarray(along))
    for m, view in enumerate(rows, start=1):
        shape = (case.config.shapes[m - 1]) if case.config.shapes else (round(view.shape[1] ** 0.5),) * 2
        scale = np.asarray(fitted.marginals.scale)[fitted.hierarchy.rows(m)]
        mean = np.asarray(fitted.marginals.centre)[fitted.hierarchy.rows(m)]
        held = {
            "view": view,
            "joint": mean + np.asarray(rebuilt[m, shared]),
            "individual": mean + np.asarray(rebuilt[m, (m,)]),
            "walk": mean + np.asarray(walk[m, shared]) * scale,
        }
        found |= {f"{name} {m}": array.reshape(-1, *shape).astype(np.float32) for name, array in held.items()}
    return found


def run(study: Study) -> pl.DataFrame:
    """One row a number; what the folder holds is not fitted again."""
    path = study.output / "deepjive.parquet"
    table = pl.read_parquet(path) if path.exists() else None
    cells = [
        (setting, seed, method, offset)
        for setting in study.setting
        for seed in study.seeds
        for offset in study.rank_offsets
        for method in study.methods
    ]
    for setting, seed, method, offset in tqdm(cells, unit="fit", disable=None):
        about = {
            "setting": setting,
            "n": study.n or 0,
            "seed": seed,
            "method": method,
            "offset": offset,
            "steps": study.steps or 0,
        }
        if table is not None and len(table.filter(*(pl.col(name) == value for name, value in about.items()))):
            continue
        case = case_of(study, setting, seed)
        hierarchy = with_offset(case.hierarchy, offset)
        if hierarchy is None:
            continue
        began = time.perf_counter()
        if method == "ranks":
            widths = [len(hierarchy.active_columns(m)) for m in hierarchy.modalities]
            found = choose_ranks([view[: case.n] for view in case.views], widths, case.config, key=jr.key(seed))
            values, status = {"joint rank": float(found.joint)}, 0
        else:
            fitted = fit(method, case, hierarchy, seed)
            status = int(fitted.status)
            values = {"seconds": time.perf_counter() - began} | measure(fitted, case)
            pictured = setting.startswith(("digits", "phantom", "minor", "volumes")) and method in (
                "explicit",
                "exchange",
                "merged",
            )
            if pictured and seed == study.seeds[0]:
                study.output.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(study.output / f"{setting}-{method}.npz", **pictures(fitted, case))
        rows = pl.DataFrame([about | {"metric": name, "value": float(value), "status": status} for name, value in values.items()])
        table = rows if table is None else pl.concat([table, rows])
        write_bytes(path, parquet(table), study.output)
    assert table is not None, "there is a cell"
    return table


def parquet(table: pl.DataFrame) -> bytes:
    """The table as the bytes of a parquet file."""
    held = io.BytesIO()
    table.write_parquet(held)
    return held.getvalue()


def summary(table: pl.DataFrame) -> pl.DataFrame:
    """Means over seeds."""
    mean, sem = pl.col("value").mean(), pl.col("value").std() / pl.len().sqrt()
    return table.group_by("setting", "method", "offset", "metric", maintain_order=True).agg(
        mean, sem.alias("sem"), seeds=pl.len()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        default = PRESETS.get(peek(arguments, "preset")["preset"] or "default", PRESETS["default"])
        study = parse(Study, arguments, default, PROGRAM, __doc__)
        check(study)
        configure("float64")
        table = run(study)
    except (ValueError, OutputError) as error:
        print(f"{PROGRAM}: error: {error_line(Study, error)}", file=sys.stderr)
        return 2
    shown = table.filter(pl.col("setting").is_in(study.setting), pl.col("method").is_in(study.methods))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=130, float_precision=4, tbl_hide_dataframe_shape=True):
        print(summary(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
