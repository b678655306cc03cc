"""LoRA files of all forms for layers that are fused in the file or in the model: each layer's update is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.checkpoints import summarize
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.folders import TensorSlice
from lorakit.models.weights.kronecker_hadamard import update_of
from lorakit.models.weights.load import open_tensors
from lorakit.models.weights.lora_tensors import LoRATensors, lora_tensors

INPUTS, ROWS = 10, {"q": (0, 8), "k": (8, 12), "v": (12, 16)}
"""The inputs of the layers, and their rows in the fused one."""
FUSED, APART = "layers.0.attention.qkv", "layers.0.attention.to_"


def key(path: str) -> str:
    """`lora_unet_layers_0_attention_qkv`."""
    return f"lora_unet_{path.replace('.', '_')}"


def layer(path: str, **more: object) -> AdaptationTarget:
    """A layer of a model, by its path in the original code."""
    return AdaptationTarget(
        key=key(path), part="transformer", root=nn.Module(), path=path, original_path=f"diffusion_model.{path}",
        diffusers_path=f"transformer.{path.replace('attention', 'attn').replace('layers', 'blocks')}", **more,
    )  # type: ignore[arg-type]  # fmt: skip


SPLIT = [layer(APART + name, fused_in=TensorSlice(f"diffusion_model.{FUSED}", *rows)) for name, rows in ROWS.items()]
"""Queries, keys and values apart."""
PARTS = tuple(TensorSlice(f"transformer.blocks.0.attn.to_{name}", *rows) for name, rows in ROWS.items())
WHOLE = [layer(FUSED, fused_from=PARTS)]
"""One layer for all three."""

FORMS = {
    "sd-scripts": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight", "lora_unet_{flat}.alpha"),
    "LyCORIS": ("lycoris_{flat}.lora_down.weight", "lycoris_{flat}.lora_up.weight", "lycoris_{flat}.alpha"),
    "ComfyUI": ("diffusion_model.{path}.lora_A.weight", "diffusion_model.{path}.lora_B.weight", ""),
    "ComfyUI with alpha": (
        "diffusion_model.{path}.lora_A.weight", "diffusion_model.{path}.lora_B.weight", "diffusion_model.{path}.alpha",
    ),
    "down and up": (
        "diffusion_model.{path}.lora_down.weight", "diffusion_model.{path}.lora_up.weight",
        "diffusion_model.{path}.alpha",
    ),
    "PEFT": ("base_model.model.{path}.lora_A.weight", "base_model.model.{path}.lora_B.weight", ""),
    "SimpleTuner": ("transformer.{path}.lora_A.default.weight", "transformer.{path}.lora_B.default.weight", ""),
}  # fmt: skip
DIFFUSERS = ("transformer.{theirs}.lora_A.weight", "transformer.{theirs}.lora_B.weight", "")


def named(form: tuple[str, str, str], path: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    """An adapter in a form; where that has no alpha, the up factor has the scale in it."""
    theirs = path.replace("attention", "attn").replace("layers", "blocks")
    names = [name.format(flat=path.replace(".", "_"), path=path, theirs=theirs) for name in form]
    if not names[2]:
        return {names[0]: down, names[1]: up * (alpha / len(down))}
    return {names[0]: down, names[1]: up, names[2]: torch.tensor(alpha, dtype=down.dtype)}


def factors(outputs: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random factors, float64."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rank, INPUTS, **options), torch.randn(outputs, rank, **options)


def read(
    file: Path, tensors: Mapping[str, Tensor], targets: list[AdaptationTarget]
) -> tuple[LoRATensors, list[Tensor]]:
    """What a file with these tensors has for the layers, and the update of each."""
    save_file(dict(tensors), file)
    found, stored = lora_tensors(summarize(file), targets), open_tensors(file)
    updates = []
    for target in targets:
        down, up = (found.read(f"{target.key}.lora_{end}.weight", stored) for end in ("down", "up"))
        assert (tuple(down.shape), tuple(up.shape)) == tuple(
            found.shapes[f"{target.key}.lora_{end}.weight"] for end in ("down", "up")
        )
        name = f"{target.key}.alpha"
        alpha = found.read(name, stored) if name in found.stored else found.alphas.get(target.key, len(down))
        updates.append(up @ down * (float(alpha) / len(down)))
    assert {own.partition(".")[0] for own in found.stored} == {target.key for target in targets}
    return found, updates


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to 1e-12."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [*FORMS, "diffusers"])
def test_forms_of_layers_as_the_model_has_them(tmp_path: Path, form: str) -> None:
    """Whatever a tool calls the layers and the factors, each layer's update is that of the file."""
    names = FORMS.get(form, DIFFUSERS)
    tensors, expected = {}, []
    for number, (name, (start, stop)) in enumerate(ROWS.items()):
        down, up = factors(stop - start, 4, number)
        tensors |= named(names, APART + name, down, up, 3.0)
        expected.append(up @ down * 0.75)
    close(read(tmp_path / "a.safetensors", tensors, SPLIT)[1], expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparse", [False, True])
def test_fused_files_for_separate_layers(tmp_path: Path, form: str, sparse: bool) -> None:
    """A layer has its rows of the up factor, and where that is block-diagonal, its own ranks alone."""
    down, up = factors(16, 6, 0)
    if sparse:
        blocks = [up[start:stop, 2 * number : 2 * number + 2] for number, (start, stop) in enumerate(ROWS.values())]
        up = torch.block_diag(*blocks)
    found, updates = read(tmp_path / "a.safetensors", named(FORMS[form], FUSED, down, up, 2.0), SPLIT)
    close(updates, [(up @ down / 3)[start:stop] for start, stop in ROWS.values()])
    assert {len(found.shapes[f"{target.key}.lora_down.weight"]) for target in SPLIT} == {2}
    assert {found.shapes[f"{target.key}.lora_down.weight"][0] for target in SPLIT} == {2 if sparse else 6}


def apart(name: str) -> str:
    """The key of a layer by the path that diffusers has for it."""
    return f"lora_unet_blocks_0_attn_to_{name}"


@pytest.mark.parametrize("of_diffusers", [False, True])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 3)])
@pytest.mark.parametrize("parts", ["qkv", "qv"])
def test_separate_layers_for_a_fused_one(
    tmp_path: Path, of_diffusers: bool, ranks: tuple[int, ...], parts: str
) -> None:
    """Factors are stacked and the scale is kept, also of several ranks or where a part has no adapter."""
    tensors: dict[str, Tensor] = {}
    expected = torch.zeros(16, INPUTS, dtype=torch.float64)
    for number, (name, (start, stop)) in enumerate(ROWS.items()):
        if name in parts:
            down, up = factors(stop - start, ranks[number], number)
            if of_diffusers:
                tensors |= named(DIFFUSERS, APART + name, down, up, 2.0)
            else:
                ends = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
                tensors |= {f"{apart(name)}.{end}": tensor for end, tensor in ends.items()}
            expected[start:stop] = up @ down * (2 / ranks[number])
    found, updates = read(tmp_path / "a.safetensors", tensors, WHOLE)
    close(updates, [expected])
    there = [rank for name, rank in zip(ROWS, ranks, strict=True) if name in parts]
    assert found.shapes[f"{WHOLE[0].key}.lora_down.weight"] == (sum(there), INPUTS)
    # With one scale for all, alpha is as many times as large; the form of diffusers has the scale 1.
    one_scale = len(set(there)) == 1 and not of_diffusers
    assert found.alphas[WHOLE[0].key] == (2 * len(there) if one_scale else sum(there))


