#!/bin/sh
# files.sh OVERLAY TARGET: puts into TARGET what Grafana reads, for every user to read: TARGET is a
# volume that no other container has. The data source is written here, with the password in it,
# since Grafana would take a `$` in one that comes by an environment or by $__file{} for a variable.
#
# It runs on every start. Of earlier files it keeps the administrator's password alone.
set -eu
umask 022

overlay=$1
target=$2

# As a text of YAML, in single quotes; $$ is what Grafana takes for one dollar sign.
quoted() {
    printf "'%s'" "$(printf %s "$1" | sed -e "s/'/''/g" -e 's/\$/$$/g')"
}

cd "$target"
rm -rf provisioning dashboards ca.crt
# Of the two that stay empty Grafana would complain if they were not there.
mkdir -p provisioning/datasources provisioning/dashboards provisioning/alerting provisioning/plugins
cp -r "$overlay/dashboards" .
cp "$overlay/dashboards.yaml" provisioning/dashboards
chmod -R u=rwX,go=rX dashboards provisioning

sslmode=disable
password=${READER_PASSWORD:-}
if [ -n "${CA_FILE:-}" ]; then
    sslmode=verify-full
    password=$(cat "$READER_PASSWORD_FILE")
    cat "$CA_FILE" >ca.crt
fi
while IFS= read -r line; do
    case $line in
    *@DATABASE@) value=$(quoted "$POSTGRES_DB") ;;
    *@SSLMODE@) value=$sslmode ;;
    *@PASSWORD@) value=$(quoted "$password") ;;
    *) value= ;;
    esac
    printf '%s%s\n' "${line%@[A-Z]*@}" "$value"
done <"$overlay/datasource.yaml" >provisioning/datasources/datasource.yaml

if [ ! -s admin_password ]; then
    tr -dc 'A-Za-z0-9' </dev/urandom | head -c 24 >admin_password.new
    mv admin_password.new admin_password
fi
