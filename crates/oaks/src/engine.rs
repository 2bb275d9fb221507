//! The embedded container engine as machines and container groups open it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use machines::{node_config, tree::Binaries};
use sandbox::{
    Network,
    embedded::{CniNetwork, Engine, EngineConfig},
    images::Store,
};

use crate::{access::chained, cli::Settings, down::cgroup_name, process};

/// Name of the supervisor of container groups among the instance's processes.
pub const SUPERVISOR: &str = "supervisor";

/// The engine inside a machine: networks by the CNI plug-in, images of the host's store.
pub async fn open_in_machine(data: &Path) -> Result<Engine> {
    let network = CniNetwork::new("/etc/cni/net.d", vec![PathBuf::from("/opt/cni/bin")], data.join("cni"));
    Engine::open(EngineConfig {
        root: data.join("engine"),
        run_dir: "/run/oaks/engine".into(),
        supervisor_socket: node_config::INIT_SOCKET.into(),
        cgroup_parent: "pods".to_owned(),
        runc: "/usr/bin/oaks-runc".into(),
        init: "/usr/sbin/oaks-init".into(),
        network: Arc::new(network),
        images: Store::open(data.join("images")).map_err(chained)?,
        shared_images: Some(Store::open_read_only(node_config::IMAGES)),
    })
    .await
    .map_err(chained)
}

/// The engine of this host's container groups; `network` plugs a NIC of the group's virtual network in.
pub async fn open_for_groups(settings: &Settings, binaries: &Binaries, network: Arc<dyn Network>) -> Result<Engine> {
    let paths = &settings.paths;
    let run = paths.run.join("groups");
    let socket = run.join("init.sock");
    start_supervisor(settings, binaries, &run, &socket)?;
    Engine::open(EngineConfig {
        root: paths.groups().join("engine"),
        run_dir: run.join("engine"),
        supervisor_socket: socket,
        cgroup_parent: format!("{}/groups", cgroup_name(&paths.instance)),
        runc: binaries.runc.clone(),
        init: binaries.init.clone(),
        network,
        images: Store::open(paths.images()).map_err(chained)?,
        shared_images: None,
    })
    .await
    .map_err(chained)
}

/// How often the end of the supervisor is looked for, besides waiting for it.
const SUPERVISOR_LOOK: Duration = Duration::from_secs(1);

/// Starts the supervisor again when it has died, on a thread of its own until `shutdown`. The engine connects again by itself
/// and starts the containers that the dead one can no longer tell about anew.
pub fn keep_supervisor(settings: Settings, binaries: Binaries, shutdown: stdx::Shutdown) {
    let run = settings.paths.run.join("groups");
    let socket = run.join("init.sock");
    let keep = move || {
        while !shutdown.is_triggered() {
            if let Some(alive) = process::find(&settings.paths, SUPERVISOR)
                && !process::wait_gone(alive.pid, SUPERVISOR_LOOK)
            {
                continue;
            }
            if shutdown.is_triggered() {
                return;
            }
            tracing::warn!("the supervisor of container groups has ended; starting it again");
            if let Err(e) = start_supervisor(&settings, &binaries, &run, &socket) {
                tracing::error!(reason = %format!("{e:#}"), "the supervisor of container groups does not start");
                std::thread::park_timeout(SUPERVISOR_LOOK);
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("supervisor".to_owned()).spawn(keep) {
        tracing::error!(%error, "nobody watches the supervisor of container groups");
    }
}

/// One supervisor per host holds the groups' containers; it outlives the host agent.
fn start_supervisor(settings: &Settings, binaries: &Binaries, run: &Path, socket: &Path) -> Result<()> {
    if process::find(&settings.paths, SUPERVISOR).is_some() {
        return Ok(());
    }
    std::fs::create_dir_all(run).with_context(|| format!("creating {}", run.display()))?;
    // A killed one leaves its socket; the new one's appearance is what is waited for.
    let _ = std::fs::remove_file(socket);
    let args = [
        "--socket".into(),
        socket.display().to_string(),
        "--state".into(),
        run.join("init").display().to_string(),
    ];
    process::start_program(&settings.paths, SUPERVISOR, &binaries.init, &args)?;
    let end = std::time::Instant::now() + Duration::from_secs(5);
    while !socket.exists() {
        anyhow::ensure!(
            std::time::Instant::now() < end,
            "the supervisor of container groups does not listen at {}; its log: {}",
            socket.display(),
            settings.paths.log(SUPERVISOR).display()
        );
        std::thread::park_timeout(Duration::from_millis(2));
    }
    Ok(())
}
