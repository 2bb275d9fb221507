# Runs inside namespaces of its own: starts Oaks, creates a cluster with two nodes through ARM, runs "$@" with KUBECONFIG set,
# and takes everything down. Variables: OAKS (the binary), DIR (scratch), OAKS_INSTANCE.
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/lock
ip link set lo up
export HOME="$DIR" OAKS_DATA_DIR="$DIR/data" OAKS_UPLINK=none RUST_BACKTRACE=0
down() {
    "$OAKS" down --purge >"$DIR/down.log" 2>&1 || cat "$DIR/down.log" >&2
}
trap down EXIT
"$OAKS" up >"$DIR/up.log" 2>&1 || { cat "$DIR/up.log" >&2; exit 1; }

access=$DIR/data/arm.json
field() { jq -er ".$1" "$access"; }
base=$(field baseUrl)
field caPem >"$DIR/arm-ca.pem"
token=$(curl -fsS --cacert "$DIR/arm-ca.pem" "$base/adfs/oauth2/token" -d grant_type=client_credentials \
    -d "client_id=$(field clientId)" -d "client_secret=$(field clientSecret)" --data-urlencode "scope=$base/arm/.default" |
    jq -er .access_token)
group=/subscriptions/$(field subscription)/resourceGroups/conformance
arm() { # METHOD ID API-VERSION [BODY]
    curl -fsS --cacert "$DIR/arm-ca.pem" -H "Authorization: Bearer $token" -H 'Content-Type: application/json' \
        -X "$1" "$base$2?api-version=$3" ${4:+-d "$4"}
}
cluster=$group/providers/Microsoft.ContainerService/managedClusters/conformance
arm PUT "$group" 2024-11-01 '{"location":"local"}' >/dev/null
arm PUT "$cluster" 2025-10-01 '{"location":"local","identity":{"type":"SystemAssigned"},"properties":{"dnsPrefix":"conformance",
    "kubernetesVersion":"","agentPoolProfiles":[{"name":"nodepool1","count":2,"mode":"System","vmSize":"Standard_D4s_v3",
    "osType":"Linux","type":"VirtualMachineScaleSets"}],
    "networkProfile":{"networkPlugin":"azure","serviceCidr":"10.0.0.0/16","dnsServiceIP":"10.0.0.10"}}}' >/dev/null
tries=0
while state=$(arm GET "$cluster" 2025-10-01 | jq -r .properties.provisioningState); [ "$state" != Succeeded ]; do
    tries=$((tries + 1))
    if [ "$state" = Failed ] || [ "$tries" -gt 600 ]; then
        echo "the cluster's provisioning state is $state" >&2
        exit 1
    fi
    sleep 0.2
done
"$OAKS" kubeconfig show conformance >"$DIR/kubeconfig"
export KUBECONFIG="$DIR/kubeconfig"
"$@"
