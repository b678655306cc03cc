"""The kohya_ss GUI's .json files for FLUX.1, Chroma and Anima: each with the fields of all models in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError
from tests.kohya.conftest import Convert
from tests.kohya.test_conversion import remarks
from tests.kohya.test_files_of_programs import Read, config, gui, read

__all__ = ["read"]

SHARED: dict[str, Any] = {
    "additional_parameters": "", "dataset_config": "dataset.toml", "train_data_dir": "", "train_batch_size": 1,
    "max_resolution": "64,64", "max_bucket_reso": 1024, "network_dim": 16, "network_alpha": 16,
    "network_dropout": 0, "rank_dropout": 0, "module_dropout": 0, "scale_weight_norms": 0, "loraplus_unet_lr_ratio": 0,
    "learning_rate": 3e-4, "unet_lr": 3e-4, "text_encoder_lr": 0, "lr_scheduler": "constant", "lr_warmup": 0,
    "lr_scheduler_num_cycles": 1, "optimizer_args": "", "max_train_steps": 1000, "mixed_precision": "bf16",
    "save_precision": "bf16", "shuffle_caption": False, "caption_dropout_rate": 0, "sample_prompts": "",
    "sample_every_n_epochs": 0, "logging_dir": "", "clip_skip": 1, "noise_offset_type": "Original", "noise_offset": 0,
    "min_snr_gamma": 0, "max_timestep": 0, "gradient_checkpointing": True, "enable_bucket": False,
    "keep_tokens": 0, "caption_extension": ".txt", "max_data_loader_n_workers": 0, "weighting_scheme": "logit_normal",
    "max_token_length": 225, "sample_sampler": "euler_a",
}  # fmt: skip
"""What the files below have in common: nothing that is for Stable Diffusion alone, but SD3's `weighting_scheme`."""

WORDS = (
    "--output_name=fluffy", "--network_dim=16", "--network_alpha=16", "--learning_rate=3e-4", "--unet_lr=3e-4",
    "--lr_scheduler=constant", "--max_train_steps=1000", "--mixed_precision=bf16", "--save_precision=bf16",
    "--network_train_unet_only", "--gradient_checkpointing", "--sdpa", "--seed=1234", "--save_every_n_epochs=1",
    "--optimizer_type=AdamW", "--cache_latents", "--resolution=64,64",
)  # fmt: skip
"""The options that the GUI makes of them."""

LENGTH = ("--t5xxl_max_token_length=512",)
FLUX = {
    **SHARED, "flux1_checkbox": True, "LoRA_type": "Flux1", "pretrained_model_name_or_path": "flux.safetensors",
    "guidance_scale": 1, "model_prediction_type": "raw", "discrete_flow_shift": 3.1582, "timestep_sampling": "shift",
}  # fmt: skip
ANIMA = {
    **SHARED, "anima_checkbox": True, "LoRA_type": "Anima", "pretrained_model_name_or_path": "anima.safetensors",
}  # fmt: skip


