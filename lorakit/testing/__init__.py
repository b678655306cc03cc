"""For the tests of plugins: a tiny model family and contract suites for every kind of component."""
