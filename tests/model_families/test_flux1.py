"""FLUX.1 and Chroma: files, text encoders, previews and LoRA files, as diffusers has them."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from attrs import evolve
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.builtin.model_families.flux1 import ChromaConfig, FluxConfig
from lorakit.builtin.networks import LierlaConfig
from lorakit.checkpoints import CheckpointSummary, summarize
from lorakit.cli.group import cli
from lorakit.config.load import config_from_tables
from lorakit.errors import ModelError
from lorakit.lora_tools.bake import bake
from lorakit.models.conditioning import without_training_adapter
from lorakit.models.families.flow.t5 import T5Tokenizer
from lorakit.models.families.flux1.layout import diffusers_layers
from lorakit.models.families.flux1.settings import FluxSettings
from lorakit.models.families.flux1.targets import transformer_targets
from lorakit.models.families.flux1.transformer import FluxTransformer, pack, unpack
from lorakit.models.weights.load import without_weights
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.lora_layouts import in_layout
from lorakit.plugins.catalog import Catalog
from lorakit.previews.previews import description
from lorakit.previews.prompts import Prompt, preview_jobs
from lorakit.previews.sampling import encode_texts, sample_latents
from lorakit.testing.contracts.tiny_batch import loss_of, make_batch
from lorakit.testing.flux_models import make_tiny_chroma, make_tiny_flux, write_parts

CPU = torch.device("cpu")
KINDS = ("dev", "schnell", "chroma")
CAPTIONS = ("a red cat", "a much longer caption, of a dog on a sofa")


@pytest.fixture(scope="session")
def folders(lorakit_offline: None, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A model of each kind, as diffusers stores it."""
    root = tmp_path_factory.mktemp("flux")
    return {
        "dev": make_tiny_flux(root / "dev"),
        "schnell": make_tiny_flux(root / "schnell", "schnell"),
        "chroma": make_tiny_chroma(root / "chroma"),
    }


@pytest.fixture(scope="session")
def parts(folders: Mapping[str, Path]) -> Mapping[str, Mapping[str, str]]:
    """The same models in files for each part, as keys of `[model]`."""
    return {kind: write_parts(folder, folder.with_name(f"{kind}-parts")) for kind, folder in folders.items()}


def config(kind: str, **settings: Any) -> FluxConfig | ChromaConfig:
    """The config of a model of a kind."""
    return (ChromaConfig if kind == "chroma" else FluxConfig)(**settings)


