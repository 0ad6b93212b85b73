# syntax=docker/dockerfile:1
# Dependencies only: the code comes with the job (`working_dir`), so which code ran is never a guess, and one image serves
# head, submitter and all pools. Two targets, both from the lock files:
#
#   docker build --target cpu  -t softgrpo:cpu .
#   docker build --target cuda -t softgrpo:cuda .
#
# The CPU lock needs a CPU build of torch: where pip does not find one by default, name its index with
# `--build-arg PIP_EXTRA_INDEX_URL=...` (see requirements/README.md).

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# g++: DeepSpeed and Triton compile small operators at their first use. wget and procps: the operator's and Ray's health
# checks. Debian keeps only the newest build of a package, so a pinned version would stop building within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ libnuma1 procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 ray \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash ray
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    DS_BUILD_OPS=0
LABEL org.opencontainers.image.title="softgrpo" \
      org.opencontainers.image.description="Dependencies of SofT-GRPO: Ray, vLLM, DeepSpeed, MLflow" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM base AS cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY requirements/cpu.lock requirements/smoke.py /opt/softgrpo/
RUN pip install --no-deps -r /opt/softgrpo/cpu.lock && python /opt/softgrpo/smoke.py
ENV VLLM_CPU_OMP_THREADS_BIND=nobind
USER 1000
WORKDIR /home/ray
CMD ["ray", "--version"]

FROM base AS cuda
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY requirements/cuda.lock /opt/softgrpo/
# torch brings the CUDA libraries, the node its driver. There is no CUDA toolkit on the path: hence no sampler that is compiled.
RUN pip install --no-deps -r /opt/softgrpo/cuda.lock && python -c "import torch; assert torch.version.cuda"
ENV VLLM_USE_FLASHINFER_SAMPLER=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /home/ray
CMD ["ray", "--version"]
