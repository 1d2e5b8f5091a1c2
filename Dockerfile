# The image of the trainer: Debian's Python, torch's own wheels (which bring CUDA and NCCL along) and
# the project, each in layers of its own, so that a change of the project replaces the last ones alone.
# `containers/build.sh` builds it, and the SIF for Slurm from it; docs/containers.md has the arguments.
ARG BASE=debian:bookworm-slim


# The versions of Debian's packages are those of the day: they are few, get security updates, and
# stand in the list of packages that build.sh writes.
FROM ${BASE} AS python
# hadolint ignore=DL3008
RUN apt-get update \
 # torch.compile builds small extensions at run time: a C compiler, its headers and Python's
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    python3 python3-venv gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/*.log \
 # nobody in here has to become somebody else
 && find / -xdev -perm /6000 -type f -exec chmod a-s {} + \
 && python3 -m venv /opt/venv


# The builder's own wheels, where there are any: --build-context wheels=FOLDER
FROM scratch AS wheels


FROM python AS dependencies
WORKDIR /opt/critic/build
COPY constraints.txt containers/cuda13.txt ./
# pip reads these from its environment, and arguments stay out of the image's. FIND_LINKS: a folder
# or page of wheels.
ARG FIND_LINKS=/wheels
ARG CONSTRAINTS="constraints.txt cuda13.txt"
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS=${FIND_LINKS}
ARG PIP_CONSTRAINT=${CONSTRAINTS}
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
# Which build of torch: with `torch` alone the constraint's, as the index has it.
ARG TORCH=torch
# ca: certificates to trust in place of pip's own, where the network has some of its own
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca,target=/run/ca.pem \
    --mount=type=bind,from=wheels,target=/wheels \
    if [ -s /run/ca.pem ]; then export PIP_CERT=/run/ca.pem; fi \
 && /opt/venv/bin/pip install "${TORCH}"
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca,target=/run/ca.pem \
    --mount=type=bind,from=wheels,target=/wheels \
    if [ -s /run/ca.pem ]; then export PIP_CERT=/run/ca.pem; fi \
 && python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['train'], sep='\n')" \
    > requirements.txt \
 && /opt/venv/bin/pip install "${TORCH}" -r requirements.txt


FROM dependencies AS project
COPY LICENSE ./
COPY job job
COPY slurm slurm
# torch needs setuptools at run time, so it is there, and nothing is fetched. The README is for those
# who look at a checkout: another one is no other image.
RUN : > README.md \
 && /opt/venv/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /project .


FROM dependencies
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    # the image's packages and nothing of the home or the working folder, which may be a checkout
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    # MLflow asks for git, which is not here: the commit is known
    GIT_PYTHON_REFRESH=quiet \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
COPY containers/critic.sh /opt/critic/run
COPY configs /opt/critic/configs
# Copied, not mounted: podman 4 mounts nothing from a stage that it has taken from its cache, as when
# only configs/ has changed.
COPY --from=project /project /tmp/project
RUN /opt/venv/bin/pip install --no-cache-dir --no-index --no-deps /tmp/project/*.whl \
 && rm -r /tmp/project
ARG VERSION=unknown
ARG COMMIT=unknown
RUN echo "${COMMIT}" > /opt/critic/COMMIT
LABEL org.opencontainers.image.title="critic-job" \
      org.opencontainers.image.description="Trains a critic (value model) on a language-model trunk" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
USER 1000:1000
ENTRYPOINT ["/opt/critic/run"]
