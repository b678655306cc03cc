"""For tests of plugins: a tiny model family and a contract suite for every kind of component."""
