"""sd-scripts' `train_network.py` command lines, and the configs that train the same. Imports no torch."""
