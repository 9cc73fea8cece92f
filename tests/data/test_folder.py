"""Folders of images: layouts, splits, labels files, and mistakes in them."""

from __future__ import annotations

import json
import os
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cmd_jax import errors
from cmd_jax.data import canvas, image_files, image_formats
from cmd_jax.data.inspect import kinds
from cmd_jax.data.sources import base, folder

HEADER = 'file,class_name,label,split\n'


def add(root, *names):
  """Puts small images of different colours into a folder."""
  for index, name in enumerate(names):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (50 * index, 100, 255 - 50 * index)
    file_format = None if path.suffix else 'PNG'
    Image.new('RGB', (3, 2), colour).save(path, file_format)


def touch(root, *names):
  """Lists need no images: empty files are quicker."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def splits_of(root, **options):
  """Every split as a dict from file name to class name ('' for none)."""
  made = {}
  for split in folder.SPLITS:
    listed = folder.folder_source(str(root), split, **options)
    assert listed.name == f'{root.name}/{split}'
    assert listed.labels.dtype == np.int32
    assert listed.labels.shape == (len(listed.file_names),)
    assert list(listed.file_names) == sorted(set(listed.file_names))
    made[split] = {
      name: '' if label == base.UNLABELLED else listed.class_names[label]
      for name, label in zip(listed.file_names, listed.labels)
    }
  return made


def classes_of(root, **options):
  """The class names, checked to be the same for all splits."""
  classes = {
    folder.folder_source(str(root), split, **options).class_names
    for split in folder.SPLITS
  }
  assert len(classes) == 1
  return classes.pop()


def message_of(root, split='train', **options):
  """The one line a user sees."""
  with pytest.raises(errors.UserError) as caught:
    folder.folder_source(str(root), split, **options)
  message = str(caught.value)
  assert message and '\n' not in message
  return message


def test_flat_folder_is_unlabelled(tmp_path):
  touch(tmp_path, 'b.jpg', 'a.png', 'c.JPG')
  every = {'a.png': '', 'b.jpg': '', 'c.JPG': ''}
  assert splits_of(tmp_path) == {
    'train': every,
    'pretrain': every,
    'test': {},
    'val': {},
  }
  assert classes_of(tmp_path) == ()


def test_extensions_and_hidden_files(tmp_path):
  names = [f'a{ext}' for ext in image_formats.EXTENSIONS]
  names += [f'b{ext.upper()}' for ext in image_formats.EXTENSIONS]
  touch(tmp_path, *names, '.hidden.jpg', '.hidden/a.jpg', 'd/.hidden/a.jpg')
  touch(tmp_path, 'notes.txt', 'jpg', 'a.jpg.part', 'model.npz')
  (tmp_path / 'folder.jpg').mkdir()
  assert set(splits_of(tmp_path)['pretrain']) == set(names)
  usual = 'jpg jpeg png webp bmp gif tif tiff ppm'
  more = 'jfif jpe avif jp2 dib pgm pnm pbm j2k jpx apng mpo'
  for ext in f'{usual} {more}'.split():
    assert f'a.{ext}' in names
  for ext in 'eps ps pdf svg psd ico tga cr2 npy txt mp4 mpeg'.split():
    assert f'.{ext}' not in image_formats.EXTENSIONS


def _saved(path, extension):
  """Writes a picture under an extension; False where Pillow can't write it."""
  path = path / f'a{extension}'
  mode = 'L' if extension == '.pgm' else 'RGB'
  mode = {'.pbm': '1', '.pfm': 'F'}.get(extension, mode)
  try:
    Image.new(mode, (8, 9)).save(path)
  except (OSError, ValueError, KeyError, DeprecationWarning):
    return False
  return True


def test_the_extensions_are_those_of_what_is_opened(tmp_path):
  image_formats.available()
  written = 0
  for extension in Image.registered_extensions():
    if not _saved(tmp_path, extension):
      continue
    written += 1
    try:
      image_files.open_rgb(tmp_path / f'a{extension}')
      opens = True
    except (OSError, ValueError):
      opens = False
    assert opens == (extension in image_formats.EXTENSIONS), extension
  assert written > 25


