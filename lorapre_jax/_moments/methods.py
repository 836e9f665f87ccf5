"""How a moment is kept: frozen values that a transform takes as arguments.

A method turns gradients into a bias-corrected moment. Each function below sees one
matrix; batch axes are mapped outside. `Dense` also sees leaves of any other shape, and
its state is an array of the leaf's shape.

    init(batch_shape, p, q, rank, dtype, seed)    -> state of (*batch_shape, p, q)
    first_moment(state, g, decay, count, seed)   -> estimate of E[g], new state
    second_moment(state, g, decay, count, seed)  -> estimate of sqrt(E[g^2]), new state

    first_weight(decay, count), second_weight(decay, count)  -> what bias correction
        divides the state by: the total weight in it of the gradients so far, or, for
        a second moment, what that makes of its root

`factors_type` is the class of the state; `Dense` has none. `RotatedRankOne` has
`rotated_moment` instead, which sees the gradient as `LowRank.split_moment` splits it.

Second moments are returned as their roots, which have the gradient's scale. Factored
second moments never form the square, which would under- or overflow sooner.
"""

from collections.abc import Mapping

from lorapre_jax._moments.algorithm_one import AlgorithmOne
from lorapre_jax._moments.dense import Dense
from lorapre_jax._moments.factors import FactorPair
from lorapre_jax._moments.low_rank import LowRank
from lorapre_jax._moments.row_column import RankOne, RotatedRankOne

FirstMoment = LowRank | AlgorithmOne | Dense
SecondMoment = LowRank | AlgorithmOne | RotatedRankOne | RankOne | Dense
Methods = FirstMoment | SecondMoment | Mapping[str, FirstMoment | SecondMoment]
"""One method for all leaves, or a mapping from patterns on leaf paths to methods."""


def have_rank(methods) -> bool:
    """Whether any of a leaf's moments is a `FactorPair`, which has a rank."""
    return any(method.factors_type is FactorPair for method in methods)
