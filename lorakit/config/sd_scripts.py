"""The options of sd-scripts' scripts for LoRA training, and what corresponds to them in lorakit.

A row that names a key works as soon as lorakit has that key; see `lorakit.kohya.draft`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.config.sd_scripts_option import Option
from lorakit.config.sd_scripts_output import (
    CONFIG_FILE,
    HUB,
    LOGGING,
    METADATA,
    OUTPUT,
    PROCESSES,
    SAMPLES,
    VALIDATION,
)
from lorakit.config.training_scripts import ANIMA_TRAIN_NETWORK, FLUX_TRAIN_NETWORK, SDXL_TRAIN_NETWORK

_ALWAYS = "latents and text embeddings are always cached where they do not change"
_HALF = "LoRA weights are used in half precision with small float32 masters; `saver.precision` sets the file's dtype"
_SKIP = "`lorakit train CONFIG --resume` continues at exactly the same step"
_UNREAD = "anima_train_network.py does not read it; `--network_args network_reg_lrs` is for LoRA"
_COMPILED = "torch.compile is called block by block with its own defaults"

_FLUX, _ANIMA = (FLUX_TRAIN_NETWORK,), (ANIMA_TRAIN_NETWORK,)
_FLOW = (FLUX_TRAIN_NETWORK, ANIMA_TRAIN_NETWORK)
_NEWER = (SDXL_TRAIN_NETWORK, *_FLOW)

MODEL = (
    Option("pretrained_model_name_or_path", "path", key="model.path", special=True),
    Option("v2", "flag", False, key='model.family = "sd2"', hint="model.family, which is detected if absent"),
    Option("v_parameterization", "flag", False, key='model.prediction = "v_prediction"', special=True),
    Option("tokenizer_cache_dir", "path", unneeded="lorakit includes the tokenizer's vocabulary"),
    Option("vae", "path", key="model.vae"),
    Option("no_half_vae", "flag", False, key="model.no_half_vae"),
    Option(
        "disable_mmap_load_safetensors", "flag", False, scripts=_NEWER,
        unneeded="lorakit always memory-maps model files, which affects only how fast they load",
    ),
    Option("model_type", "text", "flux", key="model.family", special=True, choices=("flux", "chroma"), scripts=_FLUX),
    Option("clip_l", "path", key="model.text_encoder", special=True, scripts=_FLUX),
    Option("t5xxl", "path", key="model.text_encoder_2", special=True, scripts=_FLUX),
    Option("ae", "path", key="model.vae", special=True, scripts=_FLUX),
    Option("t5xxl_max_token_length", "int", key="model.max_token_length", special=True, scripts=_FLUX),
    Option(
        "apply_t5_attn_mask", "flag", False, scripts=_FLUX, special=True,
        later="FLUX.1 is trained without a mask, as it was made and as images are drawn; Chroma always with one",
    ),
    Option(
        "controlnet_model_name_or_path", "path", scripts=_FLUX,
        later="flux_train_network.py does not read it",
    ),
    Option("qwen3", "path", key="model.text_encoder", special=True, scripts=_ANIMA),
    Option("llm_adapter_path", "path", key="model.text_conditioner", special=True, scripts=_ANIMA),
    Option("t5_tokenizer_path", "path", key="model.t5_tokenizer", special=True, scripts=_ANIMA),
    Option("qwen3_max_token_length", "int", 512, scripts=_ANIMA, later="captions of up to 512 tokens are read"),
    Option("t5_max_token_length", "int", 512, scripts=_ANIMA, later="captions of up to 512 tokens are read"),
)  # fmt: skip

DATA = (
    Option("dataset_config", "path", key="data.config", special=True),
    Option("train_data_dir", "path", key="data.image_dir", special=True),
    Option("reg_data_dir", "path", key="data.is_reg", special=True),
    Option("in_json", "path", key="data.metadata_file", special=True),
    Option("dataset_repeats", "int", 1, key="data.num_repeats", special=True),
    Option("train_batch_size", "int", 1, key="data.batch_size"),
    Option("resolution", "text", key="data.resolution", special=True),
    Option("caption_extension", "text", ".caption", key="data.caption_extension", special=True),
    Option("caption_extention", "text", key="data.caption_extension", special=True),
    Option("caption_separator", "text", ",", key="data.caption_separator"),
    Option("shuffle_caption", "flag", False, key="data.shuffle_caption"),
    Option("keep_tokens", "int", 0, key="data.keep_tokens"),
    Option("keep_tokens_separator", "text", "", key="data.keep_tokens_separator"),
    Option("secondary_separator", "text", key="data.secondary_separator"),
    Option("enable_wildcard", "flag", False, key="data.enable_wildcard"),
    Option("caption_prefix", "text", key="data.caption_prefix"),
    Option("caption_suffix", "text", key="data.caption_suffix"),
    Option("caption_dropout_rate", "float", 0.0, key="data.caption_dropout_rate"),
    Option("caption_dropout_every_n_epochs", "int", 0, key="data.caption_dropout_every_n_epochs"),
    Option("caption_tag_dropout_rate", "float", 0.0, key="data.caption_tag_dropout_rate"),
    Option("token_warmup_min", "int", 1, key="data.token_warmup_min"),
    Option("token_warmup_step", "float", 0.0, key="data.token_warmup_step"),
    Option("color_aug", "flag", False, key="data.color_aug"),
    Option("flip_aug", "flag", False, key="data.flip_aug"),
    Option("face_crop_aug_range", "text", key="data.face_crop_aug_range", special=True),
    Option("random_crop", "flag", False, key="data.random_crop"),
    Option("enable_bucket", "flag", False, key="data.enable_bucket"),
    Option("min_bucket_reso", "int", 256, key="data.min_bucket_reso"),
    Option("max_bucket_reso", "int", 1024, key="data.max_bucket_reso"),
    Option("bucket_reso_steps", "int", 64, key="data.bucket_reso_steps"),
    Option("bucket_no_upscale", "flag", False, key="data.bucket_no_upscale"),
    Option(
        "resize_interpolation", "text", key="data.resize_interpolation",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    ),
    Option("cache_latents", "flag", False, unneeded=_ALWAYS, hint="data.cache_dir"),
    Option("cache_latents_to_disk", "flag", False, unneeded=_ALWAYS, hint="data.cache_dir"),
    Option("vae_batch_size", "int", key="data.encode_batch_size"),
    *(
        Option(name, "flag", False, unneeded=_ALWAYS, hint="data.cache_dir", scripts=_NEWER)
        for name in ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
    ),
    Option(
        "text_encoder_batch_size", "int", scripts=_FLOW,
        unneeded="captions are encoded as many at once as fit; the result is the same",
    ),
    Option("skip_cache_check", "flag", False, unneeded="the cache is keyed by content and always valid"),
    Option("cache_info", "flag", False, unneeded="image information is always cached"),
    Option("alpha_mask", "flag", False, key="data.alpha_mask"),
    Option(
        "masked_loss", "flag", False, unneeded="masks are used in every subset with `conditioning_data_dir`",
        hint="data.conditioning_data_dir",
    ),
    Option("conditioning_data_dir", "path", unneeded="it has no effect in train_network.py"),
    Option(
        "dataset_class", "text",
        later="a dataset class cannot be given; a plugin can add a dataset source",
    ),
    Option("debug_dataset", "flag", False, unneeded="`lorakit data --sheet` draws images as they are trained"),
    Option("max_data_loader_n_workers", "int", 8, key="data.workers", special=True),
    Option("persistent_data_loader_workers", "flag", False, unneeded="the image decoding threads are persistent"),
    Option("prior_loss_weight", "float", 1.0, key="data.prior_loss_weight"),
)  # fmt: skip

NETWORK = (
    Option("network_module", "text", key="network.name", special=True),
    Option("network_dim", "int", 4, key="network.rank"),
    Option("network_alpha", "float", 1.0, key="network.alpha"),
    Option("network_dropout", "float", 0.0, key="network.dropout"),
    Option(
        "network_args", "texts", (), key="network.conv_rank", special=True,
        hint="the keys of [network], such as network.conv_rank",
    ),
    Option("network_weights", "path", key="network.weights"),
    Option("dim_from_weights", "flag", False, key="network.rank_from_weights"),
    Option("network_train_unet_only", "flag", False, key='network.parts = ["unet"]'),
    Option("network_train_text_encoder_only", "flag", False, key='network.parts = ["text_encoder"]'),
    Option("base_weights", "texts", (), key="model.base_weights", special=True),
    Option("base_weights_multiplier", "floats", (), key="model.base_weights_multipliers", special=True),
    Option("scale_weight_norms", "float", key="network.scale_weight_norms"),
    Option("training_comment", "text", key="output.training_comment"),
)  # fmt: skip

OPTIMIZER = (
    Option("optimizer_type", "text", "", key="optimizer.name", special=True),
    Option(
        "optimizer_args", "texts", (), key="optimizer.name", special=True,
        hint="the keys of [optimizer], such as optimizer.betas",
    ),
    Option("learning_rate", "float", 2e-6, key="optimizer.lr", special=True),
    Option("unet_lr", "float", key="optimizer.unet_lr", special=True),
    Option("text_encoder_lr", "floats", key="optimizer.text_encoder_lr", special=True),
    *(
        Option(name, "float", scripts=_ANIMA, later=_UNREAD)
        for name in ("llm_adapter_lr", "self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr")
    ),
    Option("max_grad_norm", "float", 1.0, key="training.max_grad_norm"),
    Option("use_8bit_adam", "flag", False, key='optimizer.name = "adamw8bit"', special=True),
    Option("use_lion_optimizer", "flag", False, key='optimizer.name = "lion"', special=True),
    Option("fused_backward_pass", "flag", False, unneeded="it has no effect in train_network.py"),
    Option("lr_scheduler", "text", "constant", key="lr_scheduler.name", special=True),
    Option("lr_warmup_steps", "int or share", 0, key="lr_scheduler.warmup_steps", special=True),
    Option("lr_decay_steps", "int or share", 0, key="lr_scheduler.decay_steps", special=True),
    Option("lr_scheduler_num_cycles", "int", 1, key="lr_scheduler.num_cycles", special=True),
    Option("lr_scheduler_power", "float", 1.0, key="lr_scheduler.power", special=True),
    Option("lr_scheduler_timescale", "int", key="lr_scheduler.timescale", special=True),
    Option("lr_scheduler_min_lr_ratio", "float", key="lr_scheduler.min_lr_ratio", special=True),
    Option("lr_scheduler_type", "text", "", key="lr_scheduler.name", special=True),
    Option(
        "lr_scheduler_args", "texts", (), key="lr_scheduler.name", special=True,
        hint="the keys of [lr_scheduler], such as lr_scheduler.power",
    ),
)  # fmt: skip

TRAINING = (
    Option("max_train_steps", "int", 1600, key="training.max_steps", special=True),
    Option("max_train_epochs", "int", key="training.max_epochs"),
    Option("gradient_accumulation_steps", "int", 1, key="training.gradient_accumulation_steps"),
    Option("gradient_checkpointing", "flag", False, key="training.gradient_checkpointing"),
    Option(
        "cpu_offload_checkpointing", "flag", False,
        unneeded="train_network.py itself fails with it; others save memory, as `lorakit plan` says how to",
    ),
    Option(
        "unsloth_offload_checkpointing", "flag", False, key="training.gradient_checkpointing", special=True,
        scripts=_ANIMA,
    ),
    Option("blocks_to_swap", "int", key="training.stream_base", special=True, scripts=_FLOW),
    Option("split_mode", "flag", False, key="training.stream_base", special=True, scripts=_FLUX),
    Option("seed", "int", key="training.seed", special=True),
    Option("mixed_precision", "text", "no", key="training.mixed_precision", choices=("no", "fp16", "bf16")),
    Option("full_fp16", "flag", False, unneeded=_HALF),
    Option("full_bf16", "flag", False, unneeded=_HALF),
    Option("fp8_base", "flag", False, key='training.fp8_base = ["unet", "text_encoder"]'),
    Option("fp8_base_unet", "flag", False, key='training.fp8_base = ["unet"]'),
    Option("xformers", "flag", False, key='attention.name = "sdpa"', special=True),
    Option("sdpa", "flag", False, key='attention.name = "sdpa"', special=True),
    Option("mem_eff_attn", "flag", False, key='attention.name = "sdpa"', special=True),
    Option(
        "attn_mode", "text", key='attention.name = "sdpa"', special=True, scripts=_ANIMA,
        choices=("torch", "xformers", "flash", "sageattn", "sdpa"),
    ),
    Option("split_attn", "flag", False, scripts=_ANIMA, unneeded="it saves memory, and the result is the same"),
    Option("vae_chunk_size", "int", scripts=_ANIMA, unneeded="it saves memory, and the result is the same"),
    *(
        Option(name, "flag", False, scripts=_ANIMA, unneeded="images are encoded one by one, without time")
        for name in ("vae_disable_cache", "qwen_image_vae_2d")
    ),
    Option("compile", "flag", False, key="training.compile", special=True, scripts=_FLOW),
    Option(
        "compile_backend", "text", "inductor", key="training.compile_backend", special=True, scripts=_FLOW,
    ),
    Option("compile_mode", "text", "default", scripts=_FLOW, later=_COMPILED),
    Option("compile_dynamic", "text", scripts=_FLOW, later=_COMPILED),
    Option("compile_fullgraph", "flag", False, scripts=_FLOW, later=_COMPILED),
    Option("compile_cache_size_limit", "int", scripts=_FLOW, later=_COMPILED),
    Option("torch_compile", "flag", False, key="training.compile", special=True),
    Option(
        "dynamo_backend", "text", "inductor", key="training.compile_backend", special=True,
        choices=(
            "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt",
            "onnxrt", "tensorrt", "ipex", "tvm", "no",
        ),
    ),
    Option("max_token_length", "int", key="model.max_token_length", choices=(150, 225), in_files=(75,)),
    Option("clip_skip", "int", key="model.clip_skip"),
    Option("weighted_captions", "flag", False, key="data.weighted_captions"),
    Option("lowram", "flag", False, unneeded="weights are loaded directly to their device"),
    Option("highvram", "flag", False, unneeded="the accelerator's memory cache is not emptied after each batch"),
    Option("skip_until_initial_step", "flag", False, unneeded=_SKIP),
    Option("initial_epoch", "int", unneeded=_SKIP),
    Option("initial_step", "int", unneeded=_SKIP),
)  # fmt: skip

LOSS = (
    Option(
        "timestep_sampling", "text", "sigma", key="timesteps.name", special=True, scripts=_FLOW,
        other_defaults={ANIMA_TRAIN_NETWORK.name: "sigmoid"},
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    ),
    Option("sigmoid_scale", "float", 1.0, key="timesteps.std", special=True, scripts=_FLOW),
    Option(
        "discrete_flow_shift", "float", 3.0, key="timesteps.shift", special=True, scripts=_FLOW,
        other_defaults={ANIMA_TRAIN_NETWORK.name: 1.0},
    ),
    Option(
        "weighting_scheme", "text", "uniform", key="timesteps.name", special=True, scripts=_FLOW,
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    ),
    Option("logit_mean", "float", 0.0, key="timesteps.mean", special=True, scripts=_FLOW),
    Option("logit_std", "float", 1.0, key="timesteps.std", special=True, scripts=_FLOW),
    Option("mode_scale", "float", 1.29, key="timesteps.mode_scale", special=True, scripts=_FLOW),
    Option("show_timesteps", "text", scripts=_FLOW, unneeded="it draws the distribution and trains nothing"),
    Option("show_timesteps_resolution", "text", scripts=_FLOW, unneeded="it draws the distribution and trains nothing"),
    Option(
        "guidance_scale", "float", 3.5, special=True, scripts=_FLUX,
        later="training always takes 1, by which FLUX.1 dev learns what it is shown, and Chroma 0",
    ),
    Option(
        "model_prediction_type", "text", "sigma_scaled", special=True, scripts=_FLUX,
        later="the velocity is compared with the velocity, as with `raw`",
        choices=("raw", "additive", "sigma_scaled"),
    ),
    Option("noise_offset", "float", key="loss.noise_offset"),
    Option("noise_offset_random_strength", "flag", False, key="loss.noise_offset_random_strength"),
    Option("adaptive_noise_scale", "float", key="loss.adaptive_noise_scale"),
    Option("multires_noise_iterations", "int", key="loss.multires_noise_iterations"),
    Option("multires_noise_discount", "float", 0.3, key="loss.multires_noise_discount"),
    Option("ip_noise_gamma", "float", key="loss.ip_noise_gamma"),
    Option("ip_noise_gamma_random_strength", "flag", False, key="loss.ip_noise_gamma_random_strength"),
    Option("zero_terminal_snr", "flag", False, key="loss.zero_terminal_snr"),
    Option("min_timestep", "int", key="loss.min_timestep"),
    Option("max_timestep", "int", key="loss.max_timestep"),
    Option("loss_type", "text", "l2", key="loss.type", choices=("l1", "l2", "huber", "smooth_l1")),
    Option("huber_schedule", "text", "snr", key="loss.huber_schedule", choices=("constant", "exponential", "snr")),
    Option("huber_c", "float", 0.1, key="loss.huber_c"),
    Option("huber_scale", "float", 1.0, key="loss.huber_scale"),
    Option("min_snr_gamma", "float", key="loss.min_snr_gamma"),
    Option("scale_v_pred_loss_like_noise_pred", "flag", False, key="loss.scale_v_pred_loss_like_noise_pred"),
    Option("v_pred_like_loss", "float", key="loss.v_pred_like_loss"),
    Option("debiased_estimation_loss", "flag", False, key="loss.debiased_estimation"),
)  # fmt: skip

GROUPS: Mapping[str, tuple[Option, ...]] = {
    "The base model": MODEL,
    "Images and captions": DATA,
    "The network": NETWORK,
    "Optimizer and learning rate": OPTIMIZER,
    "Length, precision and memory": TRAINING,
    "Noise and loss": LOSS,
    "Saving": OUTPUT,
    "Logs": LOGGING,
    "Previews": SAMPLES,
    "Metadata": METADATA,
    "The Hub": HUB,
    "Several processes": PROCESSES,
    "Validation": VALIDATION,
    "The config file": CONFIG_FILE,
}
"""All options by what they are about."""

OPTIONS: Mapping[str, Option] = {option.name: option for group in GROUPS.values() for option in group}
"""All options by name."""

_OBSERVERS: Mapping[str, tuple[Option, ...]] = {
    "wandb": tuple(option for option in LOGGING if option.plugin),
    "tensorboard": LOGGING,
    "samples": SAMPLES,
    "hub": HUB,
    "validation": VALIDATION,
}
"""The observers that take the options with a key of `[[observers]]`; the first that lists an option takes it."""

NETWORK_ARG_KEYS: Mapping[str, str] = {
    "dim": "rank",
    "conv_dim": "conv_rank",
    "block_dims": "block_ranks",
    "conv_block_dims": "conv_block_ranks",
}
"""Arguments of sd-scripts' `networks.lora` whose key in `[network]` has another name."""


def _target(option: Option) -> str:
    """What to suggest to those who write an option's name as a key; empty if nothing corresponds to it."""
    section, _, key = option.key.partition(".")
    if option.hint or section != "observers":
        return option.hint or option.key
    observer = next(name for name, options in _OBSERVERS.items() if option in options)
    return f'[[observers]] with name = "{observer}" and {key}'


OTHER_KEYS: Mapping[str, str] = {
    **{
        option.name: _target(option)
        for option in OPTIONS.values()
        if _target(option).rpartition(".")[2] not in ("", option.name)
    },
    **{argument: f"network.{key}" for argument, key in NETWORK_ARG_KEYS.items()},
}
"""Names in sd-scripts that are not the name of the equivalent key, with what to write instead."""
