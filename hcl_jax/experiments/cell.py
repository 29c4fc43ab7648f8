"""A cell of a study: all that changes shapes or distributions, named by content; and hierarchies that are wrong on purpose."""

import re
import zlib
from dataclasses import dataclass

from hcl_jax.structure import Hierarchy, Structure, full_lattice, structure_name

FITTED = ("true", "missing", "extra", "low", "high", "merged")
SAMPLINGS = ("wishart", "data")
RANK_SHIFT = 2  # how far `low` and `high` are from the true ranks
NAME_BYTES = 120
_UNSAFE = re.compile(r"[^\w.,=+@ -]")


@dataclass(frozen=True)
class Cell:
    """One setting of the recovery study: the truth's hierarchy, how it is sampled, and the hierarchy that is fitted."""

    hierarchy: Hierarchy
    n: int
    noise_variance: float
    latent: str = "gaussian"
    sampling: str = "wishart"
    """`wishart` draws the covariance itself, `data` draws samples and accumulates them."""
    loadings: str = ""
    """Label of the real data whose fit is the truth; empty where each replicate draws its own loadings."""
    fitted: str = "true"
    """Which hierarchy is fitted: one of `FITTED`."""

    def __post_init__(self) -> None:
        _check_choice("sampling", self.sampling, SAMPLINGS)
        _check_choice("hierarchies", self.fitted, FITTED)
        if self.n < 2:
            raise ValueError(f"n_grid: holds {self.n}; expected at least 2 samples")
        if not 0 < self.noise_variance < float("inf"):
            raise ValueError(f"noise_variance: is {self.noise_variance}; expected a positive number")
        if self.latent != "gaussian" and self.sampling == "wishart":
            raise ValueError(
                f"sampling: is 'wishart' with {self.latent} latents; expected 'data', for only Gaussian ones are Wishart"
            )

    @property
    def fitted_hierarchy(self) -> Hierarchy:
        return fitted_hierarchy(self.hierarchy, self.fitted)

    @property
    def draw_name(self) -> str:
        """Names the data: all but the hierarchy that is fitted to them, so that fits of different hierarchies are paired."""
        fields = hierarchy_fields(self.hierarchy) | {"n": str(self.n), "noise_variance": number_name(self.noise_variance)}
        optional = {"latent": "gaussian", "sampling": "wishart", "loadings": ""}
        fields |= {name: getattr(self, name) for name, default in optional.items() if getattr(self, name) != default}
        return join_fields(fields)

    @property
    def name(self) -> str:
        """`key=value` in a fixed order, defaults left out, as `path_name` makes it."""
        return path_name(self.draw_name + (f",fitted={self.fitted}" if self.fitted != "true" else ""))

    @property
    def draw_checksum(self) -> int:
        """What the cell's data fold into the root key."""
        return zlib.crc32(self.draw_name.encode())

    def columns(self) -> dict[str, str | int | float]:
        """The cell's columns of a tidy table."""
        return {
            "cell": self.name,
            "n": self.n,
            "noise_variance": self.noise_variance,
            "latent": self.latent,
            "sampling": self.sampling,
            "loadings": self.loadings,
            "fitted": self.fitted,
            **hierarchy_columns(self.hierarchy),
        }


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}: unknown {value!r}; expected one of {', '.join(choices)}")


def hierarchy_fields(hierarchy: Hierarchy) -> dict[str, str]:
    """What a cell's name says of its hierarchy."""
    dims, ranks = {"dims": "x".join(map(str, hierarchy.dims))}, {rank for _, rank in hierarchy.ranks}
    if len(ranks) == 1 and hierarchy.structures == full_lattice(hierarchy.n_modalities):
        return dims | {"rank": str(ranks.pop())}
    return dims | {"ranks": "+".join(f"{structure_name(s)}r{rank}" for s, rank in hierarchy.ranks)}


def hierarchy_columns(hierarchy: Hierarchy) -> dict[str, str | int]:
    """What a tidy table says of it; `rank` is −1 where ranks differ."""
    ranks = [rank for _, rank in hierarchy.ranks]
    return {
        "rank": ranks[0] if len(set(ranks)) == 1 else -1,
        "dims": "x".join(map(str, hierarchy.dims)),
        "structures": ",".join(map(structure_name, hierarchy.structures)),
        "ranks": ",".join(map(str, ranks)),
    }


