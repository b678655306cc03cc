"""What is special to sd-scripts' scripts for flow matching: files, timesteps, and what they do by mistake."""

from __future__ import annotations

import math

from lorakit.api.noise import FlowSpec, ShiftLine
from lorakit.config.sd_scripts import OPTIONS
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.datasets import first_resolution
from lorakit.kohya.draft import Command, Draft, Setting

_T5_TOKENIZER = "google/t5-v1_1-xxl"
_T5_TOKENIZER_OF_ANIMA = "google-t5/t5-small"
_QWEN3_TOKENIZER = "Qwen/Qwen3-0.6B"
"""The tokenizers that sd-scripts takes, by their ids on the Hub."""

_BY_SAMPLING = ("sigmoid_scale", "discrete_flow_shift", "logit_mean", "logit_std", "mode_scale")
"""Options that count with some values of `--timestep_sampling` and `--weighting_scheme` alone."""
_WEIGHTS = ("sigma_sqrt", "cosmap")
"""Values of `--weighting_scheme` that weight the loss."""


def has_option(command: Command, name: str) -> bool:
    """Whether the command's script has an option."""
    return OPTIONS[name].is_of(command.script)


def write_flow(command: Command, draft: Draft) -> None:
    """Write [timesteps] and what [model] and [training] have more with these scripts, and tell what differs."""
    if not command.script.is_flow:
        return
    if has_option(command, "t5xxl"):
        _files_of_flux(command, draft)
        _guidance(command, draft)
        _prediction(command, draft)
    if has_option(command, "qwen3"):
        _files_of_anima(command, draft)
    _memory(command, draft)
    used = _timesteps(command, draft)
    for name in _BY_SAMPLING:
        if name not in used and _is_set(command, name):
            draft.note(name, f"has no effect with {_sampling(command, used)}")
    _loss(command, draft)


def _is_set(command: Command, name: str) -> bool:
    """Whether an option was given with another value than its default."""
    return name in command.given and command.get(name) != OPTIONS[name].default_of(command.script)


def _is_chroma(command: Command) -> bool:
    return bool(command.get("model_type") == "chroma")


def _write_file(command: Command, draft: Draft, name: str, key: str) -> str | None:
    """Write the path that an option gives; None where it gives none."""
    path: str | None = command.get(name)
    if path:
        draft.set("model", key, command.setting(name, command.model_path(path)))
    return path


def _files_of_flux(command: Command, draft: Draft) -> None:
    number = "_2" if command.has_key("model.text_encoder_2") else ""
    if not _is_chroma(command):
        _write_file(command, draft, "clip_l", "text_encoder")
    elif command.get("clip_l"):
        draft.note("clip_l", "has no effect with --model_type=chroma")
    t5 = _write_file(command, draft, "t5xxl", f"text_encoder{number}")
    if t5 and not command.on_disk(t5).is_dir():
        draft.set("model", f"tokenizer{number}", Setting(_T5_TOKENIZER, "the tokenizer that sd-scripts takes"))
    if command.get("ae") and "vae" in command.given:
        draft.note("vae", "has no effect with --ae")
    _write_file(command, draft, "ae", "vae")
    if command.get("t5xxl_max_token_length"):
        draft.set("model", "max_token_length", command.setting("t5xxl_max_token_length"))
    if command.get("apply_t5_attn_mask") and not _is_chroma(command):
        draft.mark_unsupported("apply_t5_attn_mask", value=True, reason=OPTIONS["apply_t5_attn_mask"].later)


def _files_of_anima(command: Command, draft: Draft) -> None:
    qwen3 = _write_file(command, draft, "qwen3", "text_encoder")
    if qwen3:
        is_folder = command.on_disk(qwen3).is_dir()
        tokenizer = command.setting("qwen3", command.model_path(qwen3))
        draft.set(
            "model", "tokenizer",
            tokenizer if is_folder else Setting(_QWEN3_TOKENIZER, "the tokenizer that sd-scripts takes"),
        )  # fmt: skip
    if _write_file(command, draft, "llm_adapter_path", "text_conditioner"):
        message = "is not read by anima_train_network.py, which takes the LLM adapter of the transformer's file"
        draft.note("llm_adapter_path", f"{message}; what was meant is written: model.text_conditioner")
    if not _write_file(command, draft, "t5_tokenizer_path", "t5_tokenizer") and qwen3:
        source = "has the same tokens as the tokenizer that sd-scripts takes"
        draft.set("model", "t5_tokenizer", Setting(_T5_TOKENIZER_OF_ANIMA, source))


def _shown(command: Command, name: str) -> str:
    """What the remark on an option's value begins with."""
    value = command.get(name)
    return f"is {value}" if name in command.given else f"is absent, which means {value}"


def _guidance(command: Command, draft: Draft) -> None:
    """The guidance scale in training, which lorakit has no key for."""
    is_chroma, scale = _is_chroma(command), command.get("guidance_scale")
    right = 0 if is_chroma else 1
    if not is_chroma and command.model().preview_guidance is None:
        if _is_set(command, "guidance_scale"):
            draft.note("guidance_scale", "has no effect, as the model takes no guidance scale")
    elif scale != right:
        why = "which Chroma was made with" if is_chroma else "by which the model learns what the images show"
        message = f"{_shown(command, 'guidance_scale')}, with which LoRA lose contrast"
        draft.note("guidance_scale", f"{message}; lorakit trains with {right}, {why}")


def _prediction(command: Command, draft: Draft) -> None:
    if command.get("model_prediction_type") != "raw":
        message = f"{_shown(command, 'model_prediction_type')}, which by mistake compares no velocity with a velocity"
        draft.note("model_prediction_type", f"{message}; lorakit does what was meant, and raw does")


