import io
import logging

import numpy as np
import pytest
from PIL import Image

from tests.tfds_builders import layouts
from tests.tfds_builders.preparing import examples, prepare, refusal
from tfds_builders.fgvc_aircraft import banner
from tfds_builders.fgvc_aircraft import (
  fgvc_aircraft_dataset_builder as aircraft,
)

SPLITS = ('train', 'val', 'trainval', 'test')
FOLDERS = {
  'three folders': {'train': 'train', 'valid': 'val', 'test': 'test'},
  'four folders': {s: s for s in SPLITS},
  'two folders': {'train': 'trainval', 'test': 'test'},
}


def _pixels(data):
  return np.asarray(Image.open(io.BytesIO(data)))


def _make(layout, folder):
  if layout == 'unpacked':
    layouts.make_aircraft(folder)
  elif layout == 'archive':
    layouts.make_aircraft(folder / 'x')
    name = 'fgvc-aircraft-2013b'
    layouts.tgz(folder / f'{name}.tar.gz', folder / 'x' / name)
    (folder / 'x').rename(folder.parent / 'unused')
  elif layout == 'parquet':
    images = {
      split: [
        (layouts.aircraft_image(image_id), v)
        for image_id, v in layouts.aircraft_ids(split)
      ]
      for split in SPLITS[:2] + SPLITS[3:]
    }
    names = [variant for variant, _, _ in layouts.VARIANTS]
    layouts.make_parquet(folder, images, names)
  else:
    layouts.make_aircraft_folders(folder, splits=FOLDERS[layout])


@pytest.mark.parametrize(
  'layout', ['unpacked', 'archive', 'parquet', *sorted(FOLDERS)]
)
def test_every_layout_gives_three_levels_and_no_banner(tmp_path, layout):
  _make(layout, tmp_path / 'manual')
  builder = prepare(aircraft.Builder, tmp_path / 'manual', tmp_path / 'data')
  splits = SPLITS[2:] if layout == 'two folders' else SPLITS
  assert set(builder.info.splits) == set(splits)
  features = builder.info.features
  is_original = layout in ('unpacked', 'archive')
  assert len(features['label'].names) == (3 if is_original else 100)
  for split in splits:
    ids = layouts.aircraft_ids(split)
    found = {r['image']: r for r in examples(builder, split).values()}
    assert len(found) == len(ids)
    for image_id, v in ids:
      whole = layouts.aircraft_image(image_id)
      record = found[banner.cut_banner(whole)]
      height = _pixels(whole).shape[0] - 20
      assert _pixels(record['image']).shape[0] == height
      names = tuple(
        features[level].names[record[level]]
        for level in ('label', 'family', 'manufacturer')
      )
      assert names == layouts.VARIANTS[v]
      if is_original:
        np.testing.assert_allclose(
          record['bbox'], [10 / height, 0, 40 / height, 0.5], rtol=1e-6
        )
        assert record['file_name'].decode() == f'{image_id}.jpg'
      else:
        assert record['bbox'] is None


@pytest.mark.parametrize('lines', [0, 3])
def test_boxes_are_with_every_image_or_with_none(tmp_path, caplog, lines):
  data = layouts.make_aircraft(tmp_path / 'manual')
  path = data / 'images_box.txt'
  if lines:
    kept = path.read_text().splitlines()[-lines:]
    path.write_text('\n'.join(kept))
  else:
    path.unlink()
  with caplog.at_level(logging.WARNING):
    builder = prepare(aircraft.Builder, tmp_path / 'manual', tmp_path / 'data')
  warning = 'images_box.txt lacks 6 images, the first is 0001000.jpg'
  assert (warning in caplog.text) == bool(lines)
  for split in ('trainval', 'test'):
    found = examples(builder, split).values()
    assert found and all(record['bbox'] is None for record in found)


def test_files_whose_banner_is_gone_are_kept_whole(tmp_path):
  _make('unpacked', tmp_path / 'manual')
  text = refusal(
    aircraft.Builder, tmp_path / 'manual', tmp_path / 'data', 'no_banner'
  )
  assert '3 images in train, not 3,334' in text
  config = aircraft.AircraftConfig(
    name='small', description='', is_whole=False, banner_px=0
  )
  builder = prepare(
    aircraft.Builder, tmp_path / 'manual', tmp_path / 'data', config
  )
  record = examples(builder, 'test')['0003001.jpg']
  assert record['image'] == layouts.aircraft_image('0003001')


