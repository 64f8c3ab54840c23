# One image for everything in docker-compose.yml: nodes, and the etcd members they watch.
# etcd before 3.5.6 can diverge after a crash under load: the build stops at such a one.
FROM python:3.11-slim-trixie

RUN apt-get update \
    && apt-get install --yes --no-install-recommends etcd-server etcd-client libgomp1 \
    && dpkg --compare-versions "$(dpkg-query --show --showformat='${Version}' etcd-server)" ge 3.5.6 \
    && rm -rf /var/lib/apt/lists/*

# cpu or gpu: which lock file to install from.
ARG DEVICE=cpu
WORKDIR /opt/paddlewheel
COPY requirements/ requirements/
RUN pip install --no-cache-dir --require-hashes --no-deps -r requirements/image-${DEVICE}.txt

# A newer paddlepaddle-gpu than the lock's, from the index that Paddle's install page names:
#   --build-arg PADDLE_GPU=paddlepaddle-gpu==3.3.1 --build-arg PADDLE_INDEX_URL=...
ARG PADDLE_GPU=""
ARG PADDLE_INDEX_URL=""
RUN if [ -n "${PADDLE_GPU}" ]; then \
      pip install --no-cache-dir ${PADDLE_INDEX_URL:+--index-url "${PADDLE_INDEX_URL}"} "${PADDLE_GPU}"; \
    fi

COPY pyproject.toml README.md LICENSE ./
COPY registry/ registry/
COPY loader/ loader/
COPY router/ router/
COPY paddlewheel/ paddlewheel/
RUN pip install --no-cache-dir --no-deps --no-build-isolation --no-index . \
    && useradd --system --create-home --home-dir /var/lib/paddlewheel paddlewheel \
    && install -d -o paddlewheel /var/lib/paddlewheel/cache /var/lib/etcd-data

USER paddlewheel
WORKDIR /var/lib/paddlewheel
EXPOSE 8500
# SIGTERM drains: give it longer than the documents' drain_s.
STOPSIGNAL SIGTERM
ENTRYPOINT ["paddlewheel"]
CMD ["--help"]
