"""Distributions over prototypes by tiles, against the plain formulas."""

import functools
import importlib.util
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.losses import (
  cmd,
  prototype_attention,
  prototype_blocks,
  prototype_platforms,
  prototype_triton,
)
from cmd_jax.losses.prototype_platforms import PLATFORMS
from cmd_jax.losses.prototype_tiles import (
  Attended,
  Bag,
  Inputs,
  Levels,
  Settings,
  Teacher,
)

_K, _DIM, _TAU = 12, 5, 0.5
# (tokens, views) of the two sizes of views.
_SIZES = ((3, 4), (2, 6))


class _Weights(NamedTuple):
  """Prototypes whose kernel is no copy of their arrays."""

  direction: jax.Array

  def kernel(self):
    return 1.5 * self.direction


def _divergence(image, bag):
  return (cmd.cross_level_kl(image, bag, direction='image_to_bag'),)


def _two_sums(image, bag):
  return cmd.cross_level_kl(image, bag, direction='bag_to_image'), bag.sum(-1)


_BAGS = {
  'none': None,
  'attention': Bag(_divergence),
  'maximum': Bag(_two_sums, by_maximum=True),
}


def _inputs(bag, dtype=jnp.float32, num_prototypes=_K, dim=_DIM, sizes=_SIZES):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.array(rng.normal(size=shape), jnp.float32)

  def unit(*shape):
    x = normal(*shape)
    return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)

  def weights(sizes):
    if bag is None:
      return ()
    shapes = [(tokens, views) for tokens, views in sizes]
    if bag.by_maximum:
      return tuple(map(jnp.ones, shapes))
    return tuple(jax.nn.softmax(normal(*x), axis=0) for x in shapes)

  def levels(sizes):
    return Levels(
      (unit(sum(views for _, views in sizes), dim),),
      tuple(unit(tokens, views, dim) for tokens, views in sizes),
    )

  def prototypes():
    return Levels(*(_Weights(normal(dim, num_prototypes)) for _ in range(2)))

  teacher = Teacher(
    levels(sizes[:1]),
    prototypes(),
    Levels(normal(num_prototypes), normal(num_prototypes)),
    jnp.float32(0.2),
  )
  return (
    prototypes(),
    levels(sizes),
    weights(sizes),
    teacher,
    weights(sizes[:1]),
  )


def _plain(bag, prototypes, student, weights, teacher, teacher_weights):
  """All logits at once, and automatic differentiation."""

  def logits(rows, prototypes):
    return tuple(
      tuple(
        jnp.dot(x, w.kernel().astype(x.dtype)).astype(jnp.float32) for x in xs
      )
      for xs, w in zip(rows, prototypes)
    )

  z = jax.tree.map(lambda x: x / _TAU, logits(student, prototypes))
  y = tuple(
    tuple((x - centre) / teacher.temperature for x in xs)
    for xs, centre in zip(
      logits(teacher.features, teacher.prototypes), teacher.centres
    )
  )
  y = jax.lax.stop_gradient(y)
  p, q = jax.tree.map(jax.nn.softmax, (z, y))

  def bags(probs, weights):
    if bag is None:
      return ()
    if bag.by_maximum:
      pooled = [x.max(0) for x in probs[1]]
    else:
      pooled = [
        jnp.einsum('ng,ngk->gk', a, x) for a, x in zip(weights, probs[1])
      ]
    ends = np.cumsum([len(x) for x in pooled])[:-1]
    return tuple(map(bag.compare, jnp.split(probs[0][0], ends), pooled))

  return Attended(
    Levels(*jax.tree.map(lambda x: jax.nn.logsumexp(x, -1), z)),
    Levels(
      *(tuple(x @ w.kernel().T for x in xs) for xs, w in zip(q, prototypes))
    ),
    -(q[0][0] * jnp.log(q[0][0])).sum(-1),
    bags(p, weights),
    bags(q, teacher_weights),
  )


