import base64
import json
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import Features
from cmd_jax.export.images import Embeddings
from cmd_jax.export.search import search
from cmd_jax.parts import store
from cmd_jax.report import content, photos
from cmd_jax.report.write import write_report
from cmd_jax.rundir.workdir import Workdir
from tests import scored_runs
from tests.scored_runs import PX

_STEP = 7


def _trained(tmp_path, **results):
  state = scored_runs.make_state(1, _STEP)
  return scored_runs.make_workdir(
    tmp_path / 'run', state, **dict(steps=_STEP) | results
  )


def _data(path):
  pattern = r'id="data">(.*?)</script>'
  text = path.read_text(encoding='utf-8')
  return json.loads(re.search(pattern, text, re.DOTALL).group(1))


@pytest.mark.parametrize('num_train', [30, 240])
def test_neighbours_are_those_that_search_finds(num_train):
  rng = np.random.default_rng(0)
  # In a narrow cone, where all cosines of the features as they are near 1.
  vectors = (100 + rng.normal(size=(num_train + 10, 6))).astype(np.float32)
  given = {'train': vectors[:num_train], 'test': vectors[num_train:]}
  features = {
    name: Features(x, np.full(len(x), -1), (), (name,) * len(x))
    for name, x in given.items()
  }
  asked = []

  def embeddings(split, **settings):
    asked.append(settings)
    return features[split]

  experiment = types.SimpleNamespace(
    splits=types.SimpleNamespace(train='train', test='test'),
    evaluation=types.SimpleNamespace(settings={'search': {'view_px': 8}}),
  )
  shown_rows = np.arange(5, 25), np.arange(3, 10)
  splits = [
    photos.Split(name, None, rows)
    for name, rows in zip(('training', 'test'), shown_rows)
  ]
  network = types.SimpleNamespace(embeddings=embeddings)
  shown = content._as_searched(experiment, network, splits)
  assert asked == [{'view_px': 8}] * 2
  found = content._describe_neighbours(splits, shown)
  index, similarity = (
    np.frombuffer(base64.b64decode(found[name]), dtype).reshape(27, -1)
    for name, dtype in (('index', '<u4'), ('similarity', '<f4'))
  )
  assert index.shape == (27, 19)
  assert np.ptp(similarity, axis=1).min() > 0.3
  names = tuple(str(row) for row in range(num_train))
  gallery = Embeddings(pathlib.Path(), names, given['train'], ())
  for place, query in ((0, vectors[5]), (22, vectors[num_train + 5])):
    ranked = search(query, gallery, num_train, without=[5] * (place == 0))
    kept = np.isin(ranked.rows, shown_rows[0])
    rows = ranked.rows[kept][:19] - 5
    np.testing.assert_array_equal(index[place][: len(rows)], rows)
    np.testing.assert_allclose(
      similarity[place], ranked.likeness[kept][:19], atol=1e-4
    )


def test_a_report_shows_the_newest_checkpoint(tmp_path):
  tiny = scored_runs.make_experiment()
  scores = dict(init={'knn/20/top1': 0.1}, final={'knn/20/top1': 0.4})
  workdir = _trained(tmp_path, **scores)
  path = write_report(tiny, workdir)
  assert path == workdir.path / 'report.html'
  data = _data(path)
  assert data['notes'] == []
  assert data['results'] == [{'name': 'knn/20/top1', 'init': 0.1, 'final': 0.4}]
  assert data['protocols'] == {
    'knn/20': 'the 20 nearest training images vote for the class'
  }
  run, photos = data['run'], data['photos']
  assert (run['step'], run['encoder']) == (
    7,
    'vision transformer (ViT), size Mu: the smallest',
  )
  params = scored_runs.make_params(0)
  assert run['parameters'] == sum(x.size for x in jax.tree.leaves(params))
  assert run['config'].items() >= {'model.name': '"vit"', 'seed': '0'}.items()
  assert photos['names'][0] == 'train/0.png'
  assert photos['names'][31] == 'test/0.png'
  assert photos['is_test'] == [0] * 31 + [1] * 13
  assert photos['predicted'][:31] == [-1] * 31
  assert set(photos['predicted'][31:]) <= {0, 1, 2}
  assert len(photos['thumbnails']) == len(photos['sizes']) == 44
  right = sum(
    label == vote
    for label, vote in zip(photos['labels'][31:], photos['predicted'][31:])
  )
  confusion = data['confusion']
  assert (confusion['total'], confusion['right']) == (13, right)
  for pair in confusion['pairs']:
    for count, examples in zip(pair['counts'], pair['examples']):
      assert len(examples) == min(count, 6)
      for photo in examples:
        voted = photos['labels'][photo], photos['predicted'][photo]
        assert set(voted) == {pair['first'], pair['second']}


def test_a_folder_without_labels_is_browsed_and_the_page_says_why(tmp_path):
  tiny = scored_runs.make_experiment(labelled=False, test=False)
  path = tmp_path / 'mine.html'
  assert write_report(tiny, _trained(tmp_path), path) == path
  data = _data(path)
  assert 'No labelled training images' in data['notes'][0]
  assert data['confusion'] is None and data['results'] == []
  assert data['photos']['neighbours']['count'] == 20
  assert set(data['photos']['labels']) == {-1}


def test_a_sample_and_old_scores_are_told(tmp_path):
  tiny = scored_runs.make_experiment()
  workdir = _trained(tmp_path, final={'knn/20/top1': 0.4})
  workdir.update_results(steps=5)
  data = _data(write_report(tiny, workdir, max_images=10))
  assert len(data['photos']['names']) == 10
  assert data['photos']['neighbours']['count'] < 10
  sample, scores = data['notes']
  assert sample.startswith('10 of 44 photographs')
  assert 'step 5' in scores and 'step 7' in scores
  # Confusions do not depend on what is shown.
  assert data['confusion']['total'] == 13


def test_parts_are_shown_where_they_are_of_these_images(tmp_path):
  tiny = scored_runs.make_experiment()
  tiny.parts = types.SimpleNamespace(
    as_json=lambda: {'num_parts': 2}, seed=0, has_background=True
  )
  workdir = _trained(tmp_path)
  assert _data(write_report(tiny, workdir))['parts'] is None
  manifest = store.make_manifest(
    {},
    tiny.data.pretrain.file_names,
    settings={'num_parts': 2},
    seed=0,
    mask_px=PX,
  )
  masks = np.zeros((31, PX, PX), np.uint8)
  store.save_masks(workdir.parts / 'round_1', masks, manifest)
  parts = _data(write_report(tiny, workdir))['parts']
  assert parts['name'] == 'round_1'
  assert len(parts['masks']) == 31
  tiny.parts.as_json = lambda: {'num_parts': 3}
  data = _data(write_report(tiny, workdir))
  assert data['parts'] is None
  assert 'parts are not shown' in data['notes'][0]
  assert 'num_parts is 2 there and 3 here' in data['notes'][0]


def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path):
  tiny = scored_runs.make_experiment()
  with pytest.raises(UserError, match='no checkpoint in .*: train first'):
    write_report(tiny, Workdir(str(tmp_path)))
  assert not list(tmp_path.glob('*.html'))
  workdir = _trained(tmp_path)
  with pytest.raises(UserError, match='--report_images is 1'):
    write_report(tiny, workdir, max_images=1)
  for path in (tmp_path, tmp_path / 'missing' / 'page.html'):
    with pytest.raises(UserError, match='give --output the name of a file'):
      write_report(tiny, workdir, path)
