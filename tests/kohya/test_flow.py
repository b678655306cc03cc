"""Lines of flux_train_network.py and anima_train_network.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.kohya.command_line import read_arguments
from lorakit.plugins.catalog import Catalog
from tests.kohya.conftest import Convert, check
from tests.kohya.test_conversion import remarks

Least = tuple[str, ...]


def test_defaults_of_flux(converted: Convert, flux_least: Least) -> None:
    """With the fewest options, the config says all that sd-scripts does otherwise than lorakit with FLUX.1."""
    draft = converted(least=flux_least)
    assert draft.tables() == {
        "model": {"path": "flux.safetensors", "family": "flux1"},
        "data": {
            "general": {"caption_extension": ".txt", "max_bucket_reso": 1024},
            "datasets": [{"resolution": 64, "subsets": [{"image_dir": "train/2_dog"}]}],
        },
        "network": {"name": "lierla", "parts": ["transformer", "text_encoder"]},
        "optimizer": {"name": "adamw", "lr": 2e-6},
        "lr_scheduler": {"name": "constant"},
        "attention": {"name": "sdpa"},
        "training": {"max_steps": 1600, "seed": 42, "mixed_precision": "no"},
        "timesteps": {"name": "uniform", "shift": 3.0},
        "output": {"dir": "out", "name": "last"},
        "saver": {"name": "safetensors", "precision": "fp32"},
    }
    assert draft.remarks == []


def test_mistakes_of_flux_are_told(converted: Convert, flux_least: Least) -> None:
    """What sd-scripts does wrong by default is said, with what is done instead, and no key is written."""
    draft = converted(least=flux_least[:5])
    assert remarks(draft) == [
        "--guidance_scale: is absent, which means 3.5, with which LoRA lose contrast; lorakit trains with 1, by which"
        " the model learns what the images show",
        "--model_prediction_type: is absent, which means sigma_scaled, which by mistake compares no velocity with a"
        " velocity; lorakit does what was meant, and raw does",
    ]
    assert draft.tables() == converted(least=flux_least).tables()
    told = remarks(converted("--model_prediction_type=additive", least=flux_least))
    assert told[0].startswith("--model_prediction_type: is additive, which by mistake")


@pytest.mark.parametrize(
    ("words", "wanted", "told"),
    [
        ("", {"name": "uniform", "shift": 3.0}, ""),
        ("--timestep_sampling=uniform", {"name": "uniform", "shift": 1.0}, ""),
        ("--timestep_sampling=sigmoid", {"name": "logit_normal", "shift": 1.0}, ""),
        (
            "--timestep_sampling=sigmoid --sigmoid_scale=1.5",
            {"name": "logit_normal", "shift": 1.0, "std": 1.5},
            "",
        ),
        (
            "--timestep_sampling=shift --discrete_flow_shift=3.1582 --sigmoid_scale=0.5",
            {"name": "logit_normal", "shift": 3.1582, "std": 0.5},
            "",
        ),
        ("--timestep_sampling=flux_shift", {"name": "logit_normal"}, ""),
        ("--discrete_flow_shift=1.5", {"name": "uniform", "shift": 1.5}, ""),
        (
            "--weighting_scheme=logit_normal --logit_mean=0.5 --logit_std=0.8",
            {"name": "logit_normal", "mean": -0.5, "std": 0.8, "shift": 3.0},
            "--logit_mean: gives less noise above 0 in sd-scripts, and more in lorakit, so that timesteps.mean is -0.5",
        ),
        ("--weighting_scheme=mode", {"name": "mode", "shift": 3.0}, ""),
        ("--weighting_scheme=mode --mode_scale=0.5", {"name": "mode", "shift": 3.0, "mode_scale": 0.5}, ""),
        ("--weighting_scheme=none", {"name": "uniform", "shift": 3.0}, ""),
        ("--mode_scale=2", {"name": "uniform", "shift": 3.0}, "--mode_scale: has no effect with"),
        ("--logit_mean=1", {"name": "uniform", "shift": 3.0}, "--logit_mean: has no effect with --timestep_sampling="),
        ("--sigmoid_scale=2", {"name": "uniform", "shift": 3.0}, "--sigmoid_scale: has no effect with"),
        (
            "--timestep_sampling=sigmoid --discrete_flow_shift=2",
            {"name": "logit_normal", "shift": 1.0},
            "--discrete_flow_shift: has no effect with --timestep_sampling=sigmoid",
        ),
        (
            "--timestep_sampling=shift --weighting_scheme=logit_normal",
            {"name": "logit_normal", "shift": 3.0},
            "--weighting_scheme: has no effect with --timestep_sampling=shift",
        ),
        (
            "--weighting_scheme=cosmap",
            {"name": "uniform", "shift": 3.0},
            "--weighting_scheme: cosmap weights the loss with --model_prediction_type=sigma_scaled alone",
        ),
    ],
)
def test_timesteps(words: str, wanted: dict[str, Any], told: str, converted: Convert, flux_least: Least) -> None:
    """Each way to draw timesteps is that of [timesteps], or a remark says what is near."""
    draft = converted(*words.split(), least=flux_least)
    assert draft.tables()["timesteps"] == wanted
    assert [text[: len(told)] for text in remarks(draft)] == ([told] if told else [])


def test_shift_by_resolution(
    converted: Convert, flux_least: Least, chroma_least: Least, anima_least: Least, folder: Path
) -> None:
    """Models whose own shift is another get that of the images' resolution, as a number."""
    told = (
        "--timestep_sampling: flux_shift goes by the size of each image; timesteps.shift is a number for all, that of"
        " 768×512 pixels"
    )
    text = (folder / "dataset.toml").read_text()
    (folder / "dataset.toml").write_text(text.replace("resolution = 64", "resolution = [768, 512]"))
    for least in (chroma_least, anima_least, (*flux_least, "--pretrained_model_name_or_path=schnell.safetensors")):
        draft = converted("--timestep_sampling=flux_shift", least=least)
        assert draft.tables()["timesteps"] == {"name": "logit_normal", "shift": 2.0476}
        assert told in remarks(draft)
    given = tuple(word for word in anima_least if "dataset_config" not in word)
    words = ("--timestep_sampling=flux_shift", "--train_data_dir=train", "--resolution=768,512")
    assert converted(*words, least=given).tables()["timesteps"]["shift"] == 2.0476


