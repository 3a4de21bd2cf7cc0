# The parts of warmlane in one image; compose.yaml says which one runs. Models and their runtimes stay outside.
# The version stands in pyproject.toml and nowhere else: docker build --build-arg VERSION=… labels the image with it, and
# fails where the package says another.
FROM python:3.11-slim AS build
ARG VERSION=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY api api
COPY broker broker
COPY workers workers
RUN python -m venv --without-pip /opt/warmlane \
    && pip --python /opt/warmlane install --no-cache-dir -q -c constraints.txt '.[gpu]' \
    && test "${VERSION:-$(/opt/warmlane/bin/gateway version)}" = "$(/opt/warmlane/bin/gateway version)"

FROM python:3.11-slim
ARG VERSION=""
LABEL org.opencontainers.image.title=warmlane \
      org.opencontainers.image.licenses=MIT \
      org.opencontainers.image.version=$VERSION
# The number is for runAsNonRoot of Kubernetes, which reads no names. The image installs nothing once it is built.
RUN useradd --system --user-group --uid 10001 --create-home --home-dir /var/lib/warmlane warmlane \
    && python -m pip uninstall -q -y --root-user-action=ignore pip
COPY --from=build /opt/warmlane /opt/warmlane
ENV PATH=/opt/warmlane/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GATEWAY_BIND=0.0.0.0:8400 \
    GATEWAY_STATE_DIR=/var/lib/warmlane
USER 10001:10001
WORKDIR /var/lib/warmlane
EXPOSE 8400
# Of the api; compose.yaml and the other deployments ask each part.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["gateway", "alive", "api"]
CMD ["gateway", "api"]
