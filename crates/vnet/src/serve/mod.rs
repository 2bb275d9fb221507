//! The wire server and VNet DNS at 168.63.129.16 and the metadata service at 169.254.169.254: sockets made inside each virtual network's namespace, served by tasks
//! outside. The caller is known by its source address, which anti-spoofing makes true.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use linux::netns::NetNs;
use parking_lot::RwLock;
use tokio::net::{TcpListener, UdpSocket};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use vnet_model::WIRE_SERVER;
use vnet_model::fabric::VnetSpec;
use vnet_model::instance::METADATA_SERVICE;

use crate::dial;

mod dns;
pub mod metadata;
mod wire;
mod zones;

/// Connections and forwarded questions of one virtual network that are served at once; more wait or are dropped.
const CONCURRENT_MAX: usize = 256;

/// The servers of every virtual network.
#[derive(Default)]
pub struct Servers {
    runtime: Option<Handle>,
    tokens: metadata::Tokens,
    running: BTreeMap<String, Running>,
}

/// One virtual network's tasks; they end with it.
struct Running {
    view: SharedView,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// What answers are computed from; replaced as a whole at each apply.
pub(crate) struct View {
    vnet: VnetSpec,
    names: dns::Names,
    resolvers: Arc<[IpAddr]>,
    tokens: metadata::Tokens,
}

pub(crate) type SharedView = Arc<RwLock<Arc<View>>>;

impl Servers {
    pub fn run_on(&mut self, runtime: Handle) {
        self.runtime = Some(runtime);
    }

    /// Networks that are served from now on, and at their next change, give out these tokens.
    pub fn issue_tokens(&mut self, source: Arc<dyn metadata::TokenSource>) {
        self.tokens = Some(source);
    }

    /// Where tasks run, once that is known.
    pub fn runtime(&self) -> Option<Handle> {
        self.runtime.clone()
    }

    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.running.retain(|key, _| wanted(key));
    }

    /// Starts the network's servers, or gives the running ones the new spec. Failures are logged and tried again at the
    /// next apply.
    pub fn serve(&mut self, vnet: &VnetSpec, ns: &NetNs, resolvers: &Arc<[IpAddr]>) {
        let Some(runtime) = &self.runtime else { return };
        if let Some(running) = self.running.get(&vnet.key) {
            let now = running.view.read().clone();
            if now.vnet != *vnet || now.resolvers != *resolvers {
                *running.view.write() = Arc::new(View::new(vnet, resolvers, &self.tokens));
            }
            return;
        }
        let view: SharedView = Arc::new(RwLock::new(Arc::new(View::new(vnet, resolvers, &self.tokens))));
        match start(ns, &view, runtime) {
            Ok(tasks) => {
                self.running.insert(vnet.key.clone(), Running { view, tasks });
            }
            Err(error) => {
                tracing::error!(vnet = vnet.key, %error, "cannot open the wire server, DNS and the metadata service");
            }
        }
    }
}

impl View {
    fn new(vnet: &VnetSpec, resolvers: &Arc<[IpAddr]>, tokens: &metadata::Tokens) -> Self {
        Self {
            vnet: vnet.clone(),
            names: dns::Names::of(vnet),
            resolvers: resolvers.clone(),
            tokens: tokens.clone(),
        }
    }
}

fn start(ns: &NetNs, view: &SharedView, runtime: &Handle) -> std::io::Result<Vec<JoinHandle<()>>> {
    let at = |port| SocketAddr::from((WIRE_SERVER, port));
    let (wire, names_tcp) = (dial::listen(ns, at(80))?, dial::listen(ns, at(53))?);
    let names = dial::datagrams(ns, at(53))?;
    let metadata = dial::listen(ns, SocketAddr::from((METADATA_SERVICE, 80)))?;
    for listener in [&wire, &names_tcp, &metadata] {
        listener.set_nonblocking(true)?;
    }
    names.set_nonblocking(true)?;
    let _entered = runtime.enter();
    let (wire, names_tcp) = (TcpListener::from_std(wire)?, TcpListener::from_std(names_tcp)?);
    let names = UdpSocket::from_std(names)?;
    let metadata = TcpListener::from_std(metadata)?;
    Ok(vec![
        runtime.spawn(wire::serve(wire, view.clone())),
        runtime.spawn(metadata::serve(metadata, view.clone())),
        runtime.spawn(dns::serve_tcp(names_tcp, view.clone())),
        runtime.spawn(dns::serve_udp(names, view.clone())),
    ])
}

/// Accepts for ever; at most [`CONCURRENT_MAX`] connections at once, the others wait in the kernel's queue.
async fn accept_each<F>(listener: TcpListener, each: impl Fn(tokio::net::TcpStream, SocketAddr) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let slots = Arc::new(tokio::sync::Semaphore::new(CONCURRENT_MAX));
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let served = each(stream, peer);
                tasks.spawn(async move {
                    served.await;
                    drop(slot);
                });
            }
            // Out of descriptors, or the peer went away: neither is a reason to stop, nor to spin.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        }
    }
}
