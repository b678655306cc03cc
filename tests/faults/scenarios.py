"""Runs of many kinds, all to end as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCENARIOS: Mapping[str, Mapping[str, Any]] = {
    "adamw, accumulation, dropouts, varied captions": {
        "network": {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1},
        "data": {"shuffle_caption": True, "caption_dropout_rate": 0.2, "caption_tag_dropout_rate": 0.2},
        "lr_scheduler": {"name": "cosine"},
        "training": {"max_steps": 8, "gradient_accumulation_steps": 3},
        "output": {"save_every_n_steps": 1},
    },
    "adamw8bit, warm-up, keep_last": {
        "optimizer": {"name": "adamw8bit"},
        "lr_scheduler": {"name": "constant_with_warmup", "warmup_steps": 4},
        "data": {"batch_size": 2},
        "output": {"save_every_n_steps": 1, "keep_last": 2, "keep_last_states": 2},
    },
    "lion, text encoder": {
        "network": {"parts": ["unet", "text_encoder"], "dropout": 0.1},
        "optimizer": {"name": "lion", "lr": 1e-4},
        "lr_scheduler": {"name": "cosine_with_restarts"},
    },
    "dadaptation, previews": {
        "optimizer": {"name": "dadaptation", "lr": 1.0},
        "output": {"save_every_n_epochs": 1},
        "observers": [{"name": "samples", "prompts": "prompts.txt", "every_n_steps": 2}],
    },
    "adafactor, images that vary": {
        "optimizer": {"name": "adafactor"},
        "data": {"random_crop": True, "color_aug": True, "encode_batch_size": 2},
    },
    "RAdam by its path, DoRA, validation": {
        "network": {"dora": True, "scale_weight_norms": 1.0},
        "optimizer": {"name": "torch.optim.RAdam"},
        "lr_scheduler": {"name": "polynomial"},
        "data": {"validation_split": 0.25},
        "observers": [{"name": "validation", "every_n_steps": 2}],
    },
    "Nesterov, convolutions, offset noise": {
        "network": {"name": "c3lier", "conv_rank": 2},
        "optimizer": {"name": "sgdnesterov"},
        "loss": {"noise_offset": 0.1, "min_snr_gamma": 5.0, "type": "huber"},
        "training": {"gradient_accumulation_steps": 2},
    },
}
"""By name, what they change in the tables of the small run."""

PROMPTS = "a cat --w 64 --h 64 --s 2\n"
