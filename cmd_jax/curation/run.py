"""`cmd-jax curate`: reads a folder and writes what was found of it."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import NamedTuple

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.curation import page_data, tables
from cmd_jax.curation.findings import Findings, examine
from cmd_jax.curation.photographs import read_photographs
from cmd_jax.errors import UserError
from cmd_jax.export.cluster import check_output
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import make_place, new_folder, write_atomically
from cmd_jax.report.curated import FOLDER
from cmd_jax.report.page import render
from cmd_jax.rundir.saved_run import read_config
from cmd_jax.rundir.workdir import Workdir


class Request(NamedTuple):
  """What is asked for; the flags of the same names.

  Attributes:
    source: work directory of a run, or file or name of weights.
    input: folder of images.
    output: folder to write.
    select: images to label first.
    alike_from: centred cosine from which on embeddings make duplicates.
    report_images: photographs on the page at most.
    newest: whether the newest checkpoint is used, not the best.
  """

  source: str
  input: str
  output: pathlib.Path
  select: int = 100
  alike_from: float = 0.95
  report_images: int = 5000
  newest: bool = False


def images_of(workdir: str | None) -> str:
  """The folder that a run was trained on; empty where it is not one.

  Raises:
    UserError: the run's config cannot be read.
  """
  if not workdir:
    return ''
  dataset = read_config(Workdir(os.path.expanduser(workdir))).dataset
  return dataset.path if dataset.get('source') == 'folder' else ''


def default_output(workdir: str | None) -> pathlib.Path:
  """Where is written if nothing is said: where the run's page looks."""
  return pathlib.Path(workdir or '.').expanduser() / FOLDER


def _check(request: Request) -> None:
  """Refuses what can be known before an image is looked at."""
  if not request.input:
    raise UserError('--input is missing: give a folder of images')
  if request.select < 0:
    raise UserError(f'--select is {request.select}: give 0 or more')
  if not 0 < request.alike_from <= 1:
    raise UserError(
      f'--alike_from is {request.alike_from}: give a cosine above 0 and up to 1'
    )
  if request.report_images < 0:
    raise UserError(
      f'--report_images is {request.report_images}: give 0 or more'
    )
  check_output(request.output)
  folder = pathlib.Path(request.input).expanduser().absolute()
  if folder in request.output.absolute().parents:
    raise UserError(
      f'--output={request.output} is within --input, whose images it would '
      'join: choose another'
    )
  with disk_errors.writing(request.output):
    make_place(request.output)


def _write(request: Request, encoder: Encoder, findings: Findings) -> None:
  """Writes all files at once, or none."""
  rows = tables.rows_of(findings)
  data = page_data.collect(encoder, findings, max_images=request.report_images)
  files = {
    'curate.csv': tables.to_csv(rows),
    'curate.html': render(data, 'curation'),
    'coco.json': tables.to_coco(findings, rows),
    'label_studio/tasks.json': tables.to_label_studio(findings, rows),
    'label_studio/labels.xml': tables.label_config(findings),
    **{
      f'fiftyone/{name}': text
      for name, text in tables.to_fiftyone(findings, rows).items()
    },
  }
  with disk_errors.writing(request.output):
    with new_folder(request.output) as unfinished:
      for name, text in files.items():
        path = unfinished / name
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)


def _summary(request: Request, findings: Findings) -> str:
  photographs, duplicates = findings.photographs, findings.duplicates
  around, selection = findings.around, findings.selection
  groups = int(duplicates.groups.max() + 1)
  lines = [
    f'images       {len(photographs.names)}, '
    f'{len(photographs.given.class_names)} classes',
    f'duplicates   {int(duplicates.is_spare.sum())} in {groups} groups',
    f'labels       {int((around.suspected >= 0).sum())} that neighbours '
    f'contradict, {int((findings.conflicts >= 0).sum())} on images that show '
    'the same under another name',
    f'outliers     {int(around.is_outlier.sum())}',
    f'label first  {len(selection.rows)} of {selection.pool_size}',
    *(f'note         {note}' for note in findings.notes),
    f'page         {request.output / "curate.html"}',
    f'table        {request.output / "curate.csv"}',
  ]
  return '\n'.join(lines)


def curate(request: Request) -> str:
  """Does what is asked for. No image is moved, changed or deleted.

  Args:
    request: what is asked for.

  Returns:
    What to print.

  Raises:
    UserError: anything about the request that cannot be.
  """
  request = request._replace(output=request.output.expanduser())
  _check(request)
  encoder = cmd_jax.load(request.source, newest=request.newest)
  print(encoder.source, file=sys.stderr)
  photographs = read_photographs(
    encoder, pathlib.Path(request.input).expanduser()
  )
  findings = examine(
    photographs,
    num_selected=request.select,
    alike_from=request.alike_from,
  )
  _write(request, encoder, findings)
  return _summary(request, findings)
