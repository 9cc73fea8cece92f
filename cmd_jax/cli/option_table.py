"""The flags that commands have."""

from __future__ import annotations

import os
from typing import NamedTuple


class Option(NamedTuple):
  """A flag that some commands have.

  Attributes:
    kind: str, int, float or bool, or a tuple of what a string may be.
    default: what it is if it is not given.
    help: what it is, in a sentence.
  """

  kind: type | tuple[str, ...]
  default: str | int | float | bool | None
  help: str


def default_cache() -> str:
  """The folder of the compilation cache unless another is asked for."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return os.path.join(home, 'cmd_jax', 'compilation')


OPTIONS = {
  'workdir': Option(
    str, None, 'Directory of the run: checkpoints, metrics, results.'
  ),
  'weights': Option(
    str, None, 'File, name or hf:// address of weights, not --workdir.'
  ),
  'input': Option(
    str, None, 'Folder of images, or a file that `embed` has written.'
  ),
  'output': Option(str, None, 'What to write.'),
  'profile_steps': Option(str, None, 'Steps to trace, as 10:15: docs/runs.md.'),
  'view_px': Option(
    int, 0, 'Side of the views in pixels, 0 for the one the encoder is best at.'
  ),
  'pooling': Option(
    ('', 'encoder', 'gem', 'strength'),
    '',
    'How vectors are pooled; empty for the way the encoder is best at.',
  ),
  'manual_dir': Option(
    str, None, 'Folder of the files fetched by hand: docs/datasets.md.'
  ),
  'download': Option(
    bool, False, 'Fetches what --manual_dir lacks and its authors publish.'
  ),
  'report_images': Option(int, 5000, 'Photographs on the page at most.'),
  'format': Option(
    ('safetensors', 'stablehlo', 'onnx', 'transformers'),
    'safetensors',
    'Kind of file; of transformers a folder.',
  ),
  'dtype': Option(('float32', 'float16'), 'float32', 'Of --format=onnx.'),
  'attention': Option(
    bool, False, 'Writes the attention too, beside the embedding.'
  ),
  'canvases': Option(
    bool,
    False,
    'With --format=stablehlo: takes uint8 images and makes the views.',
  ),
  'newest': Option(
    bool,
    False,
    'Uses the newest checkpoint though config.checkpoint.keep_best has kept a '
    'better one.',
  ),
  'query': Option(
    str, None, 'Image to look for; of `index search` a folder of them too.'
  ),
  'query_class': Option(
    str, None, 'Class of the index whose images are looked for.'
  ),
  'index_dir': Option(str, None, 'Folder of the index.'),
  'top_k': Option(int, 12, 'Images to find.'),
  'index': Option(('exact', 'faiss'), 'exact', 'What searches.'),
  'select': Option(int, 100, 'Images to label first.'),
  'alike_from': Option(
    float,
    0.95,
    'Similarity (cosine, centred) from which on two images count as duplicates '
    'whatever their pixels say.',
  ),
  'num_clusters': Option(int, 0, 'Groups to make; 0 finds out.'),
  'min_cluster_size': Option(int, 5, 'Images of a group found, at least.'),
  'topology': Option(
    str,
    None,
    'Devices to compile for: v5e:2x4, v6e:4x4, v5p:2x2x2, h100, h200, a100, '
    'l4, ...: docs/scaling.md.',
  ),
  'find_batch': Option(bool, False, 'Looks for the largest batch that fits.'),
  'num_images': Option(
    int, None, 'Training images, where the config does not say the set.'
  ),
  'coordinator_address': Option(
    str,
    None,
    'host:port of process 0, where several processes meet; SLURM, Open MPI and '
    'TPU pods need no flag: docs/scaling.md.',
  ),
  'num_processes': Option(
    int, None, 'Number of processes that train together.'
  ),
  'process_id': Option(int, None, 'Number of this process, from 0.'),
  'meeting_timeout_s': Option(
    int, 300, 'Seconds to wait for the other processes.'
  ),
  'compilation_cache': Option(
    str,
    default_cache(),
    'Directory of the persistent compilation cache; empty turns it off.',
  ),
}
CONFIG_HELP = (
  'A built-in config or a file, with words after a colon: folder, '
  'cub:method=dino, configs/cub.py:quicktest. --config.FIELD=VALUE changes a '
  'field.'
)
