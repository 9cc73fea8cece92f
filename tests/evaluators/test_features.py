from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import extract, principal_components


def _plain(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  mean = images.astype(np.float64).mean(axis=(1, 2))
  return np.concatenate([mean, sizes[:, :1] / sizes[:, 1:]], axis=1)


def _images(count: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
  return images, rng.integers(1, 99, (count, 2)).astype(np.int32)


@pytest.mark.parametrize('batch_size', [1, 3, 4, 11, 64])
def test_extract_equals_one_pass_and_compiles_once(batch_size):
  images, sizes = _images(11)
  traces = []

  @jax.jit
  def encode(images, sizes):
    traces.append(images.shape)
    mean = images.astype(jnp.float32).mean(axis=(1, 2))
    return jnp.concatenate([mean, sizes[:, :1] / sizes[:, 1:]], axis=1)

  got = extract(encode, images, sizes, batch_size=batch_size)
  assert traces == [(batch_size, 4, 4, 3)]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, _plain(images, sizes), rtol=1e-5)


def test_extract_casts_and_keeps_the_shape_of_maps():
  images, sizes = _images(3)
  encode = jax.jit(lambda x, _: x[:, 0, 0].astype(jnp.bfloat16))
  got = extract(encode, images, sizes, batch_size=2)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, images[:, 0, 0], rtol=1e-2)
  encode = jax.jit(lambda x, _: x[:, :2] / 2)
  maps = extract(encode, images, sizes, batch_size=2, dtype=np.float16)
  assert maps.dtype == np.float16
  np.testing.assert_array_equal(maps, images[:, :2] / 2)


def test_extract_refuses_wrong_shapes():
  images, sizes = _images(3)
  with pytest.raises(UserError, match='no images'):
    extract(_plain, images[:0], sizes[:0])
  with pytest.raises(ValueError, match='3 images but 2 sizes'):
    extract(_plain, images, sizes[:2])
  with pytest.raises(ValueError, match=r'must give \[2, ...\]'):
    extract(lambda x, _: x[:1], images, sizes, batch_size=2)


def test_components_are_those_of_the_singular_values():
  vectors = np.random.default_rng(0).normal(size=(30, 12)) * np.arange(1, 13)
  found = principal_components(vectors, 3)
  centred = vectors - vectors.mean(0)
  left, values, _ = np.linalg.svd(centred, full_matrices=False)
  expected = left[:, :3] * values[:3]
  signs = np.sign((found * expected).sum(0))
  np.testing.assert_allclose(found, expected * signs, atol=1e-4)
  largest = np.abs(found).argmax(0)
  assert (found[largest, np.arange(3)] > 0).all()
