"""Modules in PyTorch for `networks.py` to time beside ours: of the same sizes, names of weights and losses.

They hold what their loss reaches. Heads, fusions and gates, whose weights have no gradient, are left out; that costs ours a
little. Losses are those of the released HCL code, written plainly. Two things are as slow as there, because they are what that
code does: DLF's triplets are looked up in a Python loop over the anchors, and every operation is run as it is met.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
import torch.nn.functional as F  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn  # type: ignore[import-not-found, unused-ignore]

Structure = tuple[int, ...]
KINDS = ("common", "pair", "private")
SUPERVISOR = 64
"""Width of the hidden layers of TSD's supervisors."""


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


class Perceptron(nn.Module):
    def __init__(self, *widths: int, activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = self.activation(layer(x))
        return last(x)


class HclReleased(nn.Module):
    """−tr Φ/2B + (ΣΦ − tr Φ)/2B(B − 1) + Σ ‖Σ_s h_s‖² of the unit vectors h of structures, by modality and level."""

    def __init__(self, dims: Sequence[int], structures: Sequence[Structure], rank: int, hidden: Sequence[int]):
        super().__init__()
        self.encoders = nn.ModuleList(nn.ModuleList(Perceptron(d, *hidden, rank) for _ in dims) for d in dims)
        self.structures = structures

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        units = [[F.normalize(encoder(x), dim=1) for encoder in own] for own, x in zip(self.encoders, views, strict=True)]
        of = lambda m, s: units[m - 1][len(views) - len(s)]
        joint = torch.cat([torch.stack([of(m, s) for m in s]).sum(0) for s in self.structures], dim=1)
        phi = joint @ joint.T
        n, own = phi.shape[0], phi.diagonal().sum()
        contrast = (phi.sum() - own) / (2 * n * (n - 1)) - own / (2 * n)
        by_modality = [
            torch.stack([of(m, s) for s in self.structures if m in s]).sum(0).square().sum() for m in range(1, len(views) + 1)
        ]
        return contrast + torch.stack(by_modality).sum()


class Convirt(nn.Module):
    """Over pairs of views the cross-entropies of which rows belong together: ¾ of that of rows, ¼ of that of columns."""

    temperature, direction = 0.07, 0.75

    def __init__(self, dims: Sequence[int], structures: Sequence[Structure], rank: int, hidden: Sequence[int]):
        super().__init__()
        self.encoders = nn.ModuleList(Perceptron(d, *hidden, rank) for d in dims)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        units = [F.normalize(encoder(x), dim=1) for encoder, x in zip(self.encoders, views, strict=True)]
        own = torch.arange(views[0].shape[0])
        losses = []
        for a, b in combinations(units, 2):
            scores = a @ b.T / self.temperature
            losses.append(self.direction * F.cross_entropy(scores, own))
            losses.append((1 - self.direction) * F.cross_entropy(scores.T, own))
        return torch.stack(losses).sum()


def moment_discrepancy(a: Tensor, b: Tensor, moments: int = 5) -> Tensor:
    """CMD: the distances of the means and of the 2nd to 5th central moments, added up."""
    means = a.mean(0), b.mean(0)
    central = a - means[0], b - means[1]
    apart = [means[0] - means[1]] + [(central[0] ** k).mean(0) - (central[1] ** k).mean(0) for k in range(2, moments + 1)]
    return torch.linalg.vector_norm(torch.stack(apart), dim=1).sum()


def squared_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Σ (ãᵀb̃)², centred, then rows of length 1."""
    a, b = (F.normalize(x - x.mean(0), dim=1, eps=1e-8) for x in (a, b))
    return (a.T @ b).square().sum()


class Misa(nn.Module):
    def __init__(self, dims: Sequence[int], structures: Sequence[Structure], rank: int, hidden: Sequence[int]):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(d, rank) for d in dims)
        self.common = Perceptron(rank, *hidden, rank)
        self.own = nn.ModuleList(Perceptron(d, *hidden, rank) for d in dims)
        self.decoders = nn.ModuleList(Perceptron(rank, rank, d) for d in dims)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        shared = [self.common(project(x)) for project, x in zip(self.projections, views, strict=True)]
        own = [encoder(x) for encoder, x in zip(self.own, views, strict=True)]
        rebuilt = [decoder(c + p) for decoder, c, p in zip(self.decoders, shared, own, strict=True)]
        similarity = mean([moment_discrepancy(a, b) for a, b in combinations(shared, 2)])
        unlike = [*zip(shared, own, strict=True), *combinations(own, 2)]
        difference = torch.stack([squared_overlap(a, b) for a, b in unlike]).sum()
        return similarity + difference + mean([F.mse_loss(x, back) for x, back in zip(views, rebuilt, strict=True)])


def triplets(labels: Tensor, modalities: int) -> tuple[list[int], list[int], list[int]]:
    """(anchors, their positives, their negatives): rows of the codes of all modalities one below the other.

    The positive is the first row of another modality with the anchor's label, the negative the first of its own with another one.
    """
    n = len(labels)
    label, modality = labels.repeat(modalities), torch.arange(modalities).repeat_interleave(n)
    anchors, positives, negatives = [], [], []
    for i in range(n * modalities):
        alike, beside = label == label[i], modality == modality[i]
        positive, negative = (alike & ~beside).nonzero(), (~alike & beside).nonzero()
        if len(positive) and len(negative):
            anchors.append(i)
            positives.append(int(positive[0]))
            negatives.append(int(negative[0]))
    return anchors, positives, negatives


class Dlf(nn.Module):
    margin = 1.0

    def __init__(self, dims: Sequence[int], structures: Sequence[Structure], rank: int, hidden: Sequence[int]):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(d, rank) for d in dims)
        self.shared = Perceptron(rank, *hidden, rank)
        self.specific = nn.ModuleList(Perceptron(d, *hidden, rank) for d in dims)
        self.decoders = nn.ModuleList(Perceptron(2 * rank, 2 * rank, d) for d in dims)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        shared = [self.shared(project(x)) for project, x in zip(self.projections, views, strict=True)]
        specific = [encoder(x) for encoder, x in zip(self.specific, views, strict=True)]
        both = [torch.cat(codes, dim=1) for codes in zip(shared, specific, strict=True)]
        rebuilt = [decoder(h) for decoder, h in zip(self.decoders, both, strict=True)]
        again = [encoder(back.detach()) for encoder, back in zip(self.specific, rebuilt, strict=True)]
        cosines = [F.cosine_similarity(c, p, dim=1) for c, p in zip(shared, specific, strict=True)]
        parts = [
            mean([F.mse_loss(x, back) for x, back in zip(views, rebuilt, strict=True)]),
            mean([F.mse_loss(a, p.detach()) for a, p in zip(again, specific, strict=True)]),
            mean([F.relu(c).mean() for c in cosines]),
        ]
        if labels is not None:
            parts.append(self.triplet(torch.cat(shared), labels, len(views)))
        return torch.stack(parts).sum()

    def triplet(self, codes: Tensor, labels: Tensor, modalities: int) -> Tensor:
        anchors, positives, negatives = triplets(labels, modalities)
        if not anchors:
            return codes.new_zeros(())
        near = F.cosine_similarity(codes[anchors], codes[positives], dim=1)
        far = F.cosine_similarity(codes[anchors], codes[negatives], dim=1)
        return F.relu(far - near + self.margin).mean()


def kernel(a: Tensor) -> Tensor:
    """exp(−½‖a_i − a_j‖²), rows and columns centred on 0."""
    a = a - a.mean(0)
    squares = a.square().sum(1)
    K = torch.exp(a @ a.T - (squares[:, None] + squares[None, :]) / 2)
    return K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()


class Tsd(nn.Module):
    def __init__(self, dims: Sequence[int], structures: Sequence[Structure], rank: int, hidden: Sequence[int]):
        super().__init__()
        self.named = list(combinations(range(1, len(dims) + 1), 2))
        linear = lambda inputs: nn.ModuleList(nn.Linear(d, rank) for d in inputs)
        self.projections, self.common = linear(dims), linear([rank] * 2)
        self.norms = nn.ModuleList(nn.LayerNorm(rank) for _ in range(2))
        self.pairs, self.private = linear([rank] * len(self.named)), linear([rank] * len(dims))
        self.supervisors = nn.ModuleList(Perceptron(rank, SUPERVISOR, 1, activation=F.gelu) for _ in KINDS)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        z = [project(x) for project, x in zip(self.projections, views, strict=True)]
        joint = torch.cat(z)
        for layer, norm in zip(self.common, self.norms, strict=True):
            joint = norm(F.gelu(layer(joint)))
        common = joint.chunk(len(z))
        private = [torch.sigmoid(encoder(a)) for encoder, a in zip(self.private, z, strict=True)]
        pairs = {
            (m, l): (torch.sigmoid(encoder(z[m - 1])), torch.sigmoid(encoder(z[l - 1])))
            for (m, l), encoder in zip(self.named, self.pairs, strict=True)
        }
        n, grams, logs, kernels = len(z[0]), [], [], [kernel(p) for p in private]
        for m, (c, p) in enumerate(zip(common, private, strict=True), start=1):
            own = [both[pair.index(m)] for pair, both in pairs.items() if m in pair]
            grams += [c.T @ p, *(s.T @ p for s in own), *(s.T @ c for s in own)]
            kinds = (("common", c), *(("pair", s) for s in own), ("private", p))
            logs += [torch.log(torch.sigmoid(self.supervisors[KINDS.index(kind)](h)) + 1e-8).mean() for kind, h in kinds]
        parts = [
            mean([F.mse_loss(a, b) for a, b in combinations(common, 2)]),
            mean([F.mse_loss(a, b) for a, b in pairs.values()]),
            mean([(K * L).sum() / (n - 1) ** 2 for K, L in combinations(kernels, 2)]),
            torch.stack(grams).square().sum() / len(z),
            -torch.stack(logs).sum() / len(z),
        ]
        return torch.stack(parts).sum()


class Critic(nn.Module):
    """Scores of all pairs, each a row of its own."""

    def __init__(self, *widths: int):
        super().__init__()
        self.perceptron = Perceptron(*widths)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        n, m = len(x), len(y)
        pairs = torch.cat([x.repeat_interleave(m, dim=0), y.repeat(n, 1)], dim=1)
        return self.perceptron(pairs).reshape(n, m)


class Factorcl(nn.Module):
    """Supervised FactorCL of two views: Σ CLUB − Σ NCE over six terms, of which each has its heads and its critic.

    Conditions stand beside the left code. `learning` is what the critics of upper bounds minimise.
    """

    lower_terms, upper_terms = ("nce(1;2)", "nce(1;y)", "nce(2;y)", "nce(1;2|y)"), ("club(1;2|y)", "club(1;2)")

    def __init__(
        self,
        dims: Sequence[int],
        width: int,
        hidden: Sequence[int],
        head_hidden: Sequence[int],
        critic_hidden: Sequence[int],
        classes: int,
    ):
        super().__init__()
        self.classes = classes
        self.backbones = nn.ModuleList(Perceptron(d, *hidden, width) for d in dims)
        owned = [(m, name) for name in (*self.lower_terms, *self.upper_terms) for m in (1, 2) if str(m) in name]
        self.heads = nn.ModuleDict({str(head): Perceptron(width, *head_hidden, width) for head in owned})
        left = lambda name: width + classes * name.endswith("|y)")
        right = lambda name: 1 if name.endswith(";y)") else width
        critics = lambda names: nn.ModuleDict({name: Critic(left(name) + right(name), *critic_hidden, 1) for name in names})
        self.lower, self.upper = critics(self.lower_terms), critics(self.upper_terms)

    def scores(self, name: str, z: Sequence[Tensor], labels: Tensor) -> Tensor:
        critic = self.lower[name] if name in self.lower_terms else self.upper[name]
        code = lambda m: self.heads[str((m, name))](z[m - 1])
        if name.endswith(";y)"):
            return critic(code(int(name[4])), labels[:, None].to(z[0].dtype))
        left = code(1)
        if name.endswith("|y)"):
            left = torch.cat([left, F.one_hot(labels.long(), self.classes).to(left.dtype)], dim=1)
        return critic(left, code(2))

    @staticmethod
    def nce(scores: Tensor) -> Tensor:
        return scores.diagonal().mean() - scores.logsumexp(0).mean() + math.log(len(scores))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        z = [backbone(x) for backbone, x in zip(self.backbones, views, strict=True)]
        lower = [self.nce(self.scores(name, z, labels)) for name in self.lower_terms]
        upper = [(s := self.scores(name, z, labels)).diagonal().mean() - s.mean() for name in self.upper_terms]
        return torch.stack(upper).sum() - torch.stack(lower).sum()

    def learning(self, views: Sequence[Tensor], labels: Tensor) -> Tensor:
        with torch.no_grad():
            z = [backbone(x) for backbone, x in zip(self.backbones, views, strict=True)]
        return -torch.stack([self.nce(self.scores(name, z, labels)) for name in self.upper_terms]).sum()


MODULES: dict[str, Callable[..., nn.Module]] = {
    "hcl-released": HclReleased,
    "convirt": Convirt,
    "misa": Misa,
    "dlf": Dlf,
    "dlf-labels": Dlf,
    "tsd": Tsd,
}
"""By the names of `networks.py`: (dims, structures, their one rank, hidden widths) -> a module of (views, labels), whose value is
the loss."""


def with_weights(module: nn.Module, weights: dict[str, np.ndarray]) -> nn.Module:
    """The module with the weights of these names, in their precision; there may be others."""
    held = {name: torch.from_numpy(np.array(weights[name])) for name in module.state_dict()}
    for name, parameter in module.named_parameters():
        parameter.data = held[name]
    return module


def make_epoch(
    module: nn.Module, views: Sequence[np.ndarray], labels: np.ndarray | None, batch: int, learning_rate: float
) -> Callable[[], None]:
    """Steps of Adam through all rows in a random order, by batches; what is left over is not used. On one thread."""
    torch.set_num_threads(1)
    rows = [torch.from_numpy(np.array(view)) for view in views]
    classes = None if labels is None else torch.from_numpy(np.array(labels))
    n, drawing = len(rows[0]), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate)

    def epoch() -> None:
        for drawn in torch.randperm(n, generator=drawing)[: n // batch * batch].split(batch):
            optimiser.zero_grad()
            module([x[drawn] for x in rows], None if classes is None else classes[drawn]).backward()
            optimiser.step()

    return epoch


def make_factorcl_steps(
    module: Factorcl, views: Sequence[np.ndarray], labels: np.ndarray, learning_rate: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(a step of Adam of all but the critics of upper bounds, one of these), each on all rows. On one thread."""
    torch.set_num_threads(1)
    rows, classes = [torch.from_numpy(np.array(view)) for view in views], torch.from_numpy(np.array(labels))
    theirs = list(module.upper.parameters())
    own = [p for p in module.parameters() if all(p is not q for q in theirs)]
    optimisers = [torch.optim.Adam(group, lr=learning_rate) for group in (own, theirs)]

    def step(which: int, loss: Callable[..., Tensor]) -> None:
        for group, moves in ((own, which == 0), (theirs, which == 1)):
            for parameter in group:
                parameter.requires_grad_(moves)
        optimisers[which].zero_grad()
        loss(rows, classes).backward()
        optimisers[which].step()

    return lambda: step(0, module), lambda: step(1, module.learning)