def test_usual_extensions_are_not_misnamed(tmp_path):
  names = ['a.jfif', 'a.jpe', 'a.dib', 'a.bmp', 'a.pgm', 'a.jp2', 'a.mpo']
  add(tmp_path, *names)
  # A .dib with the header of a .bmp.
  Image.new('RGB', (3, 2)).save(tmp_path / 'b.dib', 'BMP')
  Image.new('RGB', (3, 2)).save(tmp_path / 'b.jpg', 'PNG')
  for path in tmp_path.iterdir():
    noted = np.array([kinds.noted_kinds(image_files.open_rgb(path))])
    is_misnamed = len(kinds.rows_of_kind(noted, 'misnamed')) == 1
    assert is_misnamed == (path.name == 'b.jpg'), path.name


def make_run(root, **files):
  """A work directory that holds pictures of its own."""
  root.mkdir(parents=True)
  for name, content in files.items():
    (root / f'{name}.json').write_text(content)
  touch(root, 'neighbours.png', 'parts/0/sheet.png')


def test_work_directories_are_no_photographs(tmp_path):
  touch(tmp_path, 'a/1.jpg', 'a/2.jpg', 'b/1.jpg', 'b/2.jpg')
  before = splits_of(tmp_path)
  make_run(tmp_path / 'runs' / 'one', config='{}')
  (tmp_path / 'runs' / 'one' / 'checkpoints').mkdir()
  # Before its first checkpoint.
  fields = ('format_version', 'dataset', 'method', 'model', 'eval', 'seed')
  make_run(tmp_path / 'a' / 'run', config=json.dumps(dict.fromkeys(fields)))
  assert splits_of(tmp_path) == before
  assert classes_of(tmp_path) == ('a', 'b')
  (note,) = folder.folder_source(str(tmp_path), 'train').notes
  assert note.startswith('2 folders are not looked into') and (
    note.endswith('work directories of runs: a/run, runs/one')
  )
  # With a file of labels too.
  (tmp_path / 'labels.csv').write_text('file,class_name\na/1.jpg,a\n')
  notes = folder.folder_source(str(tmp_path), 'train').notes
  assert note in notes and '3 images of the folder are not in' in notes[1]


def test_other_folders_with_a_config_are_photographs(tmp_path):
  make_run(tmp_path / 'a', config='{"model": "camera"}')
  make_run(tmp_path / 'b', config='not JSON')
  make_run(tmp_path / 'c', other='{}')
  (tmp_path / 'c' / 'checkpoints').mkdir()
  assert len(splits_of(tmp_path)['pretrain']) == 6


def test_thumbnails_of_storage_systems_are_no_class(tmp_path):
  touch(tmp_path, 'a/1.jpg', 'b/1.jpg')
  before = splits_of(tmp_path)
  touch(tmp_path, 'a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg', '@eaDir/x.jpg')
  touch(tmp_path, '#recycle/x.jpg', '__MACOSX/a/x.jpg', '$RECYCLE.BIN/x.jpg')
  touch(tmp_path, 'a/.@__thumb/1.jpg', 'lost+found/1.jpg')
  assert splits_of(tmp_path) == before
  (note,) = folder.folder_source(str(tmp_path), 'train').notes
  assert note.startswith('6 folders are not looked into')
  assert '#recycle, $RECYCLE.BIN, @eaDir, ...' in note


def test_classes_at_any_depth(tmp_path):
  touch(tmp_path, *(f'gulls/herring/{i}.jpg' for i in range(4)))
  touch(tmp_path, *(f'gulls/{i}.jpg' for i in range(3)))
  touch(tmp_path, *(f'owls/{i}.jpg' for i in range(3)))
  touch(tmp_path, 'stray.jpg')
  made = splits_of(tmp_path)
  assert classes_of(tmp_path) == ('gulls', 'gulls/herring', 'owls')
  labelled = made['train'] | made['test']
  assert not made['train'].keys() & made['test'].keys()
  assert labelled == {
    name: name.rpartition('/')[0]
    for name in (
      *(f'gulls/herring/{i}.jpg' for i in range(4)),
      *(f'gulls/{i}.jpg' for i in range(3)),
      *(f'owls/{i}.jpg' for i in range(3)),
    )
  }
  # An image without a class is still good for pre-training.
  assert made['pretrain'] == made['train'] | {'stray.jpg': ''}


