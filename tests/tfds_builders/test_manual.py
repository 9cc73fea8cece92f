import hashlib
import io

import pytest
from PIL import ExifTags, Image, ImageOps

from cmd_jax.errors import UserError
from tests.tfds_builders import layouts
from tfds_builders import manual, photos, repacked


def test_an_original_is_known_by_its_size_and_content(tmp_path):
  path = tmp_path / 'a.tgz'
  path.write_bytes(b'original')
  digest = hashlib.sha256(b'original').hexdigest()
  original = manual.Original('a.tgz', 8, digest, 'example.org')
  manual.verify(path, original)
  path.write_bytes(b'0riginal')
  with pytest.raises(UserError, match='other content.*fetch it again'):
    manual.verify(path, original)
  manual.verify(path, original._replace(sha256=''))
  path.write_bytes(b'origina')
  with pytest.raises(UserError, match='has 7 bytes, but the original 8'):
    manual.verify(path, original)
  manual.verify(path, original._replace(size=0, sha256=''))


def test_archives_are_read_by_name_and_to_the_end(tmp_path):
  for name in ('x/b.txt', 'x/a.txt', 'x/d/c.png', 'e.txt'):
    layouts.write(tmp_path / 'in' / name, name)
  path = tmp_path / 'a.tgz'
  layouts.tgz(path, tmp_path / 'in', '.')
  archive = manual.Archive(path, 'x')
  assert dict(archive.read(['a.txt', 'd/c.png', 'no'])) == {
    'a.txt': b'x/a.txt',
    'd/c.png': b'x/d/c.png',
  }
  assert dict(archive.read_below('d', '.png')) == {'d/c.png': b'x/d/c.png'}
  whole = path.read_bytes()
  wrong_checksum = whole[:-8] + bytes(8)
  for damaged in (whole[:-9], wrong_checksum, whole[:20], b'', b'no archive'):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match='a.tgz is damaged'):
      list(archive.read(['b.txt']))


def test_files_nearest_to_the_top_come_first(tmp_path):
  for name in ('a/b/x.MAT', 'c/x.mat', 'a/b/c/d/e/y.mat', '.hidden/z.mat'):
    layouts.write(tmp_path / name, '')
  (tmp_path / 'c' / 'loop').symlink_to(tmp_path)
  folder = manual.ManualFolder(tmp_path)
  assert folder.file('x*.mat') == tmp_path / 'c/x.mat'
  assert folder.file('y.mat') is None and folder.file('z.mat') is None
  assert folder.folder_with('b') == tmp_path / 'a'
  assert folder.folder_with('b', 'x') is None
  assert manual.ManualFolder(tmp_path / 'no').file('*') is None


def test_all_damaged_and_missing_images_are_counted(tmp_path):
  names = [f'{i}.jpg' for i in range(9)]
  for i, name in enumerate(names[:8]):
    layouts.write(tmp_path / name, layouts.jpeg(i) if i < 2 else b'x' * i)
  found = []
  with pytest.raises(UserError) as error:
    for photo in photos.read_photos(manual.Folder(tmp_path), names, 'the set'):
      found.append(photo)
  assert [(p.name, p.height, p.width) for p in found] == [
    ('0.jpg', 40, 60),
    ('1.jpg', 40, 60),
  ]
  text = str(error.value)
  assert text.startswith('the set: 1 of 9 images are missing: 8.jpg')
  assert '6 of 9 images are damaged: 2.jpg' in text and ', ...' in text


@pytest.mark.parametrize('kind', ['exif', 'xmp'])
def test_images_stay_as_they_were_annotated(tmp_path, kind):
  exif = Image.Exif()
  exif[ExifTags.Base.Make] = 'camera'
  if kind == 'exif':
    exif[ExifTags.Base.Orientation] = 6
  # Any description with this attribute; see Pillow's Image.getexif.
  xmp = b'<x tiff:Orientation="6"></x>' if kind == 'xmp' else b''
  turned = layouts.jpeg(0, exif=exif.tobytes(), xmp=xmp)
  exif[ExifTags.Base.Orientation] = 1
  upright = layouts.jpeg(1, exif=exif.tobytes())
  layouts.write(tmp_path / 'turned.jpg', turned)
  layouts.write(tmp_path / 'upright.jpg', upright)
  files = manual.Folder(tmp_path)
  found = {
    photo.name: photo
    for photo in photos.read_photos(files, ['turned.jpg', 'upright.jpg'], '')
  }
  assert found['upright.jpg'].data == upright
  photo = found['turned.jpg']
  assert (photo.height, photo.width) == (40, 60)
  image = Image.open(io.BytesIO(photo.data))
  assert ImageOps.exif_transpose(image).size == (60, 40)
  whole = Image.open(io.BytesIO(turned))
  assert ImageOps.exif_transpose(whole).size == (40, 60)
  assert image.tobytes() == whole.tobytes()


