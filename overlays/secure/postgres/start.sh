#!/bin/sh
# Starts the database, with pg_hba.conf for the database that .env names. Runs as root, which
# the image's own entrypoint then ceases to be; its arguments are the server's.
set -eu

database=$(printf %s "$POSTGRES_DB" | sed -e 's/"/""/g' -e 's/[\\&|]/\\&/g')
sed "s|@DATABASE@|\"$database\"|" /run/pg/pg_hba.conf >/run/hba/pg_hba.conf
chmod 444 /run/hba/pg_hba.conf
exec docker-entrypoint.sh postgres "$@"
