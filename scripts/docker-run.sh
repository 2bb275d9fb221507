#!/usr/bin/env bash
# Runs a container without a network and gives it one by the CNI list, or takes both away again.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
docker-run.sh NAME NAMESPACE IMAGE [COMMAND...]    default command: sleep infinity
docker-run.sh --delete NAME NAMESPACE

Uses docker or podman (CONTAINER_TOOL names another one), the list CNI_CONFLIST (default
/etc/cni/net.d/10-azure.conflist), plug-ins from CNI_PATH (default /opt/cni/bin), and jq. Every plug-in of the list is
run. Port mappings: CNI_PORT_MAPPINGS='[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]'.
On failure everything is undone and the exit code is 1. DEBUG=1 prints the result.
TEXT
    exit 1
}

fail() {
    echo "$name : $*" >&2
    exit 1
}

delete=''
if [ "${1:-}" = --delete ]; then
    delete=yes
    shift
fi
[ $# -ge 2 ] || usage
name=$1 namespace=$2
shift 2
if [ -z "$delete" ]; then
    [ $# -ge 1 ] || usage
    image=$1
    shift
    [ $# -gt 0 ] || set -- sleep infinity
fi
for text in "$name" "$namespace"; do
    [[ $text =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || fail "\"$text\" is no name"
done
conflist=${CNI_CONFLIST:-/etc/cni/net.d/10-azure.conflist}
path=${CNI_PATH:-/opt/cni/bin}
mappings=${CNI_PORT_MAPPINGS:-[]}
command -v jq >/dev/null || fail "jq is missing"
jq -e '.plugins | length > 0' "$conflist" >/dev/null || fail "$conflist is no CNI list"
jq -e 'type == "array"' >/dev/null 2>&1 <<<"$mappings" || fail "CNI_PORT_MAPPINGS is no JSON array"
tool=${CONTAINER_TOOL:-}
if [ -z "$tool" ]; then
    tool=$(command -v docker || command -v podman) || fail "neither docker nor podman is here"
fi

plugin() { # COMMAND INDEX PREVIOUS-RESULT: prints what the plug-in prints
    local conf kind
    conf=$(jq -c --argjson i "$2" --argjson previous "$3" --argjson mappings "$mappings" '
        . as $list | .plugins[$i] + {name: $list.name, cniVersion: $list.cniVersion}
        | if .capabilities.portMappings then .runtimeConfig = {portMappings: $mappings} else . end
        | if $previous == null then . else .prevResult = $previous end' "$conflist")
    kind=$(jq -r .type <<<"$conf")
    local dirs dir
    IFS=: read -ra dirs <<<"$path"
    for dir in "${dirs[@]}"; do
        if [ -x "$dir/$kind" ]; then
            CNI_COMMAND=$1 CNI_CONTAINERID=$id CNI_NETNS=$netns CNI_IFNAME=eth0 CNI_PATH=$path \
                CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAMESPACE=$namespace;K8S_POD_NAME=$name" "$dir/$kind" <<<"$conf"
            return
        fi
    done
    echo "{\"code\":7,\"msg\":\"there is no plug-in $kind in $path\"}"
    return 1
}

count=$(jq '.plugins | length' "$conflist")

detach() { # all plug-ins, last first, whatever fails
    local i said status=0
    for ((i = count - 1; i >= 0; i--)); do
        if ! said=$(plugin DEL "$i" null); then
            echo "$name : error executing DEL: $(jq -r '.msg // "no message"' 2>/dev/null <<<"$said")" >&2
            status=1
        fi
    done
    return "$status"
}

if [ -n "$delete" ]; then
    id=$("$tool" inspect --format '{{.Id}}' "$name") || fail "there is no container $name"
    pid=$("$tool" inspect --format '{{.State.Pid}}' "$name")
    netns=''
    [ "$pid" = 0 ] || netns=/proc/$pid/ns/net
    detach || fail "the container is kept, so that this can be repeated"
    "$tool" rm --force "$name" >/dev/null || fail "$tool cannot remove it"
    exit 0
fi

id=$("$tool" run --detach --net=none --name "$name" "$image" "$@") || fail "$tool cannot run $image"
netns=''
undo() {
    detach || true
    "$tool" rm --force "$name" >/dev/null || true
}
trap undo EXIT
pid=$("$tool" inspect --format '{{.State.Pid}}' "$name") || fail "$tool does not know its process"
[[ $pid =~ ^[1-9][0-9]*$ ]] || fail "it has ended already"
netns=/proc/$pid/ns/net
result=null
for ((i = 0; i < count; i++)); do
    if ! said=$(plugin ADD "$i" "$result"); then
        fail "error executing ADD: $(jq -r '[.msg, .details] | map(select(. != null)) | join(": ")' 2>/dev/null <<<"$said" ||
            echo "$said")"
    fi
    result=$said
done
trap - EXIT
[ "${DEBUG:-0}" = 0 ] || jq . <<<"$result"
echo "$name : $(jq -r '.ips[0].address' <<<"$result")"
