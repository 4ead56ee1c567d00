#!/bin/sh
# Starts the broker in its container, or lets it read its users and their rights again.
#
#   broker.sh start     as root, which the broker then ceases to be
#   broker.sh reload    as the broker's own user
set -eu

# What the broker reads. Its listeners stand at the end.
used=/run/mosquitto.conf
# And its users' rights, in a folder of its own. Beside them is a copy of what was mounted, which
# under umask 077 root alone can read.
rights=/run/mosquitto

# The broker itself takes a key that everybody may read.
check() {
    named="overlays/secure/secrets/broker/$1"
    case $(ls -l "/run/broker/$1" 2>/dev/null) in
    ?r??------*) return ;;
    '') echo "cannot start: $named: missing; overlays/secure/setup says how to mend it" >&2 ;;
    *) echo "cannot start: $named: others may read it; sudo chmod 400 it" >&2 ;;
    esac
    exit 1
}

# Made anew each time, and in one step, so that the broker never reads half.
write_acl() {
    (cd /run/broker && sh "$rights/users.sh" acl) >"$rights/acl.new"
    chmod 400 "$rights/acl.new"
    mv -f "$rights/acl.new" "$rights/acl"
}

# At an upgrade git has to see its own file in folders that are the broker's by now, which the
# owner of a checkout made under umask 077 could not. Root may do it to its own files alone here.
show_to_git() {
    for file in /mosquitto/*/.gitignore; do
        [ -w "$file" ] || continue
        for path in "${file%/*}" "$file"; do
            owner=$(stat -c %u:%g "$path")
            chown 0:0 "$path"
            chmod go+rX "$path"
            chown "$owner" "$path"
        done
    done
}

case $1 in
start)
    show_to_git
    check server.key
    check passwords
    mkdir -p "$rights"
    cp /mosquitto/broker.sh /mosquitto/users.sh /mosquitto/config/mosquitto.conf "$rights"
    write_acl
    cp "$rights/mosquitto.conf" "$used"
    chown -R 1883:1883 "$used" "$rights"
    # As in the base file.
    ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
    exec mosquitto -c "$used" ;;
reload)
    # One after the other, or the one that began first might end last.
    exec 9>"$rights/lock"
    flock 9
    write_acl
    # Without the listeners: where it reads them again, 2.0 forgets their max_connections. It
    # keeps those that it has.
    sed '/^listener /,$d' "$rights/mosquitto.conf" >"$used"
    # From within: after `docker kill -s HUP` the engine takes the container for stopped by
    # hand, and does not start it again after the machine's next boot.
    kill -HUP 1 ;;
esac
