"""What every router search speaks: arrays of routers and losses, and the protocol of a method."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Routers = NDArray[np.bool_]
Losses = NDArray[np.float64]


class RouterSearch(Protocol):
    """A stage-I method."""

    def ask(self, n: int) -> Routers:
        """Between 1 and ``n`` candidates [p, L', K]; none at all when the space is used up."""
        ...

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Learn the losses [p] of evaluated candidates, asked for or not."""
        ...


def distinct(routers: Routers, n: int) -> Routers:
    """At most ``n`` different rows; when there are more, each next one is the farthest from those taken."""
    _, first = np.unique(routers, axis=0, return_index=True)
    rows = routers[np.sort(first)]
    if len(rows) <= n:
        return rows
    taken = [0]
    distance = (rows != rows[0]).sum(-1)
    while len(taken) < n:
        farthest = int(np.argmax(distance))
        taken.append(farthest)
        distance = np.minimum(distance, (rows != rows[farthest]).sum(-1))
    return np.asarray(rows[np.sort(taken)])
