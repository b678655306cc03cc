"""Every optimizer with every network lowers the loss."""

from __future__ import annotations

import tomllib
from itertools import product, repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.api.components import NetworkConfig, OptimizerConfig
from lorakit.cli.init import plan_start, short_config
from lorakit.data.loader import Batch
from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from lorakit.training.step.loss import denoising_loss

LEARNING_RATES = {"adamw": 3e-3, "adamw8bit": 3e-3, "lion": 1e-3, "dadaptation": 0.1, "adafactor": 3e-3}
RELATIVES = {
    "pagedadamw": 3e-3,
    "pagedadamw8bit": 3e-3,
    "pagedadamw32bit": 3e-3,
    "lion8bit": 1e-3,
    "pagedlion8bit": 1e-3,
    "sgdnesterov": 1.0,
    "sgdnesterov8bit": 1.0,
    "dadaptadagrad": 1.0,
    "dadaptadam": 0.1,
    "dadaptadan": 1.0,
    "dadaptadanip": 1.0,
    "dadaptlion": 1.0,
    "dadaptsgd": 1.0,
    "package.Class": 3e-3,
}
"""Optimizers that are much like one of those, so that one network will do."""
SETTINGS = {name: {"d0": 1e-3} for name in RELATIVES if name.startswith("dadapt")}
PATHS = {"package.Class": "torch.optim.NAdam"}
# D-Adaptation starts from an estimate of 1e-6, and takes a while to find a larger one.
UPDATES = {name: 40 for name in [*LEARNING_RATES, *RELATIVES] if name.startswith("dadapt")}
OFFERED = [
    name
    for name, (found, *_) in Catalog.discover().of_kind(OptimizerConfig).items()
    if not found.component.takes_import_path
]
"""The names that `lorakit init --optimizer` takes."""
EXAMPLES = Path(__file__).parents[2] / "examples"
NETWORKS = {"lierla": {}, "c3lier": {"conv_rank": 2}}
OTHERS = {"loha": {"conv_rank": 2}, "lokr": {"factor": 4}}
"""Networks that are tried with one optimizer."""
STEPS = 12


def first_batch(run: Run) -> Batch:
    """The first micro-batch of a run."""
    return next(run.schedule.batches_from(0, run.loader))


def loss_on(run: Run, batch: Batch) -> Tensor:
    """The loss of the run's model as it is now."""
    run.flat.refresh()
    run.network.begin_batch(batch.sample_seeds)
    return denoising_loss(run.model, batch, run.encode(batch), run.criterion)


def train_on(run: Run, loss: Tensor) -> None:
    """One update on a loss."""
    run.backward(loss)
    run.update(next(run.schedule.steps_from(0, iter(()))))


def test_every_component_is_tried() -> None:
    """The tables above name exactly the optimizers and networks that lorakit itself registers."""
    own = [found for found in Catalog.discover().registrations if found.provider.distribution == "lorakit"]
    assert {r.component.name for r in own if issubclass(r.component, OptimizerConfig)} == {*LEARNING_RATES, *RELATIVES}
    assert {r.component.name for r in own if issubclass(r.component, NetworkConfig)} == {*NETWORKS, *OTHERS}


@pytest.mark.parametrize(
    ("optimizer", "network", "precision", "parts"),
    [
        *product(LEARNING_RATES, NETWORKS, ("no", "bf16"), (["unet"], ["unet", "text_encoder"])),
        *product(RELATIVES, ["lierla"], ["no"], [["unet", "text_encoder"]]),
        *product(["adamw"], OTHERS, ("no", "bf16"), (["unet"], ["unet", "text_encoder"])),
    ],
)
def test_loss_falls_on_a_repeated_batch(
    make_config, optimizer: str, network: str, precision: str, parts: list[str]
) -> None:
    """Some updates on one batch, its noise included, lower its loss by more than rounding can."""
    config = make_config(
        network={"name": network, "parts": parts, **{**NETWORKS, **OTHERS}[network]},
        optimizer={
            "name": PATHS.get(optimizer, optimizer),
            "lr": (LEARNING_RATES | RELATIVES)[optimizer],
            **SETTINGS.get(optimizer, {}),
        },
        training={"mixed_precision": precision},
        data={"batch_size": 2},
    )
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    batch = first_batch(run)
    before = loss_on(run, batch).item()
    for _ in range(UPDATES.get(optimizer, STEPS)):
        train_on(run, loss_on(run, batch))
    assert loss_on(run, batch).item() < 0.99 * before
    adapted = {key.split("_")[1] for key in run.network.adapter_state()}
    assert adapted == {{"unet": "unet", "text_encoder": "te"}[part] for part in parts}


