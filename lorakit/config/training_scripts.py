"""The scripts of sd-scripts that train LoRA for models that lorakit trains."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import Factory, frozen

_FOR_DDPM = (
    "min_timestep", "max_timestep", "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale",
    "multires_noise_iterations", "multires_noise_discount", "zero_terminal_snr", "v_parameterization",
    "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "min_snr_gamma", "debiased_estimation_loss",
)  # fmt: skip
"""Options for DDPM, which scripts for flow matching take and never look at."""

_OF_CLIP = ("max_token_length", "clip_skip", "sample_sampler")
"""Options of Stable Diffusion's text encoders and samplers, of which the same is true."""

_PREVIEWS: Mapping[str, object] = {"width": 512, "height": 512, "steps": 30, "scale": 7.5}


@frozen(eq=False)
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
    network_module: str = "networks.lora"
    """Its usual `--network_module`."""
    is_flow: bool = False
    """Whether it trains by flow matching."""
    ignores: tuple[str, ...] = ()
    """Options that it takes and does nothing with."""
    caches_beside_training: bool = False
    """Whether it caches outputs of text encoders while it trains one of them."""
    drops_cached_captions: bool = False
    """Whether it drops captions whose encodings it has cached."""
    previews: Mapping[str, object] = Factory(lambda: _PREVIEWS)
    """What it draws previews with where a prompt does not say it, by keys of `[[observers]]`."""


TRAIN_NETWORK = Script(
    "train_network.py", ("sd1", "sd2"), ("train_network_wrapper.py",), previews={**_PREVIEWS, "sampler": "ddim"}
)
"""The script for Stable Diffusion 1.x and 2.x. Newer versions start only with steps that are multiples of 64, which is
not asked of older files here."""
SDXL_TRAIN_NETWORK = Script(
    "sdxl_train_network.py",
    ("sdxl",),
    ("train_network_xl_wrapper.py",),
    bucket_multiple=32,
    ignores=("clip_skip",),
    previews={**_PREVIEWS, "sampler": "ddim"},
)
"""The script for SDXL, which has the same options and a few more."""
FLUX_TRAIN_NETWORK = Script(
    "flux_train_network.py",
    ("flux1", "chroma"),
    bucket_multiple=32,
    network_module="networks.lora_flux",
    is_flow=True,
    ignores=(*_FOR_DDPM, *_OF_CLIP),
    caches_beside_training=True,
    previews={**_PREVIEWS, "steps": 20, "scale": 1.0, "guidance": 3.5},
)
"""The script for FLUX.1, and for Chroma with `--model_type=chroma`."""
ANIMA_TRAIN_NETWORK = Script(
    "anima_train_network.py",
    ("anima",),
    bucket_multiple=16,
    network_module="networks.lora_anima",
    is_flow=True,
    ignores=(*_FOR_DDPM, *_OF_CLIP, "fp8_base", "fp8_base_unet"),
    drops_cached_captions=True,
)
"""The script for Anima."""

SCRIPTS = (TRAIN_NETWORK, SDXL_TRAIN_NETWORK, FLUX_TRAIN_NETWORK, ANIMA_TRAIN_NETWORK)
"""The scripts whose options are known; without a hint at another, options are for the first."""

MODELS = "of sd-scripts' models, lorakit trains LoRA for Stable Diffusion 1.x, 2.x and XL, FLUX.1, Chroma and Anima"
"""What to say of scripts and files for other models."""
