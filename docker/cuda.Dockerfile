# lorakit for NVIDIA GPUs. In the repository's folder:
#   docker build -f docker/cuda.Dockerfile -t lorakit .
#   docker run --rm -it --gpus all -v "$PWD:/work" lorakit train config.toml
# PyTorch's package brings CUDA's libraries; the host needs the NVIDIA driver and its container toolkit.
FROM python:3.11-slim

# torch.compile needs a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/work/.huggingface
COPY . /src
RUN pip install -c /src/constraints.txt "/src[all]" && rm -rf /src

WORKDIR /work
ENTRYPOINT ["lorakit"]
