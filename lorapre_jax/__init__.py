"""LoRA-Pre: low-rank Adam and Muon momenta as optax gradient transformations."""

from lorapre_jax._adam import scale_by_lorapre_adam
from lorapre_jax._adam_alias import lorapre_adamw
from lorapre_jax._ema import lorapre_ema
from lorapre_jax._leaves.selection import select_matrices
from lorapre_jax._moments.algorithm_one import AlgorithmOne
from lorapre_jax._moments.dense import Dense
from lorapre_jax._moments.low_rank import LowRank
from lorapre_jax._moments.row_column import RankOne, RotatedRankOne
from lorapre_jax._muon import scale_by_lorapre_muon
from lorapre_jax._muon_alias import lorapre_muon
from lorapre_jax._state.budget import rank_for_budget
from lorapre_jax._state.convert import convert_state
from lorapre_jax._state.diagnostics import diagnostics
from lorapre_jax._state.memory import check_state_sharding, describe
from lorapre_jax._state.record import check_state_record, state_record
from lorapre_jax._state.sharding import state_sharding
from lorapre_jax._trees.boxes import register_box
from lorapre_jax._trees.matrix_view import MatrixAxes

__all__ = [
    "AlgorithmOne",
    "Dense",
    "LowRank",
    "MatrixAxes",
    "RankOne",
    "RotatedRankOne",
    "check_state_record",
    "check_state_sharding",
    "convert_state",
    "describe",
    "diagnostics",
    "lorapre_adamw",
    "lorapre_ema",
    "lorapre_muon",
    "rank_for_budget",
    "register_box",
    "scale_by_lorapre_adam",
    "scale_by_lorapre_muon",
    "select_matrices",
    "state_record",
    "state_sharding",
]