def tables(read: Read, folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The tables of a file's config; nothing may be said of it but what is no mistake."""
    draft = read(gui(folder, **fields))
    assert remarks(draft) == []
    return draft.tables()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        (
            {"ae": "a.sft", "clip_l": "c.safetensors", "t5xxl": "t.safetensors", "t5xxl_max_token_length": 256,
             "vae": "", "flux1_cache_text_encoder_outputs": True, "flux1_cache_text_encoder_outputs_to_disk": True},
            ["--ae=a.sft", "--clip_l=c.safetensors", "--t5xxl=t.safetensors", "--t5xxl_max_token_length=256"],
        ),
        ({"timestep_sampling": "flux_shift", "discrete_flow_shift": 3},
         ["--timestep_sampling=flux_shift", "--discrete_flow_shift=3"]),
        ({"timestep_sampling": "sigma", "discrete_flow_shift": 3},
         ["--timestep_sampling=sigma", "--discrete_flow_shift=3"]),
        ({"fp8_base": True, "blocks_to_swap": 18}, ["--fp8_base", "--blocks_to_swap=18"]),
        ({"fp8_base_unet": True, "double_blocks_to_swap": 6}, ["--fp8_base_unet", "--blocks_to_swap=6"]),
        ({"split_mode": True, "train_blocks": "double"}, ["--split_mode", "--network_args", "train_blocks=single"]),
        (
            {"train_double_block_indices": "0", "single_dim": "4", "single_mod_dim": "4"},
            ["--network_args", "train_double_block_indices=0", "single_dim=4", "single_mod_dim=4"],
        ),
        ({"train_t5xxl": True, "text_encoder_lr": 1e-4, "t5xxl_lr": 1e-5},
         ["--text_encoder_lr", "1e-4", "1e-5", "--network_args", "train_t5xxl=True"]),
        ({"rank_dropout": 0.1, "module_dropout": 0.2, "loraplus_lr_ratio": 4},
         ["--network_args", "rank_dropout=0.1", "module_dropout=0.2", "loraplus_lr_ratio=4"]),
    ],
)  # fmt: skip
def test_flux(
    changed: dict[str, Any], words: list[str], read: Read, converted: Convert, flux_least: tuple[str, ...], folder: Path
) -> None:
    """Fields of FLUX.1 are the options that the GUI makes of them; those of SD3 and Anima do not count."""
    base = [word for word in WORDS if "text_encoder_lr" not in changed or word != "--network_train_unet_only"]
    least = (*flux_least, "--timestep_sampling=shift", "--discrete_flow_shift=3.1582", *LENGTH, *base)
    expected = converted(*words, least=least).tables()
    own = {"anima_timestep_sampling": "uniform", "anima_discrete_flow_shift": 5, "anima_vae": "v"}
    assert tables(read, folder, {**FLUX, **own, **changed}) == expected


def test_chroma(read: Read, converted: Convert, chroma_least: tuple[str, ...], folder: Path) -> None:
    """`model_type` says Chroma, whose CLIP-L field stays where the GUI hides it."""
    fields = {
        **FLUX, "model_type": "chroma", "pretrained_model_name_or_path": "chroma.safetensors", "guidance_scale": 0,
        "apply_t5_attn_mask": True, "timestep_sampling": "sigmoid", "discrete_flow_shift": 3,
        "clip_l": "c.safetensors", "t5xxl": "t.safetensors",
    }  # fmt: skip
    words = (*LENGTH, *WORDS, "--timestep_sampling=sigmoid", "--t5xxl=t.safetensors")
    expected = converted(*words, least=chroma_least).tables()
    assert tables(read, folder, fields) == expected
    with pytest.raises(ConfigError, match=r"is flux, and chroma.safetensors is a Chroma model \(--model_type=chroma\)"):
        read(gui(folder, **{**fields, "model_type": "flux"}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        (
            {"anima_qwen3": "q.safetensors", "anima_vae": "v.safetensors", "anima_t5_tokenizer_path": "t5",
             "vae": "w.safetensors", "anima_cache_text_encoder_outputs": True, "anima_attn_mode": "flash"},
            ["--qwen3=q.safetensors", "--vae=v.safetensors", "--t5_tokenizer_path=t5"],
        ),
        ({"anima_timestep_sampling": "shift", "anima_discrete_flow_shift": 3, "anima_sigmoid_scale": 1.5},
         ["--timestep_sampling=shift", "--discrete_flow_shift=3", "--sigmoid_scale=1.5"]),
        ({"anima_compile": True, "anima_compile_backend": "eager"}, ["--compile", "--compile_backend=eager"]),
        ({"anima_compile_mode": "max-autotune"}, []),
        ({"anima_unsloth_offload_checkpointing": True, "blocks_to_swap": 8}, ["--blocks_to_swap=8"]),
        ({"text_encoder_lr": 1e-5, "module_dropout": 0.1},
         ["--text_encoder_lr=1e-5", "--network_args", "module_dropout=0.1"]),
    ],
)  # fmt: skip
def test_anima(
    changed: dict[str, Any], words: list[str], read: Read, converted: Convert, anima_least: tuple[str, ...],
    folder: Path,
) -> None:  # fmt: skip
    """Fields that begin with `anima_` are options; those of FLUX.1 with the same meaning do not count."""
    base = [word for word in WORDS if "text_encoder_lr" not in changed or word != "--network_train_unet_only"]
    expected = converted(*words, least=(*anima_least, *base)).tables()
    own = {"timestep_sampling": "uniform", "discrete_flow_shift": 5, "t5xxl": "t", "guidance_scale": 3.5}
    assert tables(read, folder, {**ANIMA, **own, **changed}) == expected