def test_magnitudes(tmp_path: Path) -> None:
    """Those of DoRA are split and put together by rows; where some parts have none, the file is refused."""
    down, up = factors(16, 6, 0)
    magnitudes = torch.arange(16.0)[:, None]
    whole = named(FORMS["ComfyUI"], FUSED, down, up, 6.0) | {f"diffusion_model.{FUSED}.dora_scale": magnitudes}
    file = tmp_path / "a.safetensors"
    found, _ = read(file, whole, SPLIT)
    stored = open_tensors(file)
    split = [found.read(f"{target.key}.dora_scale", stored) for target in SPLIT]
    assert [tensor.flatten().tolist() for tensor in split] == [list(range(*rows)) for rows in ROWS.values()]
    parts: dict[str, Tensor] = {}
    for number, (name, (start, stop)) in enumerate(ROWS.items()):
        parts |= named(DIFFUSERS, APART + name, *factors(stop - start, 4, number), 4.0)
        parts[f"transformer.blocks.0.attn.to_{name}.lora_magnitude_vector"] = magnitudes[start:stop, 0].contiguous()
    file = tmp_path / "b.safetensors"
    found, _ = read(file, parts, WHOLE)
    assert torch.equal(found.read(f"{WHOLE[0].key}.dora_scale", open_tensors(file)), magnitudes)
    del parts["transformer.blocks.0.attn.to_k.lora_magnitude_vector"]
    with pytest.raises(AdapterError, match=r"lacks lora_unet_blocks_0_attn_to_k\.dora_scale"):
        read(tmp_path / "c.safetensors", parts, WHOLE)


