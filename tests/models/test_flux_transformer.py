"""The transformer of FLUX.1 and Chroma against diffusers' classes and converters, and values computed apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.checkpoints import summarize
from lorakit.errors import ModelError
from lorakit.models.families.flow.layers import rotate_pairs, time_waves, use_backend
from lorakit.models.families.flux1 import layout
from lorakit.models.families.flux1.settings import FluxSettings, infer_settings
from lorakit.models.families.flux1.structure import transformer_shapes
from lorakit.models.families.flux1.transformer import (
    FluxTransformer,
    pack,
    rotations,
    unpack,
)
from lorakit.models.memory.activation_checkpointing import checkpoint_blocks, checkpointed_blocks
from lorakit.models.weights.checkpoint import PartFormat
from lorakit.models.weights.hashing import hash_of_weights
from lorakit.models.weights.load import load_weights, shapes_of, without_weights

TINY: Mapping[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
KINDS: Mapping[str, Mapping[str, Any]] = {
    "dev": {"pooled_projection_dim": 24, "guidance_embeds": True},
    "schnell": {"pooled_projection_dim": 24, "guidance_embeds": False},
    "chroma": {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2},
}
CPU = torch.device("cpu")


def theirs(kind: str) -> torch.nn.Module:
    """Diffusers' model of a kind, with random weights, biases and norms included."""
    torch.manual_seed(0)
    cls = ChromaTransformer2DModel if kind == "chroma" else FluxTransformer2DModel
    model: torch.nn.Module = cls(**TINY, **KINDS[kind])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(requires_grad=False)


def part_format() -> PartFormat:
    """The transformer in files of either layout."""
    return PartFormat(
        name="transformer", title="transformer", family="FLUX.1", files=("diffusion_pytorch_model.safetensors",),
        prefix="", roots=(*layout.ORIGINAL_ROOTS, *layout.DIFFUSERS_ROOTS), infer=infer_settings,
        shapes=transformer_shapes, arrange=layout.arranged,
    )  # fmt: skip


def read(folder: Path, dtype: torch.dtype = torch.float64) -> FluxTransformer:
    """Our module with the weights of a folder of diffusers."""
    part = part_format().in_folder(folder, "")
    module = without_weights(lambda: FluxTransformer(FluxSettings.of(part.settings)))
    part.check()
    load_weights(module, part.files, part.find(shapes_of(module)), CPU, dtype)
    return module


