# What `setup` and `device` have in common; both read it in. Expects $here, this folder.
# Nothing is changed here.
# shellcheck shell=sh disable=SC2034,SC2154

LC_ALL=C # else A-Z may take in more than these
export LC_ALL
secrets=$here/secrets
shown=overlays/secure/secrets
checkout=$(CDPATH='' cd -- "$here/../.." && pwd -P)
IMAGE=eclipse-mosquitto:2

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

no_docker() {
    die 'Docker could not change the files in secrets/; is it running, and may you use it?'
}

# in_container FOLDER COMMAND...: as root, which may give files to other users, or read
# theirs, where the caller may not. The image is one that the stack needs anyway.
in_container() {
    folder=$1
    shift
    mkdir -p "$checkout/mosquitto/data"
    docker run --rm --interactive --network none --user 0 --entrypoint '' --workdir /mounted \
        --mount "type=bind,source=$folder,target=/mounted" \
        --mount "type=bind,source=$here/users.sh,target=/users.sh,readonly" \
        --mount "type=bind,source=$checkout/mosquitto/data,target=/data" \
        "$IMAGE" "$@"
}

# users FOLDER COMMAND...: see users.sh. FOLDER is the broker's, of secrets.
users() {
    folder=$1
    shift
    in_container "$folder" sh /users.sh "$@"
}

compose() {
    docker compose --project-directory "$checkout" -f "$checkout/docker-compose.yml" \
        -f "$here/docker-compose.yml" "$@"
}

# is_up SERVICE: also if it is paused or starts anew just now. Ends all if Docker cannot say.
is_up() {
    found=$(compose ps --status running --status paused --status restarting --quiet "$1") ||
        die "Docker cannot say whether $1 is running; nothing changed"
    [ -n "$found" ]
}
