# syntax=docker/dockerfile:1
# One image for every part: node daemon, driver, scheduler, seed, and `rafs wait` in init containers.
# Two stages: what compiles stays behind. Packages come from whatever index pip is configured for, in the versions of constraints.txt.
# What the tests run with.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libfuse3-dev pkg-config \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/rafs
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY rafsfs rafsfs
COPY builder builder
COPY p2p p2p
COPY scheduler scheduler
COPY cli cli
RUN /opt/rafs/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[csi]' \
 && /opt/rafs/bin/pip uninstall -y --disable-pip-version-check pip \
 && find /opt/rafs -name tests -type d -path '*/numpy/*' -prune -exec rm -rf {} +

FROM python:${PYTHON}-slim-bookworm
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="rafs" \
      org.opencontainers.image.description="Lazy-loading, read-only filesystem for AI models on an OCI registry" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# fuse3: fusermount3, for mounts of other users than root. ca-certificates: registries are spoken to by TLS.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates fuse3 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 65532 rafs \
 && useradd --uid 65532 --gid 65532 --home-dir /data --create-home --shell /usr/sbin/nologin rafs
COPY --from=build /opt/rafs /opt/rafs
ENV PATH=/opt/rafs/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# What mounts is made root by its manifest; all else does without.
USER 65532:65532
WORKDIR /data
ENTRYPOINT ["rafs"]
CMD ["--help"]
