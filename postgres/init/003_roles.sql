-- Two roles with fewer rights than the owner: `ingester`, which may do what the daemon does
-- and no more, and `reader`, for dashboards. Neither can log in until it is given LOGIN and a
-- password: `reader` by READER_PASSWORD (reader.sql), both by overlays/secure.
--
-- Idempotent: it runs on every `docker compose up`.

DO $$
DECLARE
    role TEXT;
BEGIN
    FOREACH role IN ARRAY ARRAY['ingester', 'reader'] LOOP
        BEGIN
            IF to_regrole(role) IS NULL THEN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role);
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            -- Roles belong to the whole server: the schema step of another database on it
            -- has just made this one.
            NULL;
        END;
    END LOOP;
END
$$;

-- PUBLIC has it in databases that were made before PostgreSQL 15.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO ingester, reader;

GRANT SELECT ON events, dead_letters TO reader;
-- And what is added later, by whoever runs these files.
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO reader;

-- It reads events to tell a duplicate from a conflict, and deletes them when they are older
-- than RETENTION_DAYS. Of a dead letter, here, no more than the id of the one that it has just
-- written; the rest stands in 004.
GRANT SELECT, INSERT, DELETE ON events TO ingester;
GRANT SELECT (id), INSERT ON dead_letters TO ingester;
