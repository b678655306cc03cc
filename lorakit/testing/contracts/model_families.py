"""What every model family must do.

B images, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.api.components import NetworkConfig
from lorakit.api.loss import LossConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.checkpoints import locate, summarize
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.models.conditioning import collate, split
from lorakit.models.interfaces import AttentionBackend, DiffusionModel
from lorakit.models.memory.block_swap import streamed_bytes
from lorakit.models.memory.quantization import QuantizedLayer
from lorakit.models.memory.weight_formats import FORMATS
from lorakit.plugins.catalog import Catalog
from lorakit.testing.contracts.attention import reference
from lorakit.testing.contracts.component import ComponentContract
from lorakit.testing.contracts.tiny_batch import (
    CAPTIONS,
    CPU,
    encodings,
    loss_and_gradients,
    loss_of,
    make_batch,
    pictures,
    predict,
)

ENCODERS: tuple[Literal["vae_encoder"], Literal["text_encoder"]] = ("vae_encoder", "text_encoder")


_ERRORS = {"fp8": 0.2, "int8": 0.2, "nf4": 0.8}
"""How far predictions may be from those with whole weights, relatively; small random models forgive little."""


class ModelFamilyContract(ComponentContract):
    """What every model family must do.

        class TestWuerstchen(ModelFamilyContract):
            config = WuerstchenConfig(path="tiny")
            text_settings = {"clip_skip": 2}

            def make_model(self, folder: Path) -> Path:
                return make_tiny_wuerstchen(folder)

    The path in `config` is replaced by that of the model that `make_model` writes.
    """

    config: ModelFamilyConfig
    text_settings: Mapping[str, Any] = {}
    """Settings, other than those of `config`, that change what the text encoder puts out."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that adapters can be for."""
        return tuple(part.name for part in self.config.parts)

    def make_model(self, folder: Path) -> Path:
        """Write a tiny model of this family; gives its path. Called once for the suite."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def model_path(self, lorakit_offline: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG002
        """The tiny model."""
        return self.make_model(tmp_path_factory.mktemp("family") / "tiny")

    @pytest.fixture(autouse=True)
    def _with_its_model(self, _in_a_folder_of_its_own: None, model_path: Path) -> None:
        self.config = attrs.evolve(self.config, path=str(model_path))

    def test_recognises_its_models(self, model_path: Path) -> None:
        """Names and shapes of a model's tensors lead to this family, and those of something else do not."""
        save_file({"layers.0.weight": torch.ones(2, 2)}, "something_else.safetensors")
        catalog = Catalog.discover()
        found, other = (
            catalog.detect_model_family(summarize(locate(path, Path())))
            for path in (str(model_path), "something_else.safetensors")
        )
        assert found.name == self.config.name != other.name
        assert found.title

    def test_has_no_problems(self) -> None:
        """A good model passes the checks before a run."""
        assert not list(self.config.problems())

    def test_vae_encoder(self) -> None:
        """Latents have a mean and a deviation, which may be 0, float32 [B, C, h, w], the same for each image alone."""
        encoder = self.built().vae_encoder
        mean, deviation = encoder.encode(pictures(2))
        assert mean.shape == deviation.shape
        assert mean.dtype == deviation.dtype == torch.float32
        assert mean.dim() == 4
        assert len(mean) == 2
        assert (deviation >= 0).all()
        torch.testing.assert_close(encoder.encode(pictures(2)[1:])[0], mean[1:], rtol=1e-4, atol=1e-5)

    def test_vae_decoder(self) -> None:
        """Latents of `latent_shape` become images of the encoded size, float32 in [-1, 1], each as if alone."""
        model = self.built()
        latents, _ = model.vae_encoder.encode(pictures(2))
        height, width = pictures().shape[2:]
        assert tuple(latents.shape[1:]) == model.latent_shape(width, height)
        assert model.latent_shape(2 * width, height)[1:] == (latents.shape[2], 2 * latents.shape[3])
        images = model.vae_decoder.decode(latents)
        assert images.shape == pictures(2).shape
        assert images.dtype == torch.float32
        assert images.abs().max() <= 1
        assert images.std() > 0
        torch.testing.assert_close(model.vae_decoder.decode(latents[1:]), images[1:], rtol=1e-4, atol=1e-4)

    def test_text_encoder(self) -> None:
        """Tokens, on the CPU, and conditioning have the captions as their first side; captions differ in its numbers.

        Masks and lengths may be the same.
        """
        encoder = self.built().text_encoder
        tokens = encoder.tokenize(CAPTIONS)
        assert {(len(tensor), tensor.device) for tensor in tokens.values()} == {(len(CAPTIONS), CPU)}
        conditioning = encoder.encode(tokens)
        assert {len(tensor) for tensor in conditioning.values()} == {len(CAPTIONS)}
        numbers = [tensor for tensor in conditioning.values() if tensor.is_floating_point()]
        assert numbers
        for tensor in numbers:
            assert not torch.equal(tensor[0], tensor[1]), "different captions give the same conditioning"

    def test_counts_tokens(self) -> None:
        """If the family counts the tokens of captions, it does so for each, and longer ones have more."""
        lengths = self.config.caption_lengths(["", "a cat", "a cat on a sofa"], weighted=False)
        if lengths is not None:
            assert list(lengths.tokens) == sorted(set(lengths.tokens))
            assert len(lengths.tokens) == 3
            assert lengths.limit > 0

    def test_captions_in_a_batch(self) -> None:
        """Captions stored one by one and put together again give what they gave, alone or beside another."""
        model = self.built()
        batch = make_batch(model)
        with torch.no_grad():
            rows = split(model, model.text_encoder.encode(batch.tokens or {}))
            assert len(rows) == len(CAPTIONS)
            noisy = model.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
            sizes = batch.image_conditioning or {}
            together = model.predict(noisy, batch.timesteps, {**collate(model, rows), **sizes})
            torch.testing.assert_close(together, predict(model, batch), rtol=1e-3, atol=1e-4)
            for row, caption in enumerate(rows):
                one = slice(row, row + 1)
                own = {**collate(model, [caption]), **{name: tensor[one] for name, tensor in sizes.items()}}
                alone = model.predict(noisy[one], batch.timesteps[one], own)
                torch.testing.assert_close(alone, together[one], rtol=1e-3, atol=1e-4)

    def test_weighted_captions(self) -> None:
        """Brackets are words, unless they are to weigh; then the weight of 1 changes nothing, and another does."""
        if not self.config.supports_weighted_captions:
            pytest.skip("the family has no weighted captions")
        encoder = self.built().text_encoder

        def encoded(*captions: str, weighted: bool = True) -> list[Tensor]:
            return list(encoder.encode(encoder.tokenize(captions, weighted=weighted)).values())

        plain = encoded("a red hat", "a red hat", weighted=False)
        same, other = encoded("a red hat", "a (red:1) hat"), encoded("a (red) hat", "[a] red hat")
        torch.testing.assert_close(same, plain)
        # Pooled captions may have no weights.
        assert not all(torch.allclose(*pair) for pair in zip(other, plain, strict=True))
        assert not torch.equal(encoded("a (red) hat", weighted=False)[0], encoded("a (red) hat")[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_predicts(self, dtype: torch.dtype) -> None:
        """Predictions have the latents' shape and the model's number format, and depend on timestep and caption."""
        model = self.built(dtype)
        batch = make_batch(model)
        with torch.no_grad():
            prediction = predict(model, batch)
            assert prediction.shape == batch.latents.shape
            assert prediction.dtype == dtype
            assert prediction.isfinite().all()
            assert batch.tokens is not None
            others = {name: tensor.flip(0) for name, tensor in batch.tokens.items()}
            for changed in ({"timesteps": batch.timesteps.flip(0)}, {"tokens": others}):
                assert not torch.equal(predict(model, attrs.evolve(batch, **changed)), prediction)

    def test_noise_process(self) -> None:
        """Later timesteps are noisier, from almost no noise to hardly any signal; the config knows the same process."""
        noise = self.built().noise
        spec, known = noise.spec, self.config.noise_process
        assert (type(spec), spec.num_timesteps) == (type(known), known.num_timesteps)
        count = spec.num_timesteps or 1000
        steps = torch.arange(count) if spec.num_timesteps else torch.linspace(1e-3, 1, count)
        ratios = noise.signal_to_noise(steps)
        assert (ratios.diff() < 0).all()
        assert ratios[0] > 100
        assert 0 <= ratios[-1] < 0.01
        one, nothing = torch.ones(count, 1, 1, 1), torch.zeros(count, 1, 1, 1)
        signal, spread = noise.add_noise(one, nothing, steps), noise.add_noise(nothing, one, steps)
        torch.testing.assert_close((signal / spread).square().flatten(), ratios, rtol=1e-3, atol=1e-6)
        assert noise.target(one, nothing, steps).shape == one.shape

    def test_noise_that_ends_without_signal(self) -> None:
        """On request no signal of DDPM is left at the last timestep, and everything else is as it was."""
        noise = self.built().noise
        if not isinstance(noise, DDPMSchedule):
            loss = Catalog.discover().find(LossConfig, "l2")(zero_terminal_snr=True)
            assert [problem.key for problem in noise.spec.loss_problems(loss)] == ["zero_terminal_snr"]
            return
        changed = noise.with_zero_terminal_snr()
        assert changed.spec == noise.spec
        before, after = (own.signal_to_noise(torch.arange(noise.spec.num_timesteps)) for own in (noise, changed))
        assert (after.diff() < 0).all()
        assert after[-1] == 0
        torch.testing.assert_close(after[0], before[0])
        assert changed.betas[-1] == 1

    def test_targets_are_unique_and_in_order(self) -> None:
        """Each layer that can be adapted has its own key, in the same order each time: text encoder first."""
        model = self.built()
        targets = model.targets(self.parts)
        keys = [target.key for target in targets]
        assert len(set(keys)) == len(keys) > 0
        assert keys == [target.key for target in self.built().targets(self.parts[::-1])]
        assert all(isinstance(target.module, nn.Linear | nn.Conv2d) for target in targets)
        order = list(dict.fromkeys(target.part for target in targets))
        assert set(order) == set(self.parts)
        assert [bool(part.encoders) for part in self.config.parts_named(order)] == sorted(
            (bool(part.encoders) for part in self.config.parts), reverse=True
        )
        assert [target.part for target in targets] == sorted([t.part for t in targets], key=order.index)
        for part in order:
            assert [target.key for target in model.targets((part,))] == [t.key for t in targets if t.part == part]

    def test_targets_know_their_places(self) -> None:
        """Each layer has the number of a block that the config's layout has, or of a text encoder of its part."""
        parts, layout = {part.name: part for part in self.config.parts}, self.config.layout
        assert sorted(n for part in parts.values() for n in part.encoders) == list(range(self.config.text_encoders))
        for target in self.built().targets(self.parts):
            assert (target.encoder_index is None) == (not parts[target.part].encoders)
            assert target.encoder_index is None or target.encoder_index in parts[target.part].encoders
            assert target.key.startswith(parts[target.part].lora_prefix)
            assert target.layout is None or target.layout == layout
            assert (target.block_index is None) == (target.layout is None)
            assert layout is None or target.block_index is None or 0 <= target.block_index < layout.count

    def test_targets_have_known_tags(self) -> None:
        """The config knows the tags of all layers without building the model, for `network.layers`."""
        tags = {tag for target in self.built().targets(self.parts) for tag in target.tags}
        assert tags <= set(self.config.layer_tags)

    @pytest.mark.parametrize("has_text_settings", [False, True])
    def test_targets_know_whether_they_are_read(self, has_text_settings: bool) -> None:
        """Adapters get gradients if the model reads their layers, and only then."""
        settings = self.text_settings if has_text_settings else {}
        model = attrs.evolve(self.config, **settings).build(CPU, torch.float32)
        targets = model.targets(self.parts)
        network = Catalog.discover().find(NetworkConfig, "lierla")(parts=self.parts).build(targets)
        read = {target.key for target in targets if target.is_read}
        # Also those that the network has frozen.
        adapters = [adapter.requires_grad_(requires_grad=True) for adapter in network.adapters]
        loss_of(model, make_batch(model)).backward()  # type: ignore[no-untyped-call]
        for adapter in adapters:
            assert (adapter.lora_up.grad is not None) is (adapter.key in read), adapter.key
        empty = {target.key: target.is_read for target in model.empty_targets(self.parts)}
        assert empty == {target.key: target.is_read for target in targets}

    def test_targets_have_unambiguous_names(self) -> None:
        """No two layers share a name of any form that LoRA files may have, so that such files can be read."""
        targets = self.built().targets(self.parts)
        names = [name for target in targets for name in target.names]
        names += [rows.name for target in targets for rows in target.fused_from]
        assert len(set(names)) == len(names)

    def test_targets_have_names_in_their_layout(self) -> None:
        """Each layer of the denoiser has a name in the layouts that the config lists, that of its files among them.

        In the layout of diffusers it may have several, those of its rows.
        """
        targets = [target for target in self.built().targets(self.parts) if target.encoder_index is None]
        assert self.config.lora_layout in self.config.lora_layouts
        for layout in self.config.lora_layouts:
            parts_count = layout == "diffusers"
            assert all(target.name_in(layout) or (parts_count and target.fused_from) for target in targets)

    def test_is_frozen_until_adapted(self) -> None:
        """No parameter of denoiser or text encoder asks for a gradient, and nothing is left to chance by dropout."""
        model = self.built()
        modules = {target.parent for target in model.targets(self.parts)} | {model.denoiser}
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
        batch = make_batch(model)
        with torch.no_grad():
            assert torch.equal(predict(model, batch), predict(model, batch))

    def test_fingerprints(self) -> None:
        """What an encoder puts out is known by a key: stable, and another for other settings or number formats."""
        model, half = self.built(), self.built(torch.bfloat16)
        again = self.built()
        for part in ENCODERS:
            assert model.fingerprint(part) == again.fingerprint(part) != half.fingerprint(part)
        assert model.fingerprint("vae_encoder") != model.fingerprint("text_encoder")
        for name, value in self.text_settings.items():
            changed = attrs.evolve(self.config, **{name: value}).build(CPU, torch.float32)
            assert changed.fingerprint("text_encoder") != model.fingerprint("text_encoder")

    def test_frees_and_reads_again(self) -> None:
        """A part that was freed is read again when it is asked for, and puts out the same, bit for bit."""
        model = self.built()
        before = encodings(model)
        parts = model.vae_encoder, model.vae_decoder, model.text_encoder
        for part in (*ENCODERS, "vae_decoder"):
            model.free(part)
        again = model.vae_encoder, model.vae_decoder, model.text_encoder
        assert all(old is not new for old, new in zip(parts, again, strict=True))
        assert all(torch.equal(old, new) for old, new in zip(before, encodings(model), strict=True))

    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_gradient_checkpointing_changes_no_gradient(self, share: float) -> None:
        """Recomputing activations, all or some, gives the loss and the gradients that keeping them gives."""
        kept = loss_and_gradients(self.built(), self.parts)
        recomputing = self.built()
        recomputing.enable_gradient_checkpointing(share)
        recomputed = loss_and_gradients(recomputing, self.parts)
        assert len(kept) == len(recomputed) > 2
        # Where a small picture leaves attention a single key, query and key have no effect, and no gradient.
        assert sum(bool(gradient.any()) for gradient in kept) > 0.8 * len(kept)
        for old, new in zip(kept, recomputed, strict=True):
            torch.testing.assert_close(new, old)

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_keeps_parts_in_fewer_bits(self, weight_format: str) -> None:
        """So kept, read before or after that is asked for, it predicts about the same, and captions get a new key."""
        whole, early, late = self.built(), self.built(), self.built()
        batch = make_batch(whole)
        with torch.no_grad():
            exact = predict(whole, batch)
            predict(late, batch)
            for model in (early, late):
                model.quantize(dict.fromkeys(self.parts, weight_format))
            small = predict(early, batch)
            assert torch.equal(predict(late, batch), small)
        assert 0 < (small - exact).norm() < _ERRORS[weight_format] * exact.norm()
        assert all(isinstance(target.module, QuantizedLayer) for target in early.targets(self.parts))
        assert early.fingerprint("text_encoder") != whole.fingerprint("text_encoder")
        late.quantize({})
        assert late.fingerprint("text_encoder") == whole.fingerprint("text_encoder")

    @pytest.mark.parametrize("weight_format", [None, "nf4"])
    def test_streams_weights(self, weight_format: str | None) -> None:
        """With weights that are copied ahead of their use, loss and gradients are the same."""
        plain, streaming = self.built(), self.built()
        for model in (plain, streaming):
            model.quantize(dict.fromkeys(self.parts, weight_format) if weight_format else {})
        expected = loss_and_gradients(plain, self.parts)
        streaming.stream(self.parts)
        assert streamed_bytes(target.module for target in streaming.targets(self.parts)) > 0
        for new, old in zip(loss_and_gradients(streaming, self.parts), expected, strict=True):
            torch.testing.assert_close(new, old)

    def test_uses_the_attention_backend(self) -> None:
        """All attention of the denoiser goes through the backend, set before the denoiser is read or afterwards."""
        early, late = self.built(), self.built()
        batch = make_batch(late)
        with torch.no_grad():
            expected = predict(late, batch)
            for model in (early, late):
                counting = _Counting()
                model.use_attention(counting)
                torch.testing.assert_close(predict(model, batch), expected, rtol=1e-3, atol=1e-4)
                assert counting.calls > 0

    def test_metadata(self) -> None:
        """LoRA files name their base model in texts that other tools look for."""
        metadata = self.built().metadata()
        assert {"ss_base_model_version", "modelspec.architecture"} <= metadata.keys()
        assert all(isinstance(text, str) and text for text in metadata.values())

    def built(self, dtype: torch.dtype = torch.float32) -> DiffusionModel:
        """The model on the CPU, nothing of it read yet."""
        return self.config.build(CPU, dtype)


class _Counting:
    """An attention backend that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0
        self._attend: AttentionBackend = reference

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
        self.calls += 1
        return self._attend(query, key, value, mask)
