"""Components that each break their contract; `test_suites.py` runs the suites on them."""
