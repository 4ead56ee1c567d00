#!/bin/sh
# Brings the schema up to date as ever, then gives each role its limits and the password that
# its file holds: so a database that was in use before, or files that were made anew, fit
# together again at the next start. It runs on every start.
set -eu

# Whatever a role holds (a lock on a table, an open transaction), the schema step need not wait
# for it: while it runs, the sessions of the two roles that block it are ended.
end_what_blocks() {
    while sleep 1; do
        psql --no-psqlrc --quiet --no-password --output /dev/null --command "
            SELECT pg_terminate_backend(blocker.pid)
            FROM pg_stat_activity AS blocked
            JOIN pg_stat_activity AS blocker
                ON blocker.pid = ANY (pg_blocking_pids(blocked.pid))
            WHERE blocked.usename = current_user AND blocked.application_name = 'schema'
                AND blocker.usename IN ('ingester', 'reader')" || true
    done
}

end_what_blocks &
trap "kill $!" EXIT
# The password of its file, whatever .env or another overlay has put into READER_PASSWORD.
READER_PASSWORD=$(cat /run/secrets/database_reader_password)
export READER_PASSWORD
PGAPPNAME=schema sh /postgres/apply-schema.sh

PGAPPNAME=schema psql --no-psqlrc --quiet --no-password --set ON_ERROR_STOP=1 \
    --single-transaction --set database="$PGDATABASE" --file /overlay/limits.sql

. /postgres/passwords.sh
set_password() {
    psql_with_password "$(cat "/run/secrets/$2")" --set role="$1" --command '\password :"role"'
}
set_password "$PGUSER" postgres_password
set_password ingester database_ingester_password
