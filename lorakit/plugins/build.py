"""Calling the `build` of components, and checking what it returns."""

from __future__ import annotations

from typing import Any

from lorakit.api.components import Component
from lorakit.errors import PluginError
from lorakit.plugins.failures import describe_component, plugin_errors


def build_component(component: Component, *arguments: object) -> Any:
    """The result of a component's `build`. Raises PluginError if it fails, or returns an object of the wrong kind."""
    with plugin_errors(component, "build"):
        product = component.build(*arguments)  # type: ignore[attr-defined]
    if not component.is_product(product):
        found = "nothing" if product is None else f"an object of the class {type(product).__qualname__}"
        expected = component.product
        raise PluginError(f"{describe_component(component)} cannot be used: its build returned {found}, not {expected}")
    return product
