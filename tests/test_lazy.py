"""Packages that offer names lazily: what is asked for is what was meant, whatever was imported before."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

PACKAGES = ["mp2.engine", "mp2.export", "mp2.optimizers", "mp2.runs", "mp2.training"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_that_is_offered_is_that_of_a_module(package: str) -> None:
    """Once the module is imported, it would stand in the name's place."""
    found = importlib.import_module(package)
    modules = {module.name for module in pkgutil.iter_modules(found.__path__)}
    assert not modules & set(found._MODULES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_is_offered_is_there(package: str) -> None:
    found = importlib.import_module(package)
    assert all(getattr(found, name) is not None for name in found.__all__)


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        importlib.import_module("mp2.training").pretrian  # noqa: B018
