FROM golang:1.26-bookworm AS build
WORKDIR /src
ARG GOPROXY
ARG GOMODCACHE
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
ARG VERSION=unknown
RUN --mount=type=cache,target=/root/.cache/go-build CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /csi-driver ./cmd/csi-driver

# Not distroless: the driver runs the distribution's mkfs, fsck and resize tools.
FROM debian:bookworm-slim
# xfsprogs also depends on Python and ICU, 80 MB, for xfs_scrub alone, which the
# driver does not run. So it is installed without them.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends e2fsprogs btrfs-progs libdevmapper1.02.1 libedit2 libinih1 liburcu8 \
 && cd /tmp && apt-get download xfsprogs \
 && dpkg --install --force-depends xfsprogs_*.deb \
 && apt-get clean && rm -rf /tmp/* /var/lib/apt/lists/* /var/cache/* /var/log/*
COPY --from=build /csi-driver /usr/local/bin/csi-driver
COPY LICENSE /usr/share/doc/csi-driver/
ARG VERSION=unknown
LABEL org.opencontainers.image.title="Orlop" \
      org.opencontainers.image.description="CSI driver for local Kubernetes storage" \
      org.opencontainers.image.source="https://github.com/orlop-csi/orlop" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"
ENTRYPOINT ["/usr/local/bin/csi-driver"]
