# docker build -t sdtrain . && docker run --rm --gpus all --shm-size 8g -v "$PWD:/project" -w /project sdtrain sdtrain --help
FROM python:3.11-slim

# A compiler, for torch.compile's kernels and DeepSpeed's operators; git, for the commit that a run writes down.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sdtrain
COPY Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY sdtrain sdtrain
COPY launcher launcher
COPY data_pipeline data_pipeline
RUN make venv
COPY configs configs

ENV PATH=/opt/sdtrain/.venv/bin:$PATH
CMD ["sdtrain", "--help"]
