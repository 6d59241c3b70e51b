import numpy as np
import pytest

from dss.planning.typical import typical_store


def test_lengths_have_the_given_means():
    for inputs, targets in ((48.5, 16.9), (200, 60)):
        store = typical_store(1000, inputs, targets)
        label, rationale = store.tasks
        assert label.inputs.lengths.mean() == pytest.approx(inputs, rel=0.02)
        both = np.concatenate([label.targets.lengths, rationale.targets.lengths])
        assert both.mean() == pytest.approx(targets, rel=0.03)
        assert label.targets.lengths.max() < rationale.targets.lengths.mean()
        assert label.inputs.tokens.min() >= 3
