"""Which LoRA files a run can start from: others are told by what they are when the config is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import fields
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.builtin.networks import C3LierConfig, LierlaConfig, LoKrConfig
from lorakit.checkpoints.finite import first_not_finite
from lorakit.errors import AdapterError, ConfigError
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.config import LoRAConfig
from lorakit.networks.lora_layouts import to_diffusers
from lorakit.networks.ranked_config import RankedConfig
from lorakit.plugins.catalog import Catalog
from lorakit.testing.contracts.tiny_batch import read_model
from lorakit.training.prepare import prepare
from lorakit.training.setup import attach_network, check_initial_weights, fill_cache, run_training

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

PARTS = ("unet", "text_encoder")


def factors(key: str, inputs: int = 32, rank: int = 4) -> dict[str, Tensor]:
    """A plain adapter of a linear layer."""
    return {f"{key}.lora_down.weight": torch.ones(rank, inputs), f"{key}.lora_up.weight": torch.ones(8, rank)}


def named(*names: str) -> dict[str, Tensor]:
    """Small tensors of these names."""
    return {name: torch.ones(2, 2) for name in names}


KINDS: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "loha": (named(f"{UNET}.hada_w1_a", f"{UNET}.hada_w2_a"), "a LoHa, ", 'name = "loha"'),
    "lokr": (named(f"{UNET}.lokr_w1", f"{UNET}.lokr_w2_a"), "a LoKr, ", 'name = "lokr"'),
    "loha with cores": (named(f"{UNET}.hada_w1_a", f"{UNET}.hada_t1"), "Tucker", "use_tucker = true"),
    "oft": (named(f"{UNET}.oft_blocks"), "an OFT, ", 'algo = "diag-oft"'),
    "ia3": (named(f"{UNET}.weight", f"{UNET}.on_input"), "an IA3, ", 'algo = "ia3"'),
    "glora": (named(f"{UNET}.a1.weight", f"{UNET}.b1.weight"), "a GLoRA, ", 'algo = "glora"'),
    "full": (named(f"{UNET}.diff"), "a full difference, ", "plain LoRA"),
    "norms": (factors(UNET) | named("lora_unet_mid_block_x.w_norm"), "LoRA with trained norms", "plain LoRA"),
    "tucker": (factors(UNET) | named(f"{UNET}.lora_mid.weight"), "LoCon with Tucker", "use_tucker = true"),
    "dora": (factors(UNET) | {f"{UNET}.dora_scale": torch.ones(8, 1)}, "a DoRA", "network.dora = true"),
    "dora for inputs": (factors(UNET) | {f"{UNET}.dora_scale": torch.ones(1, 32)}, "magnitude for each input", "plain"),
    "xl by its second encoder": (factors(UNET) | factors(TEXT.replace("te_", "te2_")), "Diffusion XL", "1.x"),
    "xl by its depth": (factors(UNET.replace("blocks_0_attn2", "blocks_1_attn2")), "for Stable Diffusion XL", "1.x"),
    "xl by its width": (factors(UNET, 2048), "a LoRA for Stable Diffusion XL, and", "model.path"),
    "2.x": (factors(UNET, 1024), "a LoRA for Stable Diffusion 2.x, and the base model is Stable Diffusion 1.x", "1.x"),
    "2.x by its text encoder": (factors(TEXT, 1024), "a LoRA for Stable Diffusion 2.x", "1.x"),
    "2.x of diffusers": ({"unet.mid_block.attn2.to_k.lora_A.weight": torch.ones(4, 1024)}, "2.x, and", ""),
    "flux": (factors("lora_unet_double_blocks_0_img_attn_qkv"), "a LoRA for FLUX", "1.x"),
    "flux of diffusers": (named("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"), "for FLUX", ""),
    "sd3": (factors("lora_unet_joint_blocks_0_x_block_attn_qkv"), "a LoRA for Stable Diffusion 3", "1.x"),
    "language model": (named("base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"), "another kind", ""),
    "loha for xl": (named(f"{TEXT.replace('te_', 'te2_')}.hada_w1_a"), "a LoHa for Stable Diffusion XL", "loha"),
    "textual inversion": ({"emb_params": torch.ones(3, 768)}, "a textual-inversion embedding", "give a LoRA file"),
    "textual inversion of diffusers": ({"<cat>": torch.ones(768)}, "a textual-inversion embedding", "give a LoRA file"),
}


def problems(make: Callable[[], Any]) -> dict[str, str]:
    """What is wrong with a config, by key."""
    with pytest.raises(ConfigError) as caught:
        make()
    return {problem.key: str(problem) for problem in caught.value.problems}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_no_start(make_config, tmp_path: Path, kind: str) -> None:
    """Files of other algorithms and for other models are told by what they are, with a cure, to start from or merge."""
    tensors, told, cure = KINDS[kind]
    save_file(tensors, tmp_path / "given.safetensors")
    found = problems(lambda: make_config(network={"weights": "given.safetensors"}))
    assert found.keys() == {"network.weights"}
    assert "given.safetensors is " in found["network.weights"]
    assert told in found["network.weights"]
    assert cure in found["network.weights"]
    if kind not in {"dora", "loha", "lokr", "loha with cores", "loha for xl"}:
        merged = problems(lambda: make_config(model={"base_weights": ["given.safetensors"]}))
        assert told.removesuffix(", ") in merged["model.base_weights[0]"]


@pytest.mark.parametrize("cut", ["lora_down.weight", "lora_up.weight"])
@pytest.mark.parametrize("of_diffusers", [False, True])
def test_files_that_lack_factors(make_config, tiny_sd1: Path, tmp_path: Path, cut: str, of_diffusers: bool) -> None:
    """Half a LoRA is told before a run, to start from or merge, whichever tool has written it."""
    tensors = load_file(trained(tiny_sd1, LierlaConfig(rank=4), tmp_path / "whole.safetensors"))
    lacking = [name for name in tensors if name.endswith(cut)][:9]
    if of_diffusers:
        paths = {target.key: target.diffusers_path for target in read_model(tiny_sd1).targets(("text_encoder", "unet"))}
        half = to_diffusers(tensors, paths)
        ending = ".lora_A.weight" if cut == "lora_down.weight" else ".lora_B.weight"
        gone = [name for name in half if name.endswith(ending)][:9]
        half = {name: tensor for name, tensor in half.items() if name not in gone}
    else:
        half = {name: tensor for name, tensor in tensors.items() if name not in lacking}
    save_file(half, tmp_path / "half.safetensors")
    for table in ({"network": {"weights": "half.safetensors"}}, {"model": {"base_weights": ["half.safetensors"]}}):
        ((key, found),) = problems(lambda table=table: make_config(**table)).items()
        assert key in {"network.weights", "model.base_weights[0]"}
        assert f"half.safetensors lacks {lacking[0].partition('_')[0]}_" in found
        assert f"{cut} and 8 more tensors, so it is incomplete (download it again)" in found


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_that_are_not_finite(make_config, tmp_path: Path, value: float, dtype: torch.dtype, suffix: str) -> None:
    """NaN and infinity are found when the config is read, in whichever tensor, type and format, with its name."""
    path, name = tmp_path / f"bad{suffix}", f"{UNET}.lora_up.weight"
    tensors = {
        key: torch.linspace(-6e4, 6e4, own.numel()).view(own.shape).to(dtype) for key, own in factors(UNET).items()
    }
    for bad in (False, True):
        if bad:
            tensors[name].view(-1)[-1] = value
        if suffix == ".pt":
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
        assert first_not_finite(path) == (name if bad else "")
    message = f"{path} holds NaN or infinity in {name} (give an earlier save or another file"
    for table in ({"network": {"weights": path.name}}, {"model": {"base_weights": [path.name]}}):
        ((key, found),) = problems(lambda table=table: make_config(**table)).items()
        assert key in {"network.weights", "model.base_weights[0]"}
        assert message in found


def test_what_is_looked_at_for_nan(tmp_path: Path) -> None:
    """Whole numbers and numbers between those of a view are not taken for NaN; float8, scalars and long tensors are."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.full((3,), -1), "b": torch.ones(0), "c": torch.tensor(448.0).to(torch.float8_e4m3fn)}, path)
    assert first_not_finite(path) == ""
    for bad in (torch.tensor(torch.nan), torch.tensor(torch.nan).to(torch.float8_e4m3fn), torch.ones(2**22 + 3)):
        bad.view(-1)[-1] = torch.nan
        save_file({"a": torch.ones(2), "b": bad}, path)
        assert first_not_finite(path) == "b"
    rows = torch.tensor([[1.0, torch.nan], [2.0, torch.inf]])
    for view, found in ((rows[:, 0], ""), (rows.T, "a"), (rows[0], "a")):
        for is_archive in (True, False):
            torch.save({"a": view}, tmp_path / "x.pt", _use_new_zipfile_serialization=is_archive)
            assert first_not_finite(tmp_path / "x.pt") == found


