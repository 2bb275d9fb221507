//! A container: its root file system over shared layers, its bundle, its control group; start, stop, removal.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use linux::{
    cgroup::Group,
    mount::{self, Overlay},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Inner, blocking, io, new_id,
    records::{self, ContainerPhase, ContainerRecord, SandboxPhase},
    rootfs, runtime,
    sandbox::{Sandbox, limits, remove_dir},
    spec::{self, Planned, Surroundings},
    supervisor,
    user::{self, User},
};
use crate::{
    api::{ContainerConfig, Error, RuntimeEvent},
    images::{Image, ImageConfig},
    runc::{CgroupView, EXTRAS_FILE, Extras},
    supervisor::protocol::{Exit, Spawn, Stdio},
};

const LOG_BYTES_MAX: u64 = 10 << 20;
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// Exit code of a container that could not be started.
const START_ERROR_CODE: i32 = 128;

pub struct Container {
    pub id: String,
    pub sandbox_id: String,
    record: Mutex<ContainerRecord>,
    pub verb: tokio::sync::Mutex<()>,
    /// Turns true when the exit is recorded.
    exited: watch::Sender<bool>,
}

impl Container {
    pub fn new(record: ContainerRecord) -> Self {
        let exited = watch::Sender::new(record.phase == ContainerPhase::Exited);
        Self {
            id: record.id.clone(),
            sandbox_id: record.sandbox_id.clone(),
            record: Mutex::new(record),
            verb: tokio::sync::Mutex::default(),
            exited,
        }
    }

    pub fn record(&self) -> ContainerRecord {
        self.record.lock().clone()
    }

    fn running(&self) -> bool {
        matches!(
            self.record.lock().phase,
            ContainerPhase::Starting | ContainerPhase::Running
        )
    }
}

/// What later commands in the container need to know, beside the record.
#[derive(serde::Deserialize, serde::Serialize)]
struct Remembered {
    image: ImageConfig,
    user: (u32, u32, Vec<u32>),
}

impl Inner {
    /// Bundle, record and writable layer.
    pub fn container_dir(&self, id: &str) -> PathBuf {
        self.config.root.join("containers").join(id)
    }

    fn rootfs(&self, id: &str) -> PathBuf {
        self.config.run_dir.join("c").join(id)
    }

    pub fn runc_root(&self) -> PathBuf {
        self.config.run_dir.join("runc")
    }

    pub fn container_group(&self, container: &Container) -> Result<Group, Error> {
        let pod = self.pods.child(&format!("pod-{}", container.sandbox_id));
        pod.and_then(|pod| pod.child(&container.id))
            .map_err(|error| runtime("name a control group", &error))
    }

    fn save_container(&self, container: &Container) -> Result<(), Error> {
        records::save(
            &self.container_dir(&container.id).join("record.json"),
            &*container.record.lock(),
        )
        .map_err(io("save a container's record"))
    }

    pub async fn create_container(
        self: &Arc<Self>,
        sandbox_id: &str,
        config: ContainerConfig,
    ) -> Result<String, Error> {
        let sandbox = self.sandbox(sandbox_id)?;
        let _verb = sandbox.verb.lock().await;
        let inner = self.clone();
        let made = sandbox.clone();
        blocking(move || inner.make_container(&made, config)).await
    }

    fn make_container(&self, sandbox: &Sandbox, config: ContainerConfig) -> Result<String, Error> {
        let pod = sandbox.record();
        if pod.phase != SandboxPhase::Ready {
            return Err(Error::Invalid {
                field: "sandbox".to_owned(),
                reason: format!("{} is not ready", sandbox.id),
            });
        }
        let taken = |other: &Arc<Container>| {
            let other = other.record.lock();
            other.sandbox_id == sandbox.id && other.config.name == config.name && other.config.attempt == config.attempt
        };
        if self.containers.lock().values().any(taken) {
            let reason = format!("container {} with attempt {} exists", config.name, config.attempt);
            return Err(Error::Invalid {
                field: "name".to_owned(),
                reason,
            });
        }
        let image = self.find_image(&config.image)?.ok_or_else(|| Error::ImageNotPresent {
            image: config.image.clone(),
            reason: "it was not pulled or loaded".to_owned(),
        })?;
        let id = new_id()?;
        let container = Arc::new(Container::new(ContainerRecord {
            id: id.clone(),
            sandbox_id: sandbox.id.clone(),
            pod_uid: pod.config.pod.uid.clone(),
            phase: ContainerPhase::Creating,
            image_ref: image.digests.first().cloned().unwrap_or_else(|| image.id.clone()),
            layers: image.layers.clone(),
            stop_signal: spec::stop_signal(&image.config.stop_signal),
            log_path: pod.config.log_directory.join(&config.log_path),
            created_at: SystemTime::now(),
            started_at: None,
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            config,
        }));
        let dir = self.container_dir(&id);
        std::fs::create_dir(&dir).map_err(io("create the container's directory"))?;
        self.containers.lock().insert(id.clone(), container.clone());
        let made = self
            .save_container(&container)
            .and_then(|()| self.prepare_container(sandbox, &container, &image));
        let result = made.and_then(|()| {
            container.record.lock().phase = ContainerPhase::Created;
            self.save_container(&container)
        });
        if let Err(error) = result {
            if let Err(left) = self.erase_container(&id) {
                tracing::warn!(container = id, error = %left, "a container that could not be made is left");
            }
            return Err(error);
        }
        Ok(id)
    }