def test_hadamard_products(tmp_path: Path) -> None:
    """A LoHa of a fused layer is split by the rows of both products."""
    factor = {f"w{n}_{side}": own for n in (1, 2) for side, own in zip("ba", factors(16, 3, n), strict=True)}
    tensors = {f"diffusion_model.{FUSED}.hada_{end}": tensor for end, tensor in factor.items()}
    save_file({**tensors, f"diffusion_model.{FUSED}.alpha": torch.tensor(1.5)}, tmp_path / "a.safetensors")
    found, stored = lora_tensors(summarize(tmp_path / "a.safetensors"), SPLIT), open_tensors(tmp_path / "a.safetensors")
    expected = (factor["w1_a"] @ factor["w1_b"]) * (factor["w2_a"] @ factor["w2_b"]) / 2
    for target, (start, stop) in zip(SPLIT, ROWS.values(), strict=True):
        own = {
            suffix: found.read(f"{target.key}.{suffix}", stored)
            for suffix in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")
        }
        close([update_of(own, own.pop("alpha"))], [expected[start:stop]])


def test_files_that_fit_neither_way(tmp_path: Path) -> None:
    """Both at once, a LoKr of a fused layer, parts of LoHa, and layers of another size are refused by name."""
    whole = named(FORMS["ComfyUI"], FUSED, *factors(16, 6, 0), 6.0)
    part = named(DIFFUSERS, f"{APART}q", *factors(8, 4, 0), 4.0)
    for tensors, targets, said in (
        (whole | named(FORMS["sd-scripts"], f"{APART}q", *factors(8, 4, 0), 4.0), SPLIT, "two adapters for one layer"),
        (whole | part, WHOLE, "two adapters for one layer"),
        ({f"diffusion_model.{FUSED}.lokr_w1": torch.ones(2, 2)}, SPLIT, "lokr_w1 is for a layer that the model has in"),
        ({f"{apart('q')}.hada_w1_a": torch.ones(2, 2)}, WHOLE, "only LoRA and DoRA can be put together"),
        (named(FORMS["ComfyUI"], FUSED, *factors(18, 6, 0), 6.0), SPLIT, "has 16 outputs"),
        (named(DIFFUSERS, f"{APART}q", *factors(9, 4, 0), 4.0), WHOLE, "has 8 outputs there"),
        ({name: own for name, own in part.items() if "lora_A" in name}, WHOLE, f"lacks {apart('q')}.lora_up.weight"),
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(AdapterError, match=f"a.safetensors .*{said}"):
            lora_tensors(summarize(tmp_path / "a.safetensors"), targets)
