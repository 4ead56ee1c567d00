#!/bin/sh
# Starts the database with the command that it is given, and the overlay's settings behind it:
# TLS, and pg_hba.conf for the database that .env names. Runs as root, which the image's own
# entrypoint then ceases to be, and which alone can read what is mounted under umask 077.
set -eu

database=$(printf %s "$POSTGRES_DB" | sed -e 's/"/""/g' -e 's/[\\&|]/\\&/g')
sed "s|@DATABASE@|\"$database\"|" /overlay/pg_hba.conf >/run/pg/pg_hba.conf
cp /overlay/pg_ident.conf /run/pg
chmod 444 /run/pg/*

set -- "$@" \
    -c ssl=on \
    -c ssl_min_protocol_version=TLSv1.2 \
    -c ssl_cert_file=/run/database/server.crt \
    -c ssl_key_file=/run/database/server.key \
    -c hba_file=/run/pg/pg_hba.conf \
    -c ident_file=/run/pg/pg_ident.conf \
    -c password_encryption=scram-sha-256
# Compiled queries take memory that only large machines have.
set -- "$@" -c jit=off
# Who connects and says nothing holds a process.
set -- "$@" -c authentication_timeout=10s
# KiB of memory of one process, which no role can raise: the statement that wants more fails
# alone, where the kernel would end all at the container's limit. Not in Compose's `ulimits`:
# what `docker exec` runs had it too, and the engine itself needs nearly as much to start it, so
# one command in 300, health checks among them, did not start.
ulimit -d 98304
exec docker-entrypoint.sh "$@"
