# The parts of warmlane in one image; compose.yaml says which one runs. Models and their runtimes stay outside.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY api api
COPY broker broker
COPY workers workers
RUN python -m venv /opt/warmlane && /opt/warmlane/bin/pip install --no-cache-dir -q -c constraints.txt .

FROM python:3.12-slim
RUN useradd --system --create-home --home-dir /var/lib/warmlane warmlane
COPY --from=build /opt/warmlane /opt/warmlane
ENV PATH=/opt/warmlane/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GATEWAY_STATE_DIR=/var/lib/warmlane
USER warmlane
WORKDIR /var/lib/warmlane
EXPOSE 8400
CMD ["gateway", "api"]
