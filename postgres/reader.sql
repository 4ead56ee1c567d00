-- Whether `reader`, the role for dashboards, can log in, and what it may take of the server.
-- apply-schema.sh runs it on every start, as a superuser, with a password for \password on
-- standard input, and with `given` saying whether there is one.
--
-- Invariant: who was given LOGIN here loses it at the first start without a password. A role that
-- its owner gave LOGIN by hand, which has no such comment, stays as it is.

\set mark 'Logs in by READER_PASSWORD, or a file in its place: see docs/configuration.md.'

SELECT coalesce(shobj_description('reader'::regrole, 'pg_authid') = :'mark', FALSE) AS marked
\gset

\if :given
    -- So undone is what the role has set for itself, which cannot be refused. What is a default
    -- alone (all but the number of connections and temp_file_limit) it can change for its own
    -- sessions.
    ALTER ROLE reader RESET ALL;
    ALTER ROLE reader IN DATABASE :"DBNAME" RESET ALL;
    -- For this database, which wins over what is set for a role in general.
    ALTER ROLE reader IN DATABASE :"DBNAME" SET temp_file_limit = '512MB';
    ALTER ROLE reader IN DATABASE :"DBNAME" SET statement_timeout = '30s';
    ALTER ROLE reader IN DATABASE :"DBNAME" SET idle_in_transaction_session_timeout = '1min';
    ALTER ROLE reader IN DATABASE :"DBNAME" SET work_mem = '8MB';
    ALTER ROLE reader IN DATABASE :"DBNAME" SET default_transaction_read_only = on;
    COMMENT ON ROLE reader IS :'mark';
    \password reader
    -- Together with the ingester's less than max_connections: neither keeps the other or the
    -- owner out.
    ALTER ROLE reader LOGIN CONNECTION LIMIT 10;
\elif :marked
    ALTER ROLE reader NOLOGIN PASSWORD NULL;
    COMMENT ON ROLE reader IS NULL;
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader';
\endif
