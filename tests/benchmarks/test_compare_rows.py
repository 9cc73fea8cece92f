"""The sets, rows and configs of the comparison of methods."""

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks import compare_configs, compare_rows
from benchmarks.compare_rows import (
  FORMER_SETS,
  MAIN_ROWS,
  ROW_BY_NAME,
  ROWS,
  SETS,
  SHARED,
  SMOKE,
)
from cmd_jax.config.check import check_config
from cmd_jax.data import canvas
from cmd_jax.data.pipeline import load
from cmd_jax.errors import UserError
from cmd_jax.rundir.config_diff import flatten
from cmd_jax.training import experiment
from tests import tiny

_ALL = (*SETS, SMOKE)
_CONTRASTIVE = ('simclr', 'particle', 'detcon')
_SHARED = (
  'batch_size',
  'total_epochs',
  'canvas_px',
  'decode_px',
  'dataset.',
  'augment.',
  'model.',
  'init.',
  'lora.',
  'eval.',
)
_RECIPE = (
  'optim.',
  'teacher.',
  'head.',
  'student_temperature',
  'term_warmup_epochs',
)


def _resolve(of, name):
  return compare_configs.resolve(of, ROW_BY_NAME[name])


def test_former_recipes_differ_from_the_present_in_what_their_name_says():
  for former in FORMER_SETS:
    name, _, scale = former.name.rpartition('-scale')
    of = compare_rows.SET_BY_NAME[name]
    old, new = (flatten(_resolve(x, 'cmd').config) for x in (former, of))
    changed = {key for key in old if old[key] != new[key]}
    is_longer = name in ('cars14-lite0', 'cub20-lite0')
    epochs = {'total_epochs'} if is_longer else set()
    assert changed == {'optim.encoder_scale', *epochs}
    assert old['optim.encoder_scale'] == float(scale)


def test_every_row_that_was_promised_is_there():
  distilled = ('dino', 'esvit', 'cmd')
  pools = ('mean', 'max', 'attention', 'gated_attention', 'strength')
  assert {
    *(*distilled, 'cmd_released', 'dino-global-views', *_CONTRASTIVE),
    *(f'{x}-centring' for x in distilled),
    *(f'{x}-sinkhorn' for x in distilled),
    *(f'{x}-heads-plain' for x in distilled),
    *(f'{x}-no-warmup' for x in ('esvit', 'cmd')),
    *(f'{x}-neighbours' for x in ('dino', 'cmd')),
    *(f'cmd-no-{x}' for x in ('region', 'student_bag', 'teacher_bag')),
    *(f'cmd-regions-{x}' for x in ('attended', 'plain')),
    *(f'cmd-pool-{x}' for x in pools),
    *(f'cmd-prototypes-{x}' for x in ('shared', 'separate')),
    *(f'cmd-kl-{x}' for x in ('bag_to_image', 'image_to_bag')),
  } == set(ROW_BY_NAME)
  assert set(MAIN_ROWS) <= set(ROW_BY_NAME)
  assert len(ROW_BY_NAME) == len(ROWS)
  assert all(row.base in (*ROW_BY_NAME, '') for row in ROWS)
  assert {of.tier for of in SETS} == set(compare_rows.TIERS)
  assert set(compare_rows.PRETRAINED_ROWS) <= set(ROW_BY_NAME)


@pytest.mark.parametrize('of', _ALL, ids=lambda of: of.name)
def test_rows_of_a_set_share_encoder_images_views_and_scores(of):
  reference = flatten(_resolve(of, 'cmd').config)
  assert set(SHARED) == set(_SHARED)
  assert all(any(x.startswith(y) for x in reference) for y in _SHARED)
  for row in compare_rows.rows_of(of).values():
    resolved = _resolve(of, row.name)
    check_config(ConfigDict(resolved.config))
    fields = flatten(resolved.config)
    other = {
      key
      for key in fields.keys() & reference.keys()
      if key.startswith(_SHARED)
      and not key.startswith('eval.segmentation')
      and fields[key] != reference[key]
    }
    alone = row.method in _CONTRASTIVE or row.name == 'dino-global-views'
    assert other == ({'augment.num_local'} if alone else set()), row.name
    assert set(resolved.differs) == other


