import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cmd_jax.compile_ahead import hlo
from cmd_jax.compile_ahead.collectives import read_collectives
from cmd_jax.devices import sharding


def test_shapes_are_read_with_layouts_comments_and_odd_types():
  text = '(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4], pred[], s4[3], token[])'
  assert hlo.num_bytes(text) == 24 + 8 + 1 + 2


def test_a_loop_without_a_known_count_runs_as_its_condition_says():
  program = hlo.read_program("""HloModule jit_f

%condition (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[]{:T(128)} constant(64)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (q: (s32[])) -> (s32[]) {
  ROOT %q = (s32[]) parameter(0)
}

ENTRY %main (a: (s32[])) -> (s32[]) {
  %a = (s32[]) parameter(0)
  ROOT %w = (s32[]) while(%a), condition=%condition, body=%body
}
""")
  assert hlo.executions(program) == {'main': 1, 'body': 64}
  assert hlo.executions(program, with_trips=False)['body'] == 1


def test_a_loop_may_count_by_more_than_one():
  # A product whose operand goes round the devices, two of them each time.
  program = hlo.read_program("""HloModule jit_f

%condition (p: (f32[4], u32[])) -> pred[] {
  %end = u32[]{:T(128)} constant(8), metadata={op_name="dot"}
  %p = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (q: (f32[4], u32[])) -> (f32[4], u32[]) {
  %q = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%q), index=0
  %j = u32[]{:T(128)} get-tuple-element(%q), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%j, %two)
  ROOT %t = (f32[4]{0}, u32[]{:T(128)}) tuple(%x, %next)
}

ENTRY %main (a: (f32[4], u32[])) -> (f32[4], u32[]) {
  %a = (f32[4]{0}, u32[]) parameter(0)
  ROOT %w = (f32[4]{0}, u32[]) while(%a), condition=%condition, body=%body
}
""")
  assert hlo.executions(program) == {'main': 1, 'body': 4}


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.read_program('HloModule nothing')


def test_a_compiled_programs_collectives_and_loops():
  mesh = sharding.make_mesh(8)

  def loss(weights, x):
    def body(x, weight):
      return jnp.tanh(x @ weight), None

    return jnp.mean(jax.lax.scan(body, x, weights)[0] ** 2)

  sharded = jax.shard_map(
    lambda w, x: jax.lax.pmean(jax.grad(loss)(w, x), 'data'),
    mesh=mesh,
    in_specs=(P(), P('data')),
    out_specs=P(),
    check_vma=False,
  )
  compiled = (
    jax.jit(sharded).lower(jnp.ones((5, 16, 16)), jnp.ones((32, 16))).compile()
  )
  program = hlo.read_program(compiled.as_text())
  (found,) = read_collectives(program)
  assert found == ('all-reduce', 5 * 16 * 16 * 4, 1, False, 8, None)
  # Four rows a device: forward, and twice that backward, in every layer.
  once = 3 * 2 * 4 * 16 * 16
  assert hlo.work(program).dot_flops == 5 * once
  assert hlo.work(program, with_trips=False).dot_flops == once
  assert hlo.work(program).num_bytes > 2 * hlo.work(program, False).num_bytes
  # XLA counts loops once, too, and some operations otherwise.
  ours = hlo.work(program, with_trips=False).num_bytes
  assert ours == pytest.approx(
    compiled.cost_analysis()['bytes accessed'], rel=0.25
  )
