#!/usr/bin/env bash
# Installs the plug-ins azure-vnet and azure-vnet-ipam from an archive made by `cargo xtask dist cni`.
set -euo pipefail

usage() {
    cat <<'TEXT'
install-cni-plugin.sh [version] [--from FILE|FOLDER|URL] [--sha256 HEX] [--bin-dir DIR] [--conf-dir DIR]

  version    for example v0.1.0; may be left out if --from is a file, or a folder with one archive
  --from     the archive, or the folder or base URL that holds azure-vnet-cni-linux-amd64-<version>.tgz and its
             .sha256 file (default: $AZURE_VNET_CNI_FROM, else the folder of this script)
  --sha256   expected checksum of the archive, instead of the .sha256 file
  --bin-dir  default /opt/cni/bin
  --conf-dir default /etc/cni/net.d; a configuration that is there already is kept
TEXT
}

fail() {
    echo "install-cni-plugin.sh: $*" >&2
    exit 1
}

version='' from="${AZURE_VNET_CNI_FROM:-}" sha256='' bin_dir=/opt/cni/bin conf_dir=/etc/cni/net.d
while [ $# -gt 0 ]; do
    case "$1" in
    --from | --sha256 | --bin-dir | --conf-dir)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case "$1" in
        --from) from=$2 ;;
        --sha256) sha256=$2 ;;
        --bin-dir) bin_dir=$2 ;;
        --conf-dir) conf_dir=$2 ;;
        esac
        shift 2
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*) usage >&2 && fail "unknown option $1" ;;
    *)
        [ -z "$version" ] || fail "more than one version: $version, $1"
        [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "\"$1\" is no version"
        version=$1
        shift
        ;;
    esac
done
[ -n "$from" ] || from=$(cd "$(dirname "$0")" && pwd)
for program in tar sha256sum uname install; do
    command -v "$program" >/dev/null || fail "$program is missing"
done
[ "$(uname -s)" = Linux ] || fail "only Linux is supported"
case "$(uname -m)" in x86_64 | amd64) ;; *) fail "only amd64 is supported, this is $(uname -m)" ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

download() { # URL FILE
    command -v curl >/dev/null || fail "curl is missing"
    curl --fail --silent --show-error --location --retry 3 --output "$2" "$1" || fail "cannot download $1"
}

name="azure-vnet-cni-linux-amd64-$version.tgz"
archive="$work/archive.tgz"
case "$from" in
http://* | https://*)
    case "$from" in
    *.tgz) url=$from ;;
    *)
        [ -n "$version" ] || fail "which version? (a base URL does not tell)"
        url="${from%/}/$name"
        ;;
    esac
    download "$url" "$archive"
    [ -n "$sha256" ] || { download "$url.sha256" "$work/sum" && sha256=$(cut -d' ' -f1 "$work/sum"); }
    shown=$url
    ;;
*)
    if [ -d "$from" ]; then
        if [ -n "$version" ]; then
            from="$from/$name"
        else
            shopt -s nullglob
            found=("$from"/azure-vnet-cni-linux-amd64-*.tgz)
            [ ${#found[@]} -eq 1 ] || fail "$from holds ${#found[@]} archives; name the version"
            from=${found[0]}
        fi
    fi
    [ -f "$from" ] || fail "there is no file $from"
    cp "$from" "$archive" || fail "cannot read $from"
    [ -n "$sha256" ] || { [ -f "$from.sha256" ] && sha256=$(cut -d' ' -f1 "$from.sha256"); } ||
        fail "there is no $from.sha256; give the checksum with --sha256"
    shown=$from
    ;;
esac
[[ $sha256 =~ ^[0-9a-fA-F]{64}$ ]] || fail "\"$sha256\" is no SHA-256 checksum"
echo "${sha256,,}  $archive" | sha256sum --check --status || fail "$shown does not have the checksum $sha256"

mkdir "$work/unpacked"
tar -xzf "$archive" -C "$work/unpacked" --no-same-owner || fail "$shown cannot be unpacked"
cd "$work/unpacked"
for file in azure-vnet azure-vnet-ipam 10-azure.conflist SHA256SUMS; do
    [ -f "$file" ] || fail "$shown holds no $file"
done
sha256sum --check --strict --quiet SHA256SUMS || fail "the files in $shown do not have the checksums that it tells"
CNI_COMMAND=VERSION ./azure-vnet >/dev/null || fail "azure-vnet does not run on this machine"

mkdir -p "$bin_dir" "$conf_dir" || fail "cannot make $bin_dir and $conf_dir"
for file in azure-vnet azure-vnet-ipam; do
    # A running plug-in must not be written into: the new file takes the name.
    { install -m 755 "$file" "$bin_dir/.$file.new" && mv -f "$bin_dir/.$file.new" "$bin_dir/$file"; } ||
        fail "cannot install $bin_dir/$file"
done
if [ -e "$conf_dir/10-azure.conflist" ]; then
    cmp -s 10-azure.conflist "$conf_dir/10-azure.conflist" || echo "$conf_dir/10-azure.conflist was there and is kept"
else
    # Runtimes take the file as soon as it is there, so it comes last and at once.
    { install -m 644 10-azure.conflist "$conf_dir/.10-azure.conflist.new" &&
        mv -f "$conf_dir/.10-azure.conflist.new" "$conf_dir/10-azure.conflist"; } ||
        fail "cannot install $conf_dir/10-azure.conflist"
fi
[ -x "$bin_dir/portmap" ] ||
    echo "note: $bin_dir/portmap is missing; the list chains it (Debian: package containernetworking-plugins)" >&2
echo "installed azure-vnet and azure-vnet-ipam to $bin_dir"
