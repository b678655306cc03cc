"""The scripts of sd-scripts that train LoRA for models that lorakit trains."""

from __future__ import annotations

from attrs import frozen


@frozen
class Script:
    """A script of sd-scripts that trains LoRA."""

    name: str
    """Its file name."""
    families: tuple[str, ...]
    """The families of base models that it trains, as `model.family` names them; the first is its default."""
    also: tuple[str, ...] = ()
    """File names of scripts of other programs that call it with the options that they are given."""
    bucket_multiple: int = 1
    """What `--bucket_reso_steps` must be a multiple of, in pixels, for it to start."""


TRAIN_NETWORK = Script("train_network.py", ("sd1", "sd2"), ("train_network_wrapper.py",))
"""The script for Stable Diffusion 1.x and 2.x. Newer versions start only with steps that are multiples of 64, which is
not asked of older files here."""
SDXL_TRAIN_NETWORK = Script("sdxl_train_network.py", ("sdxl",), ("train_network_xl_wrapper.py",), bucket_multiple=32)
"""The script for SDXL, which has the same options and a few more."""

SCRIPTS = (TRAIN_NETWORK, SDXL_TRAIN_NETWORK)
"""The scripts whose options are known; without a hint at another, options are for the first."""

MODELS = "lorakit trains LoRA for Stable Diffusion 1.x, 2.x and XL"
"""What to say of scripts and files for other models."""
