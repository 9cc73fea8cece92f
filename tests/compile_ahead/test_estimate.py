import pytest

from cmd_jax.compile_ahead import estimate, hlo
from cmd_jax.devices.chips import CHIPS, Chip

# Lines of a step compiled for v5e:2x4, but for the kernel and the numbers.
_TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8,128]) -> f32[8,128] {
  ROOT %p = f32[8,128]{1,0:T(8,128)} parameter(0)
}

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %fusion.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, \
calls=%fused, metadata={op_name="jit(step)/jvp(loss)/shard_map/while/body/\
closed_call/select_n" stack_frame_id=7}, backend_config={"flag_configs":[],\
"estimated_cycles":"100","aliasing_operands":{"lists":[]}}
  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%x, %fusion.1)
}

ENTRY %main (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy.2 = f32[8,128]{1,0:T(8,128)} copy(%q), \
backend_config={"estimated_cycles":"7"}
  %fusion.3 = f32[8,128]{1,0} fusion(%q), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/transpose(jvp(loss))/encoder/VisionTransformer/\
block_0/attn/transpose"}, backend_config={"estimated_cycles":"20"}
  %w = (s32[], f32[8,128]{1,0}) while(%init), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %kernel = f32[8,128]{1,0} custom-call(%q, %fusion.3), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"x","cost_estimate":{"flops":"4000","transcendentals":"0"}}}
  %other = f32[8,128]{1,0} custom-call(%q), custom_call_target="Sharding"
  ROOT %fusion.4 = f32[8,128]{1,0} fusion(%kernel), kind=kLoop, \
calls=%fused, metadata={op_name="jit(step)/teacher/add"}, \
backend_config={"estimated_cycles":"5"}
}
"""


def test_cycles_are_summed_by_part_as_often_as_they_run():
  cycles = estimate.cycles_by_part(hlo.read_program(_TEXT))
  assert cycles == {'encoder': 20, 'loss': 300, 'teacher': 5, 'rest': 7}


@pytest.mark.parametrize(
  ('rate', 'seconds'), [((1e3, 1e9), 4.0), ((1e9, 4096.0), 3.0)]
)
def test_a_kernel_has_a_roofline_of_its_flops_and_bytes(rate, seconds):
  chip = Chip('any', 2**30, *rate)
  kernels = estimate.kernels(hlo.read_program(_TEXT), chip)
  # Three arrays of 4 KiB are read and written.
  assert kernels == (1, seconds)


@pytest.mark.parametrize(
  ('op_name', 'part'),
  [
    ('jit(step)/augment/shard_map/vmap(jit(_uniform))/shift', 'augment'),
    ('jit(step)/jvp(loss)/heads/PrototypeHead.bottleneck/add', 'heads'),
    ('jit(step)/transpose(jvp(loss))/shard_map/mul', 'loss'),
    ('jit(step)/jvp(loss)/encoder/ViT/checkpoint/block_0/add', 'encoder'),
    ('jit(step)/optimiser/add', 'optimiser'),
    ('jit(step)/loss_scale/mul', 'rest'),
    ('jit(step)/reduce_sum', 'rest'),
  ],
)
def test_the_innermost_scope_names_the_part(op_name, part):
  assert estimate.part_of(op_name) == part


def test_a_program_without_estimates_has_none():
  text = _TEXT.replace('estimated_cycles', 'other')
  assert estimate.cycles_by_part(hlo.read_program(text)) == {}


def test_clocks_and_peaks_of_tpus_fit_together():
  # FLOPs of a cycle are those of whole matrix units of 128 x 128.
  for chip in CHIPS.values():
    if chip.clock:
      units = chip.peak_flops / chip.clock / (2 * 128**2)
      assert units == pytest.approx(round(units), rel=0.01), chip
