"""Networks and a model family that break their contract in known ways."""

# ruff: noqa: ARG002, D101, D102

from __future__ import annotations

from types import MappingProxyType

import attrs
from torch import nn
from torch.nn.functional import dropout

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.models.families.sd.model import StableDiffusion
from lorakit.networks.config import LoRAConfig
from lorakit.networks.dropout import DropoutRates
from lorakit.networks.lora import LoRAModule, LoRANetwork
from lorakit.plugins.catalog import Catalog
from lorakit.testing.contracts import ModelFamilyContract, NetworkContract
from lorakit.testing.models import make_tiny_sd1


class RestlessAdapter(LoRAModule):
    """Starts with an effect, draws from the global generator, ignores its multiplier and trains its layer."""

    def train(self, mode=True):
        self.base.requires_grad_(mode)
        return super().train(mode)

    def initialize(self, seed):
        for factor in (self.lora_down, self.lora_up):
            nn.init.normal_(factor, std=0.01)

    def forward(self, x):
        self.multiplier = 1.0
        return super().forward(dropout(x, 0.1, self.training))


@attrs.frozen(kw_only=True)
class RestlessConfig(LoRAConfig):
    """Adapts all linear layers, whatever the parts."""

    name = "restless"

    def build(self, targets):
        def make(target):
            linear = isinstance(target.module, nn.Linear)
            return RestlessAdapter(target.key, target.module, self.rank, self.alpha) if linear else None

        return LoRANetwork(targets, make, DropoutRates()).attach()


class TestRestless(NetworkContract):
    config = RestlessConfig()
    lr = 3e-2
    violates = (
        "test_starts_without_effect",
        "test_trains_the_adapters_alone",
        "test_multiplier_zero_is_the_base_model",
        "test_adapts_the_parts_it_is_told",
        "test_initialisation_follows_the_seed",
        "test_randomness_follows_the_samples",
    )


class Temporary(LoRANetwork):
    """Hands out its own factors, halves what it reads, stays attached, and lets itself be put in half precision."""

    def adapter_state(self):
        return {
            f"{adapter.key}.{suffix}": tensor.detach()
            for adapter in self.adapters
            for suffix, tensor in adapter.adapter_state().items()
        }

    def load_adapter_state(self, tensors, origin=""):
        for adapter in self.adapters:
            for suffix, own in adapter.adapter_state().items():
                own.data.copy_(tensors.get(f"{adapter.key}.{suffix}", own).mul(0.5).reshape(own.shape))

    def detach(self):
        pass

    def to(self, dtype):
        for own in self.parameters():
            own.data = own.data.to(dtype)


@attrs.frozen(kw_only=True)
class TemporaryConfig(LoRAConfig):
    """Builds `Temporary`."""

    name = "temporary"

    def build(self, targets):
        def make(target):
            adapted = self.adapts(target) and isinstance(target.module, nn.Linear)
            return LoRAModule(target.key, target.module, self.rank, self.alpha) if adapted else None

        return Temporary(targets, make, DropoutRates()).attach()


class TestTemporary(NetworkContract):
    config = TemporaryConfig()
    lr = 0.0
    violates = (
        "test_lowers_the_loss",
        "test_keys_are_those_of_the_layers",
        "test_reads_what_it_wrote",
        "test_files_mean_the_same",
        "test_refuses_what_does_not_fit",
        "test_detaches",
        "test_parameters_stay_float32",
    )


class ForgetfulModel(StableDiffusion):
    """Knows its text by the weights alone, keeps what it should free, lists its layers from the back, all as read."""

    def fingerprint(self, part):
        return part

    def free(self, part):
        pass

    def targets(self, parts):
        return super().targets(parts)[::-1]

    def reads(self, target):
        return True

    def use_attention(self, backend):
        pass

    def metadata(self):
        return {}

    def predict(self, noisy_latents, timesteps, conditioning):
        return super().predict(noisy_latents, timesteps, conditioning).half()


SD1 = Catalog.discover().find(ModelFamilyConfig, "sd1")


@attrs.frozen(kw_only=True)
class ForgetfulModelConfig(SD1):
    """Builds `ForgetfulModel`, and does not say how its blocks are numbered."""

    name = "forgetful-model"
    layout = None

    def build(self, device, dtype):
        model = super().build(device, dtype)
        return ForgetfulModel(model.checkpoint, model.variant, device, dtype)


class TestForgetfulModel(ModelFamilyContract):
    config = ForgetfulModelConfig(path="tiny")
    text_settings = MappingProxyType({"clip_skip": 2})
    violates = (
        "test_recognises_its_models",
        "test_predicts[dtype0]",
        "test_predicts[dtype1]",
        "test_targets_are_unique_and_in_order",
        "test_targets_know_their_places",
        "test_targets_know_whether_they_are_read[True]",
        "test_fingerprints",
        "test_keeps_parts_in_fewer_bits[fp8]",
        "test_keeps_parts_in_fewer_bits[int8]",
        "test_keeps_parts_in_fewer_bits[nf4]",
        "test_frees_and_reads_again",
        "test_uses_the_attention_backend",
        "test_metadata",
    )

    def make_model(self, folder):
        return make_tiny_sd1(folder)
