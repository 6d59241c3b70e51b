import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dss.batches.packing import (
    PackedShape,
    RowWidths,
    balance_groups,
    balance_steps,
    choose_shapes,
    choose_widths,
    group_members,
    next_fit,
)

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=60)


@given(LENGTHS, st.integers(20, 50), st.integers(10, 30))
@settings(max_examples=60, deadline=None)
def test_next_fit_fills_rows_with_consecutive_sequences_up_to_their_width(lengths, inputs, targets):
    rows = next_fit(np.array([lengths]), (inputs, targets))[0]
    assert rows[0] == 0
    assert set(np.diff(rows)) <= {0, 1}
    for row in range(rows.max() + 1):
        held = np.array(lengths)[rows == row].sum(axis=0)
        assert (held <= (inputs, targets)).all()
        if row < rows.max():
            next_one = lengths[np.flatnonzero(rows == row + 1)[0]]
            assert (held + next_one > (inputs, targets)).any()


def test_next_fit_gives_padding_no_row():
    lengths = np.array([[[5, 1], [5, 1], [5, 1]], [[5, 1], [0, 0], [0, 0]]])
    assert next_fit(lengths, (6, 6)).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_balanced_groups_have_nearly_equal_input_and_target_tokens():
    lengths = np.random.default_rng(0).integers(1, 60, (5, 64, 2))
    groups = balance_groups(lengths, 4)
    assert balance_groups(lengths, 1).max() == 0
    for one, group in zip(lengths, groups, strict=True):
        loads = np.stack([one[group == g].sum(axis=0) for g in range(4)])
        assert (loads.max(axis=0) <= 1.03 * loads.mean(axis=0)).all()


def test_balanced_steps_have_nearly_equal_input_and_target_tokens():
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(20, 90, (16, 36)), rng.integers(2, 40, (16, 36))], axis=-1)
    source_steps = balance_steps(lengths, np.zeros((16, 36), int))
    assert np.sort(source_steps, axis=0).tolist() == [[step] * 36 for step in range(16)]
    before = lengths.sum(axis=1).std(axis=0)
    after = np.take_along_axis(lengths, source_steps[..., None], axis=0).sum(axis=1).std(axis=0)
    assert (after < before / 4).all()


def test_balancing_steps_of_equal_items_changes_nothing():
    source_steps = balance_steps(np.full((5, 3, 2), 7), np.zeros((5, 3), int))
    assert source_steps.tolist() == [[step] * 3 for step in range(5)]


def test_steps_without_targets_are_balanced_by_their_inputs():
    lengths = np.array([[[9, 0], [8, 0]], [[2, 0], [1, 0]]])
    assert balance_steps(lengths, np.zeros((2, 2), int)).tolist() == [[0, 1], [1, 0]]


def test_balancing_steps_keeps_items_in_their_epoch():
    lengths = np.random.default_rng(0).integers(1, 90, (8, 12, 2))
    epochs = np.arange(8 * 12).reshape(8, 12) // 37
    source_steps = balance_steps(lengths, epochs)
    assert (np.take_along_axis(epochs, source_steps, axis=0) == epochs).all()
    assert (source_steps != np.arange(8)[:, None]).any()


def test_chosen_widths_fit_the_longest_sequence_and_save_attention_scores():
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(20, 60, (4, 64)), rng.integers(2, 40, (4, 64))], axis=-1)
    widths = choose_widths(lengths, (70, 45))
    assert widths.inputs >= 70
    assert widths.cross >= 70
    assert widths.targets >= 45
    # A row for each sequence would have 1.5 times as many scores.
    rows = next_fit(lengths[..., :1], (widths.inputs,))[:, -1].mean() + 1
    assert rows * widths.inputs**2 < 64 * 72**2


WIDE, NARROW = RowWidths(100, 60, 200), RowWidths(60, 40, 100)


