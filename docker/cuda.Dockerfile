# syntax=docker/dockerfile:1
# The image server on an NVIDIA GPU: models and runs in torch. The build context is the root of the repository:
#   docker build --file docker/cuda.Dockerfile --tag fmg-server:cuda .
# torch brings the CUDA libraries, so the host needs only the driver and the NVIDIA Container Toolkit.
ARG PYTHON=3.12.11-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY constraints.txt LICENSE pyproject.toml README.md ./
COPY configs ./configs
COPY fmg ./fmg
# the environment has no pip of its own
RUN python -m venv --without-pip /venv \
 && python -m pip --python /venv/bin/python install --no-cache-dir --constraint constraints.txt '.[onnx,server]'

FROM python:${PYTHON}
# torch.compile needs a C compiler for triton's launchers
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin fmg \
 && install --directory --owner=10001 --group=10001 /cache
COPY --from=build /venv /venv
# weights from the hub, compiled kernels and fmg's own cache
ENV PATH=/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    FMG_CACHE=/cache/fmg \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME ["/model", "/cache"]
EXPOSE 8000
# an 8 B model takes minutes to load
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fmg", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
