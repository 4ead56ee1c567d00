# For the scripts that read it in with `.`: runs psql where `\password` takes the password that
# is given. So what goes over the line, and into a log of the database, is the hash.
#
# It says nothing, unless psql fails; then it shows psql's prompts too.

# psql_with_password PASSWORD ARGUMENT...
psql_with_password() {
    password=$1
    shift
    # Without a terminal \password reads from standard input, twice.
    said=$(printf '%s\n%s\n' "$password" "$password" |
        setsid --wait psql --no-psqlrc --quiet --no-password --set ON_ERROR_STOP=1 "$@" 2>&1) || {
        echo "$said" >&2
        exit 1
    }
}