def _tiled(bag, *inputs, size=4, keeps=False):
  settings = Settings(_TAU, bag, bag, size, keeps)
  return prototype_attention.attend(settings, *inputs)


def _with_gradients(fn, inputs):
  """The result, and gradients of a sum of its parts, each with its weight."""

  def loss(prototypes, student, weights, teacher_weights, teacher):
    attended = fn(prototypes, student, weights, teacher, teacher_weights)
    rng = np.random.default_rng(1)
    total = sum(
      (x * rng.uniform(0.5, 1.5, x.shape)).sum()
      for x in jax.tree.leaves(attended._replace(entropy=None))
    )
    return total, attended

  prototypes, student, weights, teacher, teacher_weights = inputs
  gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
  (_, attended), gradients = jax.jit(gradient)(
    prototypes, student, weights, teacher_weights, teacher
  )
  return attended, gradients


def _assert_same(one, other, tolerance):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
  'name, size, keeps',
  [
    ('none', 4, False),
    ('attention', 4, False),
    ('attention', 3, True),
    ('attention', _K, True),
    ('maximum', 4, False),
  ],
)
def test_values_and_gradients_are_those_of_the_plain_formulas(
  name, size, keeps
):
  bag = _BAGS[name]
  inputs = _inputs(bag)
  ours = functools.partial(_tiled, bag, size=size, keeps=keeps)
  _assert_same(
    _with_gradients(ours, inputs),
    _with_gradients(functools.partial(_plain, bag), inputs),
    2e-6,
  )


def test_bfloat16_is_the_plain_formula_but_for_its_noise():
  bag = _BAGS['attention']
  inputs = _inputs(bag, jnp.bfloat16)
  ours = _with_gradients(functools.partial(_tiled, bag), inputs)
  plain = _with_gradients(functools.partial(_plain, bag), inputs)
  _assert_same(ours, plain, 3e-2)


def test_large_logits_do_not_overflow():
  bag = _BAGS['attention']
  inputs = list(_inputs(bag))
  inputs[0] = jax.tree.map(lambda x: 100 * x, inputs[0])
  inputs[3] = inputs[3]._replace(temperature=jnp.float32(2e-3))
  inputs[3] = inputs[3]._replace(
    centres=jax.tree.map(lambda x: x + 5, inputs[3].centres)
  )
  ours = _with_gradients(functools.partial(_tiled, bag), tuple(inputs))
  for x in jax.tree.leaves(ours):
    assert np.all(np.isfinite(x))


def test_an_image_head_alone():
  prototypes, student, _, teacher, _ = _inputs(None)
  teacher = teacher._replace(
    features=teacher.features._replace(regions=()),
    prototypes=teacher.prototypes._replace(regions=None),
    centres=teacher.centres._replace(regions=None),
  )
  alone = _with_gradients(
    functools.partial(_tiled, None),
    (
      prototypes._replace(regions=None),
      student._replace(regions=()),
      (),
      teacher,
      (),
    ),
  )
  both = _with_gradients(functools.partial(_tiled, None), _inputs(None))
  np.testing.assert_allclose(
    alone[0].expected.image[0], both[0].expected.image[0], rtol=1e-6
  )
  assert alone[0].expected.regions == alone[1][1].regions == ()


def test_memory_does_not_grow_with_the_prototypes():
  """But for gradients, which are as large as the prototypes."""

  def temporaries(num_prototypes):
    bag = _BAGS['attention']
    inputs = _inputs(bag, num_prototypes=num_prototypes)

    def loss(prototypes, student, rest):
      weights, teacher, teacher_weights = rest
      attended = _tiled(
        bag, prototypes, student, weights, teacher, teacher_weights, size=64
      )
      return sum(x.sum() for x in jax.tree.leaves(attended))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(inputs[0], inputs[1], inputs[2:]).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  grown = temporaries(2**14) - temporaries(2**10)
  assert grown < 2**14 * _DIM * 4 * 4


def _by_kernels(bag, *inputs, so_far=None, kernels='tpu', interpret=True):
  settings = Settings(_TAU, bag, bag, 128, False, kernels, interpret)
  return prototype_attention.attend(settings, *inputs, so_far)


