"""One HTML file out of a template, its style, its scripts and the data."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

# The scripts of each page, in the order in which they need each other; its
# template has its name.
_SCRIPTS = {
  'report': (
    'elements.js',
    'base.js',
    'overview.js',
    'curves.js',
    'browser.js',
    'map.js',
    'confusion.js',
    'curated.js',
    'start.js',
  ),
  'curation': ('elements.js', 'curation.js'),
}


def _read(name: str) -> str:
  files = importlib.resources.files('cmd_jax.report')
  return (files / 'web' / name).read_text(encoding='utf-8')


def _csp_hash(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"


def render(data: Mapping[str, Any], name: str = 'report') -> str:
  """Fills the template.

  The page allows itself its own script, its own style and pictures that it
  holds itself: nothing is fetched, and nothing that a file name says runs.

  Args:
    data: what the scripts show; JSON can represent it.
    name: of the page, 'report' or 'curation'.

  Returns:
    HTML of ASCII characters wherever data are.
  """
  style = _read('page.css')
  script = '\n'.join(map(_read, _SCRIPTS[name]))
  # Within a script element only '<' can end it or open a comment.
  content = json.dumps(data, allow_nan=False, separators=(',', ':'))
  content = content.replace('<', '\\u003c')
  policy = (
    f"default-src 'none'; img-src data:; style-src {_csp_hash(style)}; "
    f"script-src {_csp_hash(script)}; base-uri 'none'; form-action 'none'"
  )
  # The template is cut once, so that no content is searched for placeholders.
  parts = {'policy': policy, 'style': style, 'data': content, 'script': script}
  pieces = []
  for piece in _read(f'{name}.html').split('@@'):
    pieces.append(parts.get(piece, piece))
  return ''.join(pieces)
