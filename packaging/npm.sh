#!/usr/bin/env bash
# npm.sh NAME FOLDER: unpacks an npm package of npm.lock into FOLDER, if its sha512 is the one there.
# Nothing of the package is run, and nothing that it depends on is fetched.
set -euo pipefail
name=$1 folder=$2
read -r _ version integrity < <(grep -F "$name " "$(dirname "$0")/npm.lock")
[[ -f $folder/.integrity && $(<"$folder/.integrity") == "$integrity" ]] && exit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
file=$work/$(npm pack --silent --ignore-scripts --pack-destination "$work" "$name@$version")
found=sha512-$(openssl dgst -sha512 -binary "$file" | openssl base64 -A)
[[ $found == "$integrity" ]] || { echo "$name $version is $found, expected $integrity." >&2; exit 1; }
rm -rf "$folder" && mkdir -p "$folder"
tar -xzf "$file" -C "$folder" --strip-components 1 --no-same-owner
echo "$integrity" >"$folder/.integrity"