def steps_of(
    num_steps: int, spread: float = 1.0, narrow: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the slots and rows that steps need; a fraction `narrow` has only short sequences."""
    rng = np.random.default_rng(0)
    slots = rng.normal([3000, 1200], [90 * spread, 36 * spread], (num_steps, 2)).astype(int)
    short = (np.arange(num_steps) % 10 < 10 * narrow)[:, None]
    rows = np.stack([slots // (50, 30), slots // (90, 50)], axis=1)
    return np.concatenate([slots, np.where(short, (55, 40), (95, 60))], axis=1), rows


@pytest.mark.parametrize("narrow", [0.0, 0.6])
def test_at_most_three_shapes_fit_every_step_with_little_padding(narrow):
    needed, rows = steps_of(500, spread=2, narrow=narrow)
    widths = [NARROW, WIDE]
    shapes = choose_shapes(needed, rows, widths)
    assert 1 < len(shapes) <= 3
    work = [shape.work for shape in shapes]
    assert work == sorted(work)
    fits = np.stack([shape.fits(needed) for shape in shapes], axis=1)
    assert fits[:, -1].all()
    taken = [shapes[s] for s in fits.argmax(axis=1)]
    for shape, needs, has in zip(taken, needed, rows, strict=True):
        assert (has[widths.index(shape.widths)] <= (shape.input_rows, shape.target_rows)).all()
        assert shape.widths == WIDE or tuple(needs[2:]) == (55, 40)
    held = np.array([(shape.inputs, shape.targets) for shape in taken])
    assert (needed[:, :2].sum(axis=0) / held.sum(axis=0) > 0.9).all()


@pytest.mark.parametrize(("steps", "spread", "shapes"), [(20, 1, 1), (2000, 1, 3), (20, 4, 3)])
def test_a_shape_is_added_if_it_saves_time_or_the_fill_rate_is_low(steps, spread, shapes):
    assert len(choose_shapes(*steps_of(steps, spread), [NARROW, WIDE])) == shapes


@pytest.mark.parametrize(("narrow", "shapes"), [(0.0, 1), (0.8, 2)])
def test_a_shape_with_narrow_rows_is_added_if_few_steps_have_long_sequences(narrow, shapes):
    needed, rows = steps_of(500, spread=0, narrow=narrow)
    chosen = choose_shapes(needed, rows, [NARROW, WIDE])
    assert [shape.widths for shape in chosen] == [NARROW, WIDE][-shapes:]
    assert len({(shape.inputs, shape.targets) for shape in chosen}) == 1


def test_equal_steps_need_one_shape():
    needed, rows = np.tile([100, 50, 60, 30], (20, 1)), np.tile([[[3, 2]]], (20, 1, 1))
    assert choose_shapes(needed, rows, [WIDE]) == (PackedShape(112, 64, 3, 2, WIDE),)


def test_fit_and_work_of_a_shape():
    shape = PackedShape(inputs=100, targets=50, input_rows=2, target_rows=1, widths=NARROW)
    fits = [(100, 50, 60, 40), (101, 50, 60, 40), (100, 50, 61, 40), (100, 51, 60, 41)]
    assert shape.fits(np.array(fits)).tolist() == [True, False, False, False]
    wider = dataclasses.replace(shape, widths=WIDE)
    assert wider.work - shape.work == (2 * (100**2 - 60**2) + 60 * 260 - 40 * 140) / 800


@pytest.mark.parametrize("groups", [8, 64, 96, 127])
def test_many_groups_are_nearly_equal(groups):
    lengths = np.random.default_rng(0).integers(2, [60, 30], (3, 8 * groups, 2))
    group = balance_groups(lengths, groups)
    load = np.zeros((3, groups, 2))
    for x in range(3):
        np.add.at(load[x], group[x], lengths[x])
    assert (load.max(axis=1) <= 1.12 * load.mean(axis=1)).all()


def test_group_members_are_in_order():
    items, exists = group_members(np.array([[1, 0, 1, 1], [2, 2, 0, 0]]), 3)
    members = [
        [row[t].tolist() for row, t in zip(*both, strict=True)]
        for both in zip(items, exists, strict=True)
    ]
    assert members == [[[1], [0, 2, 3], []], [[2, 3], [], [0, 1]]]
