#!/usr/bin/env bash
# The `--pg=container` lane from nothing: a Docker daemon, a PostgreSQL image
# made from Debian packages, then pytest. Arguments are pytest's.
#
#   tests/container/run.sh [PYTEST_ARGUMENT...]
#   PYTHON   the interpreter with the [test] extra (default: .venv/bin/python)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
image=${IMAGE:-pgnotify-postgres:17}

if [ -z "${IN_LANE:-}" ]; then
    IN_LANE=1 exec "$here/with_docker.sh" "${BASH_SOURCE[0]}" "$@"
fi
"$here/make_image.sh" "$image"
cd "$root"
"$python" -m pytest --pg="container:$image" "$@"