def test_classes_are_matched_whatever_folders_are_called():
  official = ('001.Black_footed_Albatross', 'F/A-18', 'Ram C/V Van 2012')
  found = ('black footed albatross', 'F_A-18', '003.Ram_C-V_Van_2012')
  labels = repacked.match_classes(found, official, 'here')
  assert labels == dict(zip(found, range(3)))
  with pytest.raises(UserError, match='here has 2 classes, not 3.*F/A-18'):
    repacked.match_classes(found[::2], official, 'here')
  assert (
    len(repacked.match_classes(found[::2], official, 'here', is_whole=False))
    == 2
  )
  with pytest.raises(UserError, match='1 of 2 classes are not in.*Zeppelin'):
    repacked.match_classes(('F-A-18', 'Zeppelin'), official, 'here')
  with pytest.raises(UserError, match='F/A-18 and FA18 are the same class'):
    repacked.match_classes(('F/A-18', 'FA18'), official, 'here')


def test_folders_of_another_set_are_passed_over(tmp_path):
  for split in ('train', 'test'):
    layouts.write(tmp_path / 'a' / split / 'cat' / '1.jpg', '')
    layouts.write(tmp_path / 'b' / split / 'dog' / '1.jpg', '')
    layouts.write(tmp_path / 'b' / split / 'dog' / '._1.jpg', '')
    layouts.write(tmp_path / 'b' / split / 'dog' / 'notes.txt', '')
  folder = manual.ManualFolder(tmp_path)
  found = repacked.find(folder, ('Dog',))
  assert str(found.files) == str(tmp_path / 'b')
  assert found.labels == {
    'test': {'test/dog/1.jpg': 0},
    'train': {'train/dog/1.jpg': 0},
  }
  assert repacked.find(folder, ('Bird',)) is None


def test_damaged_parquet_files_are_refused(tmp_path):
  for split in ('train', 'test'):
    layouts.write(tmp_path / f'{split}-0.parquet', 'no parquet')
  folder = manual.ManualFolder(tmp_path)
  with pytest.raises(UserError, match='test-0.parquet is damaged'):
    repacked.find(folder, ('Dog',))


@pytest.mark.parametrize(
  'given', ['../set', '.', '../set/.', '../set/', './../set', '../../up/set']
)
def test_a_folder_may_be_given_relative_to_where_one_is(
  tmp_path, monkeypatch, given
):
  root = tmp_path / 'up' / 'set'
  (root / 'images').mkdir(parents=True)
  for name in ('classes.txt', 'images/1.jpg', '../secret.txt'):
    (root / name).write_bytes(name.encode())
  monkeypatch.chdir(root)
  folder = manual.ManualFolder(given)
  found = folder.folder_with('classes.txt', 'images')
  files = manual.Folder(found)
  names = ['classes.txt', 'images/1.jpg']
  assert [name for name, _ in files.read(names)] == names
  assert manual.read_texts(files, names[:1]) == {'classes.txt': names[0]}
  # What a list names may not leave the folder, however that is given.
  outside = [
    '../secret.txt',
    'images/../../secret.txt',
    f'{root}/../secret.txt',
  ]
  assert not [*files.read(outside)]


@pytest.mark.parametrize('given', ['.', '../images', '..'])
def test_a_folder_of_images_may_be_given_itself(tmp_path, monkeypatch, given):
  (tmp_path / 'images' / 'x').mkdir(parents=True)
  (tmp_path / 'images' / '1.jpg').touch()
  below = given == '..'
  monkeypatch.chdir(tmp_path / 'images' / ('x' if below else '.'))
  found = manual.ManualFolder(given).image_folder('images')
  assert found is not None and (found / '1.jpg').exists()