def built(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model of a kind, on the CPU."""
    return config(kind, **settings).build(CPU, dtype)


def predicted(model: Any) -> Tensor:
    """What a model makes of noise and two captions."""
    conditioning = model.text_encoder.encode(model.text_encoder.tokenize(CAPTIONS))
    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model.predict(noisy, torch.tensor([0.3, 0.8]), conditioning)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_all_forms(
    kind: str, folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, str]], tmp_path: Path
) -> None:
    """A folder, files for each part and one file for all give the same predictions, and are recognised."""
    whole, prefixes = {}, {"path": "model.diffusion_model.", "vae": "vae."}
    encoders = ("t5xxl",) if kind == "chroma" else ("clip_l", "t5xxl")
    names = ("text_encoder",) if kind == "chroma" else ("text_encoder", "text_encoder_2")
    prefixes |= {name: f"text_encoders.{own}.transformer." for name, own in zip(names, encoders, strict=True)}
    for name, prefix in prefixes.items():
        whole |= {f"{prefix}{own}": tensor for own, tensor in load_file(parts[kind][name]).items()}
    save_file(whole, tmp_path / "all.safetensors")
    tokenizer = "tokenizer" if kind == "chroma" else "tokenizer_2"
    forms = (
        {"path": str(folders[kind])},
        parts[kind],
        {"path": str(tmp_path / "all.safetensors"), tokenizer: parts[kind][tokenizer]},
    )
    name, title = ("chroma", "a Chroma model") if kind == "chroma" else ("flux1", f"a FLUX.1 {kind} model")
    found = []
    for form in forms:
        detected = Catalog.discover().detect_model_family(summarize(Path(form["path"])))
        assert (detected.name, detected.title) == (name, title)
        assert not list(config(kind, **form).problems())
        found.append(predicted(built(kind, **form)))
    assert found[0].std() > 0.1
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def detect(**tensors: tuple[int, ...]) -> tuple[str | None, str]:
    """What a file with these tensors is, by the first of them and the blocks that all have."""
    shapes = {name.replace("__", "."): shape for name, shape in tensors.items()}
    blocks = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}
    found = Catalog.discover().detect_model_family(CheckpointSummary(Path("x"), "safetensors", {**blocks, **shapes}))
    return found.name, found.title


def test_models_for_other_purposes() -> None:
    """What takes more than noisy latents, or is another architecture with such blocks, is named and not trained."""
    assert detect(img_in__weight=(3072, 64)) == ("flux1", "a FLUX.1 schnell model")
    assert detect(img_in__weight=(3072, 384))[0] is None
    assert "FLUX.1 fill model" in detect(img_in__weight=(3072, 384))[1]
    assert "depth or canny" in detect(img_in__weight=(3072, 128))[1]
    guided = {"distilled_guidance_layer__in_proj__weight": (5120, 64)}
    assert detect(img_in__weight=(3072, 64), **guided) == ("chroma", "a Chroma model")
    assert detect(img_in_patch__weight=(3072, 3, 16, 16), **guided)[0] is None
    assert detect(img_in__weight=(3072, 128), double_stream_modulation_img__lin__weight=(1, 1))[1] == "a FLUX.2 model"
    folder = CheckpointSummary(
        Path("x"), "folder", configs={"transformer": {"_class_name": "FluxTransformer2DModel", "in_channels": 384}}
    )
    assert "fill" in Catalog.discover().detect_model_family(folder).title


@pytest.mark.parametrize("kind", KINDS)
def test_missing_parts(kind: str, parts: Mapping[str, Mapping[str, str]]) -> None:
    """Each part and tokenizer that a transformer's file lacks is asked for by its key, with what to give."""
    problems = list(config(kind, path=parts[kind]["path"]).problems())
    encoders = {"text_encoder"} if kind == "chroma" else {"text_encoder", "text_encoder_2"}
    tokenizer = "tokenizer" if kind == "chroma" else "tokenizer_2"
    assert {problem.key for problem in problems} == {"vae", tokenizer, *encoders}
    assert all(problem.hint.startswith("give ") for problem in problems)
    assert "google/t5-v1_1-xxl" in next(own.hint for own in problems if own.key == tokenizer)


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_captions_as_the_pipeline_encodes_them(kind: str, folders: Mapping[str, Path]) -> None:
    """T5's states of all rows, and CLIP's pooled captions, are those of diffusers' pipeline."""
    from diffusers import FluxPipeline

    pipeline, model = FluxPipeline.from_pretrained(folders[kind]), built(kind, path=str(folders[kind]))
    found = model.text_encoder.encode(model.text_encoder.tokenize(CAPTIONS))
    length = 512 if kind == "dev" else 256
    states, pooled, _ = pipeline.encode_prompt(list(CAPTIONS), None, max_sequence_length=length)
    assert states.shape[1] == length
    torch.testing.assert_close(found["hidden_states"], states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["text_embeds"], pooled, rtol=1e-4, atol=1e-5)
    one_by_one = model.encode_one_by_one([CAPTIONS[:1], CAPTIONS[1:]], weighted=False)
    assert model._read == {}
    for row, own in enumerate(one_by_one):
        torch.testing.assert_close(own["hidden_states"][0], states[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own["text_embeds"][0], pooled[row], rtol=1e-4, atol=1e-5)


def test_chroma_captions_as_the_pipeline_encodes_them(folders: Mapping[str, Path]) -> None:
    """Of T5's states under its mask those are kept that the pipeline's own mask lets through: one of padding."""
    from diffusers import ChromaPipeline

    pipeline, model = ChromaPipeline.from_pretrained(folders["chroma"]), built("chroma", path=str(folders["chroma"]))
    found = model.text_encoder.encode(model.text_encoder.tokenize(CAPTIONS))
    states, _, mask, *_ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    count = found["hidden_states"].shape[1]
    assert not mask[:, count:].any()
    assert torch.equal(found["attention_mask"], mask[:, :count].bool())
    expected = states[:, :count] * mask[:, :count].unsqueeze(2)
    torch.testing.assert_close(found["hidden_states"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_previews_are_the_pipelines(kind: str, folders: Mapping[str, Path]) -> None:
    """From the same noise, prompts are sampled to the latents of diffusers' pipeline, embedded guidance included."""
    from diffusers import FluxPipeline

    family = config(kind, path=str(folders[kind]))
    prompt = Prompt(prompt=CAPTIONS[0], width=128, height=64, steps=3, seed=5)
    (job,) = preview_jobs([prompt], 0, family)
    assert (job.guidance, job.scale, family.preview_steps) == ((3.5, 1.0, 28) if kind == "dev" else (None, 1.0, 4))
    model = built(kind, path=str(folders[kind]))
    with torch.no_grad():
        (found,) = sample_latents(model, [job], encode_texts(model, [CAPTIONS[0], ""]), 1)
    noise = torch.randn(1, 16, 8, 16, generator=torch.Generator().manual_seed(5))
    pipeline = FluxPipeline.from_pretrained(folders[kind])
    expected = pipeline(
        CAPTIONS[0], width=128, height=64, num_inference_steps=3, guidance_scale=3.5, latents=pack(noise),
        max_sequence_length=512 if kind == "dev" else 256, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found[None], unpack(expected, 4, 8), rtol=1e-3, atol=1e-4)


def test_guidance(folders: Mapping[str, Path]) -> None:
    """Training is at a guidance scale of 1; a prompt may set its own, and the image says which it was."""
    model = built("dev", path=str(folders["dev"]))
    conditioning = dict(model.text_encoder.encode(model.text_encoder.tokenize(CAPTIONS)))
    inputs = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        found = [model.predict(*inputs, {**conditioning, "guidance": torch.full((2,), own)}) for own in (1.0, 3.5)]
        assert torch.equal(model.predict(*inputs, conditioning), found[0])
    assert not torch.allclose(found[0], found[1])
    jobs = preview_jobs([Prompt(prompt="a", guidance=2.0), Prompt(prompt="a")], 0, model.config)
    assert [job.guidance for job in jobs] == [2.0, 3.5]
    assert description(jobs[0], 1)["guidance"] == "2.0"
    assert "Distilled CFG Scale: 2, " in description(jobs[0], 1)["parameters"]


def test_settings_of_the_families(folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, str]]) -> None:
    """Shifts, steps and scales follow the model; schnell trained plainly is warned of, unless an adapter undoes it."""
    dev, schnell, chroma = (config(kind, path=str(folders[kind])) for kind in KINDS)
    assert [own.noise_process.sampling_shift((16, 128, 128), 28) for own in (dev, schnell, chroma)] == [
        pytest.approx(3.158193), 1.0, 1.0,
    ]  # fmt: skip
    assert dev.noise_process.training_shift((16, 64, 96)) == pytest.approx(2.047597)
    assert (chroma.preview_steps, chroma.preview_scale, chroma.preview_guidance) == (35, 5.0, None)
    assert not list(dev.warnings())
    assert not list(chroma.warnings())
    (warning,) = schnell.warnings()
    assert "schnell, distilled to four steps" in str(warning)
    (file,) = config("schnell", **parts["schnell"]).warnings()
    assert file.key == "path"
    assert not list(evolve(schnell, training_adapter=Path("adapter.safetensors")).warnings())


def test_long_captions(folders: Mapping[str, Path]) -> None:
    """Tokens are counted by T5's tokenizer, and captions that are cut off are told."""
    family = config("dev", path=str(folders["dev"]), max_token_length=8)
    lengths = family.caption_lengths(["", "a cat", "a cat sits"], weighted=False)
    assert lengths is not None
    assert (lengths.tokens, lengths.limit) == ((1, 7, 12), 8)
    (warning,) = family.warnings_of_captions({"one": "a cat sits", "two": "a"}, weighted=False)
    assert warning.key == "max_token_length"
    assert "8 tokens are read, which cuts off the end of 1 of 2 captions; the longest, of one, has 12 tokens" in str(
        warning
    )
    tokens = family.build(CPU, torch.float32).text_encoder.tokenize(["a cat sits", "a"])
    assert tokens["t5"].shape == (2, 8)
    assert tokens["t5"][:, -1].tolist() == [1, 0]


def kohya_names(double: int, single: int, modulated: bool) -> set[str]:
    """The keys that sd-scripts has for all layers of the blocks."""
    streams = ["attn_qkv", "attn_proj", "mlp_0", "mlp_2", *(["mod_lin"] if modulated else [])]
    layers = ["linear1", "linear2", *(["modulation_lin"] if modulated else [])]
    names = {f"double_blocks_{n}_{side}_{own}" for n in range(double) for side in ("img", "txt") for own in streams}
    names |= {f"single_blocks_{n}_{own}" for n in range(single) for own in layers}
    return {f"lora_unet_{name}" for name in names}


@pytest.mark.parametrize(("settings", "count"), [({}, 304), ({"approximator_num_channels": 64}, 228)])
def test_targets(settings: dict[str, Any], count: int) -> None:
    """The layers of sd-scripts, by its names; modulation, text stream and blocks can be told apart."""
    module = without_weights(lambda: FluxTransformer(FluxSettings.of(settings)))
    targets = list(transformer_targets(module))
    assert len(targets) == count
    assert {target.key for target in targets} == kohya_names(19, 38, modulated=not settings)
    assert sum("modulation" in target.tags for target in targets) == (0 if settings else 2 * 19 + 38)
    assert sum("text_stream" in target.tags for target in targets) == 19 * (4 if settings else 5)
    assert {target.block_index for target in targets} == set(range(57))
    double = {target.block_index for target in targets if "double_blocks" in target.path}
    assert double == set(range(19))
    assert all(target.original_path == f"diffusion_model.{target.path}" for target in targets)


def random_lora(model: Any, network: LierlaConfig, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a network with random weights, its layers detached again."""
    adapters = network.build(model.targets(parts))
    for part in adapters.parts:
        for number, parameter in enumerate(adapters.parameters_of(part)):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    tensors = dict(adapters.adapter_state())
    adapters.detach()
    return tensors


@pytest.fixture
def tiny_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers split the first layer of single blocks in the widths of the tiny models."""
    from diffusers.loaders import lora_conversion_utils, lora_pipeline

    name = "_convert_kohya_flux_lora_to_diffusers"
    source, scope = inspect.getsource(getattr(lora_conversion_utils, name)), dict(vars(lora_conversion_utils))
    assert source.count("dims=[3072, 3072, 3072, 12288]") == 1
    exec(source.replace("dims=[3072, 3072, 3072, 12288]", "dims=[64, 64, 64, 256]"), scope)  # noqa: S102
    monkeypatch.setattr(lora_pipeline, name, scope[name])


def rows_of(target: Any, pipeline: Any) -> list[nn.Module]:
    """The layers of diffusers' transformer that together are a layer of ours."""
    return [pipeline.transformer.get_submodule(path) for path in diffusers_layers(target.path)]


def check_in_diffusers(kind: str, folder: Path, file: Path, count: int, other: Path | None = None) -> None:
    """That a pipeline which has loaded a file has W + alpha/rank·U·D in `count` layers of ours, and no others.

    Instead of `file`, with our names, the pipeline may load `other`, with diffusers'.
    """
    from diffusers import ChromaPipeline, FluxPipeline

    pipeline = (ChromaPipeline if kind == "chroma" else FluxPipeline).from_pretrained(folder)
    tensors, targets = load_file(file), built(kind, path=str(folder)).targets(("transformer",))
    before = {target.key: torch.cat([own.weight.clone() for own in rows_of(target, pipeline)]) for target in targets}
    pipeline.load_lora_weights(other or file)
    adapted = [name for name, own in pipeline.transformer.named_modules() if hasattr(own, "lora_A")]
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    changed = 0
    for target in targets:
        found = torch.cat([own.weight for own in rows_of(target, pipeline)])
        update = torch.zeros(())
        if f"{target.key}.lora_up.weight" in tensors:
            update = update_of(target.key, tensors)
            changed += len(rows_of(target, pipeline))
            assert update.abs().max() > 1e-5
        torch.testing.assert_close(found, before[target.key] + update, rtol=0, atol=1e-5)
    assert len(adapted) == changed
    assert len({name.partition(".")[0] for name in tensors}) == count


@pytest.mark.parametrize("kind", ["dev", "chroma"])
@pytest.mark.usefixtures("tiny_splits")
def test_diffusers_computes_the_same(kind: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Each module of a file is loaded, fused layers as their parts; a file of one block loads, too."""
    tensors = random_lora(built(kind, path=str(folders[kind])), LierlaConfig(rank=4, alpha=2.0), ("transformer",))
    save_file(tensors, tmp_path / "lora.safetensors")
    check_in_diffusers(kind, folders[kind], tmp_path / "lora.safetensors", 20 if kind == "chroma" else 26)
    one = {name: own for name, own in tensors.items() if "single_blocks_1_" in name}
    save_file(one, tmp_path / "one.safetensors")
    check_in_diffusers(kind, folders[kind], tmp_path / "one.safetensors", 2 if kind == "chroma" else 3)


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_files_in_other_layouts(kind: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Copies for diffusers have fused layers in parts and load there; both layouts are read back to the same updates.

    Of one block alone as well, whose names do not tell FLUX.1 from Stable Diffusion 3.
    """
    model = built(kind, path=str(folders[kind]))
    tensors = random_lora(model, LierlaConfig(rank=4, alpha=2.0), ("transformer",))
    targets = built(kind, path=str(folders[kind])).targets(("transformer",))
    save_file(tensors, tmp_path / "lora.safetensors")
    for layout in ("diffusers", "original"):
        file, one = tmp_path / f"{layout}.safetensors", tmp_path / f"{layout}-one.safetensors"
        written = in_layout(tensors, layout, targets)
        save_file(written, file)
        save_file({name: own for name, own in written.items() if "single" not in name}, one)
        read = load_initial_weights(file, targets)
        for target in targets:
            torch.testing.assert_close(
                update_of(target.key, read), update_of(target.key, tensors), rtol=1e-5, atol=1e-6
            )
        assert not list(config(kind, path=str(folders[kind]), base_weights=(file, one)).problems())
    theirs = load_file(tmp_path / "diffusers.safetensors")
    assert all(name.startswith("transformer.") and ".lora_" in name for name in theirs)
    assert len(theirs) == 2 * sum(len(diffusers_layers(target.path)) for target in targets)
    count = 20 if kind == "chroma" else 26
    lora, copy = tmp_path / "lora.safetensors", tmp_path / "diffusers.safetensors"
    check_in_diffusers(kind, folders[kind], lora, count, copy)


def update_of(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a LoRA adds to a layer's weight."""
    up, down = (tensors[f"{key}.lora_{way}.weight"].float() for way in ("up", "down"))
    return up @ down * (tensors[f"{key}.alpha"].float() / len(down))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss(kind: str, dtype: torch.dtype, folders: Mapping[str, Path]) -> None:
    """Steps on one batch lower its loss, with text encoders trained, too, and each part moves."""
    torch.manual_seed(0)
    model = built(kind, dtype, path=str(folders[kind]))
    parts = tuple(part.name for part in model.config.parts)
    adapters = LierlaConfig(rank=4).build(model.targets(parts))
    adapters.initialize(0)
    before = {part: [own.detach().clone() for own in adapters.parameters_of(part)] for part in adapters.parts}
    parameters = [own for part in adapters.parts for own in adapters.parameters_of(part)]
    optimizer, batch, losses = torch.optim.AdamW(parameters, lr=3e-3), make_batch(model), []
    for _ in range(6):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert set(adapters.parts) == set(parts)
    for part in adapters.parts:
        assert any(not torch.equal(*own) for own in zip(adapters.parameters_of(part), before[part], strict=True))


def run_train(tables: Mapping[str, Any], folder: Path) -> Path:
    """The file that `lorakit train` saves."""
    folder.mkdir()
    (folder / "config.toml").write_text(tomlkit.dumps(tables))
    result = CliRunner().invoke(cli, ["train", str(folder / "config.toml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "out" / "lora.safetensors"


@pytest.mark.parametrize("kind", ["dev", "chroma"])
@pytest.mark.usefixtures("tiny_splits")
def test_train_on_a_folder_and_on_files(
    kind: str, folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, str]], photographs: Path, tmp_path: Path
) -> None:
    """The command line trains both to the same bytes of weights, draws previews, and diffusers takes the file."""
    tables: dict[str, Any] = {
        "data": {"image_dir": str(photographs), "resolution": 64, "batch_size": 2},
        "network": {"rank": 4, "alpha": 2.0},
        "optimizer": {"lr": 1e-2},
        "training": {"max_steps": 4, "device": "cpu"},
        "output": {"dir": "out", "name": "lora"},
        "saver": {"name": "safetensors", "precision": "fp32"},
        "observers": [{"name": "samples", "prompts": ["a cat --w 64 --h 64 --s 2"]}],
    }
    files = [
        run_train({"model": {**model}, **tables}, tmp_path / name)
        for name, model in {"folder": {"path": str(folders[kind])}, "files": parts[kind]}.items()
    ]
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "files" / "out" / "sample").glob("lora_0*.png"))) == 1
    check_in_diffusers(kind, folders[kind], files[0], 20 if kind == "chroma" else 26)
    with safe_open(files[1], "pt") as opened:
        metadata = opened.metadata()
    version, architecture = ("chroma", "chroma/lora") if kind == "chroma" else ("flux1", "flux-1-dev/lora")
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"]) == (version, architecture)
    assert metadata["ss_guidance_scale"] == ("0.0" if kind == "chroma" else "1.0")


def test_a_lora_is_baked_into_a_transformer(
    folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, str]], tmp_path: Path
) -> None:
    """A file with the transformer alone is changed in either layout, in diffusers' in each part of a fused layer."""
    model = built("dev", path=str(folders["dev"]))
    tensors = random_lora(model, LierlaConfig(rank=4, alpha=2.0), ("transformer",))
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = {target.path: target.module.weight.clone() for target in model.targets(("transformer",))}
    for target in model.targets(("transformer",)):
        expected[target.path] += update_of(target.key, tensors)
    theirs = folders["dev"] / "transformer" / "diffusion_pytorch_model.safetensors"
    for number, base in enumerate((Path(parts["dev"]["path"]), theirs)):
        output = tmp_path / f"{number}.safetensors"
        done = bake(base, [(tmp_path / "lora.safetensors", 1.0)], output)
        assert done.changed == 26
        whole = built("dev", **{**parts["dev"], "path": str(output)}).module("transformer")
        for path, weight in expected.items():
            torch.testing.assert_close(whole.get_submodule(path).weight, weight, rtol=0, atol=1e-5)


def test_weights_of_a_shorter_format(parts: Mapping[str, Mapping[str, str]], tmp_path: Path) -> None:
    """Files in fp8 are read as what their numbers are."""
    short = {name: own.to(torch.float8_e4m3fn) for name, own in load_file(parts["dev"]["path"]).items()}
    save_file(short, tmp_path / "fp8.safetensors")
    found = built("dev", **{**parts["dev"], "path": str(tmp_path / "fp8.safetensors")}).module("transformer")
    assert torch.equal(found.img_in.weight, short["img_in.weight"].float())


def sentencepiece(pieces: list[tuple[str, float]]) -> bytes:
    """A file of SentencePiece with these pieces, made by transformers' own description of the format."""
    from transformers.utils import sentencepiece_model_pb2_new as description_of

    proto = description_of.ModelProto()
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score)
    proto.trainer_spec.unk_id = 2
    proto.normalizer_spec.name = "nmt_nfkc"
    written: bytes = proto.SerializeToString()
    return written


