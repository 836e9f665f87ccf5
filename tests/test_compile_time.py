"""The longest chain of a compiled program, and what an update costs to compile."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile_time
from benchmarks._chain import longest_chain

# As a TPU's compiler writes them, shortened.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  %z = f32[8,8]{1,0:T(8,128)} fusion(%y), kind=kLoop, calls=%inside
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %z)
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %limit = s32[] constant(5)
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,8], b: f32[8,8]) -> (f32[8,8], f32[8,8]) {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
  %done = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %other = f32[8,8]{1,0} negate(%b)
  %sum = f32[8,8]{1,0} add(%done, %other)
  %lower = f32[8,8]{1,0} custom-call(%sum), custom_call_target="Cholesky"
  ROOT %out = (f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%lower, %other)
}
"""


def test_loops_count_their_trips_and_factorisations_their_size():
    loop, add, cholesky = 5 * (2 + 1), 1, 8
    assert longest_chain(PROGRAM) == loop + add + cholesky
    said = ', body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    known = PROGRAM.replace(", body=%body", said)
    assert longest_chain(known) == longest_chain(PROGRAM) + 2 * (2 + 1)


def test_a_loop_that_does_not_say_how_often_it_runs():
    with pytest.raises(ValueError, match="loop does not say how often"):
        longest_chain(PROGRAM.replace("constant(5)", "constant(5.5)"))


def test_what_does_not_depend_on_each_other_is_no_chain():
    def wide(x):
        return [jnp.sin(x + i) @ x for i in range(6)]

    def deep(x):
        for i in range(6):
            x = jnp.sin(x + i) @ x
        return x

    def of(fn):
        shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
        return longest_chain(jax.jit(fn).lower(shape).compile().as_text() or "")

    assert of(deep) >= 5 * of(wide)


def test_a_row_of_every_transform():
    params = {"w": jax.ShapeDtypeStruct((160, 128), jnp.float32)}
    for name, tx in compile_time.transforms(params, 8).items():
        row = compile_time.measured(tx, params)
        assert row["lines a leaf"] == row["lines"] > 10, name
        assert row["trace s"] > 0, name
        assert row["compile s"] > 0, name


def test_the_example_has_every_transform():
    params, transforms = compile_time.example()
    assert len(jax.tree.leaves(params)) > 168
    assert transforms.keys() == compile_time.transforms({}, 8).keys()
    for name, tx in transforms.items():
        assert jax.eval_shape(tx.init, params) is not None, name


def test_models_have_the_leaves_that_their_names_say():
    for name, (params, _) in compile_time.models().items():
        assert len(jax.tree.leaves(params)) == int(name.split()[0])
