import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cmd_jax.compile_ahead import hlo
from cmd_jax.devices import sharding

_TEXT = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %sum.1 = f32[4,8]{1,0} all-reduce(%x), to_apply=%add.clone_promoted
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%x, %sum.1)
}

%branch_a (a: f32[4,8]) -> f32[4,8] {
  ROOT %a = f32[4,8]{1,0} parameter(0)
}

%branch_b (b: f32[4,8]) -> f32[4,8] {
  %b = f32[4,8]{1,0} parameter(0)
  ROOT %turn = f32[4,8]{1,0} collective-permute(%b), source_target_pairs={{0,1}}
}

ENTRY %main (q: f32[4,8], i: s32[]) -> f32[4,8] {
  %q = f32[4,8]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %both = (f32[4,8]{1,0}, /*index=1*/bf16[2]{0}) \
all-reduce(%q, %q), to_apply=%add
  %start = (f32[4,8]{1,0:T(8,128)}, f32[32,8]{1,0:T(8,128)}) \
all-gather-start(%q)
  %done = f32[32,8]{1,0} all-gather-done(%start)
  %w = (s32[], f32[4,8]{1,0}) while(%init), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[4,8]{1,0} conditional(%i, %q, %q), \
branch_computations={%branch_a, %branch_b}
}
"""


def test_shapes_are_read_with_layouts_comments_and_odd_types():
  text = '(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4], pred[], s4[3], token[])'
  assert hlo.num_bytes(text) == 24 + 8 + 1 + 2


def test_collectives_of_every_form_are_counted_as_often_as_they_run():
  found = hlo.collectives(hlo.read_program(_TEXT))
  whole = 4 * 8 * 4
  assert sorted(found) == [
    ('all-gather', 8 * whole, 1, False),
    ('all-reduce', whole, 3, True),
    ('all-reduce', whole + 4, 1, False),
    ('collective-permute', whole, 0.5, False),
  ]


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
  (found,) = hlo.collectives(program)
  assert found == ('all-reduce', 5 * 16 * 16 * 4, 1, False)
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
