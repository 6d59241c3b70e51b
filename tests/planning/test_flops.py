import dataclasses

import numpy as np
import pytest

from dss.planning.flops import computed_flops, useful_flops
from dss.student.network import num_parameters
from tests.conftest import tiny_config


def test_a_step_takes_six_flops_per_parameter_and_token_plus_attention():
    config = tiny_config(num_decoder_layers=1)
    D, heads, mlp = 16, 16, 3 * 16 * 32
    found = useful_flops(config, np.array([5, 7]), np.array([2, 4]))
    encoder = 2 * (4 * D * heads + mlp) * 12
    decoder = (6 - 2) * D * heads * 6 + 2 * D * heads * 6 + mlp * 6 - 2 * D * heads * 6
    decoder += 2 * D * heads * 6 + 2 * D * heads * 12  # cross: query and out; key and value
    head = D * 384 * 6
    scores = heads * 2 * (2 * (5**2 + 7**2) + (2**2 + 4**2) / 2 + (2 * 5 + 4 * 7))
    assert found == pytest.approx(6 * (encoder + decoder + head) + 6 * scores / 1)


def test_an_input_shared_by_two_targets_is_counted_once():
    config, targets = tiny_config(), np.array([2, 4, 3])
    apart = useful_flops(config, np.array([5, 5, 7]), targets)
    together = useful_flops(config, np.array([5, 7]), targets, reads=np.array([0, 0, 1]))
    D, heads, mlp = 16, 16, 3 * 16 * 32
    encoder = 2 * (2 * (4 * D * heads + mlp) * 5 + 4 * heads * 5**2)
    crossed = 2 * (4 * D * heads * 5)  # keys and values, once in a decoder layer
    assert apart - together == pytest.approx(3 * (encoder + crossed))


def test_sequences_of_one_token_take_six_flops_per_parameter():
    config = tiny_config(d_model=512, d_kv=64, d_ff=1024, num_heads=8)
    ones = np.ones(1000)  # sequences of one token: negligible attention
    body = num_parameters(config) - 384 * 512  # embedding look-ups take no FLOPs
    assert useful_flops(config, ones, ones) == pytest.approx(6 * body * 1000, rel=0.01)


def test_padding_and_rematerialization_count_as_computed_flops():
    config = tiny_config()
    lengths = np.array([8, 8]), np.array([4, 4])
    useful = useful_flops(config, *lengths)
    none, dots, full = (
        computed_flops(
            dataclasses.replace(config, remat=remat), (16, 8), (2, 8), (2, 4), cross_width=8
        )
        for remat in ("none", "dots", "full")
    )
    assert useful < none < dots < full < 4 / 3 * none
    padded = computed_flops(config, (32, 16), (4, 8), (4, 4), cross_width=8)
    assert padded == pytest.approx(2 * none)
