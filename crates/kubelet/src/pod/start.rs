//! Starting one container: image, environment, mounts, security, create, start, postStart.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Capabilities, Container, SecurityContext};
use sandbox::{ContainerConfig, ImageStatus, Mount, SandboxStatus, Seccomp, Security};
use tokio_util::sync::CancellationToken;

use crate::{
    env::{self, Env},
    events::Level,
    fields::FieldContext,
    images,
    kubelet::Core,
    pod::{
        hooks,
        plan::{IMAGE, Waiting},
        view::{Member, PodView, container_resources},
        worker::{Note, Notes},
    },
};

/// Labels and annotations of runtime objects, upstream's names.
pub const POD_UID: &str = "io.kubernetes.pod.uid";
pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
pub const TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";
pub const TERMINATION_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";

pub struct Start {
    pub core: Arc<Core>,
    pub view: Arc<PodView>,
    pub member: Member,
    pub attempt: u32,
    pub sandbox: SandboxStatus,
    /// Older attempts that nobody asks about any more.
    pub old: Vec<String>,
    /// A container that was made but never started.
    pub unstarted: Option<String>,
    pub cancel: CancellationToken,
    pub notes: Notes,
}

impl Start {
    /// Runs to the end or to the first step after cancellation. `Err` = why the container waits.
    pub async fn run(self) -> Result<(), Waiting> {
        let (core, view, m) = (&self.core, &self.view, &self.member);
        let runtime = &core.config.runtime;
        let image = tokio::select! {
            // A pull that is given up leaves layers in the store, which the next one uses.
            image = images::ensure(core, view, m) => image?,
            () = self.cancel.cancelled() => return Ok(()),
        };
        for id in self.old.iter().chain(&self.unstarted) {
            if let Err(e) = runtime.remove_container(id).await {
                tracing::warn!(container = %id, error = %stdx::chain(&e), "old container not removed");
            }
        }
        let config = match self.config(image).await {
            Ok(config) => config,
            Err(message) => {
                core.events.pod(
                    view,
                    Some(m.name()),
                    Level::Warning,
                    "Failed",
                    format!("Error: {message}"),
                );
                return Err(Waiting {
                    reason: "CreateContainerConfigError".into(),
                    message,
                });
            }
        };
        let permit = core.starts.acquire().await;
        if self.cancel.is_cancelled() {
            return Ok(());
        }
        let id = match runtime.create_container(&self.sandbox.id, config).await {
            Ok(id) => id,
            Err(e) => {
                let message = stdx::chain(&e).to_string();
                core.events.pod(
                    view,
                    Some(m.name()),
                    Level::Warning,
                    "Failed",
                    format!("Error: {message}"),
                );
                return Err(Waiting {
                    reason: "CreateContainerError".into(),
                    message,
                });
            }
        };
        core.events
            .pod(view, Some(m.name()), Level::Normal, "Created", "Container created");
        if self.cancel.is_cancelled() {
            let _ = self.notes.send(Note::Container(id)).await;
            return Ok(());
        }
        let started = runtime.start_container(&id).await;
        drop(permit);
        let _ = self.notes.send(Note::Container(id.clone())).await;
        if let Err(e) = started {
            let message = stdx::chain(&e).to_string();
            core.events.pod(
                view,
                Some(m.name()),
                Level::Warning,
                "Failed",
                format!("Error: {message}"),
            );
            return Err(Waiting {
                reason: "RunContainerError".into(),
                message,
            });
        }
        core.events
            .pod(view, Some(m.name()), Level::Normal, "Started", "Container started");
        let Some(hook) = m.container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) else {
            return Ok(());
        };
        let ip = self
            .sandbox
            .ips
            .first()
            .copied()
            .or_else(|| core.config.addresses.first().copied());
        tokio::select! {
            // A hook that is given up dies with its container.
            done = hooks::run(core, hook, &m.container, &id, &self.sandbox.id, ip) => {
                if let Err(why) = done {
                    let message = format!("PostStartHook failed: {why}");
                    core.events.pod(view, Some(m.name()), Level::Warning, "FailedPostStartHook", message);
                    let _ = self.notes.send(Note::HookFailed(id)).await;
                }
            }
            () = self.cancel.cancelled() => {}
        }
        Ok(())
    }

    async fn config(&self, image: ImageStatus) -> Result<ContainerConfig, String> {
        let (core, view, c) = (&self.core, &self.view, &self.member.container);
        let security = security(view, c);
        non_root(&security, &image)?;
        let pod_ips = if view.host_network() {
            &core.config.addresses
        } else {
            &self.sandbox.ips
        };
        let ctx = FieldContext {
            view,
            node: &core.config.capacity,
            host_ips: &core.config.addresses,
            pod_ips,
        };
        let services = core.service_env(view).await;
        let env = env::resolve(core.config.api.as_ref(), &ctx, c, services)
            .await
            .map_err(|e| stdx::chain(&e).to_string())?;
        if !env.skipped.is_empty() {
            let message = format!(
                "Keys [{}] were skipped since they are considered invalid environment variable names.",
                env.skipped.join(", ")
            );
            core.events.pod(
                view,
                Some(&c.name),
                Level::Warning,
                "InvalidEnvironmentVariableNames",
                message,
            );
        }
        let mounts = self.mounts(&env).map_err(|e| stdx::chain(e.as_ref()).to_string())?;
        let expand = |list: &Option<Vec<String>>| -> Vec<String> {
            list.iter()
                .flatten()
                .map(|s| env::expand(s, |n| env.lookup(n).map(str::to_owned)))
                .collect()
        };
        let termination = c
            .termination_message_path
            .clone()
            .unwrap_or_else(|| "/dev/termination-log".into());
        let policy = c.termination_message_policy.clone().unwrap_or_else(|| "File".into());
        let label = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        Ok(ContainerConfig {
            name: c.name.clone(),
            attempt: self.attempt,
            image: image.id,
            command: expand(&c.command),
            args: expand(&c.args),
            working_dir: c.working_dir.clone().filter(|w| !w.is_empty()),
            mounts,
            log_path: PathBuf::from(&c.name).join(format!("{}.log", self.attempt)),
            stdin: c.stdin == Some(true),
            stdin_once: c.stdin_once == Some(true),
            tty: c.tty == Some(true),
            resources: container_resources(c),
            security,
            labels: [
                label(POD_UID, &view.uid),
                label(POD_NAME, &view.name),
                label(POD_NAMESPACE, &view.namespace),
                label(CONTAINER_NAME, &c.name),
            ]
            .into(),
            annotations: [
                label(IMAGE, self.member.image()),
                label(TERMINATION_PATH, &termination),
                label(TERMINATION_POLICY, &policy),
            ]
            .into(),
            env: env.vars,
        })
    }

    fn mounts(&self, env: &Env) -> Result<Vec<Mount>, Box<dyn std::error::Error + Send + Sync>> {
        let (core, view, c) = (&self.core, &self.view, &self.member.container);
        let mut out = Vec::new();
        for m in c.volume_mounts.iter().flatten() {
            let expanded = m
                .sub_path_expr
                .as_deref()
                .map(|e| env::expand(e, |n| env.lookup(n).map(str::to_owned)));
            let sub = expanded.as_deref().or(m.sub_path.as_deref());
            out.push(Mount {
                host_path: core.volumes.mount_source(view, m, sub)?,
                container_path: PathBuf::from(&m.mount_path),
                readonly: m.read_only == Some(true) || content_is_read_only(view, &m.name),
            });
        }
        let has = |out: &[Mount], path: &str| out.iter().any(|m| m.container_path == Path::new(path));
        if !has(&out, "/etc/hosts") {
            let host_path = core.volumes.pod_dir(&view.uid).join("etc-hosts");
            out.push(Mount {
                host_path,
                container_path: "/etc/hosts".into(),
                readonly: false,
            });
        }
        let termination = c
            .termination_message_path
            .clone()
            .unwrap_or_else(|| "/dev/termination-log".into());
        let file = termination_file(core, &view.uid, &c.name, self.attempt);
        prepare_file(&file)?;
        out.push(Mount {
            host_path: file,
            container_path: termination.into(),
            readonly: false,
        });
        Ok(out)
    }
}

