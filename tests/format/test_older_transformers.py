"""What `modeling_lowrank.py` does for transformers 4; `make test-remote-4.57` loads there."""

from typing import Any

import pytest

from hf_lowrank.format.native_classes import name_as_in_4_


class Config:
    """A config of version 4, where what it does not know becomes an attribute."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)

    def get_text_config(self) -> Any:
        return self


def old(**rope_parameters):
    config = Config(rope_parameters=rope_parameters) if rope_parameters else Config()
    name_as_in_4_(config)
    return vars(config)


def test_the_rotary_base_is_named_as_version_4_does():
    found = old(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.25)
    assert (found["rope_theta"], found["partial_rotary_factor"]) == (500.0, 0.25)
    assert found["rope_scaling"] is None


def test_scaled_rotary_settings_are_kept_whole():
    settings = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert old(**settings)["rope_scaling"] == settings


def test_a_config_without_rotary_settings_is_left_alone():
    assert "rope_theta" not in old()


def test_settings_for_each_kind_of_layer_are_refused():
    message = r"rope_parameters for each kind of layer \(full, sliding\), .* install version 5"
    with pytest.raises(ValueError, match=message):
        old(full={"rope_theta": 1.0}, sliding={"rope_theta": 2.0})
