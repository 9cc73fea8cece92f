"""Prepares a set with a builder and reads what it wrote."""

import functools

import pytest
import tensorflow_datasets as tfds

from cmd_jax.data.sources import tfds_source
from cmd_jax.errors import UserError


def prepare(builder_class, manual_dir, data_dir, config='quicktest'):
  make = functools.partial(
    tfds_source.make_builder, builder_class, data_dir=data_dir, config=config
  )
  builder = make()
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
    file_format='array_record',
  )
  # As a later process meets it.
  return make()


def examples(builder, split):
  """The records of a split by the names of their files."""
  decoders = {'image': tfds.decode.SkipDecoding()}
  records = builder.as_data_source(split, decoders=decoders)
  return {record['file_name'].decode(): record for record in records}


def refusal(builder_class, manual_dir, data_dir, config='whole'):
  """The message of a preparation that must fail and leave nothing."""
  with pytest.raises(UserError) as error:
    prepare(builder_class, manual_dir, data_dir, config)
  assert '\n' not in str(error.value)
  assert not list(data_dir.rglob('*.array_record*'))
  return str(error.value)
