//! What this node does not support, found before anything is made: every such field is named by its path.
//!
//! Not here: volumes' content (found while they are set up) and `ephemeral-storage`, whose requests are counted by the
//! scheduler while limits are not enforced.

use k8s_openapi::api::core::v1::{AppArmorProfile, Container, LifecycleHandler, Probe, SeccompProfile, Volume};

use crate::{
    config::{Features, Refusal},
    pod::view::PodView,
};

/// Sysctls that belong to the pod's own network namespace and that upstream calls safe.
const SYSCTLS: &[&str] = &[
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// # Errors
/// The first field that is not supported.
pub fn check(view: &PodView, features: Features) -> Result<(), Refusal> {
    let spec = view.spec();
    let no = |field: &str, message: &str| Err(Refusal::unsupported(field, message));
    let on = |v: Option<bool>| v == Some(true);
    if view.host_network() && !features.host_network {
        return no("spec.hostNetwork", "this node has no host network to share");
    }
    if on(spec.host_pid) {
        return no("spec.hostPID", "sharing the node's process namespace is not supported");
    }
    if on(spec.host_ipc) {
        return no("spec.hostIPC", "sharing the node's IPC namespace is not supported");
    }
    if spec.host_users == Some(false) {
        return no("spec.hostUsers", "user namespaces are not supported");
    }
    if spec.runtime_class_name.as_deref().is_some_and(|n| !n.is_empty()) {
        return no("spec.runtimeClassName", "runtime classes are not supported");
    }
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        let message = "this node runs linux".into();
        return Err(Refusal {
            reason: "PodOSNotSupported".into(),
            field: "spec.os.name".into(),
            message,
            terminal: true,
        });
    }
    if spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()) {
        return no("spec.resourceClaims", "dynamic resource allocation is not supported");
    }
    if spec.resources.is_some() {
        return no("spec.resources", "pod-level resources are not supported");
    }
    if spec.hostname_override.is_some() {
        return no("spec.hostnameOverride", "not supported");
    }
    if let Some(sc) = &spec.security_context {
        if sc.se_linux_options.is_some() {
            return no("spec.securityContext.seLinuxOptions", "SELinux is not supported");
        }
        if sc.windows_options.is_some() {
            return no("spec.securityContext.windowsOptions", "this node runs linux");
        }
        if sc.supplemental_groups_policy.as_deref().is_some_and(|p| p != "Merge") {
            return no(
                "spec.securityContext.supplementalGroupsPolicy",
                "only Merge is supported",
            );
        }
        app_armor(sc.app_armor_profile.as_ref(), "spec.securityContext")?;
        seccomp(sc.seccomp_profile.as_ref(), "spec.securityContext")?;
        for (i, s) in sc.sysctls.iter().flatten().enumerate() {
            if !SYSCTLS.contains(&s.name.as_str()) {
                let message = format!("forbidden sysctl: {:?} not allowlisted", s.name);
                let field = format!("spec.securityContext.sysctls[{i}]");
                return Err(Refusal {
                    reason: "SysctlForbidden".into(),
                    field,
                    message,
                    terminal: true,
                });
            }
        }
    }
    for (i, v) in spec.volumes.iter().flatten().enumerate() {
        volume(v, &format!("spec.volumes[{i}]"), features)?;
    }
    for m in view.members() {
        container(&m.container, &m.path, features, view.host_network())?;
    }
    for (i, e) in spec.ephemeral_containers.iter().flatten().enumerate() {
        if e.target_container_name.as_deref().is_some_and(|t| !t.is_empty()) && !on(spec.share_process_namespace) {
            let field = format!("spec.ephemeralContainers[{i}].targetContainerName");
            return no(
                &field,
                "joining another container's process namespace needs shareProcessNamespace",
            );
        }
    }
    Ok(())
}

fn app_armor(p: Option<&AppArmorProfile>, path: &str) -> Result<(), Refusal> {
    match p {
        Some(p) if p.type_ == "Localhost" => Err(Refusal::unsupported(
            format!("{path}.appArmorProfile"),
            "AppArmor profiles are not supported",
        )),
        _ => Ok(()),
    }
}

