"""Trains a small Z-Image from scratch, on the pictures of the small Stable Diffusion.

    python examples/tiny-sd/z_image.py /tmp/tiny-z-image
    lorakit train examples/quickstart/config.toml --set model.path=/tmp/tiny-z-image --set output.dir=/tmp/zorp-z
    python examples/tiny-sd/examine.py /tmp/zorp-z/zorp.safetensors --folder /tmp/tiny-z-image

The VAE starts as that of the small Stable Diffusion, and learns to use 16 channels instead of four. Then a transformer
and a small Qwen3 learn together to predict velocities. The transformer is lorakit's own, which takes a batch at once;
the folder is one of diffusers. Needs PyTorch 2.9, for the optimizer Muon. About a quarter of an hour on one
core that has AMX, with --bf16 and --compile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from autoencoder import COURSES, as_tensor, latents_of, quality, train_vae
from denoiser import TELLINGS
from pace import Average, Budget, set_rate
from parts import SETTINGS as SD1
from parts import load
from pictures import training_caption, training_picture
from safetensors.torch import load_file
from score import MODEL, SUBJECTS, load_pipeline, score
from torch import Tensor, nn

from lorakit.models.families.flow.layers import use_backend
from lorakit.models.families.flow.qwen3 import PAD, leave_out_last
from lorakit.models.families.z_image.model import TEMPLATE
from lorakit.models.families.z_image.transformer import MULTIPLE, ZImageSettings, ZImageTransformer
from lorakit.models.weights.load import shapes_of
from lorakit.testing.flow_models import QWEN3_TOKENS
from lorakit.testing.models import random_weights
from lorakit.utils.rng import derived_seed, keyed_generator

VAE_STEPS, STEPS = 400, 2_000
CHANNELS = 16
"""Of latents."""
_SEED = 7
_BATCH = 32
_UNCONDITIONAL = 0.1
"""Share of captions replaced by the empty one, so that guidance has something to lead away from."""
_PAD_ID = QWEN3_TOKENS.index(PAD)
_KEPT_EVERY = 1000
_RATES = {"muon": 3e-3, "adamw": 2e-3}
_SHIFT = 0.46
"""Mean of the logit of timesteps: what lorakit's default is for pictures as small as these."""
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DIFFUSERS = {"x_embedder.": "all_x_embedder.2-1.", "final_layer.": "all_final_layer.2-1."}
"""What names of tensors begin with here, and with diffusers."""
_OWN = {theirs: own for own, theirs in _DIFFUSERS.items()}