def test_given_split_folders(tmp_path):
  touch(tmp_path, 'Train/a/1.jpg', 'Train/b/sub/2.jpg', 'TEST/a/3.jpg')
  touch(tmp_path, 'val/c/4.jpg', 'unlabeled/x/5.jpg', 'unlabeled/6.jpg')
  touch(tmp_path, 'Train/7.jpg', 'TEST/8.jpg', 'd/train/9.jpg')
  assert classes_of(tmp_path) == ('a', 'b/sub', 'c', 'd/train')
  train = {
    'Train/a/1.jpg': 'a',
    'Train/b/sub/2.jpg': 'b/sub',
    'd/train/9.jpg': 'd/train',
  }
  unlabelled = {
    'unlabeled/x/5.jpg': '',
    'unlabeled/6.jpg': '',
    'Train/7.jpg': '',
  }
  # val is not test if there is test; nor is a test image for pre-training.
  assert splits_of(tmp_path) == {
    'train': train,
    'pretrain': train | unlabelled,
    'test': {'TEST/a/3.jpg': 'a'},
    'val': {'val/c/4.jpg': 'c'},
  }


def test_images_in_no_split_and_other_files_are_noted(tmp_path):
  touch(tmp_path, 'train/a/1.jpg', 'test/a/2.jpg', 'test/3.jpg', 'val/a/4.jpg')
  touch(tmp_path, 'train/a/1.CR2', 'train/b.cr2', 'README', '.hidden')
  os.mkfifo(tmp_path / 'pipe.jpg')
  notes = folder.folder_source(str(tmp_path), 'train').notes
  in_no_split, kept, others = notes
  assert in_no_split.startswith('1 images of the folder are in no used')
  assert kept.startswith('1 images of the folder are kept for validation')
  assert others.startswith('4 other files of the folder')
  assert others.endswith('2 .cr2, 1 .jpg, 1 without extension') or (
    others.endswith('2 .cr2, 1 without extension, 1 .jpg')
  )


def test_a_folder_of_images_alone_has_no_notes(tmp_path):
  touch(tmp_path, 'a/1.jpg', 'a/2.jpg')
  assert folder.folder_source(str(tmp_path), 'train').notes == ()


def test_val_counts_as_test_without_test(tmp_path):
  touch(tmp_path, 'train/a/1.jpg', 'val/a/2.jpg')
  made = splits_of(tmp_path)
  assert made['train'] == {'train/a/1.jpg': 'a'}
  assert made['test'] == {'val/a/2.jpg': 'a'}


@pytest.mark.parametrize(
  'train, validation, test',
  [
    ('train', 'valid', 'test'),
    ('training', 'validation', 'testing'),
    ('Train', 'VALIDATION', 'Test'),
    ('images/train', 'images/val', 'images/test'),
    ('data/training', 'data/valid', 'data/testing'),
  ],
)
def test_validation_images_are_neither_trained_on_nor_classes(
  tmp_path, train, validation, test
):
  touch(tmp_path, f'{train}/robin/1.jpg', f'{train}/wren/2.jpg')
  touch(tmp_path, f'{validation}/robin/3.jpg', f'{test}/wren/4.jpg')
  assert classes_of(tmp_path) == ('robin', 'wren')
  made = splits_of(tmp_path)
  trained = {f'{train}/robin/1.jpg': 'robin', f'{train}/wren/2.jpg': 'wren'}
  assert made['train'] == made['pretrain'] == trained
  assert made['test'] == {f'{test}/wren/4.jpg': 'wren'}
  assert made['val'] == {f'{validation}/robin/3.jpg': 'robin'}


def test_a_class_may_be_called_images(tmp_path):
  touch(tmp_path, 'images/1.jpg', 'images/2.jpg', 'data/x/3.jpg')
  assert classes_of(tmp_path) == ('data/x', 'images')


def test_splits_without_classes(tmp_path):
  touch(tmp_path, 'train/1.jpg', 'test/2.jpg', 'unlabelled/3.jpg')
  assert classes_of(tmp_path) == ()
  assert splits_of(tmp_path) == {
    'train': {'train/1.jpg': ''},
    'pretrain': {'train/1.jpg': '', 'unlabelled/3.jpg': ''},
    'test': {'test/2.jpg': ''},
    'val': {},
  }


