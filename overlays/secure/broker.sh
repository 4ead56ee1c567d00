#!/bin/sh
# Starts the broker in its container, or lets it read its users and their rights again.
#
#   broker.sh start           as root, which the broker then ceases to be
#   broker.sh reload [USER]   as the broker's own user; also ends the session under this name.
#                             Exits with 5 if the broker takes nobody in, with 6 if this version
#                             cannot reload safely; both need a restart.
#
# A session outlives its client's password, with all that was subscribed and queued. A client
# that connects under its name with a clean session ends it.
set -eu
umask 077

# What is made here, for this container alone; it is gone with it. In it are copies of what is
# mounted, which under umask 077 root alone can read.
made=/run/mosquitto
given=$made/given/mosquitto.conf
# What the broker reads. Its listeners stand at the end.
used=$made/mosquitto.conf
# Users whose session is still to be ended: whoever is removed is on it until that is done.
removed=/mosquitto/data/removed

# The broker itself takes a key that everybody may read.
check() {
    named="overlays/secure/secrets/broker/$1"
    case $(ls -l "/run/broker/$1" 2>/dev/null) in
    ?r??------*) return ;;
    '') echo "cannot start: $named: missing; overlays/secure/setup says how to fix it" >&2 ;;
    *) echo "cannot start: $named: others may read it; sudo chmod 400 it" >&2 ;;
    esac
    exit 1
}

# For mosquitto_pub and the others in this container, which Docker's users alone can run: its
# name can be no device's, nobody knows its password, and it lasts as long as the container.
make_own_user() {
    mkdir -p "$made/clients"
    own_password=$(head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
    printf '@container:%s\n' "$own_password" >"$made/own_user"
    # shellcheck disable=SC2046
    mosquitto_passwd $(sh "$made/given/users.sh" hash) -U "$made/own_user"
    for program in mosquitto_pub mosquitto_rr; do
        printf -- '-u @container\n-P %s\n' "$own_password" >"$made/clients/$program"
    done
    cp /run/operator/mosquitto_sub "$made/clients/mosquitto_sub"
}

# put_in_place FILE: FILE.new becomes FILE, in one step, so that the broker never reads half.
put_in_place() {
    chmod 400 "$1.new"
    mv -f "$1.new" "$1"
}

# Who may connect, and what each may do.
write_users() {
    cat /run/broker/passwords "$made/own_user" >"$made/passwords.new"
    put_in_place "$made/passwords"
    {
        (cd /run/broker && sh "$made/given/users.sh" acl)
        printf '\nuser @container\ntopic readwrite #\n'
    } >"$made/acl.new"
    put_in_place "$made/acl"
}

# end_session USER: as the operator, who may be anybody on this listener.
end_session() {
    XDG_CONFIG_HOME=$made/clients mosquitto_sub -i "$1" -E -t none -W 10 >/dev/null
}

# forget USER...: they are on the list no more.
forget() {
    for user; do
        awk -v user="$user" '($0 "") != (user "")' "$removed" >"$removed.new"
        mv -f "$removed.new" "$removed"
    done
}

# By a broker that nobody else reaches, and without its limit of memory: where a device has
# filled that with its session, 2.1 takes in nobody who could end it.
end_sessions_of_removed() {
    sed -e '/^listener /,$d' -e '/^memory_limit /d' "$given" >"$used"
    echo 'listener 1883 127.0.0.1' >>"$used"
    chown -R 1883:1883 "$made"
    mosquitto -c "$used" &
    broker=$!
    sort -u "$removed" >"$made/removed"
    tries=0
    while IFS= read -r user; do
        # A large file takes long to read.
        until end_session "$user" 2>/dev/null || [ "$tries" -ge 120 ]; do
            tries=$((tries + 1))
            sleep 1
        done
    done <"$made/removed"
    # Root may not, as it has no such capability here. The broker writes what it holds.
    su -s /bin/sh mosquitto -c "kill -TERM $broker"
    wait "$broker" || return
    if [ "$tries" -lt 120 ]; then rm "$removed"; fi
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
    mkdir -p "$made/given"
    cp /mosquitto/broker.sh /mosquitto/users.sh /mosquitto/config/mosquitto.conf "$made/given"
    make_own_user
    write_users
    if [ -s "$removed" ]; then
        end_sessions_of_removed || echo 'sessions of removed devices are still there' >&2
    fi
    cp "$given" "$used"
    chown -R 1883:1883 "$made"
    # Each connection is an open file. Two listeners of 1,000 for strangers must leave some for
    # the ingester's; many engines allow 1,024 in all.
    ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
    exec mosquitto -c "$used" ;;
reload)
    # At SIGHUP, 2.0 lists an offline session for expiry a second time, if its device was removed or
    # if the broker has read it from its file. When the session is freed, that entry stays, and
    # each second the broker disconnects whichever client has the memory by then. Fixed in 2.1.0.
    case $(mosquitto -h 2>/dev/null | head -n 1) in *' 2.0.'*) exit 6 ;; esac
    # One after the other, or the one that began first might end last.
    exec 9>"$made/lock"
    flock 9
    write_users
    # Without the listeners: where it reads them again, 2.0 forgets their max_connections. It
    # keeps those that it has.
    sed '/^listener /,$d' "$given" >"$used"
    # From within: after `docker kill -s HUP` the engine takes the container for stopped by
    # hand, and does not start it again after the machine's next boot.
    kill -HUP 1
    # It looks at signals between taking a connection and answering it: from here on nobody
    # gets in with a password that it has forgotten.
    if [ $# -gt 1 ]; then
        end_session "$2" || exit 5
        if [ -e "$removed" ]; then forget "$2"; fi
    fi ;;
esac
