"""The script that trains the small Stable Diffusion: reproducible, and its folder is a real one of the right size."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoder import as_tensor, latents_of, normalise, quality, train_vae
from denoiser import Denoiser, alphas, learning_material, train_denoiser
from pace import Average, Budget, set_rate
from parts import SETTINGS, build, load
from pictures import training_caption, training_picture
from PIL import Image
from safetensors.torch import load_file
from score import SUBJECTS, load_pipeline, paint, score
from train_base import train_painting, trained_vae
from velocity import turn

from lorakit.checkpoints.prediction import stated_prediction
from lorakit.checkpoints.summary import summarize
from lorakit.models.families.sd.checkpoint import SDCheckpoint
from lorakit.models.families.sd.detect import recognise
from lorakit.models.families.sd.infer_config import SCALING_FACTOR
from lorakit.testing.models import to_single_file

SCRIPT = Path(__file__).parents[2] / "examples" / "tiny-sd" / "train_base.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes after two steps for each part."""
    folder = tmp_path_factory.mktemp("tiny-sd") / "model"
    lengths = ["--vae-steps", "2", "--unet-steps", "2", "--pictures", "8", "--score", "0", "--device", "cpu"]
    subprocess.run([sys.executable, SCRIPT, folder, *lengths], check=True, capture_output=True)
    return folder


def test_the_folder_is_small_and_in_float16(folder: Path) -> None:
    """All files together have at most 16 MB, and all weights are float16."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 3
    assert {tensor.dtype for file in weights for tensor in load_file(file).values()} == {torch.float16}


def test_the_script_is_reproducible(folder: Path, tmp_path: Path) -> None:
    """The script's functions give, with the same seed, the very weights that it wrote; another seed does not."""
    lengths = {"vae_steps": 2, "vae_minutes": None, "unet_steps": 2, "unet_minutes": None, "pictures": 8}
    options = Namespace(seed=0, device="cpu", folder=tmp_path, **lengths)
    train_painting(trained_vae(options), options)
    for file in folder.rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.relative_to(folder)).read_bytes()
    assert not torch.equal(*(build("vae", seed).get_parameter("encoder.conv_in.weight") for seed in (0, 1)))


