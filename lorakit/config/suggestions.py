"""Which key was meant, when a key is not known: one that is near, or sd-scripts' name for it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

KOHYA_NAMES: Mapping[str, str] = {
    "pretrained_model_name_or_path": "model.path",
    "v2": 'model.family = "sd2"',
    "v_parameterization": 'model.prediction = "v_prediction"',
    "dataset_config": "data.config",
    "train_data_dir": "data.image_dir",
    "train_batch_size": "data.batch_size",
    "dataset_repeats": "data.num_repeats",
    "cache_latents": "data.cache_dir",
    "cache_latents_to_disk": "data.cache_dir",
    "vae_batch_size": "data.encode_batch_size",
    "max_data_loader_n_workers": "data.workers",
    "caption_extention": "data.caption_extension",
    "network_module": "network.name",
    "network_dim": "network.rank",
    "network_alpha": "network.alpha",
    "network_dropout": "network.dropout",
    "network_weights": "network.weights",
    "network_args": "the keys of network, such as network.conv_rank",
    "conv_dim": "network.conv_rank",
    "dim": "network.rank",
    "network_train_unet_only": 'network.parts = ["unet"]',
    "network_train_text_encoder_only": 'network.parts = ["text_encoder"]',
    "optimizer_type": "optimizer.name",
    "optimizer_args": "the keys of optimizer, such as optimizer.betas",
    "learning_rate": "optimizer.lr",
    "use_8bit_adam": 'optimizer.name = "adamw8bit"',
    "use_lion_optimizer": 'optimizer.name = "lion"',
    "lr_scheduler": "lr_scheduler.name",
    "lr_scheduler_type": "lr_scheduler.name",
    "lr_warmup_steps": "lr_scheduler.warmup_steps",
    "lr_scheduler_num_cycles": "lr_scheduler.num_cycles",
    "lr_scheduler_power": "lr_scheduler.power",
    "max_train_epochs": "training.max_epochs",
    "max_train_steps": "training.max_steps",
    "sdpa": 'attention.name = "sdpa"',
    "output_dir": "output.dir",
    "output_name": "output.name",
    "save_model_as": "saver.name",
    "save_precision": "saver.precision",
    "save_last_n_epochs": "output.keep_last",
    "save_last_n_steps": "output.keep_last",
    "logging_dir": '[[observers]] name = "tensorboard" with dir',
    "log_with": "[[observers]] name",
}
"""sd-scripts' option names, with the key that does the same here."""

_SECTION_OF: Mapping[str, str] = {
    **{name: "training" for name in ("max_epochs", "max_steps", "gradient_accumulation_steps", "device")},
    **{name: "training" for name in ("gradient_checkpointing", "mixed_precision", "seed", "max_grad_norm")},
    **{name: "optimizer" for name in ("lr", "unet_lr", "text_encoder_lr", "betas", "weight_decay")},
    **{name: "network" for name in ("rank", "alpha", "conv_rank", "conv_alpha", "dropout", "parts")},
    **{name: "model" for name in ("path", "family", "vae", "clip_skip", "max_token_length", "prediction")},
    **{name: "data" for name in ("image_dir", "resolution", "batch_size", "num_repeats", "enable_bucket")},
    **{name: "output" for name in ("save_every_n_epochs", "save_every_n_steps", "keep_last", "save_state")},
    **{name: "saver" for name in ("precision",)},
    **{name: "lr_scheduler" for name in ("warmup_steps",)},
    **{name: "loss" for name in ("min_snr_gamma",)},
}


def hint_for(section: str, name: str, known: Collection[str]) -> str:
    """What an unknown key of a section may have been meant to be."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if near:
        return f"did you mean {f'{section}.{near[0]}' if section else near[0]}?"
    if name in KOHYA_NAMES:
        return f"did you mean {KOHYA_NAMES[name]}?"
    if name in _SECTION_OF and _SECTION_OF[name] != section:
        return f"did you mean {_SECTION_OF[name]}.{name}?"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {f'{section}.{near[0]}' if section else near[0]}?"
    return f"known here: {', '.join(known)}"
