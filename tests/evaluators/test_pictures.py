import numpy as np
import pytest
from PIL import Image, ImageDraw

from cmd_jax.evaluators import Features, pictures

_CLASSES = ('robin', 'a warbler of the far north', 'wren\nof öland')


def _features(labels):
  vectors = np.eye(4, dtype=np.float32)[: len(labels)]
  names = tuple(f'{i}.png' for i in range(len(labels)))
  return Features(vectors, np.int32(labels), _CLASSES, names)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
  """What is written where, and the picture."""
  texts = []
  write = ImageDraw.ImageDraw.text

  def record(self, place, text, **options):
    texts.append((place, text))
    write(self, place, text, **options)

  monkeypatch.setattr(ImageDraw.ImageDraw, 'text', record)
  path = tmp_path / 'neighbours.png'
  pictures.save_neighbours(
    path,
    queries=np.full((1, 8, 8, 3), 90, np.uint8),
    query_features=_features([0]),
    gallery=np.full((4, 8, 8, 3), 90, np.uint8),
    gallery_features=_features([0, 1, 2, -1]),
    attention=np.ones((1, 4), np.float32),
  )
  with Image.open(path) as picture:
    return texts, np.array(picture)


def test_the_legend_says_what_frames_and_brightness_mean(drawn):
  texts, picture = drawn
  legend = ' '.join(text for (_, top), text in texts if top < 10)
  for words in ('looks at*', '* bright: attended most, scaled'):
    assert words in legend
  # Each colour that the legend names is that of the frame it is said of.
  frames = picture[20, 2 * 96 + 2 :: 96]
  for word, column, channel in (('green same', 0, 1), ('red another', 1, 0)):
    assert word in legend
    assert frames[column].argmax() == channel
  assert 'grey unlabelled' in legend
  assert np.ptp(frames[3].astype(int)) == 0


def test_classes_are_named_below_the_images(drawn):
  texts, picture = drawn
  below = [text for (_, top), text in texts if top > 90]
  want = ['robin', '', 'robin', 'a warb..r north', 'wren of ?land', '']
  assert below == want
  assert max(top for (_, top), _ in texts) + 10 < len(picture)
