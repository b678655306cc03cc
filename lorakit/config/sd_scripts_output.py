"""The options of sd-scripts' scripts that say what is written, logged and uploaded, and on which processes."""

from __future__ import annotations

from lorakit.config.sd_scripts_option import Option

_WANDB = "lorakit-wandb"
_DEEPSPEED = "DeepSpeed is not supported"
_DDP = "gradients are averaged without DistributedDataParallel"

OUTPUT = (
    Option("output_dir", "path", key="output.dir"),
    Option("output_name", "text", "last", key="output.name"),
    Option(
        "save_model_as", "text", "safetensors", key="saver.name", choices=("ckpt", "pt", "safetensors"), special=True
    ),
    Option("save_precision", "text", "float", key="saver.precision", choices=("float", "fp16", "bf16"), special=True),
    Option("save_every_n_epochs", "int", key="output.save_every_n_epochs", special=True),
    Option("save_every_n_steps", "int", key="output.save_every_n_steps"),
    Option("save_n_epoch_ratio", "int", key="output.save_n_epoch_ratio"),
    Option("save_last_n_epochs", "int", key="output.keep_last", special=True),
    Option("save_last_n_steps", "int", key="output.keep_last", special=True),
    Option("save_last_n_epochs_state", "int", key="output.keep_last_states", special=True),
    Option("save_last_n_steps_state", "int", key="output.keep_last_states", special=True),
    Option("save_state", "flag", False, key="output.save_state"),
    Option("save_state_on_train_end", "flag", False, key="output.save_state_at_end"),
    Option("resume", "path", key="network.weights", special=True, hint="the command's option --resume"),
    Option("no_metadata", "flag", False, key="metadata.minimal"),
)

LOGGING = (
    Option("logging_dir", "path", key="observers.dir", special=True),
    Option(
        "log_with", "text", key="observers.name",
        choices=("tensorboard", "wandb", "all"), special=True,
        hint="[[observers]] with name",
    ),
    Option("log_prefix", "text", key="observers.prefix", special=True),
    Option("log_tracker_name", "text", key="observers.project", special=True, plugin=_WANDB),
    Option("log_tracker_config", "path", key="observers.tags", special=True, plugin=_WANDB),
    Option("wandb_run_name", "text", key="observers.run_name", special=True, plugin=_WANDB),
    Option("wandb_api_key", "text", unneeded="use `wandb login` or WANDB_API_KEY, so that it is in no file"),
    Option("log_config", "flag", False, unneeded="the config is always logged"),
    Option(
        "console_log_level", "text", "INFO", unneeded="there are few messages; `--debug` shows more",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    ),
    Option("console_log_file", "path", unneeded="messages go to standard error; redirect it to a file"),
    Option("console_log_simple", "flag", False, unneeded="messages are plain text"),
)  # fmt: skip

SAMPLES = (
    Option("sample_every_n_steps", "int", key="observers.every_n_steps", special=True),
    Option("sample_every_n_epochs", "int", key="observers.every_n_epochs", special=True),
    Option("sample_at_first", "flag", False, key="observers.at_first", special=True),
    Option("sample_prompts", "path", key="observers.prompts", special=True),
    Option(
        "sample_sampler", "text", "ddim", key="observers.sampler", special=True,
        choices=(
            "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
            "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
        ),
    ),
)  # fmt: skip

_METADATA_TEXTS = (
    "title", "author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor",
)  # fmt: skip
METADATA = (
    *(Option(f"metadata_{name}", "text", key=f"metadata.{name}") for name in _METADATA_TEXTS),
    Option("metadata_thumbnail", "path", key="metadata.thumbnail"),
    Option("metadata_is_negative_embedding", "text", key="metadata.is_negative_embedding", special=True),
)

HUB = (
    Option("huggingface_repo_id", "text", key="observers.repo_id", special=True),
    Option("huggingface_repo_type", "text", key="observers.repo_type", special=True),
    Option("huggingface_path_in_repo", "text", key="observers.path_in_repo", special=True),
    Option("huggingface_token", "text", unneeded="use `hf auth login` or HF_TOKEN, so that it is in no file"),
    Option("huggingface_repo_visibility", "text", key="observers.private", special=True),
    Option("save_state_to_huggingface", "flag", False, key="observers.states", special=True),
    Option("resume_from_huggingface", "flag", False, unneeded="download it with `hf download`, then use `--resume`"),
    Option("async_upload", "flag", False, unneeded="training never waits for uploads"),
)

PROCESSES = (
    Option("deepspeed", "flag", False, later=_DEEPSPEED),
    Option("zero_stage", "int", 2, later=_DEEPSPEED, choices=(0, 1, 2, 3)),
    Option("offload_optimizer_device", "text", later=_DEEPSPEED, choices=("cpu", "nvme")),
    Option("offload_optimizer_nvme_path", "path", later=_DEEPSPEED),
    Option("offload_param_device", "text", later=_DEEPSPEED, choices=("cpu", "nvme")),
    Option("offload_param_nvme_path", "path", later=_DEEPSPEED),
    Option("zero3_init_flag", "flag", False, later=_DEEPSPEED),
    Option("zero3_save_16bit_model", "flag", False, later=_DEEPSPEED),
    Option("fp16_master_weights_and_gradients", "flag", False, later=_DEEPSPEED),
    Option("ddp_timeout", "int", key="training.process_timeout"),
    Option("ddp_gradient_as_bucket_view", "flag", False, unneeded=_DDP),
    Option("ddp_static_graph", "flag", False, unneeded=_DDP),
)

VALIDATION = (
    Option("validation_split", "float", 0.0, key="data.validation_split"),
    Option("validation_seed", "int", key="data.validation_seed", special=True),
    Option("validate_every_n_steps", "int", key="observers.every_n_steps", special=True),
    Option("validate_every_n_epochs", "int", key="observers.every_n_epochs", special=True),
    Option("max_validation_steps", "int", key="observers.max_steps", special=True),
)

CONFIG_FILE = (
    Option("config_file", "path", unneeded="it is read and included in the config"),
    Option("output_config", "flag", False, unneeded="`lorakit from-kohya -o` writes a config"),
)
