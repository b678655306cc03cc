"""A family that is not Stable Diffusion: detected, trained, resumed, previewed and saved, as a plugin alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorakit.api import AttentionConfig
from lorakit.builtin.attention import EagerConfig, SdpaConfig
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError
from lorakit.grid.attached import attached
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import PluginSource, installed_plugins
from lorakit.training.prepare import prepare
from lorakit.training.setup import attach_network, build_model, run_training
from tests.flow_family import plugin
from tests.flow_family.checkpoint import make_lumina

SOURCE = PluginSource("lumina-plugin", "1.0", "lumina2", "tests.flow_family.plugin")


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """What is installed, and the plugin."""
    return Catalog.of([(SOURCE, lambda: plugin), *installed_plugins()])


@pytest.fixture(scope="session")
def lumina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Lumina 2."""
    return make_lumina(tmp_path_factory.mktemp("models") / "lumina")


@pytest.fixture
def tables(lumina: Path, photographs: Path, tmp_path: Path) -> dict[str, Any]:
    """The tables of a short run; nothing in them names the family."""
    return {
        "model": {"path": str(lumina)},
        "data": {
            "image_dir": str(photographs),
            "resolution": 64,
            "batch_size": 2,
            "cache_dir": str(tmp_path / "cache"),
        },
        "network": {"rank": 4, "alpha": 4.0, "dropout": 0.1},
        "optimizer": {"lr": 1e-3},
        "training": {"max_steps": 4, "device": "cpu"},
        "output": {"dir": str(tmp_path / "out"), "name": "flow"},
    }


def train(tables: dict[str, Any], folder: Path, catalog: Catalog, **options: Any) -> dict[str, torch.Tensor]:
    """What a run saves."""
    config = config_from_tables(tables, folder, catalog)
    return load_file(run_training(prepare(config), catalog, **options))


def test_a_run_with_previews(tables: dict[str, Any], tmp_path: Path, catalog: Catalog) -> None:
    """The file has adapters of the transformer alone, and a preview has the family's own sampler and size."""
    tables["observers"] = [{"name": "samples", "prompts": ["a cat"], "every_n_steps": 4, "steps": 2, "width": 100}]
    tables["observers"][0]["height"] = 70
    found = train(tables, tmp_path, catalog)
    assert len(found) == 2 * 2 * 8
    assert all(re.fullmatch(r"diffusion_model\.layers\.\d\..+\.lora_[AB]\.weight", name) for name in found)
    assert all(tensor.isfinite().all() for tensor in found.values())
    (preview,) = (tmp_path / "out" / "sample").glob("flow_*_00_*.png")
    with Image.open(preview) as image:
        assert image.size == (96, 64)
    with safe_open(tmp_path / "out" / "flow.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "lumina2"


def test_resumes_exactly_with_the_text_encoder(tables: dict[str, Any], tmp_path: Path, catalog: Catalog) -> None:
    """Captions of different lengths are encoded in each step; a resumed run ends with the same bytes."""
    tables["network"]["parts"] = ["transformer", "text_encoder"]
    tables["optimizer"]["text_encoder_lr"] = 5e-4
    whole = train(tables, tmp_path, catalog)
    tables["output"] |= {"name": "part", "save_state_at_end": True}
    tables["training"]["max_steps"] = 2
    train(tables, tmp_path, catalog)
    tables["training"]["max_steps"] = 4
    resumed = train(tables, tmp_path, catalog, resume="latest")
    assert any(key.startswith("lora_te_") for key in resumed)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_options_of_another_process_are_refused(tables: dict[str, Any], tmp_path: Path, catalog: Catalog) -> None:
    """What is made for DDPM, and sizes that the transformer cannot have."""
    tables["loss"] = {"min_snr_gamma": 5.0}
    tables["data"] |= {"enable_bucket": True, "bucket_reso_steps": 8, "min_bucket_reso": 64}
    with pytest.raises(ConfigError) as caught:
        config_from_tables(tables, tmp_path, catalog)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"loss.min_snr_gamma", "data.bucket_reso_steps"}


def test_files_of_fused_layers(tables: dict[str, Any], tmp_path: Path, catalog: Catalog) -> None:
    """A file with one adapter for queries, keys and values is merged as it is trained on."""
    generator, key, file = torch.Generator().manual_seed(0), "lora_unet_layers_1_attention_qkv", tmp_path / "fused.pt"
    down, up = (torch.randn(shape, generator=generator) for shape in ((3, 48), (96, 3)))
    torch.save({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.5)}, file)
    noisy = torch.randn(1, 16, 8, 8, generator=generator)
    states = {"hidden_states": torch.randn(1, 5, 32, generator=generator), "mask": torch.ones(1, 5)}
    found = []
    for changes in (
        {"model": {**tables["model"], "base_weights": [str(file)]}},
        {"network": {"weights": str(file), "rank_from_weights": True}},
        {},
    ):
        config = config_from_tables({**tables, **changes}, tmp_path, catalog)
        model = build_model(config, torch.device("cpu"))
        attach_network(model, config)[0].eval()
        found.append(model.predict(noisy, torch.tensor([0.5]), states).detach())
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).norm() > 0.1 * found[2].norm()