def test_only_unlabelled_is_given(tmp_path):
  touch(tmp_path, *(f'a/{i}.jpg' for i in range(20)), 'unlabeled/x.jpg')
  made = splits_of(tmp_path)
  assert made['test'] and len(made['train']) + len(made['test']) == 20
  assert made['pretrain'] == made['train'] | {'unlabeled/x.jpg': ''}


def test_held_out_part(tmp_path):
  for name in 'abc':
    touch(tmp_path, *(f'{name}/{i}.jpg' for i in range(200)))
  made = splits_of(tmp_path)
  assert made == splits_of(tmp_path)
  assert not made['train'].keys() & made['test'].keys()
  for name in 'abc':
    train, test = (
      list(made[split].values()).count(name) for split in ('train', 'test')
    )
    assert train + test == 200
    # Five standard deviations of a binomial distribution.
    assert abs(test - 40) < 5 * (200 * 0.2 * 0.8) ** 0.5
  more = splits_of(tmp_path, test_fraction=0.5)['test']
  assert made['test'].keys() < more.keys()
  assert abs(len(more) - 300) < 5 * 150**0.5
  other = splits_of(tmp_path, seed=1)['test']
  assert other.keys() != made['test'].keys()
  assert splits_of(tmp_path, test_fraction=0.0)['test'] == {}


def test_added_files_do_not_move_the_others(tmp_path):
  touch(tmp_path, *(f'a/{i}.jpg' for i in range(60)))
  touch(tmp_path, *(f'b/{i}.jpg' for i in range(60)))
  before = splits_of(tmp_path)
  touch(tmp_path, *(f'a/{i}-new.jpg' for i in range(60)))
  touch(tmp_path, *(f'0/{i}.jpg' for i in range(60)), 'stray.jpg')
  after = splits_of(tmp_path)
  for split in 'train', 'test':
    assert before[split].items() <= after[split].items()
    assert len(before[split]) < len(after[split])


def test_held_out_part_does_not_depend_on_the_place(tmp_path):
  for place in 'here', 'there':
    touch(tmp_path / place, *(f'a/{i}.jpg' for i in range(30)))
  assert splits_of(tmp_path / 'here') == splits_of(tmp_path / 'there')


@pytest.mark.parametrize('test_fraction', [0.01, 0.5, 0.99])
@pytest.mark.parametrize('seed', range(3))
def test_small_classes_have_train_and_test(tmp_path, test_fraction, seed):
  for count in range(1, 6):
    touch(tmp_path, *(f'{count}/{i}.jpg' for i in range(count)))
  made = splits_of(tmp_path, test_fraction=test_fraction, seed=seed)
  assert set(made['train'].values()) == set('12345')
  assert set(made['test'].values()) == set('2345')


def test_links(tmp_path):
  root = tmp_path / 'root'
  touch(root, 'a/1.jpg', 'z/2.jpg')
  touch(tmp_path / 'elsewhere', '3.jpg', 'deep/4.jpg')
  (root / 'b').symlink_to(tmp_path / 'elsewhere')
  (root / 'a' / 'up').symlink_to(root)
  (root / 'self').symlink_to(root / 'self')
  (tmp_path / 'elsewhere' / 'back').symlink_to(root / 'b')
  # A folder keeps its own name, or the first of its links, in whatever order
  # the file system lists them.
  for index in range(9):
    (root / f'0{index}').symlink_to(root / 'z')
    (root / f'zz{index}').symlink_to(root / 'a')
    (root / f'c{index}').symlink_to(tmp_path / 'elsewhere')
  (root / 'a' / '5.jpg').symlink_to(tmp_path / 'elsewhere' / '3.jpg')
  (root / 'a' / '6.jpg').symlink_to(tmp_path / 'nowhere.jpg')
  made = splits_of(root)
  assert made['train'] | made['test'] == {
    'a/1.jpg': 'a',
    'a/5.jpg': 'a',
    'a/6.jpg': 'a',
    'b/3.jpg': 'b',
    'b/deep/4.jpg': 'b/deep',
    'z/2.jpg': 'z',
  }


