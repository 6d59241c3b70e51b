import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dss.data.packing import RowShape, choose_row_shape, pack

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=60)


@given(LENGTHS, st.integers(20, 50), st.integers(10, 30))
@settings(max_examples=60, deadline=None)
def test_every_sequence_has_slots_of_its_own(lengths, inputs, targets):
    input_lengths, target_lengths = np.array(lengths).T
    packing = pack(input_lengths, target_lengths, RowShape(inputs, targets))
    sides = (
        (packing.input_start, input_lengths, inputs),
        (packing.target_start, target_lengths, targets),
    )
    for starts, sizes, width in sides:
        used = np.zeros((packing.num_rows, width), int)
        for row, start, size in zip(packing.row, starts, sizes, strict=True):
            assert start + size <= width
            used[row, start : start + size] += 1
        assert used.max() == 1
        assert used.sum() == sizes.sum()
    for row in range(packing.num_rows):
        segments = sorted(packing.segment[packing.row == row])
        assert segments == list(range(1, len(segments) + 1))


def test_the_chosen_shape_fits_everything_and_wastes_little():
    rng = np.random.default_rng(0)
    batches = [(rng.integers(20, 60, 64), rng.integers(2, 40, 64)) for _ in range(4)]
    shape = choose_row_shape(batches, (70, 45))
    assert shape.inputs >= 70
    assert shape.targets >= 45
    for inputs, targets in batches:
        rows = pack(inputs, targets, shape).num_rows
        assert inputs.sum() / (rows * shape.inputs) > 0.75
