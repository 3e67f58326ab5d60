#!/usr/bin/env bash
# Builds the images, starts API and worker, generates an image through the published port, has the worker run a short
# job, generates an image with its student, checks how the containers are confined, and takes everything down again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PORT=${PORT:-18000} COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-fewstep-smoke}
# The project has its own name, since its volume is removed at the end.
files=(-f compose.yaml)
[ -z "${CI_WHEEL_INDEX:-}" ] || files+=(-f docker/compose.ci.yaml)
compose() { docker compose "${files[@]}" "$@"; }

work=$(mktemp -d)
cleanup() {
  local status=$?
  if ((status != 0)); then compose ps -a; compose logs --tail 60; fi
  compose down --volumes --timeout 20 >/dev/null 2>&1 || true
  rm -rf "$work"
  exit "$status"
}
trap cleanup EXIT
say() { echo "[smoke ${SECONDS} s] $*"; }
fail() { echo "smoke: $*" >&2; exit 1; }

compose build --quiet api # the worker runs the same image
say "image built: $(docker image inspect fewstep:cpu --format '{{.Size}}' | awk '{printf "%.2f GB", $1 / 1e9}')"

compose up --detach --no-build --wait --wait-timeout 900
say "API and worker are healthy"

python3 docker/smoke.py "http://127.0.0.1:$PORT" "$work"
say "images generated, job done"

for service in api worker; do
  id=$(compose ps -q "$service")
  [ "$(docker exec "$id" id -u):$(docker exec "$id" id -g)" = 10001:10001 ] || fail "$service runs as another user"
  if docker exec "$id" touch /opt/fewstep/written 2>/dev/null; then fail "$service can write to its root file system"; fi
  docker exec "$id" grep -q '^CapEff:[[:space:]]*0*$' /proc/1/status || fail "$service has capabilities"
  docker exec "$id" grep -q '^NoNewPrivs:[[:space:]]*1$' /proc/1/status || fail "$service can gain privileges"
  say "$service: user 10001:10001, read-only, no capabilities, $(docker stats --no-stream --format '{{.MemUsage}}' "$id")"
done

compose restart api >/dev/null
compose up --detach --no-build --wait --wait-timeout 900
python3 docker/smoke.py "http://127.0.0.1:$PORT" "$work" --after-restart
say "the student is still there after a restart"
echo "smoke: passed in ${SECONDS} s"
