"""Which key was meant, when a key is not known: one that is near, or sd-scripts' name for it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

KOHYA_NAMES: Mapping[str, str] = {
    "pretrained_model_name_or_path": "model.path",
    "v2": "model.family, which is recognised when absent",
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
    "masked_loss": "data.conditioning_data_dir",
    "network_module": "network.name",
    "network_dim": "network.rank",
    "network_alpha": "network.alpha",
    "network_dropout": "network.dropout",
    "network_weights": "network.weights",
    "network_args": "the keys of [network], such as network.conv_rank",
    "conv_dim": "network.conv_rank",
    "dim": "network.rank",
    "dim_from_weights": "network.rank_from_weights",
    "block_dims": "network.block_ranks",
    "conv_block_dims": "network.conv_block_ranks",
    "network_train_unet_only": 'network.parts = ["unet"]',
    "network_train_text_encoder_only": 'network.parts = ["text_encoder"]',
    "optimizer_type": "optimizer.name",
    "optimizer_args": "the keys of [optimizer], such as optimizer.betas",
    "learning_rate": "optimizer.lr",
    "use_8bit_adam": 'optimizer.name = "adamw8bit"',
    "use_lion_optimizer": 'optimizer.name = "lion"',
    "lr_scheduler": "lr_scheduler.name",
    "lr_scheduler_type": "lr_scheduler.name",
    "lr_scheduler_args": "the keys of [lr_scheduler], such as lr_scheduler.power",
    "lr_warmup_steps": "lr_scheduler.warmup_steps",
    "lr_scheduler_num_cycles": "lr_scheduler.num_cycles",
    "lr_scheduler_power": "lr_scheduler.power",
    "lr_decay_steps": "lr_scheduler.decay_steps",
    "lr_scheduler_timescale": "lr_scheduler.timescale",
    "lr_scheduler_min_lr_ratio": "lr_scheduler.min_lr_ratio",
    "max_train_epochs": "training.max_epochs",
    "max_train_steps": "training.max_steps",
    "loss_type": "loss.type",
    "debiased_estimation_loss": "loss.debiased_estimation",
    "sdpa": 'attention.name = "sdpa"',
    "xformers": 'attention.name = "sdpa"',
    "mem_eff_attn": 'attention.name = "sdpa"',
    "output_dir": "output.dir",
    "output_name": "output.name",
    "save_model_as": "saver.name",
    "save_precision": "saver.precision",
    "save_last_n_epochs": "output.keep_last",
    "save_last_n_steps": "output.keep_last",
    "save_state_on_train_end": "output.save_state_at_end",
    "save_last_n_epochs_state": "output.keep_last_states",
    "save_last_n_steps_state": "output.keep_last_states",
    "no_metadata": "metadata.minimal",
    "resume": "the command's option --resume",
    "logging_dir": '[[observers]] with name = "tensorboard" and dir',
    "log_with": "[[observers]] with name",
    "sample_prompts": '[[observers]] with name = "samples" and prompts',
    "sample_every_n_epochs": '[[observers]] with name = "samples" and every_n_epochs',
    "sample_every_n_steps": '[[observers]] with name = "samples" and every_n_steps',
    "sample_at_first": '[[observers]] with name = "samples" and at_first',
    "sample_sampler": '[[observers]] with name = "samples" and sampler',
    "log_prefix": '[[observers]] with name = "tensorboard" and prefix',
    "huggingface_repo_id": '[[observers]] with name = "hub" and repo_id',
    "ddp_timeout": "training.process_timeout",
    "validate_every_n_epochs": '[[observers]] with name = "validation" and every_n_epochs',
    "validate_every_n_steps": '[[observers]] with name = "validation" and every_n_steps',
    "max_validation_steps": '[[observers]] with name = "validation" and max_steps',
}
"""sd-scripts' option names, with the key that does the same here; options of the same name are left out."""


def hint_for(section: str, name: str, known: Collection[str], places: Mapping[str, str]) -> str:
    """What an unknown key of a section may have been meant to be.

    `known` are the section's keys; `places` says, by bare name, where options of other sections and components stand.
    Of a key that other components of the section have, such as `betas`, the nearest key here may be meant: `beta1`.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    # As other tools write it: --max-epochs, maxEpochs, MAX_EPOCHS.
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.lstrip("-")).replace("-", "_").lower()
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if name in known:
        meant = f"{section}.{name}" if section else name
    elif name in KOHYA_NAMES:
        meant = KOHYA_NAMES[name]
    elif close and places.get(name, "").startswith(f"{section}.{name} of "):
        return f"did you mean {section}.{close[0]}? {name} is a key{places[name].removeprefix(f'{section}.{name}')}"
    elif name in places:
        meant = places[name]
    elif near:
        meant = f"{section}.{near[0]}" if section else near[0]
    else:
        return f"known here: {', '.join(known)}" if known else ""
    return f"did you mean {meant}?"
