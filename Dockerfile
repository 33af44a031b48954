# syntax=docker/dockerfile:1
# One image for each kind of work, with what that needs and nothing else:
#
#   docker build --target train --tag sdtrain:train .        # or data, sample, evaluate; needs BuildKit, or buildah
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" --env HOME=/tmp --volume "$PWD:/project" \
#       sdtrain:train sdtrain-launch torchrun configs/sd15/tiny/train.yaml
#
# CUDA comes inside torch's wheels: the host needs NVIDIA's driver and container toolkit, and no CUDA of its own; the base
# is plain Python. All four share the layer that holds torch. Pages, data and runs are mounted, never built in.
#
# Build arguments: PYTHON_IMAGE, the base, a Debian with Python 3.11; UV_VERSION, of the installer, which stays outside
# of the images; VERSION and REVISION, for the labels: --build-arg REVISION="$(git rev-parse HEAD)".
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS parts
ARG UV_VERSION=0.13.8
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
WORKDIR /parts
COPY pyproject.toml requirements.lock ./

FROM parts AS wheel
COPY README.md LICENSE ./
COPY sdtrain sdtrain
COPY launcher launcher
COPY data_pipeline data_pipeline
RUN uv build --wheel --out-dir /wheel --no-cache

# What every work needs. The lock is a constraint: of what an extra asks for, each file must be one whose hash it holds.
FROM ${PYTHON_IMAGE} AS common
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sdtrain" \
      org.opencontainers.image.description="Pre-train latent diffusion models from raw web metadata to samples" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV UV_SYSTEM_PYTHON=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 sdtrain
WORKDIR /project
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=parts,source=/parts,target=/parts \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /parts/pyproject.toml --constraint /parts/requirements.lock

FROM common AS data
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=parts,source=/parts,target=/parts \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /parts/pyproject.toml --constraint /parts/requirements.lock \
        --extra data --extra storage --extra huggingface
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=wheel,source=/wheel,target=/wheel \
    uv pip install --no-cache --no-deps /wheel/*.whl
USER 1000
CMD ["sdtrain-data", "--help"]

# torch.compile builds its kernels with a compiler, on the node and at run time.
FROM common AS train
# hadolint ignore=DL3008  # the newest compiler of this Debian
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=parts,source=/parts,target=/parts \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /parts/pyproject.toml --constraint /parts/requirements.lock \
        --extra train --extra storage
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=wheel,source=/wheel,target=/wheel \
    uv pip install --no-cache --no-deps /wheel/*.whl
USER 1000
CMD ["sdtrain", "train", "--help"]

FROM common AS sample
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=wheel,source=/wheel,target=/wheel \
    uv pip install --no-cache --no-deps /wheel/*.whl
USER 1000
CMD ["sdtrain", "sample", "--help"]

FROM common AS evaluate
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=parts,source=/parts,target=/parts \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /parts/pyproject.toml --constraint /parts/requirements.lock \
        --extra evaluate
RUN --mount=from=parts,source=/usr/local/bin/uv,target=/bin/uv --mount=from=wheel,source=/wheel,target=/wheel \
    uv pip install --no-cache --no-deps /wheel/*.whl
USER 1000
CMD ["sdtrain", "evaluate", "--help"]