SETTINGS: dict[str, dict[str, Any]] = {
    "vae": {**SD1["vae"], "latent_channels": CHANNELS, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "transformer": {
        "in_channels": CHANNELS,
        "dim": 128,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "cap_feat_dim": 64,
        "axes_dims": (8, 12, 12),
        "axes_lens": (1024, 32, 32),
    },
}
"""Arguments of each part's module. Z-Image does not read the text encoder's last layer, which is not trained."""


class Velocity(nn.Module):
    """The text encoder without its last layer, and the transformer behind it."""

    def __init__(self, text_encoder: nn.Module, transformer: nn.Module, bf16: bool = False) -> None:
        super().__init__()
        leave_out_last(text_encoder)
        self.text_encoder, self.transformer, self.bf16 = text_encoder, transformer, bf16

    def forward(self, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        """The velocity of latents [B, 16, 8, 8] at times [B], 0 to 1 (noise), that token ids [B, 32] describe."""
        # Attention sees what was before only, so that the padding behind a caption needs no mask.
        states = self.text_encoder(tokens, use_cache=False).last_hidden_state
        lengths = (tokens != _PAD_ID).sum(1)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.bf16):
            found: Tensor = self.transformer(noisy, 1 - times, states, lengths)
        return -found.float()


def main() -> None:
    """Train, write and score the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--vae", type=Path, help="take the VAE of this folder, and do not train one")
    parser.add_argument("--start", type=Path, help="train the model of this folder on, and leave its VAE as it is")
    parser.add_argument("--seed", type=int, default=_SEED, help="decides the pictures and the noise")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many steps (%(default)s)")
    parser.add_argument("--minutes", type=float, help="train for so long instead")
    parser.add_argument("--pictures", type=int, default=8_000, help="how many pictures to learn from")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; faster on processors with AMX")
    parser.add_argument("--compile", action="store_true", help="compile the main blocks; needs a C++ compiler")
    parser.add_argument("--score", type=int, default=200, help="how many held-out prompts to judge at the end")
    options = parser.parse_args()
    start = options.start or options.vae
    vae = stored_vae(start) if start else trained_vae(VAE_STEPS)
    print(f"The VAE reconstructs at {quality(vae):.1f} dB.", flush=True)
    tokenizer = world_tokenizer()
    model = Velocity(build_text_encoder(len(tokenizer)), build_transformer(), options.bf16)
    if options.start:
        restore(model, options.start)
    if options.compile:
        for block in model.transformer.layers:
            block.compile(dynamic=False)
    material = learning_material(vae, tokenizer, options.pictures, options.seed)
    budget = Budget(options.steps, options.minutes)
    train(model, material, budget, options.seed, lambda: save(options.folder, model, vae, tokenizer))
    if options.score:
        print(score(load_pipeline(options.folder), SUBJECTS["world"], options.score))


def trained_vae(steps: int) -> nn.Module:
    """The VAE of the small Stable Diffusion after it has learned to use 16 channels."""
    vae = widened(load(MODEL, "vae"))
    train_vae(vae, Budget(steps), _SEED, COURSES[1], peak=7e-4)
    return vae


def stored_vae(folder: Path) -> nn.Module:
    """The VAE of a folder that `save` wrote."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: nn.Module = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    return vae


@torch.no_grad()
def widened(vae: nn.Module) -> nn.Module:
    """A VAE that does the same with 16 latent channels, of which the decoder does not read the new ones yet."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    wide, known = AutoencoderKL(**SETTINGS["vae"]), dict(vae.state_dict())
    few = vae.config.latent_channels
    own = dict(random_weights(shapes_of(wide), derived_seed(_SEED, "weights", "vae")))
    means, both = list(range(few)), [*range(few), *range(CHANNELS, CHANNELS + few)]
    for name, rows in (("quant_conv", both), ("post_quant_conv", means)):
        weight = torch.eye(len(own[f"{name}.weight"]))
        weight[torch.tensor(rows)[:, None], rows] = known.pop(f"{name}.weight")[:, :, 0, 0]
        own[f"{name}.weight"] = weight[:, :, None, None]
        own[f"{name}.bias"] = torch.zeros(len(weight)).index_copy(0, torch.tensor(rows), known.pop(f"{name}.bias"))
    weight, bias = own["encoder.conv_out.weight"], own["encoder.conv_out.bias"]
    weight[few:CHANNELS] *= 12  # as large as the known channels
    weight[CHANNELS:], bias[CHANNELS:] = 0, -6.0  # little noise
    weight[both], bias[both] = known.pop("encoder.conv_out.weight"), known.pop("encoder.conv_out.bias")
    own["decoder.conv_in.weight"].zero_()
    own["decoder.conv_in.weight"][:, :few] = known.pop("decoder.conv_in.weight")
    wide.load_state_dict({**own, **known})
    return wide


def world_tokenizer() -> Any:
    """A tokenizer with a token for each word of the world, those of bytes for all others, and Qwen3's special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [TEMPLATE.format(training_caption(_SEED, index)) for index in range(5000)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(QWEN3_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", pad_token=PAD, chat_template=_CHAT)


def build_text_encoder(vocabulary: int) -> nn.Module:
    """Qwen3 with random weights; token embeddings stay as they are, as in the small Stable Diffusion."""
    from transformers import Qwen3Config, Qwen3Model

    module = Qwen3Model(Qwen3Config(vocab_size=vocabulary, **SETTINGS["text_encoder"]))
    weights = dict(random_weights(shapes_of(module), derived_seed(_SEED, "weights", "text_encoder")))
    weights["embed_tokens.weight"] *= SETTINGS["text_encoder"]["hidden_size"] ** 0.5
    module.load_state_dict(weights)
    module.embed_tokens.requires_grad_(requires_grad=False)
    return module


@torch.no_grad()
def build_transformer() -> ZImageTransformer:
    """The transformer with random weights: blocks that do the same at all times, and a prediction of zero."""
    module = ZImageTransformer(ZImageSettings(**SETTINGS["transformer"]))
    module.load_state_dict(dict(random_weights(shapes_of(module), derived_seed(_SEED, "weights", "transformer"))))
    for block in (*module.noise_refiner, *module.layers):
        block.adaLN_modulation[0].weight.zero_()
        block.adaLN_modulation[0].bias.view(4, -1)[1::2] = 0.5  # the gates
    module.final_layer.linear.weight.zero_()
    module.set_rotary(torch.device("cpu"))
    use_backend(module, attention)
    return module


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: ARG001
    """softmax(q·kᵀ/√d)·v; PyTorch's own takes ten times as long backwards, in bfloat16 on a processor."""
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
    return scores.softmax(-1).to(value.dtype) @ value


@torch.no_grad()
def learning_material(vae: nn.Module, tokenizer: Any, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [count, 16, 8, 8], token ids [count, 4, 32] of pictures, and [32] of the empty caption."""
    latents, tokens = [], []
    for start in range(0, count, 256):
        numbers = range(start, min(start + 256, count))
        latents.append(latents_of(vae, as_tensor([training_picture(seed, index) for index in numbers])))
        captions = [training_caption(seed, index, telling) for index in numbers for telling in range(TELLINGS)]
        tokens.append(ids_of(tokenizer, captions).view(len(numbers), TELLINGS, -1))
    return torch.cat(latents), torch.cat(tokens), ids_of(tokenizer, [""])[0]


def ids_of(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids, int64 [B, 32], of captions in the template; all of the world's fit."""
    texts = [TEMPLATE.format(caption) for caption in captions]
    ids: Tensor = tokenizer(texts, padding="max_length", max_length=MULTIPLE, return_tensors="pt").input_ids
    return ids


def train(
    model: Velocity, material: tuple[Tensor, Tensor, Tensor], budget: Budget, seed: int, keep: Callable[[], None]
) -> None:
    """Train on latents and tokens until the square error is small.

    The model is kept now and then and at the end, with the mean of its weights.
    """
    optimizers, average = optimizers_of(model), Average(model)
    losses: list[Tensor] = []
    while budget.progress() < 1:
        latents, times, noise, tokens = batch_of(material, derived_seed(seed, "velocity", budget.done))
        amount = times.view(-1, 1, 1, 1)
        found = model((1 - amount) * latents + amount * noise, times, tokens)
        loss = (found - (noise - latents)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            set_rate(optimizer, peak, budget)
            optimizer.step()
            optimizer.zero_grad()
        average.update()
        budget.done += 1
        losses.append(loss.detach())
        if budget.is_time_to_tell():
            print(f"Transformer: {budget}, loss {torch.stack(losses).mean().item():.4f}", flush=True)
            losses.clear()
        if budget.done % _KEPT_EVERY == 0:
            with average.applied():
                keep()
    average.apply()
    keep()


def optimizers_of(model: nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of all blocks, and AdamW for everything else, each with its highest learning rate."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inner = {name for name, own in trained.items() if own.ndim == 2 and ("layers." in name or "refiner." in name)}
    matrices = [parameter for name, parameter in trained.items() if name in inner]
    others = [parameter for name, parameter in trained.items() if name not in inner]
    muon = torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return [(muon, _RATES["muon"]), (adamw, _RATES["adamw"])]


def batch_of(material: tuple[Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, noise and token ids of one step's pictures, a function of its seed."""
    latents, told, empty = material
    draw = keyed_generator(seed, "choices")
    rows, telling = (torch.from_numpy(draw.integers(most, size=_BATCH)) for most in (len(latents), TELLINGS))
    times = torch.from_numpy(draw.normal(_SHIFT, 1, _BATCH)).float().sigmoid()
    unconditional = torch.from_numpy(draw.random(_BATCH) < _UNCONDITIONAL)
    noise = torch.randn((_BATCH, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
    return latents[rows], times, noise, torch.where(unconditional[:, None], empty, told[rows, telling])


def restore(model: Velocity, folder: Path) -> None:
    """Give a model the weights of a folder that `save` wrote; what the folder has of the last layer is left there."""
    transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    model.transformer.load_state_dict({_renamed(name, _OWN): tensor for name, tensor in transformer.items()})
    text_encoder = load_file(folder / "text_encoder" / "model.safetensors")
    known = model.text_encoder.state_dict().keys()
    model.text_encoder.load_state_dict({name: text_encoder[name] for name in known})


def _renamed(name: str, names: dict[str, str]) -> str:
    begin = next((own for own in names if name.startswith(own)), "")
    return names.get(begin, "") + name.removeprefix(begin)


def save(folder: Path, model: Velocity, vae: nn.Module, tokenizer: Any) -> None:
    """Write the model as diffusers does."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    settings = SETTINGS["transformer"]
    theirs = ZImageTransformer2DModel(**settings, n_kv_heads=settings["n_heads"])
    transformer = model.transformer.state_dict()
    theirs.load_state_dict({_renamed(name, _DIFFUSERS): tensor for name, tensor in transformer.items()})
    text_encoder = build_text_encoder(len(tokenizer))
    text_encoder.load_state_dict(model.text_encoder.state_dict(), strict=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    ZImagePipeline(scheduler, vae, text_encoder, tokenizer, theirs).save_pretrained(folder)


if __name__ == "__main__":
    main()
