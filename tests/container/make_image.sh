#!/usr/bin/env bash
# Makes a PostgreSQL image for `pytest --pg=container` where no registry of
# images is reached: Debian's own packages in, `docker import` out.
#
#   tests/container/make_image.sh [IMAGE]      default: pgnotify-postgres:17
#
# Needs root (debootstrap), a Debian mirror and a running dockerd.
#   DEBIAN_MIRROR   the mirror (default: debootstrap's own)
#   FORCE=1         make it again although it exists
set -euo pipefail

image=${1:-pgnotify-postgres:17}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
suite=trixie
version=17

die() { echo "make_image: $*" >&2; exit 1; }

if [ -z "${FORCE:-}" ] && docker image inspect "$image" >/dev/null 2>&1; then
    echo "make_image: $image exists (FORCE=1 makes it again)"
    exit 0
fi
[ "$(id -u)" = 0 ] || die "debootstrap needs root"
command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq debootstrap; }

root=$(mktemp -d "${TMPDIR:-/tmp}/pgnotify-image.XXXXXX")
trap 'rm -rf --one-file-system "$root"' EXIT

echo "make_image: debootstrap $suite"
keyring=()
for file in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
    [ ! -e "$file" ] || { keyring=(--keyring="$file"); break; }
done
debootstrap --variant=minbase "${keyring[@]}" "$suite" "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} \
    > "$root.log" 2>&1 || { tail -20 "$root.log" >&2; die "debootstrap failed"; }
rm -f "$root.log"

echo "make_image: postgresql-$version, gosu"
# No service may start while packages are configured, no cluster may be
# created: the entrypoint makes its own.
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
mkdir -p "$root/etc/postgresql-common"
echo 'create_main_cluster = false' > "$root/etc/postgresql-common/createcluster.conf"
# What lets the host reach its mirror lets the chroot reach it too.
[ ! -e /etc/resolv.conf ] || cp -L /etc/resolv.conf "$root/etc/resolv.conf"
[ ! -e /etc/hosts ] || cp -L /etc/hosts "$root/etc/hosts"
chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 \
    apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 \
    "postgresql-$version" gosu > "$root.log" 2>&1 ||
    { tail -20 "$root.log" >&2; die "apt-get in the chroot failed"; }
rm -f "$root.log"

install -m 755 "$here/entrypoint.sh" "$root/usr/local/bin/entrypoint.sh"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* \
    "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root/usr/sbin/policy-rc.d"
: > "$root/etc/resolv.conf"
printf '127.0.0.1 localhost\n' > "$root/etc/hosts"

echo "make_image: docker import $image"
tar -C "$root" --one-file-system --numeric-owner -cf - . | docker import \
    --change "ENV PATH=/usr/lib/postgresql/$version/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    --change "ENV PGDATA=/var/lib/postgresql/data LANG=C.UTF-8" \
    --change 'ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]' \
    --change 'CMD ["postgres"]' \
    --change 'EXPOSE 5432' \
    - "$image"
