"""Anima: its files in all layouts, its captions, its layers' names, and runs of the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers import AnimaTextConditioner
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.builtin.model_families.anima import AnimaConfig
from lorakit.checkpoints import summarize
from lorakit.errors import ModelError
from lorakit.models.families.anima.llm_adapter import LLMAdapter
from lorakit.models.families.anima.model import Anima, conditioner_targets, transformer_targets
from lorakit.models.families.anima.structure import ConditionerConfig, TransformerConfig
from lorakit.models.families.anima.transformer import Transformer
from lorakit.plugins.catalog import Catalog
from lorakit.testing.contracts.tiny_batch import loss_of, make_batch
from lorakit.testing.flow_models import T5_TOKENS, anima_files, byte_tokenizer, make_tiny_anima

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Anima as diffusers stores it."""
    return make_tiny_anima(tmp_path_factory.mktemp("anima") / "tiny")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The keys of `[model]` for the same model as ComfyUI's files, and tokenizers in folders."""
    found = anima_files(folder, tmp_path_factory.mktemp("files"))
    tokenizers = {name: str(folder / name) for name in ("tokenizer", "t5_tokenizer")}
    return {**{name: str(path) for name, path in found.items()}, **tokenizers}


def built(config: AnimaConfig) -> Anima:
    """The model on the CPU."""
    model = config.build(CPU, torch.float32)
    assert isinstance(model, Anima)
    return model


def prefixed(file: str, prefix: str, path: Path) -> Path:
    """A copy of a transformer's file with other names, and with what NVIDIA's code leaves in some."""
    tensors = {name.removeprefix("net."): own for name, own in load_file(file).items()}
    left = {name: torch.zeros(3) for name in ("pos_embedder.seq", "blocks.0.self_attn.q_norm._extra_state")}
    save_file({f"{prefix}{name}": own for name, own in {**tensors, **left}.items()}, path)
    return path


def test_all_layouts_are_one_model(folder: Path, files: Mapping[str, str], tmp_path: Path) -> None:
    """Predictions from captions, and latents, are the same bits, whichever way the model is stored."""
    adapter = load_file(folder / "text_conditioner" / "diffusion_pytorch_model.safetensors")
    save_file(adapter, tmp_path / "adapter.safetensors")
    alone = str(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    configs = [
        AnimaConfig(path=str(folder)),
        AnimaConfig(**files),
        *(
            AnimaConfig(**{**files, "path": str(prefixed(files["path"], prefix, tmp_path / f"{number}.safetensors"))})
            for number, prefix in enumerate(("", "diffusion_model.", "model.diffusion_model."))
        ),
        AnimaConfig(**{**files, "path": alone, "text_conditioner": str(tmp_path / "adapter.safetensors")}),
        AnimaConfig(**{**files, "path": str(folder / "transformer"), "text_conditioner": files["path"]}),
    ]
    generator = torch.Generator().manual_seed(0)
    noisy, pixels = torch.randn(2, 16, 8, 6, generator=generator), torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    found = []
    for config in configs:
        assert not list(config.problems())
        model = built(config)
        with torch.no_grad():
            captions = model.text_encoder.encode(model.text_encoder.tokenize(["a cat", "a longer caption " * 4]))
            prediction = model.predict(noisy, torch.tensor([0.2, 0.9]), captions)
        found.append((prediction, model.vae_encoder.encode(pixels)[0]))
    for own in found[1:]:
        assert all(map(torch.equal, own, found[0]))


def test_is_recognised(folder: Path, files: Mapping[str, str], tmp_path: Path) -> None:
    """By the classes of a folder, and by names in files behind any prefix; a LoRA is none."""
    catalog = Catalog.discover()
    prefixes = ("", "diffusion_model.", "model.diffusion_model.")
    others = [prefixed(files["path"], own, tmp_path / f"{len(own)}.safetensors") for own in prefixes]
    for path in (folder, Path(files["path"]), *others):
        assert catalog.detect_model_family(summarize(path)).name == "anima"
    for name in ("text_encoder", "vae"):
        assert catalog.detect_model_family(summarize(Path(files[name]))).name is None


def test_what_is_missing_is_said(folder: Path, files: Mapping[str, str], tmp_path: Path) -> None:
    """A transformer alone lacks four things, each at its own key, with what to give; half a transformer is told."""
    problems = {problem.key: problem for problem in AnimaConfig(path=files["path"]).problems()}
    assert problems.keys() == {"text_encoder", "vae", "tokenizer", "t5_tokenizer"}
    assert "qwen_3_06b_base.safetensors" in problems["text_encoder"].hint
    assert "qwen_image_vae.safetensors" in problems["vae"].hint
    assert "google-t5/t5-small" in problems["t5_tokenizer"].hint
    tensors = load_file(files["path"])
    lost = {"net.blocks.1.mlp.layer2.weight", "net.llm_adapter.norm.weight"}
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, tmp_path / "half.safetensors")
    half = [str(problem) for problem in AnimaConfig(**{**files, "path": str(tmp_path / "half.safetensors")}).problems()]
    assert len(half) == 2
    assert "lacks blocks.1.mlp.layer2.weight" in half[0]
    assert "lacks norm.weight" in half[1]
    (problem,) = AnimaConfig(path=str(folder), vae=files["text_encoder"]).problems()
    assert problem.key == "vae"
    with pytest.raises(ModelError, match="has no t5_tokenizer; give "):
        _ = built(AnimaConfig(**{name: own for name, own in files.items() if name != "t5_tokenizer"})).text_encoder
    byte_tokenizer((*T5_TOKENS, "<extra>")).save_pretrained(tmp_path / "more")
    for other in (files["tokenizer"], str(tmp_path / "more")):
        with pytest.raises(ModelError, match="is not that of T5"):
            _ = built(AnimaConfig(**{**files, "t5_tokenizer": other})).text_encoder


