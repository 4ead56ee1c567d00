#!/bin/sh
# The broker's users, and what each may do. Works in the broker's folder of secrets, where the
# list of users is the password file. Runs as root in a container of the broker's image; `acl`
# in the broker's own, which asks for it whenever it reads its users.
#
#   users.sh add USER      the password is on standard input, as it must not be an argument
#   users.sh remove USER   notes in /data, the broker's, that its session is to be ended
#   users.sh noted USER    whether that is noted and not done
#   users.sh list          the devices
#   users.sh acl           the access rights, as the broker reads them
#   users.sh hash          what mosquitto_passwd is to be told of how to hash
set -eu
umask 077

own_users='homelab-ingester|operator'

# Another run waits, or one would undo what the other does.
lock() {
    exec 9>lock
    flock 9
    trap 'rm -f added.new passwords.new' EXIT
}

# put_in_place FILE: FILE.new becomes FILE, in one step, so that the broker never reads half.
put_in_place() {
    chown 1883:1883 "$1.new"
    chmod 400 "$1.new"
    mv -f "$1.new" "$1"
}

# Argon2id, which 2.1 would take, needs 46 MB and 0.1 s of the whole broker at each login. It
# protects passwords that can be guessed; these are random.
hash_option() {
    if mosquitto_passwd --help 2>&1 | grep -q 'H sha512-pbkdf2'; then echo '-H sha512-pbkdf2'; fi
}

is_user() {
    [ -e passwords ] && cut -d : -f 1 passwords | grep -Fqx -e "$1"
}

devices() {
    cut -d : -f 1 passwords | grep -Evx -e "$own_users" || true
}

# any_device TEMPLATE: the filter that the ACKs of all devices match: a wildcard for the whole
# level with the device's id in it, since MQTT has none for a part of a level.
any_device() {
    before=${1%%'{device_id}'*}
    after=${1#*'{device_id}'}
    printf '%s+%s' "${before%"${before##*/}"}" "${after#"${after%%/*}"}"
}

acl() {
    # As the ingester has them: its variables come into the broker's container, too, so that
    # `up` starts both anew when one is changed. For it, empty counts as absent.
    events=${MQTT_EVENTS_TOPIC:-'qs/v1/+/events'}
    acks=${ACK_TEMPLATE:-'qs/v1/{device_id}/acks'}
    # What is not here is refused. The ingester's tools read what it writes.
    cat <<EOF
user homelab-ingester
topic read $events
topic readwrite $(any_device "$acks")
topic readwrite ${MQTT_DEADLETTER_TOPIC:-qs/v1/deadletter}
topic readwrite ${MQTT_STATUS_TOPIC:-qs/v1/ingester/status}
topic read \$SYS/broker/publish/messages/dropped

user operator
topic read #
topic read \$SYS/#
EOF
    # A user name holds `=` where the device's id holds `:`, which ends a user name here.
    devices | while IFS= read -r user; do
        # The bridge, if it was let in, speaks for all devices (overlays/bridge/secure.yml).
        if [ "$user" = homelab-bridge ]; then
            printf '\nuser %s\ntopic write %s\ntopic read %s\n' "$user" "$events" \
                "$(any_device "$acks")"
            continue
        fi
        id=$(printf %s "$user" | tr '=' ':')
        printf '\nuser %s\ntopic write %s\ntopic read %s\n' "$user" \
            "${events%%+*}$id${events#*+}" \
            "${acks%%'{device_id}'*}$id${acks#*'{device_id}'}"
    done
}

case $1 in
add)
    lock
    if is_user "$2"; then exit 3; fi
    IFS= read -r password
    printf '%s:%s\n' "$2" "$password" >added.new
    mosquitto_passwd $(hash_option) -U added.new
    if [ -e passwords ]; then cat passwords; fi | cat - added.new >passwords.new
    put_in_place passwords ;;
remove)
    lock
    if ! is_user "$2"; then exit 4; fi
    # As text: compared as numbers, 7, 007 and 7.0 would be one user.
    awk -v prefix="$2:" 'index($0, prefix) != 1' passwords >passwords.new
    # First, so that the broker ends the session at its next start, whatever fails from here on.
    printf '%s\n' "$2" >>/data/removed
    chown 1883:1883 /data/removed
    put_in_place passwords ;;
noted)
    grep -Fqx -e "$2" /data/removed ;;
list)
    devices | tr '=' ':' ;;
acl)
    acl ;;
hash)
    hash_option ;;
esac
