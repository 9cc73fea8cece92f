import os

import pytest

from cmd_jax.files import atomic


@pytest.mark.parametrize('failing', ['fsync', 'replace'])
def test_a_failed_write_leaves_the_old_file_alone(
  tmp_path, monkeypatch, failing
):
  file = tmp_path / 'results.json'
  atomic.write_atomically(file, 'old')

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, failing, full)
  with pytest.raises(OSError, match='No space left'):
    atomic.write_atomically(file, 'new')
  assert file.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_written_files_are_readable_by_others(tmp_path):
  file = tmp_path / 'results.json'
  atomic.write_atomically(file, 'x')
  assert file.stat().st_mode & 0o777 == 0o644


def test_text_is_utf8_and_bytes_are_bytes(tmp_path):
  file = tmp_path / 'file'
  atomic.write_atomically(file, 'wéé')
  assert file.read_bytes() == 'wéé'.encode()
  atomic.write_atomically(file, b'\x80\n')
  assert file.read_bytes() == b'\x80\n'