    fn prepare_container(&self, sandbox: &Sandbox, container: &Container, image: &Image) -> Result<(), Error> {
        let config = container.record().config;
        let (dir, root) = (self.container_dir(&container.id), self.rootfs(&container.id));
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        for dir in [&upper, &work, &root] {
            std::fs::create_dir(dir).map_err(io("create the container's directories"))?;
        }
        // The root directory of the container takes its owner and mode from the writable layer, whatever our umask is.
        std::os::unix::fs::chown(&upper, Some(0), Some(0))
            .and_then(|()| std::fs::set_permissions(&upper, std::fs::Permissions::from_mode(0o755)))
            .map_err(io("prepare the writable layer"))?;
        let overlay = Overlay {
            layers: &image.layers,
            upper: Some((&upper, &work)),
        };
        overlay
            .mount_volatile(&root)
            .map_err(|error| runtime("mount the container's root", &error))?;

        let passwd = rootfs::read(&root, "etc/passwd").map_err(io("read the image's users"))?;
        let groups = rootfs::read(&root, "etc/group").map_err(io("read the image's groups"))?;
        let user = user::resolve(&config.security, &image.config.user, &passwd, &groups)?;
        rootfs::make_dir(&root, Path::new(&spec::working_dir(&config, &image.config)))
            .map_err(io("make the working directory"))?;
        for mount in &config.mounts {
            if !mount.host_path.exists() {
                let reason = format!("{} does not exist", mount.host_path.display());
                return Err(Error::Invalid {
                    field: "mounts".to_owned(),
                    reason,
                });
            }
        }
        let planned = self.with_surroundings(sandbox, &container.id, |around| {
            spec::plan(&config, &image.config, &user, around)
        })?;
        let group = self.container_group(container)?;
        self.write_bundle(&dir, &planned, &group, image, &user)?;

        group
            .create()
            .map_err(|error| runtime("create the container's control group", &error))?;
        group
            .set_limits(&limits(&config.resources))
            .map_err(|error| runtime("limit the container", &error))?;
        if !config.security.privileged {
            group
                .allow_devices(&spec::DEVICE_RULES)
                .map_err(|error| runtime("fence devices", &error))?;
        }
        Ok(())
    }

