# cmd-jax in a container, for a CPU or for NVIDIA GPUs: docs/container.md.
#
#   docker build --target=cpu --tag=cmd_jax:cpu .
#   docker build --target=cuda --tag=cmd_jax:cuda .
#
# Packages are those that the project was tested with (constraints.txt). CUDA
# comes as wheels with JAX, so that both start from the same small image and the
# host needs its driver alone.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS wheel
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY cmd_jax cmd_jax
COPY tfds_builders tfds_builders
RUN pip wheel --no-cache-dir --no-deps --wheel-dir=/wheels .

FROM python:${PYTHON} AS base
ARG EXTRAS=cluster,heif,onnx,parts,pretrained,report
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    # Pages of 2 MiB, which a step fills faster (benchmarks/README.md).
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    # Any user may write here, as containers often run as the host's.
    HOME=/cache \
    XDG_CACHE_HOME=/cache
COPY constraints.txt /constraints.txt
COPY --from=wheel /wheels /wheels
RUN mkdir --mode=1777 /cache /data
WORKDIR /data

FROM base AS cuda
RUN pip install --no-cache-dir --constraint=/constraints.txt \
    "$(echo /wheels/cmd_jax-*.whl)[cuda,${EXTRAS}]" \
    && cmd-jax --version
USER 1000:1000
ENTRYPOINT ["cmd-jax"]
CMD ["--help"]

# The last one, which is built where no target is named.
FROM base AS cpu
RUN pip install --no-cache-dir --constraint=/constraints.txt \
    "$(echo /wheels/cmd_jax-*.whl)[${EXTRAS}]" \
    && cmd-jax --version
USER 1000:1000
ENTRYPOINT ["cmd-jax"]
CMD ["--help"]
