import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh
from dss.planning.hardware import find_accelerator
from dss.planning.hlo import Collective, collectives, communication_seconds, product_bytes

PROGRAM = """HloModule step

%body.1 (p: (s32[], f32[100])) -> (s32[], f32[100]) {{
  {line}
}}

%condition.1 (p: (s32[], f32[100])) -> pred[] {{
  %most = s32[]{{:T(128)}} constant(24)
}}

ENTRY %main.2 (p: f32[100]) -> f32[100] {{
  %loop = (s32[], f32[100]) while(%p), condition=%condition.1, body=%body.1{known}
}}
"""


def read(line, known="", devices=8):
    return collectives(PROGRAM.format(line=line, known=known), devices)


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("[4,2]<=[2,2,2]T(2,1,0)", (0, 4)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}", tuple(range(8))),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 1)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
    ],
)
def test_groups_are_read_in_every_notation(groups, group):
    line = f"%x = f32[100]{{0}} all-gather(%y), replica_groups={groups}, dimensions={{0}}"
    (collective,) = read(line)
    assert collective.group == group


@pytest.mark.parametrize(
    ("result", "sent"),
    [
        ("f32[100]{0} all-gather(%y)", 400 * 3 / 4),
        ("f32[100]{0} all-reduce(%y)", 400 * 2 * 3 / 4),
        ("bf16[100]{0} all-to-all(%y)", 200 * 3 / 4),
        ("f32[100]{0} reduce-scatter(%y)", 400 * 3),  # the result is a quarter of the operand
        ("(f32[100]{0}, /*index=1*/pred[7]{0}) all-reduce(%y, %z)", 407 * 2 * 3 / 4),
        ("(f32[25]{0}, f32[100]{0}) all-gather-start(%y)", 400 * 3 / 4),
        ("(f32[25]{0}, f32[25]{0}, u32[], u32[]) collective-permute-start(%y)", 100),
    ],
)
def test_bytes_sent_are_those_of_ring_algorithms_times_the_loops_trip_count(result, sent):
    line = f"%x = {result}, replica_groups={{{{0,1,2,3}}}}"
    assert sum(c.sent for c in read(line)) == 24 * sent
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    assert sum(c.sent for c in read(line, known)) == 3 * sent


def test_a_tpus_all_reduce_scatter_fusion_is_a_reduce_scatter():
    line = "%x = f32[25]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1"
    callee = """%all-reduce-scatter.1 (p: f32[100]) -> f32[25] {
  %z = f32[100]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}

"""
    text = PROGRAM.format(line=line, known="").replace("%body.1 (", callee + "%body.1 (", 1)
    assert collectives(text, 8) == (
        Collective(kind="reduce-scatter", group=(0, 1, 2, 3), sent=24 * 300),
    )


def test_a_compiled_sum_over_data_is_one_all_reduce():
    mesh = make_mesh(MeshConfig(data=4, model=2), jax.devices()[:8])
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    array = jax.ShapeDtypeStruct((8, 1000), jnp.float32, sharding=split)
    compiled = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(array).compile()
    assert collectives(compiled.as_text(), 8) == (
        Collective(kind="all-reduce", group=(0, 2, 4, 6), sent=4000 * 2 * 3 / 4),
    )


def test_groups_across_machines_have_the_bandwidth_of_the_network():
    near, far = (
        Collective(kind="all-gather", group=group, sent=45e9) for group in ((0, 4), (0, 4, 8, 12))
    )
    h100, v4 = (find_accelerator(name, 16) for name in ("h100", "v4"))
    assert communication_seconds([near], h100) == pytest.approx(0.1)
    assert communication_seconds([near, far], h100) == pytest.approx(0.1 + 0.9)
    assert communication_seconds([near, far], v4) == pytest.approx(2 * 0.15)
    assert np.isfinite(find_accelerator("cpu", 2).links)


def test_a_cpus_products_copy_their_right_operand_if_one_is_transposed():
    product = """  %right.{rows} = f32[{rows},100]{{1,0}} add(%x, %y)
  %dot = f32[5,100]{{1,0}} dot(%x, %right.{rows}), lhs_contracting_dims={{{l}}}, rhs_contracting_dims={{{r}}}
"""  # noqa: E501
    plain, left, right = (
        product.format(rows=rows, l=l, r=r) for rows, l, r in ((90, 1, 0), (30, 0, 0), (40, 1, 1))
    )
    assert product_bytes(PROGRAM.format(line=plain, known="")) == 0
    assert product_bytes(PROGRAM.format(line=plain + left, known="")) == 30 * 100 * 4
    assert product_bytes(PROGRAM.format(line=plain + left + right, known="")) == 40 * 100 * 4


def test_a_products_right_operand_is_found_in_a_compiled_program():
    """In int32, because products of floats can be library calls without a `dot` in the program."""
    a, b = (jax.ShapeDtypeStruct((1000, width), jnp.int32) for width in (64, 3000))
    compiled = jax.jit(lambda a, b: a.T @ b).lower(a, b).compile()
    assert product_bytes(compiled.as_text()) == 1000 * 3000 * 4
