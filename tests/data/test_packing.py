import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dss.data.packing import choose_shapes, choose_widths, deal, members, next_fit

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=60)


@given(LENGTHS, st.integers(20, 50), st.integers(10, 30))
@settings(max_examples=60, deadline=None)
def test_rows_hold_consecutive_sequences_and_no_more_than_their_width(lengths, inputs, targets):
    rows = next_fit(np.array([lengths]), (inputs, targets))[0]
    assert rows[0] == 0
    assert set(np.diff(rows)) <= {0, 1}
    for row in range(rows.max() + 1):
        held = np.array(lengths)[rows == row].sum(axis=0)
        assert (held <= (inputs, targets)).all()
        if row < rows.max():
            next_one = lengths[np.flatnonzero(rows == row + 1)[0]]
            assert (held + next_one > (inputs, targets)).any()


def test_padding_of_a_list_takes_no_row():
    lengths = np.array([[[5, 1], [5, 1], [5, 1]], [[5, 1], [0, 0], [0, 0]]])
    assert next_fit(lengths, (6, 6)).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_groups_get_nearly_equal_shares_of_both_sides():
    lengths = np.random.default_rng(0).integers(1, 60, (5, 64, 2))
    groups = deal(lengths, 4)
    assert deal(lengths, 1).max() == 0
    for one, group in zip(lengths, groups, strict=True):
        loads = np.stack([one[group == g].sum(axis=0) for g in range(4)])
        assert (loads.max(axis=0) <= 1.03 * loads.mean(axis=0)).all()


def test_rows_are_wide_enough_for_the_longest_and_balanced_for_cross_attention():
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(20, 60, (4, 64)), rng.integers(2, 40, (4, 64))], axis=-1)
    widths = choose_widths(lengths, (70, 45))
    assert widths.inputs >= 70
    assert widths.cross >= 70
    assert widths.targets >= 45
    # Sequences here differ in length: a row for each would have half as many scores again.
    rows = next_fit(lengths[..., :1], (widths.inputs,))[:, -1].mean() + 1
    assert rows * widths.inputs**2 < 64 * 72**2


def test_at_most_three_shapes_fit_every_step_and_waste_little():
    rng = np.random.default_rng(0)
    slots = np.stack([rng.normal(3000, 150, 500), rng.normal(1200, 100, 500)], axis=1)
    needed = np.concatenate([slots, slots / 60], axis=1).astype(int)
    shapes = np.array([dataclasses.astuple(s) for s in choose_shapes(needed)])
    assert 1 < len(shapes) <= 3
    assert (np.diff(shapes, axis=0) >= 0).all()
    fits = (needed[:, None] <= shapes).all(axis=2)
    assert fits[:, -1].all()
    taken = shapes[fits.argmax(axis=1)]
    assert (needed[:, :2].sum(axis=0) / taken[:, :2].sum(axis=0) > 0.9).all()


@pytest.mark.parametrize(("steps", "spread", "shapes"), [(20, 1, 1), (2000, 1, 3), (20, 4, 3)])
def test_a_shape_is_worth_compiling_in_a_long_run_or_for_what_is_not_full(steps, spread, shapes):
    slots = np.random.default_rng(0).normal([3000, 1200], [90 * spread, 36 * spread], (steps, 2))
    needed = np.concatenate([slots, slots / 60], axis=1).astype(int)
    assert len(choose_shapes(needed)) == shapes


def test_equal_steps_need_one_shape():
    needed = np.tile([100, 50, 3, 2], (20, 1))
    (shape,) = choose_shapes(needed)
    assert dataclasses.astuple(shape) == (112, 64, 3, 2)


@pytest.mark.parametrize("groups", [8, 64, 96, 127])
def test_many_groups_are_nearly_equal_too(groups):
    lengths = np.random.default_rng(0).integers(2, [60, 30], (3, 8 * groups, 2))
    group = deal(lengths, groups)
    load = np.zeros((3, groups, 2))
    for x in range(3):
        np.add.at(load[x], group[x], lengths[x])
    assert (load.max(axis=1) <= 1.12 * load.mean(axis=1)).all()


def test_the_members_of_groups_are_their_items_in_order():
    items, there = members(np.array([[1, 0, 1, 1], [2, 2, 0, 0]]), 3)
    found = [
        [row[t].tolist() for row, t in zip(*both, strict=True)]
        for both in zip(items, there, strict=True)
    ]
    assert found == [[[1], [0, 2, 3], []], [[2, 3], [], [0, 1]]]
