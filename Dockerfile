# The command line with every extra, in the versions of requirements.txt (docs/install.md, "In a container").
#   docker build -t continual-prompts .                              for CPUs
#   docker build -t continual-prompts:cuda --build-arg TORCH=cuda .  for NVIDIA GPUs
FROM python:3.12.11-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY pipeline pipeline
COPY data_prep data_prep
COPY ds_configs ds_configs
COPY slurm slurm
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.12.11-slim-bookworm
ARG TORCH=cpu
COPY requirements.txt containers/install.sh /tmp/install/
RUN sh /tmp/install/install.sh "$TORCH" /tmp/install/requirements.txt
COPY --from=wheel /dist /tmp/dist
RUN python -m pip install --no-cache-dir --no-deps /tmp/dist/*.whl
# Caches of the Hub, torch and matplotlib are below HOME; `docker run --user` may give any user.
RUN useradd --uid 1000 --create-home user && chmod 1777 /home/user && install -d -m 1777 /work
ENV HOME=/home/user
USER user
WORKDIR /work
ENTRYPOINT ["pipeline"]
CMD ["--help"]
