from __future__ import annotations

import numpy as np
import pytest

from benchmarks.speed.shared_layers import shared


def test_layers_are_shared_up_to_the_first_that_differs() -> None:
    a, b, c = (np.zeros((3, 2), dtype=bool) for _ in range(3))
    b[1, 0] = True  # shares layer 0 with a
    c[0, 0] = True  # shares nothing
    found = shared([np.array([a, b, c]), np.array([b, c])])
    assert found["within_population"] == pytest.approx(1 / 15)
    assert found["ever"] == pytest.approx((1 + 3 + 3) / 15)