def test_the_tokenizer_of_sentencepiece(
    folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, str]], tmp_path: Path
) -> None:
    """`spiece.model` gives the ids of `tokenizer.json`; damaged files are refused by name."""
    folder = folders["dev"] / "tokenizer_2"
    pieces = [tuple(own) for own in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]]
    (tmp_path / "spiece.model").write_bytes(sentencepiece(pieces))
    found, expected = T5Tokenizer(tmp_path, 64), T5Tokenizer(folder, 64)
    for caption in ("", "a cat", "  two  spaces, é </s> and more"):
        assert torch.equal(found([caption])["ids"], expected([caption])["ids"])
    assert found.vocabulary_size == expected.vocabulary_size
    assert not list(config("dev", **{**parts["dev"], "tokenizer_2": str(tmp_path)}).problems())
    for content in (b"", b"\x0a\xff", b"no such file", (tmp_path / "spiece.model").read_bytes()[:-30]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read"):
            T5Tokenizer(tmp_path, 64)


def test_a_tokenizer_that_does_not_fit(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """A tokenizer with more tokens than T5 knows is refused, and so is one of another model."""
    folder = shutil.copytree(folders["dev"], tmp_path / "model")
    content = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())
    content["model"]["vocab"] += [[f"<{number}>", -9.0] for number in range(90)]
    (folder / "tokenizer_2" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"text encoder \(T5\) in .* knows 98 tokens, but its tokenizer has 188"):
        _ = built("dev", path=str(folder)).text_encoder
    with pytest.raises(ModelError, match="is not that of T5"):
        T5Tokenizer(other_tokenizer(tmp_path), 8)


def other_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of words."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(folder / "tokenizer.json"))
    return folder


def test_options_of_another_process(folders: Mapping[str, Path], photographs: Path, tmp_path: Path) -> None:
    """Half precision, and what is made for DDPM, are refused."""
    from lorakit.errors import ConfigError

    tables = {
        "model": {"path": str(folders["dev"])}, "data": {"image_dir": str(photographs)}, "network": {"rank": 4},
        "loss": {"min_snr_gamma": 5.0}, "training": {"mixed_precision": "fp16", "max_steps": 1},
        "output": {"dir": str(tmp_path)},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config_from_tables(tables, tmp_path)
    assert {problem.key for problem in caught.value.problems} == {"loss.min_snr_gamma", "training.mixed_precision"}


def test_a_training_adapter_for_schnell(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """In diffusers' names: merged as any LoRA while the model trains, and taken back in previews."""
    path, file = str(folders["schnell"]), tmp_path / "undistilled.safetensors"
    model = built("schnell", path=path)
    tensors = random_lora(model, LierlaConfig(rank=2, alpha=2.0), ("transformer",))
    save_file(in_layout(tensors, "diffusers", built("schnell", path=path).targets(("transformer",))), file)
    models = [built("schnell", path=path, **own) for own in ({}, {"base_weights": (file,)}, {"training_adapter": file})]
    plain, merged, training = map(predicted, models)
    with without_training_adapter(models[2]):
        previewed = predicted(models[2])
    assert (merged - plain).norm() > 1e-3 * plain.norm()
    assert torch.equal(training, merged)
    torch.testing.assert_close(previewed, plain, rtol=1e-4, atol=1e-5)
    assert not list(models[2].config.warnings())
