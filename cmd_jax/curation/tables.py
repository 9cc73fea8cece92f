"""What is found as a table and for other programs: CSV, JSON of three kinds."""

from __future__ import annotations

import csv
import io
import json
import os
import urllib.parse
from typing import Any
from xml.sax import saxutils

import numpy as np

from cmd_jax.curation.duplicates import KINDS, NO_GROUP
from cmd_jax.curation.findings import Findings

_COLUMNS = (
  'file',
  'class_name',
  'split',
  'width',
  'height',
  'group',
  'duplicate_of',
  'duplicate_kind',
  'duplicate_similarity',
  'same_photograph_called',
  'typicality',
  'is_outlier',
  'suggested_class',
  'suspicion',
  'select_rank',
)
_MODEL = 'cmd_jax neighbours'
# FiftyOne reads null as the word None.
NO_LABEL = '(no label)'


def rows_of(findings: Findings) -> list[dict[str, Any]]:
  """One entry an image; '' where there is nothing to say."""
  photographs, duplicates = findings.photographs, findings.duplicates
  around, given = findings.around, findings.photographs.given
  surest = duplicates.surest
  pair_kinds = {}
  for (i, j), kind in zip(duplicates.pairs.tolist(), duplicates.kinds.tolist()):
    pair_kinds[i, j] = pair_kinds[j, i] = kind
  rank_of = {
    row: i for i, row in enumerate(findings.selection.rows.tolist(), 1)
  }
  rows = []
  for row, name in enumerate(photographs.names):
    kept = int(duplicates.kept[row])
    entry = dict.fromkeys(_COLUMNS, '')
    height, width = photographs.sizes[row].tolist()
    entry |= {
      'file': name,
      'class_name': findings.name_of(given.labels[row]),
      'split': given.splits[row],
      'width': width,
      'height': height,
      'same_photograph_called': findings.name_of(findings.conflicts[row]),
      'typicality': round(float(around.typicality[row]), 6),
      'is_outlier': int(around.is_outlier[row]),
      'select_rank': rank_of.get(row, ''),
    }
    if duplicates.groups[row] != NO_GROUP:
      entry['group'] = int(duplicates.groups[row])
    if kept != row:
      directions = photographs.directions
      entry |= {
        'duplicate_of': photographs.names[kept],
        'duplicate_kind': KINDS[pair_kinds.get((row, kept), int(surest[row]))],
        'duplicate_similarity': round(
          float(directions[row] @ directions[kept]), 6
        ),
      }
    if around.suspected[row] >= 0:
      entry |= {
        'suggested_class': findings.name_of(around.suspected[row]),
        'suspicion': round(float(around.margins[row]), 6),
      }
    rows.append(entry)
  return rows


def to_csv(rows: list[dict[str, Any]]) -> str:
  """The table as CSV, a line each image."""
  text = io.StringIO()
  writer = csv.DictWriter(text, _COLUMNS, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _told(row: dict[str, Any]) -> dict[str, Any]:
  """What is known of an image, without what is empty."""
  return {name: value for name, value in row.items() if value != ''}


def to_label_studio(findings: Findings, rows: list[dict[str, Any]]) -> str:
  """Tasks for Label Studio: what to label first, then what to look at again.

  An image is named as Label Studio serves local files, relative to the folder
  that the folder of images lies in. A suggested class is a prediction of the
  control `label` of the object `image`, as `label_config` has them.
  """
  root = findings.photographs.folder.absolute()
  margins = np.where(findings.conflicts >= 0, 2, findings.around.margins)
  suspects = np.argsort(-margins, kind='stable')
  suspects = suspects[margins[suspects] > 0].tolist()
  chosen = findings.selection.rows.tolist()
  tasks = []
  for row in dict.fromkeys([*chosen, *suspects]):
    told = rows[row]
    path = urllib.parse.quote(os.fsencode(f'{root.name}/{told["file"]}'))
    task: dict[str, Any] = {
      'data': {
        'image': f'/data/local-files/?d={path}',
        'reason': 'label first' if told['select_rank'] else 'check the label',
      }
      | _told(told)
    }
    if told['suggested_class']:
      task['predictions'] = [
        {
          'model_version': _MODEL,
          'score': told['suspicion'],
          'result': [
            {
              'from_name': 'label',
              'to_name': 'image',
              'type': 'choices',
              'value': {'choices': [told['suggested_class']]},
            }
          ],
        }
      ]
    tasks.append(task)
  return json.dumps(tasks, indent=1)


def label_config(findings: Findings) -> str:
  """The labelling interface that goes with the tasks of `to_label_studio`."""
  choices = ''.join(
    f'    <Choice value={saxutils.quoteattr(name)}/>\n'
    for name in findings.photographs.given.class_names or ('your class',)
  )
  return (
    '<View>\n  <Image name="image" value="$image"/>\n'
    '  <Text name="file" value="$file"/>\n'
    '  <Choices name="label" toName="image" choice="single" '
    f'showInline="true">\n{choices}  </Choices>\n</View>\n'
  )


def to_fiftyone(
  findings: Findings, rows: list[dict[str, Any]]
) -> dict[str, str]:
  """FiftyOneImageClassificationDataset: `labels.json`, and where images are.

  Returns:
    Contents by the name of the file. All that is known of an image are
    attributes of its label, which is `NO_LABEL` for one without a class.
  """
  root = findings.photographs.folder.absolute()
  places, labels = {}, {}
  for number, row in enumerate(rows):
    key = f'{number:07d}'
    places[key] = str(root / row['file'])
    labels[key] = {
      'label': row['class_name'] or NO_LABEL,
      'attributes': _told(row),
    }
  return {
    'data.json': json.dumps(places, indent=1),
    'labels.json': json.dumps({'labels': labels}, indent=1),
  }


def to_coco(findings: Findings, rows: list[dict[str, Any]]) -> str:
  """COCO: images, and for each that has a class a box around all of it.

  What else is known of an image is its entry's field `cmd_jax`.
  """
  given = findings.photographs.given
  images, annotations = [], []
  for number, (row, label) in enumerate(zip(rows, given.labels.tolist()), 1):
    width, height = row['width'], row['height']
    images.append(
      {
        'id': number,
        'file_name': row['file'],
        'width': width,
        'height': height,
        'cmd_jax': _told(row),
      }
    )
    if label >= 0:
      annotations.append(
        {
          'id': len(annotations) + 1,
          'image_id': number,
          'category_id': label + 1,
          'bbox': [0, 0, width, height],
          'area': width * height,
          'segmentation': [],
          'iscrowd': 0,
        }
      )
  categories = [
    {'id': number, 'name': name, 'supercategory': ''}
    for number, name in enumerate(given.class_names, 1)
  ]
  return json.dumps(
    {
      'info': {'description': str(findings.photographs.folder)},
      'licenses': [],
      'images': images,
      'annotations': annotations,
      'categories': categories,
    },
    indent=1,
  )
