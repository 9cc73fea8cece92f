import pytest

from cmd_jax.compile_ahead import hlo
from cmd_jax.compile_ahead.collectives import group_size, read_collectives

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


# Forms of a v5e's programs: an all-gather that goes on within fusions, with a
# product beside it, a permutation, and a sum of which a share is kept.
_FUSED = """HloModule jit_step, is_scheduled=true

%starts (a: bf16[2,8]) -> (bf16[2,8], bf16[32,8]) {
  %a = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.22 = bf16[32,8]{1,0} all-gather(%a), channel_id=8, \
replica_groups=mesh['axis_0'=16,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %custom-call.14 = (bf16[2,8]{1,0}, bf16[32,8]{1,0}) \
custom-call(%all-gather.22), custom_call_target="AsyncCollectiveStart"
}

%goes_on (b: bf16[2,8], c: f32[4,8]) -> f32[4,8] {
  %b = bf16[2,8]{1,0} parameter(0)
  %c = f32[4,8]{1,0} parameter(1)
  %all-gather.24 = bf16[32,8]{1,0} all-gather(%b), channel_id=8, \
replica_groups=mesh['axis_0'=16,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %tanh = f32[4,8]{1,0} tanh(%c)
}

%ends (d: bf16[2,8]) -> bf16[32,8] {
  %d = bf16[2,8]{1,0} parameter(0)
  %all-gather.28 = bf16[32,8]{1,0} all-gather(%d), channel_id=8, \
replica_groups=mesh['axis_0'=16,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %custom-call.16 = bf16[32,8]{1,0} custom-call(%d, %all-gather.28), \
custom_call_target="AsyncCollectiveDone"
}

%sum_of_share (e: f32[32,8]) -> f32[2,8] {
  %e = f32[32,8]{1,0} parameter(0)
  %all-reduce.1 = f32[32,8]{1,0} all-reduce(%e), channel_id=9, \
replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %share = f32[2,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero)
}

%plain (f: f32[4,8]) -> f32[4,8] {
  ROOT %f = f32[4,8]{1,0} parameter(0)
}

ENTRY %main (q: bf16[2,8], r: f32[4,8], s: f32[32,8]) -> f32[2,8] {
  %q = bf16[2,8]{1,0} parameter(0)
  %r = f32[4,8]{1,0} parameter(1)
  %s = f32[32,8]{1,0} parameter(2)
  %async-collective-start = (bf16[2,8]{1,0}, bf16[32,8]{1,0}) fusion(%q), \
kind=kCustom, calls=%starts
  %fusion.1 = f32[4,8]{1,0} fusion(%r), kind=kLoop, calls=%plain
  %permuted = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[]) \
collective-permute-start(%q), channel_id=3, source_target_pairs={{0,1}}
  %fusion.2 = f32[4,8]{1,0} fusion(%q, %fusion.1), kind=kCustom, calls=%goes_on
  %arrived = bf16[2,8]{1,0} collective-permute-done(%permuted)
  %async-collective-done = bf16[32,8]{1,0} fusion(%q), kind=kCustom, \
calls=%ends
  %fusion.3 = f32[4,8]{1,0} fusion(%fusion.2), kind=kLoop, calls=%plain
  ROOT %all-reduce-scatter = f32[2,8]{1,0} fusion(%s), kind=kCustom, \
calls=%sum_of_share
}
"""

_WRAPPED = """HloModule jit_step, is_scheduled=true

%scatter (a: f32[32,8]) -> f32[8,8] {
  %a = f32[32,8]{1,0} parameter(0)
  ROOT %share = f32[8,8]{1,0} reduce-scatter(%a), \
replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (q: f32[32,8]) -> f32[8,8] {
  %q = f32[32,8]{1,0} parameter(0)
  %start = ((f32[32,8]{1,0}), f32[8,8]{1,0}) async-start(%q), calls=%scatter
  %exp = f32[32,8]{1,0} exponential(%q)
  ROOT %done = f32[8,8]{1,0} async-done(%start)
}
"""


# Between two slices.
_SENT = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[4,8]) -> bf16[4,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[4,8]{1,0}, u32[], token[]) send(%q, %after-all), \
channel_id=2, is_host_transfer=true
  %recv = (bf16[4,8]{1,0}, u32[], token[]) recv(%after-all), channel_id=3
  %exp = bf16[4,8]{1,0} exponential(%q)
  %send-done = token[] send-done(%send), channel_id=2
  %recv-done = (bf16[4,8]{1,0}, token[]) recv-done(%recv), channel_id=3
  ROOT %sum = bf16[4,8]{1,0} get-tuple-element(%recv-done), index=0
}
"""


def _seconds(instruction, siblings):
  """One of every fusion and exponential, but for those that wait."""
  waits = 'async' in instruction.name
  return float(instruction.opcode in ('fusion', 'exponential') and not waits)


def test_collectives_of_every_form_are_counted_as_often_as_they_run():
  found = read_collectives(hlo.read_program(_TEXT))
  whole = 4 * 8 * 4
  assert sorted(x[:4] for x in found) == [
    ('all-gather', 8 * whole, 1, False),
    ('all-reduce', whole, 3, True),
    ('all-reduce', whole + 4, 1, False),
    ('collective-permute', whole, 0.5, False),
  ]
  overlapped = [x.kind for x in found if x.is_overlapped]
  assert overlapped == ['all-gather']


def test_what_goes_on_within_fusions_counts_once_with_what_is_beside_it():
  found = read_collectives(hlo.read_program(_FUSED), _seconds)
  assert sorted(found, key=lambda x: x.kind) == [
    ('all-gather', 32 * 8 * 2, 1, False, 16, 2.0),
    ('collective-permute', 2 * 8 * 2, 1, False, None, 1.0),
    ('reduce-scatter', 32 * 8 * 4, 1, False, 4, None),
  ]


def test_a_collective_in_a_computation_of_its_own():
  (found,) = read_collectives(hlo.read_program(_WRAPPED), _seconds)
  assert found == ('reduce-scatter', 32 * 8 * 4, 1, False, 4, 1.0)


def test_what_is_sent_between_slices():
  (found,) = read_collectives(hlo.read_program(_SENT), _seconds)
  assert found == ('send', 4 * 8 * 2, 1, False, None, 1.0)


@pytest.mark.parametrize(
  ('attributes', 'size'),
  [
    ('replica_groups={{0,2,4},{1,3,5}}, to_apply=%add', 3),
    ('replica_groups=[2,128]<=[256], use_global_device_ids=true', 128),
    ("replica_groups=mesh['a'=4,'b'=2,'c'=8] {'a','c'}, dimensions={0}", 32),
    ('replica_groups={}, to_apply=%add', None),
  ],
)
def test_groups_in_all_their_forms(attributes, size):
  assert group_size(attributes) == size
