"""The data report: counts, sizes, odd files, duplicates, words."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data import canvas, image_files
from cmd_jax.data.inspect import report
from cmd_jax.data.inspect.report_text import notable, report_text
from cmd_jax.data.sources import base as source_lib
from cmd_jax.data.sources.folder import folder_source

_PX = 32


def _picture(seed, width=60, height=45):
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
  return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _encoded(image, file_format='PNG', **options):
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


def _canvases(files, labels, class_names, name='set/train'):
  """Canvases of (name, encoded file or None)."""

  def load(index):
    if files[index][1] is None:
      raise OSError('cannot be read')
    return source_lib.Example(image_files.open_rgb(io.BytesIO(files[index][1])))

  source = source_lib.Source(
    name=name,
    class_names=class_names,
    file_names=tuple(file for file, _ in files),
    labels=np.array(labels, np.int32),
    load=load,
  )
  return canvas.make_canvases(source, canvas_px=_PX)


def _two_splits():
  files = [(f'{i}.png', _encoded(_picture(i))) for i in range(8)]
  train = _canvases(
    [
      *files[:4],
      ('broken\n.png', None),
      ('tall.png', _encoded(_picture(20, 20, 200))),
      ('white.png', _encoded(Image.new('RGB', (40, 40), 'white'))),
      ('black.png', _encoded(Image.new('RGB', (40, 40)))),
    ],
    [0, 0, 0, 1, 1, 1, -1, 2],
    ('wren', 'robin', 'finch', 'crow'),
  )
  test = _canvases(
    [
      *files[4:],
      ('same.png', files[0][1]),
      ('near.jpg', _encoded(_picture(3), 'JPEG', quality=50)),
      ('near_too.jpg', _encoded(_picture(4), 'JPEG', quality=50)),
    ],
    [0, 0, 0, 1, 0, 0, 0],
    train.class_names,
    'set/test',
  )
  train = train._replace(notes=('5 files are in no split',))
  return {'train': train, 'test': test}


@pytest.fixture(scope='module')
def made():
  return report.make_report(_two_splits(), placement='placement device: why')


def test_counts_in_are_counts_used_and_skipped(made):
  train = made['splits']['train']
  assert (train['images_in'], train['used'], train['skipped']) == (8, 7, 1)
  assert train['skipped_images'] == [['broken\n.png', 'cannot be read']]
  assert train['unlabelled'] == 1
  classes = train['classes']
  assert classes['images'] == {'wren': 3, 'robin': 2, 'finch': 1, 'crow': 0}
  assert (classes['min'], classes['median'], classes['max']) == (1, 2, 3)
  assert classes['smallest'][0] == ('finch', 1)
  assert classes['largest'][0] == ('wren', 3)
  assert classes['absent'] == ['crow']
  assert made['splits']['test']['classes']['absent'] == ['finch', 'crow']


def test_sizes_are_binned(made):
  train = made['splits']['train']
  sides = train['shorter_side_px']
  assert (sides['min'], sides['median'], sides['max']) == (20, 45, 45)
  assert sides['histogram']['<32'] == 1
  assert sides['histogram']['32-64'] == 6
  assert sum(sides['histogram'].values()) == train['used']
  ratios = train['aspect_ratio']['histogram']
  assert ratios == {
    '<1.25': 2, '1.25-1.5': 4, '1.5-2': 0, '2-4': 0, '>=4': 1
  }  # fmt: skip
  assert train['smaller_than_canvas'] == 1
  assert train['canvas_bytes'] == 7 * _PX * _PX * 3


def test_duplicates_across_and_within_and_with_other_labels(made):
  images = made['duplicates']['images']
  assert images['test']['train'] == {'copies': 1, 'twins': 2}
  assert images['train']['test'] == {'copies': 1, 'twins': 2}
  assert images['test']['test'] == {'copies': 0, 'twins': 2}
  assert images['train']['train'] == {'copies': 0, 'twins': 0}
  # 3.png of the robins is near.jpg of the wrens.
  assert made['duplicates']['other_label'] == 2
  copy, near = made['duplicates']['pairs']['across']
  assert (copy['a']['file'], copy['b']['file']) == ('0.png', 'same.png')
  assert copy['distance'] == -1 < near['distance']
  assert near['a'] == {'split': 'train', 'file': '3.png', 'class': 'robin'}
  assert near['b'] == {'split': 'test', 'file': 'near.jpg', 'class': 'wren'}
  (within,) = made['duplicates']['pairs']['within']
  assert {within[x]['file'] for x in 'ab'} == {'4.png', 'near_too.jpg'}


def test_pictures_of_one_colour_are_said_to_be_left_out(made):
  flat = made['splits']['train']['one_colour']
  assert flat == {'count': 2, 'first': ['white.png', 'black.png']}
  assert 'one colour: 2 (white.png, black.png); not compared' in report_text(
    made
  )


def test_text_says_what_the_numbers_say(made):
  text = report_text(made)
  for words in (
    'images: 8 in = 7 used + 1 skipped',
    r"'broken\n.png': cannot be read",
    'classes: 3 of 4, 1 to 3 images, median 2',
    'fewest: finch 1, robin 2, wren 3',
    'no images: finch, crow',
    '  5 files are in no split',
    'without a label: 1 images',
    '2 of 7 test images have a twin in train (1 of them a copy)',
    'train 0.png [wren] = test same.png [wren]',
    'train 3.png [robin] ~ test near.jpg [wren] (',
    '2 images have a twin with another label',
    'placement device: why',
  ):
    assert words in text
  json.dumps(made)
  assert text.isascii()


def test_notable_is_what_a_researcher_should_know(made):
  lines = notable(made)
  assert lines[0].startswith('2 of 7 test images have a twin in train')
  assert lines[1] == '2 images have a twin with another label'
  assert '1 of 4 classes have no train images (crow)' in lines
  assert not any('broken' in line for line in lines)


def test_nothing_is_notable_about_a_plain_set():
  files = [(f'{i}.png', _encoded(_picture(i))) for i in range(4)]
  plain = report.make_report(
    {'train': _canvases(files, [0, 1, 0, 1], ('a', 'b'))}
  )
  assert notable(plain) == []
  assert report_text(plain).endswith('  none\n')
  unlabelled = report.make_report({'train': _canvases(files, [-1] * 4, ())})
  assert 'classes: none' in report_text(unlabelled)


class _Streamed:
  """An array that is read by rows, as streamed splits are."""

  def __init__(self, images):
    self._images = images
    self.shape, self.nbytes, self.read = images.shape, images.nbytes, 0

  def __getitem__(self, rows):
    self.read += np.size(rows)
    return self._images[rows]


def test_of_a_streamed_split_a_sample_is_looked_at(monkeypatch):
  monkeypatch.setattr(report, 'MAX_STREAMED', 20)
  files = [(f'{i}.png', _encoded(_picture(i % 45))) for i in range(90)]
  whole = _canvases(files, [0] * 90, ('a',))
  images = _Streamed(whole.images)
  # The first is shown as another one, as its file can't be read.
  skipped = (canvas.Skipped('0.png', 'torn'),)
  labels = whole.labels.copy()
  labels[0] = source_lib.UNLABELLED
  split = whole._replace(
    images=images, skipped=skipped, labels=labels, kinds=None
  )
  made = report.make_report({'train': split})
  facts = made['splits']['train']
  assert images.read < 30
  assert facts['looked_at'] == 19
  assert (facts['images_in'], facts['used']) == (90, 89)
  assert facts['unlabelled'] == 0
  assert facts['kinds'] is None
  text = report_text(made)
  assert 'of 19 images looked at' in text
  assert 'only among the images looked at' in text
  assert 'as far as they were looked at' in text


def test_a_folder_of_odd_files_is_accounted_for(tmp_path):
  def save(name, image, *arguments, **options):
    image.save(os.path.join(os.fsencode(tmp_path), name), *arguments, **options)

  turned = Image.Exif()
  turned[0x0112] = 6
  jpeg = _encoded(_picture(1), 'JPEG')
  (tmp_path / 'torn.jpg').write_bytes(jpeg[: len(jpeg) // 2])
  (tmp_path / 'empty.jpg').write_bytes(b'')
  (tmp_path / 'text.jpg').write_text('not an image')
  (tmp_path / 'nowhere.jpg').symlink_to(tmp_path / 'none')
  (tmp_path / 'loop').symlink_to(tmp_path)
  bad = os.path.join(os.fsencode(tmp_path), b'bad\xff\n.jpg')
  with open(bad, 'wb') as file:
    file.write(b'\xff\xd8\xff junk')
  save(b'png.jpg', _picture(2), 'PNG')
  save(b'dot.png', Image.new('RGB', (1, 1)))
  save(b'long.png', _picture(3, 30000, 10))
  save(b'cmyk.jpg', _picture(4).convert('CMYK'))
  deep = np.asarray(_picture(5).convert('L')).astype(np.uint16) * 257
  save(b'deep.png', Image.fromarray(deep))
  save(b'moves.gif', _picture(6), save_all=True, append_images=[_picture(7)])
  save(b'palette.png', _picture(8).convert('P'))
  save(b'alpha.png', _picture(9).convert('RGBA'))
  save(b'turned.jpg', _picture(10), exif=turned)
  save('a b\nVögel.jpg'.encode(), _picture(11))
  save(b'odd\xfe.jpg', _picture(12), 'JPEG')
  source = folder_source(str(tmp_path), 'pretrain')
  canvases = canvas.make_canvases(source, canvas_px=_PX)
  made = report.make_report({'train': canvases})
  facts = made['splits']['train']
  assert (facts['images_in'], facts['used'], facts['skipped']) == (16, 11, 5)
  assert {
    kind: found['first'] for kind, found in facts['kinds'].items()
  } == {
    'grayscale': ['deep.png'],
    'CMYK': ['cmyk.jpg'],
    'palette': ['moves.gif', 'palette.png'],
    'alpha channel': ['alpha.png'],
    '16-bit': ['deep.png'],
    'animated': ['moves.gif'],
    'EXIF-rotated': ['turned.jpg'],
    'misnamed': ['png.jpg'],
  }  # fmt: skip
  assert facts['one_colour']['first'] == ['dot.png']
  assert facts['aspect_ratio']['max'] == 3000
  assert made['duplicates']['images'] == {
    'train': {'train': {'copies': 0, 'twins': 0}}
  }
  text = report_text(made) + canvas.skip_report(canvases)
  assert r"'bad\udcff\n.jpg': not an image" in text
  # Can be written, with all the names that file systems give.
  text.encode()
  json.dumps(made)


def _grey16(top, low=0):
  values = np.linspace(low, top, 900).astype(np.uint16).reshape(30, 30)
  return Image.fromarray(values)


@pytest.mark.parametrize('file_format', ['PNG', 'TIFF', 'PPM'])
@pytest.mark.parametrize('top', [255, 1023, 4095, 16383])
def test_fewer_bits_in_files_of_16_are_told_with_their_range(file_format, top):
  files = [
    ('dark.x', _encoded(_grey16(top, 3), file_format)),
    ('bright.x', _encoded(_grey16(60000, 7), file_format)),
    ('other.png', _encoded(_picture(1))),
  ]
  made = _canvases(files, [-1, -1, -1], ())
  made_report = report.make_report({'train': made})
  deep = made_report['splits']['train']['sixteen_bits']
  assert (deep['count'], deep['low'], deep['high']) == (2, 3, 60000)
  assert deep['dark'] == {'count': 1, 'first': ['dark.x']}
  assert deep['dark_high'] == top
  text = report_text(made_report)
  assert (
    f'2 files of 16 bits: 3 to 60,000 of 65,535; 1 have none above {top:,}'
    in text
  )
  (line,) = [x for x in notable(made_report) if '16 bits' in x]
  assert f'up to {top:,} of 65,535 alone' in line and 'dark.x' in line
  assert f'--config.grey16_white={top}' in line


def test_files_of_fewer_bits_that_are_scaled_are_not_dark():
  file = io.BytesIO(_encoded(_grey16(4095)))
  image = image_files.open_rgb(file, grey16_white=4095)
  source = source_lib.Source(
    'set/train',
    (),
    ('a.png',),
    np.array([-1]),
    lambda _: source_lib.Example(image),
  )
  made = canvas.make_canvases(source, canvas_px=_PX)
  made_report = report.make_report({'train': made})
  assert 'of 16 bits: 0 to 4,095 of 65,535\n' in report_text(made_report)
  assert not [x for x in notable(made_report) if '16 bits' in x]


def test_files_of_16_bits_that_use_them_are_not_remarkable():
  made = _canvases([('a.png', _encoded(_grey16(65535)))], [-1], ())
  made_report = report.make_report({'train': made})
  assert 'to 65,535 of 65,535\n' in report_text(made_report)
  assert not [x for x in notable(made_report) if '16 bits' in x]
  made = _canvases([('a.png', _encoded(_picture(1)))], [-1], ())
  made_report = report.make_report({'train': made})
  assert made_report['splits']['train']['sixteen_bits'] is None