    fn with_surroundings<T>(
        &self,
        sandbox: &Sandbox,
        container_id: &str,
        work: impl FnOnce(&Surroundings<'_>) -> T,
    ) -> T {
        let (pod, pins, root) = (sandbox.record(), self.pins(&sandbox.id), self.rootfs(container_id));
        let etc_files = self.etc_files(&sandbox.id);
        let (net, ipc, uts, pid, shm) = (
            pins.join("net"),
            pins.join("ipc"),
            pins.join("uts"),
            pins.join("pid"),
            pins.join("shm"),
        );
        work(&Surroundings {
            rootfs: &root,
            hostname: &pod.config.hostname,
            netns: (!pod.config.host_network).then_some(net.as_path()),
            ipcns: &ipc,
            utsns: &uts,
            pidns: pod.config.share_process_namespace.then_some(pid.as_path()),
            shm: &shm,
            etc_files: &etc_files,
            fences_devices: self.fences_devices,
            available: &self.available_capabilities,
        })
    }

    fn write_bundle(
        &self,
        dir: &Path,
        planned: &Planned,
        group: &Group,
        image: &Image,
        user: &User,
    ) -> Result<(), Error> {
        let extras = Extras {
            cgroups: group.directories(),
            cgroup_view: Some(if self.fences_devices {
                CgroupView::V1
            } else {
                CgroupView::V2
            }),
            seccomp: planned.seccomp,
            capabilities: planned.capabilities.clone(),
        };
        let remembered = Remembered {
            image: image.config.clone(),
            user: (user.uid, user.gid, user.groups.clone()),
        };
        let write = |name: &str, bytes: serde_json::Result<Vec<u8>>| {
            std::fs::write(dir.join(name), bytes.map_err(std::io::Error::from)?)
        };
        write("config.json", serde_json::to_vec(&planned.spec))
            .and_then(|()| write(EXTRAS_FILE, serde_json::to_vec(&extras)))
            .and_then(|()| write("remembered.json", serde_json::to_vec(&remembered)))
            .map_err(io("write the bundle"))
    }

    /// The `process` object for a command in a container that exists.
    pub fn process_for(&self, container: &Container, argv: &[String], tty: bool) -> Result<serde_json::Value, Error> {
        let dir = self.container_dir(&container.id);
        let read = |name: &str| std::fs::read(dir.join(name)).map_err(io("read the container's bundle"));
        let parse = |error: serde_json::Error| runtime("read the container's bundle", &error);
        let remembered: Remembered = serde_json::from_slice(&read("remembered.json")?).map_err(parse)?;
        let extras: Extras = serde_json::from_slice(&read(EXTRAS_FILE)?).map_err(parse)?;
        let (uid, gid, groups) = remembered.user;
        let mut config = container.record().config;
        config.tty = tty;
        let sandbox = self.sandbox(&container.sandbox_id)?;
        Ok(self.with_surroundings(&sandbox, &container.id, |around| {
            spec::process(
                argv,
                &config,
                &remembered.image,
                &User { uid, gid, groups },
                &extras.capabilities,
                around,
            )
        }))
    }

    pub async fn start_container(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        let _verb = container.verb.lock().await;
        match container.record().phase {
            ContainerPhase::Created => {}
            ContainerPhase::Running => return Ok(()),
            phase => {
                return Err(Error::Invalid {
                    field: "container".to_owned(),
                    reason: format!("it is {phase:?} and cannot be started"),
                });
            }
        }
        // Whoever stops the sandbox waits for this verb first, then kills what it started.
        if !self.sandbox(&container.sandbox_id)?.is_ready() {
            return Err(Error::Invalid {
                field: "sandbox".to_owned(),
                reason: format!("{} is not ready", container.sandbox_id),
            });
        }
        let (inner, started) = (self.clone(), container.clone());
        blocking(move || inner.launch(&started)).await
    }

    fn launch(&self, container: &Container) -> Result<(), Error> {
        let record = {
            let mut record = container.record.lock();
            record.phase = ContainerPhase::Starting;
            record.clone()
        };
        self.save_container(container)?;
        let dir = self.container_dir(&container.id);
        let text = |path: &Path| path.display().to_string();
        let spawn = Spawn {
            id: container.id.clone(),
            argv: vec![
                text(&self.config.runc),
                "run".into(),
                text(&self.runc_root()),
                container.id.clone(),
                text(&dir),
            ],
            helper: true,
            tty: record.config.tty,
            stdio: Stdio::Log {
                path: record.log_path.clone(),
                bytes_max: LOG_BYTES_MAX,
                stdin: record.config.stdin,
                stdin_once: record.config.stdin_once,
            },
            ..Spawn::default()
        };
        // Taken before: a short program may have ended when the answer is here.
        let begun = SystemTime::now();
        let result = self.supervisor.spawn(spawn, &[]);
        let pod_uid = record.pod_uid;
        match result {
            Ok(_) => {
                {
                    // It may have ended already, and the exit been recorded.
                    let mut record = container.record.lock();
                    record.started_at.get_or_insert(begun);
                    if record.phase == ContainerPhase::Starting {
                        record.phase = ContainerPhase::Running;
                    }
                }
                self.save_container(container)?;
                self.emit(RuntimeEvent::ContainerStarted {
                    pod_uid,
                    container_id: container.id.clone(),
                });
                Ok(())
            }
            Err(error) => {
                let error = supervisor("start the container")(error);
                self.kill_container(container);
                let message = match &error {
                    Error::Runtime { reason, .. } => reason.clone(),
                    other => other.to_string(),
                };
                self.record_exit(container, START_ERROR_CODE, "StartError", &message, SystemTime::now());
                Err(error)
            }
        }
    }

    /// Kills whatever runs in the container's group. A failure is logged: whoever waits for the exit will time out.
    pub fn kill_container(&self, container: &Container) {
        let killed = self.container_group(container).and_then(|group| {
            group
                .kill_all(KILL_PATIENCE)
                .map_err(|error| runtime("kill a container", &error))
        });
        if let Err(error) = killed {
            tracing::warn!(container = container.id, %error, "a container could not be killed");
        }
    }

    /// What the supervisor told about a container's end.
    pub fn take_exit(&self, container: &Container, exit: &Exit) {
        if container.record.lock().phase == ContainerPhase::Exited {
            return;
        }
        let oom = self
            .container_group(container)
            .ok()
            .and_then(|group| group.oom_kills().ok())
            .unwrap_or(0);
        let reason = match exit.code {
            0 => "Completed",
            137 if oom > 0 => "OOMKilled",
            _ => "Error",
        };
        let finished = SystemTime::UNIX_EPOCH + Duration::from_nanos(exit.finished_at_ns);
        self.record_exit(container, exit.code, reason, "", finished);
    }

    pub fn record_exit(&self, container: &Container, code: i32, reason: &str, message: &str, finished: SystemTime) {
        {
            let mut record = container.record.lock();
            if record.phase == ContainerPhase::Exited {
                return;
            }
            record.phase = ContainerPhase::Exited;
            // One that ended before its start was noted did start.
            if reason != "StartError" {
                record.started_at.get_or_insert(finished);
            }
            record.finished_at = Some(finished);
            record.exit_code = code;
            record.reason = reason.to_owned();
            record.message = message.to_owned();
        }
        if let Err(error) = self.save_container(container) {
            tracing::warn!(container = container.id, %error, "an exit could not be saved");
        }
        container.exited.send_replace(true);
        let pod_uid = container.record.lock().pod_uid.clone();
        self.emit(RuntimeEvent::ContainerStopped {
            pod_uid,
            container_id: container.id.clone(),
        });
    }

    /// A start that a former process did not see through succeeded.
    pub fn note_running(&self, container: &Container) {
        {
            let mut record = container.record.lock();
            if record.phase != ContainerPhase::Starting {
                return;
            }
            record.phase = ContainerPhase::Running;
            record.started_at.get_or_insert_with(SystemTime::now);
        }
        if let Err(error) = self.save_container(container) {
            tracing::warn!(container = container.id, %error, "a start could not be saved");
        }
    }

    /// Whether the exit was recorded in time. True at once for a container that never ran.
    pub async fn wait_exited(&self, container: &Container, patience: Duration) -> bool {
        if !container.running() {
            return true;
        }
        let mut exited = container.exited.subscribe();
        tokio::time::timeout(patience, exited.wait_for(|exited| *exited))
            .await
            .is_ok()
    }

    pub async fn stop_container(self: &Arc<Self>, id: &str, grace: Duration) -> Result<(), Error> {
        let container = match self.container(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            other => other?,
        };
        if !container.running() {
            return Ok(());
        }
        if !grace.is_zero() {
            let (client, id, signal) = (
                self.supervisor.clone(),
                container.id.clone(),
                container.record().stop_signal,
            );
            blocking(move || {
                client
                    .signal(&id, signal, false)
                    .map_err(supervisor("signal a container"))
            })
            .await?;
            if self.wait_exited(&container, grace).await {
                return Ok(());
            }
        }
        let (inner, killed) = (self.clone(), container.clone());
        blocking(move || {
            inner.kill_container(&killed);
            Ok(())
        })
        .await?;
        if self.wait_exited(&container, KILL_PATIENCE).await {
            return Ok(());
        }
        Err(Error::Timeout {
            doing: "killing a container".to_owned(),
            ms: KILL_PATIENCE.as_millis() as u64,
        })
    }

    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let container = match self.container(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            other => other?,
        };
        self.stop_container(id, Duration::ZERO).await?;
        let _verb = container.verb.lock().await;
        let (inner, id) = (self.clone(), id.to_owned());
        blocking(move || inner.erase_container(&id)).await
    }