@pytest.mark.parametrize(
  'name, dtype, tolerance',
  [('attention', jnp.float32, 1e-5), ('none', jnp.bfloat16, 3e-3)],
)
@pytest.mark.parametrize('kernels', PLATFORMS)
def test_kernels_are_the_tiles(kernels, name, dtype, tolerance):
  """With rows that are no multiple of a block, and three tiles."""
  bag = _BAGS[name]
  inputs = _inputs(bag, dtype, 384, 128)
  ours = _with_gradients(
    functools.partial(_by_kernels, bag, kernels=kernels), inputs
  )
  tiled = functools.partial(_tiled, bag, size=128)
  _assert_same(ours, _with_gradients(tiled, inputs), tolerance)


def test_bags_of_a_gpu_are_compared_slab_by_slab(monkeypatch):
  inputs = _inputs(_BAGS['attention'], num_prototypes=384, dim=128)
  by_kernels = functools.partial(_by_kernels, _BAGS['attention'], kernels='gpu')
  whole = _with_gradients(by_kernels, inputs)
  slabs = []
  monkeypatch.setattr(prototype_triton, '_SLAB_BYTES', 4 * 16 * 128)
  slab = prototype_triton._slab
  monkeypatch.setattr(
    prototype_triton, '_slab', lambda *x: slabs.append(slab(*x)) or slabs[-1]
  )
  _assert_same(_with_gradients(by_kernels, inputs), whole, 1e-5)
  assert set(slabs) == {128}


@pytest.mark.parametrize('kernels', PLATFORMS)
def test_kernels_add_to_the_gradients_so_far(kernels):
  bag = _BAGS['attention']
  prototypes, *rest = _inputs(bag, num_prototypes=128, dim=128)
  so_far = jax.tree.map(lambda x: 0 * x, prototypes)

  def gradient(kernels):
    def loss(so_far):
      attended = _by_kernels(
        bag, prototypes, *rest, so_far=so_far, kernels=kernels
      )
      return sum(
        x.sum() for x in jax.tree.leaves(attended._replace(entropy=None))
      )

    return jax.jit(jax.grad(loss))(so_far)

  # The kernels see the prototypes' gradients and add what is given.
  _assert_same(gradient(kernels), gradient(''), 1e-5)


@pytest.mark.parametrize(
  'kernels, name, num_prototypes, dim, expected',
  [
    ('tpu', 'attention', 256, 128, True),
    ('tpu', 'none', 256, 128, True),
    ('tpu', 'maximum', 256, 128, False),
    ('tpu', 'attention', 192, 128, False),
    ('tpu', 'attention', 256, 64, False),
    ('tpu', 'attention', 256, 384, True),
    ('gpu', 'attention', 256, 384, False),
    ('gpu', 'attention', 256, 256, True),
    ('gpu', 'attention', 256, 512, False),
    ('gpu', 'maximum', 256, 256, False),
  ],
)
def test_kernels_serve_whole_registers_and_sums(
  kernels, name, num_prototypes, dim, expected
):
  bag = _BAGS[name]
  prototypes, student, weights, teacher, others = _inputs(
    bag, num_prototypes=num_prototypes, dim=dim
  )
  inputs = Inputs(prototypes, None, student, weights, teacher, others)
  settings = Settings(_TAU, bag, bag, 128, False, kernels)
  assert prototype_platforms.serves(settings, inputs) is expected


@pytest.mark.parametrize(
  'tokens, num_views, num_prototypes, expected',
  [
    (196, 64, 65536, (196, 16, 512, 28)),
    (36, 256, 65536, (36, 64, 512, 9)),
    (36, 80, 4096, (36, 16, 1024, 36)),
    (784, 16, 65536, (784, 16, 128, 28)),
    (3, 4, 384, (3, 16, 128, 3)),
  ],
)
def test_blocks_of_rows_and_tiles_fit(
  tokens, num_views, num_prototypes, expected
):
  shape = prototype_blocks.make_shape(tokens, num_views, num_prototypes)
  assert shape == expected


