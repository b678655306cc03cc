"""`python -m lorakit` and the `lorakit` command."""

from __future__ import annotations

from lorakit.cli import main

if __name__ == "__main__":
    main()