def test_strange_names(tmp_path):
  names = ['ä ö/ü.jpg', 'new\nline/1.jpg', "it's, 100%/{0}.jpg"]
  touch(tmp_path, *names)
  raw = os.path.join(os.fsencode(tmp_path / 'new\nline'), b'\xff.jpg')
  try:
    open(raw, 'w').close()
  except OSError:
    raw = None  # This file system only takes UTF-8.
  made = splits_of(tmp_path)
  every = made['pretrain'].keys() | made['test'].keys()
  assert set(names) <= every
  assert len(every) == len(names) + (raw is not None)


def test_images_are_loaded(tmp_path):
  add(tmp_path, 'a/1.png', 'a/2.bmp', 'b/3.tiff', 'unlabeled/4.ppm')
  listed = folder.folder_source(str(tmp_path), 'pretrain', test_fraction=0.0)
  assert len(listed.file_names) == 4
  for copy in listed, pickle.loads(pickle.dumps(listed)):
    for index, name in enumerate(listed.file_names):
      example = copy.load(index)
      expected = np.asarray(Image.open(tmp_path / name))
      np.testing.assert_array_equal(np.asarray(example.image), expected)
      assert example.part_ids is None and example.box is None


def test_scaled_decoding_keeps_the_true_size(tmp_path):
  Image.new('RGB', (640, 480)).save(tmp_path / 'a.jpg')
  whole = folder.folder_source(str(tmp_path), 'train').load(0).image
  listed = folder.folder_source(str(tmp_path), 'train', decode_px=60)
  assert whole.size == (640, 480)
  assert listed.load(0).image.size == (80, 60)
  made = canvas.make_canvases(listed, canvas_px=60)
  np.testing.assert_array_equal(made.sizes, [[480, 640]])


def test_unreadable_images_are_skipped(tmp_path):
  add(tmp_path, 'a.png', 'c.png')
  (tmp_path / 'b.png').write_bytes(b'no image')
  whole = (tmp_path / 'c.png').read_bytes()
  (tmp_path / 'd.png').write_bytes(whole[:50])
  (tmp_path / 'e.png').symlink_to('nowhere.png')
  listed = folder.folder_source(str(tmp_path), 'train')
  made = canvas.make_canvases(listed, canvas_px=4)
  assert made.file_names == ('a.png', 'c.png')
  assert [skip.file_name for skip in made.skipped] == [
    'b.png',
    'd.png',
    'e.png',
  ]
  assert str(tmp_path) not in canvas.skip_report(made)


@pytest.mark.parametrize(
  'path, words',
  [
    ('', ('--config.dataset.path=FOLDER',)),
    ('{tmp}/none', ('{tmp}/none', 'does not exist')),
    ('{tmp}/file.jpg', ('{tmp}/file.jpg', 'is not a folder')),
    ('{tmp}/empty', ('{tmp}/empty', 'no images', '.jpg', '.webp', '.ppm')),
  ],
)
def test_mistakes_in_the_path(tmp_path, path, words):
  touch(tmp_path, 'file.jpg', 'empty/notes.txt', 'empty/.hidden.jpg')
  message = message_of(path.format(tmp=tmp_path))
  for word in words:
    assert word.format(tmp=tmp_path) in message


def test_mistakes_in_the_arguments(tmp_path):
  touch(tmp_path, 'a/1.jpg')
  assert 'train, pretrain, test' in message_of(tmp_path, 'training')
  for fraction in (-0.1, 1.0, 20, float('nan')):
    assert 'test_fraction' in message_of(tmp_path, test_fraction=fraction)
  assert 'mine.csv' in message_of(tmp_path, labels_file='mine.csv')


def test_home_is_expanded(tmp_path, monkeypatch):
  touch(tmp_path, 'birds/1.jpg')
  monkeypatch.setenv('HOME', str(tmp_path))
  listed = folder.folder_source('~/birds', 'train')
  assert listed.name == 'birds/train' and listed.file_names == ('1.jpg',)


def write_csv(root, text, name='labels.csv'):
  root.mkdir(exist_ok=True)
  data = text if isinstance(text, bytes) else text.encode()
  (root / name).write_bytes(data)