@pytest.mark.parametrize("optimizer", OFFERED)
def test_what_init_writes_learns(make_config, catalog: Catalog, tmp_path: Path, optimizer: str) -> None:
    """With the rates, options and schedule that `lorakit init` writes, the loss falls from the start."""
    begun = plan_start(catalog, "subject", None, None, optimizer)
    written = tomllib.loads(short_config(begun, tmp_path / "config.toml"))
    sections = {name: written[name] for name in ("network", "optimizer", "lr_scheduler")}
    # A model that was trained, as estimates of learning rates can jump too far on such models alone.
    config = make_config(
        **sections,
        model={"path": str(EXAMPLES / "tiny-sd" / "model")},
        data={"image_dir": str(EXAMPLES / "quickstart" / "zorps"), "enable_wildcard": True},
        training={"max_steps": 24},
    )
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    batch, losses = first_batch(run), []
    for step in run.schedule.steps_from(0, repeat(batch)):
        loss = loss_on(run, batch)
        losses.append(loss.item())
        run.backward(loss)
        run.update(step)
        run.advance(step)
    # Estimates of learning rates start at 1e-6, and take longer than this to grow.
    assert losses[-1] < losses[0] * (1 - 1e-5)
    assert max(losses) < losses[0] * 1.001


def test_gradient_checkpointing_changes_nothing(make_config) -> None:
    """With recomputed activations, all or some, gradients are those of kept ones, dropout and text encoder included."""
    gradients = []
    for checkpointing in (False, True, 0.3):
        config = make_config(
            network={"name": "c3lier", "dropout": 0.2, "rank_dropout": 0.2},
            training={"gradient_checkpointing": checkpointing},
            data={"batch_size": 2},
        )
        run = build_run(prepare(config), Distributed(torch.device("cpu")))
        generator = torch.Generator().manual_seed(0)
        for parameter in run.network.parameters_of("unet"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        batch = first_batch(run)
        run.backward(loss_on(run, batch))
        parameters = [parameter for part in run.network.parts for parameter in run.network.parameters_of(part)]
        gradients.append([parameter.grad.clone() for parameter in parameters])
    for kept, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(gradient, kept) for gradient in recomputed)


def test_float16_is_scaled(make_config) -> None:
    """With fp16 the loss scale is on, an overflowing step is skipped, and the others train."""
    config = make_config(training={"mixed_precision": "fp16"}, network={"parts": ["unet"]}, optimizer={"lr": 3e-3})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    assert run.scaler.is_enabled()
    batch = first_batch(run)
    before = loss_on(run, batch).item()
    weights = run.network.parameters_of("unet")[0].clone()
    run.backward(loss_on(run, batch) * float("inf"))
    scale = run.scaler.get_scale()
    run.update(next(run.schedule.steps_from(0, iter(()))))
    assert run.scaler.get_scale() < scale
    assert torch.equal(weights, run.network.parameters_of("unet")[0])
    for _ in range(STEPS):
        train_on(run, loss_on(run, batch))
    assert loss_on(run, batch).item() < 0.99 * before


def test_min_snr_weights(make_config) -> None:
    """min-SNR multiplies each image's loss by min(SNR, γ)/SNR of its timestep."""
    run = build_run(prepare(make_config(data={"batch_size": 1})), Distributed(torch.device("cpu")))
    weighted = build_run(prepare(make_config(loss={"min_snr_gamma": 5.0})), Distributed(torch.device("cpu")))
    batch = first_batch(run)
    snr = run.model.noise.signal_to_noise(batch.timesteps).double()
    expected = loss_on(run, batch).double() * (snr.clamp(max=5) / snr).mean()
    torch.testing.assert_close(loss_on(weighted, batch).double(), expected, rtol=1e-5, atol=0)


def test_base_model_is_left_alone(make_config, tmp_path: Path) -> None:
    """Training changes no weight of the base model and gives gradients to none."""
    run = build_run(prepare(make_config()), Distributed(torch.device("cpu")))
    own = {id(p) for part in run.network.parts for p in run.network.parameters_of(part)}
    before = {name: p.clone() for name, p in run.model.denoiser.named_parameters() if id(p) not in own}
    batch = first_batch(run)
    train_on(run, loss_on(run, batch))
    assert before
    for name, parameter in run.model.denoiser.named_parameters():
        if name in before:
            assert parameter.grad is None
            assert torch.equal(before[name], parameter)