def _memory(command: Command, draft: Draft) -> None:
    """Block swap, which streams all blocks in lorakit, and checkpoints in the CPU's memory."""
    transformer = command.parts(["unet"])
    blocks = command.get("blocks_to_swap")
    if blocks:
        draft.set("training", "stream_base", command.setting("blocks_to_swap", transformer))
    if has_option(command, "split_mode") and command.get("split_mode"):
        if blocks is None:
            draft.set("training", "stream_base", command.setting("split_mode", transformer))
        else:
            draft.note("split_mode", "has no effect with --blocks_to_swap")
    name = "unsloth_offload_checkpointing"
    if has_option(command, name) and command.get(name):
        draft.set("training", "gradient_checkpointing", command.setting(name))


def _sampling(command: Command, used: set[str]) -> str:
    """What options without effect have none with."""
    text = f"--timestep_sampling={command.get('timestep_sampling')}"
    return f"{text} --weighting_scheme={command.get('weighting_scheme')}" if "weighting_scheme" in used else text


def _timesteps(command: Command, draft: Draft) -> set[str]:
    """Write [timesteps]; returns the names of the options that count."""
    sampling = command.get("timestep_sampling")
    used = {"timestep_sampling"}
    if sampling == "sigma":
        used |= _sigma(command, draft)
    else:
        name = "uniform" if sampling == "uniform" else "logit_normal"
        draft.set("timesteps", "name", command.setting("timestep_sampling", name))
        if sampling != "uniform":
            used.add("sigmoid_scale")
            if _is_set(command, "sigmoid_scale"):
                draft.set("timesteps", "std", command.setting("sigmoid_scale"))
    if sampling in ("sigma", "shift"):
        used.add("discrete_flow_shift")
        draft.set("timesteps", "shift", command.setting("discrete_flow_shift"))
    elif sampling == "flux_shift":
        _flux_shift(command, draft)
    else:
        draft.set("timesteps", "shift", command.setting("timestep_sampling", 1.0))
    return used


def _sigma(command: Command, draft: Draft) -> set[str]:
    """The distribution with `--timestep_sampling=sigma`, whose list of timesteps runs from noise to clean."""
    scheme = command.get("weighting_scheme")
    if scheme == "logit_normal":
        draft.set("timesteps", "name", command.setting("weighting_scheme", "logit_normal"))
        if mean := command.get("logit_mean"):
            draft.set("timesteps", "mean", command.setting("logit_mean", -mean))
            message = "gives less noise above 0 in sd-scripts, and more in lorakit, so that timesteps.mean is"
            draft.note("logit_mean", f"{message} {-mean:g}")
        if _is_set(command, "logit_std"):
            draft.set("timesteps", "std", command.setting("logit_std"))
        return {"weighting_scheme", "logit_mean", "logit_std"}
    if scheme == "mode":
        draft.set("timesteps", "name", command.setting("weighting_scheme", "mode"))
        if _is_set(command, "mode_scale"):
            draft.set("timesteps", "mode_scale", command.setting("mode_scale"))
        return {"weighting_scheme", "mode_scale"}
    is_named = scheme not in _WEIGHTS and "weighting_scheme" in command.given
    draft.set("timesteps", "name", command.setting("weighting_scheme" if is_named else "timestep_sampling", "uniform"))
    return {"weighting_scheme"}


def _flux_shift(command: Command, draft: Draft) -> None:
    """FLUX.1's shift by the number of tokens: the model's own, or else that of the images' resolution as a number."""
    line, process = ShiftLine(), command.model().noise_process
    if isinstance(process, FlowSpec) and process.shift == line:
        return
    width, height = first_resolution(command, draft) or (command.family.usual_resolution,) * 2
    shift = round(math.exp(line.mu_of((16, height // 8, width // 8))), 4)
    draft.set("timesteps", "shift", command.setting("timestep_sampling", shift))
    message = "flux_shift goes by the size of each image; timesteps.shift is a number for"
    draft.note("timestep_sampling", f"{message} all, that of {width}×{height} pixels")


def _loss(command: Command, draft: Draft) -> None:
    """Weights of timesteps, and Huber losses."""
    scheme, sampling = command.get("weighting_scheme"), command.get("timestep_sampling")
    if scheme in _WEIGHTS and has_option(command, "model_prediction_type"):
        message = f"{scheme} weights the loss with --model_prediction_type=sigma_scaled alone, and that is wrong"
        draft.note("weighting_scheme", f"{message}; lorakit weights all timesteps alike, as with raw")
    elif scheme in _WEIGHTS:
        reason = "all timesteps have the same weight in the loss"
        if scheme == "cosmap":
            reason += '; timesteps.name = "cosmap" draws those of more weight more often'
        draft.mark_unsupported("weighting_scheme", scheme, reason)
    elif scheme in ("logit_normal", "mode") and sampling != "sigma":
        draft.note("weighting_scheme", f"has no effect with --timestep_sampling={sampling}")
    if command.get("loss_type") not in ("huber", "smooth_l1"):
        return
    schedule = command.get("huber_schedule")
    if schedule == "snr":
        message = f"{_shown(command, 'huber_schedule')}, with which {command.script.name} stops"
        raise ConfigError([Problem("--huber_schedule", message, "give --huber_schedule=exponential or constant")])
    if schedule == "exponential" and has_option(command, "qwen3"):
        message = "exponential hardly changes the threshold in anima_train_network.py, which counts timesteps to 1"
        draft.note("huber_schedule", f"{message} there and not to 1000; lorakit's goes down to huber_c, as is meant")