def test_labels_file(tmp_path):
  touch(tmp_path, *(f'{name}.jpg' for name in 'abcde'), 'train/f.jpg', 'g.jpg')
  write_csv(
    tmp_path,
    HEADER + 'c.jpg,wren,1,train\n'
    'a.jpg,owl,2,train\n'
    'b.jpg,wren,1,TEST\n'
    'd.jpg,,,unlabeled\n'
    'e.jpg,owl,2,unlabeled\n'
    'train/f.jpg,"gull, herring",7,test\n'
    'g.jpg,,-1,train\n',
  )
  assert classes_of(tmp_path) == ('wren', 'owl', 'gull, herring')
  train = {'a.jpg': 'owl', 'c.jpg': 'wren'}
  assert splits_of(tmp_path) == {
    'train': train,
    'pretrain': train | {'d.jpg': '', 'e.jpg': '', 'g.jpg': ''},
    'test': {'b.jpg': 'wren', 'train/f.jpg': 'gull, herring'},
    'val': {},
  }


def test_labels_file_as_spreadsheets_write_it(tmp_path):
  touch(tmp_path, 'a.jpg', 'sub/b.jpg')
  text = '\ufefffile, class_name ,notes\r\na.jpg, Möwe,x\r\n\r\n,,\r\n'
  write_csv(tmp_path, text + './sub/b.jpg,Eule ,"two\r\nlines"\r\n')
  assert classes_of(tmp_path) == ('Eule', 'Möwe')
  assert splits_of(tmp_path)['train'] == {'a.jpg': 'Möwe', 'sub/b.jpg': 'Eule'}


def test_labels_file_without_splits_holds_out_like_folders(tmp_path):
  names = [f'{name}/{i}.jpg' for name in 'ab' for i in range(30)]
  touch(tmp_path, *names)
  by_folder = splits_of(tmp_path)
  rows = [f'{name},{name[0]}\n' for name in reversed(names)]
  write_csv(tmp_path, 'file,class_name\n' + ''.join(rows))
  assert splits_of(tmp_path) == by_folder
  assert splits_of(tmp_path, labels_file='') == by_folder


def test_labels_file_with_val(tmp_path):
  touch(tmp_path, 'a.jpg', 'b.jpg', 'c.jpg')
  text = 'file,class_name,split\na.jpg,x,train\nb.jpg,x,val\nc.jpg,x,\n'
  write_csv(tmp_path, text)
  made = splits_of(tmp_path)
  assert made['test'] == {'b.jpg': 'x'}
  assert made['train'] == {'a.jpg': 'x', 'c.jpg': 'x'}


def test_labels_file_of_another_name(tmp_path):
  touch(tmp_path, 'a.jpg')
  write_csv(tmp_path, 'file,class_name\na.jpg,x\n', 'mine.csv')
  assert classes_of(tmp_path) == ()
  assert classes_of(tmp_path, labels_file='mine.csv') == ('x',)


def test_listed_file_needs_no_extension(tmp_path):
  add(tmp_path, 'a')
  write_csv(tmp_path, 'file,class_name\na,x\n')
  listed = folder.folder_source(str(tmp_path), 'train')
  assert listed.load(0).image.size == (3, 2)


def test_unlisted_images_are_ignored_and_noted(tmp_path):
  touch(tmp_path, 'a.jpg', 'b.jpg', 'sub/c.jpg')
  write_csv(tmp_path, 'file,class_name\na.jpg,x\n')
  listed = folder.folder_source(str(tmp_path), 'pretrain')
  assert listed.file_names == ('a.jpg',)
  assert listed.notes == ('2 images of the folder are not in labels.csv',)


def test_missing_files_are_skipped_and_reported(tmp_path):
  add(tmp_path, 'b.png')
  text = 'a.png,x,train\nb.png,x,train\nc.png,y,train\n'
  write_csv(tmp_path, 'file,class_name,split\n' + text)
  listed = folder.folder_source(str(tmp_path), 'train')
  assert listed.file_names == ('a.png', 'b.png', 'c.png')
  made = canvas.make_canvases(listed, canvas_px=4)
  assert made.file_names == ('b.png',)
  assert made.skipped == (
    canvas.Skipped('a.png', 'No such file or directory'),
    canvas.Skipped('c.png', 'No such file or directory'),
  )
  assert made.class_names == ('x', 'y')


