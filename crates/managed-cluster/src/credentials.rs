//! Kubeconfigs of managed clusters, with the names that AKS gives their parts.

use base64::{Engine, engine::general_purpose::STANDARD as B64};
use reconcile::{Client, Error};
use resources::{ArmId, ManagedCluster, aks::ClusterView, object_name};
use serde_json::json;
use thiserror::Error;

use crate::{ControlPlaneError, ControlPlaneSpec, ControlPlanes, names::Ids, reconcile_cluster::address_of, status};

#[derive(Debug, Error)]
pub enum CredentialError {
    #[error("there is no managed cluster {id}")]
    NotFound { id: String },
    #[error("the control plane of {id} is not running yet; wait until the cluster's state is Succeeded")]
    NotReady { id: String },
    #[error("home did not answer for {id}")]
    Home {
        id: String,
        #[source]
        source: Error,
    },
    #[error(transparent)]
    ControlPlane(#[from] ControlPlaneError),
}

/// The kubeconfig (YAML) of the cluster with this ARM id. Local accounts are administrators: without an identity provider AKS
/// does the same. The context is `<name>`, its user `clusterUser_<group>_<name>` or, for `admin`, `clusterAdmin_<group>_<name>`.
pub async fn kubeconfig(
    home: &Client,
    control_planes: &dyn ControlPlanes,
    id: &str,
    admin: bool,
) -> Result<String, CredentialError> {
    let name = object_name(id);
    let home_failed = |source| CredentialError::Home {
        id: id.to_owned(),
        source,
    };
    let cluster: Option<ManagedCluster> = home.get_opt(None, &name).await.map_err(home_failed)?;
    let cluster = cluster.ok_or_else(|| CredentialError::NotFound { id: id.to_owned() })?;
    let not_ready = || CredentialError::NotReady { id: id.to_owned() };
    if control_planes.client(&name).is_none() {
        return Err(not_ready());
    }
    let parsed = ArmId::parse(&cluster.spec.id).map_err(|_| not_ready())?;
    let view = ClusterView::parse(&parsed, &cluster.spec.body).map_err(|_| not_ready())?;
    let ids = Ids::new(&parsed, &view.node_resource_group);
    let address: Option<resources::PublicIPAddress> = home
        .get_opt(None, &object_name(&ids.api_address()))
        .await
        .map_err(home_failed)?;
    let address = address
        .and_then(|a| address_of(a.status.as_ref()).ok().flatten())
        .ok_or_else(not_ready)?;
    let endpoint = control_planes.ensure(&spec(&parsed, &view, &ids, address)).await?;
    let cert = control_planes
        .client_cert(&name, "masterclient", &["system:masters"])
        .await?;
    let group = parsed.resource_group.as_deref().unwrap_or_default();
    Ok(render(
        group,
        parsed.name(),
        admin,
        &endpoint.url,
        &endpoint.ca_pem,
        &cert.cert_pem,
        &cert.key_pem,
    ))
}

/// The control plane that a cluster shall have.
pub(crate) fn spec(id: &ArmId, view: &ClusterView, ids: &Ids, address: std::net::IpAddr) -> ControlPlaneSpec {
    ControlPlaneSpec {
        name: ids.object.clone(),
        display_name: id.name().to_owned(),
        kubernetes_version: view.kubernetes_version.clone(),
        address,
        sans: vec![status::fqdn(view, ids)],
        service_cidr: view.service_cidr,
        dns_service_ip: view.dns_service_ip,
        cluster_domain: resources::aks::CLUSTER_DOMAIN.to_owned(),
    }
}

/// JSON is YAML; the fields are those of `clientcmd/v1`. Written out by hand because people read this file.
fn render(group: &str, name: &str, admin: bool, server: &str, ca: &str, cert: &str, key: &str) -> String {
    // Both have the plain context name, as AKS answers them: `az aks get-credentials --admin` itself appends `-admin`.
    let (context, user) = (
        name,
        format!("{}_{group}_{name}", if admin { "clusterAdmin" } else { "clusterUser" }),
    );
    // Strings as JSON: every name is quoted, so no name can break the file.
    let q = |s: &str| json!(s).to_string();
    let data = |s: &str| B64.encode(s);
    format!(
        "apiVersion: v1\nkind: Config\npreferences: {{}}\nclusters:\n- name: {n}\n  cluster:\n    server: {s}\n    certificate-authority-data: {ca}\n\
         users:\n- name: {u}\n  user:\n    client-certificate-data: {cert}\n    client-key-data: {key}\n\
         contexts:\n- name: {c}\n  context:\n    cluster: {n}\n    user: {u}\ncurrent-context: {c}\n",
        n = q(name),
        s = q(server),
        ca = data(ca),
        u = q(&user),
        cert = data(cert),
        key = data(key),
        c = q(context),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_aks() {
        let text = render("rg", "c1", true, "https://198.19.0.4:443", "CA", "CERT", "KEY");
        for line in [
            "- name: \"clusterAdmin_rg_c1\"",
            "current-context: \"c1\"",
            "    cluster: \"c1\"",
            "    client-key-data: S0VZ",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
