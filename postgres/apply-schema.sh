#!/bin/sh
# Applies every file of init/ in the order of their numbers, in one transaction:
# afterwards all of it is there, or nothing has changed. Run on every start, so each
# file is idempotent. Then lets `reader` log in by READER_PASSWORD; not at all, if that is
# empty. Of other settings it reads none: libpq's variables (PGHOST, PGDATABASE, PGUSER,
# PGPASSWORD, ...) say which database.
set -eu

here=$(dirname "$0")
. "$here/passwords.sh"

set --
for file in "$here"/init/*.sql; do
    set -- "$@" -f "$file"
done

# `docker compose restart` restarts everything at once, without waiting for one another.
tries=0
until pg_isready --quiet --timeout=1 || [ "$tries" -ge 60 ]; do
    tries=$((tries + 1))
    sleep 1
done

# NOTICEs such as "relation already exists, skipping" would be all that a second run says.
# What the owner has set for everybody else must not end an upgrade in the middle, or hide from
# it what another run has just done.
export PGOPTIONS="${PGOPTIONS:-} -c client_min_messages=warning -c statement_timeout=0 \
    -c default_transaction_read_only=off -c default_transaction_isolation=read\\ committed"

# The lock lets one run wait for another: two at once fail with 23505 (duplicate key in
# the catalog). Its number is arbitrary, and only this script takes it.
lock='SELECT pg_advisory_xact_lock(7153001)'

psql --no-psqlrc --quiet --no-password --set ON_ERROR_STOP=1 --single-transaction \
    --output /dev/null -c "$lock" "$@"
given=${READER_PASSWORD:+yes}
psql_with_password "${READER_PASSWORD:-}" --single-transaction --set given="${given:-no}" \
    -c "$lock" -f "$here/reader.sql"
