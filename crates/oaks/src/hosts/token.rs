//! `oaks host token NAME`: lets one host join, for a while.

use anyhow::{Context as _, Result, ensure};
use http::Method;
use reconcile::{Client, Patch, ResourceId};
use resources::Host;
use serde_json::{Value, json};

use super::{GROUP, Invitation, NAMESPACE, USER, check_name};
use crate::{
    access::{chained, client_of},
    cli::Settings,
};

/// Prints the line to paste on the other machine. `ttl_s` in 600..=86400.
pub async fn run(settings: &Settings, name: &str, ttl_s: u64) -> Result<()> {
    check_name(name)?;
    ensure!(
        (600..=86_400).contains(&ttl_s),
        "--ttl: use 10 minutes to a day (10m to 24h)"
    );
    let paths = &settings.paths;
    let facts = |process: &str| -> Result<Value> {
        let text = std::fs::read(paths.run.join(format!("{process}.ready")))
            .with_context(|| format!("instance {} is not up here; run `oaks up` first", paths.instance))?;
        Ok(serde_json::from_slice(&text)?)
    };
    let (server, host) = (facts("server")?, facts("host")?);
    let again = "start it again as `oaks down && oaks up --underlay ADDRESS --api-listen ADDRESS:6443`, with an address of this machine that the other one reaches";
    ensure!(host["underlay"].is_string(), "this instance stands alone; {again}");
    let url = server["api"].as_str().unwrap_or_default();
    let loopback = ["//127.", "//localhost", "//[::1]", "//0.0.0.0"]
        .iter()
        .any(|l| url.contains(l));
    ensure!(
        !loopback,
        "home answers at {url}, which other machines do not reach; {again}"
    );

    let kubeconfig = std::fs::read_to_string(paths.home_kubeconfig())?;
    let home = client_of(&kubeconfig)?;
    rights(&home, name).await?;
    if home.get_opt::<Host>(None, name).await.map_err(chained)?.is_none() {
        home.create(None, &Host::new(name, Default::default()))
            .await
            .map_err(chained)?;
    }
    let account = account(name);
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": ttl_s, "audiences": []}});
    let answer: Value = home
        .create_subresource::<k8s_openapi::api::core::v1::ServiceAccount, _, _>(
            Some(NAMESPACE),
            &account,
            "token",
            &request,
        )
        .await
        .map_err(chained)
        .context("asking for the token")?;
    let view: Value = serde_saphyr::from_str(&kubeconfig)?;
    let ca = view["clusters"][0]["cluster"]["certificate-authority-data"]
        .as_str()
        .unwrap_or_default();
    use base64::Engine as _;
    let invitation = Invitation {
        name: name.to_owned(),
        server: url.to_owned(),
        ca_pem: String::from_utf8(base64::engine::general_purpose::STANDARD.decode(ca)?)?,
        token: answer["status"]["token"]
            .as_str()
            .context("the answer holds no token")?
            .to_owned(),
        public_pool: settings_pool(&host)?,
    };
    println!("oaks host join --underlay ADDRESS {}", invitation.print()?);
    eprintln!(
        "\nRun this as root on {name}, with the address that this machine reaches it at, before {}.",
        answer["status"]["expirationTimestamp"].as_str().unwrap_or("it expires")
    );
    Ok(())
}

fn settings_pool(host: &Value) -> Result<ipnet::Ipv4Net> {
    let pool = host["pool"].as_str().unwrap_or_default();
    pool.parse().with_context(|| format!("the host agent's pool {pool:?}"))
}

/// Name of the account that a host joins with.
pub fn account(host: &str) -> String {
    format!("host-join-{host}")
}