def test_blocks_hold_whole_bags_and_come_apart():
  x = jnp.arange(3 * 5 * 2.0).reshape(3, 5, 2)
  cut = prototype_blocks.to_blocks(x, 4)
  assert cut.shape == (2, 12, 2)
  np.testing.assert_array_equal(cut[1, ::4], x[:, 4])
  np.testing.assert_array_equal(prototype_blocks.from_blocks(cut, 3, 5), x)


def _print_compiled(topology: str, function: str) -> list[int]:
  """What a function of this module prints when it compiles for a topology.

  In a process of its own: compilers are loaded before JAX finds its devices.
  """
  code = f"""
import jax
from cmd_jax.compile_ahead import targets
targets.prepare_process()
from cmd_jax.devices import sharding
from tests.losses import test_prototype_attention as cases
target = targets.find_target('{topology}')
mesh = sharding.make_mesh(1, target.devices)
print(*cases.{function}(sharding.replicated(mesh), target.compiler_options))
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return [int(x) for x in done.stdout.splitlines()[-1].split()]


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="compiles for a TPU: needs libtpu, pip install 'cmd_jax[tpu]'",
)
def test_kernels_compile_for_a_tpu():
  # Three for each of the student's view sizes. Of the teacher's three, one has
  # no part in these gradients.
  assert _print_compiled('v5e:1x1', 'count_tpu_kernels') == [8]


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None,
  reason="compiles for a GPU: needs CUDA, pip install 'cmd_jax[cuda]'",
)
@pytest.mark.parametrize('topology', ['h100', 'a100', 'l4'])
def test_kernels_compile_for_a_gpu(topology):
  # Of each of the student's two sizes four, and one for bags that forward and
  # backward pass share; of the teacher four. As wide as the published heads,
  # in both types, which is what a core's memory must hold.
  found = _print_compiled(topology, 'count_gpu_kernels')
  assert found == [14, 14]


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None,
  reason="compiles for a GPU: needs CUDA, pip install 'cmd_jax[cuda]'",
)
def test_tiles_compile_for_a_gpu():
  few, many = _print_compiled('h100', 'measure_temporaries')
  # But for gradients, which are as large as the prototypes.
  assert many - few < 2**14 * 8 * 4 * 4


def _gradient(
  where, num_prototypes, dim, kernels, dtype=jnp.bfloat16, sizes=_SIZES
):
  """The gradient by prototypes and features, lowered for a device."""
  bag = _BAGS['attention']
  inputs = _inputs(bag, dtype, num_prototypes, dim, sizes)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), inputs
  )

  def loss(prototypes, *rest):
    attended = _by_kernels(
      bag, prototypes, *rest, kernels=kernels, interpret=False
    )
    return sum(x.sum() for x in jax.tree.leaves(attended))

  return jax.jit(jax.grad(loss, (0, 1))).lower(*like)


def count_tpu_kernels(where, options) -> tuple[int]:
  """How many kernels a program has that is compiled for a device."""
  text = _gradient(where, 512, 128, 'tpu').compile(options).as_text()
  return (text.count('custom_call_target="tpu_custom_call"'),)


def count_gpu_kernels(where, options) -> list[int]:
  """Likewise, in bfloat16 and float32, of whole blocks of views."""
  sizes = ((3, 64), (2, 128))
  compiled = (
    _gradient(where, 512, 256, 'gpu', dtype, sizes).compile(options)
    for dtype in (jnp.bfloat16, jnp.float32)
  )
  return [x.as_text().count('gpu.triton"') for x in compiled]


def measure_temporaries(where, options) -> tuple[int, int]:
  """Bytes of temporaries with few and with many prototypes."""
  found = (
    _gradient(where, count, 8, '').compile(options).memory_analysis()
    for count in (2**10, 2**14)
  )
  return tuple(x.temp_size_in_bytes for x in found)
