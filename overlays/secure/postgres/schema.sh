#!/bin/sh
# Brings the schema up to date as ever, then gives each role the password that its file
# holds: so a database that was in use before, or files that were made anew, fit together
# again at the next start. It runs on every start.
set -eu

sh /postgres/apply-schema.sh

# By psql's \password, which sends the hash and never the password: so no log of the
# database can hold it. Without a terminal it reads from standard input, twice. Its prompts
# are shown only together with an error.
set_password() {
    password=$(cat "/run/secrets/$2")
    said=$(printf '%s\n%s\n' "$password" "$password" |
        setsid --wait psql --no-psqlrc --quiet --no-password --set ON_ERROR_STOP=1 \
            --set role="$1" --command '\password :"role"' 2>&1) || {
        echo "$said" >&2
        exit 1
    }
}

psql --no-psqlrc --quiet --no-password --set ON_ERROR_STOP=1 --set database="$PGDATABASE" <<'SQL'
ALTER ROLE ingester LOGIN;
ALTER ROLE reader LOGIN;
-- Anybody may, by default; a full disk would stop the ingester.
REVOKE TEMPORARY ON DATABASE :"database" FROM PUBLIC;
SQL
set_password "$PGUSER" postgres_password
set_password ingester database_ingester_password
set_password reader database_reader_password
