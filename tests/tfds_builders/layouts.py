"""Small stand-ins for the published sets, in their true layouts.

Names of files, folders, lists and fields are those of the archives; the images
are noise in a colour of their class.
"""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image
from scipy import io as matlab_io

CUB_CLASSES = ('001.Black_footed_Albatross', '004.Groove_billed_Ani')
CAR_CLASSES = ('AM General Hummer SUV 2000', 'Ram C/V Cargo Van Minivan 2012')
VARIANTS = (
  ('DHC-8-100', 'Dash 8', 'de Havilland'),
  ('F-16A/B', 'F-16', 'Lockheed Martin'),
  ('F/A-18', 'F/A-18', 'McDonnell Douglas'),
)
BANNER_PX = 20


def jpeg(seed, height=40, width=60, mode='RGB', **options):
  """A JPEG file that depends on `seed`."""
  rng = np.random.default_rng(seed)
  channels = {'RGB': 3, 'L': 1}[mode]
  coarse = rng.integers(0, 256, (5, 7, channels), np.uint8)
  image = Image.fromarray(coarse.squeeze()).resize((width, height))
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=90, **options)
  return file.getvalue()


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, str):
    path.write_text(content)
  else:
    path.write_bytes(content)


def tgz(path, folder, member=None):
  """Packs `folder` under the name `member`; images before lists."""
  with tarfile.open(path, 'w:gz') as tar:
    for file in sorted(folder.rglob('*'), key=lambda f: f.suffix):
      if file.is_file():
        name = f'{member or folder.name}/{file.relative_to(folder)}'
        tar.add(file, name)


def cub_names(per_class=4):
  """(file name, class number, is training) of every image."""
  return [
    (f'{name}/{name[4:]}_{i:04d}_{100 + i}.jpg', c, i % 2 == 0)
    for c, name in enumerate(CUB_CLASSES, 1)
    for i in range(per_class)
  ]


def make_cub(root, per_class=4, masks=True):
  """Writes root/CUB_200_2011 and root/segmentations."""
  base = root / 'CUB_200_2011'
  names = cub_names(per_class)
  lists = {
    'classes.txt': [f'{i} {name}' for i, name in enumerate(CUB_CLASSES, 1)],
    'images.txt': [f'{i} {name}' for i, (name, _, _) in enumerate(names, 1)],
    'image_class_labels.txt': [
      f'{i} {c}' for i, (_, c, _) in enumerate(names, 1)
    ],
    'train_test_split.txt': [
      f'{i} {int(is_train)}' for i, (_, _, is_train) in enumerate(names, 1)
    ],
    'bounding_boxes.txt': [
      f'{i} {i}.0 {2 * i}.5 30.0 100.0' for i in range(1, len(names) + 1)
    ],
    'parts/part_locs.txt': [
      f'{i} {part} {i + part}.0 {i}.0 {int(part != i)}'
      if part != i
      else f'{i} {part} 0.0 0.0 0'
      for i in range(1, len(names) + 1)
      for part in range(1, 16)
    ],
  }
  for name, lines in lists.items():
    write(base / name, '\n'.join(lines) + '\n')
  for i, (name, _, _) in enumerate(names, 1):
    # The set has a few grayscale photographs.
    write(base / 'images' / name, jpeg(i, mode='L' if i == 3 else 'RGB'))
    if masks:
      # Most masks have one channel, some an alpha channel too.
      mask = Image.new('LA' if i == 2 else 'L', (60, 40))
      mask.paste(51 * (i % 5), (i, i, 30, 30))
      file = io.BytesIO()
      mask.save(file, 'PNG')
      write(
        (root / 'segmentations' / name).with_suffix('.png'), file.getvalue()
      )
  return base


def car_labels(split, n=6):
  """(file name, class number from 1, box from 1 with its last pixel)."""
  shift = {'train': 0, 'test': 1}[split]
  return [
    (f'{i:05d}.jpg', 1 + (i + shift) % 2, (i, 2, 30 + i, 40 + i))
    for i in range(1, n + 1)
  ]


def _structs(rows):
  """A MATLAB struct array 1 x N, with the smallest integer types."""
  fields = [(name, object) for name in rows[0]]
  array = np.zeros((1, len(rows)), fields)
  for i, row in enumerate(rows):
    for name, value in row.items():
      if not isinstance(value, str):
        value = np.uint8(value) if value < 256 else np.uint16(value)
      array[0, i][name] = value
  return array


def _box_fields(box):
  names = ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2')
  return dict(zip(names, box))


def _class_names():
  names = np.zeros((1, len(CAR_CLASSES)), object)
  names[0, :] = CAR_CLASSES
  return names


def save_matlab(path, variables, *, compressed=True):
  path.parent.mkdir(parents=True, exist_ok=True)
  matlab_io.savemat(path, variables, do_compression=compressed)


def car_image(split, i):
  return jpeg(1000 * (split == 'test') + i)


