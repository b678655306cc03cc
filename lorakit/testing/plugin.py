"""The pytest plugin that comes with lorakit: fixtures for the tests of plugins.

It is loaded wherever lorakit and pytest are installed, so importing it imports nothing heavy.
"""

from __future__ import annotations
