"""The data of a page about drawn photographs, without a run behind them."""

import numpy as np
import pytest

from cmd_jax.report import photos

HOSTILE = '<img src=x onerror=alert(1)>.jpg'
CLASSES = ('robin', 'tit</script><script>hacked=1</script>', 'wren')


def _numbers(array, dtype):
  return photos.encode_base64(np.asarray(array, dtype).tobytes())


def _draw(rng, count):
  """Images of soft shapes and some grain, as photographs are."""
  for _ in range(count):
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.float32)
    smooth = np.kron(coarse, np.ones((20, 20, 1)))
    grain = rng.normal(0, 12, smooth.shape)
    yield np.clip(smooth + grain, 0, 255).astype(np.uint8)


def _describe_photos(num_images, k, grid, labelled):
  rng = np.random.default_rng(0)
  labels = np.arange(num_images) % 3 if labelled else -np.ones(num_images)
  sizes = np.tile([[300, 400], [400, 300]], (num_images, 1))[:num_images]
  index = (np.arange(num_images)[:, None] + 1 + np.arange(k)) % num_images
  return {
    'names': [HOSTILE] + [f'birds/{i:05d}.jpg' for i in range(1, num_images)],
    'is_test': [int(i % 4 == 0) for i in range(num_images)],
    'labels': labels.astype(int).tolist(),
    'predicted': [-1] * num_images,
    'sizes': sizes.tolist(),
    'thumbnails': [
      photos.encode_base64(photos.make_thumbnail(image, size))
      for image, size in zip(_draw(rng, num_images), sizes)
    ],
    'attention': {
      'grid': grid,
      'heat': _numbers(rng.integers(0, 256, (num_images, grid, grid)), 'u1'),
    },
    'neighbours': {
      'count': k,
      'index': _numbers(index, '<u4'),
      'similarity': _numbers(np.linspace(1, 0.5, num_images * k), '<f4'),
    },
    'map': {
      'method': 't-SNE',
      'points': _numbers(rng.integers(0, 65536, (num_images, 2)), '<u2'),
    },
  }


def _describe_run(num_images):
  return {
    'dataset': 'birds',
    'method': 'cmd',
    'network': 'teacher',
    'encoder': 'vision transformer (ViT), size S',
    'parameters': 21_000_000,
    'step': 300,
    'total_steps': 300,
    'counts': {'training images': num_images},
    'seconds': 100.0,
    'images_per_second': 50.0,
    'init_from': None,
    'best': None,
    'data_sha256': '0' * 64,
    'hardware': '1 x cpu',
    'versions': {'jax': '0.0'},
    'config': {'optim.name': '"adamw"', 'seed': '0'},
  }


@pytest.fixture(scope='session')
def make_data():
  """(number of images, ...) -> what `page.render` takes."""

  def make(num_images=12, *, k=5, grid=4, labelled=True, parts=False):
    mask = photos.make_mask(np.eye(8, dtype=np.uint8), background=True)
    pair = dict(first=0, second=1, counts=[2, 1], totals=[4, 4])
    confusion = dict(
      judge='The weighted vote',
      total=12,
      right=9,
      pairs=[{**pair, 'examples': [[0, 3], [1]]}],
      classes=[0, 1],
      matrix=[[2, 2], [1, 3]],
      totals=[4, 4],
    )
    return {
      'run': _describe_run(num_images),
      'results': [
        {'name': 'knn/20/top1', 'init': 0.25, 'final': 0.5},
        {'name': 'new/rank1', 'init': None, 'final': 0.75},
      ]
      if labelled
      else [],
      'protocols': {'knn/20': 'Neighbours vote.'} if labelled else {},
      'verdict': [{'kind': 'right', 'text': 'No sign of collapse.'}],
      'curves': {
        'step': [100, 200, 300],
        'series': {
          'loss': [3.0, 2.0, 1.0],
          'loss/image': [2.0, None, 0.5],
          'learning_rate': [1e-3, 5e-4, 0.0],
        },
        'about': {'loss': 'The sum rises.', 'learning_rate': 'Planned.'},
      },
      'classes': list(CLASSES) if labelled else [],
      'attention_name': 'multi-instance attention',
      'crop_fraction': 0.875,
      'photos': _describe_photos(num_images, k, grid, labelled),
      'confusion': confusion if labelled else None,
      'parts': {
        'name': 'round_1',
        'masks': [photos.encode_base64(mask)] * 4,
      }
      if parts
      else None,
      'curated': {
        'counts': {'images': num_images, 'suspicious labels': 1},
        'suspects': [{'file': 'a/<1>.png', 'given': 'a', 'suggested': 'b'}],
      }
      if labelled
      else None,
      'notes': [] if labelled else ['No labels <here>.'],
    }

  return make


@pytest.fixture
def make_curation():
  """() -> what `page.render` takes for the page of curation."""

  def make():
    shown = _describe_photos(4, 1, 1, True)
    classes = ['robin', 'wren', 'robin', 'wren']
    names = ('names', 'sizes', 'thumbnails')
    counts = (
      'images classes unreadable groups spare conflicts suspects outliers '
      'selected pool'
    )
    suspect = dict(photo=0, suggested='wren', margin=0.75, neighbours=[1, 3])
    group = dict(
      photos=[1, 3], kinds=['', 'crop'], differs=True, splits=False, size=3
    )
    return {
      'folder': '/birds',
      'encoder': 'a stub',
      'counts': dict.fromkeys(counts.split(), 1),
      'kinds': {'crop': 1},
      'coverage': [0.7, 0.6],
      'notes': ['1 unreadable <image>'],
      'photos': {name: shown[name] for name in names} | {'classes': classes},
      'suspects': [suspect],
      'groups': [group],
      'outliers': [dict(photo=2, typicality=0.1, is_outlier=True)],
      'selected': [0],
    }

  return make
