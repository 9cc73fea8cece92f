"""Part decoders and their score against the released evaluation programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.convert import entries, resnet, vit
from cmd_jax.evaluators import iou
from cmd_jax.models import fcn
from cmd_jax.models.resnet import ResNet
from cmd_jax.models.vit import encode_with_keys, make_vit
from tests.parity import golden

_POINTWISE = entries.Layout(lambda w: w[:, :, 0, 0].T, None)
_COUNT = 'num_batches_tracked'


def _close(ours, theirs, tolerance=1e-4):
  atol = tolerance * np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def _decoder(variant, tensors):
  """A decoder and its variables out of a Sequential's state dict."""
  decoder = fcn.make_decoder(num_classes=5, variant=variant)
  layout = _POINTWISE if variant == 'fcn' else entries.CONV
  table = []
  for up in range(3):
    for index in range(decoder.num_convs):
      suffix = '' if index == 0 else str(index + 1)
      conv = (f'up_{up}', f'conv_{index}')
      name = f'{up}.conv{suffix}'
      table += [
        entries.Entry(('params', *conv, 'kernel'), f'{name}.weight', layout),
        entries.Entry(('params', *conv, 'bias'), f'{name}.bias'),
      ]
      table += entries.batch_norm(f'up_{up}/bn_{index}', f'{up}.bn{suffix}')
  table += [
    entries.Entry(('params', 'classifier', 'kernel'), '3.weight', _POINTWISE),
    entries.Entry(('params', 'classifier', 'bias'), '3.bias'),
  ]
  kept = {name for name in tensors if not name.endswith(_COUNT)}
  assert {entry.name for entry in table} == kept
  return decoder, entries.from_torch(table, tensors)


@functools.partial(jax.jit, static_argnums=0)
def _run(decoder, variables, maps):
  """Logits in both modes at the size that the up-blocks reach."""
  size = tuple(8 * side for side in maps.shape[1:3])
  trained, _ = decoder.apply(
    variables, maps, size, True, mutable=['batch_stats']
  )
  return decoder.apply(variables, maps, size), trained


@golden.fixtures('fcn_decoder')
def test_decoder_of_stages(fixture):
  decoder, variables = _decoder('fcn', fixture.under('w/'))
  maps = jnp.array(golden.images(fixture['in/features']))
  evaluated, trained = _run(decoder, variables, maps)
  _close(evaluated, golden.images(fixture['out/eval']))
  _close(trained, golden.images(fixture['out/train']))


@golden.fixtures('fcn_decoder')
def test_interpolation(fixture):
  ours = jax.jit(lambda x: fcn.resize_corner_aligned(x, (6, 8)))(
    golden.images(fixture['in/upsample'])
  )
  _close(ours, golden.images(fixture['out/upsample_x2_align_corners']), 1e-6)


@golden.fixtures('fcn_resnet')
def test_resnet_with_its_decoder(fixture):
  tensors = fixture.under('w/')
  names = {'0.': 'conv1.', '1.': 'bn1.'}
  names |= {f'{3 + stage}.': f'layer{stage}.' for stage in range(1, 5)}
  renamed = {
    names[name[:2]] + name[2:]: tensor
    for name, tensor in fixture.under('w/res.').items()
  }
  encoder = ResNet(
    bottleneck=False,
    stage_sizes=(1, 1, 1, 1),
    base_channels=64,
    last_stride=1,
  )
  table = resnet.entries(encoder)
  kept = {name for name in renamed if not name.endswith(_COUNT)}
  assert {entry.name for entry in table} == kept
  variables = entries.from_torch(table, renamed)
  images = jnp.array(golden.images(fixture['in/images']))

  @jax.jit
  def encode(variables, images):
    trained, _ = encoder.apply(
      variables, images, True, method='stages', mutable=['batch_stats']
    )
    return encoder.apply(variables, images, method='stages')[-1], trained[-1]

  last, trained_last = encode(variables, images)
  _close(last, golden.images(fixture['out/eval/encoder']))
  decoder, variables = _decoder('fcn', fixture.under('w/decoder.'))
  evaluated, _ = _run(decoder, variables, last)
  _close(evaluated, golden.images(fixture['out/eval/logits']))
  _, trained = _run(decoder, variables, trained_last)
  _close(trained, golden.images(fixture['out/train/logits']))
  assert len(tensors) == len(renamed) + len(fixture.under('w/decoder.'))


@golden.fixtures('fcn_dino')
def test_vit_with_the_decoder_of_keys(fixture):
  encoder = make_vit(
    variant='Mu',
    image_px=224,
    patch_px=8,
    width=128,
    depth=2,
    num_heads=2,
    mlp_ratio=1.0,
    drop_path_rate=0.0,
  )
  variables = entries.from_torch(
    vit.entries(encoder), fixture.under('w/backbone.')
  )
  images = jnp.array(golden.images(fixture['in/images']))
  output, keys = jax.jit(lambda v, x: encode_with_keys(encoder, v, x))(
    variables, images
  )
  _close(output.image, fixture['out/cls'])
  # Only the first head's keys are decoded.
  keys = np.asarray(keys)[:, :, 0]
  _close(keys, fixture['out/keys_last_head0'][:, 1:])
  decoder, variables = _decoder('fcn_dino', fixture.under('w/decoder.'))
  logits, _ = jax.device_get(
    _run(decoder, variables, keys.reshape(1, 28, 28, 64))
  )
  assert logits.shape == (1, 224, 224, 5)
  _close(logits[:, ::4, ::4], golden.images(fixture['out/logits_stride4']))
  _close(logits[:, :24, :24], golden.images(fixture['out/logits_corner']))
  mean_std = [logits.mean(), logits.std(ddof=1)]
  np.testing.assert_allclose(mean_std, fixture['out/logits_mean_std'], 1e-4)


@golden.fixtures('miou')
def test_cross_validation(fixture):
  masks = fixture['in/masks']
  predicted = fixture['in/logits'].argmax(axis=2)
  counts = [iou.overlaps(jnp.array(p), masks, 4) for p in predicted]
  intersections, unions = (
    np.stack(arrays) for arrays in zip(*counts, strict=True)
  )
  folds = iou.cross_validate(intersections, unions)
  np.testing.assert_allclose(folds.miou, fixture['out/fold_miou'], rtol=1e-6)
  mean, std = folds.miou.mean(), folds.miou.std()
  np.testing.assert_allclose(mean, fixture['out/mean'], rtol=1e-6)
  np.testing.assert_allclose(std, fixture['out/std'], rtol=1e-6)

  # The released program scores every checkpoint that is better than those
  # before it; the last of a fold is the chosen one.
  log = []
  for fold in range(5):
    inside = np.arange(11) // 2 == fold
    best = 0.0
    for number, pair in enumerate(zip(intersections, unions, strict=True)):
      validation = iou.mean_iou(*(array[inside] for array in pair))
      if validation > best:
        best = validation
        log.append((number, iou.mean_iou(*(a[~inside] for a in pair))))
    assert log[-1][0] == folds.checkpoint[fold]
  numbers, scores = zip(*log, strict=True)
  np.testing.assert_array_equal(numbers, fixture['out/best_log_checkpoint'])
  np.testing.assert_allclose(scores, fixture['out/best_log'], rtol=1e-6)