def test_parts_that_do_not_fit_are_told(folder: Path, tmp_path: Path) -> None:
    """An adapter for another text encoder."""
    AnimaTextConditioner(
        source_dim=20, target_dim=24, model_dim=24, num_layers=1, num_attention_heads=2, target_vocab_size=300
    ).save_pretrained(tmp_path / "text_conditioner")
    (problem,) = AnimaConfig(path=str(folder), text_conditioner=str(tmp_path)).problems()
    assert problem.key == "text_conditioner"
    assert "has captions of 32 channels" in problem.message


def test_captions_are_read_as_diffusers_does(folder: Path) -> None:
    """No template, the states behind the last norm, the adapter; each caption as alone and without padding."""
    from transformers import AutoTokenizer, Qwen3Model

    model = built(AnimaConfig(path=str(folder)))
    captions = ["a cat", "", "a cat on a sofa"]
    with torch.no_grad():
        conditioning = model.text_encoder.encode(model.text_encoder.tokenize(captions))
    assert conditioning["hidden_states"].shape == (3, 512, 24)
    rows = model.split(conditioning)
    torch.testing.assert_close(model.collate(rows), conditioning, rtol=0, atol=0)
    tokenizer, t5_tokenizer = (AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "t5_tokenizer"))
    qwen = Qwen3Model.from_pretrained(folder / "text_encoder").eval()
    adapter = AnimaTextConditioner.from_pretrained(folder / "text_conditioner").eval()
    for caption, row in zip(captions, rows, strict=True):
        t5_ids = torch.tensor([[*t5_tokenizer(caption).input_ids, 1]])
        with torch.no_grad():
            states, mask = torch.zeros(1, 1, 32), torch.zeros(1, 1)
            if caption:
                states = qwen(**tokenizer(caption, return_tensors="pt")).last_hidden_state
                mask = torch.ones(states.shape[:2])
            expected = adapter(states, t5_ids, torch.ones_like(t5_ids), mask)[0]
        assert row["hidden_states"].shape == (len(t5_ids[0]), 24)
        torch.testing.assert_close(row["hidden_states"], expected[: len(t5_ids[0])], rtol=1e-4, atol=1e-5)
        assert not expected[len(t5_ids[0]) :].any()


