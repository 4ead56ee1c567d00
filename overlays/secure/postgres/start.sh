#!/bin/sh
# Starts the database, with pg_hba.conf for the database that .env names. Runs as root, which
# the image's own entrypoint then ceases to be, and which alone can read what is mounted under
# umask 077; its arguments are the server's.
set -eu

database=$(printf %s "$POSTGRES_DB" | sed -e 's/"/""/g' -e 's/[\\&|]/\\&/g')
sed "s|@DATABASE@|\"$database\"|" /overlay/pg_hba.conf >/run/pg/pg_hba.conf
cp /overlay/pg_ident.conf /run/pg
chmod 444 /run/pg/*
exec docker-entrypoint.sh postgres "$@"
