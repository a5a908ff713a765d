"""A few images per class without an outer level: means, centres of clusters, and real images chosen with care.

All take images (n, ...) and labels (n,), and return (per_class × classes, ...), class by class within each round: 0 to
9, then 0 to 9 again.

>>> x, y = torch.tensor([[0.0], [1.0], [5.0], [8.0], [9.0], [9.5]]), torch.tensor([0, 0, 0, 1, 1, 1])
>>> centres(x, y, per_class=1).tolist(), nearest(x, y, per_class=1).tolist()
([[2.0], [8.833333015441895]], [[1.0], [9.0]])
>>> herded(x, y, per_class=2).tolist()
[[1.0], [9.0], [5.0], [8.0]]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.cluster import KMeans
from torch import Tensor


def centres(x: Tensor, y: Tensor, per_class: int) -> Tensor:
    """Return the k-means centres of each class; its mean, if one image is asked for."""

    def of(images: Tensor) -> Tensor:
        found = KMeans(per_class, n_init=5, random_state=0).fit(images.flatten(1).double().numpy())
        return torch.from_numpy(found.cluster_centers_).to(images).view(per_class, *images.shape[1:])

    return _by_class(x, y, of)


def nearest(x: Tensor, y: Tensor, per_class: int) -> Tensor:
    """Return, for each centre, the real image of its class that is nearest to it."""
    aims = centres(x, y, per_class).unflatten(0, (per_class, -1)).transpose(0, 1)
    chosen = iter(aims)

    def of(images: Tensor) -> Tensor:
        return images[torch.cdist(next(chosen).flatten(1), images.flatten(1)).argmin(1)]

    return _by_class(x, y, of)


def herded(x: Tensor, y: Tensor, per_class: int) -> Tensor:
    """Return real images, each chosen such that the mean of those so far is nearest to the mean of the class.

    Herding (Welling, ICML 2009), on pixels.
    """

    def of(images: Tensor) -> Tensor:
        flat, chosen = images.flatten(1), []
        for count in range(1, per_class + 1):
            means = (flat[chosen].sum(0) + flat) / count
            distances = (means - flat.mean(0)).square().sum(1)
            distances[chosen] = torch.inf
            chosen.append(int(distances.argmin()))
        return images[chosen]

    return _by_class(x, y, of)


def _by_class(x: Tensor, y: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what ``of`` makes of the images of each class, (per_class, ...), in rounds of all classes."""
    return torch.stack([of(x[y == label]) for label in y.unique()], 1).flatten(0, 1)


CHOSEN: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "k-means centres": centres,
    "nearest real images": nearest,
    "herding": herded,
}
"""From a name to the function; at one image per class the first are the class means."""
