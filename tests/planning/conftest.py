"""The configs of small real runs."""

from __future__ import annotations

from tests.training.conftest import catalog, make_config, tables

__all__ = ["catalog", "make_config", "tables"]