fn seccomp(p: Option<&SeccompProfile>, path: &str) -> Result<(), Refusal> {
    match p {
        Some(p) if p.type_ == "Localhost" && p.localhost_profile.as_deref().unwrap_or_default().contains("..") => {
            Err(Refusal::unsupported(
                format!("{path}.seccompProfile.localhostProfile"),
                "must stay below the node's profile folder",
            ))
        }
        _ => Ok(()),
    }
}

fn volume(v: &Volume, path: &str, features: Features) -> Result<(), Refusal> {
    let failed = |field: String, message: &str| {
        Err(Refusal {
            reason: "FailedMount".into(),
            field,
            message: message.into(),
            terminal: false,
        })
    };
    if v.config_map.is_some() || v.secret.is_some() || v.downward_api.is_some() {
        return Ok(());
    }
    if let Some(e) = &v.empty_dir {
        return match e.medium.as_deref() {
            None | Some("" | "Memory") => Ok(()),
            Some(other) => failed(
                format!("{path}.emptyDir.medium"),
                &format!("medium {other} is not supported"),
            ),
        };
    }
    if let Some(p) = &v.projected {
        for (i, s) in p.sources.iter().flatten().enumerate() {
            if s.cluster_trust_bundle.is_some() {
                return failed(
                    format!("{path}.projected.sources[{i}].clusterTrustBundle"),
                    "not supported by this node",
                );
            }
            if s.pod_certificate.is_some() {
                return failed(
                    format!("{path}.projected.sources[{i}].podCertificate"),
                    "not supported by this node",
                );
            }
        }
        return Ok(());
    }
    if v.host_path.is_some() {
        return if features.host_path {
            Ok(())
        } else {
            failed(format!("{path}.hostPath"), "this node has no host directories to share")
        };
    }
    // The kind's name is the one key beside `name`.
    let kind = match serde_json::to_value(v) {
        Ok(serde_json::Value::Object(map)) => map.into_iter().map(|(k, _)| k).find(|k| k != "name"),
        _ => None,
    };
    match kind {
        Some(kind) => failed(
            format!("{path}.{kind}"),
            "this kind of volume is not supported by this node",
        ),
        // No source at all means emptyDir.
        None => Ok(()),
    }
}

