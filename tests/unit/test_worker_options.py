from __future__ import annotations

from typing import Any

import pytest

from loader.errors import LoadFailed
from loader.recipe import Recipe
from loader.worker_options import settings_of
from registry.names import ModelName, Version


def recipe(**fields: Any) -> Recipe:
    return Recipe(ModelName("m"), Version("1"), "/models/m", **fields)


def test_defaults():
    settings = settings_of(recipe())
    assert (settings.gpu, settings.threads, settings.onednn) == (None, 1, True)


def test_a_gpu_by_index():
    assert settings_of(recipe(device="gpu:3", precision="fp16")).gpu == 3
    assert settings_of(recipe(device="gpu")).gpu == 0
    assert not settings_of(recipe(device="gpu")).onednn


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"options": {"onedn": True}}, "predictor.options.onedn: unknown"),
        ({"options": {"onednn": 1}}, "predictor.options.onednn: want true or false"),
        ({"options": {"onednn_cache": True}}, "predictor.options.onednn_cache"),
        ({"options": {"optimization_level": 4}}, "predictor.options.optimization_level"),
        ({"options": {"memory_optim": True}}, "predictor.options.memory_optim: refused"),
        ({"options": {"trt": True}}, "predictor.options.trt: refused"),
        ({"options": {"passes_deleted": "a_pass"}}, "predictor.options.passes_deleted"),
        ({"device": "tpu"}, "placement.device"),
        ({"device": "gpu:x"}, "placement.device"),
        ({"precision": "fp16"}, "predictor.precision"),
        ({"precision": "bf16", "options": {"onednn": False}}, "predictor.precision"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], named: str):
    with pytest.raises(LoadFailed) as caught:
        settings_of(recipe(**fields))
    assert named in str(caught.value)
