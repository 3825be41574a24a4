# syntax=docker/dockerfile:1
#
# The image of a rank. Where it was written there is no Docker: FLAVOR=cpu was built by buildah and run by podman
# (docs/LAUNCH.md), FLAVOR=cuda never.
#
#   docker build -t diffdis-pretrain .                                       CUDA: pip's torch brings its own libraries
#   docker build -t diffdis-pretrain:cpu --build-arg FLAVOR=cpu .            CPU only, several GB smaller
#   sudo install -d -o 10001 runs                                            the image's user must be able to write there
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/work/runs" diffdis-pretrain \
#       python -m launcher local --config configs/quickstart.yaml
#
# BASE is any Debian or Ubuntu whose python3 is 3.11 or newer. The default needs only the host's NVIDIA driver and the
# NVIDIA container toolkit. To compile DeepSpeed's own CUDA ops (this project uses none) take one with nvcc, such as
# --build-arg BASE=nvidia/cuda:<version>-devel-ubuntu24.04.

ARG BASE=debian:12.11-slim

# hadolint ignore=DL3006
FROM ${BASE} AS base
ENV DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# tini: as PID 1 it passes signals on and reaps data workers. git: MLflow records the commit.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -c 'import sys; assert sys.version_info >= (3, 11), sys.version'

# The environment, in a stage of its own: compilers and build leftovers stay behind.
FROM base AS environment
ARG FLAVOR=cuda
# Where torch for CPUs comes from; a mirror of it, where that cannot be reached.
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /tmp/requirements.txt
# torch first, alone: the largest layer changes only with its pin (or with the file, which is small and rarely edited).
RUN python3 -m venv /opt/venv \
    && case "${FLAVOR}" in \
         cuda) ;; \
         cpu) export PIP_INDEX_URL="${CPU_INDEX}" ;; \
         *) echo "FLAVOR=${FLAVOR} must be cuda or cpu" >&2; exit 1 ;; \
       esac \
    && grep '^torch==' /tmp/requirements.txt > /tmp/torch.txt \
    && pip install --no-cache-dir --disable-pip-version-check --requirement /tmp/torch.txt
RUN pip install --no-cache-dir --disable-pip-version-check --requirement /tmp/requirements.txt

FROM base AS run
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="diffdis-pretrain" \
      org.opencontainers.image.description="Distributed pretraining of one diffusion model that generates and discriminates" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# For the NVIDIA container toolkit; without meaning on CPU.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin pretrain \
    && install --directory --owner=pretrain --group=pretrain /work /work/runs
COPY --from=environment /opt/venv /opt/venv
WORKDIR /work
# From what changes least to what changes most.
COPY LICENSE NOTICE README.md pyproject.toml requirements.txt ./
COPY data ./data
COPY configs ./configs
COPY launcher ./launcher
COPY pretrain ./pretrain
# By number: Kubernetes' runAsNonRoot cannot look up a name.
USER 10001:10001

# A batch job serves nothing that could be asked. It is well while it has a process of the run and none of them is
# stopped or dead: the state in which a rank hangs all the others.
HEALTHCHECK --interval=60s --timeout=20s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import psutil, sys; runs = [p.info['status'] for p in psutil.process_iter(['cmdline', 'status']) if {'pretrain', 'launcher'} & set(p.info['cmdline'] or [])]; sys.exit(not runs or bool({'stopped', 'zombie', 'dead'} & set(runs)))"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "pretrain", "--help"]
