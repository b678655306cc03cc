"""Whole runs: files, repetition, resuming, interruption, and several processes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorakit
from lorakit.api.observer import Observer
from lorakit.errors import ConfigError, Interrupted, TrainingDiverged
from lorakit.plugins.catalog import Catalog
from lorakit.training.loop import train
from lorakit.training.observers import Observers
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import add_observers, build_run, run_training


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    return load_file(path)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def nearly_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether up matrices, which start at zero, differ by rounding at most, which an optimizer may have amplified."""
    ups = [key for key in right if key.endswith("lora_up.weight")]
    first, second = (torch.cat([tensors[key].flatten() for key in ups]) for tensors in (left, right))
    return left.keys() == right.keys() and bool((first - second).norm() < 1e-3 * second.norm())


def write_config(tables: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Path:
    """A config file with changed sections."""
    merged = {key: {**value, **sections.get(key, {})} for key, value in tables.items()}
    merged |= {key: value for key, value in sections.items() if key not in merged}
    path = folder / "config.toml"
    path.write_text(tomlkit.dumps(merged))
    return path


def run_lorakit(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, *launcher, "-m", "lorakit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_files_of_a_run(make_config, catalog: Catalog) -> None:
    """A run leaves its epochs' files, the final file and the resolved config, and nothing else."""
    config = make_config(
        training={"max_epochs": 4, "max_steps": 1},
        output={"save_every_n_epochs": 1, "keep_last": 2},
    )
    final = run_training(prepare(config), catalog)
    assert sorted(path.name for path in config.output.dir.iterdir()) == [
        "test-000002.safetensors",
        "test-000003.safetensors",
        "test.config.toml",
        "test.safetensors",
    ]
    assert final == config.output.dir / "test.safetensors"


def test_saves_every_n_steps(make_config, catalog: Catalog) -> None:
    """Files of steps carry the step in eight digits, and the last step is only the final file."""
    config = make_config(output={"save_every_n_steps": 2})
    run_training(prepare(config), catalog)
    assert sorted(path.name for path in config.output.dir.glob("*.safetensors")) == [
        "test-step00000002.safetensors",
        "test-step00000004.safetensors",
        "test.safetensors",
    ]


def test_resolved_config_repeats_the_run(make_config, tmp_path: Path) -> None:
    """Training from the config that a run left gives the same file, bit for bit."""
    first = lorakit.train(make_config())
    again = lorakit.train(first.with_name("test.config.toml"), overrides=[f"output.dir={tmp_path / 'again'}"])
    assert first != again
    assert same(weights_of(first), weights_of(again))


def test_seed_decides(make_config) -> None:
    """Another seed gives another file."""
    first = weights_of(lorakit.train(make_config()))
    other = weights_of(lorakit.train(make_config(training={"seed": 43}, output={"name": "other"})))
    assert first.keys() == other.keys()
    assert not same(first, other)


def test_metadata_is_what_webuis_read(make_config) -> None:
    """The header holds text only, JSON where a reader parses it, and hashes that are right."""
    config = make_config(model={"clip_skip": 2}, network={"name": "c3lier", "conv_rank": 2})
    path = lorakit.train(config)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "2"
    assert metadata["ss_clip_skip"] == "2"
    assert metadata["ss_output_name"] == "test"
    assert metadata["ss_steps"] == "6"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    folders = json.loads(metadata["ss_dataset_dirs"])
    assert sum(folder["img_count"] for folder in folders.values()) == int(metadata["ss_num_train_images"])
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"]["resolution"] == [64, 64]
    assert json.loads(metadata["ss_tag_frequency"])
    assert "lora_adapter_metadata" not in metadata


EVERY_LOSS_OPTION = {
    "type": "huber",
    "huber_schedule": "exponential",
    "huber_c": 0.2,
    "huber_scale": 0.9,
    "min_snr_gamma": 5.0,
    "debiased_estimation": True,
    "scale_v_pred_loss_like_noise_pred": True,
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.05,
    "multires_noise_iterations": 4,
    "multires_noise_discount": 0.4,
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
    "zero_terminal_snr": True,
    "min_timestep": 10,
    "max_timestep": 1000,
}


def test_every_loss_option_at_once(make_config, catalog: Catalog) -> None:
    """A run with all options of the loss that go together ends, and again, resumed half-way, with the same weights."""
    sections = {"model": {"prediction": "v_prediction"}, "loss": EVERY_LOSS_OPTION, "data": {"batch_size": 2}}
    whole, plain = make_config(**sections), make_config(model=sections["model"], data=sections["data"])
    assert whole.loss.name == "huber"
    for key in EVERY_LOSS_OPTION.keys() - {"type"}:
        assert getattr(whole.loss, key) != getattr(plain.loss, key)
    final = weights_of(run_training(prepare(whole), catalog))
    assert all(tensor.isfinite().all() for tensor in final.values())
    assert not same(final, weights_of(run_training(prepare(plain), catalog)))
    saving = make_config(**sections, output={"save_every_n_steps": 3, "save_state": True})
    run_training(prepare(saving), catalog)
    assert same(final, weights_of(run_training(prepare(saving), catalog, resume="latest")))


def test_metadata_of_the_loss(make_config, catalog: Catalog) -> None:
    """Each option of the loss is in the header, under sd-scripts' name and as Python prints it."""
    config = make_config(model={"prediction": "v_prediction"}, loss=EVERY_LOSS_OPTION, training={"max_steps": 1})
    with safe_open(run_training(prepare(config), catalog), "pt") as file:
        metadata = file.metadata()
    names = {"type": "loss_type"}
    expected = {f"ss_{names.get(key, key)}": str(value) for key, value in EVERY_LOSS_OPTION.items()}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["ss_v_pred_like_loss"] == "None"


def test_loss_that_does_not_suit_what_the_model_predicts(make_config, tiny_sd1_file: Path) -> None:
    """Where the model's files say what it predicts, the config is refused; where nothing does, the run is."""
    loss = {"scale_v_pred_loss_like_noise_pred": True}
    expected = r"loss\.scale_v_pred_loss_like_noise_pred: is for models that predict the vel"
    with pytest.raises(ConfigError, match=expected):
        make_config(loss=loss)
    config = make_config(model={"path": str(tiny_sd1_file)}, loss=loss)
    with pytest.raises(ConfigError, match=expected):
        build_run(prepare(config), Distributed(torch.device("cpu")))


VARIED_CAPTIONS = {
    "shuffle_caption": True,
    "caption_tag_dropout_rate": 0.2,
    "caption_dropout_rate": 0.2,
    "enable_wildcard": True,
    "caption_suffix": ", {red|green|blue}",
    "token_warmup_step": 0.9,
}


def with_regularisation(folder: str) -> dict[str, Any]:
    """The [data] keys of a folder twice in one dataset, the second time as regularisation images."""
    subsets = [{"image_dir": folder, "num_repeats": 2}, {"image_dir": folder, "is_reg": True}]
    return {"prior_loss_weight": 0.5, "datasets": [{"resolution": 64, "subsets": subsets}]}


def test_regularisation_images_in_a_run(tables: dict[str, Any], make_config) -> None:
    """They count in the metadata on their own, are left out of the folders, and their weight changes the result."""
    folder = tables["data"].pop("image_dir")
    del tables["data"]["resolution"]
    path = lorakit.train(make_config(data=with_regularisation(folder)))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_num_reg_images"] == metadata["ss_num_train_images"] != "0"
    assert metadata["ss_prior_loss_weight"] == "0.5"
    (described,) = json.loads(metadata["ss_datasets"])
    assert described["num_reg_images"] == int(metadata["ss_num_reg_images"])
    assert [subset["is_reg"] for subset in described["subsets"]] == [False, True]
    ((name, listed),) = json.loads(metadata["ss_dataset_dirs"]).items()
    assert (name, listed["n_repeats"]) == (Path(folder).name, 2)
    assert 2 * listed["img_count"] == int(metadata["ss_num_train_images"])
    data = {**with_regularisation(folder), "prior_loss_weight": 1.0}
    assert not same(weights_of(path), weights_of(lorakit.train(make_config(data=data, output={"name": "full"}))))


def test_varied_captions_resume_exactly(make_config, catalog: Catalog) -> None:
    """Captions with every option, in a run that is stopped and resumed, are those of the uninterrupted run."""
    sections = {"data": VARIED_CAPTIONS, "training": {"max_steps": 7}}
    whole = lorakit.train(make_config(**sections, output={"name": "whole"}))
    stopped = make_config(**sections)
    with pytest.raises(Interrupted, match="step 3 of 7"):
        train_until(build_run(prepare(stopped), Distributed(torch.device("cpu"))), 3)
    assert same(weights_of(whole), weights_of(run_training(prepare(stopped), catalog, resume="latest")))
    plain = lorakit.train(make_config(training={"max_steps": 7}, output={"name": "plain"}))
    assert not same(weights_of(whole), weights_of(plain))


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw8bit", "lion", "dadaptation", "dadaptsgd", "adafactor", "torch.optim.RAdam"]
)
def test_resumed_run_is_bit_equal(make_config, catalog: Catalog, optimizer: str) -> None:
    """A run stopped in mid-epoch and resumed ends as the uninterrupted one, with dropout and accumulation."""
    sections = {
        "network": {"dropout": 0.1},
        "optimizer": {"name": optimizer},
        "lr_scheduler": {"name": "cosine"},
        "training": {"max_steps": 6, "gradient_accumulation_steps": 3},
    }
    whole = lorakit.train(make_config(**sections, output={"name": "whole"}))
    stopped = make_config(**sections)
    with pytest.raises(Interrupted, match="step 3 of 6"):
        train_until(build_run(prepare(stopped), Distributed(torch.device("cpu"))), 3)
    assert not (stopped.output.dir / "test.safetensors").exists()
    resumed = run_training(prepare(stopped), catalog, resume="latest")
    assert same(weights_of(whole), weights_of(resumed))


def train_until(run: Run, last: int) -> None:
    """Train, with a request to stop that comes during a step."""
    train_handle_until(RunHandle(run), last)


def train_handle_until(handle: RunHandle, last: int) -> None:
    """Train, with a request to stop that comes during a step."""

    class Stop(Observer):
        def step_finished(self, step: int) -> None:
            handle.stop.signalled |= step == last

    handle.observers.add("stop", Stop(), first=True)
    train(handle)


def test_stop_at_the_end_of_an_epoch_loses_no_save(make_config, catalog: Catalog) -> None:
    """A request to stop in an epoch's last step is heeded after the epoch's own save."""
    config = make_config(output={"save_every_n_epochs": 1})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    assert run.schedule.steps_per_epoch == 4
    handle = RunHandle(run)
    add_observers(handle, catalog)
    with pytest.raises(Interrupted, match="step 4 of 6"):
        train_handle_until(handle, 4)
    assert (config.output.dir / "test-000001.safetensors").exists()


def test_state_of_another_config_is_refused(make_config, catalog: Catalog) -> None:
    """A state is not taken up by a run whose result would be neither of the two."""
    with pytest.raises(Interrupted):
        train_until(build_run(prepare(make_config()), Distributed(torch.device("cpu"))), 2)
    with pytest.raises(ConfigError, match="another config"):
        run_training(prepare(make_config(optimizer={"lr": 2e-3})), catalog, resume="latest")
    with pytest.raises(ConfigError, match="no state"):
        run_training(prepare(make_config(output={"name": "unknown"})), catalog, resume="latest")


def test_a_longer_run_may_go_on(make_config, catalog: Catalog) -> None:
    """A state may be taken up by the same config with more steps."""
    whole = lorakit.train(make_config(training={"max_steps": 8}, output={"name": "whole"}))
    lorakit.train(make_config(output={"save_state": True}))
    longer = run_training(prepare(make_config(training={"max_steps": 8})), catalog, resume="latest")
    assert same(weights_of(whole), weights_of(longer))


def test_infinite_loss_stops_the_run(make_config, catalog: Catalog) -> None:
    """A diverging run names step, images and cure, and keeps what was saved before."""
    config = make_config(
        optimizer={"name": "lion", "lr": 1e30}, training={"max_steps": 50}, output={"save_every_n_steps": 1}
    )
    with pytest.raises(TrainingDiverged, match=r"step \d+: .*(nan|inf).*\.png.*Lower optimizer\.lr") as caught:
        run_training(prepare(config), catalog)
    failed = int(str(caught.value).split("step ")[1].split(":")[0])
    assert failed > 1
    assert not (config.output.dir / "test.safetensors").exists()
    saved = sorted(config.output.dir.glob("test-step*.safetensors"))
    assert len(saved) == failed - 1
    assert all(tensor.isfinite().all() for path in saved for tensor in weights_of(path).values())


def test_failing_observer_is_detached(make_config, catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    """An observer that raises is named and left out; the run goes on to its end."""

    class Broken(Observer):
        def step_finished(self, step: int) -> None:
            raise ValueError(f"no step {step} for me")

    config = make_config()
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    steps: list[int] = []
    counting = Observer()
    counting.step_finished = steps.append  # type: ignore[method-assign]
    train(RunHandle(run, Observers([("broken", False, Broken()), ("counting", False, counting)])))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert caplog.text.count("no step") == 1


def test_signal_saves_a_state(tables: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM ends the command with 130 after a whole state is saved, and --resume goes on from it."""
    path = write_config(tables, tmp_path, training={"max_steps": 60})
    whole = run_lorakit("train", path, "--set", "output.name=whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "lorakit", "train", str(path), "--set", "output.save_every_n_steps=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("test-step*.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "test.safetensors").exists()
    resumed = run_lorakit("train", path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step" in resumed.stderr
    out = tmp_path / "out"
    assert same(weights_of(out / "whole.safetensors"), weights_of(out / "test.safetensors"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(tables: dict[str, Any], tmp_path: Path, accumulation: int) -> None:
    """Two processes with batch size 1 give what one with batch size 2 gives, up to the order of summation.

    Between the epochs one of them validates while the other waits, and draws previews, of which there is one set.
    One process with batch size 2 goes on from their state in mid-epoch, to the same end.
    """
    training = {"max_steps": 4, "gradient_accumulation_steps": accumulation}
    # With its usual eps, Adam takes full steps where a gradient is nothing but rounding.
    sections = {"network": {"rank_dropout": 0.2}, "optimizer": {"eps": 0.01}, "data": {"validation_split": 0.25}}
    path = write_config(tables, tmp_path, training=training, **sections)
    alone = run_lorakit("train", path, "--set", "data.batch_size=2", "--set", "output.name=alone")
    assert alone.returncode == 0, alone.stderr
    options = ("--cpu", "--num_processes", "2", "--main_process_port", str(_free_port()))
    launcher = ("-m", "accelerate.commands.launch", *options)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1")
    previews = 'observers=[{ name = "samples", prompts = "prompts.txt", every_n_steps = 2 }]'
    states = [f"--set=output.{key}" for key in ("save_every_n_steps=1", "save_state=true", "keep_last_states=9")]
    together = run_lorakit("train", path, "--set", previews, *states, launcher=launcher)
    assert together.returncode == 0, together.stderr
    assert alone.stderr.count("validation loss") == together.stderr.count("validation loss") >= 2
    assert len(list((tmp_path / "out" / "sample").glob("test_*_00_*.png"))) == 2
    changes = ("--set", "data.batch_size=2", "--set", "output.name=resumed")
    resumed = run_lorakit("train", path, *changes, "--resume", tmp_path / "out" / "test-state" / "step00000001")
    assert resumed.returncode == 0, resumed.stderr
    left = weights_of(tmp_path / "out" / "alone.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in left.items() if "lora_up" in key)
    for name in ("test", "resumed"):
        right = weights_of(tmp_path / "out" / f"{name}.safetensors")
        assert left.keys() == right.keys()
        for key in left:
            # Rounding is a larger part of small gradients; other images or another scale would differ by all of it.
            assert (right[key] - left[key]).norm() <= 1e-2 * left[key].norm() + 1e-9, key


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