def test_long_captions_are_cut_off(folder: Path) -> None:
    """To 512 tokens on both sides, T5's end token counted; a batch without words is read, too."""
    model = built(AnimaConfig(path=str(folder)))
    tokens = model.text_encoder.tokenize(["x" * 600, "y"])
    assert {name: tensor.shape[1] for name, tensor in tokens.items()} == {
        "ids": 512, "mask": 512, "t5_ids": 512, "t5_mask": 512,
    }  # fmt: skip
    assert tokens["t5_ids"][0, -1] == 1
    with torch.no_grad():
        conditioning = model.text_encoder.encode(model.text_encoder.tokenize(["", ""]))
    assert [len(own["hidden_states"]) for own in model.split(conditioning)] == [1, 1]


def test_zero_rows_take_part(folder: Path) -> None:
    """The transformer attends to the zeros behind a caption: without them, predictions are others."""
    model = built(AnimaConfig(path=str(folder)))
    with torch.no_grad():
        conditioning = model.text_encoder.encode(model.text_encoder.tokenize(["a cat"]))
        noisy, times = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
        found = [
            model.predict(noisy, times, own)
            for own in (conditioning, {"hidden_states": conditioning["hidden_states"][:, :6]})
        ]
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()


def test_layers_and_their_names() -> None:
    """Of the full size: 280 layers by default, 168 of modulation, 60 of the adapter; as diffusers converts files."""
    with torch.device("meta"):
        layers = list(transformer_targets(Transformer(TransformerConfig())))
        adapter = list(conditioner_targets(LLMAdapter(ConditionerConfig())))
    chosen = [target for target in layers if "transformer" in target.tags]
    modulation = [target for target in layers if "modulation" in target.tags]
    assert (len(chosen), len(modulation), len(layers), len(adapter)) == (280, 168, 448, 60)
    assert {target.block_index for target in chosen} == set(range(28))
    first = chosen[0]
    assert first.key == "lora_unet_blocks_0_self_attn_q_proj"
    assert first.original_path == "diffusion_model.blocks.0.self_attn.q_proj"
    assert adapter[0].key == "lora_unet_llm_adapter_blocks_0_self_attn_q_proj"
    for target in (*layers, *adapter):
        name = f"{target.original_path}.lora_A.weight"
        assert [*_convert_non_diffusers_anima_lora_to_diffusers({name: 0})] == [
            f"{target.diffusers_path}.lora_A.weight"
        ]


def config_file(model: Mapping[str, str], photographs: Path, folder: Path, **tables: Any) -> Path:
    """A config of a short run."""
    folder.mkdir()
    sections = {
        "model": model,
        "data": {"image_dir": str(photographs), "resolution": 64, "batch_size": 2, "cache_dir": str(folder / "cache")},
        "network": {"rank": 8, "alpha": 8.0},
        "optimizer": {"lr": 1e-2},
        "training": {"max_steps": 40, "device": "cpu"},
        "output": {"dir": str(folder), "name": "anima"},
        **tables,
    }
    text = ""
    for section, keys in sections.items():
        text += f"[{section}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in keys.items())
    path = folder / "config.toml"
    path.write_text(text)
    return path


def _toml(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


@pytest.mark.parametrize("stored", ["folder", "files"])
def test_training_from_the_command_line(
    folder: Path, files: Mapping[str, str], photographs: Path, tmp_path: Path, stored: str
) -> None:
    """The loss of other images and captions falls, and the file has the names that most tools read."""
    keys = {"path": str(folder)} if stored == "folder" else files
    path = config_file(keys, photographs, tmp_path / "run")
    command = [sys.executable, "-m", "lorakit", "train", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    file = tmp_path / "run" / "anima.safetensors"
    found = load_file(file)
    assert len(found) == 2 * 10 * 2
    assert "diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight" in found
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "anima"
    assert metadata["modelspec.architecture"] == "anima-preview/lora"
    config = AnimaConfig(**keys)
    losses = []
    for own in (config, attrs.evolve(config, base_weights=(file,))):
        model = built(own)
        with torch.no_grad():
            losses.append(loss_of(model, make_batch(model)).item())
    assert losses[1] < 0.9 * losses[0], losses
