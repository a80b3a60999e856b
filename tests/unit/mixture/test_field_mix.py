"""A mix may be given by field."""

import numpy as np
import pytest

from dmagent_loader.errors import DomainError, MixError
from dmagent_loader.mixture.domains import DomainSpace

SPACE = DomainSpace.from_names(["source/a", "source/b", "target/x"])
ROWS = np.array([30.0, 10.0, 5.0])


def test_a_fields_weight_is_split_by_shares_and_adds_to_a_domains_own():
    assert SPACE.mix({"source": 0.8, "target": 0.2}, shares=ROWS).tolist() == pytest.approx([0.6, 0.2, 0.2])
    assert SPACE.mix({"source": 0.4, "source/b": 0.6}, shares=ROWS).tolist() == pytest.approx([0.3, 0.7, 0.0])


def test_without_shares_a_field_is_no_domain():
    with pytest.raises(DomainError, match="source"):
        SPACE.mix({"source": 1.0})
    with pytest.raises(MixError, match=r"sums to 0\.5"):
        SPACE.mix({"source": 0.5}, shares=ROWS)


def test_a_domain_that_is_named_like_its_field_is_meant_itself():
    space = DomainSpace.from_names(["source", "target"])
    assert space.mix({"source": 0.25, "target": 0.75}, shares=np.ones(2)).tolist() == [0.25, 0.75]
