"""The parts of a run's images: found, kept beside the run, found again."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.evaluators import parts_hit
from cmd_jax.parts import discover, features, plan, sheet, store
from cmd_jax.rundir.checkpoint import restore_newest
from cmd_jax.rundir.workdir import Workdir, write_json
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.state import TrainState

# Images on the contact sheet.
_NUM_SHOWN = 24


def encoder_variables(
  experiment: Experiment, state: TrainState
) -> Mapping[str, Any]:
  """What the teacher's encoder, which finds parts, is applied to."""
  stats = state.method_state.get('teacher_stats', {})
  variables = sharding.gather((state.teacher_params, stats), experiment.mesh)
  return jax.device_get(experiment.method.encoder_variables(*variables))


def hash_of_encoder(experiment: Experiment, state: TrainState) -> str:
  """SHA-256 of the encoder that finds parts; empty where none does."""
  if not experiment.parts.asks_encoder:
    return ''
  return store.hash_variables(encoder_variables(experiment, state))


def _manifest(experiment: Experiment, encoder_sha256: str) -> store.Manifest:
  canvases = experiment.data.pretrain
  manifest = store.make_manifest(
    {},
    canvases.file_names,
    settings=experiment.parts.as_json(),
    seed=experiment.parts.seed,
    mask_px=canvases.images.shape[1],
  )
  return manifest._replace(encoder_sha256=encoder_sha256)


def _make_encode(
  experiment: Experiment, variables: Mapping[str, Any]
) -> Callable:
  """(canvases, sizes) -> what `discover.discover` needs of them."""
  parts, encoder = experiment.parts, experiment.encoder
  settings = parts.settings

  @jax.jit
  def encode(variables, images, sizes):
    images = parts.view(images, sizes)
    if isinstance(settings, discover.Hypercolumn):
      return features.hypercolumn_maps(
        encoder, variables, images, settings.num_layers
      )
    return features.key_maps(
      encoder,
      variables,
      images,
      stride_px=settings.stride_px,
      saliency_heads=settings.saliency_heads,
    )

  return lambda images, sizes: encode(variables, images, sizes)


def load_part_masks(
  experiment: Experiment, workdir: Workdir, name: str, encoder_sha256: str
) -> np.ndarray:
  """The masks that a run found earlier, [N, R, R] uint8.

  Args:
    experiment: the run's.
    workdir: of the run.
    name: of the masks, see `find_part_masks`.
    encoder_sha256: from `hash_of_encoder`, of the encoder that found them.

  Raises:
    UserError: no masks, or others than these, with what differs.
  """
  manifest = _manifest(experiment, encoder_sha256)
  return store.load_masks(workdir.parts / name, manifest)


def find_part_masks(
  experiment: Experiment,
  state: TrainState,
  workdir: Workdir,
  name: str,
  *,
  path: str = '',
) -> np.ndarray:
  """Finds the parts of all training images, or reads those found already.

  What is done is kept, so that an interrupted search goes on. A contact sheet
  is drawn beside the masks.

  Args:
    experiment: the run's.
    state: whose teacher looks.
    workdir: of the run; the masks are in its folder parts/<name>.
    name: of the masks.
    path: folder of masks to take instead of looking for them.

  Returns:
    [N, R, R] uint8.

  Raises:
    UserError: masks in `path` of another encoder, other images or settings.
  """
  parts, canvases = experiment.parts, experiment.data.pretrain
  keypoints = _read_keypoints(experiment)
  manifest = _manifest(experiment, hash_of_encoder(experiment, state))
  folder = workdir.parts / name
  if store.has_masks(folder):
    masks = store.load_masks(folder, manifest)
    _compare(experiment, masks, keypoints, workdir.parts / f'{name}.json')
    return masks
  if path:
    # The run keeps its own, so that it goes on without those.
    masks = store.load_masks(pathlib.Path(path), manifest)
    store.save_masks(folder, masks, manifest)
    return masks
  if parts.asks_encoder:
    chunks = workdir.parts / f'{name}.unfinished'
    masks = discover.discover(
      _make_encode(experiment, encoder_variables(experiment, state)),
      canvases,
      settings=parts.settings,
      seed=parts.seed,
      folder=chunks,
      manifest=manifest,
      batch_size=parts.batch_size,
      progress=True,
    )
  else:
    masks = plan.without_encoder(parts, canvases, progress=True)
  store.save_masks(folder, masks, manifest)
  if parts.asks_encoder:
    store.Chunks(chunks, manifest).remove()
  picture = workdir.parts / f'{name}.png'
  shown = np.linspace(0, len(masks) - 1, min(_NUM_SHOWN, len(masks)))
  shown = np.unique(shown.astype(int))
  sheet.save_contact_sheet(
    picture,
    canvases.images[shown],
    masks[shown],
    background=parts.has_background,
  )
  print(
    f'parts of {len(masks)} images in {folder}, some drawn in {picture}',
    file=sys.stderr,
  )
  _compare(experiment, masks, keypoints, workdir.parts / f'{name}.json')
  return masks


def _read_keypoints(experiment: Experiment) -> parts_hit.Keypoints | None:
  """The keypoints that parts are compared with, read before the search."""
  canvases, path = experiment.data.pretrain, experiment.parts.keypoints
  if not path:
    return None
  return parts_hit.read_keypoints(path, canvases.file_names, canvases.sizes)


def _compare(
  experiment: Experiment,
  masks: np.ndarray,
  keypoints: parts_hit.Keypoints | None,
  path: pathlib.Path,
) -> None:
  """Writes and prints parts/hit where there are keypoints."""
  if keypoints is None:
    return
  # 0 is the background to parts/hit.
  part_ids = masks.astype(np.int16) + (not experiment.parts.has_background)
  scores = parts_hit.make_parts_hit()(part_ids, keypoints)
  write_json(path, {f'parts/hit/{name}': x for name, x in scores.items()})
  for name, value in scores.items():
    print(f'parts/hit/{name:<22} {value:.3f}', file=sys.stderr)


def discover_parts(experiment: Experiment, workdir: Workdir) -> pathlib.Path:
  """Finds the parts with a run's newest checkpoint, or its initial encoder.

  Args:
    experiment: the run's.
    workdir: of the run.

  Returns:
    The folder of the masks, parts/discovered_<step>.

  Raises:
    UserError: a method without parts, or masks that cannot be kept.
  """
  if experiment.parts is None:
    raise UserError(
      f'{experiment.method_name} has no parts to find: use '
      '--config=FILE:method=particle'
    )
  state = experiment.init_state()
  if workdir.has_checkpoint():
    state, _ = restore_newest(workdir.checkpoints, experiment.state_like)
  name = f'discovered_{int(state.step)}'
  find_part_masks(experiment, state, workdir, name)
  return workdir.parts / name