/// ConfigMap, Secret, downward API and projected volumes are read-only whatever the mount says (upstream since 1.9.6).
fn content_is_read_only(view: &PodView, name: &str) -> bool {
    view.spec().volumes.iter().flatten().any(|v| {
        v.name == name
            && (v.config_map.is_some() || v.secret.is_some() || v.downward_api.is_some() || v.projected.is_some())
    })
}

/// Where a container writes its termination message.
pub fn termination_file(core: &Core, uid: &str, container: &str, attempt: u32) -> PathBuf {
    core.volumes
        .pod_dir(uid)
        .join("containers")
        .join(container)
        .join(format!("{attempt}.termination-log"))
}

fn prepare_file(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(path, b"")?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
}

/// The container's security context over the pod's.
fn security(view: &PodView, c: &Container) -> Security {
    let none = SecurityContext::default();
    let own = c.security_context.as_ref().unwrap_or(&none);
    let pod = view.spec().security_context.as_ref();
    let privileged = own.privileged == Some(true);
    let caps = own.capabilities.clone().unwrap_or_default();
    let Capabilities { add, drop } = caps;
    let bare = |list: Option<Vec<String>>| -> Vec<String> {
        list.into_iter()
            .flatten()
            .map(|c| c.strip_prefix("CAP_").map(str::to_owned).unwrap_or(c))
            .collect()
    };
    let mut groups = pod.and_then(|p| p.supplemental_groups.clone()).unwrap_or_default();
    if let Some(g) = pod.and_then(|p| p.fs_group)
        && !groups.contains(&g)
    {
        groups.push(g);
    }
    let profile = own
        .seccomp_profile
        .as_ref()
        .or_else(|| pod.and_then(|p| p.seccomp_profile.as_ref()));
    let seccomp = match profile.map(|p| (p.type_.as_str(), p.localhost_profile.clone().unwrap_or_default())) {
        _ if privileged => Seccomp::Unconfined,
        Some(("Unconfined", _)) => Seccomp::Unconfined,
        Some(("Localhost", path)) => Seccomp::Localhost(path),
        _ => Seccomp::RuntimeDefault,
    };
    Security {
        run_as_user: own.run_as_user.or_else(|| pod.and_then(|p| p.run_as_user)),
        run_as_group: own.run_as_group.or_else(|| pod.and_then(|p| p.run_as_group)),
        supplemental_groups: groups,
        run_as_non_root: own.run_as_non_root.or_else(|| pod.and_then(|p| p.run_as_non_root)) == Some(true),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        privileged,
        no_new_privs: own.allow_privilege_escalation == Some(false) && !privileged,
        add_capabilities: bare(add),
        drop_capabilities: bare(drop),
        seccomp,
    }
}

fn non_root(s: &Security, image: &ImageStatus) -> Result<(), String> {
    if !s.run_as_non_root {
        return Ok(());
    }
    match (s.run_as_user, image.uid) {
        (Some(0), _) => Err("container's runAsUser breaks non-root policy".into()),
        (Some(_), _) => Ok(()),
        (None, Some(0)) => Err("container has runAsNonRoot and image will run as root".into()),
        (None, Some(_)) => Ok(()),
        (None, None) if image.username.is_empty() || image.username == "root" => {
            Err("container has runAsNonRoot and image will run as root".into())
        }
        (None, None) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root",
            image.username
        )),
    }
}
