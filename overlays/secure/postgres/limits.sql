-- What the role `ingester` may take of the server, and what PostgreSQL gives to everybody and
-- neither it nor `reader` needs. As a superuser, in the stack's database. What `reader` may take
-- is the same in the default stack, and stands in postgres/reader.sql.
--
-- Idempotent: it runs on every start, and so undoes what a role has set for itself, which
-- cannot be refused. What is a default alone a role can change for its own sessions. What it
-- cannot: temp_file_limit, the number of its connections, and the memory of a process, which
-- docker-compose.yml limits.

-- Together with the reader's less than max_connections: neither keeps the other or the owner out.
ALTER ROLE ingester LOGIN CONNECTION LIMIT 5;

-- For this database, which wins over what is set for a role in general.
ALTER ROLE ingester RESET ALL;
ALTER ROLE ingester IN DATABASE :"database" RESET ALL;
ALTER ROLE ingester IN DATABASE :"database" SET temp_file_limit = '512MB';

-- Temporary tables and large objects would fill the disk, and a full one stops the ingester.
REVOKE TEMPORARY ON DATABASE :"database" FROM PUBLIC;
-- Advisory locks: the schema step takes one. Messages in the write-ahead log, and to listeners
-- that never read: the disk again (NOTIFY itself cannot be revoked).
DO $$
DECLARE
    found REGPROCEDURE;
BEGIN
    FOR found IN
        SELECT oid
        FROM pg_proc
        WHERE pronamespace = 'pg_catalog'::regnamespace
            AND (
                proname ~ '^(lo_|pg_(try_)?advisory_)'
                OR proname IN ('loread', 'lowrite', 'pg_logical_emit_message', 'pg_notify')
            )
            AND has_function_privilege('reader', oid, 'EXECUTE')
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', found);
    END LOOP;
END
$$;