@pytest.mark.parametrize(
  'text, words',
  [
    ('', ('lacks the column file and class_name',)),
    ('file,label\na.jpg,1\n', ('lacks the column class_name', "'file,label'")),
    ('file|class_name\na.jpg|x\n', ('lacks the column',)),
    (HEADER, ('lists no images',)),
    (HEADER + 'n.jpg,x,1,\nm.jpg,x,1,\n', ('none of the 2 files', 'n.jpg')),
    (HEADER + 'a.jpg,x,1,\nb.jpg,x,1,\n./a.jpg,x,1,\n', ('line 4', 'twice')),
    (HEADER + 'a.jpg,x,1,dev\n', ('line 2', "'dev'", 'val')),
    (HEADER + 'a.jpg,x,one,\n', ('line 2', "'one'", 'not an integer')),
    (HEADER + 'a.jpg,x,1,\n\nb.jpg,x,2,\n', ('line 4', "'x'", '1', '2')),
    (HEADER + 'a.jpg,x,1,\nb.jpg,y,1,\n', ('line 3', "'x'", "'y'", '1')),
    (HEADER + 'a.jpg,x,1,\nb.jpg,y,,\n', ('1 classes have no label', "'y'")),
    (HEADER + 'a.jpg,,3,\n', ('line 2', 'without a class name')),
    (HEADER + ',x,1,\n', ('line 2', 'no file name')),
    (HEADER + 'a.jpg,x\n', ('line 2', '2 values for 4 columns')),
    (HEADER + 'a.jpg,x,1,train,,\n', ('line 2', '6 values for 4 columns')),
    (HEADER + '../a.jpg,x,1,\n', ('line 2', '../a.jpg', 'outside')),
    (HEADER + 'sub/../../a.jpg,x,1,\n', ('line 2', 'outside')),
    (HEADER + '..,x,1,\n', ('line 2', 'outside')),
    (HEADER + '/etc/a.jpg,x,1,\n', ('line 2', '/etc/a.jpg', 'outside')),
    (HEADER + 'a.jpg,"x,1,\n', ('line 2', 'not valid CSV')),
    ((HEADER + 'a.jpg,Möwe,1,\n').encode('latin-1'), ('not UTF-8',)),
    ((HEADER + 'a.jpg,x,1,\n').encode('utf-16'), ('not UTF-8',)),
  ],
)
def test_mistakes_in_the_labels_file(tmp_path, text, words):
  root = tmp_path / 'root'
  touch(tmp_path, 'a.jpg')
  touch(root, 'a.jpg', 'b.jpg', 'sub/c.jpg')
  write_csv(root, text)
  for split in folder.SPLITS:
    message = message_of(root, split)
    assert str(root / 'labels.csv') in message
    for word in words:
      assert word in message


def test_labels_file_that_is_a_folder(tmp_path):
  touch(tmp_path, 'labels.csv/a.jpg')
  assert 'labels.csv' in message_of(tmp_path)


@pytest.mark.skipif(
  not hasattr(os, 'geteuid') or os.geteuid() == 0,
  reason='the superuser may read everything',
)
def test_forbidden_folder(tmp_path):
  touch(tmp_path, 'a/1.jpg', 'b/2.jpg')
  (tmp_path / 'b').chmod(0)
  try:
    assert str(tmp_path / 'b') in message_of(tmp_path)
  finally:
    (tmp_path / 'b').chmod(0o700)


LISTED = {'a/1.jpg': 'a', 'a/2.jpg': 'a', 'b/1.jpg': 'b'}


@pytest.mark.parametrize(
  'text',
  [
    'file;class_name;split\na/1.jpg;a;\n"a/2.jpg";a;\nb/1.jpg;b;\n',
    'sep=;\nfile;class_name\na/1.jpg;a\na/2.jpg;a\nb/1.jpg;b\n',
    'file\tclass_name\na/1.jpg\ta\na/2.jpg\ta\nb/1.jpg\tb\n',
    'File,Class_Name\na/1.jpg,a\na/2.jpg,a\nb/1.jpg,b\n',
    'FILE, Class name ,Label\na/1.jpg,a,0\na/2.jpg,a,0\nb/1.jpg,b,1\n',
    'class-name;FILE\r\na;a/1.jpg\r\na;a/2.jpg\r\nb;b/1.jpg\r\n',
    '\nfile,class_name\ra/1.jpg,a\ra/2.jpg,a\rb/1.jpg,b\r',
  ],
)
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_labels_files_of_spreadsheets(tmp_path, text, encoding):
  touch(tmp_path, *LISTED)
  (tmp_path / 'labels.csv').write_bytes(text.encode(encoding))
  assert splits_of(tmp_path, test_fraction=0.0)['train'] == LISTED