/// Makes the join account, and what the host may do afterwards: read the platform's objects, run machines, keep its own
/// object and lease, read machines' secrets by name.
async fn rights(home: &Client, host: &str) -> Result<()> {
    let account = account(host);
    let lease = machines::agent::hosts::lease_name(host);
    let rule = |groups: &[&str], resources: &[&str], verbs: &[&str], names: &[&str]| json!({"apiGroups": groups, "resources": resources, "verbs": verbs, "resourceNames": names});
    let own = "oaks.internal";
    let platform: Vec<&str> = resources::KINDS.iter().map(|k| k.plural).collect();
    let all = ["get", "list", "watch"];
    let objects = [
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": NAMESPACE}}),
        cluster_role(
            "oaks:host-join",
            &[rule(
                &["certificates.k8s.io"],
                &["certificatesigningrequests"],
                &["create", "get"],
                &[],
            )],
        ),
        cluster_role(
            "oaks:hosts",
            &[
                rule(&[own], &platform, &all, &[]),
                rule(&[own], &["machines", "machines/status"], &["patch"], &[]),
            ],
        ),
        cluster_role(
            &format!("{USER}{host}"),
            &[rule(&[own], &["hosts"], &["patch"], &[host])],
        ),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": format!("{USER}{host}"), "namespace": NAMESPACE},
        "rules": [
            rule(&["coordination.k8s.io"], &["leases"], &["get", "patch", "update"], &[&lease]),
            rule(&["coordination.k8s.io"], &["leases"], &["create"], &[]),
            rule(&[""], &["secrets"], &["get"], &[]),
        ]}),
        binding(
            "ClusterRoleBinding",
            &account,
            "ClusterRole",
            "oaks:host-join",
            &json!({"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}),
        ),
        binding(
            "ClusterRoleBinding",
            "oaks:hosts",
            "ClusterRole",
            "oaks:hosts",
            &subject("Group", GROUP),
        ),
        binding(
            "ClusterRoleBinding",
            &format!("{USER}{host}"),
            "ClusterRole",
            &format!("{USER}{host}"),
            &subject("User", &format!("{USER}{host}")),
        ),
        binding(
            "RoleBinding",
            &format!("{USER}{host}"),
            "Role",
            &format!("{USER}{host}"),
            &subject("User", &format!("{USER}{host}")),
        ),
    ];
    for object in objects {
        apply(home, &object).await?;
    }
    Ok(())
}

fn cluster_role(name: &str, rules: &[Value]) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules})
}

fn subject(kind: &str, name: &str) -> Value {
    json!({"kind": kind, "name": name, "apiGroup": "rbac.authorization.k8s.io"})
}

fn binding(kind: &str, name: &str, role_kind: &str, role: &str, subject: &Value) -> Value {
    let mut out = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role_kind, "name": role}, "subjects": [subject]});
    if kind == "RoleBinding" {
        out["metadata"]["namespace"] = json!(NAMESPACE);
    }
    out
}

/// Creates the object; one that is there is changed to it.
async fn apply(home: &Client, object: &Value) -> Result<()> {
    let (group, version) = match object["apiVersion"].as_str().unwrap_or_default().split_once('/') {
        Some((group, version)) => (group, version),
        None => ("", "v1"),
    };
    let kind = object["kind"].as_str().unwrap_or_default();
    let plural = format!("{}s", kind.to_lowercase());
    let resource = ResourceId {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: kind.to_owned(),
        namespaced: object["metadata"]["namespace"].is_string(),
        plural,
    };
    let namespace = object["metadata"]["namespace"].as_str();
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let collection = resource.path(namespace, None, None);
    let what = || format!("making {kind} {name} at home");
    match home.request::<Value, _>(Method::POST, &collection, Some(object)).await {
        Err(e) if e.is_already_exists() => {
            let path = resource.path(namespace, Some(name), None);
            let patch = Patch::Merge(object.clone());
            home.patch_path::<Value>(&path, &patch)
                .await
                .map_err(chained)
                .with_context(what)?;
        }
        other => {
            other.map_err(chained).with_context(what)?;
        }
    }
    Ok(())
}
