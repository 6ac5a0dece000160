# docker build -t tsae .                               torch's CUDA wheel
# docker build -t tsae --build-arg TORCH=cpu .         its CPU wheel
# docker run --rm -v "$PWD/runs:/runs" tsae            the quickstart sweep, into ./runs
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

FROM ${BASE_IMAGE} AS installer
RUN python3 -m venv /opt/installer

FROM installer AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY sweeps sweeps
COPY tsae tsae
RUN /opt/installer/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /opt/wheel .

FROM ${BASE_IMAGE} AS environment
ARG TORCH=cuda
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY launch/image/install.sh constraints.txt /opt/tsae/
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    /opt/tsae/install.sh torch
COPY pyproject.toml /opt/tsae/
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    /opt/tsae/install.sh dependencies

# The only stage with a compiler.
FROM environment AS driver
ARG TORCH=cuda
RUN /opt/tsae/install.sh driver

FROM environment
COPY --from=driver /opt/tsae/driver /opt/tsae/driver
COPY launch/image/entrypoint.sh launch/image/cc.sh /opt/tsae/
COPY sweeps /opt/tsae/sweeps
COPY launch /opt/tsae/launch
RUN --mount=type=bind,from=installer,source=/opt/installer,target=/opt/installer \
    --mount=type=bind,from=wheel,source=/opt/wheel,target=/opt/wheel \
    /opt/tsae/install.sh package && install -d -m 1777 -o 1000 -g 1000 /runs

# No module is ever taken from a home or working directory. USER has no entry in /etc/passwd to be looked up in.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    LANG=C.UTF-8 \
    CC=/opt/tsae/cc.sh \
    TSAE_HOME=/runs \
    HF_HOME=/runs/huggingface \
    HOME=/runs/.home \
    USER=tsae \
    LOGNAME=tsae
WORKDIR /opt/tsae
ENTRYPOINT ["/opt/tsae/entrypoint.sh"]

ARG VERSION=0.1.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="tsae" \
      org.opencontainers.image.description="Temporal Sparse Autoencoders on a cluster or a laptop" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