def inputs(kind: str, batch: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    """Latents of 4 × 6, timesteps and text, float64; the timesteps are exact in float32."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    found = {"latents": random(batch, 4, 4, 6), "text": random(batch, tokens, 32)}
    found["timesteps"] = torch.tensor([625.0, 250.0])[:batch]
    if kind == "chroma":
        found["text_mask"] = torch.arange(tokens) <= torch.tensor([[2], [5]])[:batch]
    else:
        found["pooled"] = random(batch, 24)
    if kind == "dev":
        found["guidance"] = torch.tensor([1000.0, 3500.0])[:batch]
    return found


def in_diffusers(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """What diffusers' model makes of the same inputs."""
    named = {
        "hidden_states": pack(given["latents"]),
        "encoder_hidden_states": given["text"],
        "timestep": given["timesteps"].double() / 1000,
        "txt_ids": torch.zeros(given["text"].shape[1], 3),
        "img_ids": torch.tensor([[0.0, y, x] for y in range(2) for x in range(3)]),
    }
    if "pooled" in given:
        named["pooled_projections"] = given["pooled"]
    if "guidance" in given:
        named["guidance"] = given["guidance"].double() / 1000
    if "text_mask" in given:
        seen = torch.ones(len(given["text"]), 6, dtype=torch.bool)
        named["attention_mask"] = torch.cat([given["text_mask"], seen], dim=1)
    return unpack(model(**named, return_dict=False)[0], 2, 3)


def _in_full(heads: Tensor, rotation: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
    """Diffusers' rotation without its rounding to float32."""
    assert sequence_dim == 1
    cosines, sines = (own[None, :, None].to(heads.dtype) for own in rotation)
    real, imaginary = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return heads * cosines + torch.stack([-imaginary, real], dim=-1).flatten(3) * sines


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers compute in float64 throughout."""
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", _in_full)


def made(kind: str, folder: Path) -> tuple[Any, FluxTransformer]:
    """Diffusers' model in float64 and ours, read from the folder that it is saved in."""
    expected = theirs(kind)
    expected.save_pretrained(folder)
    for norm in getattr(getattr(expected, "distilled_guidance_layer", None), "norms", ()):
        norm.eps = 1e-6  # of the original code; diffusers takes what the number format can tell from 1
    return expected.double().eval(), read(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("exact")
def test_equals_diffusers(kind: str, tmp_path: Path) -> None:
    """In float64, outputs and gradients of all inputs are those of diffusers' class."""
    expected, found = made(kind, tmp_path)
    given = inputs(kind)
    outputs = found(**given), in_diffusers(expected, given)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    assert outputs[0].std() > 0.1
    leaves = [own for own in given.values() if own.requires_grad]
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((own * weights).sum(), leaves) for own in outputs]
    for ours, diffusers in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, diffusers, rtol=0, atol=1e-10)
        assert ours.abs().max() > 1e-3


def test_text_behind_the_mask_changes_nothing(tmp_path: Path) -> None:
    """In Chroma no token of the image sees masked text; a caption in a batch gives what it gives alone."""
    _, found = made("chroma", tmp_path)
    given = inputs("chroma")
    with torch.no_grad():
        before = found(**given)
        alone = {name: own[:1, :3] if name.startswith("text") else own[:1] for name, own in given.items()}
        torch.testing.assert_close(found(**alone), before[:1], rtol=0, atol=1e-10)
        given["text"][0, 3:] += 1
        torch.testing.assert_close(found(**given), before, rtol=0, atol=1e-10)
        given["text"][0, 2] += 1  # one row of padding is seen
        assert not torch.allclose(found(**given)[0], before[0])


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    """Blocks that recompute give the same gradients, and the backend that is set computes all attention."""
    _, found = made(kind, tmp_path)
    given, calls = inputs(kind), []

    def backend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
        calls.append(None if mask is None else tuple(mask.shape))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)

    use_backend(found, backend)
    leaves = [given["latents"], given["text"]]
    before = torch.autograd.grad(found(**given).square().sum(), leaves)
    assert calls == 4 * [(2, 1, 1, 11) if kind == "chroma" else None]
    checkpoint_blocks(checkpointed_blocks(found))
    after = torch.autograd.grad(found(**given).square().sum(), leaves)
    assert len(calls) == 4 + 8
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_original_files(kind: str, tmp_path: Path) -> None:
    """A file in the original layout is read as it is, its settings inferred; diffusers' converter makes the folder."""
    _, found = made(kind, tmp_path)
    state = {name: tensor.float().clone() for name, tensor in found.state_dict().items()}
    save_file(state, tmp_path / "original.safetensors")
    shapes = summarize(tmp_path / "original.safetensors").tensors
    part = part_format().in_tensors(tmp_path / "original.safetensors", shapes, "")
    assert part is not None
    part.check()
    assert FluxSettings.of(part.settings) == FluxSettings.of({**TINY, **KINDS[kind], "out_channels": 16})
    assert transformer_shapes(part.settings) == shapes
    folder = part_format().in_folder(tmp_path, "")
    assert hash_of_weights(part.files, part.file_names) == hash_of_weights(folder.files, folder.file_names)
    converted = converter(kind)(dict(state))
    stored = theirs(kind).state_dict()
    assert converted.keys() == stored.keys()
    for name, tensor in converted.items():
        assert torch.equal(tensor, stored[name].float()), name


def converter(kind: str) -> Any:
    """Diffusers' converter of original files, for the width of the tiny model."""
    name = f"convert_{'chroma' if kind == 'chroma' else 'flux'}_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 64"), scope)  # noqa: S102
    return scope[name]


def test_files_of_other_tools(tmp_path: Path) -> None:
    """Scales of norms may be called weights; a file in diffusers' layout is read without its config."""
    _, found = made("dev", tmp_path)
    given, state = inputs("dev"), found.state_dict()
    renamed = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    for file in (tmp_path / "renamed.safetensors", tmp_path / "diffusion_pytorch_model.safetensors"):
        part = part_format().in_tensors(file, summarize(file).tensors, "")
        assert part is not None
        part.check()
        again = without_weights(lambda own=part: FluxTransformer(FluxSettings.of(own.settings)))
        load_weights(again, part.files, part.find(shapes_of(again)), CPU, torch.float64)
        assert torch.equal(again(**given), found(**given))


