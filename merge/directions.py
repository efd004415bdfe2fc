"""Methods that go by angles: each is a weighted sum of the models, whose coefficients follow from the Gram matrix.

G[i, j] = <x_i, x_j> over a tensor (or over each of its rows or columns) is all that they need to know of it: one pass
finds G, another one sums. Coefficients are float64; arrays may have leading dims, one matrix a row.
"""

import numpy as np

Array = np.ndarray


def slerp(gram: Array, t: float) -> Array:
    """Return the coefficients of base and other, t = 0 being the base (Shoemake, SIGGRAPH 1985).

    Linear where the cosine is beyond 0.9995 either way, as in mergekit.
    """
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    norms = np.where(norms > 1e-8, norms, 1.0)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1, 1)
    return _on_the_arc(cosine, t, np.abs(cosine) > 0.9995)


def nuslerp(gram: Array, t: float) -> Array:
    """Return the coefficients of two models: on the arc between them, linear only where they are collinear."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)).clip(min=1e-7)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1, 1)
    return _on_the_arc(cosine, t, 1 - cosine**2 <= 1e-16)


def _on_the_arc(cosine: Array, t: float, straight: Array) -> Array:
    angle = np.arccos(np.where(straight, 0.0, cosine))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    second = np.where(straight, t, np.sin(t * angle) / np.sin(angle))
    return np.stack([first, second], axis=-1)


def multislerp(gram: Array, weights: Array, *, eps: float) -> Array:
    """Return the coefficients of the models' barycentre on the sphere, with the weighted mean of their norms.

    mergekit projects onto the tangent space at the mean m = sum(w_i u_i) / |...| and back. The sum of the projections
    is zero, since m is made from the same weights, so the point is m itself.

    Raises:
        ZeroDivisionError: the weighted directions of more than two models cancel.
    """
    norms = np.sqrt(np.diagonal(gram))
    shares = weights / (norms + eps)
    length = np.sqrt(max(0.0, shares @ gram @ shares))
    if length < eps:
        if len(weights) == 2:
            return weights
        raise ZeroDivisionError
    return np.asarray(shares * (weights @ norms) / length)


def karcher(gram: Array, *, max_iter: int, tol: float) -> Array:
    """Return the coefficients of the models' Riemannian mean on the sphere, with the mean of their norms.

    The iteration (Karcher, 1977; arXiv 2603.04972) moves a point in the span of the models: it needs their angles
    alone. Models without length have no direction, but count in the mean of the norms.
    """
    norms = np.sqrt(np.diagonal(gram))
    counted = norms > tol
    units = np.where(counted, norms, 1.0)
    cosines = gram / np.outer(units, units)
    alphas = counted / max(1, counted.sum())
    mean = alphas.copy()
    length = _length(mean, cosines)
    mean = np.eye(len(norms))[int(counted.argmax())] if length < tol else mean / length
    for _ in range(max_iter if counted.any() else 0):
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        moving = counted & (angles >= tol)
        pull = np.divide(alphas * angles, np.sin(angles), out=np.zeros_like(angles), where=moving)
        tangent = pull - (pull @ dots) * mean
        length = _length(tangent, cosines)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
        mean /= _length(mean, cosines)
    return np.asarray(np.where(counted, mean / units, 0.0) * norms.mean())


def _length(coefficients: Array, cosines: Array) -> float:
    return float(np.sqrt(max(0.0, coefficients @ cosines @ coefficients)))


def model_stock(gram: Array) -> Array:
    """Return t, by which the base goes towards the models' mean (Model Stock, arXiv 2403.19522, eq. 7).

    Args:
        gram: of the N task vectors.
    """
    count = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    first, second = np.triu_indices(count, 1)
    products = (norms[..., first] * norms[..., second]).clip(min=1e-6)
    cosine = np.clip(gram[..., first, second] / products, -1, 1).mean(axis=-1)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6  # opposed task vectors: the base stays
    return np.asarray(np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor)))