fn container(c: &Container, path: &str, features: Features, host_network: bool) -> Result<(), Refusal> {
    let no = |field: &str, message: &str| Err(Refusal::unsupported(format!("{path}.{field}"), message));
    if c.volume_devices.as_ref().is_some_and(|v| !v.is_empty()) {
        return no("volumeDevices", "block devices are not supported");
    }
    if c.restart_policy_rules.as_ref().is_some_and(|v| !v.is_empty()) {
        return no("restartPolicyRules", "not supported");
    }
    if c.resources
        .as_ref()
        .is_some_and(|r| r.claims.as_ref().is_some_and(|c| !c.is_empty()))
    {
        return no("resources.claims", "dynamic resource allocation is not supported");
    }
    for (i, p) in c.ports.iter().flatten().enumerate() {
        let field = format!("ports[{i}].hostPort");
        if p.host_port.is_some_and(|p| p != 0) && !host_network && !features.host_port {
            return no(&field, "host ports are not mapped on this node");
        }
    }
    for (i, m) in c.volume_mounts.iter().flatten().enumerate() {
        if m.mount_propagation.as_deref().is_some_and(|p| p != "None") {
            return no(&format!("volumeMounts[{i}].mountPropagation"), "only None is supported");
        }
        if m.recursive_read_only.as_deref() == Some("Enabled") {
            return no(&format!("volumeMounts[{i}].recursiveReadOnly"), "not supported");
        }
    }
    for (i, e) in c.env.iter().flatten().enumerate() {
        if e.value_from.as_ref().is_some_and(|v| v.file_key_ref.is_some()) {
            return no(&format!("env[{i}].valueFrom.fileKeyRef"), "not supported");
        }
    }
    let probes = [
        ("livenessProbe", &c.liveness_probe),
        ("readinessProbe", &c.readiness_probe),
        ("startupProbe", &c.startup_probe),
    ];
    for (name, p) in probes {
        if let Some(Probe { grpc: Some(_), .. }) = p {
            return no(
                &format!("{name}.grpc"),
                "gRPC probes are not supported; use httpGet, tcpSocket or exec",
            );
        }
    }
    if let Some(l) = &c.lifecycle {
        if l.stop_signal.as_deref().is_some_and(|s| s != "SIGTERM") {
            return no("lifecycle.stopSignal", "only SIGTERM is supported");
        }
        for (name, h) in [("postStart", &l.post_start), ("preStop", &l.pre_stop)] {
            if let Some(LifecycleHandler {
                tcp_socket: Some(_), ..
            }) = h
            {
                return no(
                    &format!("lifecycle.{name}.tcpSocket"),
                    "upstream has removed it; use exec, httpGet or sleep",
                );
            }
        }
    }
    let Some(sc) = &c.security_context else { return Ok(()) };
    if sc.privileged == Some(true) && !features.privileged {
        return no("securityContext.privileged", "this node gives no access to a host");
    }
    if sc.se_linux_options.is_some() {
        return no("securityContext.seLinuxOptions", "SELinux is not supported");
    }
    if sc.windows_options.is_some() {
        return no("securityContext.windowsOptions", "this node runs linux");
    }
    if sc.proc_mount.as_deref().is_some_and(|p| p != "Default") {
        return no("securityContext.procMount", "only Default is supported");
    }
    app_armor(sc.app_armor_profile.as_ref(), &format!("{path}.securityContext"))?;
    seccomp(sc.seccomp_profile.as_ref(), &format!("{path}.securityContext"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::pod;

    fn field(spec: serde_json::Value, features: Features) -> Option<String> {
        check(&PodView::new(pod(spec)), features).err().map(|r| r.field)
    }

    #[test]
    fn names_the_field() {
        let with = |extra: serde_json::Value| {
            let mut spec = json!({"containers": [{"name": "c", "image": "i"}]});
            for (k, v) in extra.as_object().unwrap() {
                spec[k] = v.clone();
            }
            field(spec, Features::MACHINE)
        };
        assert_eq!(with(json!({})), None);
        assert_eq!(with(json!({"hostPID": true})).unwrap(), "spec.hostPID");
        assert_eq!(
            with(
                json!({"volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "nfs": {"server": "s", "path": "/"}}]})
            )
            .unwrap(),
            "spec.volumes[1].nfs"
        );
        assert_eq!(
            with(json!({"containers": [{"name": "c", "image": "i", "livenessProbe": {"grpc": {"port": 1}}}]})).unwrap(),
            "spec.containers[0].livenessProbe.grpc"
        );
        assert_eq!(
            with(json!({"securityContext": {"sysctls": [{"name": "vm.swappiness", "value": "1"}]}})).unwrap(),
            "spec.securityContext.sysctls[0]"
        );
        assert_eq!(
            with(
                json!({"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80, "hostPort": 80}]}]})
            )
            .unwrap(),
            "spec.containers[0].ports[0].hostPort"
        );
    }

    #[test]
    fn a_virtual_node_has_no_host() {
        let spec =
            json!({"containers": [{"name": "c", "image": "i"}], "volumes": [{"name": "h", "hostPath": {"path": "/"}}]});
        assert_eq!(field(spec.clone(), Features::MACHINE), None);
        assert_eq!(field(spec, Features::VIRTUAL).unwrap(), "spec.volumes[0].hostPath");
        let spec = json!({"containers": [{"name": "c", "image": "i", "securityContext": {"privileged": true}}]});
        assert_eq!(
            field(spec, Features::VIRTUAL).unwrap(),
            "spec.containers[0].securityContext.privileged"
        );
    }
}
