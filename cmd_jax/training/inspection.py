"""The data report of a run, before its first step or by itself."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from cmd_jax.config.check import check_config
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.inspect.report import make_report
from cmd_jax.data.inspect.report_text import JSON_FILE, TEXT_FILE, report_text
from cmd_jax.data.pipeline.load import load_data
from cmd_jax.devices import sharding
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import write_atomically
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.same_images import check_same_images


def report_on(
  pretrain: Canvases, test: Canvases | None, placement: str
) -> dict[str, Any]:
  """The data report of the images of a run: see `data.report.make_report`."""
  splits = {'train': pretrain}
  if test is not None:
    splits['test'] = test
  return make_report(splits, placement=placement)


def inspect_config(
  config: ConfigDict, workdir: Workdir | None = None
) -> dict[str, Any]:
  """The data report of a config, of which nothing is trained.

  Args:
    config: as cmd_jax/config/published.py makes it.
    workdir: that the report is for; of no run, or of one with these images.

  Raises:
    UserError: the images cannot be found, none can be read, or the directory is
      that of another run.
  """
  differing = workdir.check(config.to_dict()) if workdir else ()
  config = ConfigDict(config)
  # However few images there are, they can be looked at.
  config.batch_size = 1
  check_config(config)
  mesh = sharding.make_mesh(config.parallel.num_devices)
  data = load_data(config, mesh)
  if workdir:
    check_same_images(data, workdir, differing)
  return report_on(data.pretrain, data.test, data.placement)


def write_data_report(report: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Writes data_report.txt and data_report.json.

  Args:
    report: from `data.report.make_report`.
    folder: made if need be.

  Raises:
    UserError: the folder cannot be written.
  """
  with disk_errors.writing(folder, 'choose another --workdir'):
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TEXT_FILE, report_text(report))
    write_atomically(folder / JSON_FILE, json.dumps(report, indent=1) + '\n')
