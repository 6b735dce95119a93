# qkjax in a container, for CPU or for NVIDIA GPUs.
#
#   docker build -t qkjax .
#   docker build -t qkjax:cuda --build-arg EXTRAS=cuda,data,report .
#   docker run --rm -v "$PWD/runs:/data/runs" qkjax train --config=muon_noqk:tiny --workdir=runs/first
#   docker run --rm --gpus all -v "$PWD/runs:/data/runs" qkjax:cuda train --config=muon_noqk:tiny --workdir=runs/first
#
# The folder that is mounted must be writable by user 1000. A run's environment.json has no commit here:
# there is no .git in the image.
FROM python:3.11-slim-bookworm

ARG EXTRAS=data,report

WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY qkjax qkjax
COPY configs configs
RUN python -m pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

RUN useradd --create-home --uid 1000 qkjax && install -d -o qkjax /data
USER 1000
WORKDIR /data
ENTRYPOINT ["qkjax"]
CMD ["--help"]