@pytest.mark.parametrize('of', _ALL, ids=lambda of: of.name)
def test_rows_of_a_set_learn_by_one_recipe(of):
  reference = flatten(_resolve(of, 'cmd').config)
  for row in compare_rows.rows_of(of).values():
    fields = flatten(_resolve(of, row.name).config)
    other = {
      key
      for key, value in fields.items()
      if key.startswith(_RECIPE) and value != reference[key]
    }
    # One term alone has nothing to wait for, and parts are the first to learn.
    if row.method in ('dino', *_CONTRASTIVE):
      assert fields['term_warmup_epochs'] == 0, row.name
      other -= {'term_warmup_epochs'}
    assert other <= set(row.overrides), row.name


def test_what_rows_share_has_a_hash_of_its_own():
  of = SETS[0]
  here = _resolve(of, 'cmd')
  for row in compare_rows.rows_of(of).values():
    assert _resolve(of, row.name).shared_sha256 == here.shared_sha256
  for fields in (
    {'total_epochs': 5},
    {'augment.hue': 0.5},
    {'dataset.name': 'sparrows'},
    {'optim.clip_norm': 1.0},
    {'term_warmup_epochs': 1.0},
    {'student_temperature': 0.2},
  ):
    changed = _resolve(of.changed(fields), 'dino')
    assert changed.shared_sha256 != here.shared_sha256, fields
  for fields in ({'method.pooling': 'max'}, {'dataset.data_dir': '/here'}):
    changed = _resolve(of.changed(fields), 'dino')
    assert changed.shared_sha256 == here.shared_sha256, fields


def test_weights_to_start_from_are_hashed_by_what_is_in_them(tmp_path):
  def hashes(folder, content):
    path = tmp_path / folder / 'weights.npz'
    path.parent.mkdir()
    path.write_bytes(content)
    resolved = _resolve(SETS[0].changed({'init.path': str(path)}), 'cmd')
    return resolved.sha256, resolved.shared_sha256

  one = hashes('one', b'1')
  assert hashes('copy', b'1') == one
  assert not set(hashes('other', b'2')) & set(one)
  gone = SETS[0].changed({'init.path': str(tmp_path / 'gone')})
  with pytest.raises(UserError, match=r'init\.path=.*gone cannot be read'):
    _resolve(gone, 'cmd')


@pytest.mark.parametrize('of', _ALL, ids=lambda of: of.name)
def test_a_variant_differs_from_its_base_in_what_it_names_alone(of):
  for row in compare_rows.rows_of(of).values():
    if not row.base:
      continue
    mine, base = (_resolve(of, x) for x in (row.name, row.base))
    one, other = flatten(mine.config), flatten(base.config)
    assert one.keys() == other.keys()
    found = {key for key in one if one[key] != other[key]}
    assert found <= set(row.overrides)
    assert all(one[key] == value for key, value in row.overrides.items())
    assert (mine.sha256 == base.sha256) == (not found)


def test_the_defaults_are_run_as_the_config_file_has_them():
  of = next(x for x in SETS if x.name == 'toybirds')
  resolved = _resolve(of, 'cmd')
  budget = set(of.overrides) | {'seed'}
  assert set(resolved.overrides) <= budget


@pytest.mark.parametrize(
  'of, name',
  [
    *((of, 'particle') for of in _ALL),
    *((of, 'cmd-pool-mean') for of in _ALL),
    (SETS[0], 'cmd-no-region'),
  ],
  ids=lambda x: getattr(x, 'name', x),
)
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_main_reads_the_config_of_a_run_from_its_command(monkeypatch, of, name):
  resolved = compare_configs.resolve(of, ROW_BY_NAME[name], seed=3)
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', flag_values=values)
  argv = ['main.py', *compare_configs.arguments(resolved)]
  # The flags of a config's fields are found there.
  monkeypatch.setattr('sys.argv', argv)
  values(argv)
  read = config.value.to_dict()
  assert read == resolved.config
  assert read['seed'] == 3


def test_what_has_no_influence_is_not_in_the_hash():
  of = next(x for x in SETS if x.name == 'cub100')
  here, there = (
    compare_configs.resolve(
      of.changed(
        {
          'dataset.path': f'{place}/cub100_box227',
          'eval.parts_hit.keypoints': f'{place}/cub100_box227/parts.csv',
        }
      ),
      ROW_BY_NAME['cmd'],
      seed,
    ).sha256
    for place, seed in (('/here', 0), ('/there', 1))
  )
  assert here == there
  other = of.changed({'dataset.path': '/here/cub20'})
  assert _resolve(other, 'cmd').sha256 != here
  longer = of.renamed('5ep', {'total_epochs': 5})
  assert longer.name == 'cub100-5ep'
  assert _resolve(longer, 'cmd').sha256 != here
  scored = of.changed({'eval.view_px': 48})
  assert _resolve(scored, 'cmd').sha256 != _resolve(of, 'cmd').sha256


