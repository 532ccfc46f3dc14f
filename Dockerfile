# syntax=docker/dockerfile:1

# One image for the draft service, the target service and the client:
#     docker build --build-arg VARIANT=cpu  --tag outrider:cpu .
#     docker build --build-arg VARIANT=cuda --tag outrider:cuda .
# and a small one without torch, for the client alone:
#     docker build --target client --tag outrider:client .

ARG PYTHON_VERSION=3.11
# Which build of torch: cpu or cuda.
ARG VARIANT=cpu

FROM python:${PYTHON_VERSION}-slim-bookworm AS python
ENV PIP_CACHE_DIR=/cache/pip \
    PIP_CONSTRAINT=constraints.txt \
    PIP_BUILD_CONSTRAINT=constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY constraints.txt ./

# The wheel; its build makes the stubs from the protos.
FROM python AS wheel
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY protos protos
COPY outrider outrider
COPY draft_service draft_service
COPY target_service target_service
COPY client client
COPY gateway gateway
RUN --mount=type=cache,target=/cache/pip \
    pip wheel --no-deps --wheel-dir dist .

# Environments are made at the path where they are used: their scripts name it.
FROM python AS client-packages
RUN python -m venv /app
COPY --from=wheel /build/dist /build/dist
RUN --mount=type=cache,target=/cache/pip \
    set -- dist/*.whl && /app/bin/pip install "$1[chat]"

# torch comes first, in a layer that a change of the project leaves alone.
FROM python AS torch-cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/cache/pip \
    python -m venv /app && \
    /app/bin/pip install --extra-index-url "${TORCH_INDEX_URL}" torch

# The default index has torch for CUDA, with the CUDA libraries it needs: the host brings the driver alone.
FROM python AS torch-cuda
RUN --mount=type=cache,target=/cache/pip \
    python -m venv /app && \
    /app/bin/pip install torch

# hadolint ignore=DL3006
FROM torch-${VARIANT} AS packages
ARG VARIANT
COPY --from=wheel /build/dist /build/dist
RUN --mount=type=cache,target=/cache/pip \
    set -- dist/*.whl && \
    if [ "${VARIANT}" = cuda ]; then extras=serve,gguf,quantization; else extras=serve,gguf; fi && \
    /app/bin/pip install "$1[${extras}]"

FROM python:${PYTHON_VERSION}-slim-bookworm AS base-cpu

# Triton compiles the kernels for GPUs by itself, but what launches them needs a C compiler.
FROM base-cpu AS base-cuda
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*

# The caches of the hub and of compiled code are made here, so that volumes mounted on them belong to the user who
# writes them. Code is compiled at the first start, not here: it is for the processor that runs it.
# hadolint ignore=DL3006
FROM base-${VARIANT} AS runtime
RUN useradd --uid 10001 --user-group --create-home outrider && \
    install --directory --owner=outrider --group=outrider /cache/huggingface /cache/code
ENV PATH=/app/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/code/numba \
    TRITON_CACHE_DIR=/cache/code/triton
WORKDIR /home/outrider
USER 10001:10001

FROM runtime AS client
COPY --from=client-packages /app /app
ENTRYPOINT ["outrider"]
CMD ["--help"]

# The default: commands are outrider-draft, outrider-target and outrider.
FROM runtime AS services
COPY --from=packages /app /app
EXPOSE 50051 50052
CMD ["outrider", "--help"]