def test_a_delimiter_within_values_is_none(tmp_path):
  touch(tmp_path, 'a;b.jpg', 'c,d.jpg')
  path = tmp_path / 'labels.csv'
  path.write_text('file,class_name\na;b.jpg,x;y\n"c,d.jpg",z\n')
  every = {'a;b.jpg': 'x;y', 'c,d.jpg': 'z'}
  assert splits_of(tmp_path, test_fraction=0.0)['train'] == every
  path.write_text('file;class_name\n"a;b.jpg";"x;y"\nc,d.jpg;z\n')
  assert splits_of(tmp_path, test_fraction=0.0)['train'] == every
  path.write_text('file;class_name\na;b.jpg;x\n')
  assert 'line 2: 3 values for 2 columns; put quotes around values that' in (
    message_of(tmp_path)
  )
  assert message_of(tmp_path).endswith('contain semicolons')
  for header in ('file|class_name', 'file class_name', 'name;class'):
    path.write_text(f'{header}\n')
    assert f'its header is {header!r}' in message_of(tmp_path)
  path.write_text('File,file,class_name\n1,2,3\n')
  assert 'has the column file twice' in message_of(tmp_path)


def _forms(text):
  return [unicodedata.normalize(form, text) for form in ('NFC', 'NFD')]


@pytest.mark.parametrize(
  'file, name',
  [
    ('a/1.jpg', 'a\\1.jpg'),
    ('a/b/1.jpg', '.\\a\\b\\1.jpg'),
    ('a/1.jpg', 'A/1.JPG'),
    ('möwe/ß1.jpg', 'Möwe\\ß1.JPG'),
    _forms('möwe/é.jpg'),
    _forms('möwe/é.jpg')[::-1],
  ],
)
def test_names_that_are_spelt_otherwise_are_found(tmp_path, file, name):
  touch(tmp_path, file, 'b/2.jpg')
  (tmp_path / 'labels.csv').write_text(
    f'file,class_name\n{name},x\nb/2.jpg,y\n'
  )
  made = splits_of(tmp_path, test_fraction=0.0)
  assert made['train'] == {file: 'x', 'b/2.jpg': 'y'}
  (note,) = folder.folder_source(str(tmp_path), 'train').notes
  assert note.startswith('1 names in labels.csv are spelt otherwise')
  assert note.isascii() and ascii(file) in note


def test_the_very_name_comes_first(tmp_path):
  composed, split = _forms('é.jpg')
  names = {'a\\1.jpg': 'p', 'a/1.jpg': 'q', composed: 'r', split: 's'}
  names |= {'B.jpg': 't', 'b.jpg': 'u'}
  touch(tmp_path, *names)
  rows = ''.join(f'{name},{label}\n' for name, label in names.items())
  (tmp_path / 'labels.csv').write_text(f'file,class_name\n{rows}')
  assert splits_of(tmp_path, test_fraction=0.0)['train'] == names
  assert folder.folder_source(str(tmp_path), 'train').notes == ()


def test_names_that_may_be_several_files_are_told(tmp_path):
  touch(tmp_path, 'B.jpg', 'b.jpg', 'c.jpg')
  path = tmp_path / 'labels.csv'
  path.write_text('file,class_name\nc.jpg,x\n.\\b.JPG,x\n')
  assert "line 3: .\\b.JPG may be 'B.jpg' or 'b.jpg'; write" in (
    message_of(tmp_path)
  )
  path.write_text('file,class_name\nC.jpg,x\nc.JPG,y\n')
  assert "line 3: 'c.JPG' is the file that 'C.jpg' is; keep" in (
    message_of(tmp_path)
  )


def test_one_class_in_two_forms_of_unicode_is_one(tmp_path):
  composed, split = _forms('möwe')
  touch(tmp_path, f'train/{composed}/1.jpg', f'test/{split}/2.jpg')
  assert classes_of(tmp_path) == (composed,)
  (tmp_path / 'labels.csv').write_text(
    f'file,class_name,label\ntrain/{composed}/1.jpg,{split},0\n'
    f'test/{split}/2.jpg,{composed},0\n'
  )
  assert classes_of(tmp_path) == (composed,)
