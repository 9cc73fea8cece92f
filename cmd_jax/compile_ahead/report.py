"""What a step compiled ahead costs, as facts for JSON and as lines."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from cmd_jax.compile_ahead import collectives, estimate, hlo
from cmd_jax.compile_ahead.compiled import Compiled
from cmd_jax.compile_ahead.flops import can_count, count_flops
from cmd_jax.compile_ahead.step import ASSUMED_CLASSES, learns_labels
from cmd_jax.compile_ahead.targets import Target
from cmd_jax.data.pipeline.residency import DEVICE_SHARE, bytes_on_device
from cmd_jax.devices.chips import Chip
from cmd_jax.training.timetable import count_epochs

# Training images of the sets of the built-in configs, by name and split.
_NUM_IMAGES = {
  ('cub_200_2011', 'train'): 5_994,
  ('stanford_cars', 'train'): 8_144,
  ('fgvc_aircraft', 'trainval'): 6_667,
}


def known_num_images(config: ConfigDict) -> int | None:
  """Training images of a published set; None if it is another one."""
  dataset = config.dataset
  key = dataset.get('name', ''), dataset.get('pretrain_split', '')
  return _NUM_IMAGES.get(key)


def _collectives(
  program: hlo.Program, chip: Chip
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
  """What a device sends in a step: sums by kind, and all that is sent."""
  by_kind: dict[str, dict[str, float]] = {}
  found = collectives.read_collectives(
    program, lambda *args: estimate.seconds_of(*args, chip)
  )
  for one in found:
    kind = by_kind.setdefault(
      one.kind, {'times': 0, 'bytes': 0, 'overlapped': 0, 'overlapped_bytes': 0}
    )
    kind['times'] += one.times
    kind['bytes'] += one.times * one.num_bytes
    if one.is_overlapped:
      kind['overlapped'] += one.times
      kind['overlapped_bytes'] += one.times * one.num_bytes
  return by_kind, [
    {
      'kind': one.kind,
      'bytes': one.num_bytes,
      'times': one.times,
      'group': one.group,
      'seconds_between': one.between,
    }
    for one in found
  ]


def image_bytes(
  config: ConfigDict, target: Target, num_images: int | None
) -> int:
  """What the training images take of a device; 0 if they are streamed."""
  taken = bytes_on_device(num_images or 0, config.canvas_px, 'parts' in config)
  if config.placement == 'auto' and taken > DEVICE_SHARE * target.chip.memory:
    return 0
  return 0 if config.placement == 'stream' else taken


def _time(
  config: ConfigDict,
  target: Target,
  program: hlo.Program,
  num_images: int | None,
) -> dict[str, Any] | None:
  """The estimate; None of a device for which there is none."""
  chip = target.chip
  cycles = estimate.cycles_by_part(program)
  if not chip.clock or not cycles:
    return None
  kernels = estimate.kernels(program, chip)
  parts = {name: number / chip.clock for name, number in cycles.items()}
  seconds = sum(parts.values()) + kernels.seconds
  facts = {
    'seconds': seconds,
    'seconds_by_part': parts,
    'kernels': kernels._asdict(),
    'images_per_second': config.batch_size / seconds,
  }
  if num_images:
    per_epoch = num_images // config.batch_size
    steps = count_epochs(config, num_images) * per_epoch
    facts['hours'] = steps * seconds / 3600
  return facts


def gather(
  config: ConfigDict,
  target: Target,
  num_devices: int,
  compiled: Compiled,
  num_images: int | None,
) -> dict[str, Any]:
  """All facts about a step that was compiled.

  Args:
    config: of the run.
    target: what it was compiled for.
    num_devices: of its devices that the run uses.
    compiled: what the compiler said; not that it gave up.
    num_images: training images; None if it is not known.
  """
  program = hlo.read_program(compiled.text)
  per_device = config.batch_size // num_devices
  counted = None
  if can_count(config):
    counted = {k: per_device * v for k, v in count_flops(config).items()}
  images = image_bytes(config, target, num_images)
  by_kind, sent = _collectives(program, target.chip)
  return {
    'topology': target.name,
    'device_kind': target.devices[0].device_kind,
    'num_devices': num_devices,
    'batch_size': config.batch_size,
    'images_per_device': per_device,
    'method': config.method.name,
    'model': config.model.to_dict(),
    'num_prototypes': config.head.num_prototypes,
    'memory_bytes': {
      'arguments': compiled.arguments,
      'temporaries': compiled.temporaries,
      'program': compiled.needed,
      'images': images,
      'limit': target.chip.memory,
    },
    'fits': compiled.needed + images <= target.chip.memory,
    'flops_by_hand': counted,
    'seconds_at_peak': counted
    and sum(counted.values()) / target.chip.peak_flops,
    'bytes_moved': hlo.work(program).num_bytes,
    'collectives': by_kind,
    'sent': sent,
    'time': _time(config, target, program, num_images),
    'num_images': num_images,
    'epochs': config.total_epochs,
    'assumed_classes': ASSUMED_CLASSES if learns_labels(config) else None,
  }


def _gib(number: float) -> str:
  return f'{number / 2**30:.2f} GiB'


def _amount(number: float, unit: str) -> str:
  for prefix, size in (('T', 1e12), ('G', 1e9), ('M', 1e6)):
    if number >= size:
      return f'{number / size:.3g} {prefix}{unit}'
  return f'{number / 1e3:.3g} k{unit}'


def _time_lines(facts: dict[str, Any]) -> list[str]:
  time = facts['time']
  if time is None:
    return ['time         no estimate: this compiler makes none']
  seconds, kernels = time['seconds'], time['kernels']
  lines = [f'time         {1e3 * seconds:.4g} ms a step, estimated; of it']
  parts = dict(time['seconds_by_part'])
  if kernels['count']:
    parts[f'{kernels["count"]:g} kernels'] = kernels['seconds']
  lines += [
    f'  {name:11}{1e3 * part:9.3f} ms {part / seconds:6.1%}'
    for name, part in parts.items()
  ]
  speed = f'images/s     {time["images_per_second"]:.4g} on all devices'
  if 'hours' in time:
    speed += (
      f'; {facts["epochs"]} epochs of {facts["num_images"]:,} images in '
      f'{time["hours"]:.2g} h'
    )
  else:
    speed += '; --num_images says how many hours the epochs take'
  return [*lines, speed]


def _notes(facts: dict[str, Any]) -> list[str]:
  notes = []
  if facts['time'] is not None:
    notes.append(
      'Times are the sum of what the compiler estimates for each operation, '
      'not measurements: good for shares and ratios. Collectives, and copies '
      'that run beside the computation, have no estimate and are not in it.'
    )
    if facts['time']['kernels']['count']:
      notes.append(
        'Kernels (custom calls) are estimated by rooflines of their own: '
        'bytes by the rate of the memory, or stated FLOPs by the peak.'
      )
  notes.append(
    'Bytes are those of all arrays that operations read and write, though some '
    'stay on the chip.'
  )
  if facts['time'] is None:
    notes.append(
      'Compiled without autotuning and without cuDNN, which need the device: '
      'with its attention a run needs less memory.'
    )
  if facts['assumed_classes']:
    notes.append(f'Assumed: {facts["assumed_classes"]} classes.')
  return notes


def as_text(facts: dict[str, Any]) -> str:
  """The facts for people, a line each."""
  memory, model = facts['memory_bytes'], facts['model']
  images = ''
  if memory['images']:
    images = f', training images {_gib(memory["images"])}'
  fits = 'fits' if facts['fits'] else 'does not fit'
  lines = [
    f'topology     {facts["topology"]}: {facts["num_devices"]} x '
    f'{facts["device_kind"]}',
    f'step         {facts["method"]}, {model["name"]} '
    f'{model.get("variant", "")}, {model.get("dtype", "float32")}, '
    f'{facts["num_prototypes"]:,} prototypes, batch '
    f'{facts["batch_size"]}, {facts["images_per_device"]} images a device',
    f'memory       arguments {_gib(memory["arguments"])}, temporaries '
    f'{_gib(memory["temporaries"])}{images} of {_gib(memory["limit"])}: {fits}',
  ]
  counted = facts['flops_by_hand']
  if counted is None:
    lines.append('FLOPs        not counted for this encoder and method')
  else:
    parts = ', '.join(f'{k} {_amount(v, "FLOP")}' for k, v in counted.items())
    lines.append(
      f'FLOPs        {_amount(sum(counted.values()), "FLOP")} a device by hand '
      f'({parts}), {1e3 * facts["seconds_at_peak"]:.3g} ms at its bfloat16 peak'
    )
  lines.append(f'bytes        {_amount(facts["bytes_moved"], "B")} a device')
  sent = ', '.join(
    f'{x["times"]:g} {kind} of {_amount(x["bytes"], "B")}'
    + (f' ({x["overlapped"]:g} overlapped)' if x['overlapped'] else '')
    for kind, x in sorted(facts['collectives'].items())
  )
  lines.append(f'collectives  {sent or "none"}')
  lines += _time_lines(facts)
  return '\n'.join([*lines, '', *_notes(facts)])


def what_would_fit(config: ConfigDict, num_devices: int) -> str:
  """What to change of a config whose step does not fit, for messages."""
  per_device = config.batch_size // num_devices
  tips = []
  if config.model.get('remat', 'full') != 'full':
    tips.append('--config.model.remat=full')
  if num_devices > 1 and config.parallel.state != 'fsdp':
    tips.append('--config.parallel.state=fsdp')
  accumulated = 2 * config.parallel.grad_accum_steps
  if not per_device % accumulated:
    tips.append(f'--config.parallel.grad_accum_steps={accumulated}')
  if per_device > 1:
    smaller = per_device // 2 * num_devices
    tips.append(f'--config.batch_size={smaller}, or --find_batch')
  return ', '.join(tips) or 'a larger device, or a smaller model'
