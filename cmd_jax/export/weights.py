"""The encoder of a run as a file of weights."""

from __future__ import annotations

import json
import pathlib

import jax

from cmd_jax.convert import save
from cmd_jax.evaluate import network_variables, restore
from cmd_jax.experiment import Experiment
from cmd_jax.workdir import Workdir


def export_weights(experiment: Experiment, workdir: Workdir) -> pathlib.Path:
  """Writes the encoder of a run's newest checkpoint in timm's naming.

  It is that of config.eval.network, adapters merged in.

  Args:
    experiment: the run's.
    workdir: of the run; the file is its encoder.safetensors.

  Returns:
    The file.

  Raises:
    UserError: no checkpoint, or a directory that cannot be written.
  """
  state = restore(experiment, workdir)
  settings = experiment.evaluation.settings
  preprocessing = {
    'canvas_px': experiment.pretrain.images.shape[1],
    'view_px': settings['view_px'],
    'crop_fraction': settings['crop_fraction'] or None,
  }
  variables = experiment.method.encoder_variables(
    *network_variables(experiment, state)
  )
  save.save_encoder(
    workdir.encoder_file,
    experiment.encoder,
    jax.device_get(variables),
    metadata={
      'method': experiment.method_name,
      'dataset': experiment.name,
      'network': experiment.evaluation.network,
      'steps': str(int(state.step)),
      'preprocessing': json.dumps(preprocessing),
    },
  )
  return workdir.encoder_file