    /// Removes everything of a container, whatever exists of it.
    pub fn erase_container(&self, id: &str) -> Result<(), Error> {
        if let Ok(container) = self.container(id) {
            let group = self.container_group(&container)?;
            group
                .kill_all(KILL_PATIENCE)
                .map_err(|error| runtime("kill a container", &error))?;
            group
                .remove()
                .map_err(|error| runtime("remove a control group", &error))?;
        }
        self.supervisor
            .forget(id)
            .or_else(ignore_running)
            .map_err(supervisor("forget a container"))?;
        let root = self.rootfs(id);
        mount::detach(&root).map_err(|error| runtime("unmount a container's root", &error))?;
        match std::fs::remove_dir(&root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io("remove a container's root")(error));
            }
            _ => {}
        }
        remove_dir(&self.runc_root().join(id))?;
        // The record goes with the directory, last.
        remove_dir(&self.container_dir(id))?;
        self.containers.lock().remove(id);
        Ok(())
    }
}

/// A process that was killed but not yet reaped will be forgotten when its exit arrives.
fn ignore_running(error: crate::supervisor::client::ClientError) -> Result<(), crate::supervisor::client::ClientError> {
    match error.reason() {
        Some(crate::supervisor::protocol::Reason::Running) => Ok(()),
        _ => Err(error),
    }
}