@pytest.mark.parametrize('of', SETS, ids=lambda of: of.name)
def test_the_gpu_tier_is_the_published_recipe_on_photographs(of):
  config = _resolve(of, 'cmd').config
  assert (config['model']['dtype'] == 'bfloat16') == (of.tier == 'gpu')
  if of.tier != 'gpu':
    return
  assert config['dataset']['source'] == 'folder'
  assert config['augment']['global_px'] == 224
  assert config['augment']['local_px'] == 96
  assert config['head']['num_prototypes'] == 65536
  assert config['model']['name'] == ('swin' if 'swin' in of.name else 'vit')
  assert config['method']['variant'] == 'paper'
  assert config['total_epochs'] == compare_rows.BUDGETS['gpu']['total_epochs']
  # The photographs are cropped already.
  assert config['eval']['crop_fraction'] == 0
  weights = _resolve(of, 'esvit').config['method']['weights']
  assert weights['region'] == weights['image']
  assert 'weighs as much as the image' in of.notes['esvit']


def test_overrides_are_values_of_the_same_kind():
  of, base = SETS[0], ROW_BY_NAME['cmd-no-region']
  texts = ['config.method.weights.student_bag=1', 'config.method.pooling=max']
  row = compare_configs.override_row(of, base, 'mine', texts)
  assert row.base == 'cmd-no-region'
  weights = compare_configs.resolve(of, row).config['method']['weights']
  assert (weights['student_bag'], weights['region']) == (1.0, 0.0)
  assert isinstance(weights['student_bag'], float)


@pytest.mark.parametrize(
  'text, message',
  [
    ('config.method.colour=2', "no field 'method.colour'.*method.pooling"),
    ('config.batch_size=many', 'batch_size is 32, give a value of that kind'),
    ('config.batch_size=2.5', 'batch_size is 32'),
    ('config.method.weights=1', "no field 'method.weights'"),
    ('config.seed=1', 'seed is chosen by --seeds'),
    ('config.method.name=dino', 'method.name is chosen by --rows'),
    ('method.variant=released', 'method.variant is chosen by --rows'),
  ],
)
def test_a_wrong_override_is_explained(text, message):
  with pytest.raises(UserError, match=message):
    compare_configs.override_row(SETS[0], ROW_BY_NAME['cmd'], 'x', [text])


def test_a_row_of_a_field_that_is_gone_says_so():
  row = ROW_BY_NAME['cmd']._replace(overrides={'method.gone': 1})
  with pytest.raises(UserError, match=r'row cmd sets config\.method\.gone'):
    compare_configs.resolve(SETS[0], row)


class _Source:
  file_names = ('0.png',)
  channels = 3


def _noise(source, canvas_px):
  rng = np.random.default_rng(0)
  shape = (16, canvas_px, canvas_px, 3)
  return canvas.Canvases(
    name='noise',
    images=rng.integers(0, 256, shape, np.uint8),
    sizes=np.full((16, 2), canvas_px, np.int32),
    labels=np.arange(16, dtype=np.int32) % 2,
    file_names=tuple(f'{i}.png' for i in range(16)),
    class_names=('robin', 'wren'),
    part_ids=rng.integers(0, 4, shape[:3], np.uint8),
    boxes=None,
    skipped=(),
  )


def test_every_row_can_be_built(monkeypatch):
  monkeypatch.setattr(load, 'load_source', lambda *_: _Source)
  monkeypatch.setattr(load, 'make_canvases', _noise)
  seen = set()
  for row in compare_rows.rows_of(SMOKE).values():
    resolved = _resolve(SMOKE, row.name)
    if resolved.sha256 in seen:
      continue
    seen.add(resolved.sha256)
    config = ConfigDict(resolved.config)
    config.batch_size = 8
    built = experiment.build(config)
    if row.method != 'simclr':  # Has but one.
      terms = {name for name, w in config.method.weights.items() if w}
      assert set(tiny.inside(built.method).terms) == terms, row.name
  assert len(seen) >= len(MAIN_ROWS)
