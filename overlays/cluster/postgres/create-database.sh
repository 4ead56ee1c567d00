#!/bin/sh
# Makes the database, once, when Patroni has made the cluster's first node. The tables are made by
# the stack's own step, `schema`. $1 is how to connect.
set -eu
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --set name="$POSTGRES_DB" "$1" <<'SQL'
SELECT format('CREATE DATABASE %I', :'name')
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name')
\gexec
SQL