NETWORKS = {
    "lierla": ({"name": "lierla", "rank": 4, "alpha": 2.0}, {"lora_A.weight", "lora_B.weight"}),
    "dora": ({"name": "lierla", "alpha": 2.0, "dora": True}, {"lora_A.weight", "lora_B.weight", "dora_scale"}),
    "loha": ({"name": "loha", "alpha": 2.0}, {f"hada_w{n}_{ab}" for n in (1, 2) for ab in "ab"} | {"alpha"}),
    "lokr": ({"name": "lokr", "rank": 2}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"}),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_files_in_the_original_layout(
    tables: dict[str, Any], tmp_path: Path, catalog: Catalog, network: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Dotted names without alpha; a file means the same to continue, to merge, to draw with and as it was trained."""
    keys, suffixes = NETWORKS[network]
    tables |= {"network": keys, "observers": [{"name": "diffusers", "layouts": ["diffusers", "kohya"]}]}
    found = train(tables, tmp_path, catalog)
    layers = {"attention.to_q", "attention.out", "feed_forward.w1", "adaLN"}
    assert {f"diffusion_model.layers.1.{layer}.{suffix}" for layer in layers for suffix in suffixes} <= found.keys()
    file = tmp_path / "out" / "flow.safetensors"

    def predicted(**changes: Any) -> Tensor:
        config = config_from_tables({**tables, **changes}, tmp_path, catalog)
        model = build_model(config, torch.device("cpu"))
        attach_network(model, config)[0].eval()
        return model.predict(*INPUTS, STATES).detach()

    plain = predicted()
    continued = predicted(network={**keys, "weights": str(file)})
    assert (continued - plain).norm() > 1e-3 * plain.norm()
    same_layers = {**{key: keys[key] for key in ("name", "dora") if key in keys}, "weights": str(file)}
    for changes in (
        {"network": {**same_layers, "rank_from_weights": True}},
        {"model": {**tables["model"], "base_weights": [str(file)]}},
    ):
        torch.testing.assert_close(predicted(**changes), continued, rtol=1e-3, atol=1e-5)
    if network == "lierla":
        model = build_model(config_from_tables(tables, tmp_path, catalog), torch.device("cpu"))
        for target in model.targets(["transformer"]):
            down, up = (found[f"{target.original_path}.lora_{own}.weight"] for own in "AB")
            target.module.weight.data += up @ down
        torch.testing.assert_close(model.predict(*INPUTS, STATES), continued, rtol=1e-4, atol=1e-6)
    kohya = {**same_layers, "weights": str(tmp_path / "out" / "flow.kohya.safetensors"), "rank_from_weights": True}
    torch.testing.assert_close(predicted(network=kohya), continued, rtol=1e-3, atol=1e-5)
    in_kohya = load_file(kohya["weights"])
    assert all(name.startswith("lora_unet_layers_") for name in in_kohya)
    assert any("_qkv." in name for name in in_kohya) == (network == "lierla")
    copy = tmp_path / "out" / "flow.diffusers.safetensors"
    if network in ("loha", "lokr"):
        assert "there is no copy of flow.safetensors for diffusers" in caplog.text
        return
    in_copy = load_file(copy)
    factor = found["diffusion_model.layers.0.attention.to_q.lora_B.weight"]
    assert torch.equal(in_copy["transformer.layers.0.attn.to_q.lora_B.weight"], factor)
    assert len(in_copy) == len(found)
    config = config_from_tables(tables, tmp_path, catalog)
    model = build_model(config, torch.device("cpu"))
    with attached(model, file, config):
        torch.testing.assert_close(model.predict(*INPUTS, STATES).detach(), continued, rtol=1e-4, atol=1e-6)


INPUTS = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5])
STATES = {"hidden_states": torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2)), "mask": torch.ones(1, 5)}

BACKENDS = (SdpaConfig(), SdpaConfig(kernels=("flash", "efficient")), SdpaConfig(kernels=("math",)), EagerConfig())


@pytest.mark.parametrize("backend", BACKENDS, ids=["sdpa", "fused", "math", "eager"])
def test_attention_backends_get_masks(
    tables: dict[str, Any], tmp_path: Path, catalog: Catalog, backend: AttentionConfig
) -> None:
    """With captions of two lengths, all attention is by the backend, and predictions are those of diffusers."""
    model = build_model(config_from_tables(tables, tmp_path, catalog), torch.device("cpu"))
    conditioning = model.text_encoder.encode(model.text_encoder.tokenize(["a cat", "a much longer caption"]))
    inputs = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.6])
    masks: list[torch.Tensor | None] = []
    attend = backend.build()

    def noting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
        masks.append(mask)
        return attend(query, key, value, mask)

    with torch.no_grad():
        expected = model.predict(*inputs, conditioning)
        model.use_attention(noting)
        found = model.predict(*inputs, conditioning)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # In the refiner of captions, in that of 4 × 4 patches, and in two blocks with both.
    lengths = conditioning["mask"].sum(1)
    counts = [None if mask is None else mask.sum((1, 2, 3)).tolist() for mask in masks]
    assert counts == [lengths.tolist(), None, *2 * [(16 + lengths).tolist()]]
