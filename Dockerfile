FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY dicomcast dicomcast
COPY mappings mappings
# An environment without pip of its own: what is copied below holds the program and its libraries, nothing to build with.
RUN python -m venv --without-pip /opt/dicomcast \
    && pip --python /opt/dicomcast install --no-cache-dir '.[postgres]'

FROM python:3.12-slim
LABEL org.opencontainers.image.title="dicomcast" \
      org.opencontainers.image.description="Keeps a FHIR R4 service in step with a DICOM service" \
      org.opencontainers.image.licenses="MIT"
RUN pip uninstall --yes --root-user-action=ignore pip \
    && groupadd --system --gid 10001 dicomcast \
    && useradd --system --uid 10001 --gid dicomcast --home-dir /data --shell /usr/sbin/nologin dicomcast \
    && install --directory --owner dicomcast --group dicomcast /data
COPY --from=build /opt/dicomcast /opt/dicomcast
ENV PATH=/opt/dicomcast/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# All that is ever written is below /data (the database, when it is SQLite): the rest may be mounted read-only.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
# Alive, not ready: a service that is down is no reason to restart the worker that waits for it.
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/livez', timeout=4)"]
ENTRYPOINT ["dicomcast"]
CMD ["run"]