def test_incomplete_folders(tmp_path: Path) -> None:
    """A part of a joined tensor that is missing, and a tensor too many, are refused by name."""
    made("dev", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({name: own for name, own in whole.items() if "blocks.0.attn.to_k.weight" not in name}, file)
    with pytest.raises(ModelError, match=r"double_blocks\.0\.img_attn\.qkv\.weight is \(128, 64\), not \(192, 64\)"):
        part_format().in_folder(tmp_path, "").check()
    save_file({**whole, "transformer_blocks.0.attn.to_z.weight": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"to_z"):
        part_format().in_folder(tmp_path, "").check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patch_size": 2}, "patch_size"), ({"axes_dims_rope": (2, 2, 2)}, "axes_dims_rope")],
)
def test_other_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FluxSettings.of({**TINY, **settings})


def test_names_of_layers() -> None:
    """Each layer of blocks has its paths in diffusers, and all of these together are diffusers' layers."""
    for kind in KINDS:
        found = FluxTransformer(FluxSettings.of({**TINY, **KINDS[kind]}))
        linear = [path for path, own in found.named_modules() if isinstance(own, torch.nn.Linear)]
        names = [name for path in linear for name in layout.diffusers_layers(path)]
        expected = {path for path, own in theirs(kind).named_modules() if isinstance(own, torch.nn.Linear)}
        assert len(names) == len(set(names))
        assert set(names) == expected
    with pytest.raises(KeyError):
        layout.diffusers_layers("img_out")


@pytest.mark.parametrize(
    ("settings", "count", "linear"),
    [
        ({"guidance_embeds": True}, 11_901_408_320, 304),
        ({}, 11_891_178_560, 304),
        ({"approximator_num_channels": 64}, 8_899_983_424, 228),
    ],
    ids=["dev", "schnell", "chroma"],
)
def test_full_size(settings: dict[str, Any], count: int, linear: int) -> None:
    """The parameters and adaptable layers of the published models."""
    module = without_weights(lambda: FluxTransformer(FluxSettings.of(settings)))
    assert sum(own.numel() for own in module.parameters()) == count
    blocks = [own for path, own in module.named_modules() if "_blocks." in path and isinstance(own, torch.nn.Linear)]
    assert len(blocks) == linear
    assert shapes_of(module) == transformer_shapes(settings)
    inferred = infer_settings(shapes_of(module))
    assert FluxSettings.of(inferred) == FluxSettings.of(
        {"out_channels": 64, "axes_dims_rope": [16, 56, 56], **settings}
    )


def test_packing() -> None:
    """Patches are read row by row, their channels by latent channel, row and column; unpacking undoes it."""
    channel, row, column = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(6), indexing="ij")
    latents = (100 * channel + 10 * row + column)[None].float()
    tokens = pack(latents)[0]
    assert tokens[0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    assert tokens[1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]
    assert tokens[3].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]
    assert torch.equal(unpack(pack(latents), 2, 3), latents)


def test_positions() -> None:
    """Text is at position 0, patches at (0, row, column), with the frequencies computed apart."""
    cosines, sines = rotations(2, 2, 3, (16, 56, 56), CPU)[0].unbind(-1)
    assert cosines.shape == (8, 64)
    assert torch.equal(cosines[:3], torch.ones(3, 64))
    angles = torch.atan2(sines, cosines)
    frequencies = torch.tensor([1, 0.719686, 0.517947, 0.372759])
    for token, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], 2):
        assert not angles[token, :8].any()
        torch.testing.assert_close(angles[token, 8:12], row * frequencies, atol=1e-6, rtol=0)
        torch.testing.assert_close(angles[token, 36:40], column * frequencies, atol=1e-6, rtol=0)


def test_rotation() -> None:
    """Neighbouring channels turn as diffusers turns them, in bfloat16 as well."""
    heads = torch.randn(2, 8, 3, 32, generator=torch.Generator().manual_seed(0))
    rotation = rotations(2, 2, 3, (4, 14, 14), CPU)
    doubled = tuple(own.repeat_interleave(2, dim=1) for own in rotation[0].unbind(-1))
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = (
            rotate_pairs(heads.to(dtype), rotation),
            apply_rotary_emb(heads.to(dtype), doubled, sequence_dim=1),
        )
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_time_embedding() -> None:
    """Cosines and sines of t = 0.7 are those computed apart; bfloat16 plays no part in them."""
    found = time_waves(torch.tensor([700.0]), 256)[0]
    torch.testing.assert_close(found[:3], torch.tensor([-0.839104, -0.461821, -0.988416]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[128:131], torch.tensor([0.543971, -0.886973, 0.151767]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    """In bfloat16 predictions are near those in float32, and have that format."""
    made(kind, tmp_path)
    given = {name: own.float() if own.dtype == torch.float64 else own for name, own in inputs(kind).items()}
    expected = read(tmp_path, torch.float32)(**given)
    short = {name: own.bfloat16() if own.requires_grad else own for name, own in given.items()}
    found = read(tmp_path, torch.bfloat16)(**short)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()
