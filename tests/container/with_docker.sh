#!/usr/bin/env bash
# Runs a command with a Docker daemon to talk to:
#
#   tests/container/with_docker.sh COMMAND [ARGUMENT...]
#
# A daemon that answers already is used as it is. Otherwise (root only) one is
# started by hand for the length of the command, without systemd and without
# touching the machine's packet filter: published ports go through Docker's
# userland proxy, which is all that testcontainers needs.
#   DOCKER_STATE    where that daemon keeps its images (default: a temporary
#                   directory, removed afterwards)
set -euo pipefail

die() { echo "with_docker: $*" >&2; exit 1; }

[ "$#" -gt 0 ] || die "no command given"
export TESTCONTAINERS_RYUK_DISABLED=true   # its image comes from a registry

if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    exec "$@"
fi
[ "$(id -u)" = 0 ] || die "no Docker daemon answers, and starting one needs root"
if ! command -v dockerd >/dev/null || ! command -v docker >/dev/null; then
    command -v apt-get >/dev/null || die "no dockerd here, and no apt-get to install docker.io with"
    echo "with_docker: installing docker.io"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq docker.io >/dev/null
fi

run=$(mktemp -d "${TMPDIR:-/tmp}/pgnotify-docker.XXXXXX")
state=${DOCKER_STATE:-$run/state}
mkdir -p "$state"
export DOCKER_HOST=unix://$run/docker.sock

dockerd --iptables=false --ip6tables=false --host "$DOCKER_HOST" --pidfile "$run/pid" \
    --data-root "$state" --exec-root "$run/exec" > "$run/log" 2>&1 &
daemon=$!
stop() {
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    rm -rf --one-file-system "$run"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for _ in $(seq 150); do
    if docker info >/dev/null 2>&1; then break; fi
    kill -0 "$daemon" 2>/dev/null || break
    sleep 0.2
done
docker info >/dev/null 2>&1 || { tail -20 "$run/log" >&2; die "dockerd did not come up"; }
echo "with_docker: dockerd $(docker version --format '{{.Server.Version}}')," \
    "storage driver $(docker info --format '{{.Driver}}')"

"$@"
