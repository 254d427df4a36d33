# An image for pods:  docker build --build-arg ACCEL=tpu -t REGISTRY/sdjax:tpu .        ACCEL: cpu, cuda or tpu
# A run that finds no such device in it stops with one line.
FROM python:3.12-slim-bookworm
ARG ACCEL=cpu
ENV ACCEL=$ACCEL PYTHONUNBUFFERED=1
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /sdjax
COPY . .
RUN make install
CMD ["make", "help"]