@pytest.mark.parametrize('layout', ['unpacked', 'two folders'])
def test_wrong_counts_are_refused_with_both_numbers(tmp_path, layout):
  _make(layout, tmp_path / 'manual')
  text = refusal(aircraft.Builder, tmp_path / 'manual', tmp_path / 'data')
  if layout == 'unpacked':
    for words in (
      '3 images in train, not 3,334',
      '3 images in val, not 3,333',
      '6 images in trainval, not 6,667',
      '3 images in test, not 3,333',
      '3 families, not 70',
    ):
      assert words in text
  else:
    assert 'has 3 classes, not 100' in text


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
  args = aircraft.Builder, tmp_path / 'manual', tmp_path / 'data', 'quicktest'
  layouts.write(tmp_path / 'manual' / 'readme.txt', '')
  text = refusal(*args)
  assert 'fgvc-aircraft-2013b.tar.gz' in text and '2.75 GB' in text
  assert 'robots.ox.ac.uk' in text
  data = layouts.make_aircraft(tmp_path / 'manual')
  path = data / 'images_box.txt'
  boxes = path.read_text()
  path.write_text('0001000 1 1 a 1\n')
  assert 'images_box.txt does not fit' in refusal(*args)
  path.write_text(boxes)
  path = data / 'images_family_val.txt'
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([*lines[:-1], '0002002 Zeppelin']))
  assert 'images_family_val.txt does not fit' in refusal(*args)
  path.write_text('\n'.join([*lines[:-1], '0002002']))
  assert 'images_family_val.txt, line 3' in refusal(*args)
  path.unlink()
  assert 'lacks images_family_val.txt' in refusal(*args)


def test_a_photograph_that_is_all_banner_is_reported(tmp_path):
  data = layouts.make_aircraft(tmp_path / 'manual')
  path = data / 'images' / '0003000.jpg'
  path.write_bytes(layouts.jpeg(0, 20, 20))
  text = refusal(
    aircraft.Builder, tmp_path / 'manual', tmp_path / 'data', 'quicktest'
  )
  assert '1 of 3 images are damaged: images/0003000.jpg (20 rows' in text


def _encode(pixels, **options):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, **options)
  return file.getvalue()


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('subsampling', [0, 1, 2])
@pytest.mark.parametrize('restart', [0, 1])
def test_cutting_jpeg_keeps_every_row_above(progressive, subsampling, restart):
  for height in range(60, 78):
    photo = _pixels(layouts.jpeg(height, height, 50))
    rows = np.zeros((20, 50, 3), np.uint8)
    whole = _encode(
      np.concatenate([photo, rows]),
      format='JPEG',
      quality=95,
      progressive=progressive,
      subsampling=subsampling,
      restart_marker_rows=restart,
      exif=Image.Exif().tobytes(),
    )
    cut = banner.cut_banner(whole)
    assert len(cut) == len(whole)
    assert sum(a != b for a, b in zip(cut, whole)) <= 2
    expected, found = _pixels(whole)[:-20], _pixels(cut)
    assert found.shape == (height, 50, 3)
    np.testing.assert_array_equal(found[:-2], expected[:-2])
    # Where colour is subsampled, that of the banner no longer bleeds in.
    if subsampling < 2:
      np.testing.assert_array_equal(found, expected)


def test_decoding_a_cut_jpeg_at_a_smaller_scale():
  whole = _encode(_pixels(layouts.jpeg(0, 180, 240)), format='JPEG', quality=95)
  image = Image.open(io.BytesIO(banner.cut_banner(whole)))
  image.draft(None, (60, 40))
  assert image.size == (60, 40)
  image.load()
  reference = Image.open(io.BytesIO(whole))
  reference.draft(None, (60, 45))
  np.testing.assert_array_equal(
    np.asarray(image)[:39], np.asarray(reference)[:39]
  )


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA'])
def test_cutting_other_formats_is_lossless(mode):
  image = Image.open(io.BytesIO(layouts.jpeg(1, 50, 30))).convert(mode)
  file = io.BytesIO()
  image.save(file, 'PNG')
  cut = Image.open(io.BytesIO(banner.cut_banner(file.getvalue())))
  assert cut.mode == mode and cut.size == (30, 30)
  np.testing.assert_array_equal(
    np.asarray(cut.convert('RGBA')), np.asarray(image.convert('RGBA'))[:30]
  )


def test_the_taxonomy_has_the_published_numbers():
  assert len(aircraft.TAXONOMY) == 100
  for level, number in enumerate((100, 70, 30)):
    assert len({row[level] for row in aircraft.TAXONOMY}) == number
  variants = [row[0] for row in aircraft.TAXONOMY]
  assert variants == sorted(variants)
  assert set(layouts.VARIANTS) <= set(aircraft.TAXONOMY)
