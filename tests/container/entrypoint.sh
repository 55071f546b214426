#!/bin/sh
# The first process of the image: creates the cluster that POSTGRES_USER,
# POSTGRES_PASSWORD and POSTGRES_DB ask for, then becomes the server.
# Arguments are the server's: `docker run IMAGE postgres -c fsync=off`.
set -eu

: "${POSTGRES_USER:=postgres}"
: "${POSTGRES_DB:=$POSTGRES_USER}"
: "${PGDATA:=/var/lib/postgresql/data}"
export PGDATA

[ "$#" -gt 0 ] || set -- postgres
case $1 in
    -*) set -- postgres "$@" ;;
    postgres) ;;
    *) exec "$@" ;;
esac

if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA" /run/postgresql
    chown postgres:postgres "$PGDATA" /run/postgresql
    chmod 700 "$PGDATA"
    exec gosu postgres "$0" "$@"
fi

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    if [ -z "${POSTGRES_PASSWORD:-}" ]; then
        echo "POSTGRES_PASSWORD is not set; the server would have no password." >&2
        exit 1
    fi
    password_file=$(mktemp)
    printf '%s\n' "$POSTGRES_PASSWORD" > "$password_file"
    initdb --username="$POSTGRES_USER" --pwfile="$password_file" \
        --auth-local=trust --auth-host=scram-sha-256 \
        --encoding=UTF8 --locale=C.UTF-8 --lc-messages=C --no-sync
    rm -f "$password_file"
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"

    if [ "$POSTGRES_DB" != postgres ]; then
        # No TCP yet: whoever waits for 127.0.0.1 must not meet this server.
        pg_ctl --wait --options="-c listen_addresses=''" start
        createdb --username="$POSTGRES_USER" --maintenance-db=postgres -- "$POSTGRES_DB"
        pg_ctl --wait --mode=fast stop
    fi
    echo "PostgreSQL init process complete; ready for start up."
fi

command=$1
shift
exec "$command" -c listen_addresses='*' "$@"
