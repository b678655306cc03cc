"""Building components: what `build` returns is checked before it is used."""

from __future__ import annotations

from typing import Any

from lorakit.api.components import Component
from lorakit.errors import PluginError
from lorakit.plugins.failures import describe_component, plugin_errors


def build_component(component: Component, *arguments: object) -> Any:
    """What a component's `build` returns for these arguments.

    Raises PluginError if it fails or returns something other than its kind should.
    """
    with plugin_errors(component, "build"):
        product = component.build(*arguments)  # type: ignore[attr-defined]
    if not component.is_product(product):
        found = "nothing" if product is None else f"an object of the class {type(product).__qualname__}"
        expected = component.product
        raise PluginError(f"{describe_component(component)} cannot be used: its build returned {found}, not {expected}")
    return product
