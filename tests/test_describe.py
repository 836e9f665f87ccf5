"""The report of every byte and every decision, through any optax wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorapre_jax as lp
from lorapre_jax._leaves.roles import UNKNOWN

pytestmark = pytest.mark.usefixtures("nothing_was_said")

PARAMS = {
    "w": jnp.zeros((12, 8)),
    "stack": jnp.zeros((3, 12, 8)),
    "bias": jnp.zeros(8),
}
SMALL = {
    "rank": 2,
    "matrices": lp.select_matrices(["w", "stack"], axes=lp.MatrixAxes()),
}

WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"w": True, "stack": True, "bias": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)}, {"w": "a", "stack": "a", "bias": "b"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 4).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def nbytes(tree):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_decisions_are_found_and_every_byte_is_counted(wrapper):
    tx = WRAPPERS[wrapper](lp.scale_by_lorapre_adam(**SMALL))
    report = lp.describe(tx, PARAMS)
    leaves = {leaf.path: leaf for leaf in report.leaves}
    assert leaves["w"].is_factored
    assert leaves["stack"].is_factored
    assert not leaves["bias"].is_factored
    assert report.total_bytes == nbytes(tx.init(PARAMS))
    parts = sum(leaf.nbytes for leaf in report.leaves) + report.other_bytes
    assert parts == report.total_bytes
    assert report.adamw_bytes == nbytes(optax.adamw(1.0).init(PARAMS))


def test_random_keys_have_bytes_too():
    noise = optax.add_noise(0.1, 0.5, jax.random.key(0))
    tx = optax.chain(noise, lp.scale_by_lorapre_adam(**SMALL))
    key_and_counts = 8 + 4 + 4
    assert lp.describe(tx, PARAMS).other_bytes == key_and_counts


def test_rows():
    report = lp.describe(lp.scale_by_lorapre_adam(**SMALL), PARAMS)
    bias, stack, w = report.leaves
    assert (bias.why_dense, bias.nbytes) == ("not included", 2 * 8 * 4)
    assert (stack.batch_shape, stack.p, stack.q, stack.rank) == ((3,), 12, 8, 2)
    assert w.nbytes == (2 * (12 + 8) + 12 + 8 + 2) * 4
    assert stack.nbytes == 3 * w.nbytes
    assert w.adamw_nbytes == 2 * 12 * 8 * 4
    assert w.methods == (lp.LowRank(), lp.RotatedRankOne())
    assert report.ratio == report.total_bytes / report.adamw_bytes


def test_names_that_look_like_fields_or_suffixes():
    params = {"left": jnp.zeros((12, 8)), "w": {"left": jnp.zeros((12, 8))}}
    tx = lp.scale_by_lorapre_adam(2, matrices=lp.select_matrices("^left$"))
    report = lp.describe(tx, params)
    assert [leaf.nbytes for leaf in report.leaves] == [4 * (3 * 20 + 2), 2 * 4 * 96]


def test_a_moment_is_that_of_the_parameter_of_its_shape():
    """If several paths fit, the moment `mu/w` of `w` is not taken for one of `mu/w`."""
    params = {"w": jnp.zeros((12, 8)), "mu": {"w": jnp.zeros(5)}}
    report = lp.describe(optax.adam(0.1), params)
    nbytes = {leaf.path: leaf.nbytes for leaf in report.leaves}
    assert nbytes == {"w": 2 * 4 * 96, "mu/w": 2 * 4 * 5}


def test_a_rank_that_nothing_has_is_not_reported():
    tx = lp.scale_by_lorapre_adam(
        500,
        first_moment=lp.Dense(),
        second_moment=lp.RankOne(),
        matrices=lp.MatrixAxes(),
    )
    assert "12 x 8: RankOne" in str(lp.describe(tx, {"w": jnp.zeros((12, 8))}))


def test_a_single_array_is_a_tree_too():
    report = lp.describe(lp.scale_by_lorapre_adam(8), jnp.zeros((256, 128)))
    assert report.leaves[0].is_factored
    assert report.leaves[0].nbytes == report.total_bytes


def test_table():
    text = str(lp.describe(lp.scale_by_lorapre_adam(**SMALL), PARAMS))
    kept = "3 x 12 x 8 at rank 2: LowRank, RotatedRankOne"
    assert f"stack  3 x 12 x 8  {kept}" in text
    assert "dense: not included" in text
    total, words = text.splitlines()[-2:]
    assert total.split()[0] == "total"
    assert words == "98.0% of the parameters are factored; no large leaf is dense."


def test_other_optimizers_are_reported_too():
    report = lp.describe(optax.adamw(1e-3), PARAMS)
    assert report.ratio == 1
    assert {leaf.why_dense for leaf in report.leaves} == {"another transform"}
    with pytest.warns(UserWarning, match=r"r\"\^stack\$\": lp.MatrixAxes"):
        muon = lp.describe(lp.lorapre_muon(1e-3, 2, min_dim_size_to_factor=1), PARAMS)
    kept = {leaf.path: leaf.why_dense for leaf in muon.leaves}
    assert kept == {"w": "", "stack": UNKNOWN, "bias": "fewer than two axes"}
    assert muon.leaves[0].nbytes == 2 * 8 * 4


def llama_7b(dtype="bfloat16"):
    """Returns the shapes of an unstacked 7B Llama: 32 x 9 + 3 leaves."""
    width, ffn = 4096, 11008
    shapes = {f"attention/{n}": (width, width) for n in "qkvo"}
    shapes |= {"mlp/gate": (width, ffn), "mlp/up": (width, ffn)}
    shapes |= {"mlp/down": (ffn, width), "norm_1": (width,), "norm_2": (width,)}
    layers = {f"{i}/{name}": s for i in range(32) for name, s in shapes.items()}
    layers |= {"embed": (32000, width), "head": (width, 32000), "norm": (width,)}
    return {k: jax.ShapeDtypeStruct(s, dtype) for k, s in layers.items()}


def test_an_abstract_7b_model_is_described_without_computing():
    params, matrices = llama_7b(), lp.select_matrices(r"attention|mlp")
    tx = lp.lorapre_adamw(1e-3, 256, matrices=matrices)
    report = lp.describe(tx, params)
    assert len(report.leaves) == 291
    assert sum(leaf.is_factored for leaf in report.leaves) == 224
    factored = 32 * 4 * (257 * (4 * 8192 + 3 * 15104) + 7 * 256)
    expected = factored + 2 * 4 * (2 * 32000 * 4096 + 65 * 4096)
    assert report.total_bytes - report.other_bytes == expected


@pytest.mark.filterwarnings("ignore:lorapre_jax keeps")
@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (
            {"w": (12, 8), "scale": (3, 40)},
            {"min_dim_size_to_factor": 8},
            "44.4% of the parameters are factored. Large and dense: 'scale' (a bias or "
            "a scale, by its name).",
        ),
        (
            {"w": (12, 8), "v": (4, 8)},
            {"min_dim_size_to_factor": 8},
            "75.0% of the parameters are factored. Large and dense: 'v' (a side is "
            "below 8).\nTo factor smaller matrices, lower min_dim_size_to_factor=.",
        ),
        (
            {"w": (12, 8)},
            {"min_dim_size_to_factor": 8, "rank": 5},
            "Nothing is factored, and no state is saved. Large and dense: 'w' (rank 5 "
            "does not pay: r(p+q) >= pq).\n"
            "A smaller rank= would factor what this one does not pay for.",
        ),
        (
            {"w": (12, 8), "s": (3, 12, 8)},
            {"min_dim_size_to_factor": 8},
            f"25.0% of the parameters are factored. Large and dense: 's' ({UNKNOWN}).\n"
            "Say which axes are rows and columns: matrices=lp.select_matrices("
            'axes={r"^s$": lp.MatrixAxes(rows=..., columns=...)}, '
            "extend_default=True).",
        ),
        (
            {"w_lora_a": (128, 8), "w_lora_b": (8, 128)},
            {"rank": 16},
            "Nothing is factored, and no state is saved. Large and dense: 'w_lora_a' "
            "(rank 16 does not pay: r(p+q) >= pq), 'w_lora_b' (rank 16 does not pay: "
            "r(p+q) >= pq).\n"
            "A smaller rank= would factor what this one does not pay for.",
        ),
    ],
)
def test_the_last_lines_judge(shapes, options, words):
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    tx = lp.scale_by_lorapre_adam(**{"rank": 2} | options)
    assert str(lp.describe(tx, params)).endswith(f"\n{words}")


def test_a_state_tells_bytes_on_a_device():
    mesh = jax.make_mesh((4, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    params = {"w": jax.device_put(jnp.zeros((16, 32)), place)}
    tx = lp.scale_by_lorapre_adam(3, matrices=lp.MatrixAxes())
    for state in (tx.init(params), lp.state_sharding(tx, params)):
        report = lp.describe(tx, params, state)
        # left (4, 3), right (16, 3); row 4, column 16, direction 3; the count.
        assert report.device_bytes == 4 * (12 + 48 + 4 + 16 + 3) + 4
        assert report.leaves[0].device_nbytes == 4 * (12 + 48 + 4 + 16 + 3)
        assert not report.replicated
        assert str(report).splitlines()[0].endswith("on a device")
    other = lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes())
    with pytest.raises(
        ValueError, match=r"'mu_factors/w/left' has shape \(16, 3\) in "
    ):
        lp.describe(other, params, tx.init(params))
