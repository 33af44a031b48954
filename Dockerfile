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
# of the images. What else is worth a label: --label org.opencontainers.image.revision="$(git rev-parse HEAD)".
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS tools
ARG UV_VERSION=0.13.8
RUN pip install --no-cache-dir "uv==${UV_VERSION}"

FROM tools AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY sdtrain sdtrain
COPY launcher launcher
COPY data_pipeline data_pipeline
RUN uv build --wheel --out-dir /wheel --no-cache

# What every work needs. The lock is a constraint: of what an extra asks for, each file must be one whose hash it holds.
# Lock and wheel are copied and stay: buildah would not notice a change of theirs behind a mount.
FROM ${PYTHON_IMAGE} AS common
LABEL org.opencontainers.image.title="sdtrain" \
      org.opencontainers.image.description="Pre-train latent diffusion models from raw web metadata to samples" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
ENV UV_SYSTEM_PYTHON=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 sdtrain
WORKDIR /project
COPY pyproject.toml requirements.lock /opt/sdtrain/
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /opt/sdtrain/pyproject.toml --constraint /opt/sdtrain/requirements.lock

FROM common AS data
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /opt/sdtrain/pyproject.toml --constraint /opt/sdtrain/requirements.lock \
        --extra data --extra storage --extra huggingface
COPY --from=wheel /wheel /opt/sdtrain
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv uv pip install --no-cache --no-deps /opt/sdtrain/*.whl
USER 1000
CMD ["sdtrain-data", "--help"]

# torch.compile builds its kernels with a compiler, on the node and at run time.
FROM common AS train
# hadolint ignore=DL3008  # the newest compiler of this Debian
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /opt/sdtrain/pyproject.toml --constraint /opt/sdtrain/requirements.lock \
        --extra train --extra storage
COPY --from=wheel /wheel /opt/sdtrain
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv uv pip install --no-cache --no-deps /opt/sdtrain/*.whl
USER 1000
CMD ["sdtrain", "train", "--help"]

FROM common AS sample
COPY --from=wheel /wheel /opt/sdtrain
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv uv pip install --no-cache --no-deps /opt/sdtrain/*.whl
USER 1000
CMD ["sdtrain", "sample", "--help"]

FROM common AS evaluate
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv \
    --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement /opt/sdtrain/pyproject.toml --constraint /opt/sdtrain/requirements.lock \
        --extra evaluate
COPY --from=wheel /wheel /opt/sdtrain
RUN --mount=from=tools,source=/usr/local/bin/uv,target=/bin/uv uv pip install --no-cache --no-deps /opt/sdtrain/*.whl
USER 1000
CMD ["sdtrain", "evaluate", "--help"]
