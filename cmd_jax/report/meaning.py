"""What curves mean, in words, and whether a run went well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cmd_jax.files import safe_read
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.collapse import (
  ONE_PROTOTYPE_ENTROPY,
  SPREAD,
  UNIFORM_ENTROPY,
)
from cmd_jax.training.summary import explain_warmup

_MEANINGS = {
  'student_teacher_kl': 'How far the student is from its teacher. Healthy '
  'while above 0: at 0 both say the same of every image.',
  'feature_spread': 'How far the directions of the image features are spread: '
  f'1 evenly, 0 all alike. Healthy above 0.3; below {SPREAD} collapsed.',
  'part_spread': 'How far the directions of the part features are spread: 1 '
  f'evenly, 0 all alike. Healthy above 0.3; below {SPREAD} collapsed.',
  'part_positives': 'Share of drawn parts that the other view shows too. '
  'Healthy while it stays well above 0: others teach nothing.',
  'centre_norm': "How alike the teacher's logits are for all images: 1 is the "
  'same for all. Healthy clearly below 1.',
  'attention_entropy': 'How evenly the attention lies on the patches: 1 on all '
  'alike, 0 on a single one. Healthy in between, and falling from 1.',
  'grad_norm': 'Length of the gradient before it is clipped. Healthy when '
  'steady; jumps of ten times or more ask for a lower learning rate.',
  'param_norm': 'Length of all parameters. Healthy when it changes slowly.',
  'learning_rate': 'Planned: it rises over the warm-up, then falls.',
  'weight_decay': 'Planned by the config.',
  'teacher_momentum': 'Planned: the closer to 1, the slower the teacher '
  'follows.',
  'teacher_temperature': 'Planned: the lower, the more sharply the teacher '
  'decides.',
  'term_warmup': 'Planned: the share of their weight that all terms but the '
  "image's have.",
  'skipped_steps': 'Steps left out because they were not finite. Healthy at 0.',
  'images_per_second': 'Training images a second, scoring left out. Steady '
  'where nothing else uses the machine.',
  'eval/knn': 'Share of images for whose class 20 others vote. Healthy '
  'above the start, the dashed line to beat.',
  'eval/rank1': 'Share of images whose nearest other is '
  'of their class. Healthy above the start, the dashed line to beat.',
  'eval/rankme': 'Effective number of directions that the features use '
  '(RankMe). Healthy not far below the start, the dashed line; near 1 '
  'collapsed.',
  'eval/stable_neighbours': 'Share of images whose nearest image is the one of '
  'the evaluation before. It rises as the network settles; near 1 from early '
  'on, little is learned.',
}


def describe_curves(
  names: Iterable[str], *, num_prototypes: int, term_warmup: int
) -> dict[str, str]:
  """A line of words for each curve that has a known meaning.

  Args:
    names: of the curves.
    num_prototypes: K.
    term_warmup: steps over which all terms but the image's come in.
  """
  most = math.log(max(num_prototypes, 2))
  loss = (
    'Each term as it is, and their sum with weights. Healthy when terms fall '
    'or level off: targets that grow sharper can raise them.'
  )
  if term_warmup:
    text = explain_warmup(term_warmup)
    loss += f' {text[0].upper()}{text[1:]}.'
  known = _MEANINGS | {
    'loss': loss,
    'teacher_entropy': 'How undecided the teacher is between the prototypes. '
    f'Healthy between {0.3 * most:.2g} and {0.99 * most:.2g}; above '
    f'{UNIFORM_ENTROPY * most:.3g} or below {ONE_PROTOTYPE_ENTROPY * most:.2g} '
    'for long it says the same of all images.',
  }
  return {name: known[name] for name in names if name in known}


def judge(workdir: Workdir, results: Mapping[str, Any]) -> list[dict[str, str]]:
  """Whether a run collapsed, and whether all of its steps were finite.

  Args:
    workdir: of the run.
    results: what its results.json holds.

  Returns:
    For each sentence its `kind`, 'right' or 'wrong', and its `text`.
  """
  found = [
    {'kind': 'wrong', 'text': f'Collapse: {warning["text"]}.'}
    for warning in results.get('warnings', [])
  ]
  steps = _non_finite_steps(workdir)
  if steps:
    shown = ', '.join(f'{step:,}' for step in steps[:5])
    more = ', ...' if len(steps) > 5 else ''
    found.append(
      {
        'kind': 'wrong',
        'text': f'Not finite: loss, gradient or parameters of {len(steps)} '
        f'step(s) ({shown}{more}). {workdir.non_finite_file.name} names their '
        'images; a lower config.optim.base_learning_rate or '
        'config.model.dtype=float32 may help.',
      }
    )
  if not found:
    text = 'No sign of collapse, and every step was finite.'
    found.append({'kind': 'right', 'text': text})
  return found


def _non_finite_steps(workdir: Workdir) -> list[int]:
  path = workdir.non_finite_file
  if not path.is_file():
    return []
  try:
    record = safe_read.parse_json(path.read_text(encoding='utf-8'))
    return [int(x['step']) for x in record['steps']]
  except (KeyError, OSError, TypeError, ValueError):
    return []