def join_fields(fields: dict[str, str]) -> str:
    """`key=value` pairs as one name."""
    return ",".join(f"{name}={value}" for name, value in fields.items())


def number_name(value: float) -> str:
    """Twelve digits, or all that the number needs: no two numbers have one name.

    >>> number_name(1.0), number_name(0.3), number_name(0.1 + 0.2)
    ('1', '0.3', '0.30000000000000004')
    """
    text = format(value, ".12g")
    return text if float(text) == value else repr(float(value))


def path_name(name: str) -> str:
    """The name, as a file or folder can have it: letters, digits and any of `.,=+@ _-`, and at most 120 bytes. Where that takes
    another character's place, or an end, the crc32 of the whole name follows, so that what differs is still told apart.

    >>> path_name("loadings=rna/counts")
    'loadings=rna_counts-a3362226'
    """
    safe = _UNSAFE.sub("_", name)
    if safe == name and len(name.encode()) <= NAME_BYTES:
        return name
    start = safe.encode()[: NAME_BYTES - 9].decode(errors="ignore")
    return f"{start}-{zlib.crc32(name.encode()):08x}"


def fitted_hierarchy(hierarchy: Hierarchy, variant: str) -> Hierarchy:
    """The hierarchy that an estimator is told, when the truth's is `hierarchy`.

    | variant | what is fitted |
    |---|---|
    | `true` | the true hierarchy |
    | `missing` | without the first of the smallest shared structures: 12 of the full lattice |
    | `extra` | with the first absent structure, pairs first, of the first structure's rank: needs a truth that lacks one |
    | `low`, `high` | every rank 2 lower (a structure that reaches 0 is gone), or 2 higher |
    | `merged` | modalities 1 and 2 taken for one: they stand together in every structure, and ranks that coincide add up |

    >>> str(fitted_hierarchy(Hierarchy.full((9, 9, 9), 1), "merged"))
    '123:3,12:3,3:1'

    Raises `ValueError` where the variant makes no sense for this hierarchy, or its ranks exceed a dimension.
    """
    _check_choice("hierarchies", variant, FITTED)
    ranks = dict(hierarchy.ranks)
    match variant:
        case "missing":
            del ranks[_first_shared(hierarchy)]
        case "extra":
            ranks[_first_absent(hierarchy)] = hierarchy.ranks[0][1]
        case "low":
            ranks = {s: max(rank - RANK_SHIFT, 0) for s, rank in ranks.items()}
        case "high":
            ranks = {s: rank + RANK_SHIFT for s, rank in ranks.items()}
        case "merged":
            ranks = _merged_ranks(hierarchy)
    try:
        return Hierarchy(hierarchy.dims, ranks)
    except ValueError as error:
        raise ValueError(f"hierarchies: {variant!r} cannot be fitted here, {error}") from None


def _first_shared(hierarchy: Hierarchy) -> Structure:
    shared = [s for s in hierarchy.structures if len(s) > 1]
    if not shared or len(hierarchy.structures) < 2:
        raise ValueError("hierarchies: 'missing' leaves nothing out here; expected a shared structure beside others")
    return min(shared, key=len)


def _first_absent(hierarchy: Hierarchy) -> Structure:
    absent = [s for s in full_lattice(hierarchy.n_modalities) if s not in hierarchy.structures]
    if not absent:
        raise ValueError("hierarchies: 'extra' has no structure to add; expected a truth that lacks one (see --structures)")
    return min(absent, key=lambda s: (len(s) != 2, s))


def _merged_ranks(hierarchy: Hierarchy) -> dict[Structure, int]:
    if hierarchy.n_modalities < 2:
        raise ValueError("hierarchies: 'merged' needs modalities 1 and 2; expected at least two")
    ranks: dict[Structure, int] = {}
    for s, rank in hierarchy.ranks:
        together = tuple(sorted({*s, 1, 2})) if {1, 2} & set(s) else s
        ranks[together] = ranks.get(together, 0) + rank
    return ranks
