"""From sd-scripts' command lines and files to configs that train the same. Imports no torch."""
