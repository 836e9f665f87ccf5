"""What an update sends between devices, read from the compiled program."""

import math

import jax
import optax
import pytest
from contract_cases import CASES, random_tree
from sharding_cases import (
    AUTO,
    BEHIND,
    LARGE,
    LAYOUTS,
    RANK,
    Layout,
    compiled_update,
    make,
)

import lorapre_jax as lp
from benchmarks._collectives import collectives

pytestmark = pytest.mark.usefixtures("quick_compilation")


def largest_factor_shard(tx, layout: Layout) -> int:
    """Returns the number of elements of the largest factor shard on one device."""
    params = layout.shard(random_tree(LARGE), AUTO)
    is_pair = lambda node: hasattr(node, "left")  # noqa: E731
    pairs = filter(is_pair, jax.tree.leaves(tx.init(params), is_leaf=is_pair))
    return max(x.addressable_shards[0].data.size for pair in pairs for x in pair)


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "replicated"])
@pytest.mark.parametrize("name", ["adam", "adam_paper", "ema"])
def test_no_more_than_a_factor_crosses(name, layout):
    """Only (p/x, r), (r, q/y), (r, r) and less are reduced, and nothing is gathered."""
    tx = make(name)
    found = collectives(compiled_update(tx, LAYOUTS[layout]))
    assert bool(found) == (layout != "layers")
    assert {x.kind for x in found} <= {"all-reduce"}
    largest = largest_factor_shard(tx, LAYOUTS[layout])
    assert all(math.prod(x.shape) <= largest for x in found), found


def test_the_sharded_axis_of_a_fused_side_is_named_first():
    """Otherwise a shard would not be a contiguous part of the side."""
    heads = {"heads": LARGE["heads"]}
    for columns in ((1, 2), (2, 1)):
        matrices = lp.select_matrices(axes={"heads": lp.MatrixAxes(0, columns)})
        tx = make("adam", matrices=matrices)
        kinds = {x.kind for x in collectives(compiled_update(tx, BEHIND, heads))}
        assert ("all-gather" in kinds) == (columns == (1, 2))


@pytest.mark.parametrize("kind", ["muon", "dense"])
def test_the_bound_on_traffic_can_be_broken(kind):
    """Full orthogonalisation and optax's Muon gather matrices, and break the bound."""
    axes = lp.MatrixAxes()
    ours = CASES["scale_by_muon"].make(rank=RANK, matrices=axes)
    theirs = optax.contrib.scale_by_muon(
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()}
    )
    tx = ours if kind == "muon" else theirs
    found = collectives(compiled_update(tx, LAYOUTS["both"], {"w": LARGE["w"]}))
    assert any(x.kind == "all-gather" for x in found)
    assert max(math.prod(x.shape) for x in found) > 64 * RANK


def test_collectives_are_read_from_a_program():
    program = """
      %all-reduce.1 = (f32[32,3]{1,0}, pred[]) all-reduce(%a, %b), channel_id=11
      %all-gather-start = bf16[64,32]{1,0} all-gather-start(%c), dimensions={0}
      %fusion = f32[4]{0} fusion(%all-reduce.1), calls=%all-reduce
    """
    assert collectives(program) == [
        ("all-reduce", "f32", (32, 3)),
        ("all-reduce", "pred", ()),
        ("all-gather", "bf16", (64, 32)),
    ]
    assert [x.nbytes for x in collectives(program)] == [384, 1, 4096]
