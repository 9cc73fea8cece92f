"""What a frozen network says of a split, computed on all devices."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cmd_jax import evaluators
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.canvas import Canvases
from cmd_jax.devices import sharding
from cmd_jax.evaluators import Features
from cmd_jax.evaluators.feature_cache import FeatureCache, hash_canvases
from cmd_jax.models.last_blocks import last_blocks
from cmd_jax.parts.store import hash_variables
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.state import TrainState


def network_variables(experiment: Experiment, state: TrainState) -> tuple:
  """Parameters and statistics of the network that is scored, gathered."""
  network = experiment.evaluation.network
  params = state.teacher_params if network == 'teacher' else state.params
  stats = state.method_state.get(f'{network}_stats', {})
  return sharding.gather((params, stats), experiment.mesh)


class FrozenNetwork:
  """The network of a state that is scored."""

  def __init__(
    self,
    experiment: Experiment,
    state: TrainState,
    cache_folder: pathlib.Path | None = None,
  ):
    """Hashes the encoder where there is a cache.

    Args:
      experiment: the run's.
      state: whose network.
      cache_folder: where features are kept; None keeps none.
    """
    self._experiment = experiment
    self._variables = network_variables(experiment, state)
    self._programs: dict[str, Callable] = {}
    self._cache = None
    if cache_folder is not None:
      variables = experiment.method.encoder_variables(*self._variables)
      settings = experiment.evaluation.settings
      key = {
        'encoder_sha256': hash_variables(jax.device_get(variables)),
        'encoder': repr(experiment.encoder),
        'view_px': settings['view_px'],
        'crop_fraction': settings['crop_fraction'],
      }
      self._cache = FeatureCache(cache_folder, key)

  def embed(self, canvases: Canvases | None, split: str) -> Features | None:
    """The embeddings of a split; None where there is none."""
    encode = self._experiment.method.encode
    return self._features(
      canvases, split, 'image', lambda *args: encode(*args).image
    )

  def last_blocks(
    self, canvases: Canvases | None, split: str
  ) -> Features | None:
    """The features of the last blocks, see `models.last_blocks`."""
    experiment = self._experiment

    def encode(params, stats, view):
      variables = experiment.method.encoder_variables(params, stats)
      return last_blocks(experiment.encoder, variables, view)

    return self._features(canvases, split, 'blocks', encode)

  def attention(self, canvases: Canvases) -> dict[str, np.ndarray]:
    """Where the network looks in whole images.

    Returns:
      [N, h * w] for each of `mil`, the multi-instance attention, and `encoder`,
      the encoder's own, as far as the network has them.
    """
    experiment, maps = self._experiment, {}
    whole = multi_crop.make_eval_view(
      view_px=experiment.evaluation.settings['view_px'], crop_fraction=None
    )

    def own(params, stats, view):
      variables = experiment.method.encoder_variables(params, stats)
      return experiment.encoder.apply(variables, view).attention.mean(1)

    def attend(params, stats, view):
      return experiment.method.encode(params, stats, view).attention

    if 'mil' in self._variables[0]:
      maps['mil'] = self._apply(canvases, 'mil', attend, whole)
    if hasattr(experiment.encoder, 'num_heads'):
      maps['encoder'] = self._apply(canvases, 'attention', own, whole)
    return maps

  def _features(
    self, canvases: Canvases | None, split: str, name: str, encode: Callable
  ) -> Features | None:
    if canvases is None:
      return None

    def compute():
      view = self._experiment.evaluation.view
      vectors = self._apply(canvases, name, encode, view)
      # After the images were read: what is unreadable loses its label then.
      return {'vectors': vectors, 'labels': np.asarray(canvases.labels)}

    if self._cache is None:
      arrays = compute()
    else:
      arrays = self._cache.get(
        f'{split}_{name}',
        compute,
        data_sha256=self._experiment.data_sha256,
        canvases_sha256=hash_canvases(canvases),
      )
    return Features(
      arrays['vectors'],
      arrays['labels'],
      canvases.class_names,
      canvases.file_names,
    )

  def _apply(
    self, canvases: Canvases, name: str, encode: Callable, view: Callable
  ) -> np.ndarray:
    """[N, D] of `encode(params, stats, view)`, shared out over the devices.

    Args:
      canvases: the images.
      name: of what is computed; all splits share its program.
      encode: what is computed.
      view: of a canvas.
    """
    mesh = self._experiment.mesh
    whole, split = sharding.replicated(mesh), sharding.sharded(mesh)

    def of_canvases(variables, images, sizes) -> Any:
      return encode(*variables, view(images, sizes))

    if name not in self._programs:
      self._programs[name] = jax.jit(
        of_canvases, in_shardings=(whole, split, split), out_shardings=split
      )
    jitted = self._programs[name]
    # Whole batches alone can be shared out evenly.
    batch_size = self._experiment.evaluation.batch_size
    batch_size = -(-batch_size // mesh.size) * mesh.size

    def encode_batch(images, sizes):
      # Put there by hand: where there are several processes, jit does not share
      # out what is in the host's memory.
      return jitted(self._variables, *jax.device_put((images, sizes), split))

    return evaluators.extract_features(
      encode_batch,
      canvases.images,
      canvases.sizes,
      batch_size=batch_size,
      progress=True,
    )
