"""A config of the reader is refused at once if a value cannot work."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from dmagent_loader import ReadingConfig
from dmagent_loader.errors import ConfigurationError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shuffle_window": 1.5}, "shuffle_window is 1.5"),
        ({"shuffle_window": float("nan")}, "shuffle_window is nan"),
        ({"shuffle_window": 0}, "shuffle_window is 0; it must be at least 1"),
        ({"shuffle_shards": 0}, "shuffle_shards is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"prefetch_factor": 0}, "prefetch_factor is 0; it must be at least 1"),
        ({"prefetch_factor": True}, "prefetch_factor is True"),
        ({"num_threads": -1}, "num_threads is -1"),
        ({"num_threads": None}, "num_threads is None"),
        ({"num_rows": 0}, "num_rows is 0"),
        ({"block_cache_bytes": -1}, "block_cache_bytes is -1; it must be at least 0"),
        ({"block_cache_bytes": "1GB"}, "block_cache_bytes is '1GB'"),
        ({"block_cache_dir": 7}, "block_cache_dir is 7; it must be a path"),
        ({"on_damage": "ignore"}, "on_damage is 'ignore'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_refuses_values_of_another_type_by_name(setting, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ReadingConfig(**setting)


def test_a_config_does_not_change_and_takes_numpys_integers():
    config = ReadingConfig(batch_size=np.int64(4), num_threads=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch_size = 8
    with pytest.raises(ConfigurationError, match="num_rows is 0"):
        dataclasses.replace(config, num_rows=0)
