"""Make what `config.toml` beside this file trains on: photographs with captions, and a small base model.

The photographs come with scikit-image. The model has Stable Diffusion's architecture at a small size and random
weights, so it shows that and how lorakit runs, not what a LoRA looks like; put a real model's path
in `config.toml` for that.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from skimage import data

from lorakit.testing.models import make_tiny_sd1, to_single_file

HERE = Path(__file__).parent
CAPTIONS = {
    "astronaut": "a portrait of an astronaut, orange suit, smile",
    "chelsea": "a close photograph of a cat, tabby, green eyes",
    "coffee": "a cup of coffee on a table, saucer, spoon",
    "rocket": "a rocket on its launch pad, evening sky",
}


def main() -> None:
    """Write the photographs, their captions and the model; what is there already is left alone."""
    photographs = HERE / "out" / "photographs"
    photographs.mkdir(parents=True, exist_ok=True)
    for name, caption in CAPTIONS.items():
        Image.fromarray(getattr(data, name)()).save(photographs / f"{name}.png")
        (photographs / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    model = HERE / "out" / "model.safetensors"
    if not model.exists():
        to_single_file(make_tiny_sd1(HERE / "out" / "model"), model)
    print(f"Wrote {len(CAPTIONS)} photographs and {model}.")


if __name__ == "__main__":
    main()
