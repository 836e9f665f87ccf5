"""optax's own checks of contributed optimizers, run on ours.

They come from the installed wheel. Its leaves are small: at rank one those of the check
of `inject_hyperparams` are factored, and all others dense. The tests of the contract
ask the same of factored leaves.
"""

import ast
import importlib.util
from typing import Any

import jax.numpy as jnp
import optax

import lorapre_jax as lp


def averaged_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    decay: float = 0.9,
    matrices: Any = None,
):
    return optax.chain(
        lp.lorapre_ema(decay, rank, matrices=matrices),
        optax.scale_by_learning_rate(learning_rate),
    )


FACTORIES = {
    "lorapre_adamw": lp.lorapre_adamw,
    "lorapre_muon": lp.lorapre_muon,
    "averaged_sgd": averaged_sgd,
}
OPTIMIZERS = tuple(
    {
        "opt_name": name,
        "opt_kwargs": {
            "learning_rate": learning_rate,
            "rank": 1,
            "matrices": lp.MatrixAxes(),
        },
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    for name, learning_rate in (
        ("lorapre_adamw", 1e-2),
        ("lorapre_muon", 1e-2),
        ("averaged_sgd", 1e-3),
    )
)


def optax_checks() -> Any:
    """optax's test class, parametrised over our optimizers.

    absl expands the parameters while the class is created, so the module's lists are
    replaced between running what precedes the class and the class itself.
    """
    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        module = ast.parse(file.read(), spec.origin)
    at = next(i for i, node in enumerate(module.body) if isinstance(node, ast.ClassDef))
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(ast.Module(module.body[:at], []), spec.origin, "exec"), names)
    for name in ("_MAIN_OPTIMIZERS_UNDER_TEST", "_ALL_OPTIMIZERS_UNDER_TEST"):
        assert names[name], "optax has renamed the list that this replaces"
        names[name] = OPTIMIZERS
    assert "_get_opt_factory" in names
    names["_get_opt_factory"] = FACTORIES.__getitem__
    exec(compile(ast.Module(module.body[at : at + 1], []), spec.origin, "exec"), names)
    return names["ContribTest"]


ContribTest = optax_checks()


def test_the_leaves_of_the_check_of_hyperparameters_are_factored():
    params = [jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    for optimizer in OPTIMIZERS:
        tx = FACTORIES[optimizer["opt_name"]](**optimizer["opt_kwargs"])
        assert all(leaf.is_factored for leaf in lp.describe(tx, params).leaves)


def test_every_check_of_optax_is_run_on_every_optimizer():
    checks = {
        "test_gradient_accumulation": 2,
        "test_optimizers": 4,
        "test_optimizers_accept_extra_args": 2,
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": 1,
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
        "test_preserve_dtype": 2,
        "test_state_shape_dtype_shard_stability": 4,
    }
    found = [name.rstrip("0123456789") for name in vars(ContribTest) if "test_" in name]
    for check, combinations in checks.items():
        assert found.count(check) == combinations * len(OPTIMIZERS), check
