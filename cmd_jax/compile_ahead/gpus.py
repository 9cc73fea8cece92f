"""GPUs as XLA's compiler wants them described."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
  """What the compiler asks of a GPU, as NVIDIA states it.

  Sources: the data sheets, and the table of technical specifications by
  compute capability in the CUDA C++ programming guide.

  Attributes:
    device_kind: what JAX calls it, a key of `chips.CHIPS`.
    capability: compute capability, major and minor.
    accelerated: whether there are features of this capability alone ('9.0a').
    cores: streaming multiprocessors.
    fpus: float32 units of one.
    threads: that one can hold.
    shared_memory: bytes of shared memory of one.
    bandwidth: bytes/s of the memory.
    cache: bytes of the L2 cache.
    clock_ghz: of the multiprocessors.
    memory: bytes.
  """

  device_kind: str
  capability: tuple[int, int]
  accelerated: bool
  cores: int
  fpus: int
  threads: int
  shared_memory: int
  bandwidth: int
  cache: int
  clock_ghz: float
  memory: int


_KIB = 2**10
GPUS = {
  'h100': Gpu(
    'NVIDIA H100 80GB HBM3',
    (9, 0),
    True,
    132,
    128,
    2048,
    228 * _KIB,
    3_352_320_000_000,
    50 * _KIB**2,
    1.98,
    84_942_979_072,
  ),
  'h200': Gpu(
    'NVIDIA H200 141GB HBM3e',
    (9, 0),
    True,
    132,
    128,
    2048,
    228 * _KIB,
    4_800_000_000_000,
    50 * _KIB**2,
    1.98,
    151_397_597_184,
  ),
  'a100': Gpu(
    'NVIDIA A100-SXM4-80GB',
    (8, 0),
    False,
    108,
    64,
    2048,
    164 * _KIB,
    2_039_000_000_000,
    40 * _KIB**2,
    1.41,
    85_094_825_984,
  ),
  'l4': Gpu(
    'NVIDIA L4',
    (8, 9),
    False,
    58,
    128,
    1536,
    100 * _KIB,
    300_000_000_000,
    48 * _KIB**2,
    2.04,
    23_580_639_232,
  ),
}

# Of a multiprocessor's shared memory, what the system keeps of each block.
_RESERVED = _KIB

_TEXT = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{
    major: {gpu.capability[0]}
    minor: {gpu.capability[1]}
    feature_extension: {extension}
  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 10
}}
device_description_str: "{gpu.device_kind}"
"""


def target_config(gpu: Gpu) -> str:
  """The text of XLA's GpuTargetConfigProto."""
  return _TEXT.format(
    gpu=gpu,
    optin=gpu.shared_memory - _RESERVED,
    extension='ACCELERATED_FEATURES' if gpu.accelerated else 'NONE',
  )