def test_llm_adapter(read: Read, anima_least: tuple[str, ...], folder: Path) -> None:
    """The adapter's file is read as on a command line."""
    assert anima_least
    draft = read(gui(folder, **ANIMA, anima_llm_adapter_path="l.sft"))
    assert draft.tables()["model"]["text_conditioner"] == "l.sft"
    assert [text.partition(":")[0] for text in remarks(draft)] == ["--llm_adapter_path"]


def test_what_does_not_count(read: Read, flux_least: tuple[str, ...], folder: Path) -> None:
    """The choice of blocks that the GUI itself does not pass on is told, as is what the script does by mistake."""
    assert flux_least
    name = gui(folder, **{**FLUX, "train_blocks": "double", "guidance_scale": 3.5, "min_snr_gamma": 5})
    draft = read(name)
    assert [text.partition(": ")[0] for text in remarks(draft)] == [
        name, "--min_snr_gamma", "--guidance_scale",
    ]  # fmt: skip
    assert remarks(draft)[0].startswith(f"{name}: train_blocks: has no effect, as in the GUI itself (in the config")
    assert "group_ranks" not in draft.tables()["network"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({**FLUX, "LoRA_type": "Standard"}, "LoRA_type: 'Standard' is for another model, or unknown (choose Flux1, as"),
        ({**FLUX, "LoRA_type": "Flux1 OFT"}, "networks.oft_flux"),
        ({**FLUX, "t5xxl_lr": 1e-5}, "t5xxl_lr: is set, and text_encoder_lr is 0, at which the GUI stops"),
        ({**ANIMA, "LoRA_type": "LyCORIS/LoKr"}, "(choose Anima, as the GUI asks for with anima_train_network.py)"),
        ({**ANIMA, "anima_qwen3_max_token_length": "x"}, "changed.json: anima_qwen3_max_token_length: must be a whole"),
        ({**ANIMA, "anima_compile": True, "anima_torch_compile": True}, "cannot be combined with --compile"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("flux_least", "anima_least")
def test_files_that_are_refused(changed: dict[str, Any], message: str, read: Read, folder: Path) -> None:
    """What the GUI itself stops at is refused by the name of its field."""
    with pytest.raises(ConfigError) as raised:
        read(gui(folder, **changed))
    assert message in str(raised.value)


def test_lycoris_and_kohya_types(
    read: Read, flux_least: tuple[str, ...], anima_least: tuple[str, ...], folder: Path
) -> None:
    """LyCORIS with FLUX.1, and sd-scripts' own LoKr with Anima, are the modules that they are for the command line."""
    assert flux_least
    assert anima_least
    draft = read(gui(folder, **{**FLUX, "LoRA_type": "LyCORIS/LoKr", "factor": 4}))
    assert draft.tables()["network"]["name"] == "lycoris.kohya"
    assert draft.tables()["network"]["args"]["factor"] == "4"
    draft = read(gui(folder, **{**ANIMA, "LoRA_type": "Kohya LoKr"}))
    assert draft.tables()["network"]["name"] == "networks.lokr"
    assert any("LoKr is 'lokr' here" in text for text in remarks(draft))


def test_configs_are_right(read: Read, flux_least: tuple[str, ...], anima_least: tuple[str, ...], folder: Path) -> None:
    """`check` finds nothing wrong but the parts that the model's header does not have."""
    assert flux_least
    assert anima_least
    for fields in (FLUX, ANIMA):
        with pytest.raises(ConfigError) as raised:
            config(read(gui(folder, **fields)), folder)
        assert {problem.key.partition(".")[0] for problem in raised.value.problems} <= {"model"}