def test_lorakit_trains_on_it(folder: Path, tmp_path: Path) -> None:
    """The folder is seen as a Stable Diffusion 1.x, and `lorakit train` makes a LoRA for all its attention layers."""
    assert recognise(summarize(folder)).title == "a Stable Diffusion 1.x model"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(2):
        Image.fromarray(training_picture(0, index)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(training_caption(0, index), encoding="utf-8")
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        model.path = "{folder.as_posix()}"
        data = {{image_dir = "pictures", resolution = 64}}
        network = {{rank = 2}}
        optimizer = {{lr = 1e-3}}
        training = {{max_steps = 2, device = "cpu"}}
        output = {{dir = "out", name = "lora"}}
        """,
        encoding="utf-8",
    )
    for command in ("check", "train"):
        run = subprocess.run([sys.executable, "-m", "lorakit", command, config], capture_output=True, check=False)
        assert run.returncode == 0, run.stderr.decode()
    names = set(load_file(tmp_path / "out" / "lora.safetensors"))
    for part in ("lora_te_text_model_encoder_layers_2", "lora_unet_down_blocks_2_attentions_0", "lora_unet_mid_block"):
        assert any(name.startswith(part) for name in names)


def test_a_single_file_is_read_the_same(folder: Path, tmp_path: Path) -> None:
    """Converted to one file, which has no settings, the model is taken to have the settings that it has."""
    model = SDCheckpoint(to_single_file(folder, tmp_path / "model.safetensors"))
    for part, settings in SETTINGS.items():
        told = model.part(part).settings
        for key in ("norm_num_groups", "num_attention_heads", "block_out_channels", "cross_attention_dim"):
            if key in settings:
                assert told[key] == settings[key], (part, key)


def test_diffusers_paints_with_it(folder: Path) -> None:
    """Diffusers loads the folder; pictures follow the seed, and do not depend on how many are painted at once."""
    prompts = ["a red circle on a blue background", "a green star on a white background"]
    pipeline = load_pipeline(folder)
    both, first = paint(pipeline, prompts, steps=2), paint(pipeline, prompts[:1], steps=2)
    assert both[0].shape == (64, 64, 3)
    assert np.abs(both[0].astype(int) - first[0]).max() <= 1
    assert not np.array_equal(both[0], both[1])


def test_the_score_counts_what_is_right(folder: Path, tmp_path: Path) -> None:
    """A model that has learned nothing paints nothing right, and the sheet of its pictures is saved."""
    result = score(load_pipeline(folder), SUBJECTS["world"], count=2, file=tmp_path / "sheet.png", steps=2)
    assert len(result.verdicts) == 2
    assert result.share("right") == 0
    assert str(result).startswith("0.0% of 2 pictures are all right (colour ")
    assert (tmp_path / "sheet.png").exists()


def test_normalising_changes_the_latents_and_not_the_pictures() -> None:
    """Folded in, mean and deviation of each latent channel are 0 and 1; what the VAE makes of a picture stays."""
    vae = build("vae", 3).eval()
    pictures = as_tensor([training_picture(0, index) for index in range(8)])
    with torch.no_grad():
        before = vae(pictures).sample
        deviation = vae.encode(pictures).latent_dist.std
        raw = vae.encode(pictures).latent_dist.mean
        normalise(vae, 0)
        after = vae(pictures).sample
        scaled = vae.encode(pictures).latent_dist
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    factor = (scaled.mean[1] - scaled.mean[0]) / (raw[1] - raw[0])
    torch.testing.assert_close(scaled.std, deviation * factor.median(-1)[0].median(-1)[0][None, :, None, None])
    many = latents_of(vae, as_tensor([training_picture(5, index) for index in range(200)]))
    assert many.mean((0, 2, 3)).abs().max() < 0.3
    assert (many.std((0, 2, 3)) - 1).abs().max() < 0.3
    assert vae.config.scaling_factor == SCALING_FACTOR


def test_a_vae_learns() -> None:
    """A few dozen steps make the VAE paint held-out pictures better."""
    vae = build("vae", 0)
    before = quality(vae, count=8)
    train_vae(vae, Budget(30), 0, batch=2)
    assert quality(vae, count=8) > before + 1


def test_a_denoiser_learns_and_leaves_the_words_alone() -> None:
    """The loss at the end is that of less noise left; token embeddings do not change, all other weights do."""
    vae, text_encoder, unet = (build(part, 0) for part in ("vae", "text_encoder", "unet"))
    normalise(vae, 0)
    model = Denoiser(text_encoder, unet)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    material = learning_material(vae, 0, 16)
    before = noise_left(model, material)
    train_denoiser(model, material, Budget(25), 0, batch=8)
    assert noise_left(model, material) < before - 0.04
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, start[name])]
    assert same == ["text_encoder.embeddings.token_embedding.weight"]


@torch.no_grad()
def noise_left(model: Denoiser, material: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The mean square error of the noise that a model finds in latents half-way to noise."""
    latents, tokens = material
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    timesteps = torch.full((len(latents),), 500)
    kept = alphas(latents.device)[500]
    found = model(kept.sqrt() * latents + (1 - kept).sqrt() * noise, timesteps, tokens[:, 0])
    return float((found - noise).square().mean())


def test_the_schedule_is_that_of_stable_diffusion() -> None:
    """The variance left after each step is what diffusers' scheduler computes from the folder's settings."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    torch.testing.assert_close(alphas(torch.device("cpu")), scheduler.alphas_cumprod)


def test_velocity_is_what_diffusers_means_by_it() -> None:
    """The target of a model that predicts velocity is diffusers' own, at every step."""
    from diffusers import DDPMScheduler

    latents, noise = torch.randn(2, 1000, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(1000)
    expected = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").get_velocity(latents, noise, steps)
    model = Denoiser(torch.nn.Identity(), torch.nn.Identity(), prediction="v_prediction")
    target = model.target(latents, noise, alphas(steps.device).view(-1, 1, 1, 1))
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_predicts_velocity_says_so(folder: Path, tmp_path: Path) -> None:
    """What was trained on for velocity is another model, with the same VAE, that lorakit and diffusers take for one."""
    turn(folder, tmp_path, steps=1, pictures=4)
    assert stated_prediction(summarize(tmp_path)).prediction == "v_prediction"
    assert load_pipeline(tmp_path).scheduler.config.prediction_type == "v_prediction"
    same = {part: sha(tmp_path, part) == sha(folder, part) for part in ("vae", "text_encoder", "unet")}
    assert same == {"vae": True, "text_encoder": False, "unet": False}


def sha(folder: Path, part: str) -> str:
    """The hash of a part's weights."""
    (file,) = (folder / part).glob("*.safetensors")
    return sha256(file.read_bytes()).hexdigest()


def test_the_average_is_a_mean_of_past_weights() -> None:
    """After each update the average is decay times itself plus the rest of the weights, by the formula."""
    layer = torch.nn.Linear(1, 1, bias=False)
    average, expected = Average(layer, decay=0.5), float(layer.weight.detach())
    for step, value in enumerate((3.0, -1.0, 7.0), start=1):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    average.apply()
    assert float(layer.weight.detach()) == pytest.approx(expected)


def test_loading_gives_what_was_saved(folder: Path) -> None:
    """A VAE that is loaded to go on with encodes as the one in the file."""
    loaded = load(folder, "vae").state_dict()
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in stored.items())


def test_latents_differ_more_than_their_noise_from_the_start() -> None:
    """Before any training pictures' latents are further apart than the noise that is added to them."""
    latents = build("vae", 0).encode(as_tensor([training_picture(0, index) for index in range(16)])).latent_dist
    assert (latents.mean.std((0, 2, 3)) > 3 * latents.std.mean((0, 2, 3))).all()


def test_the_learning_rate_rises_and_falls() -> None:
    """A linear rise over the warm-up, then half a cosine of the share of steps made, down to a hundredth."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for done, expected in ((0, 0.01), (49, 0.5 * (0.01 + 0.99 * 0.99847)), (500, 0.505), (1000, 0.01)):
        set_rate(optimizer, 2.0, Budget(2000 if done < 100 else 1000, done=done))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected, rel=1e-3)


def test_a_budget_of_minutes_ends_by_the_clock() -> None:
    """With minutes given the steps do not count."""
    assert Budget(4, done=3).progress() == 0.75
    assert Budget(4, minutes=1e-9, done=0).progress() >= 1
    assert Budget(4, minutes=60, done=9).progress() < 0.01
