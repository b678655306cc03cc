"""Stable Diffusion XL: equal to diffusers' pipeline, and to numbers worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lorakit.builtin.model_families.sdxl import SDXLConfig
from lorakit.models.conditioning import ImageSizes, encode_frozen
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.families.sd.unet import UNet, timestep_embedding
from lorakit.models.families.sd.unet_config import UNetConfig
from lorakit.models.families.sdxl import targets
from lorakit.models.families.sdxl.model import StableDiffusionXL
from lorakit.models.families.sdxl.parts import LAYOUT
from lorakit.models.weights.load import without_weights
from lorakit.testing.models import FULL_SDXL, TINY_SDXL
from tests.models.test_targets import described, known_rows

CPU = torch.device("cpu")
CAPTIONS = ("a photo of a cat", "", "a dog (on a hill), sunny", " ".join(["word"] * 120))
"""None has an exclamation mark, which transformers' tokenizer takes for padding here."""


def built(path: Path, dtype: torch.dtype = torch.float32, **settings: object) -> StableDiffusionXL:
    """The model at a path, on the CPU."""
    model = SDXLConfig(path=str(path), **settings).build(CPU, dtype)  # type: ignore[arg-type]
    assert isinstance(model, StableDiffusionXL)
    return model


def test_unet_equals_diffusers() -> None:
    """Outputs and the gradients of all inputs, in float64."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**TINY_SDXL["unet"]).double().eval()
    ours = UNet(UNetConfig.of(dict(theirs.config))).double().eval()
    ours.load_state_dict(theirs.state_dict())
    context, pooled = torch.randn(2, 77, 64).double(), torch.randn(2, 32).double()
    latents, steps = torch.randn(2, 4, 12, 16).double(), torch.tensor([3, 961])
    ids = torch.tensor([[1500, 1000, 16, 0, 1216, 832], [64, 64, 0, 0, 64, 64]])
    inputs = [tensor.requires_grad_() for tensor in (latents, context, pooled)]
    out = ours(latents, steps, context, pooled, ids)
    expected = theirs(latents, steps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    weights = torch.randn_like(out)
    for own, other in zip(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs), strict=True,
    ):  # fmt: skip
        assert own.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_captions_are_encoded_as_by_diffusers(tiny_sdxl: Path, tiny_sdxl_file: Path, form: str) -> None:
    """The hidden states and the pooled vector are those of diffusers' pipeline, read by transformers itself."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    encoder = built(tiny_sdxl if form == "folder" else tiny_sdxl_file).text_encoder
    with torch.no_grad():
        ours = encoder.encode(encoder.tokenize(CAPTIONS[:3]))
        for row, caption in enumerate(CAPTIONS[:3]):
            states, _, pooled, _ = pipeline.encode_prompt(caption, device=CPU, do_classifier_free_guidance=False)
            torch.testing.assert_close(ours["hidden_states"][row], states[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours["text_embeds"][row], pooled[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours["text_embeds"][0], ours["text_embeds"][1])


def test_projection_of_a_single_file_is_transposed(tiny_sdxl_file: Path, tmp_path: Path) -> None:
    """OpenCLIP stores P and computes h·P; a linear layer has its transpose, as have files that spell it `.weight`."""
    tensors, prefix = load_file(tiny_sdxl_file), "conditioner.embedders.1.model."
    weight = torch.arange(1024, dtype=torch.float32).view(32, 32)
    tensors[f"{prefix}text_projection"] = weight
    save_file(tensors, tmp_path / "own.safetensors")
    del tensors[f"{prefix}text_projection"]
    save_file({**tensors, f"{prefix}text_projection.weight": weight}, tmp_path / "linear.safetensors")
    hidden = torch.arange(32, dtype=torch.float32)
    for name, expected in {"own": hidden @ weight, "linear": weight @ hidden}.items():
        projection = built(tmp_path / f"{name}.safetensors").module("text_encoder_2").text_projection
        torch.testing.assert_close(projection(hidden), expected)
    save_file(tensors, tmp_path / "absent.safetensors")
    problems = [str(problem) for problem in SDXLConfig(path=str(tmp_path / "absent.safetensors")).problems()]
    assert len(problems) == 1
    assert "lacks text_projection.weight" in problems[0]


def test_single_file_with_the_names_of_transformers(tiny_sdxl: Path, tiny_sdxl_file: Path, tmp_path: Path) -> None:
    """Some tools leave the second text encoder's names as transformers has them."""
    whole, prefix = load_file(tiny_sdxl_file), "conditioner.embedders.1."
    tensors = {name: own for name, own in whole.items() if not name.startswith(prefix)}
    second = load_file(tiny_sdxl / "text_encoder_2" / "model.safetensors")
    tensors |= {f"conditioner.embedders.1.transformer.{name}": tensor for name, tensor in second.items()}
    save_file(tensors, tmp_path / "tiny.safetensors")
    assert not list(SDXLConfig(path=str(tmp_path / "tiny.safetensors")).problems())
    encoders = [built(path).text_encoder for path in (tiny_sdxl_file, tmp_path / "tiny.safetensors")]
    with torch.no_grad():
        first, second_found = (encoder.encode(encoder.tokenize(CAPTIONS)) for encoder in encoders)
    assert all(torch.equal(first[name], second_found[name]) for name in first)


def test_cleaned_captions(tiny_sdxl: Path) -> None:
    """With `fix_text`, both tokenizers read plain letters for ligatures, the cache differs, and files say it."""
    plain, cleaning = (built(tiny_sdxl, fix_text=fix_text) for fix_text in (False, True))
    found, other = (model.text_encoder.tokenize(["“ﬁne”"]) for model in (cleaning, plain))
    expected = plain.text_encoder.tokenize(['"fine"'])
    for name in ("ids_1", "ids_2"):
        assert torch.equal(found[name], expected[name])
        assert not torch.equal(found[name], other[name])
    assert cleaning.fingerprint("text_encoder") != plain.fingerprint("text_encoder")
    assert cleaning.fingerprint("vae_encoder") == plain.fingerprint("vae_encoder")
    assert [model.metadata().get("ss_fix_text") for model in (plain, cleaning)] == [None, "True"]


@pytest.mark.parametrize("length", [75, 150, 225])
def test_long_captions(tiny_sdxl: Path, length: int) -> None:
    """Chunks are encoded alone; the pooled vector is that of the first, whatever the weights of words."""
    encoder = built(tiny_sdxl, max_token_length=length).text_encoder
    with torch.no_grad():
        tokens = encoder.tokenize(CAPTIONS)
        whole = encoder.encode(tokens)
        assert whole["hidden_states"].shape == (4, length + 2, 64)
        first = encoder.encode({name: ids[:, :1] for name, ids in tokens.items()})
        torch.testing.assert_close(whole["text_embeds"], first["text_embeds"])
        inner = first["hidden_states"][:, :-1]
        torch.testing.assert_close(whole["hidden_states"][:, :76], inner)
        heavy = encoder.encode(encoder.tokenize(["a photo of a (cat:1.5)"], weighted=True))
    torch.testing.assert_close(heavy["text_embeds"], whole["text_embeds"][:1])
    scaled = whole["hidden_states"][0].clone()
    scaled[5] *= 1.5  # the start token and four words come before it
    torch.testing.assert_close(heavy["hidden_states"][0], scaled)


@pytest.mark.parametrize(("count", "ends"), [(0, (1, 1)), (74, (75, 1)), (75, (76, 1)), (76, (76, 2)), (149, (76, 75)),
                                             (150, (76, 76)), (200, (76, 76))])  # fmt: skip
def test_where_the_second_tokenizer_puts_end_tokens(count: int, ends: tuple[int, int]) -> None:
    """The first end token of each of two chunks, for captions of so many tokens."""
    ids = CaptionTokenizer(None, 150, 0)([" ".join(["cat"] * count)])[0]
    assert ids.shape == (2, 77)
    assert tuple((ids == 49407).int().argmax(1).tolist()) == ends
    assert ids[:, 0].tolist() == [49406, 49406]


SINUSOIDS = {
    64: (0.3918572, -0.9910822, 0.4294153, 0.8020958, 0.9999764, 0.9200260, 0.1332523, -0.9031071, 0.5971954),
    832: (-0.8667972, 0.1658807, -0.4909649, -0.4493328, 0.9960058, 0.4986609, 0.9861458, -0.8711794, 0.8933644),
    1365: (0.0220062, 0.5170428, 0.6949373, 0.4681243, 0.9892612, 0.9997578, 0.8559595, 0.7190703, 0.8836626),
}


@pytest.mark.parametrize("value", SINUSOIDS)
def test_sinusoids_of_sizes(value: int) -> None:
    """Cosines first, at 128 frequencies from 1 to about 1/10000."""
    places = [0, 1, 2, 64, 127, 128, 129, 130, 192]
    found = timestep_embedding(torch.tensor([value]), 256)[0, places].double()
    torch.testing.assert_close(found, torch.tensor(SINUSOIDS[value]).double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("sizes", "ids", "total"),
    [
        (ImageSizes.whole(1024, 1024), (1024, 1024, 0, 0, 1024, 1024), 435.7508768),
        (ImageSizes((1000, 1500), (0, 16), (832, 1216)), (1500, 1000, 16, 0, 1216, 832), 399.1124924),
        (ImageSizes((1920, 1080), (18, 0), (1344, 768)), (1080, 1920, 0, 18, 768, 1344), 383.5254779),
    ],
)
def test_size_ids(tiny_sdxl: Path, sizes: ImageSizes, ids: tuple[int, ...], total: float) -> None:
    """Original size, crop and target size, height and top first, as 1536 numbers."""
    (found,) = built(tiny_sdxl).image_conditioning([sizes])["time_ids"]
    assert tuple(found.tolist()) == ids
    assert float(timestep_embedding(found, 256).double().sum()) == pytest.approx(total, abs=0.02)


def test_predictions_depend_on_each_size(tiny_sdxl: Path) -> None:
    """Each of the six numbers, in bfloat16 too, where 1364 and 1365 are the same number."""
    model = built(tiny_sdxl, torch.bfloat16)
    torch.manual_seed(0)
    latents, encoder = torch.randn(1, 4, 16, 16), model.text_encoder
    with torch.no_grad():
        conditioning = dict(encoder.encode(encoder.tokenize(["a cat"])))
        ids = torch.tensor([[1365.0, 1365, 1365, 1365, 1365, 1365]])
        base = model.predict(latents, torch.tensor([500]), {**conditioning, "time_ids": ids})
        for place in range(6):
            other = ids.clone()
            other[0, place] = 1364
            changed = model.predict(latents, torch.tensor([500]), {**conditioning, "time_ids": other})
            assert not torch.equal(changed, base), place


def test_full_size_targets_are_the_known_ones() -> None:
    """Keys, kinds and shapes are exactly those of LoRA files for SDXL, and so are blocks."""
    unet = without_weights(lambda: UNet2DConditionModel(**FULL_SDXL["unet"]))
    found = list(targets.unet_targets(unet))
    rows = [row for row in known_rows("lora_keys_sdxl.tsv") if row["lora_name"].startswith("lora_unet_")]
    known = {(row["lora_name"], row["kind"], int(row["in"]), int(row["out"]), int(row["kernel"])) for row in rows}
    assert {described(target) for target in found} == known
    assert len(found) == len(known) == 788
    plain = [target.block_index for target in found if "transformer" in target.tags]
    modules = {index: plain.count(index) for index in range(LAYOUT.count)}
    assert modules == {
        **dict.fromkeys(range(23), 0), 5: 22, 6: 22, 8: 102, 9: 102, 11: 102, 13: 102, 14: 102, 15: 102, 16: 22,
        17: 22, 18: 22,
    }  # fmt: skip
    others = [target.block_index for target in found if "transformer" not in target.tags]
    assert [others.count(index) for index in range(23)] == [
        0, 0, 3, 3, 1, 4, 3, 1, 4, 3, 3, 0, 3, 4, 4, 5, 4, 4, 5, 4, 4, 4, 0,
    ]  # fmt: skip


def test_text_targets_are_the_known_ones(tiny_sdxl_file: Path) -> None:
    """All layers of both text encoders have the known keys."""
    model = built(tiny_sdxl_file)
    found = [target.key for target in model.targets(["text_encoder_2", "text_encoder"])]
    known = [row["lora_name"] for row in known_rows("lora_keys_sdxl.tsv") if "lora_te" in row["lora_name"]]
    assert sorted(found) == sorted(known)
    assert [target.encoder_index for target in model.targets(["text_encoder", "text_encoder_2"])] == [0] * 72 + [
        1
    ] * 192


def test_full_size() -> None:
    """The U-Net has the published number of parameters."""
    unet = without_weights(lambda: UNet(UNetConfig.of(FULL_SDXL["unet"])))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684


def test_the_vaes_scale_is_the_familys(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Latents are scaled by 0.13025, whatever a VAE's config says."""
    vae = shutil.copytree(tiny_sdxl / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    own, other = (built(tiny_sdxl, **given).vae_encoder.encode(images)[0] for given in ({}, {"vae": str(vae)}))
    torch.testing.assert_close(own, other)
    (warning,) = SDXLConfig(path=str(tiny_sdxl), vae=str(vae)).warnings()
    assert "0.18215, which is that of Stable Diffusion 1.x and 2.x, not 0.13025" in str(warning)


def test_one_text_encoder_in_memory_at_a_time(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions for the cache are encoded as all others, by one text encoder after the other, which is then freed."""
    model = built(tiny_sdxl)
    read, there = [], model.module

    def module(name: str) -> torch.nn.Module:
        read.append((name, sorted(model._read)))
        return there(name)

    monkeypatch.setattr(model, "module", module)
    batches = [CAPTIONS[:3], CAPTIONS[3:]]
    found = list(encode_frozen(model, batches))
    assert read == [("text_encoder", []), ("text_encoder_2", [])]
    assert model._read == {}
    encoder = built(tiny_sdxl).text_encoder
    for captions, own in zip(batches, found, strict=True):
        with torch.no_grad():
            expected = encoder.encode(encoder.tokenize(captions))
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], expected[name]) for name in own)
