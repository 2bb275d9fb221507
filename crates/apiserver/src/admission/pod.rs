//! What a new pod gets: its service account with a projected token, priority, and the usual tolerations.

use apimachinery::meta;
use apimachinery::status::Status;
use serde_json::{Map, Value, json};

use crate::handlers::Context;

/// Where containers find their token.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Seconds a projected token lives; upstream's odd value tells it apart from users' own.
const TOKEN_SECONDS: i64 = 3607;
/// Seconds a pod stays on a node that is not ready or unreachable.
const TOLERATION_SECONDS: i64 = 300;
const MIRROR: &str = "kubernetes.io/config.mirror";

pub fn create(cx: &Context, pod: &mut Value) -> Result<(), Status> {
    let mirror = meta::annotation(pod, MIRROR).is_some();
    if !mirror {
        service_account(cx, pod)?;
    }
    priority(cx, pod)?;
    tolerations(pod);
    Ok(())
}

fn spec(pod: &mut Value) -> Option<&mut Map<String, Value>> {
    pod.as_object_mut()?
        .entry("spec")
        .or_insert_with(|| json!({}))
        .as_object_mut()
}

fn service_account(cx: &Context, pod: &mut Value) -> Result<(), Status> {
    let namespace = cx.target.namespace.clone();
    let pod_name = meta::name(pod).to_owned();
    let Some(spec) = spec(pod) else { return Ok(()) };
    let name = match spec.get("serviceAccountName").and_then(Value::as_str) {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => "default".to_owned(),
    };
    spec.insert("serviceAccountName".into(), name.clone().into());
    spec.insert("serviceAccount".into(), name.clone().into());
    let Some(account) = cx.cluster.service_accounts.get(&namespace, &name) else {
        let why = format!("error looking up service account {namespace}/{name}: serviceaccount {name:?} not found");
        return Err(Status::forbidden("pods", &pod_name, &why));
    };
    let account = account.value();
    if spec
        .get("imagePullSecrets")
        .and_then(Value::as_array)
        .is_none_or(Vec::is_empty)
        && let Some(secrets) = account
            .get("imagePullSecrets")
            .filter(|s| s.as_array().is_some_and(|a| !a.is_empty()))
    {
        spec.insert("imagePullSecrets".into(), secrets.clone());
    }
    let wanted = spec.get("automountServiceAccountToken").and_then(Value::as_bool);
    if !wanted
        .or_else(|| account["automountServiceAccountToken"].as_bool())
        .unwrap_or(true)
    {
        return Ok(());
    }
    mount_token(cx, spec);
    Ok(())
}

fn mount_token(cx: &Context, spec: &mut Map<String, Value>) {
    let volumes = spec
        .get("volumes")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let present = volumes
        .iter()
        .filter_map(|v| v["name"].as_str())
        .find(|name| name.starts_with("kube-api-access-"))
        .map(str::to_owned);
    let volume = present
        .clone()
        .unwrap_or_else(|| format!("kube-api-access-{}", cx.cluster.random_suffix(5)));
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        let Some(containers) = spec.get_mut(list).and_then(Value::as_array_mut) else {
            continue;
        };
        for container in containers.iter_mut().filter_map(Value::as_object_mut) {
            let mounts = container.entry("volumeMounts").or_insert_with(|| json!([]));
            let Some(mounts) = mounts.as_array_mut() else { continue };
            if mounts.iter().all(|m| m["mountPath"] != TOKEN_PATH) {
                mounts.push(json!({"name": volume, "readOnly": true, "mountPath": TOKEN_PATH}));
                mounted = true;
            }
        }
    }
    if present.is_some() || !mounted {
        return;
    }
    let mut volumes = volumes;
    volumes.push(json!({"name": volume, "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]}}));
    spec.insert("volumes".into(), volumes.into());
}

fn priority(cx: &Context, pod: &mut Value) -> Result<(), Status> {
    let (namespace, name) = (cx.target.namespace.clone(), meta::name(pod).to_owned());
    let Some(spec) = spec(pod) else { return Ok(()) };
    let class = spec
        .get("priorityClassName")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let Some((class, value, policy)) = super::class::priority(&cx.cluster, &class) else {
        let why = format!("no PriorityClass with name {class} was found in namespace {namespace}");
        return Err(Status::forbidden("pods", &name, &why));
    };
    if !class.is_empty() {
        spec.insert("priorityClassName".into(), class.into());
    }
    match spec.get("priority").and_then(Value::as_i64) {
        Some(given) if given != value => {
            let why = format!(
                "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name"
            );
            return Err(Status::forbidden("pods", &name, &why));
        }
        _ => {}
    }
    spec.insert("priority".into(), value.into());
    let policy = policy.unwrap_or_else(|| "PreemptLowerPriority".into());
    match spec.get("preemptionPolicy").and_then(Value::as_str) {
        Some(given) if given != policy => {
            let why = format!(
                "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
            );
            return Err(Status::forbidden("pods", &name, &why));
        }
        _ => {}
    }
    spec.insert("preemptionPolicy".into(), policy.into());
    Ok(())
}

fn tolerations(pod: &mut Value) {
    let Some(spec) = spec(pod) else { return };
    let Some(list) = spec.entry("tolerations").or_insert_with(|| json!([])).as_array_mut() else {
        return;
    };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = list.iter().any(|t| {
            let this_key = t["key"] == key || t["key"].as_str().unwrap_or_default().is_empty();
            let effect = t["effect"].as_str().unwrap_or_default();
            this_key && matches!(effect, "" | "NoExecute")
        });
        if !tolerated {
            list.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": TOLERATION_SECONDS}));
        }
    }
}