def make_cars(root, n=6):
  """Writes cars_train, cars_test, devkit and the labels of the test split."""
  paths = {
    'train': root / 'devkit' / 'cars_train_annos.mat',
    'test': root / 'cars_test_annos_withlabels.mat',
  }
  for split, path in paths.items():
    rows = [
      {**_box_fields(box), 'class': label, 'fname': name}
      for name, label, box in car_labels(split, n)
    ]
    save_matlab(path, {'annotations': _structs(rows)})
    for i, (name, _, _) in enumerate(car_labels(split, n), 1):
      write(root / f'cars_{split}' / name, car_image(split, i))
  save_matlab(
    root / 'devkit' / 'cars_meta.mat', {'class_names': _class_names()}
  )


def make_joint_cars(root, n=6):
  """Writes car_ims and cars_annos.mat."""
  rows = []
  for split in ('train', 'test'):
    for i, (_, label, box) in enumerate(car_labels(split, n), 1):
      path = f'car_ims/{len(rows) + 1:06d}.jpg'
      write(root / path, car_image(split, i))
      rows.append(
        {
          'relative_im_path': path,
          **_box_fields(box),
          'class': label,
          'test': int(split == 'test'),
        }
      )
  save_matlab(
    root / 'cars_annos.mat',
    {'annotations': _structs(rows), 'class_names': _class_names()},
  )


def folder_name(class_name):
  return class_name.replace('/', '-')


def make_car_folders(root, n=6, *, boxes):
  """Writes <split>/<class>/<image>, and the tables of boxes if wanted."""
  for split in ('train', 'test'):
    labels = car_labels(split, n)
    for i, (name, label, _) in enumerate(labels, 1):
      folder = folder_name(CAR_CLASSES[label - 1])
      write(root / split / folder / name, car_image(split, i))
    if boxes:
      with open(root / f'anno_{split}.csv', 'w', newline='') as file:
        csv.writer(file).writerows(
          (name, *box, label) for name, label, box in labels
        )


def aircraft_ids(split, n=3):
  """(image, index of its variant) of every image; trainval is both."""
  if split == 'trainval':
    return aircraft_ids('train', n) + aircraft_ids('val', n)
  first = {'train': 1_000, 'val': 2_000, 'test': 3_000}[split]
  return [(f'{first + i:07d}', i % len(VARIANTS)) for i in range(n)]


def aircraft_image(image_id):
  """A photograph with a black banner below."""
  i = int(image_id)
  pixels = np.asarray(Image.open(io.BytesIO(jpeg(i, 60 + i % 7, 50))))
  banner = np.zeros((BANNER_PX, *pixels.shape[1:]), np.uint8)
  file = io.BytesIO()
  Image.fromarray(np.concatenate([pixels, banner])).save(file, 'JPEG')
  return file.getvalue()


def make_aircraft(root, n=3):
  """Writes root/fgvc-aircraft-2013b/data."""
  data = root / 'fgvc-aircraft-2013b' / 'data'
  levels = ('variant', 'family', 'manufacturer')
  names = [sorted({row[i] for row in VARIANTS}) for i in range(3)]
  for file, class_names in zip(
    ('variants', 'families', 'manufacturers'), names
  ):
    write(data / f'{file}.txt', '\n'.join(class_names) + '\n')
  for split in ('train', 'val', 'trainval', 'test'):
    ids = aircraft_ids(split, n)
    for i, level in enumerate(levels):
      lines = [f'{image_id} {VARIANTS[v][i]}\n' for image_id, v in ids]
      write(data / f'images_{level}_{split}.txt', ''.join(lines))
  boxes = ''
  for split in ('trainval', 'test'):
    for image_id, _ in aircraft_ids(split, n):
      write(data / 'images' / f'{image_id}.jpg', aircraft_image(image_id))
      boxes += f'{image_id} 1 11 25 40\n'
  write(data / 'images_box.txt', boxes)
  return data


def make_aircraft_folders(root, n=3, *, splits):
  """Writes <folder>/<variant>/<image>; `splits` maps folders to splits."""
  for folder, split in splits.items():
    for image_id, v in aircraft_ids(split, n):
      path = root / folder / VARIANTS[v][0].replace('/', '_')
      write(path / f'{image_id}.jpg', aircraft_image(image_id))


def make_parquet(root, images, class_names, *, shards=1):
  """Writes data/<split>-....parquet; `images` has (bytes, label) by split."""
  (root / 'data').mkdir(parents=True)
  features = {
    'image': {'_type': 'Image'},
    'label': {'names': list(class_names), '_type': 'ClassLabel'},
  }
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  for split, rows in images.items():
    for shard in range(shards):
      part = rows[shard::shards]
      table = pa.table(
        {
          'image': [{'bytes': data, 'path': None} for data, _ in part],
          'label': [label for _, label in part],
        }
      ).replace_schema_metadata(metadata)
      name = f'{split}-{shard:05d}-of-{shards:05d}.parquet'
      pyarrow.parquet.write_table(table, root / 'data' / name)
