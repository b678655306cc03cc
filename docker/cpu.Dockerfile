# lorakit for CPUs, a tenth of the size. In the repository's folder:
#   docker build -f docker/cpu.Dockerfile -t lorakit-cpu .
#   docker run --rm -it -v "$PWD:/work" lorakit-cpu check config.toml
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/work/.huggingface
COPY . /src
RUN pip install -c /src/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install -c /src/constraints.txt "/src[all]" \
    && rm -rf /src

WORKDIR /work
ENTRYPOINT ["lorakit"]