def test_a_base_model_is_no_start(make_config, tiny_sd1_file: Path) -> None:
    """A whole model is told by what it is."""
    found = problems(lambda: make_config(network={"weights": str(tiny_sd1_file)}))
    assert "is a base model, which network.name = 'lierla' cannot start from" in found["network.weights"]


def trained(folder: Path, network: LoRAConfig, file: Path) -> Path:
    """A file of a network whose factors are far from where they start."""
    built = network.build(list(read_model(folder).targets(network.parts or PARTS)))
    generator = torch.Generator().manual_seed(3)
    for adapter in built.adapters:
        nn.init.normal_(adapter.lora_up, std=0.1, generator=generator)
    save_file(built.export_state(), file)
    return file


MISFITS: dict[str, tuple[LoRAConfig, dict[str, Any], str, str]] = {
    "rank": (LierlaConfig(rank=8), {}, "network.rank", "adapters of rank 8 (set network.rank = 8, or"),
    "rank of convolutions": (
        C3LierConfig(rank=4, conv_rank=2),
        {"name": "c3lier"},
        "network.conv_rank",
        "of rank 2 (set network.conv_rank = 2, or network.rank_from_weights = true)",
    ),
    "c3lier": (C3LierConfig(rank=4), {}, "network.name", 'is of c3lier: it has adapters for ResNet blocks, too (set'),
    "lierla": (LierlaConfig(rank=4), {"name": "c3lier"}, "network.name", 'is of lierla: it has no'),
    "one part": (
        LierlaConfig(rank=4, parts=("unet",)),
        {},
        "network.weights",
        'has no adapters for text_encoder (set network.parts = ["unet"]',
    ),
    "too many parts": (
        LierlaConfig(rank=4),
        {"parts": ["unet"], "rank_from_weights": True},
        "network.weights",
        'has adapters for text_encoder (set network.parts = ["unet", "text_encoder"]',
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape_mismatch", MISFITS)
def test_misfits(make_config, tiny_sd1: Path, tmp_path: Path, shape_mismatch: str) -> None:
    """A file with other ranks, layers or parts than the config's is told by the key that cures it."""
    saved, network, key, told = MISFITS[shape_mismatch]
    file = trained(tiny_sd1, saved, tmp_path / "start.safetensors")
    found = problems(lambda: make_config(network={**network, "weights": str(file)}))
    assert list(found) == [key]
    assert told in found[key]


_ENDS_OF_TRANSFORMERS = re.compile(r"lora_unet_\w+_proj_(?:in|out)\.(?:lora_(?:up|down)\.weight|dora_scale|lokr_w2)")


def swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file with the layers at the ends of transformers as 1×1 convolutions where they are linear, and the reverse."""
    found = {name: tensor for name, tensor in tensors.items() if _ENDS_OF_TRANSFORMERS.fullmatch(name)}
    assert found
    other = {name: own.flatten(1) if own.ndim == 4 else own[..., None, None] for name, own in found.items()}
    return {**tensors, **other}


@pytest.mark.parametrize(
    "network",
    [LierlaConfig(rank=4), C3LierConfig(rank=1), C3LierConfig(rank=4, dora=True), LoKrConfig(rank=64, factor=4)],
    ids=["lierla", "rank 1", "dora", "lokr"],
)
@pytest.mark.parametrize("model", ["tiny_sd1", "tiny_sd2_file"])
@pytest.mark.parametrize("from_weights", [False, True])
def test_convolutions_for_linear_layers(
    make_config, request: pytest.FixtureRequest, tmp_path: Path, network: RankedConfig, model: str, from_weights: bool
) -> None:
    """Factors of 1×1 convolutions are those of linear layers, as sd-scripts writes them for 2.x in single files."""
    given = {"path": str(request.getfixturevalue(model)), "prediction": "epsilon"}
    base = make_config(model=given).model.build(torch.device("cpu"), torch.float32)
    own = filled(network.build(base.targets(PARTS)).export_state())
    save_file(swapped(own), tmp_path / "swapped.safetensors")
    changed = {option.name: getattr(network, option.name) for option in fields(type(network))
               if getattr(network, option.name) != option.default}  # fmt: skip
    sizes = {"rank": 1, "rank_from_weights": True} if from_weights else {}
    start = {**changed, "name": network.name, "alpha": 1.0, "weights": "swapped.safetensors", **sizes}
    config = make_config(model=given, network=start)
    fresh = config.model.build(torch.device("cpu"), torch.float32)
    check_initial_weights(fresh, config)
    started, _ = attach_network(fresh, config)
    loaded = started.adapter_state()
    assert loaded.keys() == own.keys()
    for name, tensor in loaded.items():
        assert name.endswith(".alpha") or torch.equal(tensor, own[name]), name


def filled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random numbers in the place of all but alphas."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: own if name.endswith("alpha") else torch.rand(own.shape, generator=generator) + 0.1
        for name, own in tensors.items()
    }


@pytest.mark.parametrize("model", ["tiny_sd1", "tiny_sd2"])
def test_convolutions_for_linear_layers_merge(
    make_config, request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    """So they are for files that become part of the base model, DoRA's magnitudes too."""
    base = {"path": str(request.getfixturevalue(model)), "prediction": "epsilon"}
    plain = make_config(model=base).model.build(torch.device("cpu"), torch.float32)
    own = filled(C3LierConfig(rank=2, dora=True).build(plain.targets(PARTS)).export_state())
    weights = []
    for tensors in (own, swapped(own)):
        save_file(tensors, tmp_path / "merged.safetensors")
        config = make_config(model={**base, "base_weights": ["merged.safetensors"]})
        merged = config.model.build(torch.device("cpu"), torch.float32)
        weights.append([target.module.weight for target in merged.targets(PARTS)])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize("command", ["train", "cache"])
def test_misfits_stop_before_anything_is_encoded(
    make_config, catalog: Catalog, tiny_sd1: Path, tmp_path: Path, command: str
) -> None:
    """A file with a layer of another size is refused by name and shapes before the cache is filled."""
    tensors = load_file(trained(tiny_sd1, LierlaConfig(rank=4), tmp_path / "whole.safetensors"))
    name = f"{UNET}.lora_down.weight"
    tensors[name] = torch.ones(4, tensors[name].shape[1] + 1)
    save_file(tensors, tmp_path / "other.safetensors")
    cache = tmp_path / "cache"
    config = make_config(network={"weights": "other.safetensors"}, data={"cache_dir": str(cache)})
    with pytest.raises(
        AdapterError, match=rf"other\.safetensors does not fit .*{UNET}: lora_down\.weight is \[4, 33\]"
    ):
        run_training(prepare(config), catalog) if command == "train" else fill_cache(prepare(config))
    assert not list(cache.rglob("*.safetensors"))


def test_a_file_for_attention_alone(make_config, tiny_sd1: Path, tmp_path: Path) -> None:
    """What diffusers' own training script writes lacks layers: they are named, and what is there can be trained."""
    whole = load_file(trained(tiny_sd1, LierlaConfig(rank=4, parts=("unet",)), tmp_path / "whole.safetensors"))
    attention = {name: tensor for name, tensor in whole.items() if "_to_" in name}
    paths = {target.key: target.diffusers_path for target in read_model(tiny_sd1).targets(("unet",))}
    save_file(to_diffusers(attention, paths), tmp_path / "attention.safetensors")
    network = {"weights": "attention.safetensors", "parts": ["unet"]}
    found = problems(lambda: make_config(network=network))["network.weights"]
    assert "has no adapters for the layers ff_net_0_proj, ff_net_2, proj_in, proj_out of unet" in found
    assert "rank_from_weights = true" in found
    config = make_config(network={**network, "rank_from_weights": True}).network
    targets = read_model(tiny_sd1).targets(("unet",))
    built = config.build(list(targets))
    built.load_adapter_state(load_initial_weights(config.weights))
    assert built.adapter_state().keys() == attention.keys()


def test_dora_starts_from_lora(make_config, tiny_sd1: Path, tmp_path: Path) -> None:
    """A DoRA run that starts from a plain LoRA starts with its effect: magnitudes are the norms of W + ΔW."""
    file = trained(tiny_sd1, C3LierConfig(rank=4, alpha=2.0), tmp_path / "plain.safetensors")
    plain, dora = (C3LierConfig(rank=4, alpha=3.0, dora=dora) for dora in (False, True))
    outputs = []
    for config in (plain, dora):
        model = read_model(tiny_sd1)
        network = config.build(list(model.targets(config.parts or PARTS)))
        network.load_adapter_state(load_initial_weights(file))
        generator = torch.Generator().manual_seed(1)
        latents, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)
        outputs.append(model.predict(latents, torch.tensor([500]), {"hidden_states": states}))
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    for adapter in network.adapters:
        weight = adapter.base.weight.double()
        update = torch.einsum("or,r...->o...", adapter.lora_up.double().flatten(1), adapter.lora_down.double())
        norms = (weight + adapter.scale * update).flatten(1).norm(dim=1)
        assert torch.allclose(adapter.dora_scale.double().flatten(), norms, rtol=1e-5)
    network = {"name": "c3lier", "rank": 4, "conv_rank": 4, "dora": True, "weights": str(file)}
    assert make_config(network=network).network.dora


def test_files_of_diffusers_merge(make_config, tiny_sd1: Path, tmp_path: Path) -> None:
    """A LoRA in diffusers' layout becomes part of the base model as the same LoRA of sd-scripts does."""
    kept = C3LierConfig(rank=4, alpha=2.0, dora=True)
    file = trained(tiny_sd1, kept, tmp_path / "own.safetensors")
    paths = {target.key: target.diffusers_path for target in read_model(tiny_sd1).targets(kept.parts or PARTS)}
    save_file(to_diffusers(load_file(file), paths), tmp_path / "diffusers.safetensors")
    weights = []
    for name in ("own", "diffusers"):
        config = make_config(model={"base_weights": [f"{name}.safetensors"]})
        model = config.model.build(torch.device("cpu"), torch.float32)
        weights.append([target.module.weight for target in model.targets(kept.parts or PARTS)])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.bin"])
def test_a_folder_with_the_file(make_config, tmp_path: Path, name: str) -> None:
    """Of a folder that PEFT or diffusers wrote, the file in it is named."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / name).touch()
    found = problems(lambda: make_config(network={"weights": "lora"}))["network.weights"]
    assert found.endswith(f"is not a file (give the file in it, {tmp_path / 'lora' / name})")


def test_a_damaged_file(make_config, tmp_path: Path) -> None:
    """What cannot be read is said when the config is read."""
    (tmp_path / "given.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "cut short" in problems(lambda: make_config(network={"weights": "given.safetensors"}))["network.weights"]
