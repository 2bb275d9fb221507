//! `oaks host`: the host agent: VNet data plane, edge, machines, container groups and the virtual nodes that use them.

use std::{net::IpAddr, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use machines::{
    agent::{self, AgentConfig, Here, HostPaths, MachineStart},
    namespace::NamespaceMachines,
    tree::Binaries,
};
use reconcile::Informers;
use serde_json::json;
use stdx::{RealClock, Shutdown};
use vnet_model::fabric::{EdgeSpec, Uplink};

use crate::{
    access::{chained, client_of, write_private},
    cli::Settings,
    down::cgroup_name,
    engine,
    group_nics::GroupNics,
    hosts::{Joined, check_name},
    keeper, pull,
    server::stop_on_signal,
    tokens::IdentityTokens,
    up, virtual_nodes, vnet_verbs,
};

pub async fn run(settings: &Settings) -> Result<()> {
    let paths = &settings.paths;
    let shutdown = Shutdown::new();
    stop_on_signal(shutdown.clone())?;
    // Machines' first processes are orphans of their boot process: they come to us to be reaped.
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))
        .context("becoming the reaper of machines")?;
    let kubeconfig = std::fs::read_to_string(paths.host_kubeconfig())
        .with_context(|| format!("reading {}; `oaks server` writes it", paths.host_kubeconfig().display()))?;
    let home = client_of(&kubeconfig)?;
    let informers = Informers::new(home.clone());
    let binaries = Binaries::beside(&std::env::current_exe()?, settings.libexec.as_deref())?;
    for dir in [paths.images(), paths.machines_run(), paths.groups(), paths.usage()] {
        std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    }

    let hierarchy = linux::cgroup::Hierarchy::detect().map_err(chained)?;
    let group = hierarchy.group(cgroup_name(&paths.instance)).map_err(chained)?;
    group
        .create()
        .map_err(chained)
        .context("making the instance's cgroup")?;
    let machines_group = group.child("machines").map_err(chained)?;
    machines_group
        .create()
        .map_err(chained)
        .context("making the machines' cgroup")?;

    let joined = Joined::read(paths)?;
    let here = here(settings, joined.as_ref())?;
    let pull_socket = paths.run.join("pull.sock");
    let fabric = Arc::new(vnet::Fabric::open(&paths.instance, &paths.run).map_err(chained)?);
    let transit = fabric
        .free_transit(EdgeSpec::default().transit)
        .map_err(chained)
        .context("choosing the transit range")?;
    let edge = EdgeSpec {
        transit,
        // Other virtual networks' connections come from their transit addresses; the range's first four are the host's and
        // the edge's.
        service_tags: settings.service_tags.clone().with_cloud(
            vnet_model::rules::without_first(transit, 30)
                .into_iter()
                .chain([settings.public_pool]),
        ),
        pool: settings.public_pool,
        uplink: uplink(&settings.uplink),
        resolvers: if settings.uplink == "none" {
            vec![]
        } else {
            resolvers(Path::new("/etc/resolv.conf"))
        },
        ..EdgeSpec::default()
    };
    // `oaks vnet diff` plans with the same, also after this process.
    let told = vnet_verbs::Told {
        edge: edge.clone(),
        here: here.clone(),
    };
    write_private(&paths.told(), &serde_json::to_vec_pretty(&told)?)?;
    let config = AgentConfig {
        instance: paths.instance.clone(),
        here: here.clone(),
        home: home.clone(),
        informers: informers.clone(),
        fabric: fabric.clone(),
        edge,
        start: Arc::new(MachineStart {
            provider: NamespaceMachines {
                boot_program: binaries.oaks.clone(),
                run_dir: paths.machines_run(),
            },
            binaries: binaries.clone(),
            paths: HostPaths {
                run: paths.run.clone(),
                tree: paths.machine_tree(),
                images: paths.images(),
                machines_data: paths.machine_data(""),
            },
            cgroup: machines_group,
            pull_socket: pull_socket.clone(),
        }),
    };
    fabric.issue_tokens(Arc::new(IdentityTokens {
        home: home.clone(),
        paths: paths.clone(),
        clock: RealClock::shared(),
    }));
    fabric.serve(&tokio::runtime::Handle::current());
    if let Some(underlay) = here.underlay {
        let capacity = agent::hosts::capacity(underlay, here.primary);
        tokio::spawn(agent::hosts::announce(
            home.clone(),
            here.clone(),
            capacity,
            shutdown.clone(),
        ));
    }
    let network = agent::Network::start(config.clone(), shutdown.clone())
        .await
        .map_err(chained)
        .with_context(|| {
            format!(
                "preparing the network with --public-pool {} and --uplink {}",
                settings.public_pool, settings.uplink
            )
        })?;
    let nics = GroupNics::new(&config, network.clone());
    let group_network = container_instances::NicNetwork::new(Arc::new(nics.clone()));
    let groups_engine = Arc::new(
        engine::open_for_groups(settings, &binaries, Arc::new(group_network))
            .await
            .context("opening the engine of container groups")?,
    );
    engine::keep_supervisor(settings.clone(), binaries, shutdown.clone());
    keeper::watch(settings.clone(), shutdown.clone());
    pull::serve(&pull_socket, groups_engine.clone(), shutdown.clone()).await?;
    up::mark_ready(
        &paths.run,
        "host",
        &json!({"pool": settings.public_pool.to_string(), "uplink": settings.uplink, "underlay": here.underlay, "name": here.name}),
    )?;
    tracing::info!(pool = %settings.public_pool, uplink = settings.uplink, "host agent ready");
    let nodes = match joined {
        // Virtual nodes are the first host's.
        Some(_) => tokio::spawn(async {}),
        None => tokio::spawn(virtual_nodes::run(
            settings.clone(),
            config.clone(),
            groups_engine,
            nics,
            shutdown.clone(),
        )),
    };
    let done = agent::run(config, network, shutdown).await.map_err(chained);
    let _ = nodes.await;
    informers.stop().await;
    done
}

fn uplink(text: &str) -> Uplink {
    match text {
        "auto" => Uplink::Auto,
        "none" => Uplink::None,
        link => Uplink::Link(link.to_owned()),
    }
}

/// The host's resolvers, where VNet DNS asks for names it does not know. Loopback ones cannot be reached from the edge.
fn resolvers(path: &Path) -> Vec<IpAddr> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.strip_prefix("nameserver")?.trim().parse().ok())
        .filter(|a: &IpAddr| !a.is_loopback())
        .collect()
}

/// This host among others. A name that the machine's own gives is made fit for an object.
fn here(settings: &Settings, joined: Option<&Joined>) -> Result<Here> {
    if let Some(joined) = joined {
        return Ok(Here {
            name: joined.name.clone(),
            primary: false,
            underlay: Some(joined.underlay),
        });
    }
    let name = settings
        .host_name
        .clone()
        .unwrap_or_else(|| host_name().to_ascii_lowercase());
    if settings.underlay.is_some() {
        check_name(&name).context("the machine's name does not do as a host's; give one with --host-name")?;
    }
    Ok(Here {
        name,
        primary: true,
        underlay: settings.underlay,
    })
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
