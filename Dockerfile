# Workers, head and submitter of a Ray cluster on Kubernetes: docker build -t registry.example.com/ray-surgeon:0.2.0 .
# The first stage builds a wheel from this repository; the second one has no compiler and no sources.

FROM python:3.11.14-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY ray_surgeon ray_surgeon
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# torch 2.13.0 of PyPI is built for CUDA 13.0 and brings its libraries along, so Ray's image is the one without CUDA.
# Nodes with GPUs need NVIDIA's driver 580 or newer; where it is older, the container does not start and says so.
FROM rayproject/ray:2.60.0-py311-cpu
COPY --from=build /wheels /tmp/wheels
COPY requirements.lock /tmp/requirements.lock
# Ray stays the image's own; everything else has the versions of requirements.lock.
# hadolint ignore=DL3013
RUN wheel="$(ls /tmp/wheels/*.whl)" \
    && pip install --no-cache-dir --constraint /tmp/requirements.lock "${wheel}[quickstart,s3]" "ray[default]==2.60.0" torch==2.13.0
USER 1000:100
WORKDIR /home/ray
ENV OMP_WAIT_POLICY=PASSIVE NVIDIA_DRIVER_CAPABILITIES=compute,utility NVIDIA_REQUIRE_CUDA="cuda>=13.0"
CMD ["python", "-m", "ray_surgeon.pipeline", "--help"]
