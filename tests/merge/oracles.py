"""Every merge method on whole tensors in float64, written from its paper: no tiles, no streaming, no shared code.

A function takes the base (or None), the models' tensors and the method's parameters by mergekit's names; parameters
that every model has of its own are lists. Masks that are drawn come from `uniform`.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


def linear(base: Array | None, models: list[Array], *, weight: list[float], normalize: bool = True) -> Array:
    total = sum(w * x for w, x in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def passthrough(base: Array | None, models: list[Array], *, scale: list[float | None]) -> Array:
    return models[0] if scale[0] is None else models[0] * scale[0]


def nearswap(base: Array, models: list[Array], *, t: float) -> Array:
    out = base.copy()
    for place in np.ndindex(base.shape):
        gap = models[0][place] - base[place]
        share = 1.0 if abs(gap) <= t else t / max(abs(gap), 1e-6)
        out[place] += gap * share
    return out


def angle(a: Array, b: Array) -> float:
    cosine = (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
    return math.acos(max(-1.0, min(1.0, cosine)))


def on_the_arc(a: Array, b: Array, t: float) -> Array:
    theta = angle(a, b)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def slerp(base: Array, models: list[Array], *, t: float) -> Array:
    if abs(math.cos(angle(base, models[0]))) > 0.9995:
        return (1 - t) * base + t * models[0]
    return on_the_arc(base, models[0], t)


def nuslerp(
    base: Array | None,
    models: list[Array],
    *,
    weight: list[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    first, second = (x if base is None else x - base for x in models)
    t = weight[1] / sum(weight) if abs(sum(weight)) >= 1e-6 else 0.5

    def one(a: Array, b: Array) -> Array:
        if math.sin(angle(a, b)) <= 1e-8:
            return (1 - t) * a + t * b
        return on_the_arc(a, b, t)

    if nuslerp_flatten or first.ndim == 1:
        found = one(first, second)
    elif nuslerp_row_wise:
        found = np.stack([one(first[:, i], second[:, i]) for i in range(first.shape[1])], axis=1)
    else:
        found = np.stack([one(first[i], second[i]) for i in range(first.shape[0])])
    return found if base is None else found + base


def multislerp(
    base: Array | None, models: list[Array], *, weight: list[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Array:
    """By way of the tangent space, as it is described."""
    if len(models) == 1:
        return models[0]
    weights = np.array(weight) / (sum(weight) if normalize_weights else 1)
    vectors = [x if base is None else x - base for x in models]
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / (n + eps) for v, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    length = np.linalg.norm(mean)
    if length < eps:
        total = sum(w * v for w, v in zip(weights, vectors, strict=True))
        return total if base is None else total + base
    mean = mean / length
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    far = np.linalg.norm(tangent)
    point = mean if far < eps else math.cos(far) * mean + math.sin(far) * tangent / far
    point = point * sum(w * n for w, n in zip(weights, norms, strict=True))
    return point if base is None else point + base


def karcher(base: Array | None, models: list[Array], *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    norms = [np.linalg.norm(x) for x in models]
    units = [x / n for x, n in zip(models, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(models[0])
    mean = sum(units) / len(units)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = max(-1.0, min(1.0, (unit * mean).sum()))
            theta = math.acos(cosine)
            if theta >= tol:
                tangent += theta / math.sin(theta) * (unit - cosine * mean) / len(units)
        far = np.linalg.norm(tangent)
        if far < tol:
            break
        mean = math.cos(far) * mean + math.sin(far) * tangent / far
        mean /= np.linalg.norm(mean)
    return mean * sum(norms) / len(norms)


def model_stock(base: Array, models: list[Array], *, filter_wise: bool = False) -> Array:
    if filter_wise and base.ndim == 2:
        return np.stack([model_stock(base[i], [x[i] for x in models]) for i in range(len(base))])
    deltas = [x - base for x in models]
    cosines = []
    for a, b in itertools.combinations(deltas, 2):
        product = max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6)
        cosines.append((a * b).sum() / product)
    cosine, count = float(np.mean(cosines)), len(models)
    divisor = 1 + (count - 1) * cosine
    t = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
    return t * sum(models) / count + (1 - t) * base


def combined(
    base: Array, deltas: list[Array], weight: list[float], scale: float, normalize: bool, elect: bool
) -> Array:
    """Sum task vectors, or those that agree with the elected sign."""
    out = base.copy()
    for place in np.ndindex(base.shape):
        parts = [w * d[place] for w, d in zip(weight, deltas, strict=True)]
        chosen = list(range(len(parts)))
        if elect:
            positive = sum(parts) >= 0
            chosen = [i for i, part in enumerate(parts) if part != 0 and (part > 0) == positive]
        divisor = sum(weight[i] for i in chosen) if normalize else 1.0
        if divisor == 0 or (not elect and abs(divisor) < 1e-8):
            divisor = 1.0
        out[place] += scale * sum(parts[i] for i in chosen) / divisor
    return out


def rescaled(delta: Array, mask: Array, rescale: bool) -> Array:
    kept = delta * mask
    before, after = np.abs(delta).sum(), np.abs(kept).sum()
    return kept * (before / after) if rescale and min(before, after) >= 1e-7 else kept


def by_size(delta: Array) -> list[int]:
    """Return flat places, the largest magnitude first, of equal ones the lowest place first."""
    flat = np.abs(delta).ravel()
    return sorted(range(flat.size), key=lambda place: (-flat[place], place))


def mask_of(delta: Array, places: list[int]) -> Array:
    mask = np.zeros(delta.size)
    mask[places] = 1
    return mask.reshape(delta.shape)


def magnitude(delta: Array, number: int, *, density: float, rescale: bool, **_: Any) -> Array:
    if density >= 1:
        return delta
    if density <= 0:
        return delta * 0
    keep = max(1, int(density * delta.size))
    return rescaled(delta, mask_of(delta, by_size(delta)[:keep]), rescale)


def outliers(delta: Array, number: int, *, density: float, gamma: float, rescale: bool, **_: Any) -> Array:
    if density >= 1:
        return delta
    keep, top = int(density * delta.size), int(gamma * delta.size)
    top = min(top, delta.size - keep)
    return rescaled(delta, mask_of(delta, by_size(delta)[top : top + keep]), rescale)


def random(
    delta: Array, number: int, *, density: float, rescale: bool, uniform: Callable[[int], Array], **_: Any
) -> Array:
    return delta if density >= 1 else rescaled(delta, uniform(number) < np.float32(density), rescale)


def ranked(
    delta: Array,
    number: int,
    *,
    density: float,
    epsilon: float,
    rescale: bool,
    uniform: Callable[[int], Array],
    **_: Any,
) -> Array:
    if density >= 1:
        return delta
    if density <= 0:
        return delta * 0
    chance = np.zeros(delta.shape)
    for row, out in zip(np.atleast_2d(delta), np.atleast_2d(chance), strict=True):
        for place, index in enumerate(by_size(row)):
            rank = 1 - place / (row.size - 1)
            out[index] = density - epsilon + 2 * epsilon * rank
    return rescaled(delta, uniform(number) < chance, rescale)


def of_task_vectors(
    sparsify: Callable[..., Array] | None, *, elect: bool, normalize: bool, rescale: bool
) -> Callable[..., Array]:
    """Return a method that sums sparse task vectors, with its defaults."""
    defaults = {"normalize": normalize, "rescale": rescale}

    def method(base: Array, models: list[Array], *, weight: list[float], **given: Any) -> Array:
        chosen = {**defaults, **given}
        deltas = []
        for number, model in enumerate(models):
            each = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15}
            each = {name: chosen[name][number] if name in chosen else value for name, value in each.items()}
            delta = model - base
            if sparsify is not None:
                delta = sparsify(delta, number, rescale=chosen["rescale"], uniform=chosen.get("uniform"), **each)
            deltas.append(delta)
        return combined(base, deltas, weight, chosen.get("lambda", 1.0), chosen["normalize"], elect)

    return method


def sce(base: Array, models: list[Array], *, select_topk: float = 1.0) -> Array:
    deltas = [x - base for x in models]
    if select_topk < 1:
        spread = np.var(np.stack(deltas), axis=0)
        keep = int(np.count_nonzero(spread) * select_topk)
        deltas = [delta * mask_of(spread, by_size(spread)[:keep]) for delta in deltas]
    energy = [float((delta**2).mean()) for delta in deltas]
    share = [one / sum(energy) if sum(energy) >= 1e-6 else 1 / len(deltas) for one in energy]
    out = base.copy()
    for place in np.ndindex(base.shape):
        positive = sum(delta[place] for delta in deltas) >= 0
        chosen = [i for i, d in enumerate(deltas) if d[place] != 0 and (d[place] > 0) == positive]
        divisor = max(sum(share[i] for i in chosen), 1e-6)
        out[place] += sum(share[i] * deltas[i][place] for i in chosen) / divisor
    return out


def ram(base: Array, models: list[Array], *, epsilon: float = 1e-5, factors: list[float] | None = None) -> Array:
    deltas = [x - base for x in models]
    out = base.copy()
    for place in np.ndindex(base.shape):
        active = [i for i, d in enumerate(deltas) if abs(d[place]) > epsilon]
        if len(active) == 1:
            out[place] += deltas[active[0]][place] * (factors or [1.0] * len(models))[active[0]]
        elif active:
            out[place] += sum(deltas[i][place] for i in active) / len(active)
    return out


def ramplus_tl(base: Array, models: list[Array], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Array:
    active = np.stack([np.abs(x - base) > epsilon for x in models])
    alone = active.sum(axis=0) == 1
    factors = []
    for mine in active:
        shared, unique = (mine & ~alone).sum(), (mine & alone).sum()
        factors.append(1 + r * min(max(shared / max(unique, epsilon), 0), alpha))
    return ram(base, models, epsilon=epsilon, factors=factors)


def arcee_fusion(base: Array, models: list[Array]) -> Array:
    def distribution(x: Array) -> Array:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) + 1e-8

    p, q = distribution(models[0]), distribution(base)
    importance = np.abs(models[0] - base) * np.maximum((p * np.log(p / q)).sum(axis=-1, keepdims=True), 0)
    ranked_values = np.sort(importance.ravel())
    first, median, third = (ranked_values[int(share * (ranked_values.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (third - first), models[0], base)


def fisher(
    base: Array | None, models: list[Array], *, fisher: list[Array], weight: list[float], floor: float = 1e-6
) -> Array:
    mean = sum(f.sum() for f in fisher) / (len(fisher) * fisher[0].size)
    out = np.zeros_like(models[0])
    for place in np.ndindex(out.shape):
        shares = [w * max(f[place], floor * mean) for w, f in zip(weight, fisher, strict=True)]
        out[place] = sum(share * x[place] for share, x in zip(shares, models, strict=True)) / sum(shares)
    return out


def regmean(
    base: Array | None, models: list[Array], *, gram: list[Array] | None, weight: list[float], alpha: float = 0.9
) -> Array:
    """With Gram matrices a token, or without any: the mean."""
    if gram is None:
        return linear(base, models, weight=weight)
    left, right = np.zeros_like(gram[0]), np.zeros_like(models[0].T)
    for w, g, x in zip(weight, gram, models, strict=True):
        scaled = w * (alpha * g + (1 - alpha) * np.diag(np.diag(g)))
        left, right = left + scaled, right + scaled @ x.T
    return (np.linalg.inv(left) @ right).T


def whitened(x: Array) -> Array:
    """X (X^T X)^-1/2, as the paper has it; the code takes the other way round, singular vectors."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def tsv(base: Array, models: list[Array], *, matrix: bool, **given: float) -> Array:
    deltas = [x - base for x in models]
    total = sum(deltas) / len(deltas)
    if matrix:
        rank = min(base.shape) // len(models)
        u, s, v = zip(*(np.linalg.svd(delta, full_matrices=False) for delta in deltas), strict=True)
        left = whitened(np.concatenate([one[:, :rank] for one in u], axis=1))
        right = whitened(np.concatenate([one[:rank].T for one in v], axis=1))
        total = left @ np.diag(np.concatenate([one[:rank] for one in s])) @ right.T
    return base + given.get("lambda", 1.0) * total


METHODS: dict[str, Callable[..., Array]] = {
    "linear": linear,
    "passthrough": passthrough,
    "nearswap": nearswap,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "task_arithmetic": of_task_vectors(None, elect=False, normalize=False, rescale=False),
    "ties": of_task_vectors(magnitude, elect=True, normalize=True, rescale=False),
    "dare_linear": of_task_vectors(random, elect=False, normalize=False, rescale=True),
    "dare_ties": of_task_vectors(random, elect=True, normalize=False, rescale=True),
    "della": of_task_vectors(ranked, elect=True, normalize=True, rescale=True),
    "della_linear": of_task_vectors(ranked, elect=False, normalize=False, rescale=True),
    "breadcrumbs": of_task_vectors(outliers, elect=False, normalize=False, rescale=False),
    "breadcrumbs_ties": of_task_vectors(outliers, elect=True, normalize=False, rescale=False),
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "arcee_fusion": arcee_fusion,
    "fisher": fisher,
    "regmean": regmean,
    "tsv": tsv,
}