def test_defaults_of_anima(converted: Convert, anima_least: Least) -> None:
    """With the fewest options, the config says what sd-scripts does with Anima; nothing is a mistake."""
    draft = converted(least=anima_least)
    tables = draft.tables()
    assert tables["model"] == {"path": "anima.safetensors", "family": "anima"}
    assert tables["network"] == {"name": "lierla", "parts": ["transformer", "text_encoder"]}
    assert tables["timesteps"] == {"name": "logit_normal", "shift": 1.0}
    assert draft.remarks == []
    told = "has no counterpart (all timesteps have the same weight in the loss"
    for scheme, more in (
        ("sigma_sqrt", ""),
        ("cosmap", '; timesteps.name = "cosmap" draws those of more weight more often'),
    ):
        draft = converted(f"--weighting_scheme={scheme}", least=anima_least)
        assert remarks(draft) == [f"--weighting_scheme={scheme}: {told}{more})"]


@pytest.mark.parametrize("start", ["named", "typed", "module", "model"])
def test_what_says_the_script(start: str, converted: Convert, flux_least: Least, anima_least: Least) -> None:
    """The script's name, an option that it alone has, its network module, or the model say what is trained."""
    for least, option, family in ((flux_least, "--t5xxl=a", "flux1"), (anima_least, "--qwen3=a", "anima")):
        gone = "--pretrained_model_name_or_path=gone.safetensors"
        words = {
            "named": (*least, gone),
            "typed": (gone, "--network_module=lycoris.kohya", option, *least[2:3], *least[4:5]),
            "module": (gone, *least[2:5]),
            "model": least[1:],
        }[start]
        assert converted(least=words).tables()["model"]["family"] == family


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pretrained_model_name_or_path=chroma.safetensors", "--model_type: is absent, and chroma.safetensors is a"
         " Chroma model (--model_type=chroma)"),
        ("--model_type=chroma", "--model_type: is chroma, and flux.safetensors is a FLUX.1 dev model (leave it out)"),
        ("--pretrained_model_name_or_path=anima.safetensors", "is an Anima model, for which sd-scripts has anima_"),
        ("--network_module=networks.lora", "networks.lora is not for flux_train_network.py (networks.lora_flux is)"),
        ("--network_module=networks.lora_anima", "networks.lora_anima is for Anima (its script is anima_train"),
        ("--loss_type=huber", "--huber_schedule: is absent, which means snr, with which flux_train_network.py stops"),
        ("--compile --torch_compile", "--torch_compile: cannot be combined with --compile"),
        ("--enable_bucket --bucket_reso_steps=16", "must be a multiple of 32 with flux_train_network.py"),
        ("--network_args conv_dims=1", "--network_args conv_dims: is not an argument of networks.lora_flux"),
        ("--network_args train_llm_adapter=True", "(it is one of networks.lora_anima)"),
        ("--network_args train_blocks=both", "must be all, single or double, not 'both'"),
        ("--network_args train_double_block_indices=3-19", "must be all, none, or numbers of blocks such as 0-3,8, b"),
        ("--network_args network_reg_dims=(=4", "must be regular expressions with numbers"),
        ("--network_args in_dims=1,2", "must be five whole numbers"),
        ("--network_args split_qkv=1", "must be True or False, not '1'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("anima_least")
def test_what_cannot_be_trained(words: str, message: str, converted: Convert, flux_least: Least) -> None:
    """What the script stops at, or reads as something else, is an error with its cause."""
    with pytest.raises(ConfigError) as raised:
        converted(*words.split(), least=flux_least)
    assert message in str(raised.value)


def test_options_of_two_scripts(converted: Convert) -> None:
    """Options of one script are unknown to another, and options of two scripts fit none."""
    with pytest.raises(ConfigError, match=r"--qwen3: is not an option of flux_train_network.py \(it is one of anima_"):
        read_arguments(["flux_train_network.py --qwen3=a"], Path())
    gone = ("--pretrained_model_name_or_path=gone", "--output_dir=out", "--dataset_config=dataset.toml")
    for words, message in {
        "--qwen3=a --t5xxl=b": r"--qwen3 and --t5xxl: are options of different scripts",
        "--qwen3=a --network_module=networks.lora_flux": "--qwen3: is not an option of flux_train_network.py",
    }.items():
        with pytest.raises(ConfigError, match=message):
            converted(least=(*gone, *words.split()))


def test_files_of_the_model(converted: Convert, flux_least: Least, chroma_least: Least, folder: Path) -> None:
    """Each file is a key of [model], with the tokenizers that sd-scripts takes for single files."""
    words = ("--clip_l=c.safetensors", "--t5xxl=t.safetensors", "--ae=a.safetensors", "--t5xxl_max_token_length=256")
    files = {"vae": "a.safetensors", "max_token_length": 256}
    assert converted(*words, least=flux_least).tables()["model"] == {
        "path": "flux.safetensors", "family": "flux1", "text_encoder": "c.safetensors",
        "text_encoder_2": "t.safetensors", "tokenizer_2": "google/t5-v1_1-xxl", **files,
    }  # fmt: skip
    draft = converted(*words, least=chroma_least)
    assert draft.tables()["model"] == {
        "path": "chroma.safetensors", "family": "chroma", "text_encoder": "t.safetensors",
        "tokenizer": "google/t5-v1_1-xxl", **files,
    }  # fmt: skip
    assert remarks(draft) == ["--clip_l: has no effect with --model_type=chroma"]
    (folder / "t5").mkdir()
    assert "tokenizer_2" not in converted("--t5xxl=t5", least=flux_least).tables()["model"]


def test_files_of_anima(converted: Convert, anima_least: Least, folder: Path) -> None:
    """Each file of Anima is a key of [model]; the adapter that the script does not read is told."""
    draft = converted("--qwen3=q.safetensors", "--vae=v.safetensors", "--llm_adapter_path=l.sft", least=anima_least)
    assert draft.tables()["model"] == {
        "path": "anima.safetensors", "family": "anima", "vae": "v.safetensors", "text_encoder": "q.safetensors",
        "tokenizer": "Qwen/Qwen3-0.6B", "t5_tokenizer": "google-t5/t5-small", "text_conditioner": "l.sft",
    }  # fmt: skip
    assert remarks(draft) == [
        "--llm_adapter_path: is not read by anima_train_network.py, which takes the LLM adapter of the transformer's"
        " file; what was meant is written: model.text_conditioner"
    ]
    (folder / "qwen").mkdir()
    model = converted("--qwen3=qwen", "--t5_tokenizer_path=t5", least=anima_least).tables()["model"]
    assert (model["text_encoder"], model["tokenizer"], model["t5_tokenizer"]) == ("qwen", "qwen", "t5")


IGNORED = ["noise_offset=0.1", "multires_noise_iterations=6", "multires_noise_discount=0.5", "min_snr_gamma=5",
           "debiased_estimation_loss", "v_pred_like_loss=0.5", "scale_v_pred_loss_like_noise_pred",
           "zero_terminal_snr", "v_parameterization", "adaptive_noise_scale=0.1", "noise_offset_random_strength",
           "max_token_length=225", "clip_skip=2", "sample_sampler=euler"]  # fmt: skip


@pytest.mark.parametrize("word", IGNORED)
def test_options_that_the_scripts_ignore(word: str, converted: Convert, leasts: Any) -> None:
    """What the scripts take and do nothing with is told, and not written."""
    for script in ("t5xxl", "qwen3"):
        draft = converted(f"--{word}", least=leasts(script))
        (told,) = [text for text in remarks(draft) if text.startswith(f"--{word.partition('=')[0]}: has no effect")]
        assert told
        assert draft.tables() == converted(least=leasts(script)).tables()


def test_bounds_of_timesteps(converted: Convert, flux_least: Least) -> None:
    """Bounds, which the scripts ignore, are told with the keys that set them; input perturbation works."""
    draft = converted("--min_timestep=200", "--max_timestep=800", "--ip_noise_gamma=0.1", least=flux_least)
    assert remarks(draft) == [
        f"--{name}_timestep: has no effect, as with flux_train_network.py; timesteps.{name} = {value} does what it says"
        for name, value in (("min", 0.2), ("max", 0.8))
    ]
    assert draft.tables()["loss"] == {"ip_noise_gamma": 0.1}


def test_memory(converted: Convert, flux_least: Least, chroma_least: Least, anima_least: Least) -> None:
    """Swapped blocks are streamed, and fp8 is for all parts, or for the transformer; Anima's script ignores fp8."""
    training = converted("--blocks_to_swap=18", "--fp8_base", least=flux_least).tables()["training"]
    assert training["stream_base"] == ["transformer"]
    assert training["fp8_base"] == ["transformer", "text_encoder", "text_encoder_2"]
    training = converted("--split_mode", "--fp8_base_unet", least=chroma_least).tables()["training"]
    assert (training["stream_base"], training["fp8_base"]) == (["transformer"], ["transformer"])
    told = remarks(converted("--split_mode", "--blocks_to_swap=0", least=flux_least))
    assert told == ["--split_mode: has no effect with --blocks_to_swap"]
    draft = converted("--fp8_base", "--unsloth_offload_checkpointing", least=anima_least)
    assert remarks(draft) == ["--fp8_base: has no effect, as with anima_train_network.py"]
    assert draft.tables()["training"]["gradient_checkpointing"] is True


def test_attention(converted: Convert, anima_least: Least) -> None:
    """All of Anima's ways to compute attention are PyTorch's; `--attn_mode` wins over the others."""
    draft = converted("--xformers", "--attn_mode=flash", "--split_attn", least=anima_least)
    assert draft.tables()["attention"] == {"name": "sdpa"}
    assert draft.sections["attention"]["name"].source == "--attn_mode"
    assert draft.remarks == []


def test_compiling(converted: Convert, flux_least: Least) -> None:
    """Newer releases have names of their own for the compiler and its backend."""
    training = converted("--compile", "--compile_backend=eager", least=flux_least).tables()["training"]
    assert (training["compile"], training["compile_backend"]) == (True, "eager")
    told = remarks(converted("--compile_backend=eager", least=flux_least))
    assert told == ["--compile_backend: has no effect without --compile"]


def test_masks_and_guidance(converted: Convert, flux_least: Least, chroma_least: Least) -> None:
    """FLUX.1 has no mask and trains at 1; Chroma has a mask and trains at 0; schnell takes no guidance."""
    (told,) = remarks(converted("--apply_t5_attn_mask", least=flux_least))
    assert told.startswith("--apply_t5_attn_mask: has no counterpart (FLUX.1 is trained without a mask")
    assert converted(least=chroma_least).remarks == []
    (told,) = remarks(converted("--guidance_scale=3.5", least=chroma_least))
    assert told.endswith("lorakit trains with 0, which Chroma was made with")
    schnell = "--pretrained_model_name_or_path=schnell.safetensors"
    assert remarks(converted(schnell, least=flux_least)) == [
        "--guidance_scale: has no effect, as the model takes no guidance scale"
    ]


def test_cached_captions(converted: Convert, flux_least: Least, anima_least: Least) -> None:
    """FLUX.1's script caches T5 while it trains CLIP; Anima's drops captions that it has cached."""
    cached, varied = "--cache_text_encoder_outputs", "--caption_dropout_rate=0.1"
    assert converted(cached, least=flux_least).remarks == []
    assert len(converted(cached, varied, least=flux_least).remarks) == 1
    assert converted(cached, varied, "--network_train_unet_only", least=anima_least).remarks == []
    with pytest.raises(ConfigError, match="cannot be used without --network_train_unet_only"):
        converted(cached, least=anima_least)


def test_huber(converted: Convert, flux_least: Least, anima_least: Least) -> None:
    """The schedule that works for flow matching is written; Anima's, which hardly does anything, is told."""
    words = ("--loss_type=huber", "--huber_schedule=exponential")
    assert converted(*words, least=flux_least).remarks == []
    draft = converted(*words, least=anima_least)
    assert draft.tables()["loss"] == {"type": "huber", "huber_schedule": "exponential"}
    (told,) = remarks(draft)
    assert told.startswith("--huber_schedule: exponential hardly changes the threshold in anima_train_network.py")


@pytest.mark.parametrize("which", ["flux", "chroma", "anima"])
def test_previews(which: str, converted: Convert, flow_leasts: dict[str, Least], folder: Path) -> None:
    """Previews are drawn as sd-scripts draws them."""
    (folder / "prompts.txt").write_text("a cat")
    words = ("--sample_prompts=prompts.txt", "--sample_at_first")
    (observer,) = converted(*words, least=flow_leasts[which]).tables()["observers"]
    own = {"flux": {"steps": 20}, "chroma": {"steps": 20, "scale": 1.0}, "anima": {"scale": 7.5}}[which]
    drawn = {"name": "samples", "prompts": "prompts.txt", "at_first": True, "width": 512, "height": 512}
    assert observer == {**drawn, **own}


def test_config_file(converted: Convert, flux_least: Least, folder: Path) -> None:
    """A file of options says as much as a line; what it holds for other scripts is told where it says anything."""
    text = "\n".join(f"{name} = '{value}'" for name, _, value in (w[2:].partition("=") for w in flux_least[1:]))
    (folder / "run.toml").write_text(
        text.replace("'1'", "1") + "\nqwen3_max_token_length = 512\nqwen3 = 'q'\ndiscrete_flow_shift = 2.5\n"
    )
    draft = converted(least=("--config_file=run.toml",))
    assert draft.tables()["timesteps"] == {"name": "uniform", "shift": 2.5}
    assert remarks(draft) == ["qwen3: ignored, as in flux_train_network.py"]


def test_configs_are_right(
    converted: Convert, flux_least: Least, chroma_least: Least, anima_least: Least, folder: Path, catalog: Catalog
) -> None:
    """`check` finds nothing wrong but the parts that the model's header does not have."""
    words = ("--network_train_unet_only", "--mixed_precision=bf16", "--blocks_to_swap=4")
    for least in (flux_least, chroma_least, anima_least):
        problems = check(converted(*words, least=least), folder, catalog)
        assert {problem.key.partition(".")[0] for problem in problems} <= {"model"}
