import pytest

from dss.evaluation.significance import wilson_interval


def test_wilson_interval():
    low, high = wilson_interval(0, 50)
    assert low == 0
    assert 0.06 < high < 0.08
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(1, 0)
